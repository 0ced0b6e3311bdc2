"""Images with a picture of masks each, whose values number the objects; 0 is the background.

Layouts: `images/` and `masks/`; `{split}/images/` and `{split}/masks/`, or `images/{split}/` and `masks/{split}/`; and
that of Penn-Fudan, `PNGImages/` and `PedMasks/` (Wang et al., "Object Detection Combining Recognition and
Segmentation", ACCV 2007). The picture of `a/b.jpg` is `a/b.png`, `a/b_mask.png` or the same as `.tif` or `.tiff`: grey
values of 8 or 16 bits, indices of a palette, or colours. Each value is an object, so pictures of classes are not meant.

There is one category, whose id is 1: the line of `classes.txt` beside the folders, else `person` in Penn-Fudan's
layout and `object` elsewhere. Boxes and areas are those of the pixels, so every picture is decoded on reading. An image
without a picture is an empty image, and noted; one whose picture cannot be read, or is of another size, is left out.

Writing numbers the objects of an image from 1, in PNG files of 16 bits. Where masks overlap, the smaller one gets the
pixels. Crowds, objects without a mask, `difficult`, ids and the stated areas are lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from detrkit.data.annotations import Annotations, Strings
from detrkit.data.columns import BoxColumns, ImageColumns, build
from detrkit.data.files import (
    CopyImages,
    Listing,
    is_known_split,
    place_images,
    split_name,
    unique_stems,
    upright_size,
    walk_images,
)
from detrkit.data.formats import Source
from detrkit.data.problems import Problems
from detrkit.data.segment_files import SegmentFiles, numbers_of, objects_of, read_numbers
from detrkit.data.segmentations import MaskColumn
from detrkit.documents import read_text
from detrkit.errors import DataError
from detrkit.structures import Category

EXPECTED = "images/ and masks/, whose pictures number the objects of each image"
PRECEDENCE = 1
TABLE = "classes.txt"
IMAGES_TRIED = 20
LARGEST_NUMBER = 2**16 - 1
_FOLDERS = (("images", "masks", "object"), ("PNGImages", "PedMasks", "person"))
_ENDINGS = tuple(f"{ending}{suffix}" for suffix in (".png", ".tif", ".tiff") for ending in ("", "_mask"))


def recognise(root: Path) -> dict[str, Source]:
    """Find folders of images with folders of masks: of each split, or of the whole.

    Raises:
        DataError: two folders could be the same split.
    """
    if not root.is_dir():
        return {}
    for images, masks, _ in _FOLDERS:
        places = [(name, root / name / images, root / name / masks) for name in _splits(root)]
        places += [(name, root / images / name, root / masks / name) for name in _splits(root / images)]
        places = [place for place in places if _is_paired(*place[1:])]
        if not places and _is_paired(root / images, root / masks):
            places = [("all", root / images, root / masks)]
        sources: dict[str, Source] = {}
        for name, of_images, of_masks in places:
            source = Source("instance_masks", split_name(name), of_masks, of_images)
            if (other := sources.setdefault(source.split, source)) is not source:
                raise DataError(
                    f"Two folders could be the split {source.split!r}",
                    where=root,
                    got=f"{other.images} and {of_images}",
                    remedy="Move one of them elsewhere.",
                )
        if sources:
            return sources
    return {}


def _splits(root: Path) -> list[str]:
    """The folders called like splits."""
    return sorted(path.name for path in root.glob("*/") if is_known_split(path.name))


def _is_paired(images: Path, masks: Path) -> bool:
    """Whether one of the first images has a picture of masks."""
    if not images.is_dir() or not masks.is_dir():
        return False
    listing = Listing(masks)
    return any(_picture(name, listing) for name in itertools.islice(walk_images(images), IMAGES_TRIED))


def _picture(name: str, listing: Listing) -> str:
    """The picture of masks of an image; "" where there is none."""
    stem = name.rpartition(".")[0]
    return next((f"{stem}{ending}" for ending in _ENDINGS if f"{stem}{ending}" in listing), "")


def _category(masks: Path) -> Category:
    """The one category, named by the table beside the folders, or as their layout has it."""
    base = masks.parent.parent if is_known_split(masks.name) else masks.parent
    usual = next(name for _, folder, name in _FOLDERS if folder in (masks.name, masks.parent.name))
    for folder in [base, *([base.parent] if is_known_split(base.name) else [])]:
        if (folder / TABLE).is_file():
            lines = read_text(folder / TABLE, errors="replace").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            if len(names) != 1:
                raise DataError(
                    "Pictures that number objects know one category",
                    where=folder / TABLE,
                    got=f"{len(names)} lines",
                    expected="one line",
                    remedy="Write its name into the file, or remove the file.",
                )
            return Category(1, names[0])
    return Category(1, usual)


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one split: every picture of masks is decoded.

    Args:
        source: what `recognise` found.
        check_files: of no effect, as the images are found by looking.
        masks: whether the annotations have masks.

    Raises:
        DataError: no picture can be read, or the table of categories has several.
    """
    category, problems, listing = _category(source.path), Problems(), Listing(source.path)
    names: list[str] = []
    pictures: list[str] = []
    sizes: list[tuple[int, int]] = []
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for name in walk_images(source.images, problems):
        picture = _picture(name, listing)
        try:
            size = upright_size(source.images / name)
        except DataError as error:
            problems.add("unreadable-image", f"{error.where}: {error.cause}")
            continue
        if (objects := _objects(source, name, picture, size, problems)) is not None:
            names.append(name)
            pictures.append(picture)
            sizes.append(size)
            found.append(objects)
    if not any(pictures):
        raise DataError(
            "No picture of masks can be used",
            where=source.path,
            got=", ".join(f"{count} × {kind}" for kind, count in problems.counts.items()),
            remedy="Export the masks again, at the size of the images.",
        )
    counts = [len(numbers) for numbers, _, _ in found]
    files = np.repeat(np.arange(len(names)), counts)
    numbers, boxes, areas = (np.concatenate(column) for column in zip(*found, strict=True))
    places = SegmentFiles(source.path, Strings(pictures), np.array(sizes), files, numbers)
    flags = np.zeros(len(files), bool)
    columns = BoxColumns(
        files,
        boxes,
        np.zeros(len(files), np.int64),
        areas,
        flags,
        flags,
        lambda row: f"{source.path / pictures[files[row]]}: object {numbers[row]}",
        MaskColumn(places, np.zeros(len(files), np.uint8)) if masks else None,
    )
    images = ImageColumns(names, np.arange(1, len(names) + 1), np.array(sizes, np.int64).reshape(-1, 2))
    told = f"instance_masks {source.path}"
    return build(source.images, images, columns, [category], problems, told, check_files=False)


def _objects(
    source: Source, name: str, picture: str, size: tuple[int, int], problems: Problems
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Numbers, boxes and areas of an image's objects; None where the picture cannot be used, which is counted."""
    if not picture:
        problems.add("unannotated-image", f"{source.images / name}: no picture in {source.path}")
        return objects_of(np.zeros((1, 1), np.int64))
    path = source.path / picture
    try:
        values = read_numbers(path)
    except DataError as error:
        problems.add("unreadable-mask-file", str(error))
        return None
    if values.shape != size:
        told = f"{path}: {values.shape[0]} × {values.shape[1]} pixels, the image {size[0]} × {size[1]}"
        problems.add("unreadable-mask-file", told)
        return None
    return objects_of(values)


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `{split}/images/`, `{split}/masks/` and `classes.txt`.

    Raises:
        DataError: there are no masks or several categories, several splits of other names than train, val and test, an
            image has too many objects, the size of an image is not known, or a file of masks cannot be read.
    """
    table = next(iter(splits.values())).categories
    for part in splits.values():
        if len(table) != 1 or part.categories != table or (part.masks is None and len(part.boxes)):
            raise DataError(
                "Pictures that number objects need masks, and know one category",
                where=part.source,
                got=f"{len(part.boxes):,} boxes of {len(part.categories)} categories, "
                f"{'without' if part.masks is None else 'with'} masks",
                remedy="Write coco, which takes all of it.",
            )
    if len(splits) > 1 and not all(map(is_known_split, splits)):
        raise DataError(
            "Folders of pictures have no place for splits of other names",
            got=", ".join(splits),
            expected="train, val and test",
            remedy="Write coco, which takes all of it.",
        )
    for split, part in splits.items():
        name = split if is_known_split(split) else "."
        names = unique_stems(list(part.file_names))
        place_images(part, names, out / name / "images", copy_images)
        for index, image in enumerate(names):
            numbers = numbers_of(part, index, crowds=False)
            if numbers.max(initial=0) > LARGEST_NUMBER:
                raise DataError(
                    "There are more objects than a picture of 16 bits has numbers",
                    where=part.path(index),
                    got=f"{numbers.max():,} objects",
                    expected=f"at most {LARGEST_NUMBER:,}",
                    remedy="Write coco, which takes all of it.",
                )
            target = (out / name / "masks" / image).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.astype(np.uint16)).save(target)
    (out / TABLE).write_text(f"{table[0].name}\n", encoding="utf-8")
