"""A mask head over detectors of all variants: what is computed for some queries is what all would have given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contracts.test_variants import small
from torch import Tensor
from torch.nn import functional as F

from detrkit import Batch, Target, UsageError, models
from detrkit.losses.criterion import pad_targets
from detrkit.losses.functional import dice_loss, mask_focal_loss
from detrkit.losses.matching import Matches
from detrkit.segmentation.head import MaskHead
from detrkit.segmentation.model import Segmenter, Wanted, wanted_masks
from detrkit.structures import Memory, Predictions

PRESETS = {"detr": "detr-r50", "conditional_detr": "conditional-detr-nano"}


def segmenter(name: str = "detr", *, fields: dict[str, Any] | None = None, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    variant = models.variant(name)
    preset = PRESETS.get(name, next(iter(variant.PRESETS)))
    config = dataclasses.replace(small(variant.PRESETS[preset]), **(fields or {}))
    if hasattr(config, "dropout"):
        config = dataclasses.replace(config, dropout=0.0)
    return Segmenter(variant.Model(config), **options)


@pytest.fixture
def batch() -> Batch:
    """Three images: with two objects, with none, and with one whose mask is not known beside one whose mask is."""
    first = torch.zeros(2, 70, 96, dtype=torch.bool)
    first[0, 10:40, 20:60], first[1, 50:65, 5:90] = True, True
    third = torch.zeros(2, 48, 64, dtype=torch.bool)
    third[1, :20, :30] = True
    boxes = torch.tensor([[0.4, 0.4, 0.3, 0.2], [0.7, 0.6, 0.2, 0.5]])
    targets = [
        Target(torch.tensor([2, 0]), boxes, "a.png", first),
        Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), "b.png", first[:0, :64, :50]),
        Target(torch.tensor([1, 1]), boxes, "c.png", third),
    ]
    return Batch.from_images([torch.randn(3, 70, 96), torch.randn(3, 64, 50), torch.randn(3, 48, 64)], targets)


def asked(model: Segmenter, batch: Batch) -> tuple[Any, Matches]:
    """The loss terms of a training step, and the matches that they are of."""
    detector: Any = model.detector
    criterion = models.variant(type(detector).__module__.rsplit(".", 1)[-1]).criterion(detector.config)
    kept: list[Matches] = []

    def wanted(predictions: Predictions) -> Wanted:
        kept.append(criterion.match(predictions, pad_targets(batch.targets)))
        return wanted_masks(kept[0], batch.targets, (batch.images.shape[-2], batch.images.shape[-1]))

    return model(batch.images, batch.padding, wanted), kept[0]


@pytest.mark.parametrize("name", models.names())
def test_the_loss_of_some_is_that_of_all_queries_chosen_from(name: str, batch: Batch) -> None:
    model = segmenter(name, chunk=2).train()
    found, matches = asked(model, batch)
    (2 * found.terms.focal + found.terms.dice).backward()
    mine = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}

    # The straightforward way: masks of all queries at once, from which those of the matched ones are taken.
    model.zero_grad()
    again = model(batch.images, batch.padding)
    hidden = again.predictions.hidden[-1]
    images, queries = hidden.shape[:2]
    every = model.mask_head(
        again.canvas,
        torch.arange(images).repeat_interleave(queries),
        hidden.flatten(0, 1),
        again.predictions.boxes[-1].flatten(0, 1).detach(),
    )
    every = F.interpolate(every[:, None], size=batch.images.shape[-2:], mode="bilinear")[:, 0]
    every = every.unflatten(0, (images, queries))
    focal, dice = torch.zeros(()), torch.zeros(())
    for image, query, row in zip(matches.image, matches.query[-1], matches.target[-1], strict=True):
        true = batch.targets[image].masks[row]
        if true.any():
            padded = F.pad(true, (0, every.shape[-1] - true.shape[1], 0, every.shape[-2] - true.shape[0])).float()[None]
            focal = focal + mask_focal_loss(every[image, query][None], padded)[0]
            dice = dice + dice_loss(every[image, query][None], padded)[0]
    torch.testing.assert_close(found.terms.focal, focal, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.terms.dice, dice, atol=1e-5, rtol=1e-5)
    (2 * focal + dice).backward()
    theirs = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    assert {key for key in mine if key.startswith("mask_head.")} == {
        key for key in theirs if key.startswith("mask_head.")
    }
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, atol=1e-5, rtol=1e-3, msg=key)


def test_masks_that_are_not_known_teach_nothing(batch: Batch) -> None:
    model = segmenter().train()
    _, matches = asked(model, batch)
    wanted = wanted_masks(matches, batch.targets, (70, 96))
    assert wanted.image.tolist() == [0, 0, 2]
    assert sorted(wanted.masks.sum((1, 2)).tolist()) == [600, 1200, 1275]
    with pytest.raises(UsageError, match="no masks"):
        wanted_masks(matches, [target._replace(masks=None) for target in batch.targets], (70, 96))


def test_a_batch_without_objects_still_reaches_every_parameter(batch: Batch) -> None:
    model = segmenter().train()
    empty = batch._replace(images=batch.images[1:2], padding=batch.padding[1:2], targets=batch.targets[1:2])
    found, _ = asked(model, empty)
    (found.terms.focal + found.terms.dice).backward()
    assert found.terms.focal.item() == found.terms.dice.item() == 0
    for key, parameter in model.mask_head.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


def test_how_many_are_computed_together_changes_nothing(batch: Batch) -> None:
    model = segmenter().eval()
    with torch.no_grad():
        found = model(batch.images, batch.padding)
        image, query = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([3, 1, 6, 0, 3])
        together = model.masks(found, image, query)
        model.chunk = 1
        alone = model.masks(found, image, query)
        none = model.masks(found, image[:0], query[:0])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[0], together[4])
    assert together.shape == (5, 18, 24)
    assert none.shape == (0, 18, 24)


@pytest.mark.parametrize(("attention", "total"), [("joint", 1.0), ("per-head", 4.0)])
def test_attention_is_normalised_as_it_is_said(attention: Any, total: float, batch: Batch) -> None:
    head = segmenter(attention=attention).mask_head
    memory, hidden = some_memory(batch)
    maps = head.attention_maps(head.prepare(memory, torch.ones(2, 2)), torch.tensor([0, 1]), hidden)
    torch.testing.assert_close(maps.sum((1, 2, 3)), torch.full((2,), total))
    if attention == "per-head":
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4))
    assert maps[1, :, :, 2:].abs().max().item() == 0, "where an image is padded nobody looks"


def some_memory(batch: Batch) -> tuple[Memory, Tensor]:
    model = segmenter().eval()
    detector: Any = model.detector
    with torch.no_grad():
        memory = detector.encode(batch.images[:2], batch.padding[:2])
    return memory, torch.randn(2, 32)


def test_the_head_is_told_a_box_where_it_is_however_wide_the_image_is() -> None:
    model = segmenter(fields={"stride": 16}).eval()
    images = torch.randn(1, 3, 32, 65)
    with torch.no_grad():
        canvas = model(images, None).canvas
        padded = model(F.pad(images, (0, 31)), torch.arange(96).expand(1, 32, 96) >= 65).canvas
    assert canvas.base.shape[-2:] == (2, 5)
    assert canvas.extent.tolist() == [[1, pytest.approx(65 / 80)]]
    assert padded.extent.tolist() == [[1, pytest.approx(65 / 96)]]


def test_a_frozen_detector_stays_as_it_is_and_keeps_nothing(batch: Batch) -> None:
    model = segmenter("detr", fields={"query_groups": 2}, frozen=True).train()
    detector: Any = model.detector
    assert not detector.training
    assert model.mask_head.training
    found, _ = asked(model, batch)
    assert not found.predictions.boxes.requires_grad
    assert found.predictions.boxes.shape[0] == 2, "groups of queries are for learning"
    (found.terms.focal + found.terms.dice).backward()
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert all(parameter.grad is not None for parameter in model.mask_head.parameters())


@pytest.mark.parametrize(("stride", "channels"), [(32, 3), (16, 2), (8, 1)])
def test_any_stride_with_a_finer_level_has_masks_at_the_finest(stride: int, channels: int, batch: Batch) -> None:
    model = segmenter("conditional_detr", fields={"stride": stride}).eval()
    assert len(model.mask_head.adapters) == channels
    with torch.no_grad():
        found = model(batch.images, batch.padding)
        masks = model.masks(found, torch.tensor([0]), torch.tensor([0]))
    assert masks.shape == (1, 18, 24)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="no finer map"):
        segmenter("conditional_detr", fields={"stride": 4})
    with pytest.raises(UsageError, match="chunk"):
        segmenter(chunk=0)
    with pytest.raises(UsageError, match=r"attention.*'both'.*joint, per-head"):
        MaskHead(32, 4, (8, 8), "both")
    with pytest.raises(UsageError, match="multiple of 5 heads"):
        MaskHead(32, 5, (8, 8))
