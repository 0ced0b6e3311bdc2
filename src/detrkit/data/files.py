"""Folders and file names: listing images, checking that they exist, reading their size, putting them in place."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from detrkit.data.annotations import Annotations
from detrkit.data.images import opened_header, orientation
from detrkit.data.problems import Problems
from detrkit.documents import opened
from detrkit.errors import DataError, UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of the files that count as images, in lower case."""

UNREAD_SUFFIXES = (
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
"""Suffixes of pictures of other kinds, in lower case: whoever has such files among images takes them for images."""

SAME_ASPECT = 0.01
"""Aspect ratios that differ by less than this fraction count as the same picture, scaled."""

_SIDEWAYS = range(5, 9)  # the orientations of the EXIF standard that exchange width and height
_KNOWN_SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
_YEAR = re.compile(r"(?<=[a-zA-Z])_?(?:19|20)\d\d$")

CopyImages = Literal["link", "copy", "none"] | bool
"""How writers bring images along: hard links (copies where that is impossible), copies, or not at all."""


def split_name(raw: str) -> str:
    """The library's name of a split: "valid" and "validation2017" are "val"; unknown names stay, less their year."""
    bare = _YEAR.sub("", raw)
    for name, spellings in _KNOWN_SPLITS.items():
        if bare.lower() in spellings:
            return name
    return bare


def is_known_split(raw: str) -> bool:
    """Whether a folder or file is called like a training, validation or test split."""
    return split_name(raw) in _KNOWN_SPLITS


def is_image_name(name: str) -> bool:
    """Whether a file counts as an image: by its suffix, and not a hidden one."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def is_unread_picture(name: str) -> bool:
    """Whether a file is, by its suffix, a picture of a kind that is not read."""
    return name.lower().endswith(UNREAD_SUFFIXES)


def unread_pictures(names: Iterable[str]) -> list[str]:
    """Those of some files that are pictures of kinds that are not read, without those that lie there in another form.

    Cameras write a JPEG beside their raw pictures, under the same name up to the suffix.
    """
    names = list(names)
    read = {name.rpartition(".")[0] for name in names if is_image_name(name.rpartition("/")[2])}
    return [name for name in names if is_unread_picture(name) and name.rpartition(".")[0] not in read]


def walk_images(folder: Path, problems: Problems | None = None) -> Iterator[str]:
    """Images below a folder as sorted relative paths with forward slashes; hidden folders and files are passed over.

    Args:
        folder: where to look.
        problems: where `unread_pictures` are counted as "unread-image", when all is seen; None: they are not.
    """
    seen = []
    for name in walk_files(folder, lambda name: is_image_name(name) or is_unread_picture(name)):
        seen.append(name)
        if is_image_name(name.rpartition("/")[2]):
            yield name
    if problems is not None:
        for name in unread_pictures(seen):
            problems.add("unread-image", str(folder / name))


def walk_files(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[str]:
    """The same of files that are told by their names; hidden ones are passed over whatever their names."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if not _is_new(parent, seen):  # a link leads back
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        base = Path(parent).relative_to(folder).as_posix()
        prefix = "" if base == "." else f"{base}/"
        yield from (f"{prefix}{name}" for name in sorted(files) if not name.startswith(".") and is_wanted(name))


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder is not among those that were seen, and note it."""
    try:
        told = os.stat(folder)  # noqa: PTH116 - of the text that `os.walk` gives
    except OSError:
        return False
    mark = (told.st_dev, told.st_ino)
    if mark in seen:
        return False
    seen.add(mark)
    return True


def has_images(folder: Path) -> bool:
    """Whether there is an image directly in a folder."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(is_image_name(entry.name) for entry in entries)


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels from an image's header, after its EXIF orientation; no pixel is decoded.

    Raises:
        DataError: the file is missing or not an image of a known format.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of what it believes is a decompression bomb, or of broken EXIF; nothing is decoded here.
            warnings.simplefilter("ignore")
            with opened(path) as file, opened_header(file, str(path)) as image:
                width, height = image.size
                sideways = orientation(image) in _SIDEWAYS
    except DataError:
        raise
    except Exception as error:  # the parsers let all kinds of errors through
        reason = getattr(error, "strerror", None) or error
        raise DataError("The image's header cannot be read", where=path, got=reason) from error
    return (width, height) if sideways else (height, width)


def annotated_frame(annotated: tuple[int, int], actual: tuple[int, int]) -> tuple[int, int]:
    """The size in which the boxes of an image are stated, where its file has another: the file is believed.

    An image of the same aspect ratio was scaled after it was annotated, and its boxes stand in the annotated size. Any
    other (a cut image; or a size that was noted before the EXIF rotation, while boxes are drawn on upright images) has
    its boxes in the size of the file.

    Args:
        annotated: height and width that the annotation states; (0, 0) where it states none.
        actual: height and width of the upright image in the file.

    Returns:
        Height and width in pixels.
    """
    if 0 in annotated or annotated == actual:
        return actual
    y_factor, x_factor = annotated[0] / actual[0], annotated[1] / actual[1]
    return annotated if abs(y_factor / x_factor - 1) < SAME_ASPECT else actual


def measured_frame(path: Path, annotated: tuple[int, int], problems: Problems) -> tuple[int, int]:
    """The same of an image file, whose header is read; a size that is not the annotated one is counted.

    Args:
        path: the image.
        annotated: height and width that the annotation states; (0, 0) where it states none.
        problems: where it is counted.

    Raises:
        DataError: the header cannot be read.
    """
    actual = upright_size(path)
    if 0 not in annotated and annotated != actual:
        (height, width), (true_height, true_width) = annotated, actual
        told = f"{path}: {width} × {height} annotated, {true_width} × {true_height} in the file"
        problems.add("size-mismatch", told)
    return annotated_frame(annotated, actual)


def safe_name(name: str, where: str) -> str:
    """A relative path with forward slashes that stays inside its folder.

    Raises:
        DataError: policy "unsafe-path": the name is empty, absolute, impossible, or climbs out of its folder.
    """
    plain = name.replace("\\", "/")
    drive = len(plain) > 1 and plain[1] == ":" and plain[0].isalpha()
    if not plain or plain[0] == "/" or drive or "\0" in plain or not (plain.isascii() or _is_encodable(plain)):
        raise _unsafe(name, where)
    if "./" in plain or "//" in plain or plain.endswith("."):
        plain = os.path.normpath(plain)  # pathlib keeps "a/../b"
        if plain == "." or plain == ".." or plain.startswith("../"):
            raise _unsafe(name, where)
    return plain


def unescaped(name: str) -> str:
    """A file name without the percent signs of an address, in which tools on the web write it; as it is where it has
    none, or where it would leave its folder."""
    try:
        return safe_name(unquote(name), "")
    except DataError:
        return name


def _is_encodable(name: str) -> bool:
    """False for half of a surrogate pair, which JSON can hold and a file system cannot."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _unsafe(name: str, where: str) -> DataError:
    return DataError(
        "unsafe-path: a file name points outside the data folder",
        where=where,
        got=repr(name),
        expected="a path relative to the image folder",
        remedy="Write file names relative to the folder that holds the images.",
    )


class Listing:
    """Which files exist, by listing each folder once: 118,000 separate questions to the file system take minutes on a
    network drive.

    Args:
        root: the folder that names are relative to.
    """

    def __init__(self, root: Path):
        self.root = root
        self.folders: dict[str, frozenset[str]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """File names in a folder below the root; none where there is no such folder."""
        if folder not in self.folders:
            try:
                with os.scandir(self.root / folder) as entries:
                    found = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                found = frozenset()
            self.folders[folder] = found
        return self.folders[folder]

    def __contains__(self, name: object) -> bool:
        folder, _, base = str(name).rpartition("/")
        return base in self.names(folder)

    def others(self, mentioned: Iterable[str]) -> list[str]:
        """Images in the folders listed so far that are not among `mentioned`, sorted."""
        known = set(mentioned)
        present = (
            f"{folder}/{name}" if folder else name
            for folder, names in self.folders.items()
            for name in names
            if is_image_name(name)
        )
        return sorted(name for name in present if name not in known)


def unique_stems(names: Sequence[str]) -> list[str]:
    """The names, changed where two differ in their suffix alone: "a.jpg", "a.png" become "a.jpg", "a_png.png".

    Formats with a label file for each image need this.
    """
    taken: set[str] = set()
    unique = []
    for name in names:
        path = PurePosixPath(name)
        stem = path.with_suffix("")
        if str(stem) in taken:
            stem = stem.with_name(f"{stem.name}_{path.suffix[1:]}")
        number = 1
        while str(stem) in taken:
            number += 1
            stem = path.with_name(f"{path.stem}_{number}")
        taken.add(str(stem))
        unique.append(f"{stem}{path.suffix}")
    return unique


def check_outside(out: Path, data: str | Path) -> None:
    """Refuse to write into a data set that is read: what lies there would be taken for a part of it.

    Args:
        out: where something is to be written.
        data: the folder of the data set; of an annotation file it is not known which folder that is.

    Raises:
        UsageError: the one lies inside the other.
    """
    root = Path(data)
    if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            "The output folder lies inside the data set, which is not written to",
            where=out,
            expected=f"a folder outside of {root.resolve()}",
        )


def fresh_folder(out: Path) -> None:
    """Make an output folder.

    Raises:
        UsageError: it exists and holds something, or is a file; nothing is ever written over.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "The output folder is not empty", where=out, remedy="Name a folder that does not exist yet, or empty it."
        )
    out.mkdir(parents=True, exist_ok=True)


def place_images(annotations: Annotations, names: Sequence[str], folder: Path, copy_images: CopyImages) -> None:
    """Bring the images of a split into a folder.

    Args:
        annotations: whose images.
        names: where each goes, relative to `folder`; two entries of one name are one image.
        folder: the target.
        copy_images: "link" makes hard links and copies where that is impossible; True is "copy", False is "none".

    Raises:
        DataError: an image does not exist or cannot be copied, or a name is unsafe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if copy_images in ("none", False):
        return
    for name, index in {name: index for index, name in enumerate(names)}.items():
        origin, target = annotations.path(index), folder / safe_name(name, annotations.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy_images == "link":
            try:
                target.hardlink_to(origin.resolve())
                continue
            except OSError:
                pass  # another file system, or one without links: the copy below says what is really wrong
        try:
            shutil.copyfile(origin, target)
        except OSError as error:
            raise DataError(
                "The image cannot be copied",
                where=origin,
                got=error.strerror or error,
                remedy='Write without images (copy_images="none"), or mend the data set first.',
            ) from error
