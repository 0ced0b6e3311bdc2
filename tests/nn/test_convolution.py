"""Convolutions against torch's own in double precision, whichever way they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detrkit.nn import convolution, winograd
from detrkit.nn.convolution import Settings, conv2d, direct


class Case(NamedTuple):
    """A convolution, and the way that it takes on a processor in fp32."""

    shape: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    settings: Settings = Settings(padding=(1, 1))
    way: str = "winograd"


CASES = {
    "wide": Case((4, 64, 18, 17), 64),
    "wider": Case((1, 66, 34, 36), 96),
    "little of a map": Case((1, 64, 10, 10), 64, way="product"),
    "narrow": Case((2, 32, 15, 14), 64, way="torch"),
    "stride": Case((2, 64, 11, 12), 64, settings=Settings((2, 2), (1, 1)), way="product"),
    "dilation": Case((2, 64, 15, 14), 70, settings=Settings((1, 1), (2, 2), (2, 2)), way="product"),
    "uneven": Case((2, 66, 9, 13), 64, (5, 2), Settings((2, 3), (1, 0), (1, 2)), way="product"),
    "without a border": Case((2, 64, 20, 20), 64, settings=Settings(), way="product"),
    "single cells": Case((2, 64, 9, 8), 70, (1, 1), Settings(), way="torch"),
    "single cells apart": Case((2, 64, 9, 8), 70, (1, 1), Settings((2, 3)), way="torch"),
    "single cells and a border": Case((2, 64, 9, 8), 64, (1, 1), Settings((2, 2), (1, 1)), way="product"),
    "stem": Case((2, 3, 17, 18), 64, (7, 7), Settings((2, 2), (3, 3)), way="torch"),
}


def inputs(case: Case, kind: torch.dtype = torch.float32) -> list[Tensor]:
    """Maps, weights and bias of a case, which ask for gradients, and the scale."""
    generator = torch.Generator().manual_seed(0)
    shapes = (case.shape, (case.outputs, case.shape[1], *case.kernel), (case.outputs,))
    asked = [torch.randn(shape, generator=generator).to(kind).requires_grad_() for shape in shapes]
    return [*asked, torch.rand(case.outputs, generator=generator).to(kind) + 0.5]


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On which the ways do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_is_torchs_function_with_its_gradients(name: str, layout: torch.memory_format) -> None:
    case = CASES[name]
    x, weight, bias, scale = inputs(case)
    exact = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    wanted = F.conv2d(exact[0], exact[1] * scale.double().view(-1, 1, 1, 1), exact[2], *case.settings)
    found = conv2d(x.contiguous(memory_format=layout), weight, bias, case.settings, scale)
    assert difference(found, wanted) < 1e-5
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(wanted, exact, gradient.double())
    ours = torch.autograd.grad(found, (x, weight, bias), gradient.contiguous(memory_format=layout))
    for of_ours, of_theirs in zip(ours, theirs, strict=True):
        assert difference(of_ours, of_theirs) < 2e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_weights_lie_as_the_weights_do(name: str, layout: torch.memory_format) -> None:
    """Or training with several processes copies them, and says so."""
    x, weight, bias, scale = inputs(CASES[name])
    weight = weight.detach().to(memory_format=layout).requires_grad_()
    conv2d(x, weight, bias, CASES[name].settings, scale).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("name", CASES)
def test_takes_the_way_that_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for module, function, way in (
        (winograd, "convolve", "winograd"),
        (winograd, "gradient_of_weight", "winograd"),
        (convolution, "_gradient_of_weight", "product"),
    ):
        known = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *given, known=known, way=way: (taken.append(way), known(*given))[1]
        )
    case = CASES[name]

    def step(kind: torch.dtype = torch.float32) -> set[str]:
        taken.clear()
        x, weight, bias, scale = inputs(case, kind)
        conv2d(x, weight, bias, case.settings, scale).sum().backward()
        return set(taken)

    assert step() == ({case.way} if case.way != "torch" else set())
    assert step(torch.float64) == set()
    with direct():
        assert step() == set()
    with torch.autocast("cpu", torch.bfloat16):
        assert step() == set()
    assert not convolution._is_direct.get()


def test_small_maps_are_left_to_torch_where_there_are_more_threads() -> None:
    torch.set_num_threads(2)
    assert not winograd.pays(torch.empty(4, 64, 18, 17))
    assert winograd.pays(torch.empty(4, 64, 36, 34))


def test_parts_of_a_map_are_products_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["stride"]
    x, weight, bias, scale = inputs(case)
    whole = torch.autograd.grad(conv2d(x, weight, bias, case.settings, scale).square().sum(), weight)[0]
    monkeypatch.setattr(convolution, "AT_ONCE", 1)
    parts = torch.autograd.grad(conv2d(x, weight, bias, case.settings, scale).square().sum(), weight)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["wide", "stride", "narrow"])
def test_mixed_precision_is_torchs(name: str) -> None:
    case = CASES[name]
    x, weight, bias, scale = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv2d(x, weight, bias, case.settings, scale)
        wanted = F.conv2d(x, weight * scale.view(-1, 1, 1, 1), bias, *case.settings)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(one.float().square().sum(), (x, weight, bias)) for one in (found, wanted))
    for of_ours, of_theirs in zip(ours, theirs, strict=True):
        assert of_ours.dtype == torch.float32
        assert difference(of_ours, of_theirs) < 0.02


@pytest.mark.parametrize("name", CASES)
def test_no_map_at_all_is_no_error(name: str) -> None:
    """As where no mask is to be made."""
    x, weight, bias, scale = inputs(CASES[name])
    nothing = x.detach()[:0].requires_grad_()
    found = conv2d(nothing, weight, bias, CASES[name].settings, scale)
    assert found.shape[1:] == conv2d(x, weight, bias, CASES[name].settings, scale).shape[1:]
    gradients = torch.autograd.grad(found.sum(), (nothing, weight, bias))
    assert [one.shape for one in gradients] == [nothing.shape, weight.shape, bias.shape]
    assert not gradients[1].any()


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["wide"]
    x, weight, _, _ = inputs(case)
    monkeypatch.setattr(winograd, "gradient_of_weight", lambda *_: pytest.fail("nobody asked for it"))
    conv2d(x, weight.detach(), None, case.settings).sum().backward()
    monkeypatch.undo()
    monkeypatch.setattr(winograd, "convolve_back", lambda *_: pytest.fail("nobody asked for it"))
    conv2d(x.detach(), weight, None, case.settings).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_the_result_may_be_overwritten() -> None:
    for name in ("wide", "stride", "narrow"):
        x, weight, bias, _ = inputs(CASES[name])
        wanted = F.conv2d(x, weight, bias, *CASES[name].settings).relu()
        found = F.relu(conv2d(x, weight, bias, CASES[name].settings), inplace=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        found.sum().backward()
