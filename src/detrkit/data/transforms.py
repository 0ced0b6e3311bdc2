"""Resizing, and the augmentation that DETR was trained with (Carion et al., ECCV 2020, section 4 and appendix A.4).

Images stay Pillow images and boxes stay xyxy pixels until `to_tensor`; every random number comes from the generator
that the caller hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from PIL import Image
from torch import Tensor

from detrkit.errors import UsageError
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD

PAPER_SHORTEST = 800
PAPER_LONGEST = 1333
PAPER_SIZES = tuple(range(480, 801, 32))
PAPER_PRE_CROP_SIZES = (400, 500, 600)
PAPER_CROP_SIZES = (384, 600)

# The strengths of the SSD distortion (Liu et al., ECCV 2016, section 3.2 and the authors' code).
_BRIGHTNESS = 32
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE_DEGREES = 18


class Sample(NamedTuple):
    """An image with its boxes: `boxes` (t, 4) float64, xyxy in pixels of this image; `labels` (t,) int64; `masks`
    (t, height, width) bool of this image where they are asked for, one without any pixel where it is not known.
    """

    image: Image.Image
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


def to_tensor(image: Image.Image) -> Float32[Tensor, "3 h w"]:
    """An RGB image as the normalised tensor that models take (`NORMALIZATION_MEAN`, `NORMALIZATION_STD`)."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    mean = torch.tensor(NORMALIZATION_MEAN)[:, None, None]
    std = torch.tensor(NORMALIZATION_STD)[:, None, None]
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Scale the image to `height` × `width` pixels (bilinear, antialiased), and the boxes with it."""
    old_width, old_height = sample.image.size
    if (old_height, old_width) == (height, width):
        return sample
    factors = np.array([width / old_width, height / old_height] * 2)
    image = sample.image.resize((width, height), Image.Resampling.BILINEAR)
    masks = None if sample.masks is None else sample_masks(sample.masks, (height, width), (0, 0, height, width))
    return Sample(image, sample.boxes * factors, sample.labels, masks)


def sample_masks(
    masks: Bool[np.ndarray, "t h w"], size: tuple[int, int], region: tuple[int, int, int, int]
) -> Bool[np.ndarray, "t _ _"]:
    """A region of scaled masks: each pixel is the one that lies under its centre.

    Args:
        masks: of an image.
        size: height and width of the whole image after scaling, in pixels.
        region: top, left, height and width within the scaled image, in pixels.
    """
    top, left, height, width = region
    rows = ((top + np.arange(height) + 0.5) * (masks.shape[1] / size[0])).astype(np.int64).clip(0, masks.shape[1] - 1)
    columns = (
        ((left + np.arange(width) + 0.5) * (masks.shape[2] / size[1])).astype(np.int64).clip(0, masks.shape[2] - 1)
    )
    return masks[:, rows[:, None], columns]


def flip_horizontally(sample: Sample) -> Sample:
    """Left becomes right."""
    width = sample.image.width
    boxes = sample.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    masks = None if sample.masks is None else sample.masks[:, :, ::-1]
    return Sample(sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), boxes, sample.labels, masks)


def flip_vertically(sample: Sample) -> Sample:
    """Top becomes bottom."""
    height = sample.image.height
    boxes = sample.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, height, 0, height)
    masks = None if sample.masks is None else sample.masks[:, ::-1]
    return Sample(sample.image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), boxes, sample.labels, masks)


def turn(sample: Sample, quarters: int) -> Sample:
    """Rotate by `quarters` × 90° counter-clockwise."""
    for _ in range(quarters % 4):
        width = sample.image.width
        boxes = sample.boxes[:, [1, 2, 3, 0]] * (1, -1, 1, -1) + (0, width, 0, width)
        masks = None if sample.masks is None else np.rot90(sample.masks, axes=(1, 2))
        sample = Sample(sample.image.transpose(Image.Transpose.ROTATE_90), boxes, sample.labels, masks)
    return sample


def resize_and_crop(
    sample: Sample,
    size: tuple[int, int],
    region: tuple[int, int, int, int],
    min_visible: float = 0.0,
) -> Sample:
    """Scale the image and cut a region out of the result, in one pass over the pixels that remain.

    Boxes are cut at the region's border; those without area in it are dropped.

    Args:
        sample: what to cut from.
        size: height and width of the whole image after scaling, in pixels.
        region: top, left, height and width within the scaled image, in pixels.
        min_visible: boxes of which a smaller part than this remains are dropped as well; 0 … 1.
    """
    top, left, height, width = region
    old_width, old_height = sample.image.size
    x_factor, y_factor = size[1] / old_width, size[0] / old_height
    # The filter reaches beyond `box`, so this equals scaling first and cutting afterwards.
    image = sample.image.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(
            left / x_factor,
            top / y_factor,
            min((left + width) / x_factor, old_width),
            min((top + height) / y_factor, old_height),
        ),
    )
    moved = sample.boxes * (x_factor, y_factor, x_factor, y_factor) - (left, top, left, top)
    cut = np.clip(moved, 0, (width, height, width, height))
    kept = np.all(cut[:, 2:] > cut[:, :2], 1)
    kept &= np.prod(cut[:, 2:] - cut[:, :2], 1) >= min_visible * np.prod(moved[:, 2:] - moved[:, :2], 1)
    masks = None if sample.masks is None else sample_masks(sample.masks[kept], size, region)
    return Sample(image, cut[kept], sample.labels[kept], masks)


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


@dataclass(frozen=True, kw_only=True)
class Training:
    """The augmentation of the DETR paper: flip, then resize to a random size, with or without a random crop before it.

    With probability `crop` the short side is first set to one of `pre_crop_sizes`, and a region is cut out whose
    height and width are uniform in `crop_sizes` (and never larger than the image). Then, always, the short side is set
    to one of `sizes`. Source: Carion et al., ECCV 2020, appendix A.4. The options after `crop_sizes` are not in
    the paper and are off.

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
        if rng.random() < self.flip:
            sample = flip_horizontally(sample)
        if rng.random() < self.vertical_flip:
            sample = flip_vertically(sample)
        if rng.random() < self.quarter_turn:
            sample = turn(sample, int(rng.integers(1, 4)))
        if rng.random() < self.crop:
            sample = self._cropped(sample, rng)
        shortest = self.sizes[rng.integers(len(self.sizes))]
        sample = resize(sample, *resized_size(sample.image.height, sample.image.width, shortest, self.longest))
        if rng.random() < self.photometric:
            sample = sample._replace(image=distort(sample.image, rng))
        return sample

    def _cropped(self, sample: Sample, rng: np.random.Generator) -> Sample:
        shortest = self.pre_crop_sizes[rng.integers(len(self.pre_crop_sizes))]
        size = resized_size(sample.image.height, sample.image.width, shortest, None)
        low, high = self.crop_sizes
        height, width = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in size)
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
        return resize_and_crop(sample, size, (top, left, height, width), self.min_visible)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The resizing that models are evaluated and used with (`resized_size`), nothing random.

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

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, resized."""
        return self.resized(Sample(image, np.zeros((0, 4)), np.zeros(0, np.int64))).image

    def resized(self, sample: Sample) -> Sample:
        """The image and its boxes, resized."""
        return resize(sample, *resized_size(sample.image.height, sample.image.width, self.shortest, self.longest))
