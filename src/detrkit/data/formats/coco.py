"""COCO JSON (Lin et al., ECCV 2014): one file a split with the lists images, annotations and categories.

Boxes are x, y, width, height in pixels, 0-based. Layouts: `annotations/instances_{split}.json` with images in
`{split}/`, `{split}2017/`, `images/{split}/`, `images/` or beside; `{split}/_annotations.coco.json` (Roboflow); any
single JSON with those lists. Polygons and run-length masks are passed over without being parsed, unless masks are
asked for.

Writing keeps everything that `Annotations` holds; `difficult`, which COCO does not know, is written under that name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detrkit.data.annotations import Annotations
from detrkit.data.columns import build
from detrkit.data.files import CopyImages, is_known_split, place_images, split_name
from detrkit.data.formats import Source
from detrkit.data.formats._coco_columns import Collector
from detrkit.data.json_stream import read_lists
from detrkit.data.problems import Problems
from detrkit.errors import DataError

EXPECTED = (
    "a JSON file with images, annotations and categories, such as annotations/instances_train.json or "
    "train/_annotations.coco.json"
)
KEYS = ("images", "annotations", "categories")
NAMES_TRIED = 20
PIECE_BYTES = 1 << 20
OVERLAP_BYTES = 1 << 12
_PREFERRED = "instances_"
_PREFIXES = (_PREFERRED, "person_keypoints_", "image_info_", "labels_", "annotations_")
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def recognise(root: Path) -> dict[str, Source]:
    """Find COCO files in a folder, its `annotations` folder and its folders of splits; or take a single file.

    Where official names stand beside others (`captions_…`, `panoptic_…`), the `instances_…` files are meant.

    Raises:
        DataError: two files could be the same split.
    """
    if root.is_file():
        if root.suffix.lower() != ".json" or not _is_coco(root):
            return {}
        split = _split_of(root)
        return {split: Source("coco", split, root, _image_folders(root)[0])}
    files = [path for path in _candidates(root) if _is_coco(path)]
    if any(path.name.startswith(_PREFERRED) for path in files):
        files = [path for path in files if path.name.startswith(_PREFERRED)]
    sources: dict[str, Source] = {}
    for path in files:
        split = _split_of(path)
        if split in sources:
            raise DataError(
                f"Two COCO files could be the split {split!r}",
                where=root,
                got=f"{sources[split].path} and {path}",
                remedy="Pass the annotation file itself, or move the other elsewhere.",
            )
        sources[split] = Source("coco", split, path, _image_folders(path)[0])
    return sources


def _candidates(root: Path) -> Iterator[Path]:
    """JSON files where COCO files are usually found."""
    folders = [root, root / "annotations"]
    folders += sorted(path for path in root.iterdir() if path.is_dir() and is_known_split(path.name))
    for folder in folders:
        yield from sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in overlapping pieces: to look for something short. A memory map would count as memory used."""
    with path.open("rb") as file:
        kept = b""
        while piece := file.read(PIECE_BYTES):
            yield kept + piece
            kept = piece[-OVERLAP_BYTES:]


def _is_coco(path: Path) -> bool:
    """Whether a file is an object that names images and annotations; nothing is parsed.

    The table of categories stands last as a rule, and its absence, as in a file that was cut off, is an error to be
    told and no reason to pass the file over.
    """
    missing = {b'"images"', b'"annotations"'}
    try:
        for number, piece in enumerate(_pieces(path)):
            if number == 0 and piece.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
                return False
            missing = {key for key in missing if key not in piece}
            if not missing:
                return True
    except OSError:
        return False
    return False


def _raw_split(path: Path) -> str:
    """How a file, or the folder it stands in, calls its split."""
    stem = path.stem.removesuffix(".coco").strip("_")
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    if not is_known_split(stem) and is_known_split(path.parent.name):
        return path.parent.name
    return stem


def _split_of(path: Path) -> str:
    raw = _raw_split(path)
    # "labels", "annotations", "result", "default": a name for the whole and not for a part
    return split_name(raw) if is_known_split(raw) or (path.stem.startswith(_PREFERRED) and raw != "default") else "all"


def _image_folders(path: Path) -> list[Path]:
    """Folders that may hold the images of a COCO file, the most likely first: one that holds the first images named."""
    raw = _raw_split(path)
    spellings = dict.fromkeys([raw, split_name(raw), *(["valid", "validation"] if split_name(raw) == "val" else [])])
    bases = dict.fromkeys([path.parent.parent if path.parent.name == "annotations" else path.parent, path.parent])
    folders = [base / name for base in bases for name in spellings]
    folders += [base / "images" / name for base in bases for name in spellings]
    folders += [base / name for base in bases for name in ("images", "data", "JPEGImages", ".")]
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    names = _first_names(path)
    holding = [folder for folder in folders if any(os.path.isfile(folder / name) for name in names)]  # noqa: PTH113
    return holding[:1] + [folder for folder in folders if folder not in holding[:1]]


def _first_names(path: Path) -> list[str]:
    """The first few file names in a COCO file."""
    names: list[str] = []
    for piece in _pieces(path):
        for match in _FILE_NAME.finditer(piece):
            with contextlib.suppress(ValueError):
                names.append(json.loads(match.group(1)).replace("\\", "/"))
            if len(names) >= NAMES_TRIED:
                return names
    return names


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one COCO file.

    Ids of images and categories may be any integers, also written as strings; the category table is in the order of the
    ids. Where image ids are other strings, images are numbered from 1. Two categories may share a name. `area` is kept
    where it is positive, else it is the box's. Images without `width` and `height` are measured if `check_files`.

    Args:
        source: what `recognise` found.
        check_files: whether images must exist, see `formats.read`.
        masks: whether segmentations are read: polygons, and runs of both forms.

    Raises:
        DataError: the file is not JSON, lacks a list or what an image or category must have, two images or two
            categories share an id, a file name is unsafe, or not one image exists.
    """
    problems = Problems()
    collector = Collector(source.path, problems, masks)
    seen = set()
    for key, items in _lists(source, collector, check_files) if masks else read_lists(source.path, KEYS):
        seen.add(key)
        collector.add(key, items)
    for key in KEYS:
        if key not in seen:
            raise DataError(
                f"malformed-file: the list {key!r} is missing",
                where=source.path,
                got=", ".join(sorted(seen)),
                expected=", ".join(KEYS),
                remedy="Export the annotations as COCO object detection (instances).",
            )
    categories = collector.categories()
    images, boxes = collector.columns()
    own_folder = split_name(source.images.name) == source.split or len(list(source.path.parent.glob("*.json"))) == 1
    return build(
        source.images,
        images,
        boxes,
        categories,
        problems,
        f"coco {source.path}",
        check_files=check_files,
        note_others=own_folder,
        looked=_image_folders(source.path)[1:] if check_files else (),
    )


def _lists(source: Source, collector: Collector, check_files: bool) -> Iterator[tuple[str, list[Any]]]:
    """The items of the file with their segmentations, all images first, as masks are drawn at the size of their image.

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


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `annotations/instances_{split}.json` and the images into `{split}/`.

    Ids of images and categories are kept; annotations are numbered from 1 within each split.
    """
    (out / "annotations").mkdir()
    for split, part in splits.items():
        place_images(part, list(part.file_names), out / split, copy_images)
        with (out / "annotations" / f"{_PREFERRED}{split}.json").open("w", encoding="utf-8") as file:
            for opening, items in (
                ('{"categories":[', _category_items(part)),
                ('],\n"images":[', _image_items(part)),
                ('],\n"annotations":[', _annotation_items(part)),
            ):
                file.write(opening)
                for number, item in enumerate(items):
                    file.write((",\n" if number else "\n") + json.dumps(item, separators=(",", ":")))
            file.write("]}\n")


def _category_items(annotations: Annotations) -> Iterator[dict[str, object]]:
    return ({"id": category.id, "name": category.name} for category in annotations.categories)


def _image_items(annotations: Annotations) -> Iterator[dict[str, object]]:
    for row, name in enumerate(annotations.file_names):
        height, width = annotations.image_sizes[row].tolist()
        item: dict[str, object] = {"id": int(annotations.image_ids[row]), "file_name": name}
        yield item | ({"width": width, "height": height} if width else {})


def _annotation_items(annotations: Annotations) -> Iterator[dict[str, object]]:
    number = 0
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        for row in range(rows.start, rows.stop):
            number += 1
            x0, y0, x1, y1 = annotations.boxes[row].tolist()
            item: dict[str, object] = {
                "id": number,
                "image_id": int(annotations.image_ids[index]),
                "category_id": annotations.categories[annotations.labels[row]].id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(annotations.areas[row]),
                "iscrowd": int(annotations.crowd[row]),
            }
            yield item | ({"difficult": 1} if annotations.difficult[row] else {})
