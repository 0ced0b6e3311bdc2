"""Segments of images: pictures, lines, and files as COCO's panoptic tools read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from detrkit.cli._book import note_others, note_unreadable, summary
from detrkit.cli._terminal import Outcome, Terminal, count
from detrkit.errors import DataError

if TYPE_CHECKING:
    from detrkit.panoptic import PanopticMap
    from detrkit.structures import Category

FOLDER = "panoptic"
"""The folder of the PNG files, which COCO's tools look for beside the JSON file of the same name."""


class SegmentBook:
    """The segments found so far, and the files that they are written to.

    Args:
        out: the folder to write into.
        terminal: gets a line for each image.
        pictures: write a picture with coloured segments for each image.

    Attributes:
        segments: how many were found so far.
        unreadable: what is wrong with the images that were left out, by their place in the list of images.
    """

    def __init__(self, out: Path, terminal: Terminal, *, pictures: bool = True):
        self.out, self.terminal, self.pictures = out, terminal, pictures
        self.segments = 0
        self.unreadable: dict[int, str] = {}
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._written: list[str] = []
        self._taken: set[str] = set()

    def leave_out(self, index: int, error: DataError) -> None:
        """Note that an image cannot be read."""
        self.unreadable[index] = str(error)

    def fill(self, answers: Iterable[PanopticMap], images: Mapping[Path, str], doing: str) -> None:
        """Add all answers as they come, and show how far it is; arguments as of the book of detections."""
        by_name = {str(file): file for file in images}
        for name in images.values():
            self._taken.update((name, *(f"{FOLDER}/{folder}" for folder in PurePosixPath(name).parents)))
        with self.terminal.counting(len(images), doing) as tick:
            for found in answers:
                file = by_name[found.source]
                self.add(file, images[file], found)
                tick()

    def add(self, file: Path, name: str, found: PanopticMap) -> None:
        """Write, draw and tell the segments of an image; `name` is the picture's place below the output folder."""
        from detrkit.cli._images import save_picture
        from detrkit.visualize import draw_panoptic

        number, (height, width) = len(self._images) + 1, found.image_size
        png = self._free_name(name)
        place = self.out / FOLDER / png
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(found.to_png())
        self._written.append(f"{FOLDER}/{png}")
        if self.pictures:
            save_picture(draw_panoptic(file, found), self.out / name)
            self._written.append(name)
        self._images.append({"id": number, "file_name": name, "height": height, "width": width})
        self._annotations.append(found.to_coco(number, png))
        self.segments += len(found)
        self.terminal.result(f"{file}: {summary(found.names)}")

    def _free_name(self, name: str) -> str:
        """What the PNG of a picture is called: as COCO has it, like the picture, unless another is called so."""
        png = PurePosixPath(name).with_suffix(".png").as_posix()
        while f"{FOLDER}/{png}" in self._taken:
            png = f"{png}.png"
        self._taken.add(f"{FOLDER}/{png}")
        return png

    def close(self, categories: tuple[Category, ...], **told: Any) -> None:
        """Write the files; `told` is what else `detections.json` says, above the images."""
        import json

        from detrkit.data.drafts import ANSWERS, SEGMENTS
        from detrkit.whole import write_text_whole

        document = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [
                {"id": category.id, "name": category.name, "isthing": int(category.is_thing)} for category in categories
            ],
        }
        self.out.mkdir(parents=True, exist_ok=True)
        write_text_whole(self.out / SEGMENTS, json.dumps(document))
        told_of = {**told, "images": self._images, "unreadable": list(self.unreadable.values())}
        write_text_whole(self.out / ANSWERS, json.dumps(told_of, indent=1))

    def outcome(self, **further: Any) -> Outcome:
        """Sum up on standard error, and say all of it where a program reads; `further` is said besides."""
        self.terminal.note(
            f"{count(self.segments, 'segment')} in {count(len(self._images), 'image')}. "
            f"{'Pictures and files' if self.pictures else 'Files'} lie in {self.out}."
        )
        note_others(self.out, self._written, self.terminal)
        unreadable = list(self.unreadable.values())
        note_unreadable(unreadable, self.out, self.terminal)
        images = [{**image, **annotation} for image, annotation in zip(self._images, self._annotations, strict=True)]
        document = {"out": self.out, "segments": self.segments, "images": images, "unreadable": unreadable}
        return Outcome({**document, **further}, exit_code=DataError.exit_code if unreadable else 0)
