"""COCO panoptic (Kirillov et al., CVPR 2019): each pixel belongs to one segment, of a thing or of stuff.

Layout: `annotations/panoptic_{split}.json`, or the same at the top, with the PNG files of the segments in
`panoptic_{split}/` beside it or beside its folder, and images as COCO's (see `coco`). An annotation lists the segments
of an image; a pixel whose colour is (R, G, B) belongs to the segment R + 256 G + 256² B, and to none where that is 0.
Categories say by `isthing` whether they are things.

Each segment becomes an object with its box, so stuff has boxes as well. Masks stay in their files.

Writing numbers the segments of an image from 1. A pixel has one segment: where masks overlap, the smaller one gets it,
and a crowd only what is left. Objects without a mask, or of which no pixel is left, are lost, and so is `difficult`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detrkit.data.annotations import Annotations, Strings
from detrkit.data.files import CopyImages, place_images, safe_name, unique_stems
from detrkit.data.formats import Source
from detrkit.data.formats import _coco_layout as layout
from detrkit.data.formats._coco_columns import Collector
from detrkit.data.formats._coco_reading import read_through
from detrkit.data.formats._coco_writing import object_item, write_lists
from detrkit.data.problems import Problems
from detrkit.data.segment_files import COLOURS, SegmentFiles, check_pictures, numbers_of, to_colours
from detrkit.data.segmentations import FINDINGS, MaskColumn
from detrkit.errors import DataError

EXPECTED = "annotations/panoptic_train.json with PNG files in panoptic_train/"
PRECEDENCE = 2


def recognise(root: Path) -> dict[str, Source]:
    """Find panoptic COCO files in a folder, its `annotations` folder and its folders of splits; or take a single file.

    Raises:
        DataError: two files could be the same split.
    """
    return layout.sources(root, "coco_panoptic", "segments", layout.SEGMENTS)


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one panoptic file.

    Args:
        source: what `recognise` found.
        check_files: whether images must exist, see `formats.read`; and whether the pictures of the masks are looked at.
            Without it, one that is missing is found out when its masks are asked for.
        masks: whether the annotations have masks.

    Raises:
        DataError: as of `coco.read`.
    """
    problems = Problems()
    segments = _Segments(source.path, problems, check_files)
    return read_through(
        source,
        Collector(source.path, problems, segments if masks else None, segments.describe),
        check_files=check_files,
        remedy="Export the annotations as COCO panoptic segmentation.",
        to_objects=segments.to_objects,
    )


def _picture_folder(path: Path) -> Path:
    """The folder of a file's pictures: of its name, beside it or beside its folder."""
    names = dict.fromkeys([path.stem, f"{layout.SEGMENTS}{path.stem}"])
    places = [parent / name for name in names for parent in (path.parent, path.parent.parent)]
    return next((place for place in places if place.is_dir()), places[0])


class _Segments:
    """Makes objects of the segments of images, numbered from 0 through the file, and knows where their masks are.

    Args:
        path: the file.
        problems: where findings are counted.
        check_files: whether pictures are looked at.
    """

    def __init__(self, path: Path, problems: Problems, check_files: bool):
        self.path, self.problems, self.check_files = path, problems, check_files
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.files = array("q")
        self.numbers = array("q")
        self.kept = array("q")

    def describe(self, own: int) -> str:
        """Which segment of which picture an object is."""
        return f"segment {self.numbers[own]} of {self.names[self.files[own]] or 'an image without a picture'}"

    def to_objects(self, items: list[Any]) -> list[Any]:
        """The segments of some annotations as COCO's objects."""
        objects = []
        for item in items:
            segments = item.get("segments_info") if isinstance(item, dict) else None
            if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
                self.problems.add("malformed-annotation", f"{self.path}: annotation number {len(self.names)}")
                segments = []
            name = item.get("file_name") if isinstance(item, dict) else None
            self.names.append(safe_name(name, str(self.path)) if isinstance(name, str) else "")
            self.sizes.append((0, 0))
            for segment in segments:
                own, number = len(self.files), segment.get("id")
                self.files.append(len(self.names) - 1)
                self.numbers.append(number if type(number) is int and 0 < number < COLOURS**3 else 0)
                objects.append(segment | {"id": own, "image_id": item.get("image_id"), "segmentation": own})
        return objects

    def add(self, segmentations: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> None:
        """Note which objects are left of a batch, and the sizes of their images."""
        self.kept.extend(segmentations)
        for own, size in zip(segmentations, sizes, strict=True):
            self.sizes[self.files[own]] = size

    def column(self) -> MaskColumn:
        """The masks of the objects that are left; pictures are looked at where files are checked."""
        root = _picture_folder(self.path)
        kept = np.array(self.kept, np.int64)
        files, numbers = np.array(self.files, np.int64)[kept], np.array(self.numbers, np.int64)[kept]
        readable, fitting = np.array([bool(name) for name in self.names], bool), np.ones(len(self.names), bool)
        if self.check_files:
            readable, fitting = check_pictures(root, self.names, self.sizes, self.problems)
        findings = np.where(numbers > 0, 0, FINDINGS.index("malformed-mask")).astype(np.uint8)
        findings[~fitting[files]] = FINDINGS.index("mask-size-mismatch")
        findings[~readable[files]] = FINDINGS.index("missing-mask")
        numbers = np.where(findings == 0, numbers, 0)
        sizes = np.array(self.sizes, np.int32).reshape(-1, 2)
        return MaskColumn(SegmentFiles(root, Strings(self.names), sizes, files, numbers), findings)


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `annotations/panoptic_{split}.json`, PNG files in `annotations/panoptic_{split}/` and images in `{split}/`.

    Raises:
        DataError: there are no masks, the size of an image is not known, or a file of masks cannot be read.
    """
    for split, part in splits.items():
        if part.masks is None and len(part.boxes):
            raise DataError(
                "Panoptic annotations need masks",
                where=part.source,
                got=f"{len(part.boxes):,} boxes without masks",
                remedy="Write coco, voc or yolo, which take boxes; or read the data set with its masks.",
            )
        pictures = out / "annotations" / f"{layout.SEGMENTS}{split}"
        pictures.mkdir(parents=True)
        place_images(part, list(part.file_names), out / split, copy_images)
        write_lists(pictures.with_suffix(".json"), part, _annotation_items(part, pictures), segments=True)


def _annotation_items(annotations: Annotations, pictures: Path) -> Iterator[dict[str, object]]:
    """The items of the images, whose pictures are written on the way."""
    names = [Path(name).with_suffix(".png").as_posix() for name in unique_stems(list(annotations.file_names))]
    for index, name in enumerate(names):
        numbers = numbers_of(annotations, index)
        path = pictures / safe_name(name, annotations.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_colours(numbers).save(path)
        rows = annotations.rows(index)
        areas = np.bincount(numbers.reshape(-1), minlength=rows.stop - rows.start + 1)
        segments = [
            {"id": number} | object_item(annotations, row) | {"area": int(areas[number])}
            for number, row in enumerate(range(rows.start, rows.stop), 1)
            if areas[number]
        ]
        yield {"image_id": int(annotations.image_ids[index]), "file_name": name, "segments_info": segments}
