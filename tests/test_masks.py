"""Masks as run lengths against pycocotools, which is the oracle here."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as reference

from detrkit.masks import RunLengths


def drawn(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    return rng.random((count, height, width)) < rng.random((count, 1, 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (40, 31)])
def test_masks_travel_there_and_back(rng: np.random.Generator, height: int, width: int) -> None:
    masks = drawn(rng, 6, height, width)
    masks[0], masks[1] = False, True
    runs = RunLengths.encode(masks)
    assert np.array_equal(runs.decode(), masks)
    assert runs.known.all()
    assert np.array_equal(RunLengths.from_coco(runs.to_coco()).decode(), masks)
    by_columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).transpose(0, 2, 1)
    assert RunLengths.encode(by_columns).bytes.tobytes() == runs.bytes.tobytes()
    assert runs.areas().tolist() == masks.sum((1, 2)).tolist()
    theirs = reference.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    assert [one["counts"] for one in runs.to_coco()] == [one["counts"].decode() for one in theirs]
    boxes = reference.toBbox(theirs)
    boxes[:, 2:] += boxes[:, :2]
    assert runs.boxes().tolist() == boxes.tolist()


def test_rows_are_chosen_and_joined(rng: np.random.Generator) -> None:
    masks = drawn(rng, 5, 9, 8)
    runs = RunLengths.encode(masks)
    assert np.array_equal(runs[[3, 0]].decode(), masks[[3, 0]])
    assert np.array_equal(runs[1:4].decode(), masks[1:4])
    assert np.array_equal(runs[np.array([True, False, False, True, False])].decode(), masks[[0, 3]])
    assert np.array_equal(RunLengths.joined([runs[2:], runs[:1]]).decode(), masks[[2, 3, 4, 0]])
    assert len(RunLengths.joined([])) == len(runs[[]]) == 0


def test_what_is_not_known_is_empty() -> None:
    runs = RunLengths.joined([RunLengths.unknown(np.array([[4, 6]])), RunLengths.encode(np.ones((1, 4, 6), bool))])
    assert runs.known.tolist() == [False, True]
    assert runs.areas().tolist() == [0, 24]
    assert runs.decode().sum((1, 2)).tolist() == [0, 24]
    assert runs.boxes().tolist() == [[0, 0, 0, 0], [0, 0, 6, 4]]


def test_masks_of_several_sizes_are_no_array() -> None:
    runs = RunLengths.joined([RunLengths.encode(np.ones((1, 4, 6), bool)), RunLengths.encode(np.ones((1, 5, 6), bool))])
    with pytest.raises(ValueError, match="several sizes"):
        runs.decode()


def test_a_mask_takes_less_than_its_pixels() -> None:
    yy, xx = np.mgrid[:480, :640]
    disc = ((yy - 240) ** 2 + (xx - 320) ** 2 < 150**2)[None]
    assert len(RunLengths.encode(disc).bytes) < disc.size / 200
