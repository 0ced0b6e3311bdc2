"""YOLO txt: one label file an image, a line a box: `class cx cy width height`, in fractions of the upright image.

Layouts: a `data.yaml` (or any single YAML) with `names` and `train`, `val`, `test`, each a folder, a list of folders or
a text file of image paths, and other splits as `name: images/name`; without it `images/{split}` and `labels/{split}`,
`{split}/images` and `{split}/labels`, or `images` and `labels`; or images and label files together with `classes.txt`;
or Darknet's `obj.data`, lines of `train = train.txt`, `valid = …` and `names = obj.names`, with lists of images, whose
paths may have a `data/` too many.
The label file of an image is found by changing the last folder called `images` into `labels`; failing that, it is the
one beside the image. Paths may be written with backslashes.

An image without a label file is an empty image, and noted. A line of an odd count of at least seven numbers is a
polygon and becomes the box around it, with the polygon as its mask where masks are asked for; except where the YAML
says `kpt_shape`: then key points follow the box and are ignored. A line of six numbers is a prediction with its score,
not a label, and is dropped as malformed. Category ids are 0 … n − 1.

Writing leaves crowd boxes out and loses `difficult`, masks, the ids and the stated areas; coordinates have eight
decimals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from detrkit.data.annotations import Annotations
from detrkit.data.columns import BoxColumns, ImageColumns, build, count_rows
from detrkit.data.files import CopyImages, measured_frame, place_images, unique_stems, upright_size
from detrkit.data.formats import Source
from detrkit.data.formats import _yolo_layout as layout
from detrkit.data.problems import Problems
from detrkit.data.segmentations import Segmentations
from detrkit.errors import DataError

EXPECTED = "a data.yaml or obj.data with names and train/val/test, or images/{split} and labels/{split}"
PRECEDENCE = 3
BOX_NUMBERS = 4
SHORTEST_POLYGON = 6
PIXELS_FROM = 2.0
"""No fraction of an image is as large as this, but nearly every pixel coordinate is."""


def recognise(root: Path) -> dict[str, Source]:
    """Find a YOLO data set by the file that describes it or by its folders.

    Raises:
        DataError: that file cannot be parsed, none of its folders exists, or there is more than one.
    """
    found = layout.find(root)
    if found is None:
        return {}
    return {
        split: Source("yolo", split, found.path, places[0] if places[0].is_dir() else places[0].parent)
        for split, places in found.splits.items()
    }


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one split.

    The size of every image is read from its header, as the labels are fractions of it; a missing or unreadable image is
    dropped and counted even if `check_files` is False.

    Args:
        source: what `recognise` found.
        check_files: of no effect, for the reason above.
        masks: whether labels that are polygons are read as masks.

    Raises:
        DataError: the YAML is malformed, coordinates are pixels, an image lies outside the data set, or none exists.
    """
    found = layout.find(source.path)
    if found is None or source.split not in found.splits:
        raise DataError(f"There is no split {source.split!r}", where=source.path, expected=EXPECTED)
    problems = Problems()
    for split in found.missing:
        problems.add("missing-split", f"{found.path}: {split}")
    root, names = layout.images(found, source.split, problems)
    numbers, lost = np.arange(1, len(names) + 1, dtype=np.int64), np.zeros(len(names), bool)
    columns = ImageColumns(names, numbers, _sizes(root, names, problems), lost)
    categories = layout.categories(found)
    boxes = _boxes(root, columns, found.has_key_points, problems, masks)
    rows = {category.id: row for row, category in enumerate(categories)}
    labels = np.array([rows.get(int(label), -1) for label in boxes.labels], np.int64)
    known = labels >= 0
    count_rows(
        problems, "unknown-category", np.flatnonzero(~known), lambda row: f"{boxes.where(row)}: {boxes.labels[row]:g}"
    )
    kept = np.flatnonzero(known)
    boxes = boxes.select(kept)._replace(labels=labels[kept])
    if names and not (columns.sizes > 0).all(1).any():
        raise DataError(
            f"None of the {len(names)} images can be read",
            where=f"yolo {source.path}",
            got=next(iter(problems.examples.values()))[0],
            remedy="Check the folders and lists that the file names.",
        )
    annotations = build(root, columns, boxes, categories, problems, f"yolo {source.path}", check_files=False)
    present = (annotations.image_sizes > 0).all(1)
    return annotations if present.all() else annotations.select(np.flatnonzero(present))


def _sizes(root: Path, names: list[str], problems: Problems) -> np.ndarray:
    """Upright sizes; 0 where an image cannot be read, which is counted."""
    sizes = np.zeros((len(names), 2), np.int64)
    for row, name in enumerate(names):
        try:
            sizes[row] = upright_size(root / name)
        except DataError as error:
            kind = "unreadable-image" if (root / name).is_file() else "missing-image"
            problems.add(kind, f"{error.where}: {error.cause}")
    return sizes


def _boxes(root: Path, columns: ImageColumns, has_key_points: bool, problems: Problems, masks: bool) -> BoxColumns:
    """All label files as columns; `labels` are still the class numbers of the files. Marks `columns.lost`."""
    names, sizes, lost = columns.names, columns.sizes, columns.lost
    assert lost is not None
    images: list[int] = []
    classes: list[float] = []
    fractions: list[tuple[float, ...]] = []
    places: list[tuple[int, int]] = []
    files = [layout.label_of(root / name) for name in names]
    segmentations = Segmentations()
    for row, path in enumerate(files):
        if not sizes[row].all():
            continue
        lines = layout.lines(path)
        if lines is None:
            problems.add("unannotated-image", f"{root / names[row]}: {path} does not exist")
            continue
        height, width = sizes[row].tolist()
        drawn: list[Any] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parsed = _line(line, has_key_points)
            if parsed is None:
                problems.add("malformed-line", f"{path}, line {number}")
                lost[row] = True
                continue
            category, fraction, polygon = parsed
            if polygon and not masks:
                problems.add("polygon-label", f"{path}, line {number}")
            drawn.append(_scaled(polygon, height, width))
            images.append(row)
            classes.append(category)
            fractions.append(fraction)
            places.append((row, number))
        if masks:
            segmentations.add(drawn, [(height, width)] * len(drawn))
    values = np.array(fractions, np.float64).reshape(-1, 4)
    _refuse_pixels(values, files, places)
    scale = sizes[np.array(images, np.int64)][:, ::-1].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # huge numbers become infinite, and are dropped as such
        half = values[:, 2:] / 2
        corners = np.concatenate([(values[:, :2] - half) * scale, (values[:, :2] + half) * scale], 1)
    flags = np.zeros(len(values), bool)
    return BoxColumns(
        np.array(images, np.int64),
        corners,
        np.array(classes, np.float64),
        np.full(len(values), math.nan),
        flags,
        flags,
        lambda row: f"{files[places[row][0]]}, line {places[row][1]}",
        segmentations.column() if masks else None,
    )


def _scaled(polygon: list[float], height: int, width: int) -> list[list[float]] | None:
    """A polygon in pixels as COCO has it, None where there is none."""
    sides = itertools.cycle((width, height))
    return [[value * side for value, side in zip(polygon, sides, strict=False)]] if polygon else None


def _line(line: str, has_key_points: bool) -> tuple[float, tuple[float, ...], list[float]] | None:
    """The class, the box as cx cy width height, and the polygon if it was one; None where it cannot be understood."""
    try:
        category, *numbers = (float(word) for word in line.split())
    except ValueError:
        return None
    if not category.is_integer():
        return None
    if len(numbers) == BOX_NUMBERS or (has_key_points and len(numbers) > BOX_NUMBERS):
        return category, tuple(numbers[:BOX_NUMBERS]), []
    if len(numbers) < SHORTEST_POLYGON or len(numbers) % 2:
        return None
    x, y = numbers[::2], numbers[1::2]
    if not all(map(math.isfinite, numbers)):
        return category, (math.nan,) * BOX_NUMBERS, numbers
    return category, ((min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)), numbers


def _refuse_pixels(values: np.ndarray, files: list[Path], places: list[tuple[int, int]]) -> None:
    """Pixel coordinates would be dropped one by one as boxes outside their image; say what is the matter instead."""
    large = (np.abs(values) > PIXELS_FROM).any(1)
    if len(values) and large.mean() > 0.5:
        row, number = places[int(large.argmax())]
        raise DataError(
            "The labels are not fractions of the image",
            where=f"{files[row]}, line {number}",
            got=" ".join(f"{value:g}" for value in values[int(large.argmax())]),
            expected="cx cy width height between 0 and 1",
            remedy="Divide x and width by the image's width, y and height by its height.",
        )


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `data.yaml`, `images/{split}` and `labels/{split}`; an image without boxes gets an empty label file.

    Raises:
        DataError: the size of an image is neither known nor to be read, or the splits have different category tables.
    """
    table = next(iter(splits.values())).categories
    for split, part in splits.items():
        if part.categories != table:
            raise DataError("YOLO needs one category table for all splits", where=part.source)
        names = unique_stems(list(part.file_names))
        folder = out / "images" / split
        place_images(part, names, folder, copy_images)
        for index, name in enumerate(names):
            target = layout.label_path(folder / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_lines(part, index), encoding="utf-8")
    content = {
        "path": ".",
        **{split: f"images/{split}" for split in splits},
        "names": {row: category.name for row, category in enumerate(table)},
    }
    (out / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _lines(annotations: Annotations, index: int) -> str:
    """The label file of one image: fractions of what its file shows, whatever size was stated."""
    rows = annotations.rows(index)
    kept = np.flatnonzero(~annotations.crowd[rows]) + rows.start
    height, width = annotations.image_sizes[index].tolist()
    if len(kept):
        with suppress(DataError):  # the image is not at hand
            height, width = measured_frame(annotations.path(index), (height, width), Problems())
    if len(kept) and not (height and width):
        raise DataError(
            "The size of the image is not known, and YOLO's labels are fractions of it",
            where=annotations.path(index),
            remedy="Read the data set with its images at hand.",
        )
    text, size = "", np.array([width, height], np.float64)
    for row in kept:
        low, high = annotations.boxes[row, :2] / size, annotations.boxes[row, 2:] / size
        numbers = " ".join(f"{value:.8f}" for value in (*(low + high) / 2, *(high - low)))
        text += f"{annotations.labels[row]} {numbers}\n"
    return text
