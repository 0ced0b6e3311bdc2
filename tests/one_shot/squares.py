"""The smallest one-shot detectors of every variant, and images of coloured squares that they look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detrkit import models
from detrkit.data.transforms import to_tensor
from detrkit.one_shot.model import OneShot

COLOURS = {"red": (220, 40, 40), "blue": (50, 70, 230), "green": (40, 200, 60), "orange": (240, 140, 20)}

STRIDE = 16

SMALL: dict[str, Any] = {
    "num_classes": 1,
    "backbone": "resnet-nano",
    "stride": STRIDE,
    "frozen_stages": 0,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 64,
    "num_queries": 6,
    "dropout": 0.0,
    "image_size": 64,
    "longest": 96,
}


def preset_of(variant: str) -> str:
    """A small preset of a variant."""
    presets = list(models.variant(variant).PRESETS)
    return next((name for name in presets if name.endswith("nano")), presets[0])


def small(variant: str = "detr", *, config: dict[str, Any] | None = None, **options: Any) -> OneShot:
    """A one-shot detector with random weights, in evaluation mode."""
    detector = models.build(preset_of(variant), **{**SMALL, **(config or {})})
    for parameter in detector.parameters():  # some heads start with zeros, and would answer the same to everything
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return OneShot(detector, **{"width": 16, **options}).eval()


class Samples(nn.Module):
    """A backbone whose cells see nothing but their own first pixel, so that padding changes none of them.

    As of any backbone, a last cell that is cut by the border is a whole one in the map.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels, self.strides = (channels,), (STRIDE,)
        self.mix = nn.Conv2d(3, channels, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The first pixel of each cell."""
        return (self.mix(images[..., ::STRIDE, ::STRIDE]),)


def episode(images: int = 3, episodes: int = 4, size: tuple[int, int] = (64, 80)) -> tuple[Tensor, ...]:
    """What `OneShot.forward` takes: images of which the last is padded, and what is looked for in them."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, *size, generator=generator)
    padding = torch.zeros(images, *size, dtype=torch.bool)
    padding[-1, :, 64:] = True
    pictures[-1, :, :, 64:] = 0
    source = torch.arange(episodes) % images
    centre = 0.3 + 0.4 * torch.rand(episodes, 2, generator=generator)
    boxes = torch.cat([centre, 0.2 + 0.2 * torch.rand(episodes, 2, generator=generator)], 1)
    return pictures, padding, (source + 1) % images, source, boxes


def draw(squares: list[tuple[str, int, int]], *, seed: int = 0, side: int = 24, size=(96, 128)) -> Image.Image:
    """Squares of some colours at some places (left, top) on grey noise."""
    pixels = np.random.default_rng(seed).integers(90, 140, (*size, 3)).astype(np.uint8)
    for colour, x, y in squares:
        pixels[y : y + side, x : x + side] = COLOURS[colour]
    return Image.fromarray(pixels)


def shown(picture: Image.Image, x: int, y: int, side: int = 24) -> tuple[Tensor, Tensor]:
    """A picture as a tensor, and the box of one of its squares, cxcywh in [0, 1]."""
    width, height = picture.size
    box = torch.tensor([[(x + side / 2) / width, (y + side / 2) / height, side / width, side / height]])
    return to_tensor(picture), box
