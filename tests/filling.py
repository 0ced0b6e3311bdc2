"""Weights and images for the backbone tests, made from names and sizes alone."""

from __future__ import annotations

import zlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights from names alone, the same for any implementation that has the names."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 1 + 0.3 * np.tanh(values)
    if len(shape) == 4:
        return values * np.sqrt(2 / np.prod(shape[1:]))
    return (1 + 0.1 * np.tanh(values)) * 0.7 if leaf == "weight" else 0.1 * values


def filled(backbone: Network) -> Network:
    """The same network with the weights of `fill`."""
    for name, value in backbone.state_dict().items():
        if value.ndim:  # a batch norm counts its batches in a scalar
            value.copy_(torch.from_numpy(fill(name, tuple(value.shape))))
    return backbone


def image(height: int, width: int, count: int = 1) -> Tensor:
    """Normalised noise, always the same."""
    generator = np.random.Generator(np.random.PCG64(7))
    return torch.from_numpy(generator.standard_normal((count, 3, height, width))).float()
