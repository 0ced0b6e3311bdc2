"""DETR's mask head against the official implementation: same weights, same inputs, same figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Case
from torch import Tensor

from detrkit import convert
from detrkit.losses.criterion import pad_targets
from detrkit.models import detr
from detrkit.segmentation.head import OFFICIAL
from detrkit.segmentation.model import Segmenter, Wanted, wanted_masks
from detrkit.structures import Predictions, Target

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    case = Case.load(golden, "detr_r50_panoptic")
    targets = tuple(
        with_filled_box(target, *size) for target, size in zip(case.batch.targets, case.facts["sizes"], strict=True)
    )
    case.batch = case.batch._replace(targets=targets)
    return case


def with_filled_box(target: Target, height: int, width: int) -> Target:
    """The target with masks of all pixels whose centres lie in its boxes."""
    x, y, w, h = (target.boxes * torch.tensor([width, height, width, height]))[:, :, None, None].unbind(1)
    columns, rows = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    return target._replace(masks=((columns - x).abs() <= w / 2) & ((rows - y).abs() <= h / 2))


def official_names(key: str, tensor: Tensor) -> set[str]:
    """The names in a segmenter of the parts of an official tensor."""
    if key.startswith("detr."):
        return {f"detector.{name}" for name in convert.rename({key.removeprefix("detr."): tensor}, detr.OFFICIAL)}
    return {f"mask_head.{name}" for name in convert.rename({key: tensor}, OFFICIAL)}


@pytest.fixture(scope="module")
def model(case: Case) -> Segmenter:
    found = convert.read(case.state, dropout=0.0).segmenter
    assert found is not None
    return found


def test_masks_of_all_queries(case: Case, model: Segmenter) -> None:
    images, padding, _ = case.batch
    image, query = torch.arange(2).repeat_interleave(100), torch.arange(100).repeat(2)
    with torch.no_grad():
        found = model.eval()(images, padding)
        masks = model.masks(found, image, query)
    official = case.arrays["eval_pred_masks"]
    np.testing.assert_allclose(masks.numpy().reshape(official.shape), official, atol=1e-3, rtol=0)
    np.testing.assert_allclose(found.predictions.boxes[-1].numpy(), case.arrays["eval_pred_boxes"], atol=1e-4, rtol=0)


def test_losses_and_gradients(case: Case, model: Segmenter) -> None:
    images, padding, targets = case.batch
    model.train().zero_grad()
    detector = model.detector
    assert isinstance(detector, detr.Model)
    criterion, padded = detr.criterion(detector.config), pad_targets(targets)

    def wanted(predictions: Predictions) -> Wanted:
        return wanted_masks(criterion.match(predictions, padded), targets, (images.shape[-2], images.shape[-1]))

    found = model(images, padding, wanted)
    matches, count = criterion.match(found.predictions, padded), float(sum(padded.counts))
    losses = criterion.terms(found.predictions, padded, matches)
    losses = losses.of_last_layer("mask", found.terms.focal / count, 1.0)
    losses = losses.of_last_layer("dice", found.terms.dice / count, 1.0)
    official = case.facts["losses"]
    for name, theirs in (("class", "loss_ce"), ("giou", "loss_giou"), ("mask", "loss_mask"), ("dice", "loss_dice")):
        assert losses.values[losses.names.index(name), -1].item() == pytest.approx(official[theirs], rel=1e-4), name
    assert losses.total.item() == pytest.approx(case.facts["total_loss"], rel=1e-4)

    losses.total.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    shapes = {key: torch.zeros(()).expand(shape) for key, shape in case.facts["state_dict"].items()}
    checked = set()
    for key, norm in case.facts["grad_norms"].items():
        ours = official_names(key, shapes[key])
        total = sum(float(gradients[name].square().sum()) for name in ours) ** 0.5
        # Where the true gradient is zero (a key's bias), both sides are rounding noise.
        assert total == pytest.approx(norm, rel=1e-3, abs=1e-5), key
        checked.update(ours)
    assert checked == set(gradients)
