"""Turns the items of a COCO file into columns, batch by batch: quickly where all items are sound, else one by one."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from detrkit.data.columns import LONGEST_SIDE, BoxColumns, ImageColumns, count_rows
from detrkit.data.files import measured_frame, safe_name
from detrkit.data.problems import Problems
from detrkit.data.segmentations import MaskParts
from detrkit.errors import DataError, brief
from detrkit.structures import Category

_NAMED_FROM = -(2**62)  # ids that stand for text: far below any that a file has
_LARGEST_ID = 2**61
_NO_ID = np.iinfo(np.int64).min


class Collector:
    """Takes items as they come, in whatever order the lists stand in the file, and puts them together at the end.

    Args:
        path: the file, for messages.
        problems: where findings are counted.
        masks: takes the segmentations where they are kept; then `finish_images` comes before the first annotation.
        describe: says which object of the file has an id.
    """

    def __init__(
        self,
        path: Path,
        problems: Problems,
        masks: MaskParts | None = None,
        describe: Callable[[int], str] = "annotation {}".format,
    ):
        self.path = path
        self.problems = problems
        self.texts: dict[str, int] = {}
        self.names: list[str] = []
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.table: list[Category] = []
        self.count = 0
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.masks = masks
        self.describe = describe
        self.size_of: dict[int, tuple[int, int]] = {}
        self.lost: list[int] = []  # images of objects that could not be understood

    def add(self, key: str, items: list[Any]) -> None:
        """Take some items of the list `key`."""
        if key == "images":
            self._add_images(items)
        elif key == "categories":
            self._add_categories(items)
        elif items:
            columns, sound = self._quick(items), items
            if columns is None:
                columns, sound = self._careful(items)
            self.parts.append(columns)
            self.count += len(items)
            if self.masks is not None:
                sizes = [self.size_of.get(image, (0, 0)) for image in columns[1].tolist()]
                self.masks.add([item.get("segmentation") for item in sound], sizes)

    def finish_images(self, root: Path, *, measure: bool) -> None:
        """Make the sizes of all images known to the masks that follow.

        Args:
            root: the folder of the images.
            measure: whether to look into the images, whose size the file may not say, or say wrongly: a mask that was
                drawn at another size cannot be mended.

        Raises:
            DataError: the name of an image points outside its folder.
        """
        for row, size in enumerate(self.sizes if measure else ()):
            path = root / safe_name(self.names[row], str(self.path))
            with contextlib.suppress(DataError):  # missing or unreadable: counted where images are checked
                self.sizes[row] = measured_frame(path, size, self.problems)
        self.size_of = dict(zip(self.image_ids, self.sizes, strict=True))

    def _refuse(self, what: str, got: object, expected: str) -> NoReturn:
        raise DataError(
            f"malformed-file: {what}",
            where=self.path,
            got=got,
            expected=expected,
            remedy="Export the annotations again.",
        )

    def _identifier(self, value: Any) -> int | None:
        """An id as an integer: "12" and 12.0 are 12, other text gets a number of its own; None where it is neither."""
        if type(value) is int and -_LARGEST_ID < value < _LARGEST_ID:  # nearly all of them
            return value
        if isinstance(value, str):
            try:
                number = int(value)
            except ValueError:
                return self.texts.setdefault(value, _NAMED_FROM + len(self.texts))
        elif not _is_number(value) or (isinstance(value, float) and not value.is_integer()):
            return None
        else:
            number = int(value)
        if abs(number) >= _LARGEST_ID:
            return self.texts.setdefault(str(value), _NAMED_FROM + len(self.texts))
        return number

    def _add_images(self, items: list[Any]) -> None:
        for item in items:
            if not isinstance(item, dict):
                self._refuse("an entry of 'images' is not an object", _brief(item), "an object with id and file_name")
            identifier, name = self._identifier(item.get("id")), item.get("file_name")
            if identifier is None or not isinstance(name, str):
                self._refuse(f"image {len(self.names)} lacks an id or a file_name", _brief(item), "both")
            self.image_ids.append(identifier)
            self.names.append(name)
            self.sizes.append((_side(item.get("height")), _side(item.get("width"))))

    def _add_categories(self, items: list[Any]) -> None:
        for item in items:
            identifier = self._identifier(item.get("id")) if isinstance(item, dict) else None
            if identifier is None or identifier < -_LARGEST_ID:
                self._refuse("a category lacks an id", _brief(item), "an object with an integer id and a name")
            is_thing = item.get("isthing") not in (0, "0", "false", "False")
            self.table.append(Category(identifier, str(item.get("name") or identifier), is_thing))

    def _quick(self, items: list[Any]) -> tuple[np.ndarray, ...] | None:
        """Columns of sound items; None where one item is not, as NumPy finds out by itself."""
        try:
            boxes = _sides([item["bbox"] for item in items])
            ids = _array([item["id"] for item in items])
            images = _array([item["image_id"] for item in items])
            labels = _array([item["category_id"] for item in items])
            areas = _array([item.get("area", math.nan) for item in items])
            crowd = _array([item.get("iscrowd", 0) for item in items])
            difficult = _array([item.get("difficult", 0) for item in items])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            return None
        integers = all(
            column.dtype.kind == "i" and column.min() > -_LARGEST_ID and column.max() < _LARGEST_ID
            for column in (ids, images, labels)
        )
        flags = all(column.dtype.kind in "ib" for column in (crowd, difficult))
        if not (integers and flags and boxes.dtype.kind in "if" and areas.dtype.kind in "if"):
            return None
        flagged = (crowd != 0, difficult != 0)
        return ids, images, labels, boxes.astype(np.float64), areas.astype(np.float64), *flagged

    def _careful(self, items: list[Any]) -> tuple[tuple[np.ndarray, ...], list[Any]]:
        """Columns of what is sound among the items, and these items; the rest is counted."""
        rows: list[tuple[Any, ...]] = []
        sound: list[Any] = []
        for position, item in enumerate(items, self.count):
            where = f"{self.path}: annotation number {position}"
            if not isinstance(item, dict):
                self.problems.add("malformed-annotation", where)
                continue
            own, image, label = (self._identifier(item.get(key)) for key in ("id", "image_id", "category_id"))
            where = where if own is None else f"{self.path}: {self.describe(item['id'])}"
            if image is None or label is None:
                self.problems.add("malformed-annotation", where)
                self.lost.extend([] if image is None else [image])
                continue
            stated: Any = item.get("bbox")
            box = [_number(side) for side in stated] if isinstance(stated, list) and len(stated) == 4 else [None]
            if None in box:
                self.problems.add("malformed-box", f"{where}: {_brief(stated)}")
                self.lost.append(image)
                continue
            if any(isinstance(side, str) for side in stated):
                self.problems.add("text-box", f"{where}: {_brief(stated)}")
            area: Any = item.get("area")
            sound.append(item)
            rows.append(
                (
                    _NO_ID if own is None else own,
                    image,
                    label,
                    box,
                    _float(area) if _is_number(area) else math.nan,
                    _is_set(item.get("iscrowd")),
                    _is_set(item.get("difficult")),
                )
            )
        columns: list[tuple[Any, ...]] = list(zip(*rows, strict=True)) if rows else [()] * 7
        types = (np.int64, np.int64, np.int64, np.float64, np.float64, np.bool_, np.bool_)
        ready: list[np.ndarray] = [np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)]
        ready[3] = ready[3].reshape(-1, 4)
        return tuple(ready), sound

    def categories(self) -> tuple[Category, ...]:
        """The category table, in the order of the ids.

        Raises:
            DataError: two categories share an id, or there are annotations and no category.
        """
        table = sorted(self.table, key=lambda category: category.id)
        for before, after in itertools.pairwise(table):
            if before.id == after.id:
                where = f"{self.path}: id {after.id}, {before.name!r} and {after.name!r}"
                self.problems.add("duplicate-category", where)
        if self.count and not table:
            self._refuse("there are annotations, but no category", "an empty list", "at least one category")
        return tuple(table)

    def columns(self) -> tuple[ImageColumns, BoxColumns]:
        """The images, and those boxes whose image and category are known.

        Raises:
            DataError: two images share an id.
        """
        image_ids = np.array(self.image_ids, np.int64)
        lost = np.isin(image_ids, self.lost)
        order = np.argsort(image_ids, kind="stable")
        same = np.flatnonzero(np.diff(image_ids[order]) == 0)
        if len(same):
            first, second = order[same[0]], order[same[0] + 1]
            names = f"{self.names[first]!r} and {self.names[second]!r}"
            self.problems.add("duplicate-image-id", f"{self.path}: id {image_ids[first]}, {names}")
        ids, images, labels, boxes, areas, crowd, difficult = self._joined()
        where = _Where(self.path, ids, self.describe)
        self._count_duplicates(ids, where)
        rows, image_known = _find(image_ids, order, images)
        category_ids = np.array([category.id for category in sorted(self.table)], np.int64)
        labels, label_known = _find(category_ids, np.arange(len(category_ids)), labels)
        count_rows(self.problems, "unknown-image", np.flatnonzero(~image_known), where)
        count_rows(self.problems, "unknown-category", np.flatnonzero(image_known & ~label_known), where)
        good = image_known & label_known
        with np.errstate(over="ignore", invalid="ignore"):  # huge numbers become infinite, and are dropped as such
            boxes[:, 2:] += boxes[:, :2]
        if (image_ids < -_LARGEST_ID).any():
            count_rows(
                self.problems,
                "text-image-id",
                np.flatnonzero(image_ids < -_LARGEST_ID),
                lambda row: f"{self.path}: image {self.names[row]!r}",
            )
            image_ids = np.arange(1, len(image_ids) + 1, dtype=np.int64)
        sizes = np.array(self.sizes, np.int64).reshape(-1, 2)
        found = ImageColumns(self.names, image_ids, sizes, lost)
        masks = None if self.masks is None else self.masks.column()
        objects = BoxColumns(rows, boxes, labels, areas, crowd, difficult, where, masks)
        return found, objects if good.all() else objects.select(np.flatnonzero(good))

    def _joined(self) -> list[np.ndarray]:
        """All batches as one; each column's batches are freed as soon as they are copied."""
        parts = self.parts or [self._careful([])[0]]
        self.parts = []
        columns: list[list[np.ndarray]] = [list(column) for column in zip(*parts, strict=True)]
        parts.clear()
        joined = []
        while columns:
            joined.append(np.concatenate(columns.pop(0)))
        return joined

    def _count_duplicates(self, ids: np.ndarray, where: _Where) -> None:
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        repeated = order[1:][(np.diff(ordered) == 0) & (ordered[1:] != _NO_ID)]
        count_rows(self.problems, "duplicate-annotation-id", np.sort(repeated), where)


class _Where:
    """Tells the place of an annotation in its file."""

    def __init__(self, path: Path, ids: np.ndarray, describe: Callable[[int], str]):
        self.path, self.ids, self.describe = path, ids, describe

    def __call__(self, row: int) -> str:
        identifier = int(self.ids[row])
        known = identifier > -_LARGEST_ID
        return f"{self.path}: {self.describe(identifier) if known else 'an annotation without a number'}"


def _find(known: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each wanted id among the known ones, which `order` sorts, and whether it is there."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    place = np.searchsorted(known[order], wanted)
    rows = order[np.minimum(place, len(known) - 1)]
    return rows, known[rows] == wanted


def _array(values: list[Any]) -> np.ndarray:
    """Numbers as an array. One long text among them would make every other as long, so that nothing else is taken."""
    if not set(map(type, values)) <= {int, float, bool}:
        raise TypeError("not all are numbers")
    return np.array(values)


def _sides(boxes: list[Any]) -> np.ndarray:
    """The sides of boxes, (t, 4)."""
    if set(map(type, boxes)) != {list} or set(map(len, boxes)) != {4}:
        raise TypeError("not all are lists of four")
    return _array(list(itertools.chain.from_iterable(boxes))).reshape(-1, 4)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """A number, also one that is written as text; None where it is neither."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return _float(value) if _is_number(value) else None


def _float(value: int | float) -> float:
    """A float; infinite where an integer is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_set(value: Any) -> bool:
    """Whether a flag is set: 1, true, "1" and "true" are, and nothing else."""
    return value in (1, "1", "true", "True")


def _side(value: Any) -> int:
    """A height or width in pixels; 0, meaning unknown, where it is nothing of the kind."""
    side = value if type(value) is int else _number(value)
    return int(side) if side is not None and 0 < side <= LONGEST_SIDE else 0


def _brief(value: Any) -> str:
    return brief(repr(value) if isinstance(value, str) else value, 80)
