"""Winograd's convolution against a direct one in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detrkit.nn import winograd

SHAPES = [(2, 3, 5, 8, 12), (1, 4, 3, 7, 9), (3, 2, 2, 4, 4), (1, 1, 6, 1, 1), (2, 6, 4, 3, 17), (5, 3, 3, 5, 6)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_the_transforms_are_a_correlation_of_one_axis() -> None:
    """For all windows d and weights g: Aᵀ ((G g) ∘ (Bᵀ d)) are the four places of g over d; so every basis will do."""
    known = winograd.transforms()
    for cell in range(6):
        for tap in range(3):
            window, weight = torch.eye(6)[cell], torch.eye(3)[tap]
            found = known.tile.T @ ((known.weight @ weight) * (known.window @ window))
            torch.testing.assert_close(found, window.unfold(0, 3, 1) @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(known.turned @ torch.tensor([1.0, 2, 3]), known.weight @ torch.tensor([3.0, 2, 1]))


@pytest.mark.parametrize("tiles", [1, 3, 128])
@pytest.mark.parametrize("largest", [1, 250, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_convolution_and_so_are_its_gradients(
    shape: tuple[int, ...], largest: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "TILES", tiles)
    monkeypatch.setattr(winograd, "LARGEST", largest)
    images, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(images, channels, height, width, generator=generator)
    weight, bias = torch.randn(outputs, channels, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    gradient = torch.randn(images, outputs, height, width, generator=generator)
    exact = [one.double().requires_grad_() for one in (x, weight, bias)]
    wanted = F.conv2d(*exact, padding=1)
    of_x, of_weight, _ = torch.autograd.grad(wanted, exact, gradient.double())
    found = winograd.convolve(x, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert difference(found, wanted) < 1e-5
    assert difference(winograd.convolve(x, weight, None), wanted - bias[:, None, None]) < 1e-5
    assert difference(winograd.convolve_back(gradient, weight), of_x) < 1e-5
    assert difference(winograd.gradient_of_weight(x, gradient, weight), of_weight) < 1e-5


def test_roundings_are_twice_those_of_a_direct_convolution() -> None:
    """With the points that textbooks have they are four times as large."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 128, 24, 24, generator=generator), torch.randn(128, 128, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    errors = [(found - exact).norm() for found in (winograd.convolve(x, weight, None), F.conv2d(x, weight, padding=1))]
    assert errors[0] < 3 * errors[1]
