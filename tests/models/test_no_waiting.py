"""What a model computes needs no value of its device on the way: a look at one would wait for all work before it.

On the device `meta` there are no values, and whoever asks for one gets an error.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from detrkit import models


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device knows no autocast, not even to switch it off."""
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


SMALL: dict[str, Any] = {"num_queries": 6, "encoder_layers": 1, "decoder_layers": 2}


def inputs(*, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    images = torch.zeros(2, 3, 64, 96, device="meta")
    return images, torch.zeros(2, 64, 96, dtype=torch.bool, device="meta") if padded else None


def test_the_device_has_no_values() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(torch.zeros(3, device="meta").any())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["detr-nano", "detr-r18", "conditional-detr-nano", "conditional-detr-r50"])
def test_a_forward_pass(preset: str, training: bool, padded: bool) -> None:
    model = models.build(preset, **SMALL).to("meta").train(training)
    found = model(*inputs(padded=padded))
    assert found.logits.device.type == "meta"
    assert found.boxes.shape[1:] == (2, found.logits.shape[2], 4)
