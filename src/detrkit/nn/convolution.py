"""Convolutions whose weights may be scaled, computed in the way that takes least time and memory.

`conv2d` is torch's function, for weights that carry the scale of a frozen norm. What came in is kept for the gradient,
and scaled weights are made again, which is little beside a convolution. On a processor in fp32 wide 3×3 convolutions
are Winograd's (`winograd.py`), and for other wide ones the gradient of the weights is a product of matrices: the
library under torch takes two to four times as long for it where channels come last in memory. Elsewhere, and within
`direct()`, all is torch's own code; results differ by roundings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detrkit.nn import winograd
from detrkit.nn.blocks import blocks

WIDE = 64
"""From how many channels on our own ways take less time than torch's."""
AT_ONCE = 2**19
"""How many numbers of neighbourhoods are laid out at a time for a product, for each thread."""

_is_direct = ContextVar("_is_direct", default=False)


class Settings(NamedTuple):
    """What a convolution is beside its weights."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


SIMPLEST = Settings()


def conv2d(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c k l"],
    bias: Float[Tensor, " o"] | None = None,
    settings: Settings = SIMPLEST,
    scale: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "b o i j"]:
    """Convolve with `weight * scale`, then add `bias`.

    Args:
        x: maps; they and the weights had better lie with their channels last in memory.
        weight: the weights before they are scaled, of one group.
        bias: of each output.
        settings: stride, padding and dilation.
        scale: of each output; a constant, to which no gradient leads.
    """
    if _is_direct.get() or torch.compiler.is_compiling():
        return F.conv2d(x, _scaled(weight, scale), bias, *settings)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    result: Tensor = _Convolution.apply(x, weight, bias, settings, scale)  # type: ignore[no-untyped-call]
    return result


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` of one group with zeros around its maps, computed as `conv2d` does."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o i j"]:
        """The convolved maps."""
        return conv2d(input, self.weight, self.bias, settings_of(self))


def settings_of(layer: nn.Conv2d) -> Settings:
    """What a layer of torch's says."""
    return Settings(layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]


@contextmanager
def direct() -> Iterator[None]:
    """Within it `conv2d` is torch's own code everywhere."""
    before = _is_direct.set(True)
    try:
        yield
    finally:
        _is_direct.reset(before)


def _scaled(
    weight: Float[Tensor, "o c k l"], scale: Float[Tensor, " o"] | None, dtype: torch.dtype | None = None
) -> Float[Tensor, "o c k l"]:
    folded = weight if scale is None else weight * scale.view(-1, 1, 1, 1)
    return folded.to(dtype or weight.dtype)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and min(weight.shape[:2]) >= WIDE


def _is_winograds(x: Tensor, weight: Tensor, settings: Settings) -> bool:
    is_its_kind = weight.shape[2:] == (3, 3) and settings == Settings(padding=(1, 1))
    return is_its_kind and _is_ours(x, weight) and winograd.pays(x)


class _Convolution(torch.autograd.Function):
    """The convolution in the type of its maps, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, scale: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.settings = settings
        folded = _scaled(weight, scale, x.dtype)
        if _is_winograds(x, weight, settings):
            return winograd.convolve(x, folded, bias)
        if _are_single_cells(weight, settings) and _is_ours(x, weight):
            return F.conv2d(_seen(x, settings), folded, bias)
        return F.conv2d(x, folded, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight = _gradients(x, _scaled(weight, scale, x.dtype), gradient, ctx.settings, ctx.needs_input_grad)
        if of_weight is not None:
            # Laid out as the weights are, which is what DistributedDataParallel's buckets take without a copy.
            is_alike = of_weight.dtype == weight.dtype and of_weight.stride() == weight.stride()
            of_weight = of_weight if is_alike else torch.empty_like(weight).copy_(of_weight)
            of_weight = of_weight if scale is None else of_weight.mul_(scale.view(-1, 1, 1, 1))
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


def _gradients(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c k l"],
    gradient: Float[Tensor, "b o i j"],
    settings: Settings,
    needed: tuple[bool, ...],
) -> tuple[Float[Tensor, "b c h w"] | None, Float[Tensor, "o c k l"] | None]:
    """Those of maps and of weights, each where it is needed."""
    if _is_winograds(x, weight, settings):
        of_x = winograd.convolve_back(gradient, weight) if needed[0] else None
        return of_x, winograd.gradient_of_weight(x, gradient, weight) if needed[1] else None
    is_product = needed[1] and _is_ours(x, weight)
    if is_product and _are_single_cells(weight, settings):
        return _gradients_of_cells(x, weight, gradient, settings, needed[0])
    kept: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if needed[0] or (needed[1] and not is_product):
        flags = (needed[0], needed[1] and not is_product, False)
        kept = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, False, (0, 0), 1, flags)
    return kept[0], _gradient_of_weight(x, gradient, weight, settings) if is_product else kept[1]


def _are_single_cells(weight: Tensor, settings: Settings) -> bool:
    return weight.shape[2:] == (1, 1) and settings == Settings(settings.stride)


def _seen(x: Float[Tensor, "b c h w"], settings: Settings) -> Float[Tensor, "b c i j"]:
    """The cells that a 1×1 convolution reads: alone, they are a map like any other, and take less time."""
    down, right = settings.stride
    return x[:, :, ::down, ::right]


def _gradients_of_cells(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c 1 1"],
    gradient: Float[Tensor, "b o i j"],
    settings: Settings,
    needs_x: bool,
) -> tuple[Float[Tensor, "b c h w"] | None, Float[Tensor, "o c 1 1"]]:
    """Of 1×1 convolutions both are products as they are."""
    cells, wanted = (one.permute(0, 2, 3, 1).flatten(0, 2) for one in (_seen(x, settings), gradient))
    of_weight = torch.empty_like(weight)
    torch.mm(wanted.T, cells, out=of_weight.view(weight.shape[:2]))
    if not needs_x:
        return None, of_weight
    of_seen = (wanted @ weight.flatten(1)).view(len(x), *gradient.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    if settings == SIMPLEST:
        return of_seen, of_weight
    of_x = torch.zeros_like(x, memory_format=torch.channels_last)
    _seen(of_x, settings).copy_(of_seen)
    return of_x, of_weight


def _gradient_of_weight(
    x: Float[Tensor, "b c h w"],
    gradient: Float[Tensor, "b o i j"],
    weight: Float[Tensor, "o c k l"],
    settings: Settings,
) -> Float[Tensor, "o c k l"]:
    """That of the weights: the gradients of the outputs, times the neighbourhoods that these are computed from."""
    (down, right), padding, dilation = settings
    x, gradient = (
        F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1),
        gradient.permute(0, 2, 3, 1),
    )
    images, rows, columns, outputs = gradient.shape
    image, row, column, channel = x.stride()
    strides = (image, row * down, column * right, row * dilation[0], column * dilation[1], channel)
    seen = x.as_strided((images, rows, columns, *weight.shape[2:], x.shape[3]), strides)
    size = math.prod(seen.shape[3:])
    total = x.new_zeros(outputs, size)
    for block in blocks(images, rows, columns * size, AT_ONCE):
        total.addmm_(gradient[block].reshape(-1, outputs).T, seen[block].reshape(-1, size))
    return total.view(outputs, *seen.shape[3:]).permute(0, 3, 1, 2)
