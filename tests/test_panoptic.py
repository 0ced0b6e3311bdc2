"""An image cut into segments, and the files that hold it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from detrkit.errors import UsageError
from detrkit.panoptic import PanopticMap, ids_to_rgb
from detrkit.structures import Category

TABLE = (Category(7, "cat"), Category(21, "grass", is_thing=False))


@pytest.fixture
def cut() -> PanopticMap:
    """A cat on grass, nothing said of the top row; the third segment has no pixel."""
    ids = np.full((5, 6), 2, np.int32)
    ids[0] = 0
    ids[2:4, 1:4] = 1
    return PanopticMap(ids, np.array([0, 1, 0]), np.array([0.5, 1, 0.75], np.float32), TABLE, (5, 6), "a.jpg")


def test_segments_are_counted(cut):
    assert len(cut) == 3
    assert cut.areas.tolist() == [6, 18, 0]
    assert cut.names == ["cat", "grass", "cat"]


def test_cocos_form_lists_what_the_picture_holds(cut):
    written = json.loads(json.dumps(cut.to_coco(11, "a.png")))
    assert written == {
        "image_id": 11,
        "file_name": "a.png",
        "segments_info": [
            {"id": 1, "category_id": 7, "isthing": 1, "iscrowd": 0, "bbox": [1, 2, 3, 2], "area": 6, "score": 0.5},
            {"id": 2, "category_id": 21, "isthing": 0, "iscrowd": 0, "bbox": [0, 1, 6, 4], "area": 18, "score": 1.0},
        ],
    }
    colours = np.asarray(Image.open(io.BytesIO(cut.to_png())), np.int64)
    assert np.array_equal(colours @ [1, 256, 65536], cut.ids)


def test_colours_hold_large_ids():
    assert ids_to_rgb(np.array([[0, 255, 256, 70_000, 256**3 - 1]], np.int32)).tolist() == [
        [[0, 0, 0], [255, 0, 0], [0, 1, 0], [112, 17, 1], [255, 255, 255]]
    ]


def test_an_image_without_segments_is_a_map(cut):
    empty = PanopticMap(np.zeros((5, 6), np.int32), cut.labels[:0], cut.scores[:0], TABLE, (5, 6))
    assert empty.to_coco(1, "b.png")["segments_info"] == []
    assert empty.areas.tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (6, 5)}, r"a.jpg: The columns .*ids \(5, 6\).*expected \(6, 5\)"),
        ({"scores": np.ones(2, np.float32)}, r"labels \(3,\), scores \(2,\)"),
        ({"ids": np.full((5, 6), 4, np.int32)}, r"a segment that it lacks.*from 4 to 4.*0 to 3"),
        ({"ids": np.full((5, 6), -1, np.int32)}, r"a segment that it lacks.*from -1 to -1"),
        ({"labels": np.array([0, 2, 1])}, r"a label that the category table lacks.*from 0 to 2.*0 to 1"),
    ],
)
def test_maps_that_do_not_fit_together_are_refused(cut, change, message):
    with pytest.raises(UsageError, match=message):
        replace(cut, **change)
