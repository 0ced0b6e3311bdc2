"""Annotated images as training examples: a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.data.annotations import Annotations
from detrkit.data.files import annotated_frame
from detrkit.data.images import MAX_PIXELS, open_pixels
from detrkit.data.transforms import Evaluation, Sample, Training, View, sample_masks
from detrkit.errors import DataError, UsageError
from detrkit.structures import Target

MOST_FAILURES = 10
"""So many unreadable images in a row are replaced; one more is an error: the folder is gone, not a file."""

_IMAGE_STREAM = 2  # `loading` shuffles with stream 1


Opened = TypeVar("Opened")


class Key(NamedTuple):
    """Which training example: the epoch it belongs to, and the image's index in the annotations."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a key


class TrainingItem(NamedTuple):
    """One training example.

    `image`: (3, h, w) uint8, RGB (`packing.PackedImages` makes a batch of them). `target`: its labels and boxes.
    `replaced`: empty, or the path and reason of the unreadable image that this one stands in for.
    """

    image: Tensor
    target: Target
    replaced: str = ""


def random_stream(*numbers: int) -> np.random.Generator:
    """An independent random generator for each tuple of non-negative numbers of one length."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def first_usable(
    opened: Callable[[int], Opened],
    index: int,
    count: int,
    rng: np.random.Generator,
    *,
    where: str | Path,
    verb: str,
    remedy: str,
) -> tuple[int, Opened, list[str]]:
    """An image or, where it cannot be used, another that is drawn in its place.

    Args:
        opened: gives an image by its number, or raises a `DataError`.
        index: the number that is wanted.
        count: number of images.
        rng: draws the others.
        where: the images' folder, for the message.
        verb: what cannot be done with them, for the message.
        remedy: for the message.

    Returns:
        The number and the image, and what was wrong with those before it.

    Raises:
        DataError: `MOST_FAILURES` + 1 images in a row cannot be used.
    """
    failures: list[str] = []
    while True:
        try:
            return index, opened(index), failures
        except DataError as error:
            failures.append(str(error))
            if len(failures) > MOST_FAILURES:
                what = f"{len(failures)} images in a row cannot be {verb}"
                raise DataError(what, where=where, got=failures[-1], remedy=remedy) from error
            index = int(rng.integers(count))


def boxes_in_file(
    boxes: np.ndarray, annotated: tuple[int, int], actual: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bring boxes into the frame of the image file where its size is not the annotated one: the file is believed.

    They are scaled, or stay where they are, as `annotated_frame` says. In both cases they are cut at the border of the
    file's image; what lay beyond the annotated size is there still where reading has looked into the file.

    Args:
        boxes: (t, 4) float64, xyxy in pixels of the annotated image.
        annotated: height and width that the annotation states; (0, 0) where it states none.
        actual: height and width of the upright image in the file.

    Returns:
        The boxes (t, 4) in pixels of the file's image, and (t,) bool: True where something of the box remains.
    """
    frame = annotated_frame(annotated, actual)
    if frame != actual:
        y_factor, x_factor = actual[0] / frame[0], actual[1] / frame[1]
        boxes = boxes * (x_factor, y_factor, x_factor, y_factor)
    height, width = actual
    cut = np.clip(boxes, 0, (width, height, width, height))
    return cut, np.all(cut[:, 2:] > cut[:, :2], 1)


def masks_in_file(masks: Bool[np.ndarray, "t h w"], actual: tuple[int, int]) -> Bool[np.ndarray, "t _ _"]:
    """Bring masks into the frame of the image file, as `boxes_in_file` does with boxes: scaled, or cut and filled up.

    Args:
        masks: in pixels of the annotated image.
        actual: height and width of the upright image in the file.
    """
    _, height, width = masks.shape
    if (height, width) == actual or not len(masks):
        return masks if len(masks) else np.zeros((0, *actual), bool)
    if annotated_frame((height, width), actual) != actual:
        return sample_masks(masks, actual)
    filled = np.zeros((len(masks), *actual), bool)
    part = masks[:, : actual[0], : actual[1]]
    filled[:, : part.shape[1], : part.shape[2]] = part
    return filled


class DetectionDataset(Dataset[TrainingItem]):
    """Training examples from annotations, augmented.

    The random numbers of an example depend on (seed, epoch, index) alone, so the number of workers, the batch it falls
    into, and an interruption of the run change nothing. Crowd boxes are no targets; difficult ones are. Where the
    annotations have masks, so have the targets. An image
    that cannot be read is replaced by another, which the example says; the same one for the same key.

    Args:
        annotations: what to train on.
        transform: `Training`, `Evaluation`, or any function of a `Sample` and a generator.
        seed: of the run, at least 0.
        max_pixels: larger images count as unreadable.

    Raises:
        UsageError: a negative seed.
        DataError: no images.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Callable[[Sample, np.random.Generator], Sample] | Evaluation,
        seed: int,
        *,
        max_pixels: int = MAX_PIXELS,
    ):
        if seed < 0:
            raise UsageError("The seed must not be negative", where="seed", got=seed)
        if len(annotations) == 0:
            raise DataError("There are no images to train on", where=annotations.source or annotations.root)
        self.annotations, self.transform, self.seed, self.max_pixels = annotations, transform, seed, max_pixels

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> TrainingItem:
        """The example of a key.

        Raises:
            DataError: the image and ten drawn in its place are all unreadable.
        """
        rng = random_stream(_IMAGE_STREAM, self.seed, key.epoch, key.index)
        index, (pixels, (frame, view)), failures = first_usable(
            lambda number: self._open(number, rng),
            key.index,
            len(self),
            rng,
            where=self.annotations.root,
            verb="read",
            remedy="Check that the images are there and complete.",
        )
        sample = self._sample(index, torch.from_numpy(pixels).permute(2, 0, 1), frame)
        if view is not None:
            sample = view.show(sample, rng)
        elif isinstance(self.transform, Evaluation):
            sample = self.transform.resized(sample)
        else:
            sample = self.transform(sample, rng)
        height, width = sample.image.shape[1:]
        boxes = torch.from_numpy(sample.boxes / (width, height, width, height))
        masks = None if sample.masks is None else torch.from_numpy(np.ascontiguousarray(sample.masks))
        name = str(self.annotations.path(index))
        target = Target(torch.from_numpy(sample.labels), xyxy_to_cxcywh(boxes).float(), name, masks)
        return TrainingItem(sample.image, target, " | ".join(failures))

    def size(self, key: Key) -> tuple[int, int]:
        """Height and width that the example of a key is going to have, without a look at its image.

        That is for those who make up batches. Where the annotations state another size than the file has, or none
        ((1, 1) then), only they are told something wrong.
        """
        height, width = (int(side) for side in self.annotations.image_sizes[key.index])
        if not height or not width:
            return 1, 1
        if isinstance(self.transform, Training):
            rng = random_stream(_IMAGE_STREAM, self.seed, key.epoch, key.index)
            return self.transform.draw(height, width, rng).size
        if isinstance(self.transform, Evaluation):
            return self.transform.size(height, width)
        return height, width

    def _open(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[tuple[int, int], View | None]]:
        """An image, maybe at a smaller scale; its height and width in the file; and how it is to be shown."""

        def plan(height: int, width: int) -> tuple[int, tuple[tuple[int, int], View | None]]:
            view = self.transform.draw(height, width, rng) if isinstance(self.transform, Training) else None
            spare = 1 if view is None or self.annotations.masks is not None else view.spare(height, width)
            return spare, ((height, width), view)

        return open_pixels(self.annotations.path(index), plan, max_pixels=self.max_pixels)

    def _sample(self, index: int, image: UInt8[Tensor, "3 h w"], frame: tuple[int, int]) -> Sample:
        """An image with its annotations; `frame` is height and width in the file, whole multiples of the image's."""
        rows = self.annotations.rows(index)
        height, width = (int(side) for side in self.annotations.image_sizes[index])
        boxes, kept = boxes_in_file(self.annotations.boxes[rows], (height, width), frame)
        kept &= ~self.annotations.crowd[rows]
        masks = None
        if self.annotations.masks is not None:
            encoded = self.annotations.masks.encoded(rows)[kept]
            masks = masks_in_file(encoded.decode(), frame)
        return Sample(image, boxes[kept] * (image.shape[1] / frame[0]), self.annotations.labels[rows][kept], masks)
