"""Colours changed as SSD changed them in training (Liu et al., ECCV 2016)."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Section 3.2 and the authors' code.
_BRIGHTNESS = 32
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE_DEGREES = 18


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's photometric distortion: brightness, contrast, saturation and hue, each with probability one half.

    Brightness moves by up to 32 of 255, contrast and saturation are multiplied by 0.5 … 1.5, hue turns by up to 18°;
    contrast comes before or after saturation and hue. Source: Liu et al., SSD, ECCV 2016.
    """
    values = np.arange(256)
    shift = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS) * (rng.random() < 0.5)
    contrast = rng.uniform(*_CONTRAST) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(*_SATURATION) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-_HUE_DEGREES, _HUE_DEGREES) * (rng.random() < 0.5)
    contrast_first = rng.random() < 0.5

    def table(function: np.ndarray) -> list[int]:
        return [int(value) for value in np.clip(np.rint(function), 0, 255)]

    image = image.point(table((values + shift) * (contrast if contrast_first else 1)) * 3)
    if saturation != 1 or hue != 0:
        turned = np.rint(values + hue * 256 / 360).astype(int) % 256
        image = image.convert("HSV").point(turned.tolist() + table(values * saturation) + values.tolist())
        image = image.convert("RGB")
    return image if contrast_first else image.point(table(values * contrast) * 3)
