"""Convolution with a constant scale a channel, and a shorter way to its result and gradient on a processor.

In float32 and channels-last a 1×1 convolution is one matrix product over the pixels, and torch's own gradient of it
copies and fills more than it computes. The gradient of a larger kernel's weights is slow in this layout on processors
without AVX-512. And the scaled weights need not be kept for the gradient: they are made again.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, ...]


def convolve(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o _ kh kw"],
    bias: Float[Tensor, " o"] | None,
    scale: Float[Tensor, " o"] | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "b o _ _"]:
    """Convolve with `scale` · `weight`, then add `bias`.

    Args:
        x: the input.
        weight: before scaling.
        bias: of each output channel.
        scale: a constant of each output channel, which gets no gradient; None: 1.
        stride: as in `torch.nn.functional.conv2d`, and so are the others.
        padding: zeros at each side.
        dilation: distance of the taps.
        groups: of channels.
    """
    if groups == 1 and _is_shorter(x, weight):
        found: Tensor = _Convolution.apply(x, weight, bias, scale, stride, padding, dilation)  # type: ignore[no-untyped-call]
        return found
    return convolve_plainly(x, weight, bias, scale, stride, padding, dilation, groups)


def convolve_plainly(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o _ kh kw"],
    bias: Float[Tensor, " o"] | None,
    scale: Float[Tensor, " o"] | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
) -> Float[Tensor, "b o _ _"]:
    """The same by torch's own function, everywhere."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.conv2d(x, _scaled(weight, scale), bias, stride, padding, dilation, groups)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def _is_shorter(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call,attr-defined]
    )


class _Convolution(torch.autograd.Function):
    """`convolve_plainly` of channels-last float32 on a processor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = stride, padding, dilation
        if not _is_product(weight, padding):
            return convolve_plainly(x, weight, bias, scale, stride, padding, dilation)
        read = x[:, :, :: stride[0], :: stride[1]]
        shape = (len(x), len(weight), *read.shape[2:])
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        matrix = _scaled(weight, scale).flatten(1).t()
        if bias is None:
            torch.mm(_pixels(read), matrix, out=_pixels(out))
        else:
            torch.addmm(bias, _pixels(read), matrix, out=_pixels(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        way = _gradients_of_product if _is_product(weight, ctx.geometry[1]) else _gradients_of_kernel
        of_x, of_weight, of_bias = way(gradient, x, _scaled(weight, scale), ctx.geometry, needed)
        if of_weight is not None and scale is not None:
            of_weight = of_weight.mul_(scale.view(-1, 1, 1, 1))
        return of_x, of_weight, of_bias, None, None, None, None


def _is_product(weight: Tensor, padding: Pair) -> bool:
    return weight.shape[2:] == (1, 1) and padding == (0, 0)


def _pixels(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "p c"]:
    """All pixels as the rows of a matrix: a view, where `x` is channels-last as a whole."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _gradients_of_product(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (rows, columns), of_x, of_weight = geometry[0], None, None
    due = _pixels(gradient)
    if needed[0]:
        product = (due @ weight.flatten(1)).view(*gradient.shape[:1], *gradient.shape[2:], -1).permute(0, 3, 1, 2)
        if (rows, columns) == (1, 1):
            of_x = product
        else:
            of_x = torch.zeros_like(x, memory_format=torch.channels_last)
            of_x[:, :, ::rows, ::columns] = product
    if needed[1]:
        of_weight = (due.t() @ _pixels(x[:, :, ::rows, ::columns])).view_as(weight)
    return of_x, of_weight, due.sum(0) if needed[2] else None


def _gradients_of_kernel(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation = geometry

    def gradients(due: Tensor, x: Tensor, asked: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            due, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], 1, asked
        )
        return found

    if _CHANNELS_LAST_IS_FAST or not needed[1]:
        of_x, of_weight, of_bias = gradients(gradient, x, needed)
        return of_x, of_weight, of_bias
    of_x = gradients(gradient, x, (True, False, False))[0] if needed[0] else None
    _, of_weight, of_bias = gradients(gradient.contiguous(), x.contiguous(), (False, True, needed[2]))
    return of_x, of_weight, of_bias


_CHANNELS_LAST_IS_FAST = "AVX512" in torch.backends.cpu.get_cpu_capability()
