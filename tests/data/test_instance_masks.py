"""Images with pictures that number their objects."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from detrkit.data import formats
from detrkit.errors import DataError
from detrkit.masks import RunLengths
from detrkit.structures import Category

HEIGHT, WIDTH = 20, 30


def numbers():
    values = np.zeros((HEIGHT, WIDTH), np.int64)
    values[2:8, 3:9] = 1
    values[15:17, 3:9] = 1
    values[10:20, 20:30] = 7
    values[0, 29] = 255
    return values


def put(root, images, masks, name="a.png", mask="a.png", values=None, kind=np.uint8):
    for folder, file, pixels in (
        (images, name, np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        (masks, mask, (numbers() if values is None else values).astype(kind)),
    ):
        path = root / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def test_objects_are_the_numbers_of_a_picture(tmp_path):
    put(tmp_path, "images", "masks")
    put(tmp_path, "images", "masks", "nested/b.jpg", "nested/b_mask.png", values=numbers() * 200, kind=np.uint16)
    found = formats.read(tmp_path, masks=True)["all"]
    assert list(found.file_names) == ["a.png", "nested/b.jpg"]
    assert found.boxes[:3].tolist() == found.boxes[3:].tolist() == [[3, 2, 9, 17], [20, 10, 30, 20], [29, 0, 30, 1]]
    assert found.areas.tolist() == [48, 100, 1] * 2
    assert found.categories == (Category(1, "object"),)
    assert found.image_sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    for index in range(2):
        masks = found.masks.encoded(found.rows(index)).decode()
        assert np.array_equal(masks, numbers()[None] == np.array([1, 7, 255])[:, None, None])
    assert not found.problems.counts
    assert formats.read(tmp_path)["all"].masks is None


def test_indices_of_a_palette_are_numbers_whatever_their_colours(tmp_path):
    put(tmp_path, "PNGImages", "PedMasks", "Fudan1.png", "Fudan1_mask.png")
    picture = Image.fromarray(numbers().astype(np.uint8))
    picture.putpalette([9, 9, 9] * 256)  # all alike to the eye
    picture.save(tmp_path / "PedMasks" / "Fudan1_mask.png")
    found = formats.read(tmp_path, masks=True)["all"]
    assert found.areas.tolist() == [48, 100, 1]
    assert found.categories == (Category(1, "person"),)


@pytest.mark.parametrize(("images", "masks"), [("{}/images", "{}/masks"), ("images/{}", "masks/{}")])
def test_splits_are_found(tmp_path, images, masks):
    for split in ("train", "valid"):
        put(tmp_path, images.format(split), masks.format(split), mask="a.tif")
    (tmp_path / "classes.txt").write_text("cell\n")
    found = formats.read(tmp_path, masks=True)
    assert sorted(found) == ["train", "val"]
    assert found["val"].categories == (Category(1, "cell"),)
    assert len(found["val"].boxes) == 3
    put(tmp_path, images.format("val"), masks.format("val"))
    with pytest.raises(DataError, match="Two folders could be the split 'val'"):
        formats.recognise(tmp_path)


def test_what_cannot_be_used_is_counted_and_left_out(tmp_path):
    for name in "abcde":
        put(tmp_path, "images", "masks", f"{name}.png", f"{name}.png")
    (tmp_path / "masks" / "b.png").unlink()
    (tmp_path / "masks" / "c.png").write_bytes((tmp_path / "masks" / "c.png").read_bytes()[:-30])
    Image.fromarray(numbers()[1:].astype(np.uint8)).save(tmp_path / "masks" / "d.png")
    (tmp_path / "images" / "e.png").write_bytes(b"")
    found = formats.read(tmp_path, masks=True)["all"]
    assert list(found.file_names) == ["a.png", "b.png"]
    assert np.diff(found.offsets).tolist() == [3, 0]
    assert found.problems.counts == {
        "unannotated-image": 1,
        "unreadable-mask-file": 2,
        "unreadable-image": 1,
    }
    assert all(f"{name}.png" in str(found.problems.examples.values()) for name in "bcde")
    Image.fromarray(numbers()[1:].astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"No picture of masks can be used; got .*3 × unreadable-mask-file"):
        formats.read(tmp_path)


def test_several_categories_are_refused(tmp_path):
    put(tmp_path, "images", "masks")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"classes\.txt: .*know one category; got 2 lines"):
        formats.read(tmp_path)


@pytest.mark.parametrize("other", ["coco", "voc", "yolo"])
def test_files_that_list_objects_are_meant_where_there_are_some(tmp_path, other):
    put(tmp_path / "in", "images", "masks")
    part = formats.read(tmp_path / "in", masks=True)["all"]
    formats.write({"all": part}, tmp_path / "out", other)
    put(tmp_path / "out", "images", "masks")
    assert {source.format for source in formats.recognise(tmp_path / "out").values()} == {other}
    found = formats.recognise(tmp_path / "out", annotations="instance_masks")
    assert {source.format for source in found.values()} == {"instance_masks"}


def test_folders_without_masks_are_images_alone(tmp_path):
    put(tmp_path, "images", "masks", mask="other.png")
    assert formats.recognise(tmp_path)["all"].format == "folder"


@pytest.mark.parametrize("format", ["coco", "coco_panoptic", "instance_masks"])
def test_what_is_written_has_the_same_masks(tmp_path, format):
    put(tmp_path / "in", "train/images", "train/masks")
    put(tmp_path / "in", "val/images", "val/masks", "deep/b.png", "deep/b.png", values=numbers()[::-1])
    (tmp_path / "in" / "classes.txt").write_text("cell")
    before = formats.read(tmp_path / "in", masks=True)
    formats.write(before, tmp_path / "out", format)
    assert {source.format for source in formats.recognise(tmp_path / "out").values()} == {format}
    after = formats.read(tmp_path / "out", masks=True)
    for split, part in before.items():
        again = after[split]
        assert again.categories == part.categories
        assert list(again.file_names) == list(part.file_names)
        for column in ("labels", "boxes", "areas", "image_sizes"):
            assert getattr(again, column).tolist() == getattr(part, column).tolist()
        assert again.masks.encoded(again.rows(0)).to_coco() == part.masks.encoded(part.rows(0)).to_coco()
        assert not again.problems.counts


def test_what_pictures_cannot_hold_is_refused_or_left_out(tmp_path):
    put(tmp_path / "in", "images", "masks")
    part = formats.read(tmp_path / "in", masks=True)["all"]
    two = replace(part, categories=(Category(1, "a"), Category(2, "b")))
    for number, wrong in enumerate((two, replace(part, masks=None))):
        with pytest.raises(DataError, match="need masks, and know one category; got 3 boxes of "):
            formats.write({"all": wrong}, tmp_path / str(number), "instance_masks")
    with pytest.raises(DataError, match="no place for splits of other names; got train, holdout"):
        formats.write({"train": part, "holdout": part}, tmp_path / "split", "instance_masks")
    crowd = replace(part, crowd=np.array([False, True, False]))
    formats.write({"all": crowd}, tmp_path / "crowd", "instance_masks")
    assert formats.read(tmp_path / "crowd")["all"].areas.tolist() == [48, 1]
    unknown = RunLengths.joined([part.masks.encoded(slice(0, 2)), RunLengths.unknown(np.array([[HEIGHT, WIDTH]]))])
    formats.write({"all": replace(part, masks=unknown)}, tmp_path / "unknown", "instance_masks")
    assert formats.read(tmp_path / "unknown")["all"].areas.tolist() == [48, 100]
