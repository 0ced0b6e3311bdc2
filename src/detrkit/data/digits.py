"""A small detection data set that needs no download: handwritten digits on photographs, made from a seed.

The handwriting is the 1797 digits of 8 × 8 pixels that come with scikit-learn (the test part of the UCI set "Optical
Recognition of Handwritten Digits"), drawn smoothly at many sizes; the backgrounds are crops of scikit-learn's two
sample photographs.
"""

from __future__ import annotations

import colorsys
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from detrkit.data.dataset import random_stream
from detrkit.errors import MissingExtraError, UsageError

SPLITS = ("train", "val", "test")

_STREAM = 3  # 1 and 2 shuffle and augment while training
_HANDWRITING = (0.7, 0.85, 1.0)
"""Where each split's handwriting ends, as a part of all digits: nobody's 7 is learned and then tested."""
_GLYPH = 360
_JPEG_QUALITY = 92
_TRIES = 60
_MOST_OVERLAP = 0.05


class _Glyph(NamedTuple):
    """A digit ready to be laid down: opacity of the ink and of the ink with its outline, both (h, w) in [0, 1]."""

    digit: int
    ink: np.ndarray
    outlined: np.ndarray


@dataclass(frozen=True)
class _Sources:
    digits: np.ndarray
    labels: np.ndarray
    photographs: tuple[Image.Image, ...]


def make_digits(
    out: Path,
    *,
    seed: int = 0,
    train: int = 400,
    val: int = 80,
    test: int = 80,
    size: tuple[int, int] = (256, 320),
    digits: tuple[int, int] = (1, 7),
    heights: tuple[int, int] = (16, 110),
) -> None:
    """Write the data set in COCO's layout: `annotations/instances_SPLIT.json` and `SPLIT/*.jpg`.

    The same arguments give the same files. An image depends on the seed, its split and its number alone, so a larger
    set begins with the smaller one. No handwritten digit occurs in two splits. Category k + 1 is the digit k; boxes
    enclose ink and outline tightly. The folder appears when everything is written, never half.

    Args:
        out: the folder to make.
        seed: at least 0.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        size: height and width of the images in pixels.
        digits: least and most digits in an image; where no room is left there are fewer.
        heights: least and largest height of a digit in pixels; uniform in the logarithm.

    Raises:
        UsageError: `out` exists and is not empty, or a number is out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if seed < 0 or min(counts.values()) < 0:
        raise UsageError("Seed and numbers of images must not be negative", got=f"seed {seed}, {counts}")
    if not 0 <= digits[0] <= digits[1] or not 4 <= heights[0] <= heights[1] or min(size) < heights[0] + 2:
        raise UsageError("These sizes make no sense", got=f"size {size}, digits {digits}, heights {heights}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("The folder for the digits is not empty", where=out, remedy="Name another, or delete it.")
    sources = _load_sources()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate(counts.items()):
        drawn = (
            _compose(sources, number, random_stream(_STREAM, seed, number, index), size, digits, heights)
            for index in range(count)
        )
        _write_split(partial, split, f"Handwritten digits on photographs, seed {seed}, {split}", drawn)
    if out.exists():
        out.rmdir()
    partial.rename(out)


def _write_split(
    root: Path, split: str, description: str, drawn: Iterable[tuple[Image.Image, list[dict[str, Any]]]]
) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, objects) in enumerate(drawn):
        name = f"{number:06d}.jpg"
        image.save(root / split / name, quality=_JPEG_QUALITY)
        images.append({"id": number + 1, "file_name": name, "height": image.height, "width": image.width})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **entry})
    document = {
        "info": {"description": description},
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
        "images": images,
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _load_sources() -> _Sources:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "Making the digits data set") from error
    table = load_digits()
    photographs = tuple(Image.fromarray(pixels) for pixels in load_sample_images().images)
    return _Sources(table.images, table.target, photographs)


def _compose(
    sources: _Sources,
    split: int,
    rng: np.random.Generator,
    size: tuple[int, int],
    digits: tuple[int, int],
    heights: tuple[int, int],
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One image, and COCO entries for its digits."""
    canvas = np.asarray(_background(sources.photographs, rng, size)).astype(np.float32)
    first = int(len(sources.labels) * (_HANDWRITING[split - 1] if split else 0))
    last = int(len(sources.labels) * _HANDWRITING[split])
    taken: list[tuple[int, int, int, int]] = []
    objects: list[dict[str, Any]] = []
    wanted = int(rng.integers(digits[0], digits[1] + 1))
    largest = min(heights[1], min(size) - 2)
    sides = sorted(np.exp(rng.uniform(np.log(heights[0]), np.log(largest), wanted)), reverse=True)
    for height in sides:  # the large ones first, while there is room
        chosen = int(rng.integers(first, last))
        glyph = _glyph(sources.digits[chosen], int(sources.labels[chosen]), round(height), rng)
        place = _free_place(glyph.ink.shape, size, taken, rng)
        if place is None:
            continue
        canvas = _lay(canvas, glyph, place, rng)
        rows, columns = np.nonzero(glyph.outlined > 0.5)
        x, y = place[1] + int(columns.min()), place[0] + int(rows.min())
        width, box_height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
        taken.append((x, y, x + width, y + box_height))
        objects.append(
            {"category_id": glyph.digit + 1, "bbox": [x, y, width, box_height], "area": len(rows), "iscrowd": 0}
        )
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8)), objects


def _background(photographs: tuple[Image.Image, ...], rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A crop of a photograph, mirrored, recoloured and blurred by chance, a little paler than the original."""
    photograph = photographs[rng.integers(len(photographs))]
    height, width = size
    zoom = min(photograph.width / width, photograph.height / height) * rng.uniform(0.25, 1.0)
    left = rng.uniform(0, photograph.width - width * zoom)
    top = rng.uniform(0, photograph.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shift = int(rng.integers(256)) if rng.random() < 0.6 else 0
    turned = [(value + shift) % 256 for value in range(256)]
    image = image.convert("HSV").point(turned + [*range(256)] * 2).convert("RGB")
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.3, 0.9))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 0.85))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.3))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5)))


def _glyph(cell: np.ndarray, digit: int, height: int, rng: np.random.Generator) -> _Glyph:
    """Draw 8 × 8 grey values as a smooth shape of `height` pixels with an outline."""
    grey = Image.fromarray(np.rint(np.pad(cell, 2) * (255 / 16)).astype(np.uint8))
    large = grey.resize((_GLYPH, _GLYPH), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(_GLYPH / 45))
    large = large.rotate(float(rng.uniform(-14, 14)), Image.Resampling.BICUBIC)
    solid = np.asarray(large) > 255 * rng.uniform(0.32, 0.42)
    rows, columns = np.nonzero(solid)
    shape = solid[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    stretch = rng.uniform(0.85, 1.15)
    edge = max(1.0, 0.035 * height)
    pad = int(np.ceil(edge)) + 1
    ink_height = max(3, height - 2 * round(0.6 * edge))  # where the outline below is half opaque
    ink_width = max(2, round(ink_height * shape.shape[1] / shape.shape[0] * stretch))
    ink = Image.fromarray(shape.astype(np.uint8) * 255).resize((ink_width, ink_height), Image.Resampling.BOX)
    padded = np.pad(np.asarray(ink).astype(np.float32) / 255, pad)
    outline = Image.fromarray(np.rint(padded * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(edge * 0.8))
    outlined = np.maximum(padded, np.clip(np.asarray(outline).astype(np.float32) / 255 * 3.5 - 0.3, 0, 1))
    return _Glyph(digit, padded, outlined)


def _free_place(
    shape: tuple[int, ...],
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Top and left of a place inside the image that hardly overlaps what is there, if chance finds one."""
    height, width = shape
    if height > size[0] or width > size[1]:
        return None
    for _ in range(_TRIES):
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
        for x0, y0, x1, y1 in taken:
            common = max(0, min(x1, left + width) - max(x0, left)) * max(0, min(y1, top + height) - max(y0, top))
            if common > _MOST_OVERLAP * min(height * width, (x1 - x0) * (y1 - y0)):
                break
        else:
            return top, left
    return None


def _lay(canvas: np.ndarray, glyph: _Glyph, place: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Lay a glyph onto the canvas with a soft shadow, light on dark or dark on light."""
    top, left = place
    height, width = glyph.ink.shape
    below = canvas[top : top + height, left : left + width]
    luminance = float((below @ np.array([0.299, 0.587, 0.114], np.float32)).mean()) / 255
    hue = float(rng.random())
    if luminance + rng.uniform(-0.08, 0.08) < 0.55:
        colour = colorsys.hsv_to_rgb(hue, float(rng.uniform(0.05, 0.6)), float(rng.uniform(0.94, 1.0)))
        edge = colorsys.hsv_to_rgb(hue, 0.5, 0.12)
    else:
        colour = colorsys.hsv_to_rgb(hue, float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.2, 0.5)))
        edge = colorsys.hsv_to_rgb(hue, 0.08, 1.0)
    result = _shadowed(canvas, glyph, place)
    region = result[top : top + height, left : left + width]
    for alpha, paint in ((glyph.outlined, edge), (glyph.ink, colour)):
        region += alpha[..., None] * (np.array(paint, np.float32) * 255 - region)
    return result


def _shadowed(canvas: np.ndarray, glyph: _Glyph, place: tuple[int, int]) -> np.ndarray:
    height = glyph.ink.shape[0]
    offset, blur = max(1, round(height * 0.03)), max(1.0, height * 0.04)
    mask = Image.new("L", (canvas.shape[1], canvas.shape[0]))
    mask.paste(Image.fromarray(np.rint(glyph.outlined * 255).astype(np.uint8)), (place[1] + offset, place[0] + offset))
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur))).astype(np.float32) / 255
    shadowed: np.ndarray = canvas * (1 - 0.45 * soft[..., None])
    return shadowed
