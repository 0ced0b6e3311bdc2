"""A run folder is one run's at a time: two that write into it would destroy each other's checkpoints."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from detrkit.documents import read_json
from detrkit.errors import UsageError
from detrkit.whole import unwritable

if sys.platform != "win32":
    import fcntl

FILE = "running.json"
"""The file of a run folder that is locked while a run is at work; it says which process that is."""

_held: set[int] = set()
"""Descriptors of the files that this process has locked."""


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a run folder for one run. It is made where there is none, and removed again if nothing came into it.

    The system gives a lock back however its process ends, so what a killed run leaves behind holds nothing; worker
    processes that outlive it do not keep the lock. Windows and file systems without locks have none; there the folder
    is not held.

    Args:
        out: the run folder.

    Raises:
        UsageError: another run is at work in it, of this process or of another.
        Error: the folder cannot be made.
    """
    if sys.platform == "win32":
        yield
        return
    made = list(takewhile(lambda folder: not folder.exists(), (out, *out.parents)))
    file = out / FILE
    try:
        descriptor = _locked(file)
    except OSError as error:
        raise unwritable("run folder", out, error) from error
    try:
        _write_holder(descriptor)
        yield
    finally:
        if descriptor in _held:  # a forked process has let go of it
            with suppress(OSError):
                file.unlink()
            _held.remove(descriptor)
            os.close(descriptor)
            with suppress(OSError):  # as a rule the first is not empty
                for folder in made:
                    folder.rmdir()


def _let_go() -> None:
    """In a forked process: the lock is its parent's, and shall end with it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


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
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                _held.add(descriptor)
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a run that ended, and deleted it, since it was opened here


def _lock(descriptor: int, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            "A run is at work in this folder",
            where=file.parent,
            got=_holder(file),
            remedy="Let it finish, or end it first, as with Ctrl-C; or choose another folder.",
        ) from error
    except OSError:  # a file system without locks
        pass


def _write_holder(descriptor: int) -> None:
    """Say who holds the lock, for people: where the disk is full it holds all the same."""
    about = {"process": os.getpid(), "machine": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())


def _holder(file: Path) -> str:
    """Who holds a lock, as the file says."""
    try:
        about = read_json(file)
        return f"process {int(about['process'])} on {about['machine']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not been written yet
        return "another process"
