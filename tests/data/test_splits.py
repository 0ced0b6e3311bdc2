from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detrkit.data.annotations import Annotations, Strings
from detrkit.data.splits import split
from detrkit.errors import DataError, UsageError
from detrkit.structures import Category

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def data_set(names):
    count = len(names)
    return Annotations(
        root=Path("images"),
        file_names=Strings(names),
        image_ids=np.arange(count),
        image_sizes=np.full((count, 2), 10, np.int32),
        offsets=np.arange(count + 1),
        boxes=np.tile([0.0, 0.0, 5.0, 5.0], (count, 1)),
        labels=np.zeros(count, np.int64),
        areas=np.full(count, 25.0),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        categories=(Category(1, "thing"),),
    )


def members(parts):
    return {name: set(part.file_names) for name, part in parts.items()}


def test_sizes_come_near_the_fractions_and_boxes_go_along():
    parts = split(data_set([f"{index}.jpg" for index in range(5000)]), SHARES, seed=0)
    assert list(parts) == ["train", "val", "test"]
    assert [len(part) / 5000 for part in parts.values()] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert all(len(part.boxes) == len(part) for part in parts.values())


def test_an_image_stays_in_its_split_when_others_come():
    names = [f"{index}.jpg" for index in range(300)]
    few, many = members(split(data_set(names[:200]), SHARES, 7)), members(split(data_set(names[::-1]), SHARES, 7))
    assert all(few[name] <= many[name] for name in SHARES)


def test_the_seed_decides():
    names = [f"{index}.jpg" for index in range(100)]
    assert members(split(data_set(names), SHARES, 1)) == members(split(data_set(names), SHARES, 1))
    assert members(split(data_set(names), SHARES, 1)) != members(split(data_set(names), SHARES, 2))


def test_the_division_is_the_same_on_every_machine_and_in_every_version():
    parts = members(split(data_set([f"{index}.jpg" for index in range(12)]), {"a": 0.5, "b": 0.5}, 0))
    assert sorted(parts["a"]) == GOLDEN


GOLDEN = ["0.jpg", "1.jpg", "10.jpg", "11.jpg", "2.jpg", "3.jpg", "4.jpg", "6.jpg", "7.jpg", "9.jpg"]


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(names=st.lists(st.text("abc/.é", min_size=1), min_size=3, max_size=12), seed=st.integers(0, 10**6))
def test_no_image_is_lost_and_no_split_is_empty(names, seed):
    if len(set(names)) < 3:
        return
    parts = split(data_set(names), SHARES, seed)
    assert all(len(part) for part in parts.values())
    assert sorted(name for part in parts.values() for name in part.file_names) == sorted(names)
    groups = list(members(parts).values())
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_a_share_of_zero_stays_empty():
    parts = split(data_set(["a", "b", "c"]), {"train": 1.0, "val": 0.0}, 0)
    assert [len(part) for part in parts.values()] == [3, 0]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 0.6, "b": 0.6}])
def test_fractions_that_make_no_sense_are_refused(shares):
    with pytest.raises(UsageError, match="add up to 1"):
        split(data_set(["a", "b"]), shares, 0)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="2 images cannot be divided into 3 splits"):
        split(data_set(["a", "b", "a"]), SHARES, 0)
