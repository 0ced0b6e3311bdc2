"""Looks at every image of a split once: whether it can be read, its true size, and what it is like."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from detrkit.data.annotations import Annotations
from detrkit.data.images import FORMATS, open_image, orientation
from detrkit.documents import opened
from detrkit.errors import DataError

SIDE = 16
"""Of the small grey picture that images are compared by."""

COARSE = 64
"""Pixels of the sides that a JPEG is decoded at, at least: four for each of the small picture's."""

LARGE = 20_000_000
"""Pixels; of larger images one is decoded at a time, so that memory stays bounded."""

THREADS = 8
"""That open images; they wait for the disk as much as they compute."""


class _Seen(NamedTuple):
    """What is in one image file; `trouble` is empty where it can be read."""

    trouble: str
    digest: bytes
    stored: tuple[int, int]
    orientation: int
    small: np.ndarray


@dataclass(frozen=True, eq=False)
class Pictures:
    """What was seen in the n images of a split, in columns.

    Attributes:
        trouble: what is wrong with the images that cannot be read, by their row.
        digests: of each file's bytes; empty where there are none.
        sizes: (n, 2) height and width of the upright picture; 0 where it cannot be read.
        orientations: (n,) the flags of the files, 1 where the picture is stored upright.
        small: (n, 16, 16) uint8, the pictures in grey.
    """

    trouble: dict[int, str]
    digests: list[bytes]
    sizes: np.ndarray
    orientations: np.ndarray
    small: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """(n,) bool."""
        return np.asarray((self.sizes > 0).all(1))


def look(annotations: Annotations, on_image: Callable[[], None] = lambda: None) -> Pictures:
    """Decode every image of a split, by several threads; what cannot be decoded is told, not raised.

    Args:
        annotations: whose images.
        on_image: called after each.
    """
    one_large = threading.Lock()
    seen: list[_Seen] = []
    # Each opening changes the filters of warnings for a moment, which threads would leave behind in any order.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")
        answers = pool.map(lambda row: _see(annotations.path(row), one_large), range(len(annotations)))
        with closing(cast(Generator[_Seen], answers)):  # an interruption cancels what has not begun
            for one in answers:
                seen.append(one)
                on_image()
    stored = np.array([one.stored for one in seen], np.int64).reshape(-1, 2)
    orientations = np.array([one.orientation for one in seen], np.int64)
    return Pictures(
        {row: one.trouble for row, one in enumerate(seen) if one.trouble},
        [one.digest for one in seen],
        np.where((orientations >= 5)[:, None], stored[:, ::-1], stored),
        orientations,
        np.array([one.small for one in seen], np.uint8).reshape(-1, SIDE, SIDE),
    )


def _see(path: Path, one_large: threading.Lock) -> _Seen:
    nothing, digest = np.zeros((SIDE, SIDE), np.uint8), b""
    try:
        with opened(path) as file:
            digest = digest_of(file)
            height, width, orientation = _header(file)
            with one_large if height * width > LARGE else nullcontext():
                picture = open_image(path, coarse=COARSE)
    except OSError as error:
        return _Seen(error.strerror or str(error), digest, (0, 0), 1, nothing)
    except DataError as error:
        return _Seen(error.cause, digest, (0, 0), 1, nothing)
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return _Seen("", digest, (height, width), orientation, np.asarray(small))


def digest_of(file: BufferedReader) -> bytes:
    """What tells files of different content apart; empty for an empty one."""
    digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
    return digest if file.tell() else b""


def _header(file: BufferedReader) -> tuple[int, int, int]:
    """Height and width as stored, and the orientation flag; zeros and 1 where `open_image` will say what is wrong."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.height, image.width, orientation(image)
    except Exception:  # the parsers let all kinds of errors through
        return 0, 0, 1


ALIKE = 0.85
"""How alike two pictures must be to pass for one, as the cosine of their outlines. Measured: copies saved anew, scaled
or brightened 0.96 and more; the same scene taken twice 0.93 to 0.96; a copy cut by 2 % 0.77 to 0.9; different pictures
at most 0.41, with letterboxes 0.78."""

FAINT = 12.0
"""Pictures whose outlines are weaker than this in all are blank, and like every other blank one."""

_BLOCK = 1024


def outlines(small: np.ndarray) -> np.ndarray:
    """What pictures (n, 16, 16) are compared by: (n, 450) unit vectors of the steps from pixel to pixel, in both
    directions. Roots of them, so that a few strong edges, such as those of a letterbox, do not decide alone. Zeros
    where a picture is blank.
    """
    grey = small.astype(np.float32)
    across, down = np.diff(grey, axis=2)[:, 1:, :], np.diff(grey, axis=1)[:, :, 1:]
    steps = np.concatenate([across.reshape(len(grey), (SIDE - 1) ** 2), down.reshape(len(grey), (SIDE - 1) ** 2)], 1)
    roots = np.sign(steps) * np.sqrt(np.abs(steps))
    length = np.linalg.norm(roots, axis=1, keepdims=True)
    return np.where(length > FAINT, roots / np.maximum(length, 1e-6), 0).astype(np.float32)


def most_alike(queries: np.ndarray, others: np.ndarray, *, earlier: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the other that is most like it: its row (k,), and how alike the two are (k,).

    Args:
        queries: (k, d) outlines.
        others: (n, d) outlines, with n at least 1.
        earlier: the two are the same pictures, and each is compared with those before it.
    """
    rows, values = np.zeros(len(queries), np.int64), np.full(len(queries), -1.0, np.float32)
    for start in range(0, len(queries), _BLOCK):
        stop = min(start + _BLOCK, len(queries))
        likeness = queries[start:stop] @ (others[:stop] if earlier else others).T
        if earlier:
            likeness[np.arange(stop)[None] >= np.arange(start, stop)[:, None]] = -1
        rows[start:stop] = likeness.argmax(1)
        values[start:stop] = likeness.max(1)
    return rows, values


def repeats(digests: Sequence[bytes], weights: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Files that are the same, byte for byte: the row that weighs most, the first of such, with each of the others."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        if digest:
            groups.setdefault(digest, []).append(row)
    for rows in groups.values():
        kept = max(rows, key=lambda row: weights[row])
        yield from ((kept, row) for row in rows if row != kept)
