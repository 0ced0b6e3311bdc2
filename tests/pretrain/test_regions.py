"""Figures of regions that a detector finds unasked, against what can be counted by hand."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from detrkit.pretrain.regions import RegionFigures
from detrkit.structures import Predictions, Target

QUERIES, CLASSES = 4, 2
BOXES = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.3, 0.3, 0.2], [0.4, 0.8, 0.4, 0.3], [0.9, 0.9, 0.1, 0.1]])


def predictions(boxes: Tensor, scores: Tensor, *, softmax: bool) -> Predictions:
    """What a detector finds in some images: (b, q, 4) boxes, of which each is the last class by (b, q) scores.

    The layer before the last says something else, and the other class is surer than the last.
    """
    odds = torch.logit(scores)
    others = [torch.full_like(odds, -20.0 if softmax else 5.0)]
    logits = torch.stack([*others, odds, *([torch.zeros_like(odds)] if softmax else [])], -1)
    hidden = torch.zeros(2, *boxes.shape[:2], 8)
    return Predictions(torch.stack([-logits, logits]), torch.stack([1 - boxes, boxes]), hidden)


def regions(*boxes: Tensor) -> list[Target]:
    return [Target(torch.zeros(len(each), dtype=torch.int64), each) for each in boxes]


@pytest.fixture(params=[True, False], ids=["softmax", "focal"])
def softmax(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def result_of(found: Predictions, *targets: Tensor) -> dict[str, float]:
    figures = RegionFigures(CLASSES)
    figures.add(found, regions(*targets))
    return figures.result()


def test_perfect_answers(softmax: bool):
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    found = predictions(BOXES[None], scores, softmax=softmax)
    assert result_of(found, BOXES[:2].flip(0)) == pytest.approx({"region_recall50": 1.0, "region_iou": 1.0}, abs=1e-5)


def test_only_the_best_scored_count_as_many_as_there_are_regions(softmax: bool):
    found = predictions(BOXES[None], torch.tensor([[0.1, 0.8, 0.3, 0.9]]), softmax=softmax)
    assert result_of(found, BOXES[:2]) == pytest.approx({"region_recall50": 0.5, "region_iou": 0.5}, abs=1e-5)
    assert result_of(found, BOXES[:1])["region_recall50"] == 0


def test_a_half_is_where_a_region_counts_as_found(softmax: bool):
    region = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    for width, recall in ((0.22, 1.0), (0.18, 0.0)):
        box = torch.tensor([[[0.5, 0.5, width, 0.4]]]).expand(1, QUERIES, 4)
        figures = result_of(predictions(box, torch.full((1, QUERIES), 0.5), softmax=softmax), region)
        assert figures == pytest.approx({"region_recall50": recall, "region_iou": width / 0.4}, abs=1e-5)


def test_regions_beyond_the_queries_count_as_missed(softmax: bool):
    many = torch.cat([BOXES, torch.tensor([[0.1, 0.6, 0.05, 0.05], [0.55, 0.55, 0.02, 0.02]])])
    found = predictions(BOXES[None], torch.full((1, QUERIES), 0.5), softmax=softmax)
    assert result_of(found, many) == pytest.approx({"region_recall50": 4 / 6, "region_iou": 4 / 6}, abs=1e-5)


def test_without_regions_nothing_is_known(softmax: bool):
    found = predictions(BOXES[None], torch.full((1, QUERIES), 0.5), softmax=softmax)
    for figures in (RegionFigures(CLASSES).result(), result_of(found, torch.zeros(0, 4))):
        assert figures.keys() == {"region_recall50", "region_iou"}
        assert all(map(math.isnan, figures.values()))


def test_images_are_spread_over_processes_at_will(softmax: bool):
    boxes, scores = torch.rand(5, QUERIES, 4) * 0.4 + 0.2, torch.rand(5, QUERIES)
    targets = [torch.rand(count, 4) * 0.4 + 0.2 for count in (2, 0, 3, 1, 6)]
    whole = result_of(predictions(boxes, scores, softmax=softmax), *targets)
    parts = [RegionFigures(CLASSES), RegionFigures(CLASSES), RegionFigures(CLASSES)]
    for index in range(5):
        one = predictions(boxes[index : index + 1], scores[index : index + 1], softmax=softmax)
        parts[index % 2].add(one, regions(targets[index]))
    merged = RegionFigures.merged([pickle.loads(pickle.dumps(part)) for part in parts])
    assert len(merged.overlaps) == 12
    assert merged.result() == pytest.approx(whole)
    assert 0 < whole["region_iou"] < 1
    assert sum(len(part.overlaps) for part in parts) == 12, "merging leaves the parts as they were"


def test_the_sentence_says_the_share_and_nothing_without_regions() -> None:
    figures = RegionFigures(CLASSES)
    assert figures.sentence() == ""
    figures.overlaps = [0.9, 0.5, 0.4, 0.1]
    assert figures.sentence() == " Without any patch it finds 50% of the regions that stand out."
