"""Panoptic files: segments with their pictures, found, read, told apart from objects, and written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.data import formats
from detrkit.data.annotations import Strings
from detrkit.data.segment_files import SegmentFiles, from_colours, read_numbers, runs_of, to_colours
from detrkit.errors import DataError, Error
from detrkit.masks import RunLengths
from detrkit.structures import Category

HEIGHT, WIDTH = 24, 32
TABLE = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
    {"id": 9, "name": "dog", "isthing": 1},
]
PERSON, SKY, CROWD = 70_000, 300, 5


def numbers():
    """A picture of three segments and a part that belongs to none."""
    values = np.zeros((HEIGHT, WIDTH), np.int32)
    values[:10] = SKY
    values[6:20, 4:12] = PERSON
    values[12:22, 20:30] = CROWD
    return values


def segment(number, category, values, **others):
    rows, columns = np.nonzero(values == number)
    box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1] if len(rows) else []
    return {"id": number, "category_id": category, "bbox": box, "area": len(rows), "iscrowd": 0} | others


def put(root, change=lambda content: None, split="train", pictures="annotations/panoptic_{}", values=None):
    """A data set of one image; `change` may spoil what its JSON says."""
    values = numbers() if values is None else values
    segments = [segment(PERSON, 1, values), segment(SKY, 7, values), segment(CROWD, 9, values, iscrowd=1)]
    content = {
        "images": [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 3, "file_name": "a.png", "segments_info": segments}],
        "categories": TABLE,
    }
    change(content)
    folder = root / pictures.format(split)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    path = root / "annotations" / f"panoptic_{split}.json"
    path.write_text(json.dumps(content))
    to_colours(values).save(folder / "a.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / split / "a.jpg")
    return path


def decoded(part, index=0):
    return part.masks.encoded(part.rows(index)).decode()


def test_segments_are_objects_with_masks(tmp_path):
    put(tmp_path)
    found = formats.read(tmp_path, masks=True)["train"]
    assert found.categories == (Category(1, "person"), Category(7, "sky", is_thing=False), Category(9, "dog"))
    assert found.labels.tolist() == [0, 1, 2]
    assert found.boxes.tolist() == [[4, 6, 12, 20], [0, 0, 32, 10], [20, 12, 30, 22]]
    assert found.areas.tolist() == [14 * 8, 10 * 32 - 4 * 8, 100]
    assert found.crowd.tolist() == [False, False, True]
    assert np.array_equal(decoded(found), numbers()[None] == np.array([PERSON, SKY, CROWD])[:, None, None])
    assert not found.problems.counts
    assert formats.read(tmp_path)["train"].masks is None


@pytest.mark.parametrize("pictures", ["panoptic_{}", "annotations/panoptic_{}"])
def test_pictures_are_found_beside_the_file_or_its_folder(tmp_path, pictures):
    put(tmp_path, pictures=pictures)
    assert decoded(formats.read(tmp_path, masks=True)["train"]).any((1, 2)).all()


def test_segments_of_many_images_keep_to_their_pictures(tmp_path):
    def more(content):
        content["images"] += [content["images"][0] | {"id": 4, "file_name": "b.jpg"}]
        other = [{"id": 2, "category_id": 9, "bbox": [0, 0, 5, 5]}, {"id": 8, "category_id": 1, "bbox": [0, 0, 9, 9]}]
        content["annotations"].insert(0, {"image_id": 4, "file_name": "b.png", "segments_info": other})

    path = put(tmp_path, more)
    values = np.random.default_rng(0).integers(0, 9, (HEIGHT, WIDTH))
    to_colours(values).save(tmp_path / "annotations" / "panoptic_train" / "b.png")
    found = formats.read(path, check_files=False, masks=True)["train"]
    assert np.array_equal(decoded(found, 1), values[None] == np.array([2, 8])[:, None, None])
    assert np.array_equal(found.masks.encoded(slice(1, 4)).decode()[[0, 2]], np.stack([numbers() == SKY, values == 2]))
    turned = found.select([1, 0])
    assert np.array_equal(decoded(turned, 1)[0], numbers() == PERSON)


def test_objects_are_meant_where_a_file_of_segments_stands_beside_unless_one_says_so(tmp_path):
    path = put(tmp_path)
    box = {"id": 1, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}
    content = json.loads(path.read_text()) | {"annotations": [box]}
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    assert formats.recognise(tmp_path)["train"].format == "coco"
    assert len(formats.read(tmp_path)["train"].boxes) == 1
    assert len(formats.read(tmp_path, annotations="coco_panoptic")["train"].boxes) == 3
    assert formats.recognise(path)["train"].format == "coco_panoptic"
    other = path.rename(tmp_path / "annotations" / "segments.json")  # no name tells it, but its first annotation does
    assert {source.format for source in formats.recognise(other).values()} == {"coco_panoptic"}
    with pytest.raises(DataError, match=r"No data set is recognised.*expected yolo: "):
        formats.recognise(tmp_path, annotations="yolo")


@pytest.mark.parametrize(
    ("change", "kind", "known"),
    [
        (lambda one: one.update(id=0), "malformed-mask", [False, True, True]),
        (lambda one: one.update(id=2**24), "malformed-mask", [False, True, True]),
        (lambda one: one.update(id="70000"), "malformed-mask", [False, True, True]),
        (lambda one: one.update(id=True), "malformed-mask", [False, True, True]),
        (lambda one: one.update(category_id=2), "unknown-category", [True, True]),
        (lambda one: one.update(bbox=[1, 2, 0, 0]), "degenerate-box", [True, True]),
        (lambda one: one.update(bbox=None), "malformed-box", [True, True]),
        (lambda one: one.update(bbox=[-9, 2, 13, 4]), "outside-box", [True, True, True]),
    ],
)
def test_each_problem_of_a_segment_is_counted_by_its_name(tmp_path, change, kind, known):
    put(tmp_path, lambda content: change(content["annotations"][0]["segments_info"][0]))
    found = formats.read(tmp_path, masks=True)["train"]
    assert found.problems.counts == {kind: 1}
    assert "segment " in found.problems.examples[kind][0]
    assert " of a.png" in found.problems.examples[kind][0]
    assert found.masks.encoded(found.rows(0)).known.tolist() == known


@pytest.mark.parametrize("spoilt", ["text", {"image_id": 3}, {"segments_info": [1]}, {"segments_info": None}])
def test_annotations_that_are_no_lists_of_segments_are_counted(tmp_path, spoilt):
    put(tmp_path, lambda content: content["annotations"].append(spoilt))
    found = formats.read(tmp_path, check_files=False, masks=True)["train"]
    assert found.problems.counts == {"malformed-annotation": 1}
    assert len(found.boxes) == 3


def test_a_segment_that_its_picture_lacks_has_no_mask(tmp_path):
    values = numbers()
    put(
        tmp_path,
        values=np.where(values == SKY, 0, values),
        change=lambda c: c["annotations"][0]["segments_info"][1].update(bbox=[0, 0, 5, 5]),
    )
    found = formats.read(tmp_path, masks=True)["train"]
    assert found.masks.encoded(found.rows(0)).known.tolist() == [True, False, True]


def test_pictures_that_are_missing_damaged_or_of_another_size_are_counted(tmp_path):
    def more(content):
        for number, name in enumerate("bcd", 4):
            content["images"].append(content["images"][0] | {"id": number, "file_name": f"{name}.jpg"})
            content["annotations"].append(content["annotations"][0] | {"image_id": number, "file_name": f"{name}.png"})
        content["annotations"][-1] = content["annotations"][-1] | {"file_name": None}

    path = put(tmp_path, more)
    for name in "bcd":
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / f"{name}.jpg")
    to_colours(numbers()[:-1]).save(tmp_path / "annotations" / "panoptic_train" / "c.png")
    found = formats.read(path, masks=True)["train"]
    assert found.problems.counts == {"missing-mask-file": 2, "missing-mask": 6, "mask-size-mismatch": 3}
    assert "b.png" in found.problems.examples["missing-mask-file"][0]
    assert [found.masks.encoded(found.rows(index)).known.all() for index in range(4)] == [True, False, False, False]
    (tmp_path / "annotations" / "panoptic_train" / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"No object has a mask; got 12 boxes, .*2 × missing-mask-file"):
        formats.read(path, masks=True)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    path = put(tmp_path)
    picture = tmp_path / "annotations" / "panoptic_train" / "a.png"
    found = formats.read(path, check_files=False, masks=True)["train"]
    picture.write_bytes(picture.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.png: The image (file is truncated|cannot be decoded)"):
        found.masks.encoded(found.rows(0))
    to_colours(numbers()[:-1]).save(picture)
    with pytest.raises(DataError, match=r"a\.png: .*not of its image's size; got 23 × 32 pixels; expected 24 × 32"):
        found.masks.encoded(found.rows(0))
    picture.unlink()
    with pytest.raises(DataError, match=r"a\.png: There is no such image file"):
        found.masks.encoded(found.rows(0))


def test_a_picture_of_too_many_pixels_is_refused_unread(tmp_path, monkeypatch):
    path = put(tmp_path)
    found = formats.read(path, masks=True)["train"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(DataError, match=r"a\.png: The image has too many pixels"):
        found.masks.encoded(found.rows(0))
    with pytest.raises(DataError, match="1 × unreadable-mask-file"):
        formats.read(tmp_path / "annotations" / "panoptic_train.json", masks=True)


def test_names_that_lead_outside_are_refused(tmp_path):
    put(tmp_path, lambda content: content["annotations"][0].update(file_name="../../a.png"))
    with pytest.raises(DataError, match="unsafe-path"):
        formats.read(tmp_path)


def test_runs_of_a_picture_are_those_of_its_masks(rng):
    values = rng.integers(0, 4, (13, 9)) * rng.integers(0, 2, (13, 9))
    wanted = np.array([3, 1, 2, 8])
    runs = runs_of(values, wanted)
    assert runs.known.tolist() == [True, True, True, False]
    assert runs[:3].to_coco() == RunLengths.encode(values[None] == wanted[:3, None, None]).to_coco()
    assert np.array_equal(runs_of(np.full((3, 4), 9), np.array([9])).decode()[0], np.ones((3, 4), bool))


@pytest.mark.parametrize(
    ("mode", "high"), [("L", 255), ("P", 255), ("I;16", 65535), ("1", 1), ("LA", 255), ("RGB", 255**3)]
)
def test_numbers_are_read_from_pictures_of_every_mode(tmp_path, rng, mode, high):
    values = rng.integers(0, high + 1, (7, 5))
    if mode == "RGB":
        picture = to_colours(values)
    elif mode == "LA":
        picture = Image.merge("LA", [Image.fromarray(part.astype(np.uint8)) for part in (values, 255 - values)])
    elif mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        picture = Image.fromarray(values.astype(bool))
    else:
        picture = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            picture = picture.copy()
            picture.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_numbers(tmp_path / "a.png"), values)


def test_numbers_travel_through_colours(rng):
    values = rng.integers(0, 256**3, (6, 7))
    assert np.array_equal(from_colours(np.asarray(to_colours(values))), values)
    assert to_colours(np.array([[PERSON]])).getpixel((0, 0)) == (PERSON % 256, PERSON // 256 % 256, PERSON // 65536)


def test_a_picture_of_fractions_holds_no_numbers(tmp_path):
    Image.fromarray(np.zeros((3, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: .*does not hold whole numbers; got mode F"):
        read_numbers(tmp_path / "a.tif")


@pytest.mark.parametrize("format", ["coco", "coco_panoptic"])
def test_what_is_written_has_the_same_masks(tmp_path, format):
    put(tmp_path / "in", split="train")
    put(tmp_path / "in", split="val", values=numbers()[::-1])
    before = formats.read(tmp_path / "in", masks=True)
    formats.write(before, tmp_path / "out", format)
    after = formats.read(tmp_path / "out", masks=True)
    assert {source.format for source in formats.recognise(tmp_path / "out").values()} == {format}
    for split, part in before.items():
        again = after[split]
        assert again.categories == part.categories
        for column in ("labels", "boxes", "areas", "crowd", "image_ids", "image_sizes"):
            assert getattr(again, column).tolist() == getattr(part, column).tolist()
        assert np.array_equal(decoded(again), decoded(part))
        assert not again.problems.counts


def test_where_masks_overlap_the_small_one_lies_on_top_and_crowds_below(tmp_path):
    put(tmp_path / "in")
    part = formats.read(tmp_path / "in", masks=True)["train"]
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, 2:12, 2:12] = masks[1, 4:6, 4:6] = masks[2, 5:7, 5:7] = True  # the crowd is the smallest
    formats.write({"train": replace(part, masks=RunLengths.encode(masks))}, tmp_path / "out", "coco_panoptic")
    after = formats.read(tmp_path / "out", masks=True)["train"]
    large, small = decoded(after)
    assert np.array_equal(small, masks[1])
    assert np.array_equal(large, masks[0] & ~masks[1])
    assert after.areas.tolist() == [96, 4]
    assert after.labels.tolist() == [0, 1]


def test_what_has_no_masks_is_not_written_as_panoptic(tmp_path):
    put(tmp_path / "in")
    part = formats.read(tmp_path / "in")["train"]
    with pytest.raises(DataError, match="Panoptic annotations need masks; got 3 boxes without masks"):
        formats.write({"train": part}, tmp_path / "out", "coco_panoptic")
    unknown = RunLengths.joined([RunLengths.unknown(np.full((1, 2), 24)), RunLengths.encode(numbers()[None] == SKY)])
    some = replace(part.select([0]), masks=unknown[[0, 1, 0]])
    formats.write({"train": some}, tmp_path / "some", "coco_panoptic")
    assert len(formats.read(tmp_path / "some", masks=True)["train"].boxes) == 1
    sizeless = replace(part.select([0]), masks=unknown[[0, 1, 0]], image_sizes=np.zeros((1, 2), np.int32))
    with pytest.raises(DataError, match=r"a\.jpg: The size of the image is not known"):
        formats.write({"train": sizeless}, tmp_path / "none", "coco_panoptic")


def test_places_of_masks_are_arrays_that_forked_workers_share():
    part = SegmentFiles(Path(), Strings(["a.png"]), np.zeros((1, 2)), np.zeros(9), np.zeros(9))
    assert all(isinstance(column, np.ndarray) for column in (part.sizes, part.files, part.numbers))
    assert len(part[np.array([3, 4])]) == len(part[2:4]) == 2


FIELD = (
    st.none() | st.integers(-3, 3) | st.just(2**70) | st.floats() | st.sampled_from(["1", "a.png", "", True, [], {}])
)
SEGMENT = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "category_id", "bbox", "area", "iscrowd"), FIELD))
ANNOTATION = st.fixed_dictionaries(
    {}, optional={"image_id": FIELD, "file_name": FIELD, "segments_info": st.lists(SEGMENT | FIELD, max_size=3) | FIELD}
)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(annotations=st.lists(ANNOTATION | FIELD, max_size=4), masks=st.booleans(), check_files=st.booleans())
def test_whatever_stands_in_a_file_gives_sound_columns_or_an_error_of_ours(
    tmp_path_factory, annotations, masks, check_files
):
    root = tmp_path_factory.mktemp("fuzz")
    path = put(root, lambda content: content["annotations"].extend(annotations))
    try:
        (found,) = formats.read(path, masks=masks, check_files=check_files).values()
    except Error:
        return
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert len(found.boxes) >= 3
    if masks and check_files:
        assert found.masks.encoded(slice(0, len(found.boxes))).known.sum() >= 3
