"""Masks of COCO files against pycocotools, which is the oracle here."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as reference

from detrkit.data import formats
from detrkit.errors import DataError, Error

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the oracle itself

HEIGHT, WIDTH = 30, 40
TRIANGLE = [3.0, 4.0, 20.5, 6.25, 8.0, 27.0]
SQUARE = [25, 5, 35, 5, 35, 15, 25, 15]


def pixels(seed=0):
    yy, xx = np.mgrid[:HEIGHT, :WIDTH]
    return np.asfortranarray((((xx - 20 - seed) ** 2 + (yy - 15) ** 2) < 80).astype(np.uint8))


def uncompressed(mask):
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def compressed(mask, **others):
    runs = reference.encode(mask)
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()} | others


def oracle(segmentation):
    is_text = isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)
    runs = segmentation if is_text else reference.frPyObjects(segmentation, HEIGHT, WIDTH)
    return reference.decode(reference.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def put(root, segmentations, *, size=(HEIGHT, WIDTH), order=("images", "annotations", "categories"), name="a.json"):
    """A file with an object for each segmentation; `...` is an object without one."""
    objects = []
    for number, segmentation in enumerate(segmentations, 1):
        item = {"id": number, "image_id": 7, "category_id": 1, "bbox": [2, 3, 20, 20], "iscrowd": number % 2}
        objects.append(item if segmentation is ... else item | {"segmentation": segmentation})
    image = {"id": 7, "file_name": "a.png"} | ({"height": size[0], "width": size[1]} if size else {})
    lists = {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "x"}]}
    (root / name).write_text(json.dumps({key: lists[key] for key in order}))
    return root / name


def opened(root, segmentations, masks=True, **options):
    (found,) = formats.read(put(root, segmentations, **options), check_files=False, masks=masks).values()
    return found


@pytest.mark.parametrize(
    "order", [("images", "annotations", "categories"), ("annotations", "categories", "images")], ids=" ".join
)
def test_polygons_and_runs_of_every_form_are_the_pixels_that_pycocotools_makes_of_them(tmp_path, order):
    given = [
        [TRIANGLE],
        [TRIANGLE, SQUARE, [-5, -5, 60, -5, 60, 2, -5, 2]],
        uncompressed(pixels()),
        compressed(pixels(3)),
        uncompressed(1 - pixels()),
        compressed(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8))),
        [[100, 100, 120, 100, 110, 120]],
    ]
    found = opened(tmp_path, given, order=order)
    expected = [oracle(one) for one in given]
    masks = found.masks.encoded(found.rows(0))
    assert np.array_equal(masks.decode(), np.stack(expected))
    assert masks.decode()[-1].sum() == 0
    assert masks.known.all()
    assert not found.problems.counts
    assert found.crowd.tolist() == [True, False, True, False, True, False, True]


@pytest.mark.parametrize("short", [[21, 11, 22, 12], [0, 0, 39.5, 29], [5, 5], []])
def test_a_part_without_area_does_not_cost_the_mask(tmp_path, short):
    found = opened(tmp_path, [[TRIANGLE, short], [short, SQUARE]])
    assert not found.problems.counts
    expected = [oracle([TRIANGLE, short]), oracle([SQUARE, short])]  # which takes the first part as what all are
    np.testing.assert_array_equal(found.masks.encoded(found.rows(0)).decode(), expected)


DAMAGED = [
    [[1, 2, 3, 4, 5]],
    [[1, 2, 3, 4, 5, 6, 7]],
    [[1, 2, 3, 4]],
    [[1, 2], [3, 4, 5, 6], []],
    [[1, 2, 3, 4, 5, 6], [1, 2, 3]],
    [[1, 2, 3, 4, 5, 6], [1, "2"]],
    [[]],
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, float("inf")]],
    [[1, 2, 3, 4, 5, "6"]],
    [[1, 2, 3, 4, 5, None]],
    [[1, 2, 3, 4, 5, 10**400]],
    [1, 2, 3, 4, 5, 6],
    [[[1, 2], [3, 4], [5, 6]]],
    "text",
    7,
    True,
    {"counts": [1, -2, 1201], "size": [HEIGHT, WIDTH]},
    {"counts": [1, 1.5, 1197.5], "size": [HEIGHT, WIDTH]},
    {"counts": [1200, 1], "size": [HEIGHT, WIDTH]},
    {"counts": [600, 599], "size": [HEIGHT, WIDTH]},
    {"counts": [2**40], "size": [HEIGHT, WIDTH]},
    {"counts": ["x"], "size": [HEIGHT, WIDTH]},
    {"counts": 7, "size": [HEIGHT, WIDTH]},
    {"counts": "\x01\x02", "size": [HEIGHT, WIDTH]},
    {"counts": "ü~~~", "size": [HEIGHT, WIDTH]},
    {"counts": compressed(pixels())["counts"][:-2], "size": [HEIGHT, WIDTH]},
    {"counts": [1200]},
    {"counts": [1200], "size": 1200},
]


@pytest.mark.parametrize("segmentation", DAMAGED, ids=lambda one: str(one)[:40])
def test_a_damaged_mask_is_counted_and_its_object_stays(tmp_path, segmentation):
    found = opened(tmp_path, [[TRIANGLE], segmentation])
    assert found.problems.counts == {"malformed-mask": 1}
    assert "annotation 2" in found.problems.examples["malformed-mask"][0]
    assert found.masks.encoded(found.rows(0)).known.tolist() == [True, False]
    assert len(found.boxes) == 2
    assert not opened(tmp_path, [[TRIANGLE], segmentation], masks=False).problems.counts


def test_a_mask_of_another_size_than_its_image_is_not_known(tmp_path):
    found = opened(tmp_path, [compressed(pixels()), compressed(np.asfortranarray(pixels().T)), [TRIANGLE]])
    assert found.problems.counts == {"mask-size-mismatch": 1}
    assert found.masks.encoded(found.rows(0)).known.tolist() == [True, False, True]
    assert found.masks.encoded(slice(1, 2)).sizes.tolist() == [[HEIGHT, WIDTH]]


def test_objects_without_a_mask_are_noted(tmp_path):
    found = opened(tmp_path, [..., [TRIANGLE], [], None, {"size": [HEIGHT, WIDTH], "counts": ""}])
    assert found.problems.counts == {"missing-mask": 4}
    assert found.masks.encoded(found.rows(0)).known.tolist() == [False, True, False, False, False]


def test_masks_that_nobody_drew_are_refused_where_they_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: No object has a mask; got 2 boxes;.*go on with boxes alone"):
        opened(tmp_path, [..., []])
    with pytest.raises(DataError, match=r"got 1 boxes, 1 × malformed-mask \(.*annotation 1\)"):
        opened(tmp_path, [[[1, 2, 3]]])
    assert opened(tmp_path, [..., []], masks="any").masks is None
    assert opened(tmp_path, [[TRIANGLE]], masks=False).masks is None
    assert len(opened(tmp_path, []).masks) == 0


def test_a_mask_is_drawn_at_the_size_that_the_image_turns_out_to_have(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png", exif=exif)
    path = put(tmp_path, [[TRIANGLE]], size=None)
    (found,) = formats.read(path, masks=True).values()
    assert np.array_equal(
        found.masks.encoded(found.rows(0)).decode()[0],
        oracle([TRIANGLE]),
    )
    with pytest.raises(DataError, match="1 × malformed-mask"):
        formats.read(path, check_files=False, masks=True)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH)])
def test_a_mask_is_drawn_at_the_size_of_the_upright_image_and_not_of_the_stored_one(tmp_path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png", exif=exif)
    (found,) = formats.read(put(tmp_path, [[TRIANGLE], [SQUARE]], size=size), masks=True).values()
    assert found.image_sizes.tolist() == [[HEIGHT, WIDTH]]
    np.testing.assert_array_equal(found.masks.encoded(slice(0, 2)).decode(), [oracle([TRIANGLE]), oracle([SQUARE])])
    assert found.problems.counts == ({"size-mismatch": 1} if size != (HEIGHT, WIDTH) else {})


def test_images_of_impossible_size_get_no_mask(tmp_path):
    found = opened(
        tmp_path, [[TRIANGLE], {"size": [2**20, 2**20], "counts": [2**40]}], size=(2**20, 2**20), masks="any"
    )
    assert found.problems.counts == {"malformed-mask": 2}


def test_masks_follow_their_boxes_through_mending_and_choosing(tmp_path):
    path = put(tmp_path, [[TRIANGLE], [SQUARE], uncompressed(pixels())])
    content = json.loads(path.read_text())
    content["images"].insert(0, {"id": 1, "file_name": "b.png", "height": HEIGHT, "width": WIDTH})
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    content["annotations"][2]["image_id"] = 1
    content["annotations"].insert(0, {"id": 9, "image_id": 1, "category_id": 5, "bbox": [1, 1, 2, 2]})
    content["annotations"].append("text")
    path.write_text(json.dumps(content))
    (found,) = formats.read(path, check_files=False, masks=True).values()
    assert found.problems.counts == {"degenerate-box": 1, "unknown-category": 1, "malformed-annotation": 1}
    assert np.array_equal(found.masks.encoded(found.rows(0)).decode()[0], pixels())
    assert np.array_equal(found.masks.encoded(found.rows(1)).decode()[0], oracle([SQUARE]))
    turned = found.select([1, 0])
    assert np.array_equal(turned.masks.encoded(turned.rows(0)).decode()[0], oracle([SQUARE]))


FIELD = st.none() | st.integers(-3, 45) | st.floats() | st.just(2**70) | st.sampled_from(["0", "h3", "x", True])
SEGMENTATION = (
    FIELD
    | st.lists(FIELD, max_size=7)
    | st.lists(st.lists(st.floats(-99, 99) | st.integers(-99, 99), max_size=8) | FIELD, max_size=3)
    | st.fixed_dictionaries(
        {},
        optional={
            "size": st.just([HEIGHT, WIDTH]) | FIELD | st.lists(FIELD, max_size=3),
            "counts": st.lists(st.integers(0, 900), max_size=4) | st.text(max_size=9) | FIELD,
        },
    )
)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(segmentations=st.lists(SEGMENTATION, max_size=5))
def test_whatever_stands_for_a_mask_gives_masks_that_can_be_used(tmp_path_factory, segmentations):
    try:
        found = opened(tmp_path_factory.mktemp("fuzz"), segmentations)
    except Error:
        return
    masks = found.masks.encoded(found.rows(0))
    assert len(masks) == len(found.boxes) == len(segmentations)
    if len(masks):
        assert masks.decode().shape == (len(masks), HEIGHT, WIDTH)
        assert masks.areas().tolist() == masks.decode().sum((1, 2)).tolist()
    assert sum(found.problems.counts.values()) == (~masks.known).sum()
