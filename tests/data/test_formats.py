"""What all formats have in common: they are found, told apart, and write what they read."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.data import formats
from detrkit.data.annotations import Annotations, Strings
from detrkit.errors import DataError, Error, UsageError
from detrkit.structures import Category

TABLE = (Category(2, "cat"), Category(5, "dog & co"), Category(9, "ärger"))
PRECISION = {"coco": 1e-9, "voc": 2e-4, "yolo": 1e-5}
SIDE = st.just(1.0) | st.floats(1.5, 30.0).map(lambda side: round(side, 3))
PLACE = st.integers(0, 20) | st.floats(0, 20)
BOX = st.tuples(PLACE, PLACE, SIDE, SIDE, st.integers(0, 2), st.booleans(), st.booleans())


def data_set(root, images, name="{}.png"):
    """Images of 64 × 48 pixels with boxes (x, y, width, height, label, crowd, difficult)."""
    root.mkdir(parents=True, exist_ok=True)
    names = [name.format(index) for index in range(len(images))]
    for file in names:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(root / file)
    rows = [row for image in images for row in image]
    boxes = np.array([(x, y, min(x + w, 64), min(y + h, 48)) for x, y, w, h, *_ in rows], np.float64).reshape(-1, 4)
    return Annotations(
        root=root,
        file_names=Strings(names),
        image_ids=np.arange(len(images)) * 3,
        image_sizes=np.full((len(images), 2), (48, 64), np.int32),
        offsets=np.cumsum([0, *map(len, images)]).astype(np.int64),
        boxes=boxes,
        labels=np.array([row[4] for row in rows], np.int64),
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], 1) / 2,
        crowd=np.array([row[5] for row in rows], bool),
        difficult=np.array([row[6] and not row[5] for row in rows], bool),
        categories=TABLE,
        source="made",
    )


def without_crowd(part):
    kept = ~part.crowd
    counts = np.concatenate([[0], np.cumsum(kept)])[part.offsets]
    return counts, part.boxes[kept], part.labels[kept]


def test_formats_are_found_by_their_modules():
    assert {"coco", "voc", "yolo", "folder"} <= set(formats.names())
    assert not any(name.startswith("_") for name in formats.names())


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(images=st.lists(st.lists(BOX, max_size=4), min_size=1, max_size=4))
@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_what_is_written_is_read_again(tmp_path_factory, format, images):
    base = tmp_path_factory.mktemp("round")
    splits = {
        "train": data_set(base / "one", images, name="nested/{}.png"),
        "val": data_set(base / "two", images[::-1], name="nested/{}.png"),
    }
    formats.write(splits, base / "out", format)
    assert {source.format for source in formats.recognise(base / "out").values()} == {format}
    read = formats.read(base / "out")
    assert set(read) == {"train", "val"}
    for split, before in splits.items():
        after = read[split]
        assert not after.problems.counts
        assert [Path(name).name for name in after.file_names] == [Path(name).name for name in before.file_names]
        assert after.image_sizes.tolist() == before.image_sizes.tolist()
        assert [category.name for category in after.categories] == [category.name for category in TABLE]
        counts, boxes, labels = without_crowd(before)
        again = without_crowd(after)
        assert again[0].tolist() == counts.tolist()
        np.testing.assert_allclose(again[1], boxes, atol=PRECISION[format])
        assert again[2].tolist() == labels.tolist()
        assert all(after.path(index).is_file() for index in range(len(after)))
        if format != "yolo":
            assert after.crowd.tolist() == before.crowd.tolist()
            assert after.difficult.tolist() == before.difficult.tolist()
        if format == "coco":
            assert after.categories == TABLE
            assert after.image_ids.tolist() == before.image_ids.tolist()
            np.testing.assert_allclose(after.areas, before.areas)


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
@pytest.mark.parametrize(
    "names", [("fold1", "minival", "train", "val"), ("all",), ("fold1",), ("test", "hard"), ("a_train", "b")]
)
def test_splits_are_read_again_whatever_their_names(tmp_path, format, names):
    splits = {
        name: data_set(tmp_path / name, [[(1, 1, 9, 9, 1, False, False)]], name=f"{name}{{}}.png") for name in names
    }
    formats.write(splits, tmp_path / "out", format)
    read = formats.read(tmp_path / "out")
    assert set(read) == set(names)
    for name, part in read.items():
        assert Path(part.file_names[0]).name == f"{name}0.png"
        assert [category.name for category in part.categories] == [category.name for category in TABLE]
        assert part.labels.tolist() == [1]


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "folder"])
@pytest.mark.parametrize("copy_images", ["link", "copy"])
def test_two_entries_of_one_image_are_written(tmp_path, format, copy_images):
    box = (1, 1, 9, 9, 0, False, False)
    part = replace(data_set(tmp_path / "in", [[box], [box]]), file_names=Strings(["0.png", "0.png"]))
    formats.write({"train": part}, tmp_path / "out", format, copy_images=copy_images)
    (found,) = formats.read(tmp_path / "out").values()
    assert len(found.boxes) == (0 if format == "folder" else 2)
    assert all(found.path(index).read_bytes() == part.path(0).read_bytes() for index in range(len(found)))


@pytest.mark.parametrize("stated", [(48, 64), (64, 48), (24, 32), (0, 0)])
def test_yolo_gets_fractions_of_the_image_in_the_file(tmp_path, stated):
    part = data_set(tmp_path / "in", [[(1, 2, 9, 9, 0, False, False)]])
    part.image_sizes[0] = stated
    formats.write({"train": part}, tmp_path / "out", "yolo")
    boxes = formats.read(tmp_path / "out")["train"].boxes
    np.testing.assert_allclose(boxes, part.boxes * (2 if stated == (24, 32) else 1), atol=1e-5)
    part.path(0).unlink()
    if stated == (0, 0):
        with pytest.raises(DataError, match=r"0\.png: The size of the image is not known"):
            formats.write({"train": part}, tmp_path / "blind", "yolo", copy_images="none")


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("place", [(5, 5), (0, 0), (63, 47), (5.25, 7.5)])
def test_an_object_of_one_pixel_is_read_again(tmp_path, format, place):
    part = data_set(tmp_path / "in", [[(*place, 1, 1, 0, False, False)]])
    formats.write({"train": part}, tmp_path / "out", format)
    after = formats.read(tmp_path / "out")["train"]
    np.testing.assert_allclose(after.boxes, part.boxes, atol=1.1e-4)
    assert not after.problems.counts


@pytest.mark.parametrize("name", ["a\x01b", "a\nb", "a\x85b", "a\u2028b", " a", "a ", "", "a\ud800"])
def test_names_that_pascal_voc_cannot_hold_are_refused(tmp_path, name):
    part = data_set(tmp_path / "in", [[(1, 1, 9, 9, 0, False, False)]])
    with pytest.raises(DataError, match=r"name of a category cannot stand.*got .*Rename it, or write COCO"):
        formats.write({"train": replace(part, categories=(Category(1, name),))}, tmp_path / "a", "voc")
    if "\ud800" not in name:
        with pytest.raises(DataError, match="name of an image cannot stand"):
            formats.write(
                {"train": replace(part, file_names=Strings([f"{name}.png" if name else ""]))}, tmp_path / "b", "voc"
            )


def test_names_that_pascal_voc_holds_are_read_again(tmp_path):
    names = ("a <b> & c", "ä\u00a0b", "a\tb", "\U0001f469\u200d\U0001f52c", "日本")
    part = data_set(tmp_path / "in", [[(1, 1, 9, 9, 0, False, False)]])
    table = tuple(Category(number, name) for number, name in enumerate(names))
    formats.write({"train": replace(part, categories=table)}, tmp_path / "out", "voc")
    after = formats.read(tmp_path / "out")["train"]
    assert [category.name for category in after.categories] == list(names)
    assert not after.problems.counts


@pytest.mark.parametrize(
    ("names", "format", "message"),
    [
        (("trainval", "train"), "voc", "lists of other things.*got trainval, train.*write COCO"),
        (("trainval", "train", "val"), "voc", "lists of other things"),
        (("train", "hard_test"), "voc", "lists of other things"),
        (("val", "valid"), "yolo", "would be one"),
    ],
)
def test_splits_that_would_be_lost_are_refused(tmp_path, names, format, message):
    part = data_set(tmp_path / "in", [[]])
    with pytest.raises((DataError, UsageError), match=message):
        formats.write(dict.fromkeys(names, part), tmp_path / "out", format)


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_images_that_differ_in_their_suffix_keep_their_own_labels(tmp_path, format):
    part = data_set(tmp_path / "in", [[(1, 1, 9, 9, 0, False, False)], [(5, 5, 9, 9, 1, False, False)]])
    (tmp_path / "in" / "1.png").rename(tmp_path / "in" / "0.bmp")
    part.file_names.__init__(["0.png", "0.bmp"])
    formats.write({"all": part}, tmp_path / "out", format)
    (after,) = formats.read(tmp_path / "out").values()
    order = np.argsort([not name.endswith("0.png") for name in after.file_names])
    assert after.labels[order].tolist() == [0, 1]
    assert len(after) == 2


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "folder"])
@pytest.mark.parametrize("copy_images", ["link", "copy", "none", True, False])
def test_images_are_linked_copied_or_left(tmp_path, format, copy_images):
    part = data_set(tmp_path / "in", [[(1, 1, 9, 9, 0, False, False)]])
    formats.write({"train": part}, tmp_path / "out", format, copy_images=copy_images)
    images = list((tmp_path / "out").rglob("*.png"))
    assert len(images) == (0 if copy_images in ("none", False) else 1)
    for image in images:
        assert image.samefile(part.path(0)) == (copy_images == "link")
        assert image.read_bytes() == part.path(0).read_bytes()


def test_a_missing_image_cannot_be_written(tmp_path):
    part = data_set(tmp_path / "in", [[]])
    part.path(0).unlink()
    with pytest.raises(DataError, match=r"0\.png: The image cannot be copied.*copy_images"):
        formats.write({"train": part}, tmp_path / "out", "coco")


def test_nothing_is_written_over(tmp_path):
    part = data_set(tmp_path / "in", [[]])
    with pytest.raises(UsageError, match="not empty"):
        formats.write({"train": part}, tmp_path / "in", "coco")


@pytest.mark.parametrize(
    ("splits", "format", "message"),
    [
        ({}, "coco", "no split"),
        ({"a": None}, "tar", "Unknown format 'tar'.*coco, coco_panoptic, folder, .*voc, yolo"),
        ({"../a": None}, "coco", "split's name"),
        ({"": None}, "coco", "split's name"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tmp_path, splits, format, message):
    part = data_set(tmp_path / "in", [[]])
    with pytest.raises(UsageError, match=message):
        formats.write(dict.fromkeys(splits, part), tmp_path / "out", format)


def test_tables_that_a_format_cannot_express_are_refused(tmp_path):
    part = data_set(tmp_path / "in", [[]])
    twice = replace(part, categories=(Category(1, "a"), Category(2, "a")))
    with pytest.raises(DataError, match="name that stands twice"):
        formats.write({"train": twice}, tmp_path / "voc", "voc")
    for format in ("voc", "yolo"):
        with pytest.raises(DataError, match="one category table"):
            formats.write({"train": part, "val": twice}, tmp_path / f"{format}2", format)
    formats.write({"train": part, "val": part.select([])}, tmp_path / "coco", "coco")
    assert formats.read(tmp_path / "coco", check_files=False)["val"].summary().startswith("0 images")


def test_splits_with_different_tables_share_their_union(tmp_path):
    train = data_set(tmp_path / "in", [[(1, 1, 9, 9, 2, False, False)]])
    val = replace(train, categories=(Category(9, "ärger"),), labels=np.zeros(1, np.int64))
    formats.write({"train": train, "val": val}, tmp_path / "out", "coco")
    read = formats.read(tmp_path / "out")
    assert read["train"].categories == read["val"].categories == TABLE
    assert read["val"].labels.tolist() == [2]
    for name, other in (("name", Category(9, "other")), ("kind", Category(9, "ärger", is_thing=False))):
        formats.write({"train": train, "val": replace(val, categories=(other,))}, tmp_path / name, "coco")
    with pytest.raises(DataError, match=r"id 9 is 'ärger' \(a thing\) in one and 'other' \(a thing\) in another"):
        formats.read(tmp_path / "name")
    with pytest.raises(DataError, match=r"'ärger' \(a thing\) in one and 'ärger' \(stuff\) in another.*isthing"):
        formats.read(tmp_path / "kind")


def test_two_formats_in_one_folder_are_refused(tmp_path):
    part = data_set(tmp_path / "in", [[(1, 1, 9, 9, 0, False, False)]])
    formats.write({"train": part}, tmp_path / "out", "coco")
    formats.write({"train": part}, tmp_path / "other", "yolo")
    (tmp_path / "other").rename(tmp_path / "out" / "inner")
    (tmp_path / "out" / "inner" / "data.yaml").rename(tmp_path / "out" / "data.yaml")
    (tmp_path / "out" / "inner" / "images").rename(tmp_path / "out" / "images")
    with pytest.raises(
        DataError, match=r"More than one format.*coco: .*yolo: .*--annotations coco .*pass the annotation file"
    ):
        formats.recognise(tmp_path / "out")
    assert formats.recognise(tmp_path / "out" / "data.yaml")["train"].format == "yolo"
    for format in ("coco", "yolo"):
        assert formats.recognise(tmp_path / "out", annotations=format)["train"].format == format
    with pytest.raises(UsageError, match="no such format of annotations; got tar; expected coco, "):
        formats.recognise(tmp_path / "out", annotations="tar")


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    part = data_set(tmp_path / "in", [[]])
    formats.write({"train": part, "val": part}, tmp_path / "out", "coco")
    assert list(formats.read(tmp_path / "out", "validation")) == ["val"]
    with pytest.raises(DataError, match="no split 'test'; got train, val"):
        formats.read(tmp_path / "out", "test")


def test_what_is_no_data_set_is_refused_with_what_was_found_and_expected(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        formats.recognise(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"got an empty folder; expected coco: .*folder: .*voc: .*yolo: "):
        formats.recognise(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="got a file of 1 bytes"):
        formats.recognise(tmp_path / "a.csv")


@pytest.mark.parametrize("failure", [OSError(errno.EFBIG, os.strerror(errno.EFBIG)), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_what_cannot_be_written_to_its_end_leaves_nothing(tmp_path, monkeypatch, format, failure):
    def fail(self, *_, **__):
        raise failure

    part = data_set(tmp_path / "images", [[(1, 1, 9, 9, 0, False, False)]])
    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(Path, "open", fail)
    raised, said = (KeyboardInterrupt, None)
    if isinstance(failure, OSError):
        raised, said = (Error, "out: The folder cannot be written.*too large.*Make room")
    with pytest.raises(raised, match=said):
        formats.write({"train": part}, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "images" / "0.png").stat().st_size > 0
