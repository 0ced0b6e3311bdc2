"""What is wrong with the images of a data set, from what was seen in them: unreadable, turned, twice, in two splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.doctor.findings import Finding, Place, is_loss
from detrkit.data.doctor.kinds import Severity
from detrkit.data.doctor.pictures import ALIKE, Pictures, most_alike, outlines, repeats
from detrkit.data.doctor.readings import FAR, fits

MOST_COMPARED = 200_000
"""Images of two splits together that are compared for likeness; the time grows with the square of their number."""

_SIDEWAYS = 5
"""The least orientation flag that exchanges height and width."""

Look = Mapping[str, tuple[Annotations, Pictures]]
"""The splits by name, in the order train, val, test, with what was seen in their images."""


class Copies(NamedTuple):
    """Files that are the same, byte for byte: `within` lists for each split pairs of rows, the one that is kept and its
    copy, and `across` pairs of (split, row), the first of which is in the split to be trained on.

    Where to leave them out would lose too much, `said_within` and `said_across` say so for the split that would lose
    it, and nothing is left out there.
    """

    within: dict[str, list[tuple[int, int]]]
    across: list[tuple[tuple[str, int], tuple[str, int]]]
    said_within: dict[str, str]
    said_across: dict[str, str]


def copies(splits: Look) -> Copies:
    """Find files that stand in a data set more than once. Entries that name the same file count, too; of several in one
    split the first of those with the most boxes is kept.
    """
    within, across = {}, []
    said_within: dict[str, str] = {}
    said_across: dict[str, str] = {}
    for name, (part, pictures) in splits.items():
        within[name] = list(repeats(pictures.digests, np.diff(part.offsets)))
        alone = sum(boxes_alone(part, *pair) for pair in within[name])
        if is_loss(alone, len(part.boxes)):
            said_within[name] = f"{alone:,} of {len(part.boxes):,} boxes would be lost so."
    for (name, (_, pictures)), (other, (_, others)) in itertools.combinations(splits.items(), 2):
        places = {digest: row for row, digest in reversed(list(enumerate(others.digests))) if digest}
        for row, digest in enumerate(pictures.digests):
            if digest in places:
                across.append(((name, row), (other, places[digest])))
    for name, (part, _) in splits.items():
        rows = list({row for (split, row), _ in across if split == name})
        boxes = int(np.diff(part.offsets)[rows].sum())
        for lost, total, unit in ((len(rows), len(part), "images"), (boxes, len(part.boxes), "boxes")):
            if is_loss(lost, total):
                said_across.setdefault(name, f"{lost:,} of {total:,} {unit} of {name} would be lost so.")
    return Copies(within, across, said_within, said_across)


def boxes_alone(annotations: Annotations, kept: int, copy: int) -> int:
    """How many boxes of a copy the image that is kept does not have, to a pixel and of the same class."""
    ours, theirs = annotations.rows(kept), annotations.rows(copy)
    apart = np.abs(annotations.boxes[theirs][:, None] - annotations.boxes[ours]).max(2)
    same = (apart <= 1) & (annotations.labels[theirs][:, None] == annotations.labels[ours])
    return int((~same.any(1)).sum())


def findings(splits: Look) -> Iterator[Finding]:
    """Everything that the pictures show, split by split and then across them."""
    for name, (part, pictures) in splits.items():
        yield from _unreadable(name, part, pictures)
        yield from _sizes(name, part, pictures)
    found = copies(splits)
    for name, pairs in found.within.items():
        part = splits[name][0]
        places = [_pair(splits, (name, copy), (name, kept), difference(part, kept, copy)) for kept, copy in pairs]
        if places:
            said = found.said_within.get(name, "")
            yield Finding.of("repeated-image", name, places, said, severity="broken" if said else None)
    for (name, other), pairs_across in _by_splits(found.across):
        said, places = found.said_across.get(name, ""), [_pair(splits, *pair) for pair in pairs_across]
        severity: Severity | None = "broken" if said else None
        yield Finding.of("image-in-two-splits", f"{name}, {other}", places, said, severity=severity)
    yield from _similar(splits, found)


def _by_splits(
    pairs: list[tuple[tuple[str, int], tuple[str, int]]],
) -> Iterator[tuple[tuple[str, str], list[tuple[tuple[str, int], tuple[str, int]]]]]:
    groups: dict[tuple[str, str], list[tuple[tuple[str, int], tuple[str, int]]]] = {}
    for first, second in pairs:
        groups.setdefault((first[0], second[0]), []).append((first, second))
    yield from groups.items()


def _unreadable(name: str, annotations: Annotations, pictures: Pictures) -> Iterator[Finding]:
    if not pictures.trouble:
        return
    places = [Place(str(annotations.path(row)), said, name, row) for row, said in pictures.trouble.items()]
    severe = is_loss(len(places), len(annotations))
    said = f"{len(places):,} of {len(annotations):,} images are lost so." if severe else ""
    yield Finding.of("unreadable-image", name, places, said, severity="broken" if severe else None)


def turned(annotations: Annotations, pictures: Pictures) -> np.ndarray:
    """Rows of images whose annotated size is that of the picture as stored, where its flag shows it sideways."""
    sizes = annotations.image_sizes
    sideways = (pictures.orientations >= _SIDEWAYS) & pictures.readable & (sizes > 0).all(1)
    return np.flatnonzero(sideways & (sizes != pictures.sizes).any(1) & (sizes == pictures.sizes[:, ::-1]).all(1))


def drawn_as_stored(annotations: Annotations, pictures: Pictures, row: int) -> bool:
    """Whether the boxes of a turned image must have been drawn on the picture as stored: one does not fit upright."""
    boxes = annotations.boxes[annotations.rows(row)]
    sizes = np.broadcast_to(pictures.sizes[row], (len(boxes), 2))
    return not bool(fits(boxes, sizes, FAR * pictures.sizes[row].min()).all())


def resized(annotations: Annotations, pictures: Pictures) -> np.ndarray:
    """Rows of images that have another size than is annotated, turned ones apart."""
    sizes = annotations.image_sizes
    known = pictures.readable & (sizes > 0).all(1)
    rows = np.flatnonzero(known & (sizes != pictures.sizes).any(1))
    return rows[~np.isin(rows, turned(annotations, pictures))]


def _sizes(name: str, annotations: Annotations, pictures: Pictures) -> Iterator[Finding]:
    def place(row: int, more: str = "") -> Place:
        (height, width), (true_height, true_width) = annotations.image_sizes[row], pictures.sizes[row]
        said = f"{width} × {height} annotated, {true_width} × {true_height} in the file{more}"
        boxes = annotations.boxes[annotations.rows(row)]
        return Place(str(annotations.path(row)), said, name, row, boxes)

    rows = turned(annotations, pictures)
    if len(rows):
        stored = [drawn_as_stored(annotations, pictures, row) for row in rows.tolist()]
        more = ["; its boxes fit the stored picture only" if alone else "" for alone in stored]
        said = f"The boxes of {sum(stored):,} of them can only have been drawn on the picture as stored."
        places = [place(row, text) for row, text in zip(rows.tolist(), more, strict=True)]
        yield Finding.of("orientation-disagrees", name, places, said if any(stored) else "")
    others = [place(row) for row in resized(annotations, pictures).tolist()]
    known = set(annotations.problems.examples.get("size-mismatch", ()))  # some headers were read with the annotations
    if others := [one for one in others if str(one) not in known]:
        yield Finding.of("size-mismatch", name, others)
    flagged = np.setdiff1d(np.flatnonzero(pictures.orientations > 1), rows)
    if len(flagged):
        flags = [(row, int(pictures.orientations[row])) for row in flagged.tolist()]
        places = [Place(str(annotations.path(row)), f"flag {flag}", name, row) for row, flag in flags]
        yield Finding.of("orientation-flag", name, places)


def difference(annotations: Annotations, kept: int, copy: int) -> str:
    """How the boxes of a copy differ from those of the image that is kept; "" where they do not."""
    if alone := boxes_alone(annotations, kept, copy):
        return f"which lacks {alone:,} of its boxes"
    return "which has more boxes" if boxes_alone(annotations, copy, kept) else ""


def _pair(splits: Look, one: tuple[str, int], other: tuple[str, int], more: str = "") -> Place:
    """A place that names two images."""
    (split, row), (its_split, its_row) = one, other
    same_as = f"the same as {splits[its_split][0].path(its_row)}"
    said = f"{same_as}, {more}" if more else same_as
    return Place(str(splits[split][0].path(row)), said, split, row, beside=other)


def _similar(splits: Look, found: Copies) -> Iterator[Finding]:
    """Pairs that look alike and are no copies, each image with the one that it is most like."""
    known = {(name, copy) for name, pairs in found.within.items() for _, copy in pairs}
    known |= {second for _, second in found.across}
    features = {}
    for name, (_, pictures) in splits.items():
        features[name] = outlines(pictures.small)
        copied = [row for row in range(len(pictures.small)) if (name, row) in known]
        features[name][~pictures.readable] = 0
        features[name][copied] = 0
    for name in splits:
        if 1 < len(features[name]) <= MOST_COMPARED:
            pairs = _likest(features[name], features[name], within=True)
            if pairs:
                places = [_alike(splits, (name, row), (name, other), value) for row, other, value in pairs]
                yield Finding.of("similar-image", name, places)
    for name, other_name in itertools.combinations(splits, 2):
        count = len(features[name]) + len(features[other_name])
        if len(features[name]) and len(features[other_name]) and count <= MOST_COMPARED:
            pairs = _likest(features[other_name], features[name], within=False)
            if pairs:
                places = [_alike(splits, (other_name, row), (name, other), value) for row, other, value in pairs]
                yield Finding.of("similar-image-in-two-splits", f"{name}, {other_name}", places)


def _likest(queries: np.ndarray, others: np.ndarray, *, within: bool) -> list[tuple[int, int, float]]:
    rows, values = most_alike(queries, others, earlier=within)
    found = np.flatnonzero(values >= ALIKE)
    found = found[np.argsort(-values[found], kind="stable")]
    return [(int(row), int(rows[row]), float(values[row])) for row in found]


def _alike(splits: Look, one: tuple[str, int], other: tuple[str, int], value: float) -> Place:
    (split, row), (its_split, its_row) = one, other
    said = f"looks like {splits[its_split][0].path(its_row)} ({value:.2f})"
    return Place(str(splits[split][0].path(row)), said, split, row, beside=other)
