"""Files and folders that are written whole or not at all, and checksums that tell when one was damaged later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from detrkit.documents import opened, read_json
from detrkit.errors import Error

CHECKSUMS = "checksums.json"
"""The file of a folder that holds the size and the checksum of every other one."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"(?:os error |code: )(\d+)")
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
_BLOCK = 1 << 20


def write_whole(
    folder: Path, write: Callable[[Path], None], *, keep: Path | None = None, checksums: bool = False
) -> None:
    """Fill a folder so that whoever reads it sees all of it or none.

    It is written beside its place, flushed to disk, and renamed; what stood there is moved away first and deleted last.
    Folders cannot be exchanged in one stroke: whoever is stopped between the two renames leaves the new one, complete,
    where `standing` finds it.

    Args:
        folder: the folder to make.
        write: fills the folder that it is given with files.
        keep: where what stood there before goes, instead of being deleted.
        checksums: also write the size and the checksum of every file, for `damage`.

    Raises:
        Error: the disk is full or cannot be written; what stood there still stands.
    """
    fresh, old = _beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if standing(folder) == fresh:
            fresh.rename(folder)
        _put_away(old, keep)  # where the writer before was stopped
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        write(fresh)
        if checksums:
            sums = {file.name: _checksum(file) for file in sorted(fresh.iterdir())}
            (fresh / CHECKSUMS).write_text(json.dumps({"crc32": sums}, indent=1), encoding="utf-8")
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner can read
            _flush(file)
        _flush(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        if folder.exists():
            shutil.rmtree(fresh, ignore_errors=True)
        raise unwritable("folder", folder, error) from error
    _put_away(old, keep)


def standing(folder: Path) -> Path:
    """Where the content of a folder of `write_whole` stands: in its place, or beside it if a writer was stopped just
    between taking the old one away and putting the new one there.
    """
    fresh, old = _beside(folder)
    # The old one is moved away only when the new one is complete.
    return fresh if not folder.exists() and old.exists() and fresh.exists() else folder


def kept(folder: Path, keep: Path) -> Path:
    """Where what stood in a folder before stands: in `keep`, or beside the folder if its writer was stopped before it
    was put there. It need not exist.
    """
    old = _beside(folder)[1]
    return old if old.exists() else keep


def damage(folder: Path) -> str:
    """What is wrong with a folder by its checksums: names the first such file; empty where nothing is.

    A folder without checksums, such as one of an earlier version, cannot be judged and is not damaged.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return ""
    try:
        sums = read_json(file)["crc32"]
        expected = {str(name): (int(size), str(checksum)) for name, (size, checksum) in sums.items()}
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__})"
    for name, (size, checksum) in expected.items():
        try:
            found = _checksum(folder / Path(name).name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found[0] != size:
            return f"{name} has {found[0]:,} bytes instead of {size:,}"
        if found[1] != checksum:
            return f"the content of {name} has changed (checksum {found[1]} instead of {checksum})"
    return ""


def write_text_whole(file: Path, text: str, *, flush: bool = True) -> None:
    """Replace a small file so that a reader never sees half of it.

    Args:
        file: what is replaced.
        text: what it holds then.
        flush: wait until the disk has it, which may take a tenth of a second; not for what is soon written anew.

    Raises:
        Error: the disk is full or cannot be written; what stood there still stands.
    """
    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        if flush:
            _flush(fresh)
        fresh.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise unwritable("file", file, error) from error


@contextlib.contextmanager
def or_nothing(folder: Path) -> Iterator[None]:
    """Fill a folder that was empty, and remove it if that fails: half of a data set would pass for one.

    Args:
        folder: made or empty when this is entered. What is in it are links and copies, and nothing that is missed.

    Raises:
        Error: the disk is full or cannot be written.
    """
    try:
        yield
    except BaseException as error:  # an interruption, too
        shutil.rmtree(folder.resolve(), ignore_errors=True)  # of a link, what it leads to
        if isinstance(error, OSError):
            raise unwritable("folder", folder, error) from error
        raise


def append_line(file: Path, line: str) -> None:
    """Add a line to a file, or nothing of it.

    Raises:
        Error: the disk is full or cannot be written; the lines before are whole.
    """
    try:
        with file.open("ab", buffering=0) as stream:
            before, content = stream.tell(), f"{line}\n".encode()
            try:
                if stream.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    stream.truncate(before)
                raise
    except OSError as error:
        raise unwritable("file", file, error) from error


def unwritable(kind: str, place: Path, error: Exception) -> Error:
    """The error that says what could not be written.

    Args:
        kind: what it is, such as a file.
        place: where it is.
        error: what writing it raised.
    """
    remedy = how_to_make_room(error) or "See that its folder is there and may be written to, or write to another place."
    return Error(f"The {kind} cannot be written", where=place, got=error, remedy=remedy)


def how_to_make_room(error: Exception) -> str:
    """What to do about an error of writing that comes of a full disk or a quota; empty where it comes of anything else.

    Args:
        error: an `OSError`, or what safetensors makes of one.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (said := _OS_ERROR.search(str(error))):
        number = int(said[1])
    return "Make room on the disk, or write to another place." if number in _FULL else ""


def _put_away(old: Path, keep: Path | None) -> None:
    """Delete what stood in a folder, or put it where it is kept."""
    if keep is not None and old.exists():
        shutil.rmtree(keep, ignore_errors=True)
        with contextlib.suppress(OSError):  # the new one stands, which matters more
            old.rename(keep)
            return
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a folder is written, and where the one before it is moved to."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _checksum(file: Path) -> tuple[int, str]:
    """Size and CRC-32 of a file: against accidents, not against malice, and twice as fast as the next best here."""
    size, checksum, block = 0, 0, memoryview(bytearray(_BLOCK))
    with opened(file) as stream:
        while count := stream.readinto(block):
            size, checksum = size + count, zlib.crc32(block[:count], checksum)
    return size, f"{checksum:08x}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot flush a folder; a full one may say so only now
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)
