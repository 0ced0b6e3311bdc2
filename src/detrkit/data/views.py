"""Two views of each unlabelled image, to train a backbone that tells images apart: a function of (seed, epoch, index).

A view is a piece of the image, scaled to a square and changed as a camera, a stain or another day would change it. The
recipe follows the methods that compare views (Chen et al., SimCLR, ICML 2020, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detrkit.data.crops import PatchAugmentation
from detrkit.data.dataset import Key, first_usable, random_stream
from detrkit.data.images import MAX_PIXELS
from detrkit.data.loading import item_batches
from detrkit.data.order import EpochBatches
from detrkit.data.patches import normalised
from detrkit.data.pictures import Pictures
from detrkit.data.problems import Problems
from detrkit.data.transforms import REDUCTION
from detrkit.errors import DataError, UsageError

LEAST = 16
"""Images with a shorter side than this, in pixels, are too small to be seen in two views."""

_VIEW_STREAM = 6  # streams 1 to 5 shuffle, augment, drop out, and cut patches
_EVALUATION_STREAM = 7


@dataclass(frozen=True, kw_only=True)
class ViewAugmentation:
    """How a view is cut out of an image and changed.

    The piece has a share of the image's area that is uniform in `smallest` … `largest`, and a width / height that is
    log-uniform in 1 / `most_elongated` … `most_elongated`; what does not fit is scaled down until it does. Colours and
    blur are those of `PatchAugmentation`. Small networks learn little in few steps from pieces that hardly overlap or
    are blurred to nothing, so the defaults are milder than SimCLR's (shares from 0.08, blur 0.5).

    Attributes:
        size: side of the view, in pixels.
        smallest: lowest share of the image's area.
        largest: highest share of the image's area.
        most_elongated: longest side over shortest, in pixels.
        flip: probability of a mirror image, left to right.
        vertical_flip: probability of turning the view upside down; for pictures without an up.
        quarter_turn: probability of a rotation by 90°, 180° or 270°; for the same.
        jitter: probability of other colours.
        grayscale: probability of none.
        blur: probability of the blur.

    Raises:
        UsageError: a probability outside [0, 1], a size below 1, not 0 < `smallest` ≤ `largest` ≤ 1, or
            `most_elongated` below 1.
    """

    size: int
    smallest: float = 0.35
    largest: float = 1.0
    most_elongated: float = 4 / 3
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turn: float = 0.0
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.2

    def __post_init__(self) -> None:
        for name in ("vertical_flip", "quarter_turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError("A probability is out of range", where=name, got=getattr(self, name), expected="0 … 1")
        if not 0 < self.smallest <= self.largest <= 1:
            raise UsageError(
                "The shares of the image that a view shows must be fractions in order",
                where="smallest, largest",
                got=f"{self.smallest}, {self.largest}",
                expected="0 < smallest ≤ largest ≤ 1",
            )
        if not 1 <= self.most_elongated < math.inf:
            raise UsageError(
                "A ratio of sides is too small", where="most_elongated", got=self.most_elongated, expected="at least 1"
            )
        self._squares()  # it checks the other settings

    def __call__(
        self, image: Image.Image, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "2 {self.size} {self.size} 3"]:
        """Two views of an RGB image, drawn alike and independently.

        Args:
            image: RGB, at least `LEAST` pixels a side.
            rng: source of the random numbers.
        """
        views = self._squares()(image, self._regions(image.height, image.width, rng), rng)
        for view in views:
            if rng.random() < self.vertical_flip:
                view[:] = view[::-1].copy()
            if rng.random() < self.quarter_turn:
                view[:] = np.rot90(view, int(rng.integers(1, 4))).copy()
        return views

    @property
    def coarse(self) -> int:
        """The short side of an image, in pixels, beyond which it may be decoded at a smaller scale."""
        return math.ceil(REDUCTION * self.size * math.sqrt(self.most_elongated / self.smallest))

    def _squares(self) -> PatchAugmentation:
        return PatchAugmentation(
            size=self.size, jitter=self.jitter, grayscale=self.grayscale, blur=self.blur, flip=self.flip
        )

    def _regions(self, height: int, width: int, rng: np.random.Generator) -> Int64[np.ndarray, "2 4"]:
        """Where the views are cut, xyxy in pixels."""
        image = np.array([width, height])
        side = np.sqrt(rng.uniform(self.smallest, self.largest, 2) * height * width)
        elongation = math.log(self.most_elongated)
        shape = np.exp(rng.uniform(-elongation, elongation, 2) / 2)
        sides = side[:, None] * np.stack([shape, 1 / shape], 1)
        sides *= np.minimum(1, (image / sides).min(1, keepdims=True))
        pixels = np.clip(np.rint(sides).astype(np.int64), 1, image)
        low = rng.integers(0, image - pixels, endpoint=True)
        return np.concatenate([low, low + pixels], 1)


class ViewItem(NamedTuple):
    """Two views of one image.

    `first` and `second`: (3, s, s) float32, normalised. `name`: the image's file. `replaced`: empty, or the name and
    reason of the pictures that this one stands in for.
    """

    first: Tensor
    second: Tensor
    name: str
    replaced: str = ""


class ViewBatch(NamedTuple):
    """Two views of each image of a batch: `images` are the first, `second` the others; `names` are the files."""

    images: Float32[Tensor, "b 3 s s"]
    second: Float32[Tensor, "b 3 s s"]
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> ViewBatch:
        """The same batch on another device."""
        return ViewBatch(
            self.images.to(device, non_blocking=True), self.second.to(device, non_blocking=True), self.names
        )


class LoadedViews(NamedTuple):
    """A batch, and for each picture that was replaced in it, its name and what was wrong with it."""

    batch: ViewBatch
    replaced: tuple[str, ...]


class ViewDataset(Dataset[ViewItem]):
    """Images in two views each.

    The random numbers of a training example depend on (seed, epoch, index) alone. A picture that cannot be read, or has
    a side below `LEAST`, is replaced by another, which the example says; the same one for the same key. For evaluation
    the views are drawn in the same way, but depend on (seed, index) alone, and a picture that cannot be used is an
    error.

    Args:
        pictures: the images.
        augmentation: how views are made.
        seed: of the run, at least 0.
        evaluation: see above.
        max_pixels: larger images count as unreadable.

    Raises:
        UsageError: a negative seed.
        DataError: no images.
    """

    def __init__(
        self,
        pictures: Pictures,
        augmentation: ViewAugmentation,
        seed: int,
        *,
        evaluation: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        if seed < 0:
            raise UsageError("The seed must not be negative", where="seed", got=seed)
        if len(pictures) == 0:
            raise DataError("There are no images to look at", where=pictures.source)
        self.pictures, self.augmentation, self.seed = pictures, augmentation, seed
        self.evaluation, self.max_pixels = evaluation, max_pixels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> ViewItem:
        """The example of a key.

        Raises:
            DataError: the picture, for evaluation, or it and ten drawn in its place otherwise, cannot be used.
        """
        if self.evaluation:
            rng = random_stream(_EVALUATION_STREAM, self.seed, 0, key.index)
            return self._item(key.index, self._open(key.index), rng, "")
        rng = random_stream(_VIEW_STREAM, self.seed, key.epoch, key.index)
        index, image, failures = first_usable(
            self._open,
            key.index,
            len(self),
            rng,
            where=self.pictures.source,
            verb="used",
            remedy="Check that the images are there, complete and not tiny.",
        )
        return self._item(index, image, rng, " | ".join(failures))

    def _item(self, index: int, image: Image.Image, rng: np.random.Generator, replaced: str) -> ViewItem:
        first, second = normalised(self.augmentation(image, rng))
        return ViewItem(first, second, self.pictures.name(index), replaced)

    def _open(self, index: int) -> Image.Image:
        image = self.pictures.open(index, max_pixels=self.max_pixels, coarse=self.augmentation.coarse)
        if min(image.size) < LEAST:
            raise DataError(
                "The image is too small to be seen in two views",
                where=self.pictures.name(index),
                got=f"{image.width} × {image.height} pixels",
                expected=f"at least {LEAST} pixels a side",
            )
        return image


class _Packed(NamedTuple):
    """A batch on its way from a worker."""

    first: Tensor
    second: Tensor
    names: list[str]
    replaced: list[str]

    def unpacked(self) -> LoadedViews:
        return LoadedViews(ViewBatch(self.first, self.second, tuple(self.names)), tuple(self.replaced))


def _pack(items: list[ViewItem]) -> _Packed:
    return _Packed(
        torch.stack([item.first for item in items]),
        torch.stack([item.second for item in items]),
        [item.name for item in items],
        [item.replaced for item in items if item.replaced],
    )


def view_batches(
    dataset: ViewDataset, sampler: EpochBatches, *, workers: int, pin_memory: bool = False
) -> Iterator[LoadedViews]:
    """The batches of a run that trains a backbone; arguments and errors as of `training_batches`."""
    return item_batches(dataset, sampler, _pack, workers=workers, pin_memory=pin_memory)


def evaluation_views(
    dataset: ViewDataset,
    batch_size: int,
    *,
    workers: int,
    problems: Problems,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> Iterator[ViewBatch]:
    """All images once, in order, in two views each.

    Args:
        dataset: the examples, made for evaluation.
        batch_size: images a batch; fewer where some cannot be used, and in the last.
        workers: number of processes that load; 0: this one does. The batches are the same, bit for bit.
        problems: pictures that cannot be used are left out and counted here.
        indices: only these images; what they look like does not depend on which others there are. None of them need be
            usable.
        pin_memory: put tensors into page-locked memory; only where the batches go to a CUDA device.

    Raises:
        UsageError: a data set for training, a batch size below 1, a negative number of workers, or a worker that died.
        DataError: not one picture can be used.
    """
    if not dataset.evaluation:
        raise UsageError("Images are evaluated with a data set that was made for evaluation", remedy="evaluation=True")
    if batch_size < 1:
        raise UsageError("This number is too small", where="batch_size", got=batch_size, expected="at least 1")
    keys = [Key(0, index) for index in (range(len(dataset)) if indices is None else indices)]
    loaded = item_batches(
        dataset,
        [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)],
        _pack,
        workers=workers,
        pin_memory=pin_memory,
        unreadable=lambda index, error: problems.add("unusable-image", str(error)),
    )
    if indices is None:
        return _at_least_one(loaded, dataset.pictures.source, problems)
    return (views.batch for views in loaded)


def _at_least_one(loaded: Iterator[LoadedViews], source: str, problems: Problems) -> Iterator[ViewBatch]:
    count = 0
    for views in loaded:
        yield views.batch
        count += 1
    if count == 0:
        raise DataError(
            "Not one of the images can be used",
            where=source,
            got=problems.examples["unusable-image"][-1],
            remedy="Check that the images are there, complete and not tiny.",
        )
