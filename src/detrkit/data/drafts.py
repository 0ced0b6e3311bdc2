"""Found things as annotations: a draft that somebody checks, and that a training starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.columns import BoxColumns, ImageColumns, build
from detrkit.data.files import is_image_name
from detrkit.data.problems import Problems
from detrkit.errors import DataError
from detrkit.structures import Detections

ANSWERS, BOXES, SEGMENTS = "detections.json", "results.coco.json", "panoptic.json"
"""What `detrkit predict` and `detrkit find` write: always the first, and one of the others, for COCO's tools."""


def refuse_answers(path: Path) -> None:
    """Refuse a folder of predictions as a data set: boxes are painted on its pictures, and would be what is learnt.

    Args:
        path: a folder, or a file in it.

    Raises:
        DataError: it is one.
    """
    if not path.is_dir() and path.name not in (BOXES, SEGMENTS):
        return
    folder = path if path.is_dir() else path.parent
    draft = next((name for name in (BOXES, SEGMENTS) if (folder / name).is_file()), "")
    if draft and _is_ours(folder / ANSWERS):
        raise DataError(
            "This is what predict or find wrote, and no data set: what was found is painted on its pictures",
            where=folder,
            got=f"{ANSWERS} beside {draft}",
            remedy=f"Copy {draft} alone to the original images and name it there; or have a data set written: "
            "detrkit find … --write coco DRAFTS.",
        )


def _is_ours(file: Path) -> bool:
    """Whether `file` begins as predict and find begin it: other programs call theirs so, too."""
    try:
        with file.open("rb") as opened:
            return re.match(rb'\{\s*"threshold":', opened.read(64)) is not None
    except OSError:
        return False


def common_root(files: Sequence[Path]) -> tuple[Path, list[str]]:
    """The nearest folder above all images, and their names relative to it, with forward slashes.

    Where images lie only in folders below it and one of these is called `images`, it is the folder above: YOLO's
    readers take such a folder for the one with all images of a split.

    Args:
        files: images, at least one.

    Raises:
        DataError: a name that not all annotation formats can hold.
    """
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100 - links stay what they are
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    while _has_images_beside_others(root, absolute):
        if root == root.parent:
            raise DataError(
                "The images have no folder in common that a data set could be made of",
                where=root / "images",
                got="images there and in folders beside it",
                remedy="Search them one folder after the other.",
            )
        root = root.parent
    names = [file.relative_to(root).as_posix() for file in absolute]
    for file, name in zip(files, names, strict=True):
        _check_name(file, PurePosixPath(name))
    return root, names


def _has_images_beside_others(root: Path, files: Sequence[Path]) -> bool:
    """Whether files lie in a folder `images` below a root and in other folders, and none in the root itself."""
    tops = {file.relative_to(root).parts[:-1][:1] for file in files}
    return ("images",) in tops and () not in tops


def _check_name(file: Path, name: PurePosixPath) -> None:
    """Refuse what would be written and then not be found again: formats list names line by line in text files, and look
    folders through for images.

    Raises:
        DataError: the name is such.
    """
    stem, text = name.with_suffix("").as_posix(), name.as_posix()
    if any(part.startswith((".", "__MACOSX")) for part in name.parts):
        what = "is hidden, or lies in a hidden folder"
    elif not is_image_name(name.name):
        what = "has no ending that says that it is an image"
    elif text.splitlines() != [text] or stem != stem.strip() or "\\" in text or not _is_text(text):
        what = "has a name that annotation files cannot hold"
    else:
        return
    raise DataError(f"The image {what}", where=ascii(str(file))[1:-1], remedy="Rename it, or leave it out.")


def _is_text(name: str) -> bool:
    """False for a file name whose bytes are not UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def drafted(root: Path, files: Sequence[tuple[str, Detections]], *, accept: float) -> Annotations:
    """Things that were found, as annotations. Images in which nothing was stay, without objects.

    Args:
        root: the folder that names are relative to.
        files: images, at least one, with what was found in each; of one category table.
        accept: least score of what becomes an annotation, in [0, 1].

    Returns:
        One split, whose boxes are cut at the border of their image. Boxes of no area are dropped; `problems` counts
        both.

    Raises:
        DataError: a name that leads out of the root.
    """
    names = [name for name, _ in files]
    accepted = [found.above(accept) for _, found in files]
    rows = np.repeat(np.arange(len(files)), [len(found) for found in accepted])
    nothing = np.zeros(len(rows), bool)
    return build(
        root,
        ImageColumns(
            names,
            np.arange(1, len(files) + 1, dtype=np.int64),
            np.array([found.image_size for found in accepted], np.int64).reshape(-1, 2),
        ),
        BoxColumns(
            rows,
            np.concatenate([found.boxes.astype(np.float64).reshape(-1, 4) for found in accepted]),
            np.concatenate([found.labels for found in accepted]).astype(np.int64),
            np.full(len(rows), np.nan),
            nothing,
            nothing,
            lambda row: f"what was found in {names[rows[row]]}",
        ),
        files[0][1].categories,
        Problems(),
        f"found in {root}",
        check_files=False,
    )


def boxes_by_name(annotations: Annotations) -> dict[str, int]:
    """How many boxes each category has, in the order of the table."""
    counts = np.bincount(annotations.labels, minlength=len(annotations.categories))
    return {category.name: int(number) for category, number in zip(annotations.categories, counts, strict=True)}
