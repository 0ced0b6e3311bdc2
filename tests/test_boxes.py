"""Box geometry: what must hold for any box, degenerate ones included, and suppression against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detrkit import boxes as geometry

coordinate = st.floats(0, 1, width=32)
side = st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.just(1e-30))


@st.composite
def cxcywh(draw: st.DrawFn, count: int | None = None) -> Tensor:
    count = draw(st.integers(1, 5)) if count is None else count
    rows = [[draw(coordinate), draw(coordinate), draw(side), draw(side)] for _ in range(count)]
    return torch.tensor(rows, dtype=torch.float32)


def one(*numbers: float) -> Tensor:
    return torch.tensor([numbers])


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes of positive area, in plain Python."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@given(cxcywh())
def test_conversions_undo_each_other(boxes: Tensor) -> None:
    corners = geometry.cxcywh_to_xyxy(boxes)
    torch.testing.assert_close(geometry.xyxy_to_cxcywh(corners), boxes, atol=1e-6, rtol=0)
    torch.testing.assert_close(geometry.area(corners), boxes[:, 2] * boxes[:, 3], atol=1e-6, rtol=1e-5)


def test_conversion_by_hand() -> None:
    assert geometry.cxcywh_to_xyxy(one(50.0, 40, 20, 10)).tolist() == [[40, 35, 60, 45]]
    assert geometry.xyxy_to_cxcywh(one(40.0, 35, 60, 45)).tolist() == [[50, 40, 20, 10]]


@given(cxcywh(), cxcywh())
def test_overlaps_are_symmetric_and_bounded(a: Tensor, b: Tensor) -> None:
    a, b = geometry.cxcywh_to_xyxy(a), geometry.cxcywh_to_xyxy(b)
    iou, giou = geometry.pairwise_iou(a, b), geometry.pairwise_giou(a, b)
    assert iou.shape == giou.shape == (len(a), len(b))
    assert bool(iou.isfinite().all())
    assert bool(giou.isfinite().all())
    assert bool(((iou >= 0) & (iou <= 1 + 1e-5)).all())
    assert bool(((giou >= -1 - 1e-5) & (giou <= iou + 1e-5)).all())
    torch.testing.assert_close(geometry.pairwise_iou(b, a).T, iou)
    torch.testing.assert_close(geometry.pairwise_giou(b, a).T, giou)


@given(cxcywh(3), st.integers(0, 2))
def test_elementwise_is_the_diagonal_of_pairwise(boxes: Tensor, shift: int) -> None:
    a = geometry.cxcywh_to_xyxy(boxes)
    b = a.roll(shift, 0)
    iou, union = geometry.elementwise_iou(a, b)
    assert torch.equal(iou, geometry.pairwise_iou(a, b).diagonal())
    assert torch.equal(geometry.elementwise_giou(a, b), geometry.pairwise_giou(a, b).diagonal())
    assert bool((union >= 0).all())


def test_overlaps_by_hand() -> None:
    a, apart = one(0.0, 0, 2, 2), one(3.0, 0, 4, 2)
    torch.testing.assert_close(geometry.pairwise_iou(a, one(1.0, 1, 3, 3)), one(1 / 7))
    torch.testing.assert_close(geometry.pairwise_giou(a, one(1.0, 1, 3, 3)), one(1 / 7 - 2 / 9))
    torch.testing.assert_close(geometry.pairwise_giou(a, a), one(1.0))
    torch.testing.assert_close(geometry.pairwise_giou(a, apart), one(-2 / 8))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_pairwise_broadcasts_over_leading_axes(leading: tuple[int, ...], generator: torch.Generator) -> None:
    a = geometry.cxcywh_to_xyxy(torch.rand(*leading, 5, 4, generator=generator))
    b = geometry.cxcywh_to_xyxy(torch.rand(2, 4, generator=generator))
    found = geometry.pairwise_iou(a, b.expand(*leading, 2, 4))
    assert found.shape == (*leading, 5, 2)
    assert torch.equal(
        found.flatten(0, -3)[-1] if leading else found, geometry.pairwise_iou(a.reshape(-1, 5, 4)[-1], b)
    )


@pytest.mark.parametrize(
    "box", [(0.5, 0.5, 0.5, 0.5), (0.2, 0.5, 0.8, 0.5), (0.5, 0.2, 0.5, 0.8), (0.0, 0.0, 0.0, 0.0)]
)
def test_boxes_without_area_have_no_overlap_and_no_wild_gradient(box: tuple[float, ...]) -> None:
    for other in (box, (0.0, 0.0, 1.0, 1.0)):
        a = one(*box).requires_grad_()
        iou, _ = geometry.elementwise_iou(a, one(*other))
        giou = geometry.elementwise_giou(a, one(*other))
        assert iou.item() == 0
        assert -1 <= giou.item() <= 0
        (iou + giou).sum().backward()
        assert a.grad is not None
        assert float(a.grad.abs().max()) < 10


def test_what_is_not_finite_stays_visible() -> None:
    broken = one(math.nan, 0, 1, 1)
    assert not bool(geometry.pairwise_giou(broken, one(0.0, 0, 1, 1)).isfinite().any())
    assert not bool(geometry.pairwise_iou(broken, broken).isfinite().any())


@given(cxcywh())
def test_clipped_boxes_lie_inside_and_clipping_again_changes_nothing(boxes: Tensor) -> None:
    corners = geometry.cxcywh_to_xyxy(boxes) * 300 - 50
    clipped = geometry.clip(corners, height=100.0, width=200.0)
    assert bool((clipped >= 0).all())
    assert float(clipped[:, 0::2].max()) <= 200
    assert float(clipped[:, 1::2].max()) <= 100
    assert torch.equal(geometry.clip(clipped, 100.0, 200.0), clipped)


def test_clip_leaves_what_is_inside() -> None:
    assert geometry.clip(one(-5.0, 10, 30, 90), height=40.0, width=60.0).tolist() == [[0, 10, 30, 40]]


def slow_nms(boxes: Tensor, scores: Tensor, labels: Tensor, limit: float) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda row: -float(scores[row])):
        rivals = [other for other in kept if labels[other] == labels[index]]
        if all(overlap(boxes[other].tolist(), boxes[index].tolist()) <= limit for other in rivals):
            kept.append(index)
    return kept


@pytest.mark.parametrize("limit", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_nms_is_greedy_suppression_within_labels(
    count: int, limit: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "AT_ONCE", 8)
    low = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([low, low + 5 + 20 * torch.rand(count, 2, generator=generator)], 1)
    # Equal scores on purpose: the earlier box goes first.
    scores = torch.randint(0, 10, (count,), generator=generator) / 10
    labels = torch.randint(0, 3, (count,), generator=generator)
    found = geometry.nms(boxes, scores, labels, limit)
    assert found.dtype == torch.int64
    assert found.tolist() == slow_nms(boxes, scores, labels, limit)


def test_nms_keeps_what_overlaps_by_the_limit_and_no_more() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 2, 1], [0.0, 0, 1, 1]]), torch.tensor([0.9, 0.8])
    labels = torch.zeros(2, dtype=torch.int64)
    assert geometry.nms(boxes, scores, labels, 0.5).tolist() == [0, 1]
    assert geometry.nms(boxes, scores, labels, 0.49).tolist() == [0]


def test_nms_of_nothing_and_of_points() -> None:
    nothing = geometry.nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
    assert nothing.tolist() == []
    points = geometry.nms(torch.zeros(3, 4), torch.tensor([0.1, 0.3, 0.2]), torch.zeros(3, dtype=torch.int64), 0.5)
    assert points.tolist() == [1, 2, 0]
