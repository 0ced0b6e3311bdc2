"""The criterion against the paper's formulas in plain loops, and at its edges."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detrkit import UsageError
from detrkit.losses.criterion import Losses, SetCriterion, SoftmaxClassification, TermWeights, pad_targets
from detrkit.structures import Predictions, Target

NO_OBJECT = 3


def make_target(generator: torch.Generator, count: int) -> Target:
    labels = torch.randint(0, NO_OBJECT, (count,), generator=generator)
    return Target(labels, 0.2 + 0.3 * torch.rand(count, 4, generator=generator))


def make_predictions(generator: torch.Generator, images: int, layers: int = 3, queries: int = 6) -> Predictions:
    logits = torch.randn(layers, images, queries, NO_OBJECT + 1, generator=generator)
    boxes = 0.1 + 0.8 * torch.rand(layers, images, queries, 4, generator=generator)
    return Predictions(logits.requires_grad_(), boxes.requires_grad_(), torch.zeros(layers, images, queries, 8))


def make_criterion(no_object_weight: float = 0.1) -> SetCriterion:
    weights = TermWeights(1.0, 5.0, 2.0)
    return SetCriterion(SoftmaxClassification(no_object_weight), cost=weights, loss=weights)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of two cxcywh boxes, one number at a time."""
    a0, a1, b0, b1 = a[:2] - a[2:] / 2, a[:2] + a[2:] / 2, b[:2] - b[2:] / 2, b[:2] + b[2:] / 2
    both = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod()
    either = a[2] * a[3] + b[2] * b[3] - both
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod()
    return both / either - (hull - either) / hull


def slow_losses(predictions: Predictions, targets: list[Target], no_object_weight: float, num_boxes: float) -> Tensor:
    """Equations 1 and 2 of the paper and its appendix A.2: (term, layer)."""
    columns = []
    for logits, boxes in zip(predictions.logits, predictions.boxes, strict=True):
        entropy, weights = torch.zeros(()), torch.zeros(())
        l1, missing = torch.zeros(()), torch.zeros(())
        for image, target in enumerate(targets):
            cost = torch.zeros(len(logits[image]), len(target.labels))
            for query in range(cost.shape[0]):
                for row in range(cost.shape[1]):
                    cost[query, row] = (
                        -logits[image, query].softmax(0)[target.labels[row]]
                        + 5 * (boxes[image, query] - target.boxes[row]).abs().sum()
                        - 2 * giou(boxes[image, query], target.boxes[row])
                    )
            matched = dict(zip(*map(list, linear_sum_assignment(cost.detach().numpy())), strict=True))
            for query in range(cost.shape[0]):
                label = int(target.labels[matched[query]]) if query in matched else NO_OBJECT
                weight = no_object_weight if label == NO_OBJECT else 1.0
                entropy = entropy - weight * logits[image, query].log_softmax(0)[label]
                weights = weights + weight
                if query in matched:
                    l1 = l1 + (boxes[image, query] - target.boxes[matched[query]]).abs().sum()
                    missing = missing + 1 - giou(boxes[image, query], target.boxes[matched[query]])
        columns.append(torch.stack([entropy / weights, l1 / num_boxes, missing / num_boxes]))
    return torch.stack(columns, 1)


def gradients(total: Tensor, predictions: Predictions) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, [predictions.logits, predictions.boxes])


@pytest.mark.parametrize("no_object_weight", [0.1, 0.4])
@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (8, 1)])
def test_equals_the_formulas_at_every_layer_with_gradients(
    counts: tuple[int, ...], no_object_weight: float, generator: torch.Generator
) -> None:
    targets = [make_target(generator, count) for count in counts]
    predictions = make_predictions(generator, len(counts))
    losses = make_criterion(no_object_weight)(predictions, targets)
    expected = slow_losses(predictions, targets, no_object_weight, float(sum(counts)))
    assert losses.names == ("class", "l1", "giou")
    torch.testing.assert_close(losses.values, expected, atol=1e-5, rtol=1e-4)
    total = (expected * torch.tensor([1.0, 5.0, 2.0])[:, None]).sum()
    torch.testing.assert_close(losses.total, total, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gradients(losses.total, predictions), gradients(total, predictions), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_box_terms_are_divided_by_the_given_number(generator: torch.Generator) -> None:
    targets, predictions = [make_target(generator, 2), make_target(generator, 4)], make_predictions(generator, 2)
    own, given = make_criterion()(predictions, targets), make_criterion()(predictions, targets, 3.0)
    assert torch.equal(own.values[0], given.values[0])
    torch.testing.assert_close(own.values[1:] * 2, given.values[1:])


def test_one_accumulated_batch_weighs_layers_alone(generator: torch.Generator) -> None:
    """Each layer's terms depend on that layer alone."""
    targets, predictions = [make_target(generator, 2)], make_predictions(generator, 1)
    together = make_criterion()(predictions, targets)
    for layer in range(3):
        alone = make_criterion()(Predictions(*(part[layer : layer + 1] for part in predictions)), targets)
        torch.testing.assert_close(alone.values[:, 0], together.values[:, layer])


def test_no_object_is_the_last_class() -> None:
    """A perfect answer, whose other queries say no-object, costs next to nothing."""
    target = Target(torch.tensor([2, 0]), torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.1, 0.3]]))
    boxes = torch.full((1, 1, 5, 4), 0.5)
    boxes[0, 0, 1], boxes[0, 0, 3] = target.boxes
    labels = torch.tensor([NO_OBJECT, 2, NO_OBJECT, 0, NO_OBJECT])
    logits = 20 * nn.functional.one_hot(labels, NO_OBJECT + 1).float()[None, None]
    losses = make_criterion()(Predictions(logits, boxes, torch.zeros(1, 1, 5, 8)), [target])
    assert losses.total.item() == pytest.approx(0, abs=1e-5)
    assert losses.class_error.item() == 0
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    silent = 20 * nn.functional.one_hot(torch.full((5,), NO_OBJECT), NO_OBJECT + 1).float()[None, None]
    assert make_criterion()(Predictions(silent, boxes, torch.zeros(1, 1, 5, 8)), [empty]).total.item() < 1e-5


def test_class_error_is_of_the_last_layer(generator: torch.Generator) -> None:
    predictions = make_predictions(generator, 1)
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    with torch.no_grad():
        predictions.logits[-1, ..., 1] = 9.0
        predictions.logits[0, ..., 2] = 9.0
    assert make_criterion()(predictions, [target]).class_error.item() == 0
    flipped = Predictions(*(part.flip(0) for part in predictions))
    assert make_criterion()(flipped, [target]).class_error.item() == 1


@pytest.mark.parametrize("images", [1, 3])
def test_a_batch_without_objects_has_a_finite_loss_and_teaches(images: int, generator: torch.Generator) -> None:
    predictions = make_predictions(generator, images)
    losses = make_criterion()(predictions, [make_target(generator, 0) for _ in range(images)])
    assert losses.values[1:].tolist() == [[0] * 3] * 2
    assert float(losses.values[0].min().detach()) > 0
    for gradient, taught in zip(gradients(losses.total, predictions), (True, False), strict=True):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any()) is taught


def test_half_precision_loses_in_single(generator: torch.Generator) -> None:
    predictions = Predictions(*(part.detach().bfloat16() for part in make_predictions(generator, 2)))
    losses = make_criterion()(predictions, [make_target(generator, 2), make_target(generator, 1)])
    assert losses.values.dtype == torch.float32


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_targets_is_refused(count: int, generator: torch.Generator) -> None:
    with pytest.raises(UsageError, match=f"Targets and images differ in number; got {count} targets, 2 images"):
        make_criterion()(make_predictions(generator, 2), [make_target(generator, 1)] * count)


def test_targets_are_filled_up_with_zeros(generator: torch.Generator) -> None:
    first, second = make_target(generator, 1), make_target(generator, 3)
    padded = pad_targets([first, second._replace(name="b.png")])
    assert padded.labels.shape == (2, 3)
    assert padded.counts == (1, 3)
    assert padded.names == ("image 0 of the batch", "b.png")
    assert torch.equal(padded.boxes[1], second.boxes)
    assert not bool(padded.boxes[0, 1:].any())


def test_total_is_the_weighted_sum() -> None:
    losses = Losses(("a", "b"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0]), torch.zeros(()))
    assert losses.total.item() == 73


def some_losses(names: tuple[str, ...], *, share: float = 1.0, seed: int = 0) -> Losses:
    generator = torch.Generator().manual_seed(seed)
    values, weights = (torch.rand(*shape, generator=generator) for shape in ((len(names), 3), (len(names),)))
    return Losses(names, values, weights, torch.tensor(0.25), share)


def test_a_joined_term_adds_its_weighted_sum_and_has_the_share_of_the_others():
    losses, values = some_losses(("class", "l1"), share=0.5), torch.tensor([1.0, 2.0, 4.0])
    joined = losses.joined("feature", values, 3.0)
    assert joined.names == ("class", "l1", "feature")
    assert float(joined.total) == pytest.approx(float(losses.total) + 0.5 * 3.0 * 7.0)
    assert torch.equal(joined.values[-1], values)
    assert (joined.class_error, joined.share) == (losses.class_error, 0.5)


def test_a_term_of_the_last_layer_has_its_full_weight():
    losses = some_losses(("class", "l1"), share=0.5)
    found = losses.of_last_layer("mask", torch.tensor(4.0), 3.0)
    assert found.names == ("class", "l1", "mask")
    assert found.values[-1].tolist() == [0, 0, 4]
    assert float(found.total) == pytest.approx(float(losses.total) + 3.0 * 4.0)


def test_losses_beside_others_add_their_weighted_total():
    first, second = some_losses(("class", "l1", "feature")), some_losses(("class", "l1"), seed=1)
    both = first.beside(second, "region_", 2.5)
    assert both.names == ("class", "l1", "feature", "region_class", "region_l1")
    assert float(both.total) == pytest.approx(float(first.total) + 2.5 * float(second.total))
    assert torch.equal(both.values[3:], second.values)
    assert both.class_error == first.class_error
    assert float(first.beside(second, "region_", 0.0).total) == pytest.approx(float(first.total))
    learning = second._replace(values=second.values.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(first.beside(learning, "region_", 2.5).total, learning.values)
    torch.testing.assert_close(gradient, 2.5 * second.weights[:, None].expand(2, 3))
