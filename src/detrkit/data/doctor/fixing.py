"""Writes a clean copy of a data set, and a line for each change."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.columns import TOLERANCE, sanitise
from detrkit.data.dataset import boxes_in_file
from detrkit.data.doctor import boxes as box_checks
from detrkit.data.doctor import images as image_checks
from detrkit.data.doctor.boxes import MENDED, BoxReport, kinds_of
from detrkit.data.doctor.classes import boxes_of, same_names
from detrkit.data.doctor.findings import Diagnosis
from detrkit.data.doctor.pictures import Pictures
from detrkit.data.files import check_outside
from detrkit.data.problems import POLICIES, Problems
from detrkit.errors import DataError
from detrkit.structures import Category
from detrkit.whole import or_nothing

LOG = "changes.jsonl"

_WRITTEN = ("coco", "voc", "yolo")


class Change(NamedTuple):
    """One thing that the copy has otherwise: `done` is "changed" or "left out"; `before` and `after` are what the file
    states and what the copy has.
    """

    split: str
    where: str
    kind: str
    done: str
    before: Any = None
    after: Any = None

    def to_json(self) -> dict[str, Any]:
        """As a line of the log holds it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Fixed(NamedTuple):
    """A clean copy: where it lies and how it is written, its splits, and how many changes of each kind were made."""

    out: Path
    format: str
    splits: dict[str, Annotations]
    changes: dict[str, int]


def fix(diagnosis: Diagnosis, out: str | Path) -> Fixed:
    """Write a copy without what is repairable, the images as hard links, and `changes.jsonl` with a line a change.

    What a person has to decide stays as it is. The copy holds what `Annotations` hold: boxes, classes and flags, but
    no masks and none of the further fields that a file may have.

    Args:
        diagnosis: of the data set. Where its images were not decoded, copies and unreadable images stay.
        out: a new or empty folder outside of the data set.

    Raises:
        DataError: nothing is left to be written, or an image cannot be linked or copied.
        Error: the disk is full or cannot be written; nothing is left of the copy then.
        UsageError: the folder holds something, or lies inside the data set.
    """
    out = Path(out)
    check_outside(out, diagnosis.path)
    changes: list[Change] = []
    gone = _images_to_leave_out(diagnosis, changes)
    table, merged = _one_name_each(diagnosis, changes)
    splits = {}
    for name, part in diagnosis.splits.items():
        changes += _on_reading(name, part)
        mended = _mend(name, part, diagnosis, gone.get(name, frozenset()), merged, changes)
        kept = [row for row in range(len(part)) if row not in gone.get(name, ())]
        if kept:
            splits[name] = replace(mended, categories=table).select(kept)
    if not splits:
        raise DataError("Nothing is left that could be written", where=diagnosis.path, remedy="See what is broken.")
    format = diagnosis.format if diagnosis.format in _WRITTEN else "coco"
    formats.write(splits, out, format)
    lines = [json.dumps(change.to_json(), ensure_ascii=False) for change in changes]
    with or_nothing(out):
        (out / LOG).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    return Fixed(out, format, splits, dict(Counter(change.kind for change in changes)))


def _on_reading(split: str, part: Annotations) -> Iterator[Change]:
    """What reading the data set has changed already, apart from the boxes whose numbers are known."""
    for kind, places in sorted(part.problems.examples.items()):
        action = POLICIES[kind].action
        if kind not in MENDED and action in ("dropped", "repaired"):
            for place in places:
                yield Change(split, place, kind, "left out" if action == "dropped" else "changed")


def _images_to_leave_out(diagnosis: Diagnosis, changes: list[Change]) -> dict[str, frozenset[int]]:
    """The rows of the images that the copy does not have."""
    look = {name: (diagnosis.splits[name], seen) for name, seen in diagnosis.pictures.items()}
    gone: dict[str, set[int]] = {name: set() for name in look}

    def leave_out(split: str, row: int, kind: str, why: str) -> None:
        if row not in gone[split]:
            gone[split].add(row)
            changes.append(Change(split, str(diagnosis.splits[split].path(row)), kind, "left out", why))

    for name, (_, seen) in look.items():
        for row, trouble in seen.trouble.items():
            leave_out(name, row, "unreadable-image", trouble)
    found = image_checks.copies(look)
    for name, pairs in found.within.items():
        part = look[name][0]
        for kept, copy in pairs if name not in found.said_within else ():
            why = f"the same as {part.path(kept)}"
            more = image_checks.difference(part, kept, copy)
            leave_out(name, copy, "repeated-image", f"{why}, {more}" if more else why)
    for (split, row), (other, its_row) in found.across:
        if split not in found.said_across:
            why = f"the same as {look[other][0].path(its_row)} in {other}"
            leave_out(split, row, "image-in-two-splits", why)
    return {name: frozenset(rows) for name, rows in gone.items()}


def _one_name_each(diagnosis: Diagnosis, changes: list[Change]) -> tuple[tuple[Category, ...], np.ndarray]:
    """The category table with classes of one name joined, and the row in it of each former row."""
    table = next(iter(diagnosis.splits.values())).categories if diagnosis.splits else ()
    counts = np.sum([boxes_of(part) for part in diagnosis.splits.values()], axis=0) if diagnosis.splits else np.zeros(0)
    becomes = np.arange(len(table))
    for rows in same_names(table):
        chosen = max(rows, key=lambda row: counts[row])
        for row in (row for row in rows if row != chosen):
            becomes[row] = chosen
            before, after = table[row].name, table[chosen].name
            changes.append(Change(", ".join(diagnosis.splits), before, "similar-class-names", "changed", before, after))
    kept = np.unique(becomes)
    return tuple(table[row] for row in kept), np.searchsorted(kept, becomes)


def _mend(
    split: str,
    part: Annotations,
    diagnosis: Diagnosis,
    gone: frozenset[int],
    merged: np.ndarray,
    changes: list[Change],
) -> Annotations:
    """A split with its boxes as they are meant; all images are still there."""
    told = box_checks.report(part, diagnosis.format)
    found = told.found
    kinds: list[str] = [""] * len(found.boxes)
    meant = _as_meant(part, told, diagnosis.format, kinds)
    sizes = part.image_sizes
    if (seen := diagnosis.pictures.get(split)) is not None:
        meant, sizes = _in_true_frame(part, seen, found.images, meant, kinds)
    clean, good, repaired = sanitise(meant, sizes[found.images], Problems(), str)
    own = kinds_of(meant, np.where(good, 0, -1))
    for row in np.flatnonzero((~good | repaired) & np.array([not kind for kind in kinds], bool)).tolist():
        kinds[row] = MENDED[own[row]]
    for row in np.flatnonzero(np.isin(found.rows, told.repeated)).tolist():
        good[row], kinds[row] = False, "repeated-box"
    for row in (row for row, kind in enumerate(kinds) if kind and int(found.images[row]) not in gone):
        before, after = found.boxes[row], clean[row] if good[row] else None
        if after is None or not np.allclose(before, after, rtol=0, atol=TOLERANCE):
            where = str(part.path(int(found.images[row])))
            told_after = None if after is None else _plain(after)
            changes.append(
                Change(split, where, kinds[row], "changed" if good[row] else "left out", _plain(before), told_after)
            )
    counts = np.bincount(found.images[good], minlength=len(part))
    # Boxes that reading had left out come without flags, and with the area of the box.
    known = found.rows[good] >= 0
    boxes = clean[good]
    sides = boxes[:, 2:] - boxes[:, :2]
    untouched = known & np.array([not kind for kind in np.array(kinds, object)[good]], bool)
    return replace(
        part,
        image_sizes=sizes.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=merged[found.labels[good]],
        areas=np.where(untouched, _of_rows(part.areas, found.rows[good]), sides[:, 0] * sides[:, 1]),
        crowd=known & _of_rows(part.crowd, found.rows[good]),
        difficult=known & _of_rows(part.difficult, found.rows[good]),
        problems=Problems(),
        masks=None,
        mended=None,
    )


def _of_rows(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entries of some rows; anything where the row is -1."""
    return column[np.maximum(rows, 0)] if len(column) else np.zeros(len(rows), column.dtype)


def _as_meant(part: Annotations, told: BoxReport, format: str, kinds: list[str]) -> np.ndarray:
    """The stated boxes, read as they seem to be meant; notes in `kinds` which were not plain."""
    found, meant = told.found, told.found.boxes.copy()
    shifted = np.ones(len(meant), bool)
    for other in told.misread:
        rows = np.flatnonzero(np.isin(found.images, other.images))
        meant[rows] = other.reading.boxes(found.boxes[rows], part.image_sizes[found.images[rows]], format)
        shifted[rows] = False
        for row in rows:
            kinds[row] = "normalised-boxes" if other.reading.multiplied else "box-format"
    if told.shift is not None:
        meant[shifted] -= told.shift.subtract
        for row in np.flatnonzero(shifted):
            kinds[row] = "one-based-boxes"
    return meant


def _in_true_frame(
    part: Annotations, seen: Pictures, images: np.ndarray, boxes: np.ndarray, kinds: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes brought into the frame of the files, and the true sizes of these."""
    sizes = np.where(seen.readable[:, None], seen.sizes, part.image_sizes)
    boxes = boxes.copy()
    for image in image_checks.turned(part, seen):
        if image_checks.drawn_as_stored(part, seen, int(image)):
            rows = np.flatnonzero(images == image)
            boxes[rows] = turn(boxes[rows], int(seen.orientations[image]), _pair(part.image_sizes[image]))
            for row in rows:
                kinds[row] = "orientation-disagrees"
    for image in image_checks.resized(part, seen):
        rows = np.flatnonzero(images == image)
        moved, _ = boxes_in_file(boxes[rows], _pair(part.image_sizes[image]), _pair(sizes[image]))
        for row, before, after in zip(rows, boxes[rows], moved, strict=True):
            if not np.array_equal(before, after):
                kinds[row] = kinds[row] or "size-mismatch"
        boxes[rows] = moved
    return boxes, sizes


def turn(boxes: np.ndarray, orientation: int, stored: tuple[int, int]) -> np.ndarray:
    """Boxes (k, 4) xyxy on a picture as stored, as they lie on the upright one.

    Args:
        boxes: in pixels of the stored picture.
        orientation: its EXIF flag, 5 to 8: those that exchange the sides.
        stored: height and width of the stored picture.
    """
    height, width = stored
    x, y = boxes[:, ::2], boxes[:, 1::2]
    across = {5: y, 6: height - y, 7: height - y, 8: y}[orientation]
    down = {5: x, 6: x, 7: width - x, 8: width - x}[orientation]
    corners = [across.min(1), down.min(1), across.max(1), down.max(1)]
    return np.stack(corners, 1)


def _pair(size: np.ndarray) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def _plain(box: np.ndarray) -> list[float | None]:
    """Four numbers as JSON can hold them."""
    return [round(float(value), 4) if math.isfinite(value) else None for value in box]


def summary(changes: Mapping[str, int]) -> str:
    """How many changes of each kind, the most frequent first."""
    ordered = sorted(changes.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{count:,} × {kind}" for kind, count in ordered)
