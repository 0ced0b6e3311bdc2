"""Unlabelled images where they lie: in folders, one by one, or in tar shards that are never unpacked.

To open a collection lists its folders and reads the headers of its shards; no image is opened before it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from detrkit.data.annotations import Strings
from detrkit.data.files import IMAGE_SUFFIXES, is_image_name, unread_pictures
from detrkit.data.images import MAX_PIXELS, open_image
from detrkit.data.problems import Problems
from detrkit.data.splits import assign
from detrkit.errors import DataError, UsageError

_SHARD_SUFFIX = ".tar"
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_COMPRESSED_HEADS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_UNPACK = "Decompress it into a plain .tar, for example with gunzip, or unpack it into a folder."
_TAIL = 1 << 20  # bytes after the end of a shard that are looked at; writers fill up to 10 KiB with zeros


@dataclass(frozen=True, eq=False)
class Pictures:
    """Unlabelled images, in columns that forked processes share. `n` images in `k` containers.

    Attributes:
        containers: the folders and tar shards that hold the images.
        prefixes: what stands before a name of each container to make it unique in its source: empty for folders.
        rows: (n,) int32, the container of each image.
        names: n paths with forward slashes relative to the folder, or names of members.
        offsets: (n,) int64, the byte in the shard where the image's file begins; -1 for a file of its own.
        sizes: (n,) int64, bytes of the image's file.
        problems: what was wrong with the files, counted.
        source: the paths that this was read from, for messages.
    """

    containers: tuple[Path, ...]
    prefixes: tuple[str, ...]
    rows: np.ndarray
    names: Strings
    offsets: np.ndarray
    sizes: np.ndarray
    problems: Problems = field(default_factory=Problems)
    source: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path of an image; in a shard: `shard.tar/member`."""
        return f"{self.containers[self.rows[index]]}/{self.names[index]}"

    def open(self, index: int, *, max_pixels: int = MAX_PIXELS, coarse: int = 0) -> Image.Image:
        """An image as upright RGB of 8 bits; limits as of `open_image`.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        container, name = self.containers[self.rows[index]], self.name(index)
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if offset < 0:
            return open_image(container / self.names[index], name=name, max_pixels=max_pixels, coarse=coarse)
        try:
            with container.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError("The tar shard cannot be read", where=name, got=error.strerror or error) from error
        if len(data) < size:
            raise DataError(
                "The tar shard is shorter than it was when it was listed", where=name, remedy="Copy it again."
            )
        return open_image(data, name=name, max_pixels=max_pixels, coarse=coarse)

    def select(self, indices: np.ndarray | Sequence[int]) -> Pictures:
        """The images of the given indices, in that order."""
        chosen = np.asarray(indices, np.int64).reshape(-1)
        return replace(
            self,
            rows=self.rows[chosen],
            names=Strings(self.names[int(index)] for index in chosen),
            offsets=self.offsets[chosen],
            sizes=self.sizes[chosen],
        )

    def split(self, val_fraction: float, seed: int) -> tuple[Pictures, Pictures]:
        """Hold a part of the images back, by the rule of `splits.split`: by a hash of the seed and of each name.

        A name is relative to the path that was opened, so an image stays where it is when others are added, and on
        whatever machine.

        Args:
            val_fraction: the share that is held back, at least 0 and below 1; of any share above 0 there is one image.
            seed: another seed divides otherwise.

        Returns:
            What to train on, and what was held back.

        Raises:
            UsageError: a fraction that is out of range.
            DataError: one image cannot be divided.
        """
        if not 0 <= val_fraction < 1:
            raise UsageError(
                "The share that is held back makes no sense",
                where="val_fraction",
                got=val_fraction,
                expected="at least 0 and below 1",
            )
        chosen = assign(list(self._keys()), {"train": 1 - val_fraction, "val": val_fraction}, seed, self.source)
        return self.select(np.flatnonzero(chosen == 0)), self.select(np.flatnonzero(chosen == 1))

    def fingerprint(self) -> str:
        """16 letters: the same ones, the same names and sizes of files in the same order, wherever they lie."""
        digest = hashlib.sha256()
        for key in self._keys():
            digest.update(key.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.sizes.tobytes())
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """How many images there are, for people."""
        inside = self.offsets >= 0
        shards = len(np.unique(self.rows[inside]))
        text = _counted(len(self), "image")
        if not shards:
            return text
        share = "" if inside.all() else f", {int(inside.sum()):,} of them"
        return f"{text}{share} in {_counted(shards, 'tar shard')}"

    def _keys(self) -> Iterator[str]:
        return (self.prefixes[row] + name for row, name in zip(self.rows, self.names, strict=True))


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def open_pictures(sources: str | Path | Iterable[str | Path]) -> Pictures:
    """List unlabelled images without opening one.

    A source is a folder of images and tar shards in any nesting, an image file, or a shard: an uncompressed tar file
    of images under any names (the layout of WebDataset is one). Hidden files and folders are passed over, other files,
    too; links are followed. The same file reached twice counts once. Empty files, links to nothing, shards
    that are compressed and what lies behind the damage of a damaged shard are left out and counted in `problems`.

    Args:
        sources: one path or several.

    Raises:
        DataError: a source does not exist, is of no known kind, or holds no image; a shard that was named is
            compressed.
        UsageError: no source.
    """
    listed = [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not listed:
        raise UsageError("No images were named", expected="a folder, an image or a tar shard")
    found = _Found(", ".join(map(str, listed[:3])) + (", …" if len(listed) > 3 else ""))
    for source in listed:
        _add(source, found)
    return found.pictures()


class _Member(NamedTuple):
    """A file inside a shard, in bytes."""

    name: str
    offset: int
    size: int


class _Found:
    """The columns of `Pictures` while they grow."""

    def __init__(self, source: str):
        self.source, self.problems = source, Problems()
        self.containers: dict[tuple[Path, str], int] = {}
        self.rows: list[int] = []
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.seen: set[tuple[int, int, int]] = set()
        self.repeated = 0

    def container(self, path: Path, prefix: str = "") -> int:
        """The row of a folder or shard."""
        return self.containers.setdefault((path, prefix), len(self.containers))

    def add(self, row: int, name: str, offset: int, size: int) -> None:
        """One more image."""
        self.rows.append(row)
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def is_new(self, path: str | Path, info: os.stat_result) -> bool:
        """Whether a file or folder is met for the first time, under whatever name."""
        identity = (info.st_dev, info.st_ino, info.st_size if stat.S_ISREG(info.st_mode) else 0)
        if info.st_ino and identity in self.seen:  # some file systems number nothing
            self.problems.add("repeated-path", str(path))
            self.repeated += 1
            return False
        self.seen.add(identity)
        return True

    def pictures(self) -> Pictures:
        """The finished columns."""
        return Pictures(
            tuple(path for path, _ in self.containers),
            tuple(prefix for _, prefix in self.containers),
            np.array(self.rows, np.int32),
            Strings(self.names),
            np.array(self.offsets, np.int64),
            np.array(self.sizes, np.int64),
            self.problems,
            self.source,
        )


def _add(source: Path, found: _Found) -> None:
    """Collect what one source holds."""
    try:
        info = source.stat()
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "There is no such file or folder" if missing else "The path cannot be read"
        raise DataError(what, where=source, got="" if missing else error, remedy="Check the path.") from error
    before, name = len(found.names) + found.repeated, source.name.lower()
    if stat.S_ISDIR(info.st_mode):
        if found.is_new(source, info):
            _add_folder(source, found)
    elif name.endswith(_COMPRESSED_SUFFIXES):
        raise DataError("The tar shard is compressed", where=source, expected="a plain .tar", remedy=_UNPACK)
    elif name.endswith((_SHARD_SUFFIX, *IMAGE_SUFFIXES)):
        _add_file(source.parent, source.name, info, found, named=True)
    else:
        raise DataError(
            "This is neither a folder, nor an image, nor a tar shard",
            where=source,
            expected=f"a folder, or a file that ends in {', '.join((_SHARD_SUFFIX, *IMAGE_SUFFIXES))}",
        )
    if len(found.names) + found.repeated == before:
        raise DataError(
            "There is no image here that can be used",
            where=source,
            got="; ".join(found.problems.lines()),
            expected=f"files that end in {', '.join(IMAGE_SUFFIXES)}, or tar shards of them",
        )


def _add_folder(root: Path, found: _Found) -> None:
    """Collect images and shards below a folder, in the order of `walk_images`."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                listed = sorted(
                    (entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name
                )
        except OSError as error:
            found.problems.add("unreadable-folder", f"{root / prefix}: {error.strerror or error}")
            continue
        inner = []
        for entry in listed:
            name = prefix + entry.name
            wanted = entry.name.lower().endswith((_SHARD_SUFFIX, *IMAGE_SUFFIXES, *_COMPRESSED_SUFFIXES))
            try:
                info = entry.stat() if wanted or entry.is_dir() else None
            except OSError as error:
                found.problems.add("unusable-image", f"{entry.path}: {error.strerror or error}")
                continue
            if info is not None and stat.S_ISDIR(info.st_mode):
                if found.is_new(entry.path, info):
                    inner.append(f"{name}/")
            elif info is not None:
                _add_file(root, name, info, found)
        for path in unread_pictures(entry.path for entry in listed if not _is_hidden(entry.name)):
            found.problems.add("unread-image", path)
        waiting.extend(reversed(inner))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _add_file(root: Path, name: str, info: os.stat_result, found: _Found, *, named: bool = False) -> None:
    """Collect an image or a shard; `named`: the user asked for this very file."""
    path = root / name
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
        reason = "0 bytes" if stat.S_ISREG(info.st_mode) else "no regular file"
        found.problems.add("unusable-image", f"{path}: {reason}")
    elif name.lower().endswith(_COMPRESSED_SUFFIXES):
        found.problems.add("compressed-shard", str(path))
    elif found.is_new(path, info):
        if name.lower().endswith(_SHARD_SUFFIX):
            _add_shard(path, name, found, named=named)
        else:
            found.add(found.container(root), name, -1, info.st_size)


def _add_shard(path: Path, name: str, found: _Found, *, named: bool) -> None:
    """Collect the images of a tar shard."""
    row = found.container(path, f"{name}/")
    met: set[str] = set()
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(_COMPRESSED_HEADS):
                if named:
                    raise DataError("The tar shard is compressed", where=path, expected="a plain .tar", remedy=_UNPACK)
                found.problems.add("compressed-shard", str(path))
                return
            file.seek(0)
            for member in _members(file, path, found.problems):
                if member.name in met:
                    found.problems.add("duplicate-file-name", f"{path}/{member.name}")
                met.add(member.name)
                found.add(row, member.name, member.offset, member.size)
    except OSError as error:
        found.problems.add("damaged-shard", f"{path}: {error.strerror or error}")


def _members(file: BinaryIO, path: Path, problems: Problems) -> Iterator[_Member]:
    """The image files of a tar shard, from its headers; whatever ends the reading early is counted."""
    length, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
                if not 0 <= member.size <= length - member.offset_data or member.offset < end:
                    raise tarfile.ReadError(f"the member {member.name!r} does not lie inside the file")
                end = member.offset_data
                if not _is_image_member(member.name):
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.size == 0:
                    if not member.isdir():
                        reason = "0 bytes" if member.isreg() and member.size == 0 else "no regular file"
                        problems.add("unusable-image", f"{path}/{member.name}: {reason}")
                    continue
                yield _Member(member.name, member.offset_data, member.size)
            file.seek(tar.offset)
    except Exception as error:  # damaged headers raise ReadError, ValueError, RecursionError and others
        problems.add("damaged-shard", f"{path}: {error}")
        return
    place, tail = file.tell(), file.read(_TAIL)
    if len(tail) < tarfile.BLOCKSIZE or any(tail):
        reason = "a header is damaged" if any(tail) else "the end is missing"
        problems.add("damaged-shard", f"{path}: {reason} at byte {place:,}")


def _is_image_member(name: str) -> bool:
    *folders, base = name.split("/")
    return is_image_name(base) and not any(_is_hidden(folder) for folder in folders if folder not in (".", ".."))
