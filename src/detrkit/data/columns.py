"""From what a file says to `Annotations`: checked, mended by the stated policies, counted, sorted by image.

Formats collect raw columns and hand them to `build`; everything that is the same for all formats happens here, on whole
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations, Masks, Stated, Strings
from detrkit.data.files import Listing, measured_frame, safe_name, unescaped, upright_size
from detrkit.data.problems import Problems
from detrkit.data.segmentations import FINDINGS, MaskColumn
from detrkit.errors import DataError
from detrkit.masks import RunLengths
from detrkit.structures import Category, rows_of

TOLERANCE = 0.01
"""Pixels. Files round coordinates, so a box may leave its image by this much without being counted as wrong, and a
side of less than this is no side."""

BOXES_SHOWN = 20
"""Boxes of an image that a message names."""

LONGEST_SIDE = 2**31 - 1
"""Pixels. The border where the size of an image is not known."""


class ImageColumns(NamedTuple):
    """Images as a file lists them.

    `names` are n paths relative to the image folder, `ids` (n,) int64, `sizes` (n, 2) height and width in pixels with 0
    where unknown; `lost` (n,) bool says of which images objects were left out already, since they could not be
    understood. None: of no image.
    """

    names: list[str]
    ids: np.ndarray
    sizes: np.ndarray
    lost: np.ndarray | None = None


class BoxColumns(NamedTuple):
    """Boxes as a file lists them, in any order.

    `images` (m,) rows of the image columns; `boxes` (m, 4) xyxy in 0-based pixels, not yet checked; `labels` (m,) rows
    of the category table; `areas` (m,) with NaN where unknown; `crowd` and `difficult` (m,) bool; `where(row)` tells
    the place of a box in its file, for messages; `masks` are those of the same objects, where they were asked for.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    where: Callable[[int], str]
    masks: MaskColumn | None = None

    def stated(self, image: int) -> str:
        """The boxes of an image as they are stated, for the end of a message; "" where there are none."""
        stated = self.boxes[self.images == image]
        return "".join(f", [{', '.join(f'{side:.6g}' for side in box)}]" for box in stated[:BOXES_SHOWN])

    def select(self, rows: np.ndarray) -> BoxColumns:
        """Some of the boxes, in the order that is asked for."""
        return BoxColumns(
            self.images[rows],
            self.boxes[rows],
            self.labels[rows],
            self.areas[rows],
            self.crowd[rows],
            self.difficult[rows],
            lambda row: self.where(int(rows[row])),
            None if self.masks is None else MaskColumn(self.masks.masks[rows], self.masks.findings[rows]),
        )


def count_rows(problems: Problems, kind: str, rows: np.ndarray, where: Callable[[int], str]) -> None:
    """Count a problem once for each row, naming the first few places."""
    for row in rows[: problems.kept]:
        problems.add(kind, where(int(row)))
    if len(rows) > problems.kept:
        problems.add(kind, where(int(rows[problems.kept])), len(rows) - problems.kept)


def build(
    root: Path,
    images: ImageColumns,
    boxes: BoxColumns,
    categories: Sequence[Category],
    problems: Problems,
    source: str,
    *,
    check_files: bool,
    note_others: bool = False,
    looked: Sequence[Path] = (),
) -> Annotations:
    """Check and mend raw columns, and sort the boxes by image.

    Args:
        root: the folder of the images.
        images: the images in the order that they shall keep.
        boxes: their boxes.
        categories: the table that labels point into.
        problems: what was already wrong; the rest is added to it.
        source: format and path, for messages.
        check_files: whether images must exist; missing ones are dropped, and sizes that are unknown, or that boxes do
            not fit into, are read from their headers.
        note_others: whether images that lie in the same folders without being listed are worth a note.
        looked: folders in which the images were searched, for the message where none is found.

    Returns:
        The annotations; their boxes are finite, inside the image and of positive area.

    Raises:
        DataError: a file name is unsafe, or not a single image exists.
    """
    names = [safe_name(name, source) for name in images.names]
    sizes = np.where((images.sizes > 0) & (images.sizes <= LONGEST_SIDE), images.sizes, 0).astype(np.int32)
    sizes[(sizes == 0).any(1)] = 0
    kept = np.ones(len(names), bool)
    if check_files and names:
        kept = _existing(root, names, problems, source, note_others, looked)
        _fill_sizes(root, names, sizes, kept, problems)
        if boxes.masks is None:  # else all were measured before masks were made at these sizes
            _correct_sizes(root, names, sizes, kept & _overfull(boxes, sizes), problems)
    if len(set(names)) < len(names):
        _note_duplicates(names, problems, source)
    rows = np.flatnonzero(kept[boxes.images]) if len(boxes.images) else np.zeros(0, np.int64)
    rows = rows[np.argsort(boxes.images[rows], kind="stable")]
    box_sizes = sizes[boxes.images[rows]]
    clean, good, repaired = sanitise(boxes.boxes[rows], box_sizes, problems, lambda row: boxes.where(int(rows[row])))
    emptied = kept & _emptied(images, boxes.images[rows], good)
    count_rows(
        problems, "emptied-image", np.flatnonzero(emptied), lambda row: f"{root / names[row]}{boxes.stated(row)}"
    )
    kept = kept & ~emptied
    kept_images = np.flatnonzero(kept)
    new_row = np.full(len(names), -1, np.int64)
    new_row[kept_images] = np.arange(len(kept_images))
    mended = _mended(boxes, rows, new_row, good, repaired)
    rows, clean, repaired = rows[good], clean[good], repaired[good]
    counts = np.bincount(new_row[boxes.images[rows]], minlength=len(kept_images))
    masks = None if boxes.masks is None else _masks(boxes, rows, problems)
    return Annotations(
        root=root,
        file_names=Strings(names if len(kept_images) == len(names) else (names[row] for row in kept_images)),
        image_ids=images.ids[kept_images].astype(np.int64),
        image_sizes=sizes[kept_images],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=clean,
        labels=boxes.labels[rows].astype(np.int64),
        areas=_areas(boxes.areas[rows], masks, clean, repaired),
        crowd=boxes.crowd[rows].astype(bool),
        difficult=boxes.difficult[rows].astype(bool),
        categories=tuple(categories),
        problems=problems,
        source=source,
        masks=masks,
        mended=mended,
    )


def _emptied(images: ImageColumns, owners: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Which images had objects, of which none can be used (n,): as images without objects they would teach a lie."""
    had = np.zeros(len(images.names), bool) if images.lost is None else images.lost.copy()
    had[owners] = True
    has = np.zeros_like(had)
    has[owners[good]] = True
    return had & ~has


def _masks(boxes: BoxColumns, rows: np.ndarray, problems: Problems) -> Masks | None:
    """The masks of the boxes that are left, and what is wrong with them; None where the file has none at all."""
    assert boxes.masks is not None
    findings = boxes.masks.findings[rows]
    if len(rows) and (findings == FINDINGS.index("missing-mask")).all():
        return None
    for number, kind in enumerate(FINDINGS[1:], 1):
        count_rows(problems, kind, np.flatnonzero(findings == number), lambda row: boxes.where(int(rows[row])))
    return boxes.masks.masks[rows] if not len(rows) or (findings == 0).any() else None


def _mended(
    boxes: BoxColumns, rows: np.ndarray, new_row: np.ndarray, good: np.ndarray, repaired: np.ndarray
) -> Stated | None:
    """What the file states of the boxes that `sanitise` changed or refused; `rows` are those that it was given."""
    if good.all() and not repaired.any():
        return None
    touched = np.flatnonzero(~good | repaired)
    touched = touched[new_row[boxes.images[rows[touched]]] >= 0]  # else its image was left out
    became = np.where(good, np.cumsum(good) - 1, -1)[touched]
    stated = rows[touched]
    return Stated(new_row[boxes.images[stated]], boxes.boxes[stated].astype(np.float64), boxes.labels[stated], became)


def sanitise(
    boxes: np.ndarray, sizes: np.ndarray, problems: Problems, where: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mend boxes by the policies of `problems.POLICIES`.

    Corners are put in order, boxes are cut at the border of their image; boxes with a coordinate that is not finite,
    and those of which no area is left, are marked as not good.

    Args:
        boxes: (m, 4) xyxy in pixels.
        sizes: (m, 2) height and width of each box's image in pixels, 0 where unknown.
        problems: where the findings are counted.
        where: the place of a row in its file.

    Returns:
        The mended boxes (m, 4) float64, which of them are good (m,) and which were changed (m,).
    """
    finite = np.isfinite(boxes).all(1)
    boxes = np.where(finite[:, None], boxes, 0.0)
    low = np.minimum(boxes[:, :2], boxes[:, 2:])
    high = np.maximum(boxes[:, :2], boxes[:, 2:])
    limit = np.where(sizes > 0, sizes, LONGEST_SIDE)[:, ::-1].astype(np.float64)
    cut_low, cut_high = np.clip(low, 0.0, limit), np.clip(high, 0.0, limit)
    good = finite & (cut_high - cut_low >= TOLERANCE).all(1)
    inverted = good & (boxes[:, 2:] < boxes[:, :2]).any(1)
    outside = good & (np.maximum(cut_low - low, high - cut_high).max(1, initial=0.0) > TOLERANCE)
    count_rows(problems, "non-finite-box", np.flatnonzero(~finite), where)
    count_rows(problems, "degenerate-box", np.flatnonzero(finite & ~good), where)
    count_rows(problems, "inverted-box", np.flatnonzero(inverted), where)
    count_rows(problems, "outside-box", np.flatnonzero(outside), where)
    return np.concatenate([cut_low, cut_high], 1), good, inverted | outside


def _areas(stated: np.ndarray, masks: Masks | None, boxes: np.ndarray, repaired: np.ndarray) -> np.ndarray:
    """The stated area where there is a sensible one, else the mask's, else the box's; a cut box cannot hold more than
    itself."""
    if isinstance(masks, RunLengths) and not (stated > 0).all():
        stated = np.where(stated > 0, stated, masks.areas())
    side = boxes[:, 2:] - boxes[:, :2]
    of_box = side[:, 0] * side[:, 1]
    areas = np.where(np.isfinite(stated) & (stated > 0), stated, of_box).astype(np.float64)
    return np.where(repaired, np.minimum(areas, of_box), areas)


def _note_duplicates(names: Sequence[str], problems: Problems, source: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            problems.add("duplicate-file-name", f"{source}: {name}")
        seen.add(name)


def _existing(
    root: Path, names: list[str], problems: Problems, source: str, note_others: bool, looked: Sequence[Path]
) -> np.ndarray:
    """Which images exist (n,). A name that is escaped becomes that of its file, in place."""
    listing = Listing(root)
    kept = np.fromiter((name in listing for name in names), bool, len(names))
    for row in np.flatnonzero(~kept).tolist():
        if (plain := unescaped(names[row])) in listing:
            problems.add("escaped-file-name", f"{root / names[row]}: {plain}")
            names[row], kept[row] = plain, True
    if not kept.any():
        raise DataError(
            f"None of the {len(names)} images exists",
            where=source,
            got=f"{names[0]!r} is not in {' or '.join(map(str, (root, *looked)))}",
            remedy="Put the images there, or pass the folder that holds both annotations and images.",
        )
    count_rows(problems, "missing-image", np.flatnonzero(~kept), lambda row: f"{root / names[int(row)]}")
    if note_others:
        others = listing.others(names)
        count_rows(problems, "unannotated-image", np.arange(len(others)), lambda row: f"{root / others[row]}")
    return kept


def _fill_sizes(root: Path, names: Sequence[str], sizes: np.ndarray, kept: np.ndarray, problems: Problems) -> None:
    """Read unknown sizes from image headers, in place; images without a readable header are dropped."""
    for row in np.flatnonzero(kept & (sizes == 0).any(1)):
        try:
            sizes[row] = upright_size(root / names[int(row)])
        except DataError as error:
            problems.add("unreadable-image", f"{error.where}: {error.cause}")
            kept[row] = False


def _overfull(boxes: BoxColumns, sizes: np.ndarray) -> np.ndarray:
    """Images with a box that reaches beyond their stated size (n,)."""
    limits = np.where(sizes > 0, sizes, LONGEST_SIDE)[boxes.images, ::-1] + TOLERANCE
    beyond = (np.maximum(boxes.boxes[:, :2], boxes.boxes[:, 2:]) > limits).any(1)
    overfull = np.zeros(len(sizes), bool)
    overfull[boxes.images[beyond]] = True
    return overfull


def _correct_sizes(
    root: Path, names: Sequence[str], sizes: np.ndarray, doubted: np.ndarray, problems: Problems
) -> None:
    """Set the sizes of some images to those that their boxes are stated in, in place: to be cut where the image ends.

    Headers of all images would be a few times the work of all the rest of reading, and a minute on a slow drive. An
    image that cannot be read keeps its size: whoever opens it says so.
    """
    for row in np.flatnonzero(doubted).tolist():
        with suppress(DataError):
            height, width = sizes[row].tolist()
            sizes[row] = measured_frame(root / names[row], (height, width), problems)


def with_categories(annotations: Annotations, categories: Sequence[Category]) -> Annotations:
    """The same data set with the labels of another category table, such as that of a checkpoint.

    Categories are found by `rows_of`. Boxes of those that the table lacks are dropped and counted as
    "unknown-category".

    Args:
        annotations: the data set; it is not changed.
        categories: the table that labels shall point into.

    Raises:
        DataError: the two tables have nothing in common.
    """
    if tuple(categories) == annotations.categories:
        return annotations
    table = np.array([*rows_of(annotations.categories, categories), -1], np.int64)  # the last for labels of none
    if annotations.categories and (table == -1).all():
        raise DataError(
            "The data set and the category table have no category in common",
            where=annotations.source,
            got=", ".join(category.name for category in annotations.categories[:10]),
            expected=", ".join(category.name for category in categories[:10]),
        )
    labels = table[annotations.labels]
    good = labels >= 0
    problems = Problems()
    problems.merge(annotations.problems)
    lost = np.flatnonzero(~good)
    names = [category.name for category in annotations.categories]
    count_rows(
        problems,
        "unknown-category",
        lost,
        lambda row: f"{annotations.source}: category {names[annotations.labels[row]]!r}",
    )
    counts = np.concatenate([[0], np.cumsum(good)])[annotations.offsets]
    mended = annotations.mended
    if mended is not None:
        mended = mended.select(table[mended.labels] >= 0)
        mended = mended._replace(labels=table[mended.labels])
        mended = mended.follow(np.arange(len(annotations)), np.where(good, np.cumsum(good) - 1, -1))
    return replace(
        annotations,
        offsets=counts.astype(np.int64),
        boxes=annotations.boxes[good],
        labels=labels[good],
        areas=annotations.areas[good],
        crowd=annotations.crowd[good],
        difficult=annotations.difficult[good],
        masks=None if annotations.masks is None else annotations.masks[np.flatnonzero(good)],
        categories=tuple(categories),
        problems=problems,
        mended=mended,
    )
