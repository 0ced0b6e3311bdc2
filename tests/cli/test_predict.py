"""`detrkit predict`: which images, where pictures go, files, unreadable images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.cli import predict
from detrkit.cli._images import find_images
from detrkit.data import formats
from detrkit.errors import DataError, UsageError
from detrkit.predict import load


@pytest.fixture
def images(tmp_path):
    """Two folders with an image of the same name, and one deeper."""
    root = tmp_path / "images"
    rng = np.random.default_rng(1)
    for name in ("a/1.png", "a/deep/2.jpg", "b/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / name)
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / ".hidden.png").write_text("no image")
    return root


def found_in(wanted: list[str], out: Path) -> dict[Path, str]:
    """What is found where there is nothing to note."""
    notes: list[str] = []
    found = find_images(wanted, out, notes.append)
    assert not notes
    return found


def names(found: dict[Path, str], root: Path) -> dict[str, str]:
    return {file.relative_to(root).as_posix(): name for file, name in found.items()}


def test_folders_are_searched_and_names_stay_relative(images, tmp_path):
    found = found_in([str(images / "a")], tmp_path / "out")
    assert names(found, images) == {"a/1.png": "1.png", "a/deep/2.jpg": "deep/2.jpg"}


def test_equal_names_are_told_apart(images, tmp_path):
    wanted = [str(images / "a"), str(images / "b" / "1.png")]
    found = found_in(wanted, tmp_path / "out")
    assert names(found, images) == {"a/1.png": "a/1.png", "a/deep/2.jpg": "a/deep/2.jpg", "b/1.png": "b/1.png"}


def test_patterns_and_doubles(images, tmp_path):
    wanted = [str(images / "**" / "*.jpg"), str(images / "a" / "deep"), str(images / "a" / "*")]
    found = found_in(wanted, tmp_path / "out")
    assert names(found, images) == {"a/1.png": "1.png", "a/deep/2.jpg": "2.jpg"}


def test_a_file_whose_name_holds_a_pattern(images, tmp_path):
    odd = images / "a" / "x[1].png"
    shutil.copy(images / "a" / "1.png", odd)
    assert found_in([str(odd)], tmp_path / "out") == {odd: "x[1].png"}


def test_pictures_get_a_suffix_that_can_be_written(images, tmp_path):
    odd = images / "photo"
    shutil.copy(images / "a" / "1.png", odd)
    assert found_in([str(odd)], tmp_path / "out") == {odd: "photo.jpg"}
    even = images / "photo.jpg"
    even.write_bytes(odd.read_bytes())
    for given in ([odd, even], [even, odd]):
        found = found_in([str(file) for file in given], tmp_path / "out")
        assert found == {odd: "photo.jpg.jpg", even: "photo.jpg"}


def test_the_output_folder_is_not_searched(images):
    out = images / "found"
    out.mkdir()
    shutil.copy(images / "a" / "1.png", out / "old.png")
    assert len(found_in([str(images)], out)) == 3


def test_images_are_not_overwritten(images):
    with pytest.raises(UsageError, match="overwrite"):
        found_in([str(images / "a" / "1.png")], images / "a")


@pytest.mark.parametrize("wanted", ["none.jpg", "none*.jpg", "empty"])
def test_nothing_found(tmp_path, wanted):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=wanted.partition("*")[0]):
        found_in([str(tmp_path / wanted)], tmp_path / "out")


@pytest.mark.parametrize("wanted", ["", "**/*"])
def test_pictures_of_kinds_that_are_not_read_are_told(tmp_path, wanted):
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "b.HEIC", "notes.txt", ".c.gif"):
        (tmp_path / "in" / name).touch()
    with pytest.raises(DataError, match=r"No image is found; got 2 × unread-image.*for example .*a\.gif"):
        found_in([str(tmp_path / "in" / wanted)], tmp_path / "out")
    (tmp_path / "in" / "up.JPG").touch()
    notes: list[str] = []
    assert list(find_images([str(tmp_path / "in" / wanted)], tmp_path / "out", notes.append).values()) == ["up.JPG"]
    assert len(notes) == 1
    assert notes[0].startswith("2 × unread-image (noted): ")
    (tmp_path / "in" / "up.CR2").touch()  # the raw form of a picture that is read
    find_images([str(tmp_path / "in" / wanted)], tmp_path / "out", notes.append)
    assert notes[1] == notes[0]


def test_where_hardly_anything_is_found_the_threshold_is_named(detrkit, images, trained, tmp_path):
    said = detrkit("predict", trained, images, "--out", tmp_path / "found", "--threshold", "1")
    assert said.code == 0
    assert "Hardly anything scores 1 or more." in said.err
    assert "a lower --threshold" in said.err


def test_pictures_lines_and_files(detrkit, images, trained, tmp_path):
    out = tmp_path / "found"
    said = detrkit("predict", trained, images, "--out", out, "--threshold", "0")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(images / name) for name in ("a/1.png", "a/deep/2.jpg", "b/1.png")
    ]
    assert "15 objects in 3 images" in said.err
    assert "Hardly anything" not in said.err
    for name in ("a/1.png", "a/deep/2.jpg", "b/1.png"):
        with Image.open(out / name) as picture:
            assert picture.size == (50, 40)
        assert (out / name).read_bytes() != (images / name).read_bytes()
    detections = json.loads((out / "detections.json").read_text())
    first = detections["images"][0]
    assert (first["file"], first["picture"]) == (str(images / "a/1.png"), "a/1.png")
    assert (first["height"], first["width"]) == (40, 50)
    assert len(first["boxes"]) == len(first["scores"]) == len(first["names"]) == 5
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert predict.summary(first["names"]) == lines[0].partition(": ")[2]


def test_pictures_of_an_earlier_run_are_told_apart(detrkit, images, trained, tmp_path):
    out = tmp_path / "found"
    assert "lay there before" not in detrkit("predict", trained, images, "--out", out).err
    said = detrkit("predict", trained, images / "b", "--out", out)
    assert "3 other pictures in it, such as a/1.png, lay there before." in said.err
    said = detrkit("predict", trained, images, "--out", out, "--no-pictures")
    assert "4 other pictures in it, such as 1.png, lay there before." in said.err


def test_the_coco_file_is_a_data_set(detrkit, images, trained, tmp_path):
    out = tmp_path / "found"
    detrkit("predict", trained, images, "--out", out, "--threshold", "0", "--no-pictures")
    assert sorted(entry.name for entry in out.iterdir()) == ["detections.json", "results.coco.json"]
    document = json.loads((out / "results.coco.json").read_text())
    assert [(image["id"], image["file_name"]) for image in document["images"]] == [
        *((1, "a/1.png"), (2, "a/deep/2.jpg"), (3, "b/1.png")),
    ]
    assert all(0 <= box["score"] <= 1 for box in document["annotations"])
    beside = shutil.copy(out / "results.coco.json", images)
    (annotations,) = formats.read(beside).values()
    assert len(annotations) == 3
    assert {category.name for category in annotations.categories} == {"nut", "bolt"}


def test_pictures_with_boxes_on_them_are_no_data_set(detrkit, images, trained, tmp_path):
    out = tmp_path / "found"
    assert detrkit("predict", trained, images, "--out", out).code == 0
    for data in (out, out / "results.coco.json"):
        said = detrkit("train", data, "--out", tmp_path / "run")
        assert said.code == 3
        assert f"{out}: This is what predict or find wrote, and no data set" in said.err
        assert "Copy results.coco.json alone to the original images and name it there" in said.err
    assert not (tmp_path / "run").exists()
    (images / "detections.json").write_text("[]")  # of another program, beside a file that is named
    shutil.copy(out / "results.coco.json", images)
    assert detrkit("inspect", images).code == 0
    (images / "detections.json").write_bytes((out / "detections.json").read_bytes())
    (images / "results.coco.json").rename(images / "mine.json")
    assert detrkit("inspect", images / "mine.json").code == 0


def test_unreadable_images_are_named_and_the_rest_is_done(detrkit, images, trained, tmp_path):
    (images / "b" / "0.png").write_bytes(b"broken")
    out = tmp_path / "found"
    options = ("predict", trained, images, "--out", out, "--threshold", "1", "--batch-size", "2")
    said = detrkit(*options)
    assert said.code == 3
    assert said.out.splitlines()[0] == f"{images / 'a/1.png'}: nothing"
    assert len(said.out.splitlines()) == 3
    assert "1 image could not be read:" in said.err
    assert "b/0.png: The file is not an image" in said.err
    document = detrkit(*options, "--json").document
    assert len(document["images"]) == 3
    assert len(document["unreadable"]) == 1


def test_an_interruption_keeps_what_was_found(detrkit, images, trained, tmp_path, monkeypatch):
    def interrupt(self, file, name, found):
        if self.images:
            raise KeyboardInterrupt
        add(self, file, name, found)

    add = predict._Book.add
    monkeypatch.setattr(predict._Book, "add", interrupt)
    out = tmp_path / "found"
    assert detrkit("predict", trained, images, "--out", out).code == 130
    assert len(json.loads((out / "detections.json").read_text())["images"]) == 1


def test_what_cannot_be_predicted(detrkit, images, trained, tmp_path):
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "none", images, "--out", out), 4, "none"),
        ((trained, "--out", out), 2, "no images"),
        ((trained, tmp_path / "none.jpg", "--out", out), 3, "none.jpg"),
        ((trained, images, "--out", out, "--threshold", "1.5"), 2, "--threshold"),
        ((trained, images, "--out", out, "--batch-size", "0"), 2, "batch_size"),
        ((trained, images, "--out", out, "--workers", "-1"), 2, "workers"),
        ((trained, images, "--out", images / "b"), 2, "other things"),
    ]
    for arguments, code, part in cases:
        said = detrkit("predict", *arguments, "--json")
        assert said.code == code, arguments
        assert part in said.document["error"]["message"]


def test_a_box_counts_from_the_score_that_was_best_in_validation(detrkit, images, trained, tmp_path):
    own = load(trained).about["threshold"]
    assert detrkit("predict", trained, images, "--out", tmp_path / "found", "--no-pictures").code == 0
    assert json.loads((tmp_path / "found" / "detections.json").read_text())["threshold"] == own


def test_a_detector_that_takes_anything_for_an_object_is_told_so(detrkit, images, trained, tmp_path):
    said = detrkit("predict", trained, images, "--out", tmp_path / "found", "--threshold", "0")
    assert "15 objects in 3 images, scoring 0 or more." in said.err
    assert "More than half of the 5 queries find something in every image." in said.err
    said = detrkit("predict", trained, images, "--out", tmp_path / "found", "--threshold", "1")
    assert "More than half" not in said.err
