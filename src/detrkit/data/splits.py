"""Cuts one data set into splits, so that a run can always be judged on images that it never saw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError, UsageError


def split(annotations: Annotations, fractions: Mapping[str, float], seed: int) -> dict[str, Annotations]:
    """Divide the images of a data set at random, by a hash of the seed and of each file name.

    An image stays in its split when others are added or removed, and on whatever machine. Sizes come near the fractions
    as the number of images grows. Where a split would stay empty it is given the image whose hash is nearest to it,
    from the largest split. Entries that name the same file stay together.

    Args:
        annotations: the data set.
        fractions: the share of each split; they add up to 1. A share of 0 gives a split without images.
        seed: another seed divides otherwise.

    Returns:
        The splits under the names and in the order of `fractions`; each image is in exactly one.

    Raises:
        UsageError: no fraction, a negative or non-finite one, or fractions that do not add up to 1.
        DataError: fewer different images than splits.
    """
    chosen = assign(annotations.file_names, fractions, seed, annotations.source)
    return {name: annotations.select(np.flatnonzero(chosen == index)) for index, name in enumerate(fractions)}


def assign(names: Sequence[str], fractions: Mapping[str, float], seed: int, source: str) -> Int64[np.ndarray, " n"]:
    """The part that each name falls into by the rule of `split`, as its row in `fractions`.

    Args:
        names: what is divided; equal names stay together.
        fractions: the share of each part; they add up to 1.
        seed: another seed divides otherwise.
        source: what the names belong to, for messages.

    Raises:
        UsageError: as of `split`.
        DataError: as of `split`.
    """
    shares = np.array(list(fractions.values()), np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or not math.isclose(shares.sum(), 1.0):
        raise UsageError(
            "The fractions of a split must be at least 0 and add up to 1", where="fractions", got=dict(fractions)
        )
    points = np.fromiter((_point(seed, name) for name in names), np.float64, len(names))
    edges = np.concatenate([[0.0], np.cumsum(shares)])
    edges[np.flatnonzero(shares)[-1] + 1 :] = 1.0  # the sum may have been rounded to just below 1
    chosen = np.searchsorted(edges, points, side="right") - 1
    wanted = np.flatnonzero(shares)
    if len(np.unique(points)) < len(wanted):
        raise DataError(
            f"{len(np.unique(points))} images cannot be divided into {len(wanted)} splits",
            where=source,
            remedy="Add images, or ask for fewer splits.",
        )
    for index in wanted:
        if not (chosen == index).any():
            chosen[points == _nearest(points, chosen, (edges[index] + edges[index + 1]) / 2)] = index
    return chosen


def _point(seed: int, name: str) -> float:
    """A place in [0, 1) that depends on the seed and the name alone."""
    key = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


def _nearest(points: np.ndarray, chosen: np.ndarray, place: float) -> float:
    """The point of the split with the most different images that lies nearest to a place."""
    donor = max(np.unique(chosen), key=lambda index: len(np.unique(points[chosen == index])))
    candidates = points[chosen == donor]
    return float(candidates[np.abs(candidates - place).argmin()])
