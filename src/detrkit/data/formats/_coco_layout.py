"""Where COCO files and their images lie, and which of them lists objects and which segments: told without parsing."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from detrkit.data.files import is_known_split, split_name, unescaped
from detrkit.data.formats import Source
from detrkit.documents import opened
from detrkit.errors import DataError

NAMES_TRIED = 20
PIECE_BYTES = 1 << 20
OVERLAP_BYTES = 1 << 12
OBJECTS, SEGMENTS = "instances_", "panoptic_"
_PREFIXES = (OBJECTS, SEGMENTS, "person_keypoints_", "image_info_", "labels_", "annotations_")
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32 LE begins as UTF-16's
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')

Kind = Literal["objects", "segments", ""]
"""What a file lists; "" where it is no COCO file."""


def sources(root: Path, format: str, kind: Kind, prefix: str) -> dict[str, Source]:
    """The splits that the files of one kind make: in a folder, its `annotations` folder and its folders of splits; or
    a single file.

    Args:
        root: the folder or file.
        format: what the sources are of.
        kind: the files that are wanted.
        prefix: of official names: where some files bear it, the others are not meant.

    Raises:
        DataError: two files could be the same split.
    """
    if root.is_file():
        files = [root] if root.suffix.lower() == ".json" and kind_of(root) == kind else []
    else:
        files = [path for path in _candidates(root) if kind_of(path) == kind]
    if any(path.name.startswith(prefix) for path in files):
        files = [path for path in files if path.name.startswith(prefix)]
    found: dict[str, Source] = {}
    for path in files:
        split = _split_of(path)
        if split in found:
            raise DataError(
                f"Two COCO files could be the split {split!r}",
                where=root,
                got=f"{found[split].path} and {path}",
                remedy="Pass the annotation file itself, or move the other elsewhere.",
            )
        found[split] = Source(format, split, path, image_folders(path)[0])
    return found


def _candidates(root: Path) -> Iterator[Path]:
    """JSON files where COCO files are usually found."""
    folders = [root, root / "annotations"]
    folders += sorted(path for path in root.iterdir() if path.is_dir() and is_known_split(path.name))
    for folder in folders:
        yield from sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in overlapping pieces: to look for something short. A memory map would count as memory used."""
    with opened(path) as file:
        kept = b""
        while piece := file.read(PIECE_BYTES):
            yield kept + piece
            kept = piece[-OVERLAP_BYTES:]


def kind_of(path: Path) -> Kind:
    """What a file lists: it is an object that names images and annotations, and the first of these have segments or
    not; nothing is parsed.

    The table of categories stands last as a rule, and its absence, as in a file that was cut off, is an error to be
    told and no reason to pass the file over.

    Raises:
        DataError: policy "malformed-file": it names them in UTF-16 or UTF-32, as what Windows PowerShell writes by ">".
    """
    missing = {b'"images"', b'"annotations"'}
    in_segments = path.name.startswith(SEGMENTS)
    complete = wide = False
    try:
        for number, piece in enumerate(_pieces(path)):
            wide = wide or (number == 0 and piece.startswith(_WIDE_MARKS))
            if wide:  # keys are ASCII, and their bytes the same apart from zeros
                piece = piece.replace(b"\0", b"").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")
            if number == 0 and piece.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
                return ""
            missing = {key for key in missing if key not in piece}
            in_segments = in_segments or b'"segments_info"' in piece
            if complete or (in_segments and not missing):
                break
            complete = not missing  # the first annotation may begin in the next piece
    except OSError:
        return ""
    if missing:
        return ""
    if wide:
        raise DataError(
            "malformed-file: the text of the file is UTF-16 or UTF-32",
            where=path,
            expected="UTF-8",
            remedy="Save it as UTF-8.",
        )
    return "segments" if in_segments else "objects"


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
    official = path.stem.startswith((OBJECTS, SEGMENTS)) and raw != "default"
    # "labels", "annotations", "result", "default": a name for the whole and not for a part
    return split_name(raw) if is_known_split(raw) or official else "all"


def image_folders(path: Path) -> list[Path]:
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
                name = json.loads(match.group(1)).replace("\\", "/")
                names += dict.fromkeys((name, unescaped(name)))
            if len(names) >= NAMES_TRIED:
                return names
    return names
