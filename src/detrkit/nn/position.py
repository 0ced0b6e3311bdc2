"""Encodings of where a cell lies in the image grid (DETR, Carion et al., ECCV 2020, appendix A.4)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def sine_embedding(position: Float[Tensor, "*n"], dim: int, temperature: float = 10000.0) -> Float[Tensor, "*n dim"]:
    """Sines and cosines of a coordinate at `dim` / 2 wavelengths, interleaved.

    Args:
        position: an angle; the caller scales it, usually to [0, 2π].
        dim: number of channels; even.
        temperature: ratio of the longest to the shortest wavelength.
    """
    exponent = 2 * torch.arange(dim // 2, dtype=torch.float32, device=position.device) / dim
    angle = position[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def encode_points(points: Float[Tensor, "*n 2"], dim: int, temperature: float = 10000.0) -> Float[Tensor, "*n dim"]:
    """The encoding of points (x, y) in [0, 1] as `SinePosition` would encode a cell there: first y, then x.

    Args:
        points: x to the right and y down, of the unpadded image.
        dim: number of channels; a multiple of 4.
        temperature: ratio of the longest to the shortest wavelength.
    """
    x, y = (points * (2 * math.pi)).unbind(-1)
    return torch.cat([sine_embedding(axis, dim // 2, temperature) for axis in (y, x)], -1)


def inverse_sigmoid(x: Float[Tensor, "*n"], limit: float = 1e-5) -> Float[Tensor, "*n"]:
    """The number whose sigmoid is `x`, in [0, 1]; nothing is nearer than `limit` to 0 or 1."""
    x = x.clamp(0, 1)
    return x.clamp(min=limit).log() - (1 - x).clamp(min=limit).log()


class SinePosition(nn.Module):
    """Fixed encoding: half the channels for y, half for x, normalised so that every image spans [0, 2π].

    Args:
        dim: number of channels; a multiple of 4.
        temperature: ratio of the longest to the shortest wavelength; the paper's is 10000.
    """

    def __init__(self, dim: int, temperature: float = 10000.0):
        super().__init__()
        self.dim, self.temperature = dim, temperature

    def forward(self, padding: Bool[Tensor, "b h w"]) -> Float[Tensor, "b h*w {self.dim}"]:
        """Encode each cell; `padding` is True outside the image."""
        inside = (~padding).int()  # integer sums are exact and deterministic on every device
        y, x = inside.cumsum(1).float(), inside.cumsum(2).float()
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        half = self.dim // 2
        encoded = [sine_embedding(axis, half, self.temperature) for axis in (y, x)]
        return torch.cat(encoded, -1).flatten(1, 2)


class LearnedPosition(nn.Module):
    """Learned encoding: a table of columns and a table of rows, half the channels each.

    A grid of up to `cells` rows and columns reads the tables as they are, which is the official behaviour. A larger
    grid reads them stretched by linear interpolation, where the official code fails.

    Args:
        dim: number of channels; even.
        cells: rows of each table.
    """

    def __init__(self, dim: int, cells: int = 50):
        super().__init__()
        self.row = nn.Parameter(torch.rand(cells, dim // 2))
        self.column = nn.Parameter(torch.rand(cells, dim // 2))

    def forward(self, padding: Bool[Tensor, "b h w"]) -> Float[Tensor, "b h*w d"]:
        """Encode each cell; what is padded does not matter to this encoding."""
        batch, height, width = padding.shape
        x = _stretched(self.column, width)[None, :, :].expand(height, width, -1)
        y = _stretched(self.row, height)[:, None, :].expand(height, width, -1)
        return torch.cat([x, y], -1).flatten(0, 1).expand(batch, -1, -1)


def _stretched(table: Float[Tensor, "cell d"], length: int) -> Float[Tensor, "{length} d"]:
    if length <= len(table):
        return table[:length]
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=True)[0].T


def spread_points(count: int) -> Float[Tensor, "{count} 2"]:
    """Points (x, y) that fill the unit square evenly, however many: the R2 sequence (Roberts, 2018)."""
    plastic = 1.32471795724474602596  # the real root of x³ = x + 1
    steps = torch.tensor([1 / plastic, 1 / plastic**2], dtype=torch.float64)
    return ((0.5 + torch.arange(1, count + 1)[:, None] * steps) % 1).float()
