"""Dropout: how much is dropped, what becomes of the rest, and that seeds repeat it."""

from __future__ import annotations

import pytest
import torch

from detrkit.nn.dropout import Dropout, ReluDropout, draw_kept


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_drops_as_often_as_it_says_everywhere(dropout: float) -> None:
    torch.manual_seed(0)
    kept = draw_kept((100, 4, 500), dropout).float()
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=0.005)
    for place in range(4):  # numbers of one word must not depend on each other
        assert kept[:, place].mean().item() == pytest.approx(1 - dropout, abs=0.01)
    words = kept.view(-1, 4)
    assert torch.corrcoef(words.T).sub(torch.eye(4)).abs().max().item() < 0.02


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 7])
def test_any_number_of_numbers(count: int) -> None:
    assert draw_kept((count,), 0.5).shape == (count,)
    assert draw_kept((2, count), 0.0).all()


def test_the_mean_stays_and_the_gradient_is_that_of_what_is_kept() -> None:
    layer, x = Dropout(0.25).train(), torch.full((40_000,), 2.0, requires_grad=True)
    torch.manual_seed(0)
    found = layer(x)
    assert found.mean().item() == pytest.approx(2, abs=0.02)
    assert found.unique().tolist() == pytest.approx([0, 2 / 0.75])
    found.sum().backward()
    torch.testing.assert_close(x.grad, found.detach() / 2)


def test_acts_in_training_alone() -> None:
    x = torch.randn(9)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_seeds_repeat_it() -> None:
    layer, x, found = Dropout(0.5).train(), torch.ones(1000), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_after_a_relu_it_is_the_same_function() -> None:
    x = torch.randn(300, 7)
    results = []
    for layer in (lambda given: Dropout(0.25).train()(given.relu()), ReluDropout(0.25).train()):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        found = layer(given)
        (found * x).sum().backward()
        results.append((found, given.grad))
    for ours, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, plain)
    assert torch.equal(ReluDropout(0.25).eval()(x), x.relu())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_keeps_the_type(kind: torch.dtype) -> None:
    assert Dropout(0.5).train()(torch.ones(8, dtype=kind)).dtype == kind


def test_a_byte_a_number_is_kept_for_the_gradient() -> None:
    sizes = []
    x = torch.ones(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.nbytes), lambda _: None):
        Dropout(0.5).train()(x)
    assert sum(sizes) <= 1000


def test_after_a_relu_the_result_alone_is_kept() -> None:
    kept = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one), lambda _: None):
        found = ReluDropout(0.5).train()(x)
    assert [one.data_ptr() for one in kept] == [found.data_ptr()]
