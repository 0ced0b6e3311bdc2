"""The doctor: planted defects are found and mended, and nothing else is; what it looks at, piece by piece."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import detrkit
from detrkit.data import formats
from detrkit.data.doctor import Resolution, examine, examine_briefly
from detrkit.data.doctor.boxes import report
from detrkit.data.doctor.classes import _slips, object_findings, same_names
from detrkit.data.doctor.fixing import turn
from detrkit.data.doctor.kinds import KINDS
from detrkit.data.doctor.pictures import ALIKE, most_alike, outlines
from detrkit.data.doctor.readings import Reading, misread
from detrkit.data.problems import POLICIES
from detrkit.errors import DataError, UsageError
from detrkit.structures import Category

SEEN = Resolution("a model", 100, 96, 128, 8)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def planting() -> ModuleType:
    """The benchmark, which knows how to plant defects."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("doctor")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def clean(planting: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.draw(tmp_path_factory.mktemp("clean") / "parts", {"train": 30, "val": 10})


@pytest.fixture(scope="module")
def known(planting: ModuleType, clean: Path) -> set[tuple[str, str]]:
    """What is found in the clean data set."""
    told = examine(clean, SEEN)
    assert (told.verdict, told.format, told.looked) == ("clean", "coco", True)
    found = planting.told_of(told)
    assert found == {("category-ids", "train, val")}
    return found


def boxes_of(path: Path) -> list[list[float]]:
    """The boxes of all splits in an order of their own; those that reading left out come last in their image."""
    parts = formats.read(path).values()
    return sorted(
        [number, image, *box]
        for number, part in enumerate(parts)
        for image in range(len(part))
        for box in part.boxes[part.rows(image)].round(3).tolist()
    )


def test_defects_that_are_planted_together_are_all_found(planting, clean, known, tmp_path):
    result = planting.all_together(clean, known, tmp_path)
    assert result["planted"] >= 12
    assert (result["not_found"], result["alarms"], result["after_fixing"]) == ([], [], "clean")


APART = [
    "two corners as x y width height, some images",
    "two corners as x y width height, a split",
    "y before x, a split",
    "the middle for the corner, a split",
    "divided by the size, a split",
    "val counts from 1",
]


@pytest.mark.parametrize("name", APART)
def test_boxes_that_were_written_otherwise_are_found_and_brought_back(planting, clean, known, tmp_path, name):
    shutil.copytree(clean, tmp_path / "ill")
    data = planting.Set(tmp_path / "ill")
    planting.DEFECTS[name].plant(data)
    data.save()
    told = examine(tmp_path / "ill", SEEN)
    assert planting.is_found(told, planting.DEFECTS[name])
    assert {kind for kind, _ in planting.told_of(told) - known} == {planting.DEFECTS[name].kind}
    told.fix(tmp_path / "mended")
    if name == "val counts from 1":  # which boxes began at the border and not at pixel 1 is not to be known
        planted, mended = (np.array(boxes_of(path)) for path in (clean, tmp_path / "mended"))
        assert np.abs(planted - mended).max() <= 1
    else:
        assert boxes_of(tmp_path / "mended") == boxes_of(clean)


@pytest.mark.parametrize("name", ["a class is in val alone", "a class has two spellings"])
def test_classes_that_go_wrong_are_found(planting, clean, known, tmp_path, name):
    result = planting.planted(clean, known, tmp_path, name)
    assert (result["found"], result["alarms"]) == (True, [])


def test_what_cannot_be_read_is_broken_and_the_rest_is_examined(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "ill")
    file = tmp_path / "ill" / "annotations" / "instances_train.json"
    file.write_text(file.read_text()[:5000])
    told = examine(tmp_path / "ill", SEEN)
    (finding,) = (one for one in told.findings if one.severity == "broken")
    assert (told.verdict, finding.kind, finding.split) == ("broken", "malformed-file", "train")
    assert str(file) in finding.places[0].where
    assert set(told.splits) == {"val"}
    assert set(told.fix(tmp_path / "rest").splits) == {"val"}


def test_splits_that_do_not_go_together_are_broken(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "ill")
    file = tmp_path / "ill" / "annotations" / "instances_val.json"
    document = json.loads(file.read_text())
    document["categories"][0]["name"] = "Screw"
    file.write_text(json.dumps(document))
    told = examine(tmp_path / "ill", SEEN, decode=False)
    assert [one.kind for one in told.findings if one.severity == "broken"] == ["disagreeing-splits"]


def test_an_image_that_cannot_be_read_is_told_with_its_remedy(tmp_path):
    coco(tmp_path, "train", [(1, 0, 1), (2, 0, 1)])
    Image.new("RGB", (120, 40)).save(tmp_path / "train" / "2.png", "GIF")
    (finding,) = examine(tmp_path, SEEN).of("unreadable-image")
    assert [place.said for place in finding.places] == ["GIF images are not read. Convert it to JPEG or PNG."]
    assert "Copy" not in finding.remedy


def test_files_that_may_hold_the_boxes_are_named_where_there_is_none(tmp_path):
    for name in ("images/1.png", "images/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    for name in ("annotations.xml", "project.json"):
        (tmp_path / name).touch()
    (told,) = examine(tmp_path, SEEN, decode=False).of("no-boxes")
    assert told.said == f"Not read, and maybe its annotations: {tmp_path / 'annotations.xml'} and 1 more."


def test_to_lose_a_fifth_is_no_repair(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "ill")
    for number in range(1, 11):
        (tmp_path / "ill" / "train" / f"{number:03d}.jpg").unlink()
    told = examine(tmp_path / "ill", SEEN, decode=False)
    (finding,) = told.of("missing-image")
    assert (finding.severity, finding.count) == ("broken", 10)
    assert "10 of 30 images" in finding.said


def coco(root: Path, split: str, entries: list[tuple[int, int, int]]) -> None:
    """A split of files `picture`.png, each drawn once: for each entry the picture, and which of ten boxes it has."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, boxes = [], []
    for number, (picture, first, last) in enumerate(entries, 1):
        pixels = np.random.default_rng(picture).integers(0, 255, (40, 120, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 120})
        boxes += [
            {"image_id": number, "category_id": 0, "bbox": [11.5 * k + 0.3, 5, 9, 20 + k], "area": 99, "iscrowd": 0}
            for k in range(first, last)
        ]
    boxes = [{"id": number, **box} for number, box in enumerate(boxes, 1)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 0, "name": "nut"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


@pytest.mark.parametrize(("lost", "severity"), [(6, "repairable"), (30, "broken")])
def test_boxes_of_unknown_images_are_held_against_boxes(tmp_path, lost, severity):
    coco(tmp_path, "train", [(one, 0, 10) for one in range(9)])
    file = tmp_path / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"] += [{**document["annotations"][0], "id": 900 + k, "image_id": 77} for k in range(lost)]
    file.write_text(json.dumps(document))
    (finding,) = examine(tmp_path, SEEN, decode=False).of("unknown-image")
    assert (finding.severity, finding.count) == (severity, lost)
    assert finding.said == ("" if severity == "repairable" else "30 of 120 boxes are lost so.")


def test_images_without_annotation_are_held_against_images(tmp_path):
    coco(tmp_path / "coco", "train", [(one, 0, 10) for one in range(20)])
    formats.write(formats.read(tmp_path / "coco"), tmp_path / "voc", "voc")
    for file in sorted((tmp_path / "voc").rglob("*.xml"))[:10]:
        file.unlink()
    (finding,) = examine(tmp_path / "voc", SEEN, decode=False).of("missing-annotation")
    assert (finding.severity, finding.said) == ("broken", "10 of 20 images are lost so.")


def test_of_copies_the_one_with_the_most_boxes_is_kept(tmp_path):
    ten = range(10)
    coco(tmp_path / "ill", "train", [*((one, 0, 0) for one in ten), *((one, 0, 10) for one in ten)])
    told = examine(tmp_path / "ill", SEEN)
    assert (told.verdict, told.of("repeated-image")[0].count) == ("repairable", 10)
    fixed = told.fix(tmp_path / "mended")
    assert (len(fixed.splits["train"]), len(fixed.splits["train"].boxes)) == (10, 100)


def test_boxes_that_only_a_copy_has_are_told(tmp_path):
    twenty = range(20)
    coco(tmp_path / "ill", "train", [*((one, 0, 10) for one in twenty), (0, 3, 7), (1, 8, 10)])
    document = json.loads((tmp_path / "ill" / "annotations" / "instances_train.json").read_text())
    document["annotations"][-1]["bbox"][1] += 3  # the copy of picture 1 has its last box elsewhere
    (tmp_path / "ill" / "annotations" / "instances_train.json").write_text(json.dumps(document))
    told = examine(tmp_path / "ill", SEEN)
    assert told.verdict == "repairable"
    fixed = told.fix(tmp_path / "mended")
    assert fixed.changes == {"repeated-image": 2}
    lines = [json.loads(line)["before"] for line in (tmp_path / "mended" / "changes.jsonl").read_text().splitlines()]
    assert [line.partition(".png, ")[2] for line in lines] == ["which has more boxes", "which lacks 1 of its boxes"]


def test_copies_that_hold_a_fifth_of_all_boxes_stay(tmp_path):
    twenty = range(20)
    coco(tmp_path / "ill", "train", [*((one, 0, 5) for one in twenty), *((one, 5, 10) for one in twenty)])
    told = examine(tmp_path / "ill", SEEN)
    (finding,) = told.of("repeated-image")
    assert (told.verdict, finding.severity) == ("broken", "broken")
    assert "100 of 200 boxes would be lost" in finding.said
    fixed = told.fix(tmp_path / "mended")
    assert (fixed.changes, len(fixed.splits["train"].boxes)) == ({}, 200)


def test_a_training_split_that_other_splits_repeat_stays(tmp_path):
    coco(tmp_path / "ill", "train", [(one, 0, 10) for one in range(20)])
    coco(tmp_path / "ill", "val", [(one, 0, 10) for one in range(3)])
    coco(tmp_path / "ill", "test", [(one, 0, 10) for one in range(3, 6)])
    told = examine(tmp_path / "ill", SEEN)
    assert told.verdict == "broken"  # each of the two alone would take less than a fifth
    assert all("6 of 20 images of train would be lost" in one.said for one in told.of("image-in-two-splits"))
    fixed = told.fix(tmp_path / "mended")
    assert (fixed.changes, len(fixed.splits["train"])) == ({}, 20)


def test_each_change_has_a_line(planting, clean, tmp_path):
    shutil.copytree(clean, tmp_path / "ill")
    data = planting.Set(tmp_path / "ill")
    planting.degenerate(data)
    planting.outside(data)
    for box in data.boxes(data.ordered[20])[:2]:
        box["category_id"] = 77
    data.save()
    before = (tmp_path / "ill" / "annotations" / "instances_train.json").read_bytes()
    fixed = examine(tmp_path / "ill", SEEN).fix(tmp_path / "mended")
    lines = [json.loads(line) for line in (tmp_path / "mended" / "changes.jsonl").read_text().splitlines()]
    assert fixed.changes == {"degenerate-box": 3, "outside-box": 3, "unknown-category": 2}
    assert len(lines) == sum(fixed.changes.values())
    cut = next(line for line in lines if line["kind"] == "outside-box")
    assert cut["done"] == "changed"
    assert cut["before"][2] > 128 >= cut["after"][2]
    gone = next(line for line in lines if line["kind"] == "degenerate-box")
    assert (gone["done"], "after" in gone) == ("left out", False)
    linked = formats.read(tmp_path / "mended")["train"]
    assert linked.path(0).samefile(tmp_path / "ill" / "train" / linked.file_names[0])
    assert (tmp_path / "ill" / "annotations" / "instances_train.json").read_bytes() == before
    with pytest.raises(UsageError, match="not empty"):
        examine(clean, SEEN, decode=False).fix(tmp_path / "mended")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_their_picture(tmp_path, orientation):
    picture = Image.new("L", (40, 30))
    picture.paste(255, (3, 5, 12, 25))
    flags = Image.Exif()
    flags[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=flags)
    from detrkit.data.images import open_image

    upright = np.asarray(open_image(tmp_path / "a.png"))[..., 0] > 127
    rows, columns = np.flatnonzero(upright.any(1)), np.flatnonzero(upright.any(0))
    turned = turn(np.array([[3.0, 5.0, 12.0, 25.0]]), orientation, (30, 40))
    assert turned.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]


def test_copies_look_alike_and_others_do_not(planting, clean):
    pictures = [Image.open(path).convert("RGB") for path in sorted((clean / "train").iterdir())[:12]]
    others = [
        *(picture.resize((72, 60)) for picture in pictures[:4]),
        *(ImageEnhance.Brightness(picture).enhance(1.3) for picture in pictures[4:8]),
        *(ImageEnhance.Contrast(picture).enhance(0.7) for picture in pictures[8:]),
    ]

    def small(images):
        return outlines(
            np.stack([np.asarray(one.convert("L").resize((16, 16), Image.Resampling.BOX)) for one in images])
        )

    rows, values = most_alike(small(others), small(pictures))
    assert rows.tolist() == list(range(12))
    assert values.min() > ALIKE
    assert most_alike(small(pictures), small(pictures), earlier=True)[1].max() < ALIKE
    blank = np.random.default_rng(0).integers(126, 128, (2, 16, 16)).astype(np.uint8) // 2 * 2
    assert not outlines(blank).any()


def test_boxes_at_the_border_do_not_count_from_one(make_annotations):
    part = make_annotations(count=12, each=3, size=(40, 60))
    boxes = np.round(part.boxes)
    boxes[:, :2] += 6
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    boxes[::2, 0] = 1
    from_one = replace(part, boxes=boxes)
    assert report(from_one, "coco").shift is not None
    boxes = boxes.copy()
    boxes[0, 0] = 0  # a single one at 0 shows that pixels count from there
    assert report(replace(part, boxes=boxes), "coco").shift is None
    assert report(replace(part, boxes=boxes + 0.3), "coco").shift is None


@pytest.mark.parametrize(("last", "fixed_to"), [(120, [59, 19, 120, 29]), (121, [59, 19, 120, 29])])
def test_pixels_that_count_from_one_are_told_once_and_shifted(tmp_path, last, fixed_to):
    """The far corner counts from 1 as well where it states one pixel more than the image has."""
    coco(tmp_path / "ill", "train", [(one, 0, 2) for one in range(12)])
    file = tmp_path / "ill" / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    both = last == 121
    for one in document["annotations"]:
        one["bbox"] = [1, 6, 50, 12] if one["id"] % 2 else [60, 20, last - 60, 9 + both]
    file.write_text(json.dumps(document))
    told = examine(tmp_path / "ill", SEEN, decode=False)
    assert [one.kind for one in told.findings if one.kind.endswith(("-box", "-boxes"))] == ["one-based-boxes"]
    assert ("The far corner counts from 1 as well" in told.of("one-based-boxes")[0].said) is both
    fixed = told.fix(tmp_path / "mended").splits["train"]
    assert fixed.boxes[:2].tolist() == [[0, 5, 51 - both, 18 - both], fixed_to]


def test_a_crowd_is_no_other_box_of_the_same(make_annotations):
    part = make_annotations(count=1, each=4)
    alike = replace(part, boxes=part.boxes[[0, 0, 0, 0]], labels=np.array([0, 0, 1, 0]))
    told = report(replace(alike, crowd=np.array([False, False, False, True])), "coco")
    assert told.repeated.tolist() == [1]
    assert sorted(told.contradicting.tolist()) == [[0, 2], [1, 2]]


def test_a_crowd_asks_for_no_query(make_annotations):
    part = make_annotations(count=1, each=3)
    two = Resolution("a model", 2, 96, 128, 8)
    nobody = np.zeros(0, np.int64)
    (found,) = (one for one in object_findings(part, "train", two, nobody) if one.kind == "more-objects-than-queries")
    assert found.places[0].said == "3 objects"
    crowded = replace(part, crowd=np.array([False, False, True]))
    assert "more-objects-than-queries" not in {one.kind for one in object_findings(crowded, "train", two, nobody)}


@pytest.mark.parametrize(("unexplained", "believed"), [(0, True), (3, False)])
def test_another_reading_has_to_explain_nearly_all_that_does_not_fit(make_annotations, unexplained, believed):
    """Of 200 boxes 12 cross the border, as if their middle had been taken for the corner. Where 3 of the 12 fit neither
    way, these are few of all boxes, but not of those that were to be explained."""
    part = make_annotations(count=20, each=10, size=(40, 60))
    boxes = np.tile([20.0, 15, 30, 25], (200, 1))
    boxes[:120:10] = (50, 15, 66, 25)
    boxes[: 10 * unexplained : 10] = (70, 15, 90, 25)
    found = misread(ill := replace(part, boxes=boxes), ill.stated(), "coco")
    assert [one.reading for one in found] == [Reading("cxcywh", False, False)] * believed


def test_boxes_that_reach_out_are_not_taken_for_another_order(make_annotations, rng):
    part = make_annotations(count=20, each=5, size=(40, 60))
    low = rng.uniform(0, 1, (100, 2)) * (50, 34)
    boxes = np.concatenate([low, low + rng.uniform(4, 14, (100, 2))], 1)  # many cross the border on the right and below
    reaching = replace(part, boxes=boxes)
    assert not misread(reaching, reaching.stated(), "coco")


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_readings_are_read_in_each_format(format, rng):
    sizes = np.tile([[60, 90]], (8, 1))
    low = rng.uniform(0, 40, (8, 2))
    boxes = np.concatenate([low, low + rng.uniform(2, 20, (8, 2))], 1)
    scale = np.tile(sizes[:, ::-1], 2) if format == "yolo" else 1.0
    own = {"coco": "xywh", "voc": "xyxy", "yolo": "cxcywh"}[format]
    np.testing.assert_allclose(Reading(own, False, False).boxes(boxes, sizes, format), boxes)
    mistaken = {
        "coco": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),  # its four numbers are the corners
        "voc": boxes,
        "yolo": np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1),
    }[format]
    np.testing.assert_allclose(Reading("xyxy", False, False).boxes(mistaken, sizes, format), boxes)
    swapped = boxes / scale
    swapped = swapped[:, [1, 0, 3, 2]] * scale
    np.testing.assert_allclose(Reading(own, True, False).boxes(swapped, sizes, format), boxes)
    divided = boxes / np.tile(sizes[:, ::-1], 2)
    np.testing.assert_allclose(Reading(own, False, True).boxes(divided, sizes, format), boxes)


def test_yolo_classes_that_count_from_one(planting, clean, tmp_path):
    formats.write(formats.read(clean), tmp_path / "yolo", "yolo")
    told = examine(tmp_path / "yolo", SEEN, decode=False)
    assert (told.format, told.verdict) == ("yolo", "clean")
    for file in (tmp_path / "yolo" / "labels").rglob("*.txt"):
        lines = (line.split() for line in file.read_text().splitlines())
        file.write_text("".join(f"{int(label) + 1} {' '.join(rest)}\n" for label, *rest in lines))
    told = examine(tmp_path / "yolo", SEEN, decode=False)
    assert {one.split for one in told.of("class-ids-from-one")} == {"train", "val"}
    assert told.verdict == "broken"


def test_names_that_are_spelt_in_two_ways():
    table = [Category(row, name) for row, name in enumerate(["Red cell", "red_cell", "cat", "Red-Cell", "cats"])]
    assert same_names(table) == [[0, 1, 3]]


def test_before_a_training_only_what_matters_is_told(planting, clean, tmp_path):
    splits = formats.read(clean)
    assert examine_briefly(splits["train"], splits["val"], SEEN) == ()
    shutil.copytree(clean, tmp_path / "ill")
    data = planting.Set(tmp_path / "ill")
    for plant in (planting.leaked, planting.twice, planting.all_swapped):
        plant(data)
    data.save()
    splits = formats.read(tmp_path / "ill")
    found = examine_briefly(splits["train"], splits["val"], SEEN)
    assert {one.kind for one in found} == {"image-in-two-splits", "box-format"}
    assert "leaked.jpg" in str(next(one for one in found if one.kind == "image-in-two-splits"))
    assert examine_briefly(splits["val"], splits["val"], SEEN) == ()


def test_before_a_training_it_is_told_that_most_objects_are_too_small(clean):
    splits = formats.read(clean)
    sides = np.sort(SEEN.sides(splits["train"]))
    for share, told in ((0.4, False), (0.6, True)):
        coarse = SEEN._replace(token=sides[int(share * len(sides))])
        found = examine_briefly(splits["train"], splits["train"], coarse)
        assert [one.kind for one in found] == ["small-objects"] * told


def test_before_a_training_files_of_equal_size_are_read_once(make_annotations, tmp_path, monkeypatch):
    examining, splits = importlib.import_module("detrkit.data.doctor.examine"), {}
    for name, count in (("train", 30), ("val", 6)):
        (tmp_path / name).mkdir()
        splits[name] = replace(make_annotations(count=count, each=1), root=tmp_path / name)
        for row in range(count):
            splits[name].path(row).write_bytes(bytes([row]) * 100)  # as pictures that are not compressed
    read = []
    monkeypatch.setattr(examining, "_digest", lambda path: (read.append(path), path.read_bytes())[1])

    def told():
        read.clear()
        return {one.kind: one for one in examining._shared_files(splits["train"], splits["val"])}

    found = told()
    assert len(read) == len(set(read)) == 36
    assert {kind: one.count for kind, one in found.items()} == {"image-in-two-splits": 6}
    assert [one.said for one in found["image-in-two-splits"].places] == [
        f"the same as {splits['train'].path(row)}" for row in range(6)
    ]
    splits["val"].path(3).write_bytes(b"another")
    monkeypatch.setattr(examining, "MOST_READ", 100 * (30 + 3))
    found = told()
    assert len(read) == 33
    assert {kind: one.count for kind, one in found.items()} == {"image-in-two-splits": 3, "uncompared-image": 2}
    assert "100 bytes, as 30 training images have" in str(found["uncompared-image"])
    monkeypatch.setattr(examining, "MOST_STATED", 35)
    assert {kind: one.count for kind, one in told().items()} == {"uncompared-image": 6}
    assert "36 images" in str(told()["uncompared-image"])
    assert not read


def test_the_public_doctor_knows_the_model(clean):
    told = detrkit.doctor(clean, model="detr-r50-dc5", decode=False)
    assert told.resolution == Resolution("detr-r50-dc5", 100, 800, 1333, 16)
    assert told.to_json()["model"]["token"] == 16
    assert isinstance(told, detrkit.Diagnosis)
    with pytest.raises(UsageError, match="no such preset"):
        detrkit.doctor(clean, model="detr-r5")
    with pytest.raises(DataError):
        detrkit.doctor(clean / "nothing")


def test_every_problem_has_a_place_among_the_kinds():
    assert set(POLICIES) < set(KINDS)


@pytest.mark.parametrize(
    ("one", "other", "is_slip"),
    [
        ("RBC", "RCB", True),
        ("platelet", "platelets", True),
        ("car", "cat", False),
        ("RBC", "WBC", False),
        ("ab", "ba", False),
        ("part 12", "part 21", False),
    ],
)
def test_two_spellings_of_a_name_are_told_from_two_names(one: str, other: str, is_slip: bool) -> None:
    table = (Category(1, one), Category(2, other))
    assert bool(list(_slips(table))) is is_slip
