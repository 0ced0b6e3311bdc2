"""From the lists of a COCO file to annotations, whatever its annotations are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from detrkit.data.annotations import Annotations
from detrkit.data.columns import build
from detrkit.data.files import split_name
from detrkit.data.formats import Source
from detrkit.data.formats._coco_columns import Collector
from detrkit.data.formats._coco_layout import image_folders
from detrkit.data.json_stream import read_lists
from detrkit.errors import DataError

KEYS = ("images", "annotations", "categories")

MEMBERS = (
    *("id", "file_name", "height", "width"),
    *("name", "isthing"),
    *("image_id", "category_id", "bbox", "area", "iscrowd", "difficult"),
)
"""What a collector without masks reads of images, of categories and of annotations."""


def read_through(
    source: Source,
    collector: Collector,
    *,
    check_files: bool,
    remedy: str,
    to_objects: Callable[[list[Any]], list[Any]] | None = None,
) -> Annotations:
    """Read a COCO file.

    Args:
        source: the file and the folder of its images.
        collector: what takes the items; where it keeps masks, it gets all images before the first object.
        check_files: whether images must exist, see `formats.read`.
        remedy: what to do where a list is missing.
        to_objects: makes objects, each with a box, of what the file lists as annotations.

    Raises:
        DataError: the file is not JSON, lacks a list or what an image or category must have, two images or two
            categories share an id, a file name is unsafe, or not one image exists.
    """
    seen = set()
    if collector.masks is None:
        lists = read_lists(source.path, KEYS, members=() if to_objects else MEMBERS)
    else:
        lists = _images_first(source, collector, check_files)
    with _uncollected():
        for key, items in lists:
            seen.add(key)
            collector.add(key, to_objects(items) if to_objects and key == "annotations" else items)
    for key in KEYS:
        if key not in seen:
            raise DataError(
                f"malformed-file: the list {key!r} is missing",
                where=source.path,
                got=", ".join(sorted(seen)),
                expected=", ".join(KEYS),
                remedy=remedy,
            )
    categories = collector.categories()
    images, boxes = collector.columns()
    own_folder = split_name(source.images.name) == source.split or len(list(source.path.parent.glob("*.json"))) == 1
    return build(
        source.images,
        images,
        boxes,
        categories,
        collector.problems,
        f"{source.format} {source.path}",
        check_files=check_files,
        note_others=own_folder,
        looked=image_folders(source.path)[1:] if check_files else (),
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let the collector of garbage rest: items are made by the million, hold no cycles, and are soon gone."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _images_first(source: Source, collector: Collector, check_files: bool) -> Iterator[tuple[str, list[Any]]]:
    """The items of the file with their segmentations, all images first, as masks are made at the size of their image.

    Images stand first in most files; then this is no more than one pass.
    """
    images, others, *_ = KEYS
    for key, items in read_lists(source.path, (images, others)):
        if key == images:
            yield key, items
        elif collector.names:
            break
    collector.finish_images(source.images, measure=check_files)
    yield from read_lists(source.path, tuple(key for key in KEYS if key != images), whole=True)
