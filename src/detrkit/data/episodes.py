"""Episodes of one-shot detection: in each image of a batch things are looked for that other images of it show.

The exemplar of a class comes from another image (CoAE, Hsieh et al., NeurIPS 2019); all its instances in the searched
image are targets, and an image without it is a negative. Since exemplars come from images that are searched themselves,
they cost nothing. To each image of a batch another is drawn that shares a class with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from detrkit.data.dataset import DetectionDataset, Key, TrainingItem, random_stream
from detrkit.data.loading import item_batches
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedImages
from detrkit.errors import DataError, UsageError
from detrkit.structures import EpisodeBatch, Target

_MATE_STREAM = 11  # streams 1 to 10 shuffle, augment, drop out, cut patches, make views, and draw places and exemplars
_EPISODE_STREAM = 12

NOTHING = -1
"""The class of what is nowhere."""

SMALLEST = 8.0
"""Boxes with a side of fewer pixels, as the model sees them, are no exemplars."""


class PairItem(NamedTuple):
    """An image and another with a class in common; `key` says from what the batch's randomness comes."""

    image: TrainingItem
    mate: TrainingItem
    key: Key


class PairDataset(Dataset[PairItem]):
    """Images, each with a mate that shares a class: a pure function of (seed, epoch, index).

    Args:
        images: annotated images.
        labels: the classes that may be shared.

    Raises:
        DataError: no class is in two images.
    """

    def __init__(self, images: DetectionDataset, labels: Collection[int]):
        self.images, self.seed = images, images.seed
        annotations = images.annotations
        owner = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
        usable = ~annotations.crowd & np.isin(annotations.labels, list(labels))
        holders = {label: np.unique(owner[usable & (annotations.labels == label)]) for label in labels}
        self.holders = {label: images for label, images in holders.items() if len(images) > 1}
        self.classes: list[list[int]] = [[] for _ in range(len(annotations))]
        for label, those in self.holders.items():
            for index in those:
                self.classes[index].append(label)
        self.crowds: dict[str, frozenset[int]] = {}
        for index in np.unique(owner[annotations.crowd]).tolist():
            rows = annotations.rows(index)
            crowded = annotations.labels[rows][annotations.crowd[rows]].tolist()
            self.crowds[str(annotations.path(index))] = frozenset(crowded)
        if not self.holders:
            raise DataError(
                "No class is in two images, so nothing can be shown in one and found in another",
                where=annotations.source or annotations.root,
                got=f"{len(annotations)} images, {len(labels)} classes to train on",
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> PairItem:
        """The pair of a key.

        Raises:
            DataError: too many images in a row are unreadable.
        """
        rng = random_stream(_MATE_STREAM, self.seed, key.epoch, key.index)
        mate = int(rng.integers(len(self)))  # of an image without such a class any other is a negative
        if classes := self.classes[key.index]:
            others = self.holders[classes[int(rng.integers(len(classes)))]]
            mate = int(rng.choice(others[others != key.index]))
        return PairItem(self.images[key], self.images[Key(key.epoch, mate)], key)


class PackedEpisodes(NamedTuple):
    """An `EpisodeBatch` on its way to a device.

    Attributes:
        packed: its images; all else is as there.
    """

    packed: PackedImages
    asked: Int64[Tensor, " e"]
    source: Int64[Tensor, " e"]
    exemplars: Float[Tensor, "e 4"]
    targets: tuple[Target, ...]
    names: tuple[str, ...]

    @property
    def images(self) -> UInt8[Tensor, "b 3 h w"]:
        """The bytes of the images."""
        return self.packed.pixels

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The batch, normalised, on a device."""
        return EpisodeBatch(
            *self.packed.normalised(device),
            self.asked.to(device, non_blocking=True),
            self.source.to(device, non_blocking=True),
            self.exemplars.to(device, non_blocking=True),
            tuple(target.to(device) for target in self.targets),
            self.names,
        )


class LoadedEpisodes(NamedTuple):
    """A batch, and for each unreadable image that was replaced in it, its path and what was wrong with it."""

    batch: PackedEpisodes
    replaced: tuple[str, ...]


class _Packed(NamedTuple):
    """A batch on its way from a worker: only images travel through shared memory."""

    images: PackedImages
    labels: list[np.ndarray]
    boxes: list[np.ndarray]
    names: list[str]
    episodes: np.ndarray
    exemplars: np.ndarray
    replaced: tuple[str, ...]

    def unpacked(self) -> LoadedEpisodes:
        episodes = torch.from_numpy(self.episodes)
        targets = []
        for image, label in self.episodes[:, :2].tolist():
            boxes = torch.from_numpy(self.boxes[image][self.labels[image] == label])
            targets.append(Target(torch.zeros(len(boxes), dtype=torch.int64), boxes, self.names[image]))
        batch = PackedEpisodes(
            self.images,
            episodes[:, 0],
            episodes[:, 2],
            torch.from_numpy(self.exemplars),
            tuple(targets),
            tuple(self.names),
        )
        return LoadedEpisodes(batch, self.replaced)


class _Pack:
    """Collates pairs: turns them all alike, and draws what is asked; an object, so that it can travel to a worker."""

    def __init__(
        self,
        labels: Collection[int],
        questions: int,
        turned: float,
        seed: int,
        crowds: Mapping[str, frozenset[int]],
    ):
        self.labels, self.questions, self.turned, self.seed = sorted(labels), questions, turned, seed
        self.crowds = crowds

    def __call__(self, pairs: list[PairItem]) -> _Packed:
        rng = random_stream(_EPISODE_STREAM, self.seed, pairs[0].key.epoch, pairs[0].key.index)
        items = [item for pair in pairs for item in (pair.image, pair.mate)]
        if rng.random() < self.turned:
            quarters, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            items = [turned(item, quarters, mirrored) for item in items]
        episodes, exemplars = draw_episodes(items, self.labels, self.questions, rng, self.crowds)
        return _Packed(
            PackedImages.of([item.image for item in items]),
            [item.target.labels.numpy() for item in items],
            [item.target.boxes.numpy() for item in items],
            [item.target.name for item in items],
            episodes,
            exemplars,
            tuple(item.replaced for item in items if item.replaced),
        )


def draw_episodes(
    items: Sequence[TrainingItem],
    labels: Sequence[int],
    questions: int,
    rng: np.random.Generator,
    crowds: Mapping[str, frozenset[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What is looked for in the images of a batch.

    Of each image up to `questions` classes are asked: those that it holds, one place or more being kept for some that
    it does not, where the other images show any such. A class that only the image itself holds cannot be asked.

    Where no image can be asked anything, the first is asked for the whole of the last, which is not in it: every step
    has something to learn, and all processes take it.

    Args:
        items: the images.
        labels: classes that may be asked.
        questions: at least 1.
        rng: draws.
        crowds: for images by name the classes of which they hold a crowd; of these they are not asked, since not all of
            their instances are known.

    Returns:
        (e, 3) int64 of image, class, and the image that the exemplar is in; (e, 4) float32 of the exemplars' boxes,
        cxcywh in [0, 1].
    """
    shown = [_exemplars(item, labels) for item in items]
    episodes, exemplars = [], []
    for image, item in enumerate(items):
        others = [other for other, one in enumerate(items) if one.target.name != item.target.name]
        own, offered = set(item.target.labels.tolist()), {label for other in others for label in shown[other]}
        offered -= (crowds or {}).get(item.target.name, frozenset())
        present, absent = (
            rng.permutation([label for label in labels if label in offered and (label in own) == wanted]).tolist()
            for wanted in (True, False)
        )
        least = max(1, questions - 1)
        for label in [*present[:least], *absent, *present[least:]][:questions]:
            source = int(rng.choice([other for other in others if label in shown[other]]))
            row = int(rng.choice(shown[source][int(label)]))
            episodes.append((image, int(label), source))
            exemplars.append(items[source].target.boxes[row].numpy())
    if not episodes:
        episodes.append((0, NOTHING, len(items) - 1))
        exemplars.append(np.array([0.5, 0.5, 1.0, 1.0], np.float32))
    return np.array(episodes, np.int64), np.array(exemplars, np.float32)


def _exemplars(item: TrainingItem, labels: Sequence[int]) -> dict[int, list[int]]:
    """The boxes of an image that can be shown, by class."""
    height, width = item.image.shape[1:]
    large = ((item.target.boxes[:, 2:] * torch.tensor([width, height])) >= SMALLEST).all(1).numpy()
    rows = {label: np.flatnonzero((item.target.labels.numpy() == label) & large).tolist() for label in labels}
    return {label: found for label, found in rows.items() if found}


def turned(item: TrainingItem, quarters: int, mirrored: bool) -> TrainingItem:
    """An image and its boxes, mirrored or not and then turned by quarters counter-clockwise."""
    image, boxes = item.image, item.target.boxes
    if mirrored:
        image, boxes = image.flip(-1), torch.stack([1 - boxes[:, 0], *boxes[:, 1:].unbind(1)], 1)
    for _ in range(quarters % 4):
        image = torch.rot90(image, 1, (1, 2))
        boxes = torch.stack([boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3], boxes[:, 2]], 1)
    return item._replace(image=image, target=item.target._replace(boxes=boxes))


def episode_batches(
    dataset: PairDataset,
    sampler: EpochBatches,
    *,
    labels: Collection[int],
    questions: int,
    turned: float,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[LoadedEpisodes]:
    """The batches of a run: each image of a batch brings its mate along, so that it holds twice as many.

    Args:
        dataset: pairs of images.
        sampler: which pairs make up which batch.
        labels: classes that may be asked.
        questions: so many are asked of each image, at most.
        turned: probability with which all images of a batch are mirrored and turned by quarters alike: to the model
            they then show other classes.
        workers: processes that load; the batches do not depend on their number.
        pin_memory: put the images into page-locked memory.

    Raises:
        DataError: too many images in a row cannot be read.
        UsageError: a number that makes no sense, or a worker that died.
    """
    if questions < 1:
        raise UsageError("Bad value for questions", got=questions, expected="at least 1")
    pack = _Pack(labels, questions, turned, dataset.seed, dataset.crowds)
    return item_batches(dataset, sampler, pack, workers=workers, pin_memory=pin_memory)
