"""3×3 convolutions with a quarter of the multiplications, for processors in fp32.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4: F(4×4, 3×3). A window of 6×6
cells, taken every four, is transformed to 36 places; at each place one product over the channels stands for the sums
over 3×3 neighbours; and the transform of the products is a tile of 4×4 outputs. The gradients are of the same kind:
that of the input is a convolution with the weights turned around, that of the weights is summed up in 36 places.

Results differ from a direct convolution's by roundings. How much depends on the points of interpolation (Barabasz et
al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", ACM TOMS 2020); since
the transforms are products of matrices here, points cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from detrkit.nn.blocks import blocks

TILE = 4
POINTS = (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
"""With these the error is half of that with 0, 1, -1, 2, -2, and twice that of a direct convolution."""
TILES = 128
"""How many tiles are worked on at a time, for each thread: enough for the products, few enough for a cache."""
LARGEST = 5 * 2**19
"""How many transformed weights are held at a time: getting memory anew takes longer than what is done in it."""


class Transforms(NamedTuple):
    """The matrices of one axis, from cells to the six places; on squares they are used along both.

    Attributes:
        window: of six cells of the input, Bᵀ.
        weight: of three weights, G.
        turned: of three weights in their opposite order.
        tile: of four gradients, A; transposed it leads from the places to four outputs.
    """

    window: Float[Tensor, "6 6"]
    weight: Float[Tensor, "6 3"]
    turned: Float[Tensor, "6 3"]
    tile: Float[Tensor, "6 4"]


@functools.cache
def transforms() -> Transforms:
    """Interpolation at `POINTS` and at infinity: a polynomial of three weights times one of four outputs has six terms.

    B holds the coefficients of the polynomials that are zero at all other points, A the powers of each point, and G
    its powers over the product of its distances to the others.
    """
    points = np.array(POINTS)
    others = [np.delete(points, index) for index in range(len(points))]
    window = [[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(points)[::-1]]
    powers = points[:, None] ** np.arange(TILE)
    weight = powers[:, :3] / [[np.prod(point - rest)] for point, rest in zip(points, others, strict=True)]
    at_infinity = np.eye(TILE)[-1:]
    b, g, a = (
        torch.as_tensor(np.array(rows), dtype=torch.float32, device="cpu")
        for rows in (window, np.vstack([weight, at_infinity[:, 1:]]), np.vstack([powers, at_infinity]))
    )
    return Transforms(b, g, g.flip(1).contiguous(), a)


def pays(x: Float[Tensor, "b c h w"]) -> bool:
    """Whether a map is large enough: weights have to be transformed for it, and threads to be set to many small parts.

    The bounds were measured with one thread and with two; there both ways take about the same time.
    """
    threads = torch.get_num_threads()
    return x.numel() >= (75_000 if threads == 1 else 150_000 * threads)


def convolve(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o c 3 3"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "b o h w"]:
    """A convolution of stride 1 with zeros around its map, which keeps its size."""
    parts = (part.permute(1, 2, 0) for part in _transformed(transforms().weight, _split(weight, 0)))
    return _convolve(x, parts, len(weight), bias)


def convolve_back(gradient: Float[Tensor, "b o h w"], weight: Float[Tensor, "o c 3 3"]) -> Float[Tensor, "b c h w"]:
    """The gradient of the input of `convolve`."""
    parts = (part.transpose(0, 1) for part in _transformed(transforms().turned, _split(weight, 1)))
    return _convolve(gradient, parts, weight.shape[1], None)


def gradient_of_weight(
    x: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b o h w"], weight: Float[Tensor, "o c 3 3"]
) -> Float[Tensor, "o c 3 3"]:
    """That of the weights of `convolve`: summed up in 36 places, then led back to nine."""
    known, places, tiles = transforms(), _Places(_windows(x, 1)), _windows(gradient, 0)
    result = torch.empty_like(weight, memory_format=torch.channels_last)
    first = 0
    total = x.new_empty(0)
    for part in _split(result, 0):
        last = first + len(part)
        for number, block in enumerate(places.blocks):
            wanted = _at_places(known.tile, tiles[:, :, *block, ..., first:last]).transpose(1, 2)
            if number:
                total.baddbmm_(wanted, places.of(block))
            else:
                total = torch.bmm(wanted, places.of(block), out=_reused(total, (36, len(part), x.shape[1])))
        nine = _transform(known.weight.T, total.view(TILE + 2, TILE + 2, -1))
        part.copy_(nine.view(3, 3, len(part), -1).permute(2, 3, 0, 1))
        first = last
    return result


def _convolve(
    x: Float[Tensor, "b c h w"],
    weights: Iterable[Float[Tensor, "36 c _"]],
    outputs: int,
    bias: Float[Tensor, " o"] | None,
) -> Float[Tensor, "b o h w"]:
    """The convolution with transformed weights, some outputs after the other."""
    places = _Places(_windows(x, 1))
    images, rows, columns = places.windows.shape[2:5]
    size = (images, outputs, rows * TILE, columns * TILE)
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    by_tile = result.permute(0, 2, 3, 1).view(images, rows, TILE, columns, TILE, outputs)
    first = 0
    for weight in weights:
        last = first + weight.shape[2]
        for block in places.blocks:
            products = torch.bmm(places.of(block), weight)
            tiles = _transform(transforms().tile.T, products.view(TILE + 2, TILE + 2, -1))
            filled = by_tile[*block, ..., first:last]
            tiles = tiles.view(TILE, TILE, *filled[:, :, 0, :, 0].shape)
            if bias is not None:
                tiles += bias[first:last]
            filled.copy_(tiles.permute(2, 3, 0, 4, 1, 5))
        first = last
    height, width = x.shape[2:]
    if size[2:] == (height, width):
        return result
    return result[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


class _Places:
    """The transforms of windows, a block at a time: some rows of an image, or some small images.

    Where there is one block, it is transformed once for all parts of the weights.
    """

    def __init__(self, windows: Float[Tensor, "i i b r t c"]):
        self.windows = windows
        images, rows, columns = windows.shape[2:5]
        self.blocks = list(blocks(images, rows, columns, TILES))
        self._only: Tensor | None = None

    def of(self, block: tuple[slice, slice]) -> Float[Tensor, "36 n c"]:
        if self._only is not None:
            return self._only
        places = _at_places(transforms().window, self.windows[:, :, *block])
        if len(self.blocks) == 1:
            self._only = places
        return places


def _windows(x: Float[Tensor, "b c h w"], border: int) -> Float[Tensor, "i i b r t c"]:
    """Squares of `TILE + 2 * border` cells, one for each tile of a row r and a column t; zeros lie around the map."""
    height, width = x.shape[2:]
    size = TILE + 2 * border
    edges = (border, -width % TILE + border, border, -height % TILE + border)
    padded = F.pad(x, edges) if any(edges) else x
    return padded.unfold(2, size, TILE).unfold(3, size, TILE).permute(4, 5, 0, 2, 3, 1)


def _transform(matrix: Float[Tensor, "o i"], squares: Float[Tensor, "i i *n"]) -> Float[Tensor, "p n"]:
    """A transform of squares along both of their axes, to p = o² numbers."""
    outputs, inputs = matrix.shape
    along_rows = matrix @ squares.reshape(inputs, -1)
    return torch.matmul(matrix, along_rows.view(outputs, inputs, -1)).flatten(0, 1)


def _at_places(matrix: Float[Tensor, "6 i"], windows: Float[Tensor, "i i b r t c"]) -> Float[Tensor, "36 n c"]:
    return _transform(matrix, windows).view(len(matrix) ** 2, -1, windows.shape[-1])


def _split(weight: Float[Tensor, "o c 3 3"], dim: int) -> tuple[Float[Tensor, "_ _ 3 3"], ...]:
    """Weights in as many parts as keep each below `LARGEST` when it is transformed."""
    return weight.chunk(-(-weight.numel() * 4 // LARGEST), dim)


def _transformed(
    matrix: Float[Tensor, "6 3"], parts: Iterable[Float[Tensor, "_ _ 3 3"]]
) -> Iterator[Float[Tensor, "o 36 c"]]:
    """Each part of the weights in turn, in one and the same memory."""
    both = torch.kron(matrix, matrix)
    result = both.new_empty(0)
    for part in parts:
        nine = part.permute(0, 2, 3, 1).flatten(1, 2)
        result = _reused(result, (len(part), len(both), part.shape[1]))
        yield torch.bmm(both.expand(len(part), -1, -1), nine, out=result)


def _reused(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    return block if block.shape == shape else block.new_empty(shape)
