"""From predictions to scored boxes, by hand and against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from detrkit.boxes import nms
from detrkit.postprocess import (
    Scored,
    sigmoid_detections,
    sigmoid_ensemble,
    softmax_detections,
    softmax_ensemble,
    to_pixels,
)
from detrkit.structures import Predictions


def random_predictions(generator: torch.Generator, layers: int = 3, images: int = 2, queries: int = 6) -> Predictions:
    return Predictions(
        3 * torch.randn(layers, images, queries, 4, generator=generator),
        torch.rand(layers, images, queries, 4, generator=generator),
        torch.zeros(layers, images, queries, 8),
    )


def test_pixels_are_of_each_image_and_height_comes_first() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]], [[0.25, 0.5, 0.5, 0.2]]])
    pixels = to_pixels(boxes, torch.tensor([[100, 200], [10, 40]]))
    torch.testing.assert_close(pixels, torch.tensor([[[0.0, 0, 200, 100]], [[0.0, 4, 20, 6]]]))


def test_no_object_is_never_an_answer(generator: torch.Generator) -> None:
    predictions = random_predictions(generator)
    predictions.logits[-1, 0, 0] = torch.tensor([0.0, 1.0, -1.0, 20.0])
    found = softmax_detections(predictions, torch.tensor([[100, 200], [50, 60]]))
    assert [len(image.scores) for image in found] == [6, 6]
    assert found[0].labels[0].item() == 1
    assert found[0].scores[0].item() < 1e-6
    for row, image in enumerate(found):
        probabilities = predictions.logits[-1, row].softmax(-1)
        for query in range(6):
            best = max(range(3), key=lambda label: float(probabilities[query, label]))
            assert image.labels[query].item() == best
            assert image.scores[query].item() == pytest.approx(float(probabilities[query, best]))


def test_only_the_last_layer_answers(generator: torch.Generator) -> None:
    predictions = random_predictions(generator)
    sizes = torch.tensor([[100, 200], [50, 60]])
    last = Predictions(*(part[-1:] for part in predictions))
    for ours, theirs in zip(softmax_detections(predictions, sizes), softmax_detections(last, sizes), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("top", [None, 4])
def test_ensemble_is_suppression_over_all_layers(top: int | None, generator: torch.Generator) -> None:
    predictions = random_predictions(generator)
    sizes = torch.tensor([[100, 200], [50, 60]])
    found = softmax_ensemble(predictions, sizes, iou=0.4, top=top)
    layers = [softmax_detections(Predictions(*(part[i : i + 1] for part in predictions)), sizes) for i in range(3)]
    for row, image in enumerate(found):
        boxes, scores, labels = (
            torch.cat(column) for column in zip(*(layer[row][:3] for layer in layers), strict=True)
        )
        kept = nms(boxes, scores, labels, 0.4)[: top or 6]
        assert torch.equal(image.boxes, boxes[kept])
        assert torch.equal(image.scores, scores[kept])
        assert torch.equal(image.labels, labels[kept])
        assert image.scores.tolist() == sorted(image.scores.tolist(), reverse=True)


def test_ensemble_of_equal_layers_finds_each_object_once() -> None:
    logits = torch.tensor([[[5.0, 0, 0], [0, 5.0, 0]]]).expand(4, -1, -1, -1)
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.2, 0.2]]]).expand(4, -1, -1, -1)
    (found,) = softmax_ensemble(Predictions(logits, boxes, torch.zeros(4, 1, 2, 8)), torch.tensor([[10, 10]]))
    assert sorted(found.labels.tolist()) == [0, 1]


def test_half_precision_answers_in_single(generator: torch.Generator) -> None:
    predictions = Predictions(*(part.bfloat16() for part in random_predictions(generator)))
    for found in (softmax_detections, softmax_ensemble):
        assert all(column.dtype == torch.float32 for column in found(predictions, torch.tensor([[9, 9]] * 2))[0][:2])


@pytest.mark.parametrize("answered", [sigmoid_detections, sigmoid_ensemble])
@pytest.mark.parametrize(("queries", "expected"), [(400, 400), (60, 100), (6, 18)])
def test_there_are_as_many_answers_as_queries_and_a_hundred_at_least(
    answered: Callable[..., list[Scored]], queries: int, expected: int
) -> None:
    number = torch.arange(queries)
    places = torch.stack([number % 20, number // 20, *[torch.full_like(number, 0)] * 2], -1) / 20 + 0.025
    logits = -torch.rand(2, 1, queries, 3, generator=torch.Generator().manual_seed(1)) - 1
    logits[..., number, number % 3] = 2.0  # each sees an object of its own
    predictions = Predictions(logits, places.expand(2, 1, -1, -1), torch.zeros(2, 1, queries, 8))
    (found,) = answered(predictions, torch.tensor([[200, 200]]))
    assert len(found.scores) == expected
    column, row = (found.boxes[:queries, :2] // 10).long().unbind(-1)
    assert (20 * row + column).sort().values.tolist() == number.tolist()
    assert len(answered(predictions, torch.tensor([[200, 200]]), top=5)[0].scores) == 5
