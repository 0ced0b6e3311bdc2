"""COCO results files: detections as a list of image id, category id, box or mask, and score; segments as pictures and
a list of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.documents import read_json
from detrkit.errors import DataError, UsageError, brief
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Detections
from detrkit.whole import write_text_whole

LARGEST_MASK = 1 << 28
"""Pixels of the largest mask of a detection."""

LARGEST_RESULTS = 1 << 30
"""Bytes of the largest results file: those of COCO's test images with masks have half of that."""

_KEYS = {"image_id", "category_id", "score"}
"""What each detection of a results file has, and no true object of an annotation file."""


def read_results(path: Path | str, annotations: Annotations) -> list[Detections]:
    """Read a COCO results file against the annotations that it answers.

    Args:
        path: a JSON list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, and, for masks,
            {"segmentation": {"size", "counts"}} with compressed run lengths; a detection that has a mask needs no box.
        annotations: n images; their ids and category ids are those of the file.

    Returns:
        n entries in the order of the annotations; empty for an image that the file does not mention.

    Raises:
        DataError: the file is missing or is no such list, or names an image or a category that the annotations lack.
    """
    path = Path(path)
    try:
        entries = read_json(path, LARGEST_RESULTS)
    except OSError as error:
        raise DataError(f"The results file cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise DataError(f"The results file is no JSON ({brief(str(error), 200)})", where=path) from error
    if not isinstance(entries, list):
        raise DataError(
            "The results file is no list", where=path, got=type(entries).__name__, expected="a list of detections"
        )
    image_of = {int(number): index for index, number in enumerate(annotations.image_ids)}
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    columns: list[list[_Entry]] = [[] for _ in range(len(annotations))]
    for position, entry in enumerate(entries):
        index, row = _entry(entry, image_of, label_of, f"{path}, entry {position}")
        if row.mask is not None and (row.mask.sizes[0] != annotations.image_sizes[index]).any():
            raise DataError(
                "The mask of a detection is not of its image's size",
                where=f"{path}, entry {position}",
                got=f"{row.mask.sizes[0].tolist()}",
                expected=f"{annotations.image_sizes[index].tolist()}",
            )
        columns[index].append(row)
    if annotations.masks is not None:
        _refuse_mixed(path, columns)
    return [_detections(annotations, index, rows) for index, rows in enumerate(columns)]


def _refuse_mixed(path: Path, columns: list[list[_Entry]]) -> None:
    """Refuse results of which some have masks, where there are masks to compare them with."""
    with_mask = sum(row.mask is not None for rows in columns for row in rows)
    if 0 < with_mask < sum(map(len, columns)):
        raise DataError(
            "Some detections have a mask and others have none",
            where=path,
            got=f"{with_mask} masks of {sum(map(len, columns))} detections",
            expected="a mask, be it empty, for each of them",
        )


def check_results(path: Path | str, *, panoptic: bool = False) -> None:
    """Refuse a place where results would be written over anything but earlier results: annotations are not to be lost.

    Args:
        path: where they are to be written.
        panoptic: as `write_panoptic` does, and not as `write_results`.

    Raises:
        UsageError: something else lies there, or there is no such folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError("There is no folder to write the results into", where=path.parent)
    if not path.exists() or not (path.is_file() or path.is_dir()):  # nothing is lost in a pipe or a device
        return
    try:
        held = read_json(path, LARGEST_RESULTS)
    except (OSError, ValueError):
        held = None
    if panoptic:
        earlier = isinstance(held, dict) and held.keys() == {"annotations", "categories"}
    else:
        earlier = isinstance(held, list) and all(isinstance(one, dict) and one.keys() >= _KEYS for one in held)
    if not earlier:
        raise UsageError(
            "The results would be written over something else",
            where=path,
            expected="a new file, or one of earlier results",
            remedy="Name another file.",
        )


def write_results(path: Path | str, annotations: Annotations, detections: Sequence[Detections]) -> None:
    """Write detections as a COCO results file; entry i belongs to image i of the annotations.

    Raises:
        Error: the disk is full or cannot be written; what stood there still stands.
        UsageError: as of `check_results`.
    """
    check_results(path)
    entries = [
        entry
        for number, one in zip(annotations.image_ids, detections, strict=True)
        for entry in one.to_coco(int(number))
    ]
    if Path(path).exists() and not Path(path).is_file():
        Path(path).write_text(json.dumps(entries), encoding="utf-8")
    else:
        write_text_whole(Path(path), json.dumps(entries))


def write_panoptic(path: Path | str, folder: Path | str, annotations: Annotations, maps: Sequence[PanopticMap]) -> None:
    """Write segments as COCO's tools expect panoptic results; entry i belongs to image i of the annotations.

    Args:
        path: the JSON file, which lists the segments of each image under its id.
        folder: for one PNG file an image, named by its id; it is made where it does not exist.
        annotations: n images.
        maps: n entries.

    Raises:
        Error: the disk is full; the list that stood there still stands.
        UsageError: a place that cannot be written, or as of `check_results`.
    """
    path, folder = Path(path), Path(folder)
    check_results(path, panoptic=True)
    entries = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, one in zip(annotations.image_ids.tolist(), maps, strict=True):
            name = f"{number:012d}.png"
            (folder / name).write_bytes(one.to_png())
            entries.append(one.to_coco(number, name))
        categories = [
            {"id": category.id, "name": category.name, "isthing": int(category.is_thing)}
            for category in annotations.categories
        ]
        write_text_whole(path, json.dumps({"annotations": entries, "categories": categories}))
    except OSError as error:
        raise UsageError(
            f"The segments cannot be written ({error.strerror})", where=error.filename or path, expected="a new file"
        ) from error


class _Entry(NamedTuple):
    box: list[float]
    score: float
    label: int
    mask: RunLengths | None


def _entry(entry: Any, image_of: dict[int, int], label_of: dict[int, int], where: str) -> tuple[int, _Entry]:
    held = isinstance(entry, dict) and "segmentation" in entry
    mask = _mask(entry["segmentation"], where) if held else None
    try:
        image, category, score = int(entry["image_id"]), int(entry["category_id"]), float(entry["score"])
        if mask is not None and "bbox" not in entry:
            box = mask.boxes()[0].tolist()
        else:
            x, y, width, height = (float(value) for value in entry["bbox"])
            box = [x, y, x + width, y + height]
        if not np.isfinite([*box, score]).all():
            raise ValueError("a number that is not finite")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            "A detection lacks what it needs",
            where=where,
            got=brief(entry, 200),
            expected="image_id, category_id, bbox of four numbers (or a segmentation) and score",
        ) from error
    if image not in image_of:
        raise DataError(f"The annotations hold no image of id {image}", where=where)
    if category not in label_of:
        raise DataError(
            f"The annotations hold no category of id {category}",
            where=where,
            expected=f"one of {sorted(label_of)[:20]}",
        )
    return image_of[image], _Entry(box, score, label_of[category], mask)


def _mask(segmentation: Any, where: str) -> RunLengths:
    try:
        mask = RunLengths.from_coco([dict(segmentation)])
        if mask.sizes.shape != (1, 2) or (mask.sizes <= 0).any() or mask.sizes.prod(dtype=np.int64) > LARGEST_MASK:
            raise ValueError("no size that an image has")
        mask.areas()  # damaged runs are noticed when they are first used
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(
            f"The mask of a detection cannot be read ({error})",
            where=where,
            got=brief(segmentation, 200),
            expected='{"size": [height, width], "counts": compressed run lengths as text}',
        ) from error
    return mask


def _detections(annotations: Annotations, index: int, rows: list[_Entry]) -> Detections:
    height, width = (int(side) for side in annotations.image_sizes[index])
    segments = None
    if any(row.mask is not None for row in rows):
        unknown = RunLengths.unknown(np.array([[height, width]], np.int64))
        segments = RunLengths.joined([unknown if row.mask is None else row.mask for row in rows])
    return Detections(
        np.array([row.box for row in rows], np.float64).reshape(-1, 4),
        np.array([row.score for row in rows], np.float64),
        np.array([row.label for row in rows], np.int64),
        annotations.categories,
        (height, width),
        str(annotations.path(index)),
        segments,
    )
