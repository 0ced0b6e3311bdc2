"""What is wrong with the classes and the objects of a data set, counted."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.doctor.findings import Finding, Place, Resolution
from detrkit.structures import Category

MANY_SMALL, MOST_SMALL = 0.1, 0.5
"""From this share on it is told that objects are smaller than a token; and from the second on before every training."""

SPELT_ALIKE = 0.9
"""How alike two names must be, as `difflib` counts it, to pass for one with a slip of the pen."""

MOST_NAMES, MOST_ALIKE = 2000, 300
"""Classes, and classes of one first letter, whose names are compared pair by pair."""

_SHORT = 2
"""Letters; words that differ and are no longer, such as "type a" and "type b", are meant to differ."""


def boxes_of(annotations: Annotations) -> np.ndarray:
    """How many boxes each class has, crowds left out."""
    return np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories))


def findings(splits: Mapping[str, Annotations], format: str) -> Iterator[Finding]:
    """What the category table and the numbers of boxes show. All splits have one table."""
    first = next(iter(splits.values()))
    table, everything = first.categories, ", ".join(splits)
    counts = {name: boxes_of(part) for name, part in splits.items()}
    if (ids := _ids(table)) and format == "coco":
        yield Finding.of("category-ids", everything, [Place(first.source, ids)], count=len(table))
    for name, part in splits.items():
        yield from _from_one(name, part, counts[name], format)
    total = np.sum(list(counts.values()), axis=0)
    if total.any():
        places = [Place(table[row].name, f"id {table[row].id}") for row in np.flatnonzero(total == 0)]
        if places:
            yield Finding.of("class-without-examples", everything, places)
    if "train" in counts and counts["train"].any():
        for name in (name for name in splits if name != "train"):
            rows = np.flatnonzero((counts[name] > 0) & (counts["train"] == 0))
            places = [Place(table[row].name, f"{counts[name][row]:,} boxes") for row in rows]
            if places:
                yield Finding.of("class-not-in-training", name, places)
    yield from _names(table, total, everything)


def _ids(table: Sequence[Category]) -> str:
    ids = [category.id for category in table]
    if not ids or ids == list(range(len(ids))):
        return ""
    gaps = ids[-1] - ids[0] + 1 - len(ids)
    said = f"ids {ids[0]} to {ids[-1]}"
    return f"{said}, of which {gaps:,} are no category" if gaps else said


def _from_one(name: str, part: Annotations, counts: np.ndarray, format: str) -> Iterator[Finding]:
    lost = part.problems.counts.get("unknown-category", 0)
    if format == "yolo" and lost and len(counts) > 1 and counts[0] == 0 and counts[1:].any():
        said = f"Class 0 ({part.categories[0].name}) has no box, and {lost:,} boxes have a class beyond the table."
        places = [Place(place) for place in part.problems.examples["unknown-category"]]
        yield Finding.of("class-ids-from-one", name, places, said, count=len(part.boxes) + lost)


def plain_name(name: str) -> str:
    """A name without what spelling alone makes different: case, blanks, underscores and hyphens."""
    return re.sub(r"[\s_\-]+", "", name).casefold()


def same_names(table: Sequence[Category]) -> list[list[int]]:
    """Groups of rows whose names differ in case, blanks, underscores and hyphens alone."""
    groups: dict[str, list[int]] = {}
    for row, category in enumerate(table):
        groups.setdefault(plain_name(category.name), []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _names(table: Sequence[Category], counts: np.ndarray, split: str) -> Iterator[Finding]:
    def said(row: int) -> str:
        return f"id {table[row].id}, {counts[row]:,} boxes"

    same = same_names(table)
    if same:
        places = [
            Place(" and ".join(repr(table[row].name) for row in rows), "; ".join(map(said, rows))) for rows in same
        ]
        spelt = "They differ in case, blanks or hyphens alone; the clean copy has them as one class."
        yield Finding.of("similar-class-names", split, places, spelt, severity="repairable")
    places = [
        Place(f"{table[first].name!r} and {table[second].name!r}", f"{said(first)}; {said(second)}")
        for first, second in _slips(table)
    ]
    if places:
        yield Finding.of("similar-class-names", split, places)


def _slips(table: Sequence[Category]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose names differ by a letter, as a plural or a slip of the pen does; of large tables none."""
    if len(table) > MOST_NAMES:
        return
    by_letter: dict[str, list[int]] = {}
    for row, category in enumerate(table):
        by_letter.setdefault(plain_name(category.name)[:1], []).append(row)
    for rows in by_letter.values():
        for first, second in itertools.combinations(rows[:MOST_ALIKE], 2):
            if _is_slip(table[first].name.casefold(), table[second].name.casefold()):
                yield first, second


def _is_slip(one: str, other: str) -> bool:
    if abs(len(one) - len(other)) > 2 or plain_name(one) == plain_name(other):
        return False
    if re.findall(r"\d+", one) != re.findall(r"\d+", other):
        return False
    if _are_swapped(one, other):
        return True
    words, others = re.split(r"[\s_\-]+", one), re.split(r"[\s_\-]+", other)
    if len(words) == len(others):
        differing = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
        if any(min(map(len, pair)) <= _SHORT for pair in differing):
            return False
    return difflib.SequenceMatcher(None, one, other).ratio() >= SPELT_ALIKE


def _are_swapped(one: str, other: str) -> bool:
    """Whether two neighbouring letters changed places, which in short names leaves little that is alike."""
    differing = [place for place in range(min(len(one), len(other))) if one[place] != other[place]]
    if len(one) != len(other) or len(one) <= _SHORT or len(differing) != 2 or differing[1] - differing[0] != 1:
        return False
    first, second = differing
    return one[first] == other[second] and one[second] == other[first]


def object_findings(
    annotations: Annotations, split: str, resolution: Resolution, misread: np.ndarray
) -> Iterator[Finding]:
    """What the number and the size of the objects mean for a model that sees them at `resolution`.

    Args:
        annotations: a split.
        split: its name.
        resolution: of the model.
        misread: rows of images whose boxes are not to be measured, since they are meant otherwise.
    """
    counts = np.diff(annotations.offsets)
    if len(empty := np.flatnonzero(counts == 0)) and len(annotations.boxes):
        places = [Place(str(annotations.path(int(row))), "", split, int(row)) for row in empty]
        yield Finding.of("image-without-boxes", split, places)
    owners = np.repeat(np.arange(len(annotations)), counts)
    objects = np.bincount(owners[~annotations.crowd], minlength=len(annotations))
    crowded = np.flatnonzero(objects > resolution.queries)
    if len(crowded):
        crowded = crowded[np.argsort(-objects[crowded], kind="stable")]
        most = int(objects[crowded[0]])
        said = f"{resolution.model} has {resolution.queries} queries; an image holds up to {most:,} objects."
        places = [
            Place(str(annotations.path(int(row))), f"{objects[row]:,} objects", split, int(row)) for row in crowded
        ]
        yield Finding.of("more-objects-than-queries", split, places, said)
    yield from small_objects(annotations, split, resolution, misread)


def small_objects(
    annotations: Annotations, split: str, resolution: Resolution, misread: np.ndarray, share: float = MANY_SMALL
) -> Iterator[Finding]:
    """Objects that are smaller than a token, where more than this share of all are; arguments as above."""
    owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    sides = resolution.sides(annotations)
    measured = ~annotations.crowd & ~np.isin(owners, misread)
    small = np.flatnonzero((sides < resolution.token) & measured)
    if len(small) > share * max(measured.sum(), 1):
        small = small[np.argsort(sides[small], kind="stable")]
        said = (
            f"At {resolution.image_size} pixels {len(small) / measured.sum():.0%} of the boxes are smaller than one "
            f"token of {resolution.token} pixels ({resolution.model})."
        )
        places = [
            Place(
                str(annotations.path(int(owners[row]))),
                f"{sides[row]:.1f} pixels",
                split,
                int(owners[row]),
                annotations.boxes[row][None],
            )
            for row in small
        ]
        yield Finding.of("small-objects", split, places, said)
