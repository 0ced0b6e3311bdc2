"""Matching: the same as SciPy for each layer and image, one transfer for all, and nothing that is not finite."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy, elementwise_giou
from detrkit.losses.criterion import SetCriterion, SoftmaxClassification, TermWeights, pad_targets
from detrkit.losses.matching import Matches, NonFiniteError, assign, box_cost
from detrkit.structures import Predictions, Target

WEIGHTS = TermWeights(1.0, 5.0, 2.0)
CRITERION = SetCriterion(SoftmaxClassification(), cost=WEIGHTS, loss=WEIGHTS)


def make_target(generator: torch.Generator, count: int, name: str = "") -> Target:
    labels = torch.randint(0, 3, (count,), generator=generator)
    return Target(labels, 0.2 + 0.3 * torch.rand(count, 4, generator=generator), name)


def make_predictions(generator: torch.Generator, images: int, layers: int = 3, queries: int = 6) -> Predictions:
    logits = 2 * torch.randn(layers, images, queries, 4, generator=generator)
    boxes = torch.rand(layers, images, queries, 4, generator=generator)
    return Predictions(logits, boxes, torch.zeros(layers, images, queries, 8))


def pairs(matches: Matches, layer: int, image: int) -> set[tuple[int, int]]:
    own = matches.image == image
    return set(zip(matches.query[layer, own].tolist(), matches.target[layer, own].tolist(), strict=True))


def slow_cost(logits: Tensor, boxes: Tensor, target: Target) -> np.ndarray:
    """Equation 2 of the paper for one layer of one image, pair by pair."""
    cost = np.zeros((len(boxes), len(target.labels)))
    for query, row in itertools.product(range(len(boxes)), range(len(target.labels))):
        probability = logits[query].softmax(0)[target.labels[row]]
        distance = (boxes[query] - target.boxes[row]).abs().sum()
        giou = elementwise_giou(cxcywh_to_xyxy(boxes[query]), cxcywh_to_xyxy(target.boxes[row]))
        cost[query, row] = -probability + 5 * distance - 2 * giou
    return cost


@pytest.mark.parametrize("counts", [(3, 1, 5), (0, 6, 2), (9, 1, 0)])
def test_one_call_equals_scipy_for_each_layer_and_image(counts: tuple[int, ...], generator: torch.Generator) -> None:
    targets = [make_target(generator, count) for count in counts]
    predictions = make_predictions(generator, len(counts))
    matches = CRITERION.match(predictions, pad_targets(targets))
    assert matches.query.shape == matches.target.shape == (3, sum(min(count, 6) for count in counts))
    for layer, (image, target) in itertools.product(range(3), enumerate(targets)):
        cost = slow_cost(predictions.logits[layer, image], predictions.boxes[layer, image], target)
        assert pairs(matches, layer, image) == set(
            zip(*map(np.ndarray.tolist, linear_sum_assignment(cost)), strict=True)
        )


def test_an_image_is_matched_as_if_alone(generator: torch.Generator) -> None:
    predictions = make_predictions(generator, 2)
    first = make_target(generator, 3)
    found = []
    for count in (0, 1, 4, 9):
        matches = CRITERION.match(predictions, pad_targets([first, make_target(generator, count)]))
        found.append([pairs(matches, layer, 0) for layer in range(3)])
    assert found == found[:1] * 4
    alone = CRITERION.match(Predictions(*(part[:, :1] for part in predictions)), pad_targets([first]))
    assert [pairs(alone, layer, 0) for layer in range(3)] == found[0]


def test_costs_are_computed_within_images_alone(generator: torch.Generator) -> None:
    boxes = torch.rand(2, 3, 6, 4, generator=generator)
    targets = torch.rand(3, 5, 4, generator=generator)
    cost = box_cost(boxes, targets, 5.0, 2.0)
    assert cost.shape == (2, 3, 6, 5)  # no axis joins one image's queries with another's objects
    for image in range(3):
        torch.testing.assert_close(cost[:, image : image + 1], box_cost(boxes[:, [image]], targets[[image]], 5.0, 2.0))


def test_padded_objects_are_never_matched(generator: torch.Generator) -> None:
    padded = pad_targets([make_target(generator, 1), make_target(generator, 5)])
    assert padded.counts == (1, 5)
    cost = torch.rand(2, 2, 6, 5, generator=generator)
    cost[:, 0, :, 1:] = -1e6  # all the gain in the world, for objects that are not there
    matches = assign(cost, padded)
    assert all({target for _, target in pairs(matches, layer, 0)} == {0} for layer in range(2))
    assert all(len(pairs(matches, layer, 1)) == 5 for layer in range(2))


def test_more_objects_than_queries(generator: torch.Generator) -> None:
    cost = torch.rand(2, 1, 3, 8, generator=generator)
    matches = assign(cost, pad_targets([make_target(generator, 8)]))
    for layer in range(2):
        assert sorted(matches.query[layer].tolist()) == [0, 1, 2]
        assert len(set(matches.target[layer].tolist())) == 3
        table = cost[layer, 0].numpy()
        best = min(table[[0, 1, 2], list(chosen)].sum() for chosen in itertools.permutations(range(8), 3))
        assert table[matches.query[layer], matches.target[layer]].sum() == pytest.approx(best)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_to_match(count: int) -> None:
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    padded = pad_targets([empty] * count)
    matches = assign(torch.zeros(2, count, 4, padded.labels.shape[1]), padded)
    assert matches.image.shape == (0,)
    assert matches.query.shape == matches.target.shape == (2, 0)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every cost that reaches SciPy."""
    seen: list[np.ndarray] = []

    def watch(cost: np.ndarray) -> object:
        seen.append(cost)
        return linear_sum_assignment(cost)

    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", watch)
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["boxes", "logits"])
def test_broken_predictions_name_their_images(
    value: float, where: str, generator: torch.Generator, watched: list[np.ndarray]
) -> None:
    predictions = make_predictions(generator, 3)
    if where == "logits" and value == -math.inf:
        predictions.logits[1, 2, 4] = value  # one class alone would be a probability of zero
    getattr(predictions, where)[1, 2, 4, :2] = value
    targets = [
        make_target(generator, 2, "first.png"),
        make_target(generator, 0),
        make_target(generator, 1, "third.png"),
    ]
    with pytest.raises(NonFiniteError, match=r"third\.png: The predictions.*[Ll]ower the learning rate") as caught:
        CRITERION(predictions, targets)
    assert caught.value.images == ("third.png",)
    assert watched == []


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)])
def test_broken_predictions_show_on_images_without_objects(
    counts: tuple[int, int], generator: torch.Generator, watched: list[np.ndarray]
) -> None:
    predictions = make_predictions(generator, 2)
    predictions.logits[2, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        CRITERION(predictions, [make_target(generator, count) for count in counts])
    assert caught.value.images == ("image 0 of the batch",)
    assert watched == []


@pytest.mark.parametrize(("count", "box"), [(3, 1), (1, 0)])
def test_a_box_that_is_not_finite_is_named(count: int, box: int, generator: torch.Generator) -> None:
    targets = [make_target(generator, 2, "first.png"), make_target(generator, count, "second.png")]
    targets[1].boxes[box] = torch.tensor([0.5, 0.25, math.nan, 0.125])
    with pytest.raises(NonFiniteError) as caught:
        CRITERION(make_predictions(generator, 2), targets)
    assert caught.value.images == ("second.png",)
    assert caught.value.boxes == (f"box {box + 1} of {count} in second.png: cx, cy, w, h = 0.5, 0.25, nan, 0.125",)
    assert "An annotated box makes the loss NaN" in str(caught.value)
    assert "Correct or remove the box" in str(caught.value)


def test_boxes_are_not_blamed_for_predictions(generator: torch.Generator) -> None:
    predictions = make_predictions(generator, 2)
    predictions.boxes[:, 1] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        CRITERION(predictions, [make_target(generator, 2), make_target(generator, 2)])
    assert (caught.value.images, caught.value.boxes) == (("image 1 of the batch",), ())


def test_only_finite_costs_of_real_objects_reach_scipy(generator: torch.Generator, watched: list[np.ndarray]) -> None:
    targets = [make_target(generator, count) for count in (2, 0, 4)]
    CRITERION(make_predictions(generator, 3), targets)
    assert sorted({cost.shape for cost in watched}) == [(6, 0), (6, 2), (6, 4)]
    assert len(watched) == 9
    assert all(np.isfinite(cost).all() for cost in watched)


def test_half_precision_is_matched_in_single(generator: torch.Generator) -> None:
    predictions = make_predictions(generator, 2)
    targets = [make_target(generator, 3), make_target(generator, 2)]
    half = Predictions(*(part.bfloat16() for part in predictions))
    single = Predictions(*(part.bfloat16().float() for part in predictions))
    for layer, image in itertools.product(range(3), range(2)):
        found = [pairs(CRITERION.match(each, pad_targets(targets)), layer, image) for each in (half, single)]
        assert found[0] == found[1]
