"""Writes COCO's lists item by item, whatever the annotations are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from detrkit.data.annotations import Annotations


def write_lists(path: Path, part: Annotations, annotations: Iterable[dict[str, object]], *, segments: bool) -> None:
    """Write one file.

    Args:
        path: where to.
        part: whose categories and images; their ids are kept.
        annotations: the items of that list.
        segments: whether categories say of things, too, that they are things, as panoptic files do.
    """
    with path.open("w", encoding="utf-8") as file:
        for opening, items in (
            ('{"categories":[', _category_items(part, segments)),
            ('],\n"images":[', _image_items(part)),
            ('],\n"annotations":[', annotations),
        ):
            file.write(opening)
            for number, item in enumerate(items):
                file.write((",\n" if number else "\n") + json.dumps(item, separators=(",", ":")))
        file.write("]}\n")


def _category_items(annotations: Annotations, segments: bool) -> Iterator[dict[str, object]]:
    for category in annotations.categories:
        item: dict[str, object] = {"id": category.id, "name": category.name}
        yield item | ({"isthing": int(category.is_thing)} if segments or not category.is_thing else {})


def _image_items(annotations: Annotations) -> Iterator[dict[str, object]]:
    for row, name in enumerate(annotations.file_names):
        height, width = annotations.image_sizes[row].tolist()
        item: dict[str, object] = {"id": int(annotations.image_ids[row]), "file_name": name}
        yield item | ({"width": width, "height": height} if width else {})


def object_item(annotations: Annotations, row: int) -> dict[str, object]:
    """What all files say of an object: its category, its box as x, y, width, height, its area and whether it is a
    crowd."""
    x0, y0, x1, y1 = annotations.boxes[row].tolist()
    return {
        "category_id": annotations.categories[annotations.labels[row]].id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(annotations.areas[row]),
        "iscrowd": int(annotations.crowd[row]),
    }
