"""A plain folder of images without annotations, nested as it may be: for prediction and for pre-training.

All images form the split "all", without categories and boxes. Hidden files and folders are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from detrkit.data.annotations import Annotations, Strings
from detrkit.data.columns import count_rows
from detrkit.data.files import IMAGE_SUFFIXES, CopyImages, place_images, walk_files, walk_images
from detrkit.data.formats import Source
from detrkit.data.problems import Problems

EXPECTED = f"images ({' '.join(IMAGE_SUFFIXES)}) at any depth"
PRECEDENCE = 0


def recognise(root: Path) -> dict[str, Source]:
    """The split "all" where the folder holds an image at any depth, else nothing."""
    if root.is_dir() and next(walk_images(root), None) is not None:
        return {"all": Source("folder", "all", root, root)}
    return {}


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """List the images; none is opened, so sizes stay unknown.

    Args:
        source: what `recognise` found.
        check_files: of no effect, as the images are found by looking.
        masks: of no effect, as there are no objects.
    """
    problems = Problems()
    listed = list(walk_images(source.images, problems))
    names, count = Strings(listed), len(listed)
    unread = list(_may_be_annotations(source.images, listed))
    count_rows(problems, "unread-annotation", np.arange(len(unread)), lambda row: str(source.images / unread[row]))
    return Annotations(
        root=source.images,
        file_names=names,
        image_ids=np.arange(1, count + 1, dtype=np.int64),
        image_sizes=np.zeros((count, 2), np.int32),
        offsets=np.zeros(count + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        areas=np.zeros(0),
        crowd=np.zeros(0, bool),
        difficult=np.zeros(0, bool),
        categories=(),
        problems=problems,
        source=f"folder {source.path}",
    )


def _may_be_annotations(root: Path, images: Iterable[str]) -> Iterator[str]:
    """Documents and tables, wherever they lie, and texts that are called like an image."""
    stems = {PurePosixPath(name).stem for name in images}
    for name in walk_files(root, lambda name: name.lower().endswith((".txt", ".json", ".xml", ".csv"))):
        if not name.lower().endswith(".txt") or PurePosixPath(name).stem in stems:
            yield name


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Put the images of each split into a folder of its name. Boxes, categories, ids and the splits are lost."""
    for split, part in splits.items():
        place_images(part, list(part.file_names), out / split, copy_images)
