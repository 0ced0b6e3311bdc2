"""Find objects in images: boxes as pictures and as files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from detrkit.cli._options import DetectionOptions
from detrkit.cli._terminal import Outcome, Terminal, count
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.predict import Detector
    from detrkit.structures import Category, Detections

LISTED = 10
"""Unreadable images that are named on standard error; the files name all."""


@dataclass(frozen=True, kw_only=True)
class Options(DetectionOptions):
    """Find objects in images.

    Writes a picture with boxes for each image, all boxes as `detections.json`, and the same as `results.coco.json`: a
    COCO data set with scores, which annotation tools take as a first draft.
    """

    model: tyro.conf.Positional[str]
    """Run folder or model folder, weights of others (file or folder), or a name on the Hugging Face hub."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders (with all that is in them) and patterns such as 'photos/*.jpg'."""
    out: Path
    """Folder to write into."""
    threshold: float | None = None
    """Least score of a box, from 0 to 1. None: where F1 was best on the model's validation images, else 0.5."""
    pictures: bool = True
    """Write a picture with boxes for each image."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Predict, draw and write; images that cannot be read are named at the end.

    Raises:
        DataError: no image is found.
        ModelError: there is no model.
        UsageError: an option that makes no sense, or a folder that must not be written into.
    """
    from detrkit.cli._images import find_images
    from detrkit.cli._weights import load_detector

    _check(options)
    images = find_images(options.images, options.out)
    detector = load_detector(options.model, options)
    if options.threshold is None:
        options = dataclasses.replace(options, threshold=detector.threshold)
    options.out.mkdir(parents=True, exist_ok=True)
    book = _Book(detector.categories, options, terminal)
    unreadable: dict[int, str] = {}
    try:
        with terminal.counting(len(images), "Detecting") as tick:
            for file, found in _found(detector, list(images), options, unreadable):
                book.add(file, images[file], found)
                tick()
    finally:
        book.close(list(unreadable.values()))
    return _outcome(options, book, list(unreadable.values()), terminal)


def _found(
    detector: Detector, files: list[Path], options: Options, unreadable: dict[int, str]
) -> Iterator[tuple[Path, Detections]]:
    """Each image that can be read, in order, with what is in it; fills `unreadable` with what is wrong with others."""

    def left_out(index: int, error: DataError) -> None:
        unreadable[index] = str(error)

    by_name = {str(file): file for file in files}
    for found in detector.stream(
        files,
        threshold=options.threshold,
        ensemble=options.ensemble,
        batch_size=options.batch_size,
        workers=options.workers,
        unreadable=left_out,
    ):
        yield by_name[found.source], found


class _Book:
    """What has been found so far, and the files that it is written to.

    Args:
        categories: of the model.
        options: say where to write, and what.
        terminal: gets a line for each image.
    """

    def __init__(self, categories: tuple[Category, ...], options: Options, terminal: Terminal):
        self.categories, self.options, self.terminal = categories, options, terminal
        self.images: list[dict[str, Any]] = []
        self._coco_images: list[dict[str, Any]] = []
        self._coco_boxes: list[dict[str, Any]] = []

    def add(self, file: Path, name: str, found: Detections) -> None:
        """Keep, draw and tell what is in an image; `name` is the picture's place below the output folder."""
        from detrkit.cli._images import save_picture
        from detrkit.data.images import open_image
        from detrkit.visualize import draw

        height, width = found.image_size
        entry = {
            "file": str(file),
            "height": height,
            "width": width,
            "boxes": [[round(float(value), 2) for value in box] for box in found.boxes],
            "scores": [round(float(score), 4) for score in found.scores],
            "names": found.names,
        }
        if self.options.pictures:
            save_picture(draw(open_image(file), found), self.options.out / name)
            entry["picture"] = name
        self.images.append(entry)
        number = len(self.images)
        self._coco_images.append({"id": number, "file_name": name, "height": height, "width": width})
        for box in found.to_coco(number):
            area = box["bbox"][2] * box["bbox"][3]
            self._coco_boxes.append({"id": len(self._coco_boxes) + 1, **box, "area": area, "iscrowd": 0})
        self.terminal.result(f"{file}: {summary(found.names)}")

    def close(self, unreadable: list[str]) -> None:
        """Write the files."""
        import json

        from detrkit.checkpoint import write_text_whole

        detections = {"threshold": self.options.threshold, "images": self.images, "unreadable": unreadable}
        coco = {
            "images": self._coco_images,
            "annotations": self._coco_boxes,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }
        write_text_whole(self.options.out / "detections.json", json.dumps(detections, indent=1))
        write_text_whole(self.options.out / "results.coco.json", json.dumps(coco))


def summary(names: list[str]) -> str:
    """3 RBC, 1 WBC; the most frequent first."""
    return ", ".join(f"{number} {name}" for name, number in Counter(names).most_common()) or "nothing"


def _outcome(options: Options, book: _Book, unreadable: list[str], terminal: Terminal) -> Outcome:
    boxes = sum(len(image["scores"]) for image in book.images)
    terminal.note(
        f"{count(boxes, 'object')} in {count(len(book.images), 'image')}. "
        f"{'Pictures and files' if options.pictures else 'Files'} lie in {options.out}."
    )
    if unreadable:
        terminal.note(f"{count(len(unreadable), 'image')} could not be read:")
        for line in unreadable[:LISTED]:
            terminal.note(f"  {line}")
        if len(unreadable) > LISTED:
            terminal.note(f"  and {len(unreadable) - LISTED} more, listed in {options.out / 'detections.json'}")
    document = {"out": options.out, "objects": boxes, "images": book.images, "unreadable": unreadable}
    return Outcome(document, exit_code=DataError.exit_code if unreadable else 0)


def _check(options: Options) -> None:
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError("Bad value for --threshold", got=options.threshold, expected="between 0 and 1")
    out = options.out
    if out.is_dir() and any(out.iterdir()) and not (out / "detections.json").is_file():
        raise UsageError(
            "The output folder holds other things",
            where=out,
            remedy="Name a new folder, so that nothing is overwritten.",
        )
