"""`detrkit find`: examples, what is passed on, files, annotations, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from detrkit.data import formats
from detrkit.data.images import open_image
from detrkit.errors import DataError, UsageError
from detrkit.find import Search, Thing
from detrkit.structures import Category, Detections

FOUND = {
    "1.png": [(3.25, 4, 20.5, 30, 0.9, 0), (-2, 1, 9, 9, 0.6, 0)],
    "2.jpg": [],
    "3.png": [(10, 10, 30, 30, 0.55, 0), (5, 5, 5, 9, 0.52, 0)],
}
"""What the stand-in for the search finds in each image: x1, y1, x2, y2, score, label."""


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    rng = np.random.default_rng(1)
    for name in ("a/1.png", "a/deep/2.jpg", "b/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture
def example(images):
    return ("--example", images / "a" / "1.png", 3, 4, 20, 30)


@pytest.fixture
def searched(monkeypatch):
    """A stand-in for the search, which finds `FOUND` and keeps what it was asked for."""
    asked = SimpleNamespace()

    def find(detector, things, images, search=None, *, workers=0, unreadable=None):
        asked.detector, asked.things, asked.images, asked.search, asked.workers = (
            *(detector, things, images),
            *(search, workers),
        )
        categories = tuple(Category(number, thing.name) for number, thing in enumerate(things, 1))
        for index, image in enumerate(images):
            try:
                size = open_image(image).size[::-1]
            except DataError as error:
                unreadable(index, error)
                continue
            rows = np.array(FOUND[image.rpartition("/")[2]], np.float32).reshape(-1, 6)
            answer = Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64), categories, size, image)
            yield answer.above(search.threshold)

    monkeypatch.setattr(importlib.import_module("detrkit.find"), "find", find)
    return asked


def test_a_box_is_drawn_and_all_that_is_like_it_is_found(detrkit, data, trained, tmp_path):
    (truth,) = formats.read(data, "train").values()
    own, box = truth.path(0), truth.boxes[0]
    out = tmp_path / "found"
    said = detrkit("find", trained, "--example", own, *box, data / "train", "--out", out, "--threshold", "0")
    assert said.code == 0
    assert "no probabilities" in said.err
    document = json.loads((out / "detections.json").read_text())
    assert len(document["images"]) == len(said.out.splitlines()) == 4
    (image,) = [image for image in document["images"] if image["file"] == str(own)]
    best = np.array(image["boxes"][0])
    side = np.clip(np.minimum(best, box)[2:] - np.maximum(best, box)[:2], 0, None)
    assert np.prod(side) / (np.prod(best[2:] - best[:2]) + 900 - np.prod(side)) > 0.6
    assert set(image["names"]) == {"object"}


def test_pictures_lines_and_files(detrkit, images, trained, example, searched, tmp_path):
    out = tmp_path / "found"
    said = detrkit("find", trained, *example, images, "--out", out, "--name", "big nut")
    assert said.code == 0
    files = [str(images / name) for name in ("a/1.png", "a/deep/2.jpg", "b/3.png")]
    assert said.out.splitlines() == [
        *(f"{files[0]}: 2 big nut", f"{files[1]}: nothing", f"{files[2]}: 2 big nut"),
    ]
    assert "4 objects in 3 images" in said.err
    for name in ("a/1.png", "a/deep/2.jpg", "b/3.png"):
        with Image.open(out / name) as picture:
            assert picture.size == (50, 40)
    document = json.loads((out / "detections.json").read_text())
    assert [image["scores"] for image in document["images"]] == [[0.9, 0.6], [], [0.55, 0.52]]
    assert (document["threshold"], document["candidates"]) == (0.5, "")
    assert document["things"] == [{"name": "big nut", "examples": 1, "unlike": 0}]
    coco = json.loads((out / "results.coco.json").read_text())
    assert coco["categories"] == [{"id": 1, "name": "big nut"}]
    assert [box["score"] for box in coco["annotations"]] == pytest.approx([0.9, 0.6, 0.55, 0.52])
    assert "train" not in said.err


def test_where_nothing_is_found_the_threshold_is_named(detrkit, images, trained, example, searched, tmp_path):
    said = detrkit("find", trained, *example, images, "--out", tmp_path / "found", "--threshold", "0.95")
    assert "Nothing scores 0.95 or more: a lower --threshold" in said.err
    said = detrkit("find", trained, *example, images, "--out", tmp_path / "found", "--threshold", "0.85")
    assert "Nothing scores" not in said.err


def test_one_document(detrkit, images, trained, example, searched, tmp_path):
    out = tmp_path / "found"
    said = detrkit("find", trained, *example, images, "--out", out, "--no-pictures", "--json")
    assert sorted(entry.name for entry in out.iterdir()) == ["detections.json", "results.coco.json"]
    document = said.document
    assert (document["objects"], len(document["images"]), document["unreadable"]) == (4, 3, [])
    assert document["things"] == [{"name": "object", "examples": 1, "unlike": 0}]
    assert document["calibrated"] is False
    assert document["annotations"] is None


def test_examples_and_choices_are_passed_on(detrkit, images, trained, searched, tmp_path):
    one, other = str(images / "a" / "1.png"), str(images / "b" / "3.png")
    said = detrkit(
        *(
            "find",
            trained,
            "--example",
            one,
            1,
            2,
            3.5,
            4,
            "--example",
            other,
            -1,
            6,
            7,
            8,
            "--not",
            one,
            9,
            10,
            11,
            12,
        ),
        *(images, "--out", tmp_path / "found", "--name", "nut", "--workers", "2", "--threshold", "0.7"),
        *("--candidates", "both", "--combine", "max", "--overlap", "0.3", "--no-exclusive", "--image-size", "96"),
    )
    assert said.code == 0
    (thing,) = searched.things
    drawn = ((one, (1.0, 2.0, 3.5, 4.0)), (other, (-1.0, 6.0, 7.0, 8.0)))
    assert thing == Thing("nut", drawn, ((one, (9.0, 10.0, 11.0, 12.0)),))
    assert searched.search == Search(0.7, "both", "max", 0.3, False, 96)
    assert searched.workers == 2
    assert searched.images == [str(images / name) for name in ("a/1.png", "a/deep/2.jpg", "b/3.png")]


def test_every_choice_of_a_search_is_a_flag(detrkit):
    said = detrkit("find", "--help")
    assert said.code == 0
    for field in dataclasses.fields(Search):
        assert f"--{field.name.replace('_', '-')} " in said.out.replace(",", " ")
    assert "--example IMAGE LEFT TOP RIGHT BOTTOM" in said.out
    assert "--write FORMAT OUT" in said.out


def test_the_boxes_of_a_data_set_are_examples(detrkit, data, images, trained, searched, tmp_path):
    out = tmp_path / "found"
    said = detrkit("find", trained, "--examples", data, images, "--out", out, "--not", images / "a/1.png", 1, 2, 3, 4)
    assert said.code == 0
    (truth,) = formats.read(data, "train").values()
    assert [thing.name for thing in searched.things] == ["nut", "bolt"]
    for label, thing in enumerate(searched.things):
        rows = np.flatnonzero(truth.labels == label).tolist()
        assert thing.examples == tuple((str(truth.path(row)), tuple(truth.boxes[row])) for row in rows)
        assert thing.unlike == ((str(images / "a/1.png"), (1, 2, 3, 4)),)
    detrkit("find", trained, "--examples", data, images, "--out", out, "--split", "val")
    assert [len(thing.examples) for thing in searched.things] == [1, 1]


@pytest.fixture
def labels(data, tmp_path):
    """A single COCO file beside its images, which `change` can be applied to."""
    root = tmp_path / "labels"
    shutil.copytree(data / "train", root)
    source = json.loads((data / "annotations" / "instances_train.json").read_text())

    def changed(change):
        document = json.loads(json.dumps(source))
        change(document)
        (root / "labels.json").write_text(json.dumps(document))
        return root

    return changed


def test_boxes_that_are_no_examples_are_left_out_and_told(detrkit, images, trained, searched, labels, tmp_path):
    def change(document):
        nuts = [box for box in document["annotations"] if box["category_id"] == 1]
        nuts[0]["iscrowd"] = 1
        nuts[1]["bbox"][2] = 0.5

    said = detrkit("find", trained, "--examples", labels(change), images, "--out", tmp_path / "found")
    assert said.code == 0
    assert [(thing.name, len(thing.examples)) for thing in searched.things] == [("bolt", 2)]
    assert "Less than a pixel wide or high, and no example: 1 box\n" in said.err
    assert "Without an example, and not looked for: nut" in said.err


def test_examples_are_boxes_in_their_files_whatever_size_was_annotated(
    detrkit, images, trained, searched, labels, tmp_path
):
    def double(document):
        for image in document["images"]:
            image |= {"width": 2 * image["width"], "height": 2 * image["height"]}
        for box in document["annotations"]:
            box["bbox"] = [2 * side for side in box["bbox"]]

    def examples(change):
        root = labels(change)
        assert detrkit("find", trained, "--examples", root, images, "--out", tmp_path / "found").code == 0
        return [box for thing in searched.things for _, box in thing.examples]

    plain, halved = examples(lambda document: None), examples(double)
    assert len(plain) == 4
    assert halved == plain


def test_an_image_of_examples_that_cannot_be_read_is_named(detrkit, images, trained, searched, labels, tmp_path):
    root = labels(lambda document: document["annotations"].pop())
    (root / "4.png").write_bytes(b"broken" * 9)  # no example is in it
    assert detrkit("find", trained, "--examples", root, images, "--out", tmp_path / "found").code == 0
    (root / "2.png").write_bytes(b"broken" * 9)
    said = detrkit("find", trained, "--examples", root, images, "--out", tmp_path / "found")
    assert said.code == 3
    assert str(root / "2.png") in said.err


@pytest.mark.parametrize(
    ("box", "touches"),
    [((0, 4, 20, 30), True), ((3, 4, 49.5, 30), True), ((3, 4, 20, 40.5), True), ((1, 1, 49, 39), False)],
)
def test_an_example_that_is_cut_by_the_border_is_told(detrkit, images, trained, searched, tmp_path, box, touches):
    file = images / "a" / "1.png"
    said = detrkit("find", trained, "--example", file, *box, images, "--out", tmp_path / "found")
    assert said.code == 0
    assert (f"{file}: the example touches the border" in said.err) == touches


def test_what_is_wrong_with_the_examples_is_told(detrkit, images, trained, searched, labels, tmp_path):
    root = labels(lambda document: None)
    (root / "1.png").unlink()
    said = detrkit("find", trained, "--examples", root, images, "--out", tmp_path / "found")
    assert said.code == 0
    assert "1 × missing-image (dropped)" in said.err


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_what_is_found_becomes_a_data_set(detrkit, images, trained, example, searched, tmp_path, format):
    out, drafts = tmp_path / "found", tmp_path / "my drafts"
    said = detrkit("find", trained, *example, images, "--out", out, "--write", format, drafts, "--name", "nut")
    assert said.code == 0
    ((split, draft),) = formats.read(drafts).items()
    assert (split, len(draft), [category.name for category in draft.categories]) == ("train", 3, ["nut"])
    assert not draft.problems.counts
    boxes = {draft.file_names[index]: draft.boxes[draft.rows(index)].tolist() for index in range(3)}
    assert {name.rpartition("/")[2]: len(found) for name, found in boxes.items()} == {
        "1.png": 2,
        "2.jpg": 0,
        "3.png": 1,
    }
    ordered = sorted(box for found in boxes.values() for box in found)
    assert np.abs(np.array(ordered) - [(0, 1, 9, 9), (3.25, 4, 20.5, 30), (10, 10, 30, 30)]).max() < 1
    assert draft.path(0).read_bytes() in [file.read_bytes() for file in images.rglob("*.*")]
    for part in ("3 images, 3 boxes", "3 nut", "1 × outside-box (repaired)", "1 × degenerate-box (dropped)"):
        assert part in said.err
    command = f"detrkit train {shlex.quote(str(drafts))} --init {trained} --out RUN"
    assert said.err.rstrip().endswith(command)


def test_a_training_starts_from_what_was_found(detrkit, images, trained, example, searched, tmp_path):
    drafts = tmp_path / "drafts"
    detrkit("find", trained, *example, images, "--out", tmp_path / "found", "--write", "coco", drafts)
    options = ("--epochs", "1", "--workers", "0", "--batch-size", "2", "--val-fraction", "0.4", "--seed", "0")
    said = detrkit("train", drafts, "--init", trained, "--out", tmp_path / "run", *options)
    assert said.code == 0, said.err
    assert "from coco" in said.err


def test_the_least_score_of_an_annotation(detrkit, images, trained, example, searched, tmp_path):
    cases = [
        (("--accept", "0.8"), 1, 0.8),
        (("--threshold", "0.58"), 2, 0.58),
        (("--threshold", "0.2"), 3, 0.5),
        (("--threshold", "0.2", "--accept", "0.55"), 3, 0.55),
    ]
    for number, (flags, boxes, accept) in enumerate(cases):
        drafts = tmp_path / f"drafts {number}"
        options = ("--out", tmp_path / "found", "--write", "coco", drafts, "--json", *flags)
        told = detrkit("find", trained, *example, images, *options).document["annotations"]
        assert (told["boxes"], told["images"], told["accept"]) == (boxes, 3, accept), flags
        assert told["boxes_of"] == {"object": boxes}
        assert (told["format"], told["out"]) == ("coco", str(drafts))


def test_nothing_to_train_on_is_said(detrkit, images, trained, example, searched, tmp_path):
    options = ("--out", tmp_path / "found", "--write", "coco", tmp_path / "drafts", "--accept", "0.99")
    said = detrkit("find", trained, *example, images, *options)
    assert said.code == 0
    assert "nothing to train on" in said.err
    assert "detrkit train" not in said.err


def test_unreadable_images_are_named_and_the_rest_is_done(detrkit, images, trained, example, searched, tmp_path):
    (images / "b" / "0.png").write_bytes(b"broken")
    options = ("--out", tmp_path / "found", "--write", "coco", tmp_path / "drafts")
    said = detrkit("find", trained, *example, images, *options)
    assert said.code == 3
    assert "1 image could not be read:" in said.err
    assert "b/0.png: The file is not an image" in said.err
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())["unreadable"]) == 1
    assert len(formats.read(tmp_path / "drafts")["train"]) == 3


def test_no_image_can_be_read(detrkit, images, trained, example, searched, tmp_path):
    (images / "b" / "3.png").write_bytes(b"broken")
    options = ("--out", tmp_path / "found", "--write", "coco", tmp_path / "drafts")
    said = detrkit("find", trained, *example, images / "b", *options)
    assert said.code == 3
    assert "no annotations are written" in said.err
    assert not (tmp_path / "drafts").exists()


def test_calibrated_scores_need_no_excuse(detrkit, images, trained, example, searched, tmp_path, monkeypatch):
    module = importlib.import_module("detrkit.predict")
    about = {"one_shot": {"calibration": {"temperature": 1.5, "shift": 0.0}}}
    loaded = dataclasses.replace(module.load(trained), about=about)
    monkeypatch.setattr(module, "load", lambda name, device: loaded)
    said = detrkit("find", trained, *example, images, "--out", tmp_path / "found", "--json")
    assert said.document["calibrated"] is True
    assert "probabilities" not in said.err


def test_an_interruption_keeps_what_was_found(detrkit, images, trained, example, searched, tmp_path, monkeypatch):
    book = importlib.import_module("detrkit.cli._book").Book
    add = book.add

    def interrupt(self, file, name, found):
        if self.images:
            raise KeyboardInterrupt
        add(self, file, name, found)

    monkeypatch.setattr(book, "add", interrupt)
    options = ("--out", tmp_path / "found", "--write", "coco", tmp_path / "drafts")
    assert detrkit("find", trained, *example, images, *options).code == 130
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())["images"]) == 1
    assert not (tmp_path / "drafts").exists()


@pytest.mark.parametrize(
    ("box", "part"),
    [((3, 4, 51.5, 30), "outside"), ((3, 4, 3, 30), "no area"), (("nan", 4, 20, 30), "not finite")],
)
def test_boxes_that_are_none(detrkit, images, trained, tmp_path, box, part):
    out = tmp_path / "found"
    said = detrkit("find", trained, "--example", images / "a/1.png", *box, images, "--out", out)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert f"{images / 'a/1.png'}: The box of the example" in said.err
    assert part in said.err
    assert not out.exists()


def test_an_example_that_is_not_there(detrkit, images, trained, tmp_path):
    out = tmp_path / "found"
    said = detrkit("find", trained, "--example", images / "none.png", 1, 2, 30, 40, images, "--out", out)
    assert (said.code, len(said.err.splitlines())) == (3, 1)
    assert f"{images / 'none.png'}: There is no such image file" in said.err
    assert not out.exists()


def test_what_cannot_be_found(detrkit, data, images, trained, example, searched, tmp_path):
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    writing = (trained, *example, images, "--out", out, "--write")
    cases = [
        ((trained, images, "--out", out), 2, "There is no example"),
        ((trained, images, "--out", out, "--not", images / "a/1.png", 1, 2, 3, 4), 2, "There is no example"),
        ((trained, *example, "--examples", data, images, "--out", out), 2, "not from both"),
        ((trained, "--examples", data, images, "--out", out, "--name", "nut"), 2, "--name"),
        ((trained, "--examples", data, images, "--out", out, "--split", "test"), 3, "no split 'test'"),
        ((trained, "--examples", tmp_path / "none", images, "--out", out), 3, "none"),
        ((trained, "--examples", images, images, "--out", out), 3, "no box"),
        ((trained, *example, images, "--out", out, "--split", "val"), 2, "--split"),
        ((trained, *example, images, "--out", out, "--annotations", "coco"), 2, "--annotations"),
        ((trained, *example, images, "--out", out, "--name", " "), 2, "--name"),
        ((trained, *example, images, "--out", out, "--name", "a\nb"), 2, "--name"),
        ((trained, *example, images, "--out", out, "--accept", "0.5"), 2, "Add --write FORMAT OUT"),
        ((trained, *example, images, "--out", out, "--threshold", "1.5"), 2, "threshold"),
        ((trained, *example, images, "--out", full), 2, "other things"),
        ((trained, *example, images, "--out", full / "file"), 2, "got a file"),
        ((trained, *example, "--out", out), 2, "no images"),
        ((trained, *example, tmp_path / "none.jpg", "--out", out), 3, "none.jpg"),
        ((tmp_path / "none", *example, images, "--out", out), 4, "none"),
        ((*writing, "coc", tmp_path / "new"), 2, "Did you mean 'coco'?"),
        ((*writing, "YOLO", tmp_path / "new"), 2, "Did you mean 'yolo'?"),
        ((*writing, "folder", tmp_path / "new"), 2, "expected coco, voc, yolo"),
        ((*writing, "coco", full), 2, "not empty"),
        ((*writing, "coco", full / "file"), 2, "not empty"),
        ((*writing, "coco", out), 2, "folder of their own"),
        ((*writing[:-1], "--write", "coco", tmp_path / "new", "--out", tmp_path / "new" / "found"), 2, "of their own"),
        ((*writing, "coco", tmp_path / "new", "--accept", "1.5"), 2, "between 0 and 1"),
        ((*writing, "coco", tmp_path / "new", "--accept", "nan"), 2, "between 0 and 1"),
        ((*writing, "coco", tmp_path / "new", "--accept", "0.3"), 2, "Say --threshold 0.3"),
    ]
    for arguments, code, part in cases:
        said = detrkit("find", *arguments, "--json")
        assert said.code == code, arguments
        assert part in said.document["error"]["message"], arguments
        assert not hasattr(searched, "things")
        assert not out.exists()
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [("--write", "coco"), ("--example", "a.png", "1", "2", "3"), ("--accept", "high")])
def test_flags_that_lack_a_value(detrkit, trained, flags):
    said = detrkit("find", trained, "a.png", "--out", "x", *flags)
    assert said.code == 2
    assert flags[0] in said.err


def test_images_that_no_data_set_can_hold_are_refused_before_the_work(
    detrkit, images, trained, example, searched, tmp_path
):
    (images / "a" / "1.png").rename(images / "photo")
    options = (images / "photo", "--out", tmp_path / "found", "--write", "coco", tmp_path / "drafts")
    said = detrkit("find", trained, *example, *options)
    assert said.code == 3
    assert f"{images / 'photo'}: The image has no ending" in said.err
    assert not hasattr(searched, "things")


def test_which_annotations_of_examples_are_meant_can_be_said(detrkit, ambiguous, images, trained, searched, tmp_path):
    given = ("find", trained, "--examples", ambiguous, images, "--out", tmp_path / "found")
    said = detrkit(*given)
    assert said.code == 3
    assert "--annotations coco" in said.err
    assert detrkit(*given, "--split", "val", "--annotations", "coco").code == 0
    assert [len(thing.examples) for thing in searched.things] == [1, 1]


def test_which_examples_are_meant_must_be_clear(detrkit, data, images, trained, searched, labels, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(data, root)
    (root / "train").rename(root / "test")
    (root / "annotations" / "instances_train.json").rename(root / "annotations" / "instances_test.json")
    said = detrkit("find", trained, "--examples", root, images, "--out", tmp_path / "found")
    assert said.code == 2
    assert "test, val" in said.err
    assert "--split NAME" in said.err
    alike = labels(lambda document: document["categories"][1].update(name="nut"))
    said = detrkit("find", trained, "--examples", alike, images, "--out", tmp_path / "found")
    assert said.code == 3
    assert "one name; got nut" in said.err


def test_an_output_that_cannot_be_made_ends_the_search_at_once(
    detrkit, images, trained, example, searched, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    seen = []
    monkeypatch.setattr("detrkit.cli._terminal._PlainCounter.tick", lambda self: seen.append(self))
    options = ("--out", tmp_path / "file" / "found", "--no-pictures")
    said = detrkit("find", trained, *example, images, *options)
    assert said.code == 1
    assert str(tmp_path / "file") in said.err
    assert not seen


def test_a_search_that_fails_is_one_message(detrkit, images, trained, example, tmp_path, monkeypatch):
    def find(*arguments, **options):
        raise UsageError("The box of the example has no area", where="a.png", remedy="Give two corners.")
        yield

    monkeypatch.setattr(importlib.import_module("detrkit.find"), "find", find)
    said = detrkit("find", trained, *example, images, "--out", tmp_path / "found")
    assert (said.code, said.out) == (2, "")
    assert said.err == "detrkit: a.png: The box of the example has no area. Give two corners.\n"
    assert not (tmp_path / "found").exists()
