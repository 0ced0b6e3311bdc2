"""Where query patches are cut out of an unlabelled image, and what is done to them (Dai et al., UP-DETR, CVPR 2021).

The pretext task asks a detector to find patches of its own image. What it learns depends on the boxes that it is asked
for: `UniformCrops` is the rule of the official code, of whose boxes 85 % are large and a third are more than three
times as long as wide; `StratifiedCrops` spreads sizes and shapes evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageFilter

from detrkit.data.transforms import resized_size
from detrkit.errors import UsageError

PAPER_SHORTEST = 480
PAPER_LONGEST = 600
PAPER_SIZES = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)
"""Short sides of the official code, in pixels; 384 is missing there."""

_REDUCING_GAP = 2.0  # Pillow's documentation: at 2 and above no difference is seen; it is faster for large crops
_BRIGHTNESS = _CONTRAST = _SATURATION = 0.4
_HUE = 0.1
_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class UniformCrops:
    """The official rule: width and height uniform from `least` to the image's side less `least`, anywhere.

    As in the official code, a crop never touches the right and the bottom border. Source: UP-DETR, section 3.1, and
    the authors' code.

    Attributes:
        least: shortest side of a crop, in pixels.

    Raises:
        UsageError: `least` is below 1.
    """

    least: int = 8

    def __post_init__(self) -> None:
        _check_least(self.least)

    def is_large_enough(self, height: int, width: int) -> bool:
        """Whether crops can be cut out of an image of this size, in pixels."""
        return min(height, width) > 2 * self.least

    def __call__(self, height: int, width: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, "{count} 4"]:
        """Boxes of the crops, xyxy in pixels.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.
            count: number of crops.
            rng: source of the random numbers.

        Raises:
            UsageError: the image is too small.
        """
        _check_size(self, height, width)
        image = np.array([width, height])
        sides = rng.integers(self.least, image - self.least, (count, 2), endpoint=True)
        low = rng.integers(0, image - sides)
        return np.concatenate([low, low + sides], 1)


@dataclass(frozen=True)
class StratifiedCrops:
    """Crops of all sizes and shapes alike.

    The size of a crop, the square root of its share of the image's area, is log-uniform from `smallest` to `largest`:
    that range is divided into as many equal parts of the logarithm as there are crops, and each part gives one, in
    random order. Width / height is stratified in the same way. A crop that does not fit is scaled down until it does.

    Attributes:
        smallest: lowest size, as a fraction.
        largest: highest size, as a fraction.
        most_elongated: longest side over shortest, in pixels.
        least: shortest side of a crop, in pixels.

    Raises:
        UsageError: not 0 < `smallest` ≤ `largest` ≤ 1, `most_elongated` or `least` below 1.
    """

    smallest: float = 0.08
    largest: float = 0.7
    most_elongated: float = 3.0
    least: int = 8

    def __post_init__(self) -> None:
        _check_least(self.least)
        if not 0 < self.smallest <= self.largest <= 1:
            raise UsageError(
                "Sizes of crops must be fractions in order",
                where="smallest, largest",
                got=f"{self.smallest}, {self.largest}",
                expected="0 < smallest ≤ largest ≤ 1",
            )
        if not 1 <= self.most_elongated < math.inf:
            raise UsageError(
                "A ratio of sides is too small", where="most_elongated", got=self.most_elongated, expected="at least 1"
            )

    def is_large_enough(self, height: int, width: int) -> bool:
        """Whether crops can be cut out of an image of this size, in pixels."""
        return min(height, width) > 2 * self.least

    def __call__(self, height: int, width: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, "{count} 4"]:
        """Boxes of the crops, xyxy in pixels; arguments and errors as of `UniformCrops`."""
        _check_size(self, height, width)
        image = np.array([width, height])
        size = np.exp(_stratified(math.log(self.smallest), math.log(self.largest), count, rng))
        elongation = math.log(self.most_elongated)
        shape = np.exp(_stratified(-elongation, elongation, count, rng) / 2)
        sides = (size * math.sqrt(height * width))[:, None] * np.stack([shape, 1 / shape], 1)
        sides *= np.minimum(1, (image / sides).min(1, keepdims=True))
        pixels = np.clip(np.rint(sides).astype(np.int64), self.least, image)
        low = rng.integers(0, image - pixels, endpoint=True)
        return np.concatenate([low, low + pixels], 1)


Crops = UniformCrops | StratifiedCrops
"""The rules by which patches are cut."""


def _check_least(least: int) -> None:
    if least < 1:
        raise UsageError("The shortest side of a crop must be positive", where="least", got=least, expected="pixels")


def _check_size(crops: Crops, height: int, width: int) -> None:
    if not crops.is_large_enough(height, width):
        raise UsageError(
            "The image is too small to cut patches from",
            got=f"{width} × {height} pixels",
            expected=f"more than {2 * crops.least} pixels a side",
        )


def _stratified(low: float, high: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) numbers, one uniform in each of `count` equal parts of low … high, in random order."""
    return low + (rng.permutation(count) + rng.random(count)) * ((high - low) / max(1, count))


@dataclass(frozen=True, kw_only=True)
class PatchAugmentation:
    """What happens to a patch after it was cut: scaled to a square, then recoloured and blurred by chance.

    Colours change as in torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1): brightness, contrast and saturation are
    multiplied by 0.6 … 1.4 and the hue turns by up to a tenth of a circle, in random order. The blur is Gaussian with a
    sigma of 0.1 … 2 pixels. Source: UP-DETR, section 4.1, and the authors' code, which does not flip.

    Attributes:
        size: side of the patch, in pixels; the aspect ratio is not kept.
        jitter: probability of other colours.
        grayscale: probability of none.
        blur: probability of the blur.
        flip: probability of a mirror image, left to right.

    Raises:
        UsageError: a probability outside [0, 1], or a size below 1.
    """

    size: int = 128
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    flip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter", "grayscale", "blur", "flip"):
            _check_probability(name, getattr(self, name))
        if self.size < 1:
            raise UsageError("The side of a patch must be positive", where="size", got=self.size, expected="pixels")

    @staticmethod
    def none(size: int = 128) -> PatchAugmentation:
        """Nothing but the scaling."""
        return PatchAugmentation(size=size, jitter=0.0, grayscale=0.0, blur=0.0)

    def __call__(
        self, image: Image.Image, boxes: Int64[np.ndarray, "p 4"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "p {self.size} {self.size} 3"]:
        """The patches of an image, RGB.

        Args:
            image: RGB, what to cut from.
            boxes: where, xyxy in pixels, inside the image.
            rng: source of the random numbers.
        """
        patches = np.empty((len(boxes), self.size, self.size, 3), np.uint8)
        for row, box in enumerate(boxes.tolist()):
            # Cuts and scales in one pass, over the pixels of the box alone.
            patch = image.resize(
                (self.size, self.size), Image.Resampling.BILINEAR, box=tuple(box), reducing_gap=_REDUCING_GAP
            )
            patches[row] = np.asarray(self._augmented(patch, rng))
        return patches

    def _augmented(self, patch: Image.Image, rng: np.random.Generator) -> Image.Image:
        jitter, grayscale, blur, flip = rng.random(4) < (self.jitter, self.grayscale, self.blur, self.flip)
        if flip:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if jitter:
            patch = jitter_colours(patch, rng)
        if grayscale:
            patch = patch.convert("L").convert("RGB")
        if blur:
            patch = patch.filter(ImageFilter.GaussianBlur(rng.uniform(*_SIGMA)))
        return patch


def jitter_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue of an RGB image, in random order (see `PatchAugmentation`)."""
    brightness, contrast, saturation = (1 + rng.uniform(-x, x) for x in (_BRIGHTNESS, _CONTRAST, _SATURATION))
    hue = rng.uniform(-_HUE, _HUE)
    steps: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: Image.blend(Image.new("RGB", image.size), image, brightness),
        lambda image: Image.blend(Image.new("RGB", image.size, (_mean_grey(image),) * 3), image, contrast),
        lambda image: Image.blend(image.convert("L").convert("RGB"), image, saturation),
        lambda image: turn_hue(image, hue),
    )
    for step in rng.permutation(len(steps)):
        image = steps[step](image)
    return image


def _mean_grey(image: Image.Image) -> int:
    return round(float(np.asarray(image.convert("L")).mean()))


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """An RGB image whose hue is turned by a part of the circle, -1 … 1."""
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(round(turn * 256) % 256)  # 256 steps make the circle, so the overflow is meant
    return Image.frombytes("HSV", image.size, pixels.tobytes()).convert("RGB")


class PretrainingSizes(NamedTuple):
    """The sizes that `ImageResizing` needs, in pixels, under the names of its fields."""

    sizes: tuple[int, ...]
    longest: int


def pretraining_sizes(
    shortest: int = PAPER_SHORTEST, longest: int | None = None, multi_scale: bool = True
) -> PretrainingSizes:
    """The paper's sizes of pre-training, scaled to a model whose evaluation images have another shortest side.

    At 480: the short side is one of 320, 336 … 480 without 384, the long one at most 600. At another `shortest` all of
    these are multiplied by shortest / 480 and rounded.

    Args:
        shortest: short side of the images that the model is evaluated on, in pixels.
        longest: limit of the long side, in pixels; shortest · 600 / 480 where it is not given.
        multi_scale: whether the size varies; if not, the short side is always `shortest`.

    Raises:
        UsageError: a size below 1.
    """
    if shortest < 1 or (longest is not None and longest < 1):
        raise UsageError("Image sizes must be positive", got=f"shortest {shortest}, longest {longest}")
    sizes = {max(1, round(size * shortest / PAPER_SHORTEST)) for size in PAPER_SIZES} if multi_scale else {shortest}
    if longest is None:
        longest = max(1, round(PAPER_LONGEST * shortest / PAPER_SHORTEST))
    return PretrainingSizes(tuple(sorted(sizes)), longest)


@dataclass(frozen=True, kw_only=True)
class ImageResizing:
    """The random size and direction in which a model sees an unlabelled image in pre-training.

    Attributes:
        sizes: short sides to choose from, in pixels.
        longest: limit of the long side, in pixels.
        flip: probability of a mirror image, left to right; the paper has none.

    Raises:
        UsageError: no sizes, a size below 1, or a probability outside [0, 1].
    """

    sizes: tuple[int, ...]
    longest: int
    flip: float = 0.0

    def __post_init__(self) -> None:
        _check_probability("flip", self.flip)
        if not self.sizes or min(*self.sizes, self.longest) < 1:
            raise UsageError("Image sizes must be positive", got=f"sizes {self.sizes}, longest {self.longest}")

    def fixed(self) -> ImageResizing:
        """Nothing random: the largest of the sizes, not mirrored."""
        return ImageResizing(sizes=(max(self.sizes),), longest=self.longest)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """The image in its own size, mirrored by chance, and the same image resized by the rule of `resized_size`.

        Patches are cut from the first and looked for in the second: boxes as fractions hold for both.
        """
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        shortest = self.sizes[rng.integers(len(self.sizes))]
        height, width = resized_size(image.height, image.width, shortest, self.longest)
        return image, image.resize((width, height), Image.Resampling.BILINEAR)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError("A probability is out of range", where=name, got=value, expected="0 … 1")
