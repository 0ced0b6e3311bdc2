"""The doctor on planted defects: is each found, is nothing else, and how long does it take?

Takes a data set in COCO's layout, writes a clean copy of it (`Diagnosis.fix`), which must be found clean, and then
plants one defect after another, each in a copy of its own, and all that go together in one. A defect is found where its
kind is among the findings; a finding that the clean copy does not have, and that the defect does not bring along, is a
false alarm. Without DATA a small one is drawn.

    python benchmarks/doctor.py DATA
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _report import machine, parser, show
from PIL import Image, ImageDraw

COLOURS = ((205, 60, 50), (60, 160, 80), (70, 90, 210))


class Set:
    """A COCO data set that defects are planted in: `train` and `val` are the documents of its two files."""

    def __init__(self, root: Path):
        self.root = root
        self.train, self.val = (json.loads(self._file(split).read_text()) for split in ("train", "val"))
        self.ordered = sorted(self.train["images"], key=lambda image: -len(self.boxes(image)))

    def _file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"

    def save(self) -> None:
        self._file("train").write_text(json.dumps(self.train))
        self._file("val").write_text(json.dumps(self.val))

    def path(self, image: dict[str, Any], split: str = "train") -> Path:
        return self.root / split / image["file_name"]

    def boxes(self, image: dict[str, Any], split: str = "train") -> list[dict[str, Any]]:
        document = self.train if split == "train" else self.val
        return [box for box in document["annotations"] if box["image_id"] == image["id"]]

    def crowded(self, first: int, count: int) -> list[dict[str, Any]]:
        """Some training images: the more boxes, the earlier."""
        return self.ordered[first : first + count]

    def admit(self, image: dict[str, Any], name: str, split: str, picture: bytes, scale: float = 1.0) -> None:
        """Add an image with the boxes of another."""
        document = self.train if split == "train" else self.val
        number = 1 + max(one["id"] for one in document["images"])
        (self.root / split / name).write_bytes(picture)
        sides = {"height": round(image["height"] * scale), "width": round(image["width"] * scale)}
        document["images"].append({**image, **sides, "id": number, "file_name": name})
        for box in self.boxes(image):
            sides = [value * scale for value in box["bbox"]]
            document["annotations"].append({**box, "image_id": number, "bbox": sides, "area": sides[2] * sides[3]})
        for row, box in enumerate(document["annotations"], 1):
            box["id"] = row


def missing(data: Set) -> None:
    for image in data.crowded(0, 2):
        data.path(image).unlink()


def truncated(data: Set) -> None:
    for image in data.crowded(2, 2):
        content = data.path(image).read_bytes()
        data.path(image).write_bytes(content[: len(content) // 2])


def copied(data: Set) -> None:
    (image,) = data.crowded(4, 1)
    data.admit(image, "a copy.jpg", "train", data.path(image).read_bytes())


def saved_anew(data: Set) -> None:
    (image,) = data.crowded(5, 1)
    other = data.root / "anew.jpg"
    with Image.open(data.path(image)) as picture:
        picture.convert("RGB").resize((round(picture.width * 0.75), round(picture.height * 0.75))).save(
            other, quality=60
        )
    data.admit(image, "anew.jpg", "train", other.read_bytes(), 0.75)
    other.unlink()


def leaked(data: Set) -> None:
    (image,) = data.crowded(6, 1)
    data.admit(image, "leaked.jpg", "val", data.path(image).read_bytes())


def ids_with_gaps(data: Set) -> None:
    for document in (data.train, data.val):
        for category in document["categories"]:
            category["id"] = category["id"] * 7 + 3
        for box in document["annotations"]:
            box["category_id"] = box["category_id"] * 7 + 3


def degenerate(data: Set) -> None:
    for image in data.crowded(7, 3):
        data.boxes(image)[0]["bbox"][2] = 0


def not_finite(data: Set) -> None:
    (image,) = data.crowded(10, 1)
    data.boxes(image)[0]["bbox"][1] = float("nan")


def outside(data: Set) -> None:
    for image in data.crowded(11, 3):
        box = data.boxes(image)[0]["bbox"]
        box[0] = image["width"] - box[2] / 2


def inverted(data: Set) -> None:
    (image,) = data.crowded(14, 1)
    box = data.boxes(image)[0]["bbox"]
    box[:] = [box[0] + box[2], box[1] + box[3], -box[2], -box[3]]


def from_one(data: Set) -> None:
    for box in data.val["annotations"]:
        x, y, width, height = box["bbox"]
        box["bbox"] = [x + 1, y + 1, width - 1, height - 1]  # xmin, ymin, xmax - xmin, ymax - ymin of a VOC file


def corners(data: Set) -> None:
    for image in data.crowded(0, 4):
        for box in data.boxes(image):
            x, y, width, height = box["bbox"]
            box["bbox"] = [x, y, x + width, y + height]


def all_corners(data: Set) -> None:
    for box in data.train["annotations"]:
        x, y, width, height = box["bbox"]
        box["bbox"] = [x, y, x + width, y + height]


def all_swapped(data: Set) -> None:
    for box in data.train["annotations"]:
        x, y, width, height = box["bbox"]
        box["bbox"] = [y, x, height, width]


def all_centred(data: Set) -> None:
    for box in data.train["annotations"]:
        x, y, width, height = box["bbox"]
        box["bbox"] = [x + width / 2, y + height / 2, width, height]


def normalised(data: Set) -> None:
    for image in data.crowded(15, 3):
        _divide(data.boxes(image), image)


def all_normalised(data: Set) -> None:
    for image in data.val["images"]:
        _divide(data.boxes(image, "val"), image)


def _divide(boxes: list[dict[str, Any]], image: dict[str, Any]) -> None:
    for box in boxes:
        x, y, width, height = box["bbox"]
        box["bbox"] = [x / image["width"], y / image["height"], width / image["width"], height / image["height"]]


def unused_class(data: Set) -> None:
    for document in (data.train, data.val):
        document["categories"].append({"id": 1 + max(one["id"] for one in document["categories"]), "name": "parasite"})


def unlearnt_class(data: Set) -> None:
    rarest = min(data.train["categories"], key=lambda one: sum(box["category_id"] == one["id"] for box in _all(data)))
    data.train["annotations"] = [box for box in data.train["annotations"] if box["category_id"] != rarest["id"]]


def _all(data: Set) -> list[dict[str, Any]]:
    return [*data.train["annotations"], *data.val["annotations"]]


def two_spellings(data: Set) -> None:
    first = data.train["categories"][0]
    number = 50 + max(one["id"] for one in data.train["categories"])
    for document in (data.train, data.val):
        document["categories"].append({"id": number, "name": f"{first['name'].lower()} "})
    for image in data.crowded(18, 3):
        for box in data.boxes(image):
            box["category_id"] = number if box["category_id"] == first["id"] else box["category_id"]


def empty(data: Set) -> None:
    gone = {image["id"] for image in data.crowded(21, 2)}
    data.train["annotations"] = [box for box in data.train["annotations"] if box["image_id"] not in gone]


def crowd_of_objects(data: Set) -> None:
    (image,) = data.crowded(23, 1)
    width, height = image["width"] / 16, image["height"] / 12
    pattern = copy.deepcopy(data.boxes(image)[0])
    for row in range(12):
        for column in range(10):
            box = [column * width * 1.6, row * height, width * 1.5, height * 0.9]
            data.train["annotations"].append({**pattern, "id": 10**6 + row * 10 + column, "bbox": box, "area": 9})


def turned(data: Set) -> None:
    image = data.crowded(24, 1)[0]
    with Image.open(data.path(image)) as picture:
        upright = picture.convert("RGB")
    flags = Image.Exif()
    flags[0x0112] = 6
    data.path(image).unlink()
    upright.save(data.path(image), format="JPEG", quality=95, exif=flags)  # stored as it was, shown on its side


def twice(data: Set) -> None:
    for image in data.crowded(25, 2):
        data.train["annotations"].append({**copy.deepcopy(data.boxes(image)[0]), "id": 10**7 + image["id"]})


def two_classes(data: Set) -> None:
    (image,) = data.crowded(27, 1)
    box = copy.deepcopy(data.boxes(image)[0])
    other = next(one["id"] for one in data.train["categories"] if one["id"] != box["category_id"])
    data.train["annotations"].append({**box, "id": 10**8, "category_id": other})


class Defect(NamedTuple):
    """Something to plant: the kind that must be found, a word that must stand in what is said of it, kinds that it
    brings along, and whether it can be planted beside others.
    """

    plant: Callable[[Set], None]
    kind: str
    word: str = ""
    along: tuple[str, ...] = ()
    together: bool = True


DEFECTS = {
    "an image is missing": Defect(missing, "missing-image"),
    "an image is cut off": Defect(truncated, "unreadable-image"),
    "a file stands twice in a split": Defect(copied, "repeated-image"),
    "a picture stands twice, saved anew and smaller": Defect(saved_anew, "similar-image"),
    "a training image stands in val, under another name": Defect(leaked, "image-in-two-splits"),
    "ids of categories have gaps": Defect(ids_with_gaps, "category-ids", "are no category"),
    "boxes without width": Defect(degenerate, "degenerate-box"),
    "a box with NaN": Defect(not_finite, "non-finite-box"),
    "boxes reach out of the image": Defect(outside, "outside-box"),
    "corners are exchanged": Defect(inverted, "inverted-box"),
    "val counts from 1": Defect(from_one, "one-based-boxes"),
    "two corners as x y width height, some images": Defect(corners, "box-format", "two corners", together=False),
    "two corners as x y width height, a split": Defect(all_corners, "box-format", "two corners", together=False),
    "y before x, a split": Defect(all_swapped, "box-format", "y x height width", together=False),
    "the middle for the corner, a split": Defect(all_centred, "box-format", "in the middle", together=False),
    "divided by the size, some images": Defect(normalised, "normalised-boxes"),
    "divided by the size, a split": Defect(all_normalised, "normalised-boxes", together=False),
    "a class without examples": Defect(unused_class, "class-without-examples", "parasite"),
    "a class is in val alone": Defect(unlearnt_class, "class-not-in-training", "", ("image-without-boxes",), False),
    "a class has two spellings": Defect(two_spellings, "similar-class-names", "", ("category-ids",), False),
    "images without boxes": Defect(empty, "image-without-boxes"),
    "more objects than queries": Defect(crowd_of_objects, "more-objects-than-queries"),
    "a picture is turned by a flag": Defect(turned, "orientation-disagrees"),
    "a box stands twice": Defect(twice, "repeated-box"),
    "a box has two classes": Defect(two_classes, "contradicting-boxes"),
}


def draw(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """A small data set: rectangles of three classes on textured ground, some of them at the border."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, boxes = [], []
        for number in range(1, count + 1):
            ground = rng.integers(60, 200, (9, 12, 3), np.uint8)
            picture = Image.fromarray(ground).resize((128, 96), Image.Resampling.BICUBIC)
            pen = ImageDraw.Draw(picture)
            for place in range(6):
                label = int(rng.integers(3))
                width, height = (int(side) for side in rng.integers(14, 30, 2))
                x, y = int(rng.integers(0, 128 - width)), int(rng.integers(0, 96 - height))
                x, y = (0 if place == 0 else x), (0 if place == 1 else y)
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=COLOURS[label])
                box = {"category_id": label + 1, "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
                boxes.append({"id": len(boxes) + 1, "image_id": number, **box})
            picture.save(root / split / f"{number:03d}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number:03d}.jpg", "height": 96, "width": 128})
        categories = [{"id": row, "name": name} for row, name in enumerate(("Bolt", "Nut", "Washer"), 1)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def diagnose(root: Path) -> tuple[Any, float]:
    from detrkit import doctor

    started = time.perf_counter()
    told = doctor(root)
    return told, time.perf_counter() - started


def told_of(told: Any) -> set[tuple[str, str]]:
    return {(finding.kind, finding.split) for finding in told.findings}


def is_found(told: Any, defect: Defect) -> bool:
    return any(defect.word in f"{one.said} {one.places[:9]}" for one in told.of(defect.kind))


def planted(clean: Path, known: set[tuple[str, str]], work: Path, name: str) -> dict[str, Any]:
    """Plant one defect in a copy, and examine it; then the copy that `fix` writes of it.

    `known` is what is found in the clean data set.
    """
    defect = DEFECTS[name]
    root = work / "planted"
    shutil.copytree(clean, root)
    data = Set(root)
    defect.plant(data)
    data.save()
    told, seconds = diagnose(root)
    alarms = {kind for kind, _ in told_of(told) - known} - {defect.kind, *defect.along}
    result = {"found": is_found(told, defect), "alarms": sorted(alarms), "seconds": seconds, "verdict": told.verdict}
    if told.verdict == "repairable":
        told.fix(work / "fixed")
        result["after_fixing"] = diagnose(work / "fixed")[0].verdict
        shutil.rmtree(work / "fixed")
    shutil.rmtree(root)
    return result


def all_together(clean: Path, known: set[tuple[str, str]], work: Path) -> dict[str, Any]:
    """Plant everything that goes together in one copy."""
    defects = {name: defect for name, defect in DEFECTS.items() if defect.together}
    root = work / "ill"
    shutil.copytree(clean, root)
    data = Set(root)
    for defect in sorted(defects.values(), key=lambda one: one.plant is ids_with_gaps):
        defect.plant(data)
    data.save()
    told, seconds = diagnose(root)
    expected = {defect.kind for defect in defects.values()} | {kind for one in defects.values() for kind in one.along}
    lost = [name for name, defect in defects.items() if not is_found(told, defect)]
    alarms = sorted({kind for kind, _ in told_of(told) - known} - expected)
    told.fix(work / "mended")
    mended = diagnose(work / "mended")[0].verdict
    shutil.rmtree(work / "mended")
    return {"planted": len(defects), "not_found": lost, "alarms": alarms, "seconds": seconds, "after_fixing": mended}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("data", type=Path, nargs="?", help="a data set in COCO's layout, with the splits train and val")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = options.data or draw(work / "drawn", {"train": 40, "val": 10})
        told, seconds = diagnose(source)
        as_given = [str(finding).replace(f"{source}/", "") for finding in told.findings]
        told.fix(work / "linked")
        shutil.copytree(work / "linked", work / "clean")  # own files: what is planted must not reach the given ones
        (work / "clean" / "changes.jsonl").unlink()
        clean = diagnose(work / "clean")[0]
        known = told_of(clean)
        single = {name: planted(work / "clean", known, work, name) for name in DEFECTS}
        result = {
            "as_given": as_given,
            "seconds": round(seconds, 2),
            "images": sum(map(len, told.splits.values())),
            "clean_copy": [clean.verdict, *(str(finding).replace(f"{work}/", "") for finding in clean.findings)],
            "planted": single,
            "all_together": all_together(work / "clean", known, work),
            "machine": machine(("detrkit", "numpy", "pillow")),
        }
    if not options.json:
        result["planted"] = {
            f"{name:<56}": " ".join(
                [
                    "found" if one["found"] else "NOT FOUND",
                    *(["false alarms:", *one["alarms"]] if one["alarms"] else []),
                    f"({one['verdict']}" + (f", then {one['after_fixing']})" if "after_fixing" in one else ")"),
                ]
            )
            for name, one in single.items()
        }
    show(result, options.json)


if __name__ == "__main__":
    main()
