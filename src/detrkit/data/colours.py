"""What the values of an image of any mode become in 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

_BAND = 1 << 22  # pixels that are converted at a time, so that copies of the whole are few
_Convert = Callable[[Image.Image], Image.Image]


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB.

    What is transparent lies on white. Of 16 and 32 bits and of floats, black is 0, or the least value where one is
    negative, and white is the greatest of the image, so that dark pictures of 12 bits are seen; values that are not
    finite are 0.

    Args:
        image: of any mode, decoded.
    """
    if image.mode.startswith("I") or image.mode == "F":
        low, high = _range(image)
        factor = 255 / (high - low) if high > low else 0.0
        return _by_bands(image, lambda band: _to_8_bits(band, low, factor))
    if image.has_transparency_data:
        return _by_bands(image, _over_white)
    return image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in pieces of whole rows, each with the row that it begins at."""
    width, height = image.size
    rows = max(1, _BAND // max(1, width))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))


def _by_bands(image: Image.Image, convert: _Convert) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white."""
    parts = (_finite(band) for _, band in _bands(image))
    extremes = [(float(values.min()), float(values.max())) for values in parts]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    return (0.0, max(high, 1.0 if image.mode == "F" else 255.0)) if low >= 0 else (low, high)


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _to_8_bits(image: Image.Image, low: float, factor: float) -> Image.Image:
    scaled = np.clip(np.rint((_finite(image) - low) * factor), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")
