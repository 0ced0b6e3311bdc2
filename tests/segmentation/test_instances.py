"""Masks of the original image against torch's resizing, mask by mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from detrkit.segmentation import instances
from detrkit.segmentation.instances import instance_masks


@pytest.mark.parametrize("size", [(31, 44), (8, 6), (5, 90), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_where_resized_logits_are_above_zero(
    size: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "AT_ONCE", 2 * size[0] * size[1])
    logits = torch.randn(5, 8, 6, generator=generator).to(dtype)
    logits[1], logits[2] = 1, -1
    found = instance_masks(logits, size)
    wanted = functional.interpolate(logits[None].float(), size=size, mode="bilinear")[0]
    assert found.sizes.tolist() == [list(size)] * 5
    differs = torch.from_numpy(found.decode()) != (wanted > 0)
    assert not differs[wanted.abs() > 1e-5].any()
    assert found.areas().tolist()[1:3] == [size[0] * size[1], 0]


def test_what_is_as_likely_as_not_is_outside() -> None:
    assert instance_masks(torch.zeros(1, 8, 6), (8, 6)).areas().tolist() == [0]


def test_no_masks_of_no_queries() -> None:
    assert len(instance_masks(torch.zeros(0, 8, 6), (30, 40))) == 0
