"""One XML file of Pascal VOC, and all of a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from detrkit.documents import read_bytes
from detrkit.errors import DataError

LARGEST = 1 << 25
"""Bytes of the largest XML file; that of an image of a thousand objects has half a million."""

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """One <object>; `corners` are None where they are malformed."""

    name: str
    corners: tuple[float, float, float, float] | None
    difficult: bool
    crowd: bool


class VocFile(NamedTuple):
    """What a file says of its image; `size` is height and width in pixels, 0 where it is not known. `fault` is what is
    wrong with a file that cannot be understood."""

    path: Path
    file_name: str = ""
    size: tuple[int, int] = (0, 0)
    objects: tuple[VocObject, ...] = ()
    fault: str = ""


def parsed(root: Path, paths: Iterable[Path]) -> tuple[dict[str, VocFile], list[Path]]:
    """All files by their stems, and the paths of XML files of other things.

    Args:
        root: what stems are relative to.
        paths: the files.

    Raises:
        DataError: not one of them is an annotation, or one has entities, which are not followed.
    """
    files: dict[str, VocFile] = {}
    others: list[Path] = []
    first: DataError | None = None
    for path in paths:
        key = path.relative_to(root).with_suffix("").as_posix()
        try:
            files[key] = _parse(path)
        except DataError as error:
            if isinstance(error.__cause__, DefusedXmlException):
                raise
            first = first or error
            if error.__cause__ is None:  # it is XML
                others.append(path)
            else:
                files[key] = VocFile(path, fault=f"{error.where}: {error.got}")
    if first is not None and all(file.fault for file in files.values()):
        raise first
    return files, others


def _parse(path: Path) -> VocFile:
    """Read one XML file."""
    try:
        tree = defusedxml.ElementTree.fromstring(read_bytes(path, LARGEST))
    except Exception as error:
        raise _malformed(path, str(error) or type(error).__name__) from error
    if tree.tag != "annotation":
        raise _malformed(path, f"the element <{tree.tag}>")
    size = tree.find("size")
    height, width = (_side(_text(size, name)) for name in ("height", "width"))
    return VocFile(path, _text(tree, "filename"), (height, width), tuple(map(_object, tree.findall("object"))))


def _malformed(path: Path, got: str) -> DataError:
    return DataError(
        "malformed-file: the file is not a Pascal VOC annotation",
        where=path,
        got=got,
        expected="XML whose outermost element is <annotation>",
        remedy="Export the file again, or remove it.",
    )


def _object(item: Element) -> VocObject:
    box = item.find("bndbox")
    try:
        x, y, other_x, other_y = (float(_text(box, name)) for name in CORNERS)
        corners = (x, y, other_x, other_y)
    except ValueError:
        corners = None
    return VocObject(_text(item, "name"), corners, _text(item, "difficult") == "1", crowd=_text(item, "crowd") == "1")


def _text(element: Element | None, name: str) -> str:
    """The text of a child, "" where there is none."""
    return ((element.findtext(name) if element is not None else None) or "").strip()


def _side(text: str) -> int:
    """A height or width in pixels; 0, meaning unknown, where it is nothing of the kind."""
    try:
        value = float(text)
    except ValueError:
        return 0
    return int(value) if 0 < value < 2**31 else 0
