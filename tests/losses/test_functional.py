"""Each loss term against its formula in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from detrkit.losses.functional import (
    class_error,
    dice_loss,
    focal_loss,
    giou_loss,
    l1_loss,
    mask_focal_loss,
    weighted_cross_entropy,
)


def test_cross_entropy_is_the_official_weighted_average(generator: torch.Generator) -> None:
    logits = torch.randn(3, 2, 5, 4, generator=generator)
    classes = torch.randint(0, 4, (3, 2, 5), generator=generator)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.1])
    found = weighted_cross_entropy(logits, classes, weight)
    assert found.shape == (3,)
    for layer in range(3):
        # As the official code calls it: classes second, averaged over weights.
        expected = F.cross_entropy(logits[layer].transpose(1, 2), classes[layer], weight)
        assert found[layer].item() == pytest.approx(expected.item(), rel=1e-5)
        terms = [
            (float(weight[label]), -float(row.log_softmax(0)[label]))
            for row, label in zip(logits[layer].flatten(0, 1), classes[layer].flatten().tolist(), strict=True)
        ]
        by_hand = sum(w * term for w, term in terms) / sum(w for w, _ in terms)
        assert found[layer].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_the_focal_loss_has_a_gradient_where_the_sigmoid_has_none(gamma: float) -> None:
    logits = torch.tensor([18.0, -120, 120, -1, 40]).view(1, 1, 5, 1).requires_grad_()
    wanted = torch.tensor([1.0, 0, 1, 1, 0]).view(1, 1, 5, 1)
    focal_loss(logits, wanted, 1.0, 0.25, gamma).sum().backward()
    exact = logits.detach().double().requires_grad_()
    wrong = (exact * (1 - 2 * wanted)).sigmoid()
    terms = (0.75 - 0.5 * wanted) * wrong**gamma * -torch.nn.functional.logsigmoid(exact * (2 * wanted - 1))
    terms.sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-3, rtol=1e-5)


def test_cross_entropy_without_any_weight_is_zero() -> None:
    logits = torch.randn(2, 1, 3, 2, requires_grad=True)
    found = weighted_cross_entropy(logits, torch.ones(2, 1, 3, dtype=torch.int64), torch.tensor([1.0, 0.0]))
    assert found.tolist() == [0, 0]
    found.sum().backward()
    assert logits.grad is not None
    assert not bool(logits.grad.any())


@pytest.mark.parametrize("num_boxes", [1.0, 4.0, 2.5])
def test_box_terms_are_sums_over_the_number_of_boxes(num_boxes: float, generator: torch.Generator) -> None:
    predicted, boxes = (0.1 + 0.4 * torch.rand(2, 4, 4, generator=generator) for _ in range(2))
    l1, giou = l1_loss(predicted, boxes, num_boxes), giou_loss(predicted, boxes, num_boxes)
    for layer in range(2):
        distance = missing = 0.0
        for a, b in zip(predicted[layer].tolist(), boxes[layer].tolist(), strict=True):
            distance += sum(abs(x - y) for x, y in zip(a, b, strict=True))
            missing += 1 - plain_giou(a, b)
        assert l1[layer].item() == pytest.approx(distance / num_boxes, rel=1e-5)
        assert giou[layer].item() == pytest.approx(missing / num_boxes, rel=1e-4)


def plain_giou(a: list[float], b: list[float]) -> float:
    """Generalised IoU of two cxcywh boxes."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    both = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    either = a[2] * a[3] + b[2] * b[3] - both
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return both / either - (hull - either) / hull


def test_terms_of_nothing_are_zero_and_keep_the_graph() -> None:
    predicted = torch.rand(3, 0, 4, requires_grad=True)
    boxes = torch.zeros(3, 0, 4)
    for term in (l1_loss, giou_loss):
        found = term(predicted, boxes, 1.0)
        assert found.tolist() == [0, 0, 0]
        found.sum().backward()


def test_perfect_boxes_cost_nothing() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.2, 0.1, 0.1]]])
    assert l1_loss(boxes, boxes, 2.0).item() == 0
    assert giou_loss(boxes, boxes, 2.0).item() == pytest.approx(0, abs=1e-6)


def plain_focal(chance: float, wanted: float, alpha: float, gamma: float) -> float:
    """Equation 5 of the paper for one probability."""
    right = chance if wanted else 1 - chance
    return -(alpha if wanted else 1 - alpha) * (1 - right) ** gamma * math.log(right)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.7, 1.5)])
def test_focal_losses_are_equation_5(alpha: float, gamma: float, generator: torch.Generator) -> None:
    logits = 2 * torch.randn(3, 2, 5, 4, generator=generator)
    wanted = (torch.rand(3, 2, 5, 4, generator=generator) < 0.3).float()
    found = focal_loss(logits, wanted, 2.5, alpha, gamma)
    of_pixels = mask_focal_loss(logits[0, 0][None], wanted[0, 0][None], alpha, gamma)
    terms = [
        [
            plain_focal(chance, want, alpha, gamma)
            for chance, want in zip(logits[layer].sigmoid().flatten().tolist(), wanted[layer].flatten(), strict=True)
        ]
        for layer in range(3)
    ]
    assert found.tolist() == pytest.approx([sum(layer) / 2.5 for layer in terms], rel=1e-5)
    assert of_pixels.tolist() == pytest.approx([sum(terms[0][:20]) / 20], rel=1e-5)


def test_losses_of_masks_by_hand() -> None:
    """Of four pixels, each with a chance of 3/4, the mask holds one; of the second mask nothing is known to be."""
    logits = torch.full((2, 2, 2), math.log(3))
    masks = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 0]]])
    hit, miss = -0.25 * 0.25**2 * math.log(0.75), -0.75 * 0.75**2 * math.log(0.25)
    assert mask_focal_loss(logits, masks).tolist() == pytest.approx([(hit + 3 * miss) / 4, miss], rel=1e-5)
    assert dice_loss(logits, masks).tolist() == pytest.approx([1 - (2 * 0.75 + 1) / (3 + 1 + 1), 1 - 1 / (3 + 0 + 1)])
    sure = torch.where(masks > 0, 50.0, -50.0)
    assert dice_loss(sure, masks).tolist() == pytest.approx([0, 0])
    assert mask_focal_loss(sure, masks).tolist() == pytest.approx([0, 0])


def test_class_error_is_a_share() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [2.0, 0, 1.0]])
    assert class_error(logits, torch.tensor([0, 1, 0, 1])).item() == 0.5
    nothing = class_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert nothing.item() == 0
    assert not math.isnan(nothing.item())
