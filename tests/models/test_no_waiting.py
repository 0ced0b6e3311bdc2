"""What a model computes needs no value of its device on the way: a look at one would wait for all work before it.

On the device `meta` there are no values, and whoever asks for one gets an error.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detrkit import models
from detrkit.losses.matching import Matches
from detrkit.nn.transformer import cells_outside
from detrkit.one_shot.model import OneShot
from detrkit.pretrain.up_detr import UpDetr
from detrkit.segmentation.model import Segmenter, Wanted, wanted_masks
from detrkit.structures import Target


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


def test_nothing_is_looked_at_where_a_graph_is_made_for_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, padding = torch.zeros(2, 3, 4, 6), torch.zeros(2, 64, 96, dtype=torch.bool)
    assert cells_outside(padding, images)[1] is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cells_outside(padding, images)[1] is not None


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["detr-nano", "conditional-detr-nano"])
def test_what_is_exported_on_a_processor_holds_for_other_padding(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = models.build(preset, **SMALL, backbone="resnet-nano", stride=16, dim=32, heads=4).eval()
    images, padding = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    exported = torch.export.export(model, (images, padding)).module()
    padded = padding.clone()
    padded[1, :, 64:] = True
    with torch.no_grad():
        for each in (padding, padded):
            torch.testing.assert_close(exported(images, each).boxes, model(images, each).boxes)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["detr-nano", "detr-r18", "conditional-detr-nano", "conditional-detr-r50"])
def test_a_forward_pass(preset: str, training: bool, padded: bool) -> None:
    model = models.build(preset, **SMALL).to("meta").train(training)
    found = model(*inputs(padded=padded))
    assert found.logits.device.type == "meta"
    assert found.boxes.shape[1:] == (2, found.logits.shape[2], 4)


@pytest.mark.parametrize("preset", ["detr-nano", "conditional-detr-nano"])
@pytest.mark.parametrize("patches", [3, 2])
def test_a_pass_of_pre_training(preset: str, patches: int) -> None:
    task = UpDetr(models.build(preset, **SMALL), patches=3, shuffle=True).to("meta").train()
    found = task(*inputs(padded=True), torch.zeros(2, patches, 3, 32, 32, device="meta"))
    assert found.boxes.shape[1:] == (2, 2 * patches, 4)


@pytest.mark.parametrize("preset", ["detr-nano", "conditional-detr-nano"])
def test_a_pass_of_find_by_example(preset: str) -> None:
    model = OneShot(models.build(preset, **SMALL), width=16).to("meta").train()
    which = torch.zeros(3, dtype=torch.int64, device="meta")
    found = model(*inputs(padded=True), which, which, torch.zeros(3, 4, device="meta"))
    assert found.boxes.shape[1:] == (3, 6, 4)


@pytest.mark.parametrize("preset", ["detr-nano", "conditional-detr-nano"])
def test_a_pass_with_masks(preset: str) -> None:
    model = Segmenter(models.build(preset, **SMALL), chunk=2).to("meta").train()
    pairs = torch.zeros(3, dtype=torch.int64, device="meta")
    wanted = Wanted(pairs, pairs, torch.zeros(3, 64, 96, dtype=torch.bool, device="meta"))
    found = model(*inputs(padded=True), lambda _: wanted)
    (found.terms.focal + found.terms.dice).backward()
    assert found.terms.focal.device.type == "meta"
    assert model.mask_head.norms[0].weight.grad is not None


class Looks(TorchDispatchMode):
    """Counts what would wait for a device: how many rows there are is known to whoever has seen the values."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, aten = operation.overloadpacket, torch.ops.aten
        by_truth = name is aten.index and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.count += by_truth or name in (aten.nonzero, aten._local_scalar_dense, aten.masked_select)
        return operation(*args, **(kwargs or {}))


def test_which_masks_are_known_is_looked_at_once() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, :4] = True
    targets = [Target(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), name, masks) for name in ("a", "b")]
    both = torch.tensor([[0, 1, 1, 0]])
    matches = Matches(torch.tensor([0, 0, 1, 1]), both, both)
    with Looks() as looks:
        wanted = wanted_masks(matches, targets, (8, 8))
    assert (wanted.image.tolist(), wanted.query.tolist()) == ([0, 1], [1, 1])
    assert looks.count == 1
