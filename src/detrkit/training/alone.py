"""A run folder is one process's at a time: two that write into it would destroy each other's checkpoints."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from detrkit.documents import read_json
from detrkit.errors import UsageError
from detrkit.whole import unwritable

if sys.platform != "win32":
    import fcntl

FILE = "running.json"
"""The file of a run folder that is locked while a run is at work; it says which process that is."""

_TAKEN = {errno.EACCES, errno.EAGAIN}


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a run folder for this process. It is made where there is none, and removed again if nothing came into it.

    The system gives a lock back however its process ends, so what a killed run leaves behind holds nothing. The lock
    is of the kind that belongs to a process: worker processes that outlive a killed one do not keep it, and one
    training after another in the same process never meets its own. Windows and file systems without locks have none;
    there the folder is not held.

    Args:
        out: the run folder.

    Raises:
        UsageError: another process trains in it.
        Error: the folder cannot be made or written.
    """
    is_new = not out.exists()
    file = out / FILE
    try:
        descriptor = _locked(file)
        about = {"process": os.getpid(), "machine": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
    except OSError as error:
        raise unwritable("run folder", out, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # as a rule it is not empty
                out.rmdir()


def _locked(file: Path) -> int:
    """Open and lock a file, which is made where there is none."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that failed has just removed its folder
            continue
        try:
            _lock(descriptor, file)
            if sys.platform == "win32" or os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a run that ended, and deleted it, since it was opened here


def _lock(descriptor: int, file: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise UsageError(
                "A run is at work in this folder",
                where=file.parent,
                got=_holder(file),
                remedy="Let it finish, or end it first, as with Ctrl-C; or choose another folder.",
            ) from error


def _holder(file: Path) -> str:
    """Who holds a lock, as the file says."""
    try:
        about = read_json(file)
        return f"process {int(about['process'])} on {about['machine']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not been written yet
        return "another process"
