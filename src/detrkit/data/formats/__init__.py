"""Annotation formats: recognised by what lies in a folder, read into `Annotations`, and written.

Each module of this package is one format, found by its name; a new one needs no list to be edited. It offers

- `EXPECTED`: a sentence that says what it looks for, for the message where nothing is found;
- `recognise(root) -> dict[str, Source]`: the splits that it finds, empty where it finds none;
- `read(source, *, check_files, masks) -> Annotations`: one split; with masks, if they are asked for and there are any;
- `write(splits, out, *, copy_images)`: a layout that it recognises again;
- where several splits are cheaper read together, `read_together(sources, *, check_files, masks)`;
- `PRECEDENCE`: where several formats recognise a folder, the one of the highest number is meant: 3 for files that list
  objects, 2 for files that list segments, 1 for pictures of masks, 0 for images alone. Equals have to be told apart by
  the user.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from detrkit.data.annotations import Annotations
from detrkit.data.columns import with_categories
from detrkit.data.drafts import refuse_answers
from detrkit.data.files import CopyImages, fresh_folder, split_name
from detrkit.errors import DataError, UsageError
from detrkit.structures import Category
from detrkit.whole import or_nothing

ENTRIES_SHOWN = 8

OBJECTS = 3
"""The precedence of formats that list objects."""


class Source(NamedTuple):
    """Where one split of a data set lies.

    `path` is the annotation file or folder, `images` the folder of the images.
    """

    format: str
    split: str
    path: Path
    images: Path


def names() -> tuple[str, ...]:
    """The names of the formats, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def of_objects() -> tuple[str, ...]:
    """The names of the formats that list objects, and so can hold boxes without masks."""
    return tuple(name for name in names() if _module(name).PRECEDENCE == OBJECTS)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def recognise(path: str | Path, *, annotations: str = "") -> dict[str, Source]:
    """Find the splits of a data set, whatever its format.

    Args:
        path: a folder, or a single annotation file (COCO's JSON, YOLO's YAML).
        annotations: the format that is meant where a folder holds several, such as "coco_panoptic"; empty: the one of
            the highest precedence, objects before segments before pictures of masks.

    Returns:
        The splits by name: "train", "val" and "test" however the files spell them, other names as they are, and "all"
        where the data set is not split.

    Raises:
        DataError: the path does not exist, holds predictions, nothing is recognised, or more than one format is.
        UsageError: there is no format of that name.
    """
    root = Path(path)
    if annotations and annotations not in names():
        raise UsageError(
            "There is no such format of annotations", where="annotations", got=annotations, expected=", ".join(names())
        )
    if not root.exists():
        raise DataError("There is no such file or folder", where=root, remedy="Check the path of the data set.")
    refuse_answers(root)
    modules = {name: _module(name) for name in ([annotations] if annotations else names())}
    found: dict[str, dict[str, Source]] = {}
    for precedence in sorted({module.PRECEDENCE for module in modules.values()}, reverse=True):
        for name, module in modules.items():
            if precedence == module.PRECEDENCE and (sources := module.recognise(root)):
                found[name] = sources
        if found:
            break
    if len(found) > 1:
        first = next(iter(found))
        raise DataError(
            "More than one format is recognised",
            where=root,
            got="; ".join(f"{name}: {next(iter(sources.values())).path}" for name, sources in found.items()),
            expected="one format",
            remedy=f"Say which is meant, as by --annotations {first} (in Python annotations={first!r}), or pass the "
            "annotation file itself.",
        )
    if not found:
        expected = "; ".join(f"{name}: {module.EXPECTED}" for name, module in modules.items())
        raise DataError("No data set is recognised", where=root, got=_contents(root), expected=expected)
    return next(iter(found.values()))


def _contents(root: Path) -> str:
    """What lies at a path, in a few words."""
    if root.is_file():
        return f"a file of {root.stat().st_size:,} bytes"
    entries = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in root.iterdir())
    if not entries:
        return "an empty folder"
    more = f" and {len(entries) - ENTRIES_SHOWN} more" if len(entries) > ENTRIES_SHOWN else ""
    return "the entries " + ", ".join(entries[:ENTRIES_SHOWN]) + more


def read(
    path: str | Path,
    split: str | None = None,
    *,
    check_files: bool = True,
    masks: bool | Literal["any"] = False,
    annotations: str = "",
) -> dict[str, Annotations]:
    """Read a data set.

    Args:
        path: see `recognise`.
        split: the only split to read ("valid" and "val" are the same); all of them where None. The splits of one data
            set share one category table when they are read together.
        check_files: whether images must exist. Missing ones are dropped and counted, images lying beside them that
            nobody mentions are noted. Without it COCO and VOC files are read though no image is at hand; YOLO needs the
            size of each image to understand its labels.
        masks: whether the masks of the objects are read, which takes longer; "any" does without where there are none.
        annotations: see `recognise`.

    Returns:
        The splits by name, with what was wrong with each in `problems`.

    Raises:
        DataError: nothing is recognised, there is no such split, a file is malformed, not one image exists, or masks
            are asked for and no object of a split has one.
    """
    sources = recognise(path, annotations=annotations)
    if split is not None:
        wanted = split if split in sources else split_name(split)
        if wanted not in sources:
            raise DataError(
                f"There is no split {split!r}", where=path, got=", ".join(sources), expected=f"one called {split!r}"
            )
        sources = {wanted: sources[wanted]}
    module = _module(next(iter(sources.values())).format)
    if hasattr(module, "read_together"):
        splits: dict[str, Annotations] = module.read_together(sources, check_files=check_files, masks=bool(masks))
    else:
        splits = {
            name: module.read(source, check_files=check_files, masks=bool(masks)) for name, source in sources.items()
        }
    if masks is True:
        for part in splits.values():
            _check_masks(part)
    return _with_one_table(splits, path)


def _check_masks(annotations: Annotations) -> None:
    if annotations.masks is not None:
        return
    kinds = [kind for kind in annotations.problems.counts if "-mask" in kind]
    wrong = [
        f"{annotations.problems.counts[kind]} × {kind} ({annotations.problems.examples[kind][0]})" for kind in kinds
    ]
    raise DataError(
        "No object has a mask",
        where=annotations.source,
        got=", ".join([f"{len(annotations.boxes):,} boxes", *wrong]),
        expected="a segmentation of each object",
        remedy="Export the annotations with their masks (COCO, or polygons as YOLO labels), or go on with boxes alone.",
    )


def _with_one_table(splits: dict[str, Annotations], path: str | Path) -> dict[str, Annotations]:
    """The splits with the union of their category tables, in the order of the ids."""
    rows = {category: None for annotations in splits.values() for category in annotations.categories}
    if all(len(annotations.categories) == len(rows) for annotations in splits.values()):
        return splits
    by_id: dict[int, Category] = {}
    for category in rows:
        if (other := by_id.setdefault(category.id, category)) != category:
            raise DataError(
                "The splits disagree about their categories",
                where=path,
                got=f"id {category.id} is {_in_words(other)} in one and {_in_words(category)} in another",
                remedy="Give each category the same id in all files, and call it a thing or stuff in all of them "
                "(isthing; a thing where a file does not say).",
            )
    union = tuple(by_id[key] for key in sorted(by_id))
    return {name: with_categories(annotations, union) for name, annotations in splits.items()}


def _in_words(category: Category) -> str:
    return f"{category.name!r} ({'a thing' if category.is_thing else 'stuff'})"


def write(splits: Mapping[str, Annotations], out: Path, format: str, *, copy_images: CopyImages = "link") -> None:
    """Write a data set in a layout that `recognise` finds again.

    What a format cannot express is lost; its module says what.

    Args:
        splits: the data set.
        out: a new or empty folder.
        format: one of `names()`.
        copy_images: "link" (or copy where hard links are impossible), "copy" or True, "none" or False.

    Raises:
        UsageError: an unknown format, no split, splits that have one name ("val" and "valid"), or an output folder that
            holds something.
        DataError: an image cannot be copied, or the format cannot express the data set; nothing is left of it then.
        Error: the disk is full or cannot be written; nothing is left of it then.
    """
    if format not in names():
        raise UsageError(f"Unknown format {format!r}", expected=", ".join(names()))
    if not splits:
        raise UsageError("There is no split to write", where=out)
    for name in splits:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise UsageError("A split's name must be usable as a folder's name", got=repr(name))
    if len({split_name(name) for name in splits}) < len(splits):
        raise UsageError("Two splits would be one when they are read", got=", ".join(splits), remedy="Rename one.")
    fresh_folder(out)
    with or_nothing(out):
        _module(format).write(splits, out, copy_images=copy_images)
