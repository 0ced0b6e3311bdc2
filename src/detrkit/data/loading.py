"""Images and batches, loaded by this process or by workers, with the same result."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detrkit.data.dataset import DetectionDataset, Key, TrainingItem
from detrkit.data.images import MAX_PIXELS, PICTURE, check_picture, open_image, open_pixels
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedBatch, PackedImages, PackedMasks
from detrkit.data.transforms import Evaluation, scale, to_tensor
from detrkit.errors import DataError, UsageError
from detrkit.structures import Target

Item = TypeVar("Item")
Loaded = TypeVar("Loaded", covariant=True)

PATIENCE = 600.0
"""Seconds that a worker may take for a batch before it is given up."""

_DEATH = ("exited unexpectedly", "killed by signal", "timed out after")


class LoadedBatch(NamedTuple):
    """A batch, and for each unreadable image that was replaced in it, its path and what was wrong with it."""

    batch: PackedBatch
    replaced: tuple[str, ...]


class LoadedImage(NamedTuple):
    """An image of the size in which a model sees it.

    `index`: its place among the sources. `pixels`: (3, h, w), RGB bytes. `original`: height and width of the upright
    original in pixels. `name`: its path, or what it is called in messages.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    pixels: Tensor
    original: tuple[int, int]
    name: str

    @property
    def tensor(self) -> Float32[Tensor, "3 h w"]:
        """The image, normalised."""
        return to_tensor(self.pixels)


class _Failure(NamedTuple):
    """A `DataError` as a value: raised in a worker, it would arrive wrapped in that worker's traceback."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    what: str
    where: str
    got: str
    expected: str
    remedy: str

    @staticmethod
    def of(error: DataError, index: int = 0) -> _Failure:
        return _Failure(index, error.what, error.where, error.got, error.expected, error.remedy)

    def error(self) -> DataError:
        return DataError(self.what, where=self.where, got=self.got, expected=self.expected, remedy=self.remedy)


class _Packed(NamedTuple):
    """A batch on its way from a worker: only the images travel through shared memory, one file descriptor each."""

    images: PackedImages
    labels: list[np.ndarray]
    boxes: list[np.ndarray]
    names: list[str]
    masks: list[PackedMasks | None]
    replaced: tuple[str, ...]

    def unpacked(self) -> LoadedBatch:
        targets = tuple(
            Target(torch.from_numpy(labels), torch.from_numpy(boxes), name, None if masks is None else masks.unpacked())
            for labels, boxes, name, masks in zip(self.labels, self.boxes, self.names, self.masks, strict=True)
        )
        return LoadedBatch(PackedBatch(self.images, targets), tuple(self.replaced))


class Packed(Protocol[Loaded]):
    """A batch in the form in which it travels from a worker, few tensors and otherwise arrays."""

    def unpacked(self) -> Loaded:
        """The batch as it is used."""
        ...


def _pack(items: list[TrainingItem]) -> _Packed:
    return _Packed(
        PackedImages.of([item.image for item in items]),
        [item.target.labels.numpy() for item in items],
        [item.target.boxes.numpy() for item in items],
        [item.target.name for item in items],
        [PackedMasks.of(item.target.masks) for item in items],
        tuple(item.replaced for item in items if item.replaced),
    )


class _Collated(NamedTuple):
    """What a worker hands over: the packed batch, None where no example is left, and the examples that failed."""

    packed: Any
    failures: list[_Failure]


class _Collate:
    """Parts failures from examples and packs the examples."""

    def __init__(self, pack: Callable[[list[Any]], Any]):
        self.pack = pack

    def __call__(self, items: list[Any]) -> _Collated:
        good = [item for item in items if not isinstance(item, _Failure)]
        return _Collated(self.pack(good) if good else None, [item for item in items if isinstance(item, _Failure)])


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return _Failure.of(error, key.index)


class _Images(Dataset["LoadedImage | _Failure"]):
    def __init__(self, sources: Sequence[str | Path | Image.Image | np.ndarray], resizing: Evaluation, max_pixels: int):
        self.sources, self.resizing, self.max_pixels = sources, resizing, max_pixels

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> LoadedImage | _Failure:
        source = self.sources[index]
        name = str(source) if isinstance(source, (str, Path)) else f"image {index}"
        check_picture(source, name)
        try:
            if isinstance(source, (str, Path)):
                decoded, original = open_pixels(source, self._plan, max_pixels=self.max_pixels)
                pixels = scale(torch.from_numpy(decoded).permute(2, 0, 1), *self.resizing.size(*original))
            else:
                image = open_image(source, name=name, max_pixels=self.max_pixels)
                pixels, original = self.resizing(image), (image.height, image.width)
        except DataError as error:
            return _Failure.of(error, index)
        return LoadedImage(index, pixels, original, name)

    def _plan(self, height: int, width: int) -> tuple[int, tuple[int, int]]:
        return self.resizing.spare(height, width), (height, width)


def training_batches(
    dataset: DetectionDataset, sampler: EpochBatches, *, workers: int, pin_memory: bool = False
) -> Iterator[LoadedBatch]:
    """The batches of a run, from one set of workers that lives as long as the iterator.

    Args:
        dataset: the examples.
        sampler: which examples make up which batch.
        workers: number of processes that load; 0: this one does. The batches are the same, bit for bit.
        pin_memory: put the images into page-locked memory; only where the batches go to a CUDA device.

    Raises:
        DataError: too many images in a row cannot be read.
        UsageError: a worker died or gave no answer; or a negative number of workers.
    """
    return item_batches(dataset, sampler, _pack, workers=workers, pin_memory=pin_memory)


def item_batches(
    dataset: Dataset[Item],
    sampler: Iterable[list[Key]],
    pack: Callable[[list[Item]], Packed[Loaded]],
    *,
    workers: int,
    pin_memory: bool = False,
    unreadable: Callable[[int, DataError], None] | None = None,
) -> Iterator[Loaded]:
    """Batches of whatever a data set makes, from one set of workers that lives as long as the iterator.

    Args:
        dataset: makes an example of a `Key`, and raises a `DataError` where it cannot.
        sampler: which examples make up which batch.
        pack: makes a batch of its examples, in the worker.
        workers: number of processes that load; 0: this one does. The batches are the same, bit for bit.
        pin_memory: put tensors into page-locked memory; only where the batches go to a CUDA device.
        unreadable: called with the index and the error of an example that could not be made, which is then left out of
            its batch; a batch without examples is left out, too. Without it, such an example is an error.

    Raises:
        DataError: an example cannot be made.
        UsageError: a worker died or gave no answer; or a negative number of workers.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_sampler=sampler,
        collate_fn=_Collate(pack),
        pin_memory=pin_memory,
        timeout=PATIENCE if workers > 0 else 0,
        **_worker_settings(workers),
    )
    for collated in _survived(iter(loader)):
        for failure in collated.failures:
            if unreadable is None:
                raise failure.error()
            unreadable(failure.index, failure.error())
        if collated.packed is not None:
            yield collated.packed.unpacked()


def check_pictures(sources: Sequence[Any]) -> None:
    """Refuse a list in which something is no picture, before the first of them is opened.

    Raises:
        UsageError: names its place in the list.
    """
    for index, source in enumerate(sources):
        check_picture(source, f"image {index}")


def pictures_of(images: Any) -> tuple[Sequence[Any], bool]:
    """The pictures as a list, and whether it was a single one.

    Raises:
        UsageError: neither a picture nor a list of them.
    """
    if isinstance(images, str | Path | Image.Image | np.ndarray):
        return [images], True
    if not isinstance(images, Sequence) or isinstance(images, bytes):
        raise UsageError(
            "This is no picture and no list of pictures", got=type(images).__name__, expected=f"{PICTURE}, or a list"
        )
    if isinstance(images, list | tuple):  # others may open a picture each time that it is asked for
        check_pictures(images)
    return images, False


def load_images(
    sources: Sequence[str | Path | Image.Image | np.ndarray],
    *,
    shortest: int,
    longest: int,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    unreadable: Callable[[int, DataError], None] | None = None,
) -> Iterator[LoadedImage]:
    """Open and resize images, in order; files are decoded no larger than is needed for that.

    Args:
        sources: whatever `open_image` takes.
        shortest: wanted short side, in pixels.
        longest: limit of the long side, in pixels.
        workers: number of processes that load; 0: this one does.
        max_pixels: larger images are refused.
        unreadable: called with the index and the error of an image that cannot be read, which is then left out. Without
            it, such an image is an error.

    Raises:
        DataError: an image cannot be read; it names the file.
        UsageError: sizes below 1, a negative number of workers, or a worker that died.
    """
    images = _Images(sources, Evaluation(shortest=shortest, longest=longest), max_pixels)
    workers = min(workers, len(sources))
    loader: DataLoader[Any] = DataLoader(images, batch_size=None, collate_fn=_unchanged, **_worker_settings(workers))
    for loaded in _survived(iter(loader)):
        if not isinstance(loaded, _Failure):
            yield loaded
        elif unreadable is None:
            raise loaded.error()
        else:
            unreadable(loaded.index, loaded.error())


def _worker_settings(workers: int) -> dict[str, Any]:
    if workers < 0:
        raise UsageError("The number of workers must not be negative", where="workers", got=workers)
    # The loader draws a seed that nothing here uses; with a generator of its own it leaves torch's global one alone.
    settings: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator()}
    if workers > 0:
        # Forked workers share the annotation arrays. PyTorch itself limits each worker to one thread.
        settings["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
        settings["worker_init_fn"] = _leave_signals_to_the_parent
    return settings


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C goes to every process of a terminal, and SIGTERM often to all of a job; the parent alone answers them.

    It ends its workers when it is done. Should one not listen, a second SIGTERM ends it.
    """

    def pass_over(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_over)


def _unchanged(item: Any) -> Any:
    return item


def _survived(iterator: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: it died while it sent a batch
            if (death := death_of_worker(error)) is None:
                raise
            raise death from error
        yield item


def death_of_worker(error: Exception) -> UsageError | None:
    """What to say where a worker died; None where the error is another one.

    PyTorch raises it wherever the main process happens to be when the worker's death is noticed.
    """
    broke_off = isinstance(error, ConnectionError | EOFError)
    if not broke_off and not any(sign in str(error) for sign in _DEATH):
        return None
    return UsageError(
        "A process that loads images died or gave no answer",
        got="it exited unexpectedly" if broke_off else str(error).splitlines()[0],
        remedy="Often memory has run out: use fewer workers, or more shared memory (docker run --shm-size).",
    )
