"""What a frozen backbone says of a folder of pictures, computed once and kept in a file.

A backbone that does not train says the same of an image in every epoch, as long as the image is the same. So each
picture goes through it twice in all, as it is and mirrored, and the task then trains on the maps: a step costs what the
transformer costs. Patches need no pixels either: what is asked for is the mean of the map over a place (`pool_boxes`),
taken from the mirrored picture's map while the other is searched, so that no cell can be told by being the very same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.data.crops import Crops, ImageResizing
from detrkit.data.dataset import Key, random_stream
from detrkit.data.loading import item_batches
from detrkit.data.order import EpochBatches
from detrkit.data.pictures import Pictures
from detrkit.data.regions import SHORTEST, find_regions
from detrkit.data.transforms import REDUCTION, to_tensor
from detrkit.documents import read_json
from detrkit.errors import DataError, Error, ModelError, UsageError
from detrkit.nn.pooling import pool_boxes
from detrkit.structures import FeatureBatch, Target
from detrkit.whole import how_to_make_room, write_text_whole

_PLACE_STREAM = 8  # streams 1 to 7 shuffle, augment, drop out, cut patches and make views
_EVALUATION_STREAM = 9
_MAPS, _INDEX = "maps.f16", "maps.json"


class _Picture(NamedTuple):
    """A picture on its way to the backbone: its pixels, the regions that stand out (xyxy in [0, 1]), and its file."""

    image: Tensor
    regions: np.ndarray
    name: str


class _Pictures(Dataset[_Picture]):
    """Pictures in the one size that the model sees, rounded so that the cells of a map divide it."""

    def __init__(self, pictures: Pictures, resizing: ImageResizing, crops: Crops, stride: int, regions: int):
        self.pictures, self.resizing, self.crops = pictures, resizing.fixed(), crops
        self.stride, self.regions = stride, regions

    def __getitem__(self, key: Key) -> _Picture:
        name = self.pictures.name(key.index)
        image = self.pictures.open(key.index, coarse=REDUCTION * max(SHORTEST, *self.resizing.sizes))
        _, resized = self.resizing(image, np.random.default_rng(0))  # nothing of it is random
        size = (self._whole(resized.width), self._whole(resized.height))
        if not self.crops.is_large_enough(size[1], size[0]):
            whole = self.pictures.open(key.index)  # of its own size
            raise DataError(
                "The image is too small or too narrow to choose places in",
                where=name,
                got=f"{whole.width} × {whole.height} pixels",
            )
        regions = find_regions(image, self.regions) if self.regions else np.zeros((0, 4))
        return _Picture(to_tensor(image.resize(size, Image.Resampling.BILINEAR)), regions, name)

    def _whole(self, side: int) -> int:
        return max(1, round(side / self.stride)) * self.stride


class _Passed(NamedTuple):
    """One picture and nothing else, as `item_batches` wants a batch."""

    picture: _Picture

    def unpacked(self) -> _Picture:
        return self.picture


def _only(items: list[_Picture]) -> _Passed:
    return _Passed(items[0])


class FeatureStore:
    """The maps of all pictures of a folder, read from a file that every process shares.

    Args:
        folder: where `extract` wrote.

    Raises:
        DataError: nothing there, or a damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            about = read_json(folder / _INDEX)
            self.key, self.lost = str(about["key"]), tuple(about["lost"])
            self.names, self.shapes = tuple(about["names"]), np.array(about["shapes"], np.int64).reshape(-1, 3)
            self.regions = tuple(np.array(boxes, np.float32).reshape(-1, 4) for boxes in about["regions"])
            self.offsets = np.concatenate([[0], np.cumsum(2 * self.shapes.prod(1))])
            self._maps = np.memmap(folder / _MAPS, np.float16, "r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, error) from error
        if len(self._maps) != self.offsets[-1]:
            raise _damaged(folder, f"{len(self._maps)} numbers, not {self.offsets[-1]}")
        if not len(self.names) == len(self.regions) == len(self.shapes):
            raise _damaged(folder, f"{len(self.names)} names for {len(self.shapes)} maps")

    def __len__(self) -> int:
        return len(self.names)

    def maps(self, index: int, mirrored: bool) -> tuple[Float[Tensor, "f h w"], Float[Tensor, "f h w"]]:
        """The map of a picture, and what the backbone said of the picture mirrored, turned back into the same frame.

        Args:
            index: of the picture.
            mirrored: exchange the two: the mirrored picture is the one that is searched.
        """
        shape = tuple(self.shapes[index])
        both = np.array(self._maps[self.offsets[index] : self.offsets[index + 1]], np.float32).reshape(2, *shape)
        searched, other = torch.from_numpy(both).flip(0) if mirrored else torch.from_numpy(both)
        return searched, other.flip(-1)


def _damaged(folder: Path, error: object) -> DataError:
    return DataError(
        "The kept features of the pictures cannot be read", where=folder, got=error, remedy="Delete the folder."
    )


def extract(
    backbone: nn.Module,
    pictures: Pictures,
    resizing: ImageResizing,
    crops: Crops,
    folder: Path,
    *,
    key: str,
    stride: int,
    regions: int = 0,
    workers: int,
    device: torch.device,
    on_picture: Callable[[], None] | None = None,
) -> FeatureStore:
    """Let every picture through a backbone, as it is and mirrored, and keep its maps; or open what was kept before.

    Args:
        backbone: its last level is kept, in 16 bits.
        pictures: what cannot be read or is too small is left out (`FeatureStore.lost`).
        resizing: the size in which the model sees them; sides are rounded to whole cells.
        crops: says which pictures are too small.
        folder: where to; about 80 KB a picture at 192 pixels and stride 16.
        key: stands for all that the maps depend on; what was kept under another key, or of pictures that lie elsewhere
            now, is computed anew.
        stride: pixels between the cells of a map.
        regions: also look for so many regions that stand out in each picture (`find_regions`), at most.
        workers: processes that load pictures.
        device: where the backbone is.
        on_picture: called after each picture, also one that is left out.

    Raises:
        DataError: not one picture can be used.
        ModelError: the backbone gives numbers that 16 bits cannot hold.
        Error: the disk is full.
    """
    if not len(pictures):
        raise DataError("There are no pictures to look at", where=pictures.source)
    backbone.eval()
    tell = on_picture or (lambda: None)
    if (folder / _INDEX).exists():
        kept = FeatureStore(folder)
        if kept.key == key and {pictures.name(index) for index in range(len(pictures))}.issuperset(kept.names):
            return kept
    names: list[str] = []
    shapes: list[list[int]] = []
    found: list[list[list[float]]] = []
    lost: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever is stopped here leaves no index, so that no maps can be taken for those of another key. Old maps are
        # removed instead of overwritten: another process may still read them.
        for name in (_INDEX, _MAPS):
            (folder / name).unlink(missing_ok=True)
        with (folder / _MAPS).open("wb") as file:
            source = _Pictures(pictures, resizing, crops, stride, regions)
            for picture in _loaded(source, workers, lost, tell):
                maps = _both(backbone, picture.image.to(device), picture.name)
                file.write(maps.tobytes())
                names.append(picture.name)
                shapes.append(list(maps.shape[1:]))
                found.append(picture.regions.round(5).tolist())
                tell()
        about = {"key": key, "names": names, "shapes": shapes, "regions": found, "lost": lost}
        write_text_whole(folder / _INDEX, json.dumps(about))
    except OSError as error:
        remedy = how_to_make_room(error)
        raise Error("The features of the pictures cannot be kept", where=folder, got=error, remedy=remedy) from error
    return FeatureStore(folder)


@torch.inference_mode()
def _both(backbone: nn.Module, image: Float[Tensor, "3 h w"], name: str) -> np.ndarray:
    """The maps of a picture and of its mirror image: (2, f, h, w) in 16 bits."""
    both = torch.stack([image, image.flip(-1)]).contiguous(memory_format=torch.channels_last)
    maps: np.ndarray = backbone(both)[-1].contiguous().half().cpu().numpy()
    if not np.isfinite(maps).all():
        raise ModelError(
            "The backbone's features do not fit into 16 bits",
            where=name,
            remedy="Check its weights, or let patches go through it at every step (--shown crops).",
        )
    return maps


def _loaded(source: _Pictures, workers: int, lost: list[str], tell: Callable[[], None]) -> Iterator[_Picture]:
    """Every picture that can be used, in order; the others are named in `lost`, and `tell` is called for each."""
    pictures = source.pictures

    def lose(index: int, error: DataError) -> None:
        lost.append(str(error))
        tell()
        if len(lost) == len(pictures):
            raise DataError(
                "Not one of the pictures can be used", where=pictures.source, got=str(error), remedy="Check the folder."
            )

    keys = [[Key(0, index)] for index in range(len(pictures))]
    return item_batches(source, keys, _only, workers=workers, unreadable=lose)


class FeatureItem(NamedTuple):
    """A map, the features of places in it, where these are, and where something stands out: cxcywh in [0, 1]."""

    features: Tensor
    patches: Tensor
    boxes: Tensor
    regions: Tensor
    name: str


class FeatureDataset(Dataset[FeatureItem]):
    """Maps with places to look for: a pure function of (seed, epoch, index).

    Args:
        store: the maps.
        indices: which of its pictures.
        crops: where the places are.
        count: places an image.
        seed: of the run.
        stride: pixels between the cells of a map.
        flip: probability with which the mirrored picture is searched.
        evaluation: nothing is random but the places, which depend on (seed, index) alone.

    Raises:
        DataError: no pictures.
    """

    def __init__(
        self,
        store: FeatureStore,
        indices: Sequence[int],
        crops: Crops,
        count: int,
        seed: int,
        *,
        stride: int,
        flip: float = 0.0,
        evaluation: bool = False,
    ):
        if not len(indices):
            raise DataError("There are no pictures to choose places in", where=store.folder)
        self.store, self.indices, self.crops, self.count, self.seed = store, indices, crops, count, seed
        self.stride, self.flip, self.evaluation = stride, 0.0 if evaluation else flip, evaluation

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> FeatureItem:
        """The example of a key."""
        stream, epoch = (_EVALUATION_STREAM, 0) if self.evaluation else (_PLACE_STREAM, key.epoch)
        rng = random_stream(stream, self.seed, epoch, key.index)
        index = int(self.indices[key.index])
        mirrored = bool(rng.random() < self.flip)
        features, other = self.store.maps(index, mirrored)
        height, width = (int(cells) * self.stride for cells in features.shape[1:])
        places = torch.from_numpy(self.crops(height, width, self.count, rng) / (width, height, width, height))
        boxes, regions = xyxy_to_cxcywh(places).float(), xyxy_to_cxcywh(torch.from_numpy(self.store.regions[index]))
        if mirrored:
            regions = torch.cat([1 - regions[:, :1], regions[:, 1:]], 1)
        return FeatureItem(features, pool_boxes(other, boxes), boxes, regions, self.store.names[index])

    def size(self, key: Key) -> tuple[int, int]:
        """Height and width of what the map of a key shows, in pixels."""
        height, width = (self.store.shapes[int(self.indices[key.index])][1:] * self.stride).tolist()
        return height, width


class LoadedFeatures(NamedTuple):
    """A batch; nothing is ever replaced in it, since what cannot be read has no map."""

    batch: FeatureBatch
    replaced: tuple[str, ...] = ()

    def unpacked(self) -> LoadedFeatures:
        """Itself: it travels from a worker as it is."""
        return self


def _pack(items: list[FeatureItem]) -> LoadedFeatures:
    height, width = (max(item.features.shape[axis] for item in items) for axis in (1, 2))
    features = items[0].features.new_zeros(len(items), items[0].features.shape[0], height, width)
    padding = torch.ones(len(items), height, width, dtype=torch.bool)
    for row, item in enumerate(items):
        features[row, :, : item.features.shape[1], : item.features.shape[2]] = item.features
        padding[row, : item.features.shape[1], : item.features.shape[2]] = False
    patches, boxes = (torch.stack([getattr(item, part) for item in items]) for part in ("patches", "boxes"))
    regions = tuple(
        Target(torch.zeros(len(item.regions), dtype=torch.int64), item.regions, item.name) for item in items
    )
    return LoadedFeatures(FeatureBatch(features, padding, patches, boxes, tuple(item.name for item in items), regions))


def feature_batches(
    dataset: FeatureDataset, sampler: EpochBatches, *, workers: int, pin_memory: bool = False
) -> Iterator[LoadedFeatures]:
    """The batches of a run; arguments and errors as of `detrkit.data.loading.training_batches`."""
    return item_batches(dataset, sampler, _pack, workers=workers, pin_memory=pin_memory)


def evaluation_features(
    dataset: FeatureDataset, batch_size: int, *, workers: int, indices: Sequence[int] | None = None
) -> Iterator[FeatureBatch]:
    """All pictures once, in order; or those of the indices.

    Raises:
        UsageError: the data set was not made for evaluation, or a batch size below 1.
    """
    if not dataset.evaluation or batch_size < 1:
        raise UsageError("An evaluation needs a data set that was made for it, and batches of at least one picture")
    chosen = range(len(dataset)) if indices is None else indices
    keys = [
        [Key(0, index) for index in chosen[first : first + batch_size]] for first in range(0, len(chosen), batch_size)
    ]
    return (loaded.batch for loaded in item_batches(dataset, keys, _pack, workers=workers))
