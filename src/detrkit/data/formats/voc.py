"""Pascal VOC XML (Everingham et al., IJCV 2010): one file an image.

Layouts: `Annotations/*.xml` with `JPEGImages/` and lists of stems in `ImageSets/Main/{train,val,test}.txt` (`trainval`
is the training split where train and val are not both listed; lists of one class, `dog_train.txt`, are passed over, and
others are splits of their own names); the same as `annotations/*.xml` with `images/`; `{split}/*.xml` beside the
images; one folder of both.

Coordinates are 1-based and inclusive as the devkit publishes them: `xmin, ymin, xmax, ymax` is the box xmin − 1,
ymin − 1, xmax, ymax in 0-based pixels. Many tools write from 0; where as many boxes of the data set begin there as at
1, its files are read as they stand, which is noted. A box whose corners are one point is a click and no object of one
pixel: it is dropped as degenerate, and objects of one pixel are written a little wider. The category table holds the
lines of `classes.txt` where that file exists, else the names found in all files of the data set, in alphabetical order;
ids are 1 … n.

An image is the one with the stem of its XML file, as in the devkit; failing that, what `<filename>` says.

Writing loses image ids, category ids and stated areas. Crowd boxes are marked `<crowd>` and, for other readers,
`<difficult>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.columns import BoxColumns, ImageColumns, build
from detrkit.data.files import (
    IMAGE_SUFFIXES,
    CopyImages,
    Listing,
    place_images,
    unique_stems,
)
from detrkit.data.formats import Source
from detrkit.data.formats import _voc_layout as layout
from detrkit.data.formats._voc_files import CORNERS, VocFile, parsed
from detrkit.data.problems import Problems
from detrkit.documents import read_text
from detrkit.errors import DataError
from detrkit.structures import Category

EXPECTED = "Annotations/*.xml with JPEGImages/ and ImageSets/Main/*.txt, or XML files beside their images"
PRECEDENCE = 3
TABLE = "classes.txt"
_WRITABLE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")
"""Text that XML and a list of lines can hold."""


def recognise(root: Path) -> dict[str, Source]:
    """Find VOC files in a folder, in a devkit below it, or in its folders of splits.

    Raises:
        DataError: a devkit of several years.
    """
    return layout.sources(root)


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one split; the files of the others are looked through too, for the category table.

    Args:
        source: what `recognise` found.
        check_files: whether images must exist, see `formats.read`.
        masks: of no effect, as the files hold none.

    Raises:
        DataError: not one file is an annotation, an entity bomb is refused, a file name is unsafe, or not one image
            exists.
    """
    return read_together({source.split: source}, check_files=check_files)[source.split]


def read_together(
    sources: Mapping[str, Source], *, check_files: bool = True, masks: bool = False
) -> dict[str, Annotations]:
    """Read several splits of one data set, each XML file once. See `read`."""
    first = next(iter(sources.values()))
    root, folders = layout.set_of(first)
    files, others = parsed(root, layout.xml_files(folders))
    shared = Problems()
    one_based = _is_one_based(files, shared)
    categories = _table(root.parent if layout.is_for_annotations(root) else root, files)
    splits = {}
    for split, source in sources.items():
        problems = Problems()
        problems.merge(shared)
        if source.path.suffix == ".txt":
            keys = _listed(source.path, files, problems)
        else:
            keys = [key for key in files if (root / key).is_relative_to(source.path)]
            for path in others:
                if path.is_relative_to(source.path):
                    problems.add("unread-annotation", str(path))
        chosen = {key: files[key] for key in keys}
        splits[split] = _columns(source, root, chosen, categories, one_based, problems, check_files)
    return splits


def _listed(path: Path, files: Mapping[str, VocFile], problems: Problems) -> list[str]:
    """The stems of a list that have an annotation file. A second column, as in the lists of a class, is ignored."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError("malformed-file: the list of a split cannot be read", where=path, got=error) from error
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        # A stem may hold blanks; a trailing 1, 0 or -1 is the devkit's flag of a class.
        key = line.strip() if line.strip() in files or len(words) < 2 else " ".join(words[:-1])
        if not words:
            continue
        if key in files:
            keys.append(key)
        else:
            problems.add("missing-annotation", f"{path}, line {number}: {key}")
    return list(dict.fromkeys(keys))


def _is_one_based(files: Mapping[str, VocFile], problems: Problems) -> bool:
    """Whether fewer boxes begin in [0, 1), where none does that counts from 1, than in [1, 2).

    Boxes gather at the left and upper border, wherever that is. Boxes without area, which many tools write as four
    zeros, tell nothing, and one wrong corner does not outweigh all others.
    """
    begun, first = [0, 0], ""
    for file in files.values():
        for x, y, other_x, other_y in (item.corners for item in file.objects if item.corners):
            if x == other_x or y == other_y:
                continue
            for low in (min(x, other_x), min(y, other_y)):
                if 0 <= low < 2:
                    begun[int(low)] += 1
                    first = first or (str(file.path) if low < 1 else "")
    if begun[0] and begun[0] >= begun[1]:
        problems.add("zero-based-voc", first)
        return False
    return True


def _table(base: Path, files: Mapping[str, VocFile]) -> tuple[Category, ...]:
    if (base / TABLE).is_file():
        try:
            lines = read_text(base / TABLE).splitlines()
        except (OSError, ValueError) as error:
            raise DataError("malformed-file: the list of classes cannot be read", where=base / TABLE) from error
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    else:
        found = sorted({item.name for file in files.values() for item in file.objects if item.name})
    return tuple(Category(number, name) for number, name in enumerate(found, 1))


def _columns(
    source: Source,
    root: Path,
    files: Mapping[str, VocFile],
    categories: tuple[Category, ...],
    one_based: bool,
    problems: Problems,
    check_files: bool,
) -> Annotations:
    labels = {category.name: row for row, category in enumerate(categories)}
    listing = Listing(source.images)
    names: list[str] = []
    rows: list[tuple[Any, ...]] = []
    places: list[str] = []
    lost = np.zeros(len(files), bool)
    for image, (key, file) in enumerate(files.items()):
        if source.images.is_relative_to(root):  # beside the XML files: names are relative to the folder of the split
            key = (root / key).relative_to(source.images).as_posix()
        names.append(_image_name(key, file, listing, check_files))
        if file.fault:
            problems.add("unreadable-annotation", file.fault)
            lost[image] = True
        for number, item in enumerate(file.objects, 1):
            place = f"{file.path}: object {number}"
            if item.corners is None:
                problems.add("malformed-box", place)
                lost[image] = True
            elif item.name not in labels:
                problems.add("unknown-category", f"{place}, {item.name!r}")
            else:
                rows.append((image, item.corners, labels[item.name], item.crowd, item.difficult and not item.crowd))
                places.append(place)
    images, corners, label, crowd, difficult = zip(*rows, strict=True) if rows else ([],) * 5
    boxes = np.array(corners, np.float64).reshape(-1, 4)
    if one_based:
        boxes = _to_zero_based(boxes)
    return build(
        source.images,
        ImageColumns(
            names,
            np.arange(1, len(names) + 1, dtype=np.int64),
            np.array([file.size for file in files.values()], np.int64).reshape(-1, 2),
            lost,
        ),
        BoxColumns(
            np.array(images, np.int64),
            boxes,
            np.array(label, np.int64),
            np.full(len(boxes), math.nan),
            np.array(crowd, bool),
            np.array(difficult, bool),
            places.__getitem__,
        ),
        categories,
        problems,
        f"voc {source.path}",
        check_files=check_files,
        note_others=source.path.suffix != ".txt",  # a list leaves out what others name
    )


def _to_zero_based(boxes: np.ndarray) -> np.ndarray:
    """1-based, inclusive corners as 0-based ones: the lower one goes down by one, whichever of the two it is."""
    low, high = boxes[:, :2], boxes[:, 2:]
    swapped = low > high + 1  # up to 1 they are a box of less than a pixel
    is_area = (low != high).any(1, keepdims=True)
    return np.concatenate([low - (is_area & ~swapped), high - swapped], 1)


def _image_name(key: str, file: VocFile, listing: Listing, check_files: bool) -> str:
    """The image that an XML file is about, as a path relative to the image folder."""
    stated = Path(file.file_name).suffix if file.file_name else ""
    if check_files:
        suffixes = dict.fromkeys([stated, *IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)])
        for suffix in suffixes:
            if suffix and f"{key}{suffix}" in listing:
                return f"{key}{suffix}"
    parent = key.rpartition("/")[0]
    beside = f"{parent}/{file.file_name}" if parent and "/" not in file.file_name else file.file_name
    return beside if stated else f"{key}{IMAGE_SUFFIXES[0]}"


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `Annotations/`, `JPEGImages/`, `ImageSets/Main/{split}.txt` and `classes.txt`.

    Images lie in a folder of their split within `JPEGImages/` where there are several splits, as two splits may hold
    images of the same name.

    Raises:
        DataError: two categories share a name, the splits have different tables or names that lists of other things
            have, an image cannot be copied, or a name cannot stand in XML.
    """
    if sorted(layout.lists_of_splits(splits).values()) != sorted(splits):
        raise DataError(
            "Pascal VOC has lists of other things by the names of these splits",
            got=", ".join(splits),
            expected="no trainval beside train or val, and no name like dog_train",
            remedy="Rename the splits, or write COCO.",
        )
    table = next(iter(splits.values())).categories
    _refuse_unwritable([category.name for category in table], "a category", "Rename it, or write COCO.")
    for part in splits.values():
        stems = (name.rpartition(".")[0] or name for name in part.file_names)
        _refuse_unwritable(stems, "an image", "Rename the file, or write COCO.")
    (out / "ImageSets" / "Main").mkdir(parents=True)
    for split, part in splits.items():
        duplicates = len({category.name for category in table}) < len(table)
        if duplicates or part.categories != table:
            raise DataError(
                "Pascal VOC needs one category table with different names",
                where=part.source,
                got="a name that stands twice" if duplicates else "splits with different tables",
                remedy="Rename the categories, or write COCO.",
            )
        prefix = f"{split}/" if len(splits) > 1 else ""
        names = [f"{prefix}{name}" for name in unique_stems(list(part.file_names))]
        place_images(part, names, out / "JPEGImages", copy_images)
        keys = [Path(name).with_suffix("").as_posix() for name in names]
        for index, (name, key) in enumerate(zip(names, keys, strict=True)):
            target = out / "Annotations" / f"{key}.xml"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_element(part, index, Path(name).name))
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    (out / TABLE).write_text("".join(f"{category.name}\n" for category in table), encoding="utf-8")


def _refuse_unwritable(names: Iterable[str], whose: str, remedy: str) -> None:
    for name in names:
        if not _WRITABLE.fullmatch(name) or name != name.strip():
            raise DataError(
                f"The name of {whose} cannot stand in the files of Pascal VOC",
                got=ascii(name),
                expected="a name without control characters and line breaks, and without blanks around it",
                remedy=remedy,
            )


def _element(annotations: Annotations, index: int, name: str) -> bytes:
    """The XML of one image."""
    tree = Element("annotation")
    SubElement(tree, "filename").text = name
    height, width = annotations.image_sizes[index].tolist()
    _children(SubElement(tree, "size"), {"width": width, "height": height, "depth": 3})
    rows = annotations.rows(index)
    for row in range(rows.start, rows.stop):
        crowd, difficult = bool(annotations.crowd[row]), bool(annotations.difficult[row])
        item = SubElement(tree, "object")
        _children(item, {"name": annotations.categories[annotations.labels[row]].name})
        _children(item, {"difficult": int(difficult or crowd)} | ({"crowd": 1} if crowd else {}))
        corners = np.round(annotations.boxes[row] + (1, 1, 0, 0), 4)
        if (corners[:2] == corners[2:]).all():  # one pixel: not to be read as a click
            corners[2] += 1e-4
        _children(SubElement(item, "bndbox"), dict(zip(CORNERS, map(_number, corners), strict=True)))
    indent(tree)
    return bytes(tostring(tree, encoding="utf-8"))


def _children(parent: Element, texts: Mapping[str, object]) -> None:
    for name, text in texts.items():
        SubElement(parent, name).text = str(text)


def _number(value: float) -> str:
    """Whole where it is whole, else with four decimals."""
    return f"{value:.4f}".rstrip("0").rstrip(".")
