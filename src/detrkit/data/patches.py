"""Unlabelled images with query patches as training examples: a pure function of (seed, epoch, index).

Source: Dai et al., UP-DETR: Unsupervised Pre-training for Object Detection with Transformers, CVPR 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.data.crops import Crops, ImageResizing, PatchAugmentation
from detrkit.data.dataset import Key, first_usable, random_stream
from detrkit.data.images import MAX_PIXELS
from detrkit.data.loading import item_batches
from detrkit.data.order import EpochBatches
from detrkit.data.pictures import Pictures
from detrkit.data.problems import Problems
from detrkit.data.transforms import to_tensor
from detrkit.errors import DataError, UsageError
from detrkit.structures import Batch, PatchBatch

_PATCH_STREAM = 4  # streams 1 to 3 shuffle, augment, and drop out
_EVALUATION_STREAM = 5


class PatchItem(NamedTuple):
    """An image and patches of it.

    `image`: (3, h, w) float32, normalised. `patches`: (p, 3, s, s) float32, normalised. `boxes`: (p, 4) float32, where
    each was cut, cxcywh in [0, 1] of the image. `name`: the image's file. `replaced`: empty, or the name and reason of
    the pictures that this one stands in for.
    """

    image: Tensor
    patches: Tensor
    boxes: Tensor
    name: str
    replaced: str = ""


class LoadedPatches(NamedTuple):
    """A batch, and for each picture that was replaced in it, its name and what was wrong with it."""

    batch: PatchBatch
    replaced: tuple[str, ...]


class PatchDataset(Dataset[PatchItem]):
    """Images with patches that were cut from them in their own size, before the image was scaled.

    The random numbers of a training example depend on (seed, epoch, index) alone. A picture that cannot be read, or is
    too small to cut from, is replaced by another, which the example says; the same one for the same key. For evaluation
    nothing is random but where the patches are cut, which depends on (seed, index) alone: images have the largest
    size, patches are only scaled, and a picture that cannot be used is an error.

    Args:
        pictures: the images.
        crops: where patches are cut.
        augmentation: what happens to them.
        resizing: sizes and directions in which the model sees the images.
        count: patches an image, at least 1.
        seed: of the run, at least 0.
        evaluation: see above.
        max_pixels: larger images count as unreadable.

    Raises:
        UsageError: a negative seed, or no patches.
        DataError: no images.
    """

    def __init__(
        self,
        pictures: Pictures,
        crops: Crops,
        augmentation: PatchAugmentation,
        resizing: ImageResizing,
        count: int,
        seed: int,
        *,
        evaluation: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        for name, number, low in (("count", count, 1), ("seed", seed, 0)):
            if number < low:
                raise UsageError("This number is too small", where=name, got=number, expected=f"at least {low}")
        if len(pictures) == 0:
            raise DataError("There are no images to cut patches from", where=pictures.source)
        self.pictures, self.crops, self.count, self.seed = pictures, crops, count, seed
        self.evaluation, self.max_pixels = evaluation, max_pixels
        self.augmentation = PatchAugmentation.none(augmentation.size) if evaluation else augmentation
        self.resizing = resizing.fixed() if evaluation else resizing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> PatchItem:
        """The example of a key.

        Raises:
            DataError: the picture, for evaluation, or it and ten drawn in its place otherwise, cannot be used.
        """
        if self.evaluation:
            rng = random_stream(_EVALUATION_STREAM, self.seed, 0, key.index)
            return self._item(key.index, self._open(key.index), rng, "")
        rng = random_stream(_PATCH_STREAM, self.seed, key.epoch, key.index)
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

    def _item(self, index: int, image: Image.Image, rng: np.random.Generator, replaced: str) -> PatchItem:
        original, resized = self.resizing(image, rng)
        width, height = original.size
        boxes = self.crops(height, width, self.count, rng)
        patches = normalised(self.augmentation(original, boxes, rng))
        fractions = torch.from_numpy(boxes / (width, height, width, height))
        return PatchItem(
            to_tensor(resized), patches, xyxy_to_cxcywh(fractions).float(), self.pictures.name(index), replaced
        )

    def _open(self, index: int) -> Image.Image:
        image = self.pictures.open(index, max_pixels=self.max_pixels)
        if not self.crops.is_large_enough(image.height, image.width):
            raise DataError(
                "The image is too small to cut patches from",
                where=self.pictures.name(index),
                got=f"{image.width} × {image.height} pixels",
                expected=f"more than {2 * self.crops.least} pixels a side",
            )
        return image


def normalised(pixels: UInt8[np.ndarray, "p s s 3"]) -> Float32[Tensor, "p 3 s s"]:
    """RGB patches as the tensors that models take (`NORMALIZATION_MEAN`, `NORMALIZATION_STD`)."""
    return to_tensor(torch.from_numpy(pixels).permute(0, 3, 1, 2))


class _Packed(NamedTuple):
    """A batch on its way from a worker."""

    images: Tensor
    padding: Tensor
    patches: Tensor
    boxes: np.ndarray
    names: list[str]
    replaced: list[str]

    def unpacked(self) -> LoadedPatches:
        boxes = torch.from_numpy(self.boxes)
        return LoadedPatches(
            PatchBatch(self.images, self.padding, self.patches, boxes, tuple(self.names)), tuple(self.replaced)
        )


def _pack(items: list[PatchItem]) -> _Packed:
    images, padding, _ = Batch.from_images([item.image for item in items])
    return _Packed(
        images,
        padding,
        torch.stack([item.patches for item in items]),
        torch.stack([item.boxes for item in items]).numpy(),
        [item.name for item in items],
        [item.replaced for item in items if item.replaced],
    )


def patch_batches(
    dataset: PatchDataset,
    sampler: EpochBatches,
    *,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[LoadedPatches]:
    """The batches of a run of pre-training; arguments and errors as of `training_batches`."""
    return item_batches(dataset, sampler, _pack, workers=workers, pin_memory=pin_memory)


def evaluation_patches(
    dataset: PatchDataset,
    batch_size: int,
    *,
    workers: int,
    problems: Problems,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> Iterator[PatchBatch]:
    """All images once, in order, with their patches.

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
    chosen = range(len(dataset)) if indices is None else indices
    count, lost = len(chosen), 0

    def count_failure(index: int, error: DataError) -> None:
        nonlocal lost
        problems.add("unusable-image", str(error))
        lost += 1
        if lost == count and indices is None:
            raise DataError(
                "Not one of the images can be used",
                where=dataset.pictures.source,
                got=str(error),
                remedy="Check that the images are there, complete and not tiny.",
            )

    keys = [[Key(0, index) for index in chosen[first : first + batch_size]] for first in range(0, count, batch_size)]
    loaded = item_batches(
        dataset,
        keys,
        _pack,
        workers=workers,
        pin_memory=pin_memory,
        unreadable=count_failure,
    )
    return (patches.batch for patches in loaded)
