"""Masks that lie in pictures, one picture an image, whose pixels hold the number of the object that they belong to.

A data set of this kind stays on disk: here are only the places, and a picture is decoded when its masks are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image

from detrkit.data.annotations import Annotations, Strings
from detrkit.data.files import upright_size
from detrkit.data.images import open_values
from detrkit.data.problems import Problems
from detrkit.errors import DataError
from detrkit.masks import RunLengths

COLOURS = 256
"""Values of a channel: a picture in colours holds the number R + 256 G + 256² B (COCO panoptic)."""


class SegmentFiles:
    """The masks of `m` objects as places in pictures; see `annotations.Masks`.

    Args:
        root: the folder of the pictures.
        names: k pictures, as paths relative to the folder.
        sizes: (k, 2) height and width of each picture in pixels, as it should be; 0 where not known.
        files: (m,) the picture of each object.
        numbers: (m,) its number in that picture; 0 where its mask is not known.
    """

    def __init__(self, root: Path, names: Strings, sizes: np.ndarray, files: np.ndarray, numbers: np.ndarray):
        self.root, self.names = root, names
        self.sizes = np.asarray(sizes, np.int32).reshape(-1, 2)
        self.files = np.asarray(files, np.int32)
        self.numbers = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: np.ndarray | slice) -> SegmentFiles:
        """Some of them, in the order that is asked for; no picture is opened."""
        return SegmentFiles(self.root, self.names, self.sizes, self.files[rows], self.numbers[rows])

    @property
    def known(self) -> Bool[np.ndarray, " m"]:
        """Which objects have a place in a picture, be it that the picture lacks them."""
        return self.numbers > 0

    def encoded(self, rows: slice) -> RunLengths:
        """The masks of some objects. Each picture is decoded once; an object that it lacks has no mask.

        Raises:
            DataError: a picture is missing, cannot be decoded, or has not the size of its image; it is named.
        """
        files, numbers = self.files[rows], self.numbers[rows]
        found = [RunLengths.unknown(self.sizes[files].astype(np.int64))]
        order = np.arange(len(files))
        for file in np.unique(files[numbers > 0]):
            chosen = np.flatnonzero((files == file) & (numbers > 0))
            order[chosen] = sum(map(len, found)) + np.arange(len(chosen))
            found.append(runs_of(self._values(int(file)), numbers[chosen]))
        return RunLengths.joined(found)[order]

    def _values(self, file: int) -> np.ndarray:
        path, size = self.root / self.names[file], tuple(self.sizes[file].tolist())
        values = read_numbers(path)
        if all(size) and values.shape != size:
            raise DataError(
                "The picture of masks is not of its image's size",
                where=path,
                got=f"{values.shape[0]} × {values.shape[1]} pixels",
                expected=f"{size[0]} × {size[1]}",
                remedy="Export the masks at the size of the images.",
            )
        return values


def read_numbers(path: Path) -> np.ndarray:
    """The numbers in a picture (height, width): palette indices or grey values as they are, colours as COCO has them.

    Raises:
        DataError: the picture cannot be read, or holds no whole numbers.
    """
    image = open_values(path)
    if image.mode == "F":
        raise DataError(
            "The picture of masks does not hold whole numbers",
            where=path,
            got=f"mode {image.mode}",
            expected="grey values of 8 or 16 bits, a palette, or colours",
            remedy="Convert it to a PNG of 16 bits.",
        )
    if image.mode in ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        return from_colours(np.asarray(image.convert("RGB")))
    values = np.asarray(image)
    return values[..., 0] if values.ndim == 3 else values  # grey with alpha


def from_colours(pixels: np.ndarray) -> np.ndarray:
    """The numbers (height, width) int32 that the colours (height, width, 3) stand for."""
    wide = pixels.astype(np.int32)
    numbers: np.ndarray = wide[..., 0] + COLOURS * wide[..., 1] + COLOURS**2 * wide[..., 2]
    return numbers


def to_colours(numbers: np.ndarray) -> Image.Image:
    """The picture whose colours stand for the numbers (height, width), each at least 0 and below 256³."""
    channels = [(numbers // COLOURS**power % COLOURS).astype(np.uint8) for power in range(3)]
    return Image.fromarray(np.stack(channels, -1))


def objects_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers in a picture (height, width) but 0, the box around the pixels of each (xyxy in pixels) and its area
    in pixels."""
    from scipy.ndimage import find_objects

    numbers, places, areas = np.unique(values, return_inverse=True, return_counts=True)
    slices = find_objects(places.reshape(values.shape) + 1)
    boxes = np.array([(across.start, down.start, across.stop, down.stop) for down, across in slices], np.float64)
    chosen = numbers > 0
    return numbers[chosen].astype(np.int64), boxes.reshape(-1, 4)[chosen], areas[chosen].astype(np.float64)


def numbers_of(annotations: Annotations, index: int, *, crowds: bool = True) -> np.ndarray:
    """The picture (height, width) of an image's objects, numbered from 1 as they stand: small ones over large ones over
    crowds; 0 where there is none.

    Args:
        annotations: the data set.
        index: of the image.
        crowds: whether crowds are drawn.

    Raises:
        DataError: the size of the image is not known, or a file of masks cannot be read.
    """
    height, width = annotations.image_sizes[index].tolist()
    if not height:
        raise DataError(
            "The size of the image is not known, and pictures of masks have that size",
            where=annotations.path(index),
            remedy="Read the data set with its images at hand.",
        )
    numbers = np.zeros((height, width), np.int32)
    if annotations.masks is None:
        return numbers
    rows = annotations.rows(index)
    masks, crowd = annotations.masks.encoded(rows), annotations.crowd[rows]
    for place in np.lexsort((-masks.areas(), ~crowd)):
        if masks.known[place] and (crowds or not crowd[place]):
            numbers[masks[[int(place)]].decode()[0]] = place + 1
    return numbers


def runs_of(values: np.ndarray, numbers: Int64[np.ndarray, " n"]) -> RunLengths:
    """The masks of some numbers in a picture of numbers (height, width), from one walk over its pixels.

    A number that the picture lacks gives a mask that is not known.
    """
    from hotcoco import mask

    height, width = values.shape
    columns = values.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(columns[1:] != columns[:-1]) + 1])
    stops = np.append(starts[1:], columns.size)
    order = np.argsort(columns[starts], kind="stable")
    owners = columns[starts][order]
    pieces = []
    for number in numbers.tolist():
        first, last = np.searchsorted(owners, number), np.searchsorted(owners, number, side="right")
        runs = order[first:last]
        borders = np.stack([starts[runs], stops[runs]], 1).reshape(-1)
        counts = np.diff(borders, prepend=0, append=columns.size)
        counts = counts[: len(counts) - (counts[-1] == 0)]  # the last run of an object may end the picture
        one = {"size": [height, width], "counts": counts.tolist()}
        pieces.append(mask.frPyObjects(one, height, width) if len(runs) else {"size": [height, width], "counts": b""})
    return RunLengths.from_coco(pieces)


def check_pictures(
    root: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Look at the headers of pictures of masks; those that are missing or unreadable are counted.

    Args:
        root: their folder.
        names: relative to it; "" where an image has none.
        sizes: height and width of each image in pixels, 0 where not known.
        problems: where the findings are counted.

    Returns:
        Which pictures can be read (k,), and which are of their image's size (k,).
    """
    readable, fitting = np.ones(len(names), bool), np.ones(len(names), bool)
    for row, (name, expected) in enumerate(zip(names, sizes, strict=True)):
        if not name:
            problems.add("missing-mask-file", f"{root}: an image has none")
            readable[row] = False
            continue
        try:
            size = upright_size(root / name)
        except DataError as error:
            kind = "unreadable-mask-file" if (root / name).is_file() else "missing-mask-file"
            problems.add(kind, f"{error.where}: {error.cause}")
            readable[row] = False
        else:
            fitting[row] = 0 in expected or size == expected
    return readable, fitting
