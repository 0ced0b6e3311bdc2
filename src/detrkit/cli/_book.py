"""What is found in images: pictures, lines and files, the same for all verbs that look for something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.cli._terminal import Outcome, Terminal, count
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.structures import Category, Detections

LISTED = 10
"""Unreadable images that are named on standard error; the files name all."""


class Book:
    """What has been found so far, and the files that it is written to.

    Args:
        categories: the table that labels point into.
        out: the folder to write into; it exists, or is made with the first picture or file.
        terminal: gets a line for each image.
        pictures: write a picture with boxes for each image.

    Attributes:
        images: what was found in each image, as `detections.json` holds it.
        unreadable: what is wrong with the images that were left out, by their place in the list of images.
    """

    def __init__(self, categories: tuple[Category, ...], out: Path, terminal: Terminal, *, pictures: bool = True):
        self.categories, self.out, self.terminal, self.pictures = categories, out, terminal, pictures
        self.images: list[dict[str, Any]] = []
        self.unreadable: dict[int, str] = {}
        self._coco_images: list[dict[str, Any]] = []
        self._coco_boxes: list[dict[str, Any]] = []

    @property
    def boxes(self) -> int:
        """How many objects were found so far."""
        return len(self._coco_boxes)

    def leave_out(self, index: int, error: DataError) -> None:
        """Note that an image cannot be read."""
        self.unreadable[index] = str(error)

    def fill(self, answers: Iterable[Detections], images: Mapping[Path, str], doing: str) -> None:
        """Add all answers as they come, and show how far it is.

        Args:
            answers: one for each image that can be read; `source` says which.
            images: all of them, with the place of each one's picture below the output folder.
            doing: a word for the progress.
        """
        by_name = {str(file): file for file in images}
        with self.terminal.counting(len(images), doing) as tick:
            for found in answers:
                file = by_name[found.source]
                self.add(file, images[file], found)
                tick()

    def add(self, file: Path, name: str, found: Detections) -> None:
        """Keep, draw and tell what is in an image; `name` is the picture's place below the output folder."""
        from detrkit.cli._images import save_picture
        from detrkit.visualize import draw

        if not self.images:
            self.out.mkdir(parents=True, exist_ok=True)  # where that is impossible, to know it now
        height, width = found.image_size
        entry = {
            "file": str(file),
            "height": height,
            "width": width,
            "boxes": [[round(float(value), 2) for value in box] for box in found.boxes],
            "scores": [round(float(score), 4) for score in found.scores],
            "names": found.names,
        }
        if found.segments is not None:
            entry["masks"] = found.segments.to_coco()
        if self.pictures:
            save_picture(draw(file, found), self.out / name)
            entry["picture"] = name
        self.images.append(entry)
        number = len(self.images)
        self._coco_images.append({"id": number, "file_name": name, "height": height, "width": width})
        areas = [None] * len(found) if found.segments is None else found.segments.areas().tolist()
        for box, area in zip(found.to_coco(number), areas, strict=True):
            area = box["bbox"][2] * box["bbox"][3] if area is None else area
            self._coco_boxes.append({"id": len(self._coco_boxes) + 1, **box, "area": area, "iscrowd": 0})
        self.terminal.result(f"{file}: {summary(found.names)}")

    def close(self, **told: Any) -> None:
        """Write the files; `told` is what else `detections.json` says, above the images."""
        import json

        from detrkit.data.drafts import ANSWERS, BOXES
        from detrkit.whole import write_text_whole

        detections = {**told, "images": self.images, "unreadable": list(self.unreadable.values())}
        coco = {
            "images": self._coco_images,
            "annotations": self._coco_boxes,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }
        self.out.mkdir(parents=True, exist_ok=True)
        write_text_whole(self.out / ANSWERS, json.dumps(detections, indent=1))
        write_text_whole(self.out / BOXES, json.dumps(coco))

    def outcome(self, threshold: float, **further: Any) -> Outcome:
        """Sum up on standard error.

        Args:
            threshold: the score that objects have at least.
            **further: entries of the document that `--json` prints.
        """
        from detrkit.visualize.fonts import unwritable

        note = self.terminal.note
        note(
            f"{count(self.boxes, 'object')} in {count(len(self.images), 'image')}, scoring {threshold:.2g} or more. "
            f"{'Pictures and files' if self.pictures else 'Files'} lie in {self.out}."
        )
        note_others(self.out, [entry["picture"] for entry in self.images if "picture" in entry], self.terminal)
        for text in unwritable([category.name for category in self.categories]) if self.pictures else ():
            note(text)
        unreadable = list(self.unreadable.values())
        note_unreadable(unreadable, self.out, self.terminal)
        document = {"out": self.out, "objects": self.boxes, "images": self.images, "unreadable": unreadable}
        return Outcome(
            {**document, "threshold": threshold, **further}, exit_code=DataError.exit_code if unreadable else 0
        )


def note_others(out: Path, own: Iterable[str], terminal: Terminal) -> None:
    """Say that an output folder holds pictures that were not made now.

    Args:
        out: the folder.
        own: the pictures that were, by their place in it.
        terminal: where it is said.
    """
    from detrkit.data.files import walk_images

    others = set(walk_images(out)).difference(own)
    if others:
        terminal.note(f"{count(len(others), 'other picture')} in it, such as {min(others)}, lay there before.")


def note_unreadable(unreadable: Sequence[str], out: Path, terminal: Terminal) -> None:
    """Name on standard error the first images that could not be read."""
    if unreadable:
        terminal.note(f"{count(len(unreadable), 'image')} could not be read:")
        for line in unreadable[:LISTED]:
            terminal.note(f"  {line}")
        if len(unreadable) > LISTED:
            terminal.note(f"  and {len(unreadable) - LISTED} more, listed in {out / 'detections.json'}")


def summary(names: list[str]) -> str:
    """3 RBC, 1 WBC; the most frequent first."""
    return ", ".join(f"{number} {name}" for name, number in Counter(names).most_common()) or "nothing"


def check_out(out: Path) -> None:
    """Refuse a file, and a folder that holds anything but an earlier book.

    Raises:
        UsageError: it is one, or does.
    """
    if out.exists() and not out.is_dir():
        raise UsageError("The output needs a folder", where=out, got="a file", remedy="Name a new folder.")
    from detrkit.data.drafts import ANSWERS

    if out.is_dir() and any(out.iterdir()) and not (out / ANSWERS).is_file():
        raise UsageError(
            "The output folder holds other things",
            where=out,
            remedy="Name a new folder, so that nothing is overwritten.",
        )


def check_report(folder: Path | None) -> None:
    """Refuse a folder that holds anything but an earlier report; None: no report is asked for.

    Raises:
        UsageError: it does, or is a file.
    """
    from detrkit.visualize.page import is_page

    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError("The report needs a folder", where=folder, got="a file")
    if any(folder.iterdir()) and not is_page(folder / "report.html"):
        raise UsageError(
            "The folder of the report holds other things",
            where=folder,
            remedy="Name a new folder, so that nothing is overwritten.",
        )
