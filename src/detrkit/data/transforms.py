"""Resizing, and the augmentation that DETR was trained with (Carion et al., ECCV 2020, section 4 and appendix A.4).

Images stay bytes and boxes stay xyxy pixels until a batch is made of them (`packing.PackedImages`) or `to_tensor` is
called; every random number comes from the generator that the caller hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from torch import Tensor

from detrkit.data.distortion import distort
from detrkit.errors import UsageError
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD

PAPER_SHORTEST = 800
PAPER_LONGEST = 1333
PAPER_SIZES = tuple(range(480, 801, 32))
PAPER_PRE_CROP_SIZES = (400, 500, 600)
PAPER_CROP_SIZES = (384, 600)

REDUCTION = 2
"""How much larger than it is shown an image is decoded at least: what a decoder leaves of fine patterns is sharper than
what resampling leaves."""


class Sample(NamedTuple):
    """An image with its boxes: `image` (3, height, width), RGB bytes (`to_pixels`); `boxes` (t, 4) float64, xyxy in
    pixels of this image; `labels` (t,) int64; `masks` (t, height, width) bool of this image where they are asked for,
    one without any pixel where it is not known.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


class TrainingSizes(NamedTuple):
    """The sizes that `Training` needs, in pixels, under the names of its fields."""

    sizes: tuple[int, ...]
    longest: int
    pre_crop_sizes: tuple[int, ...]
    crop_sizes: tuple[int, int]


def training_sizes(shortest: int = PAPER_SHORTEST, longest: int | None = None) -> TrainingSizes:
    """The paper's training sizes, scaled to a model whose evaluation images have another shortest side.

    At 800: the short side is one of 480, 512 … 800, the long one at most 1333; before a crop the short side is 400,
    500 or 600, and the sides of the crop lie in 384 … 600. At another `shortest` all of these are multiplied by
    shortest / 800 and rounded.

    Args:
        shortest: short side of the images that the model is evaluated on, in pixels.
        longest: limit of the long side, in pixels; shortest · 1333 / 800 where it is not given.

    Raises:
        UsageError: a size below 1.
    """
    if shortest < 1 or (longest is not None and longest < 1):
        raise UsageError("Image sizes must be positive", got=f"shortest {shortest}, longest {longest}")

    def scaled(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(size * shortest / PAPER_SHORTEST)) for size in sizes}))

    low, high = (max(1, round(size * shortest / PAPER_SHORTEST)) for size in PAPER_CROP_SIZES)
    if longest is None:
        longest = max(1, round(PAPER_LONGEST * shortest / PAPER_SHORTEST))
    return TrainingSizes(scaled(PAPER_SIZES), longest, scaled(PAPER_PRE_CROP_SIZES), (low, high))


def resized_size(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """Height and width after resizing, by the rule of the official DETR.

    The short side becomes `shortest`, unless the long side would then exceed `longest`: then the short side becomes
    longest · short / long, rounded (so the long side may pass `longest` by half a pixel of the short one). The long
    side follows the aspect ratio and is rounded down. No side falls below 1.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        shortest: wanted short side, in pixels.
        longest: limit of the long side, in pixels; None: no limit.
    """
    short, long = min(height, width), max(height, width)
    if longest is not None and long / short * shortest > longest:
        shortest = max(1, round(longest * short / long))
    if short == shortest:
        return height, width
    if width < height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def to_pixels(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """The bytes of an image, red, green and blue of a pixel side by side in memory."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def byte_scale() -> tuple[Float32[Tensor, " 3"], Float32[Tensor, " 3"]]:
    """What is taken from the bytes of each channel, and the factor of what is left, so that they are normalised."""
    return torch.tensor(NORMALIZATION_MEAN) * 255, 1 / (torch.tensor(NORMALIZATION_STD) * 255)


def to_tensor(image: Image.Image | UInt8[Tensor, "*b 3 h w"]) -> Float32[Tensor, "*b 3 h w"]:
    """An image or more as the normalised tensor that models take (`NORMALIZATION_MEAN`, `NORMALIZATION_STD`)."""
    pixels = to_pixels(image) if isinstance(image, Image.Image) else image
    mean, factor = (values[:, None, None] for values in byte_scale())
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).mul_(factor)


def spare(factor: float) -> int:
    """By how much an image may be smaller that is shown at 1 / `factor` of its size: 1, 2, 4 or 8.

    `REDUCTION` is left over.
    """
    return max(power for power in (1, 2, 4, 8) if power * REDUCTION <= factor or power == 1)


def scale(pixels: UInt8[Tensor, "3 _ _"], height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """An image of `height` × `width` pixels: bilinear and antialiased, to within 1 of 255 what Pillow makes of it."""
    if pixels.shape[1:] == (height, width):
        return pixels
    # Only of a block whose channels lie side by side does torch's kernel take whole pixels at a time.
    block = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(block, (height, width), mode="bilinear", antialias=True)[0]


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Scale the image to `height` × `width` pixels (`scale`), and boxes and masks with it."""
    old_height, old_width = sample.image.shape[1:]
    if (old_height, old_width) == (height, width):
        return sample
    factors = np.array([width / old_width, height / old_height] * 2)
    masks = None if sample.masks is None else sample_masks(sample.masks, (height, width))
    return Sample(scale(sample.image, height, width), sample.boxes * factors, sample.labels, masks)


def sample_masks(masks: Bool[np.ndarray, "t _ _"], size: tuple[int, int]) -> Bool[np.ndarray, "t _ _"]:
    """Masks of `size` (height, width): each pixel is the one that lies under its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64).clip(0, old - 1)
        for old, new in zip(masks.shape[1:], size, strict=True)
    )
    return masks[:, rows[:, None], columns]


def flip_horizontally(sample: Sample) -> Sample:
    """Left becomes right."""
    width = sample.image.shape[2]
    boxes = sample.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    masks = None if sample.masks is None else sample.masks[:, :, ::-1]
    return Sample(sample.image.flip(2), boxes, sample.labels, masks)


def flip_vertically(sample: Sample) -> Sample:
    """Top becomes bottom."""
    height = sample.image.shape[1]
    boxes = sample.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, height, 0, height)
    masks = None if sample.masks is None else sample.masks[:, ::-1]
    return Sample(sample.image.flip(1), boxes, sample.labels, masks)


def turn(sample: Sample, quarters: int) -> Sample:
    """Rotate by `quarters` × 90° counter-clockwise."""
    for _ in range(quarters % 4):
        width = sample.image.shape[2]
        boxes = sample.boxes[:, [1, 2, 3, 0]] * (1, -1, 1, -1) + (0, width, 0, width)
        masks = None if sample.masks is None else np.rot90(sample.masks, axes=(1, 2))
        sample = Sample(sample.image.rot90(1, (1, 2)), boxes, sample.labels, masks)
    return sample


def cut(sample: Sample, region: tuple[int, int, int, int], min_visible: float = 0.0) -> Sample:
    """Take a region out of an image, without a copy of its pixels.

    Boxes are cut at the region's border; those without area in it are dropped.

    Args:
        sample: what to cut from.
        region: top, left, height and width, in pixels.
        min_visible: boxes of which a smaller part than this remains are dropped as well; 0 … 1.
    """
    top, left, height, width = region
    moved = sample.boxes - (left, top, left, top)
    inside = np.clip(moved, 0, (width, height, width, height))
    kept = np.all(inside[:, 2:] > inside[:, :2], 1)
    kept &= np.prod(inside[:, 2:] - inside[:, :2], 1) >= min_visible * np.prod(moved[:, 2:] - moved[:, :2], 1)
    rows, columns = slice(top, top + height), slice(left, left + width)
    masks = None if sample.masks is None else sample.masks[:, rows, columns][kept]
    return Sample(sample.image[:, rows, columns], inside[kept], sample.labels[kept], masks)


def whole_pixels(start: int, length: int, scaled: int, old: int) -> tuple[int, int]:
    """A stretch of a scaled side, in whole pixels of the side before it was scaled; one at least.

    Args:
        start: of the stretch, in pixels of the scaled side.
        length: of the stretch, likewise.
        scaled: length of the scaled side.
        old: length of the side before.

    Returns:
        Start and length in pixels of the side before. Each end is moved by half of one at most, or by one where
        nothing would be left.
    """
    first, end = round(start * old / scaled), round((start + length) * old / scaled)
    return (first, end - first) if end > first else (int(start * old / scaled), 1)


class View(NamedTuple):
    """How an image is to be shown; sizes and regions are of the turned image.

    `mirrored`: left to right, and then `upside_down`, and then turned by `quarters` × 90° counter-clockwise. `whole`:
    height and width that the image is scaled to; `region`: top, left, height and width of what is cut out of that;
    `size`: height and width that the region is scaled to; all in pixels. `min_visible`: boxes of which the region holds
    a smaller part are dropped. `distorted`: colours are changed at last.
    """

    mirrored: bool
    upside_down: bool
    quarters: int
    whole: tuple[int, int]
    region: tuple[int, int, int, int]
    size: tuple[int, int]
    min_visible: float
    distorted: bool

    def spare(self, height: int, width: int) -> int:
        """By how much an image of `height` × `width` pixels may be smaller (`spare`)."""
        sides = (width, height) if self.quarters % 2 else (height, width)
        return spare(
            min(
                part * side / (scaled * shown)
                for part, side, scaled, shown in zip(self.region[2:], sides, self.whole, self.size, strict=True)
            )
        )

    def show(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The image that this was drawn for, or the same at another scale."""
        if self.mirrored:
            sample = flip_horizontally(sample)
        if self.upside_down:
            sample = flip_vertically(sample)
        sample = turn(sample, self.quarters)
        height, width = sample.image.shape[1:]
        top, rows = whole_pixels(self.region[0], self.region[2], self.whole[0], height)
        left, columns = whole_pixels(self.region[1], self.region[3], self.whole[1], width)
        if (rows, columns) != (height, width):
            sample = cut(sample, (top, left, rows, columns), self.min_visible)
        sample = resize(sample, *self.size)
        if self.distorted:
            image = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
            sample = sample._replace(image=to_pixels(distort(image, rng)))
        return sample


@dataclass(frozen=True, kw_only=True)
class Training:
    """The augmentation of the DETR paper: flip, then resize to a random size, with or without a random crop before it.

    With probability `crop` the short side is first set to one of `pre_crop_sizes`, and a region is cut out whose
    height and width are uniform in `crop_sizes` (and never larger than the image). Then, always, the short side is set
    to one of `sizes`. Source: Carion et al., ECCV 2020, appendix A.4. The options after `crop_sizes` are not in
    the paper and are off.

    Pixels are resampled once: the region is cut out of the original at the nearest whole pixels and scaled to the size
    that the paper's two steps would give it. So it is a little sharper than theirs, and boxes and masks are exact.

    Attributes:
        sizes: short sides to choose from, in pixels.
        longest: limit of the long side, in pixels.
        pre_crop_sizes: short sides to choose from before a crop, in pixels.
        crop_sizes: smallest and largest side of the crop, in pixels.
        flip: probability of a mirror image, left to right.
        crop: probability of the crop.
        min_visible: a box of which a smaller part than this is left in the crop is dropped; 0 … 1.
        photometric: probability of `distort`.
        vertical_flip: probability of turning the image upside down; for views from above and microscopes.
        quarter_turn: probability of a rotation by 90°, 180° or 270°; for the same.

    Raises:
        UsageError: a probability outside [0, 1], no sizes, or a size below 1.
    """

    sizes: tuple[int, ...]
    longest: int
    pre_crop_sizes: tuple[int, ...]
    crop_sizes: tuple[int, int]
    flip: float = 0.5
    crop: float = 0.5
    min_visible: float = 0.0
    photometric: float = 0.0
    vertical_flip: float = 0.0
    quarter_turn: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "crop", "min_visible", "photometric", "vertical_flip", "quarter_turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    "This augmentation setting is out of range", where=name, got=getattr(self, name), expected="0 … 1"
                )
        for name in ("sizes", "pre_crop_sizes", "crop_sizes"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UsageError(
                    "Image sizes must be positive", where=name, got=getattr(self, name), expected="pixels, at least 1"
                )
        if self.longest < 1 or self.crop_sizes[0] > self.crop_sizes[1]:
            raise UsageError(
                "These image sizes make no sense", got=f"longest {self.longest}, crop_sizes {self.crop_sizes}"
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Augment a sample; a pure function of it and of the generator's state."""
        return self.draw(sample.image.shape[1], sample.image.shape[2], rng).show(sample, rng)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> View:
        """How an image of `height` × `width` pixels is to be shown: all that is random, but what `distort` draws."""
        mirrored = rng.random() < self.flip
        upside_down = rng.random() < self.vertical_flip
        quarters = int(rng.integers(1, 4)) if rng.random() < self.quarter_turn else 0
        whole = (width, height) if quarters % 2 else (height, width)
        region = (0, 0, *whole)
        if rng.random() < self.crop:
            shortest = self.pre_crop_sizes[rng.integers(len(self.pre_crop_sizes))]
            whole = resized_size(*whole, shortest, None)
            low, high = self.crop_sizes
            rows, columns = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in whole)
            region = (int(rng.integers(whole[0] - rows + 1)), int(rng.integers(whole[1] - columns + 1)), rows, columns)
        shortest = self.sizes[rng.integers(len(self.sizes))]
        size = resized_size(*region[2:], shortest, self.longest)
        distorted = rng.random() < self.photometric
        return View(mirrored, upside_down, quarters, whole, region, size, self.min_visible, distorted)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The resizing that models are evaluated and used with (`resized_size`), nothing random.

    Sizes are those of the official code, and pixels are those of Pillow's bilinear filter, which it uses, to within
    1 of 255; but of a JPEG file that is larger than shown by `REDUCTION` times 2, 4 or 8, see `spare`.

    Attributes:
        shortest: wanted short side, in pixels.
        longest: limit of the long side, in pixels.

    Raises:
        UsageError: a size below 1.
    """

    shortest: int = PAPER_SHORTEST
    longest: int = PAPER_LONGEST

    def __post_init__(self) -> None:
        if self.shortest < 1 or self.longest < 1:
            raise UsageError("Image sizes must be positive", got=f"shortest {self.shortest}, longest {self.longest}")

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """The image, resized; see `to_tensor`."""
        return scale(to_pixels(image), *self.size(image.height, image.width))

    def resized(self, sample: Sample) -> Sample:
        """The image with its boxes and masks, resized."""
        return resize(sample, *self.size(*sample.image.shape[1:]))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of `height` × `width` pixels is going to have."""
        return resized_size(height, width, self.shortest, self.longest)

    def spare(self, height: int, width: int) -> int:
        """By how much an image of `height` × `width` pixels may be smaller before it is resized (`spare`)."""
        return spare(min(side / shown for side, shown in zip((height, width), self.size(height, width), strict=True)))
