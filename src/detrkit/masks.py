"""Binary masks, kept as run lengths and decoded where they are used.

A mask of a photograph takes a few hundred bytes so, where its pixels take a megabyte. The form is COCO's compressed
one (Lin et al., ECCV 2014: runs down the columns), which evaluators and result files hold as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64


class RunLengths:
    """`n` masks in three arrays, each of its own size. One without runs is not known, and decodes to nothing.

    Attributes:
        sizes: (n, 2) int32, height and width in pixels.
        offsets: (n + 1,) int64, where the runs of each mask begin.
        bytes: uint8, COCO's compressed run lengths one after the other.
    """

    def __init__(self, sizes: np.ndarray, offsets: np.ndarray, data: np.ndarray):
        self.sizes = np.asarray(sizes, np.int32).reshape(-1, 2)
        self.offsets = np.asarray(offsets, np.int64)
        self.bytes = np.asarray(data, np.uint8)

    @staticmethod
    def encode(masks: Bool[np.ndarray, "n h w"]) -> RunLengths:
        """Compress masks of one size; those whose columns lie one after the other in memory take less time."""
        from hotcoco import mask

        if not len(masks):
            return RunLengths.joined([])
        stacked = np.asfortranarray(np.asarray(masks, bool).view(np.uint8).transpose(1, 2, 0))
        runs: Any = mask.encode(stacked)
        return RunLengths.from_coco(runs)

    @staticmethod
    def from_coco(runs: Sequence[Mapping[str, Any]]) -> RunLengths:
        """The masks of COCO's objects with `size` and compressed `counts` (text or bytes), which are not checked."""
        counts = [one["counts"].encode() if isinstance(one["counts"], str) else one["counts"] for one in runs]
        return RunLengths._packed(np.array([one["size"] for one in runs], np.int32), counts)

    @staticmethod
    def unknown(sizes: Int64[np.ndarray, "n 2"]) -> RunLengths:
        """Masks of which nothing is known but their sizes."""
        return RunLengths(sizes, np.zeros(len(sizes) + 1, np.int64), np.zeros(0, np.uint8))

    @staticmethod
    def joined(parts: Sequence[RunLengths]) -> RunLengths:
        """The masks of all parts, one after the other."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
        return RunLengths(
            np.concatenate([np.zeros((0, 2), np.int32), *(part.sizes for part in parts)]),
            np.cumsum(lengths),
            np.concatenate([np.zeros(0, np.uint8), *(part.bytes for part in parts)]),
        )

    @staticmethod
    def _packed(sizes: np.ndarray, counts: Sequence[bytes]) -> RunLengths:
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum([len(one) for one in counts], out=offsets[1:])
        return RunLengths(sizes, offsets, np.frombuffer(b"".join(counts), np.uint8))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: np.ndarray | slice | list[int]) -> RunLengths:
        """The masks that a boolean mask, an index array or a slice chooses."""
        chosen = np.arange(len(self))[rows]
        return RunLengths._packed(self.sizes[chosen], [self.counts(int(row)) for row in chosen])

    def encoded(self, rows: slice) -> RunLengths:
        """Some of the masks, as they are: what columns of masks in other forms have to make first."""
        return self[rows]

    def counts(self, row: int) -> bytes:
        """The compressed runs of one mask."""
        return self.bytes[self.offsets[row] : self.offsets[row + 1]].tobytes()

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Which masks are known: have runs, be it of an empty mask."""
        return np.diff(self.offsets) > 0

    def decode(self) -> Bool[np.ndarray, "n h w"]:
        """The pixels of all masks, which must be of one size; False everywhere where a mask is not known.

        Raises:
            ValueError: their sizes differ, or runs that are damaged.
        """
        if not len(self):
            return np.zeros((0, 0, 0), bool)
        height, width = (int(side) for side in self.sizes[0])
        if (self.sizes != self.sizes[0]).any():
            raise ValueError(f"masks of several sizes cannot be one array: {np.unique(self.sizes, axis=0).tolist()}")
        pixels = np.zeros((len(self), height, width), bool)
        from hotcoco import mask

        for row in np.flatnonzero(self.known):
            pixels[row] = mask.decode({"size": [height, width], "counts": self.counts(int(row))})
        return pixels

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO's objects: `size` and, as text that JSON can hold, `counts`; empty text where a mask is not known."""
        return [
            {"size": [int(side) for side in self.sizes[row]], "counts": self.counts(row).decode("ascii")}
            for row in range(len(self))
        ]

    def areas(self) -> Int64[np.ndarray, " n"]:
        """Pixels of each mask; 0 where it is not known."""
        from hotcoco import mask

        found = np.zeros(len(self), np.int64)
        rows = np.flatnonzero(self.known)
        if len(rows):
            found[rows] = np.asarray(mask.area(self[rows].to_coco()), np.int64)
        return found

    def boxes(self) -> Float64[np.ndarray, "n 4"]:
        """The smallest box around each mask, xyxy in pixels; zeros where it is empty or not known."""
        from hotcoco import mask

        found = np.zeros((len(self), 4))
        rows = np.flatnonzero(self.known)
        if len(rows):
            found[rows] = np.asarray(mask.to_bbox(self[rows].to_coco())).reshape(-1, 4)
            found[:, 2:] += found[:, :2]
        return found
