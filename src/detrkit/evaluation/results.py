"""COCO results files: detections as a list of image id, category id, box and score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError
from detrkit.structures import Detections

FIELDS = ("image_id", "category_id", "bbox", "score")


def read_results(path: Path | str, annotations: Annotations) -> list[Detections]:
    """Read a COCO results file against the annotations that it answers.

    Args:
        path: a JSON list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}.
        annotations: n images; their ids and category ids are those of the file.

    Returns:
        n entries in the order of the annotations; empty for an image that the file does not mention.

    Raises:
        DataError: the file is missing or is no such list, or names an image or a category that the annotations lack.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The results file cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise DataError(f"The results file is no JSON ({error})", where=path) from error
    if not isinstance(entries, list):
        raise DataError(
            "The results file is no list", where=path, got=type(entries).__name__, expected="a list of detections"
        )
    image_of = {int(number): index for index, number in enumerate(annotations.image_ids)}
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    columns: list[list[list[float]]] = [[] for _ in range(len(annotations))]
    for position, entry in enumerate(entries):
        index, row = _row(entry, image_of, label_of, f"{path}, entry {position}")
        columns[index].append(row)
    return [_detections(annotations, index, rows) for index, rows in enumerate(columns)]


def write_results(path: Path | str, annotations: Annotations, detections: Sequence[Detections]) -> None:
    """Write detections as a COCO results file; entry i belongs to image i of the annotations."""
    entries = [
        entry
        for number, one in zip(annotations.image_ids, detections, strict=True)
        for entry in one.to_coco(int(number))
    ]
    Path(path).write_text(json.dumps(entries), encoding="utf-8")


def _row(entry: Any, image_of: dict[int, int], label_of: dict[int, int], where: str) -> tuple[int, list[float]]:
    try:
        image, category, (x, y, width, height), score = (entry[name] for name in FIELDS)
        row = [float(x), float(y), float(x) + float(width), float(y) + float(height), float(score)]
        index, label = image_of.get(int(image)), label_of.get(int(category))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "A detection lacks what it needs",
            where=where,
            got=str(entry)[:200],
            expected="image_id, category_id, bbox of four numbers and score",
        ) from error
    if index is None:
        raise DataError(f"The annotations hold no image of id {image}", where=where)
    if label is None:
        raise DataError(
            f"The annotations hold no category of id {category}",
            where=where,
            expected=f"one of {sorted(label_of)[:20]}",
        )
    return index, [*row, float(label)]


def _detections(annotations: Annotations, index: int, rows: list[list[float]]) -> Detections:
    table = np.array(rows, np.float64).reshape(-1, 6)
    height, width = annotations.image_sizes[index]
    return Detections(
        table[:, :4],
        table[:, 4],
        table[:, 5].astype(np.int64),
        annotations.categories,
        (int(height), int(width)),
        str(annotations.path(index)),
    )
