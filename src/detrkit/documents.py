"""Small files that others wrote, read whole: within bounds of size and depth, and nothing but files.

What cannot be read raises `OSError` or `ValueError` and nothing else, whatever the parser raises; callers make of these
an error that says what the file should have been.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

LARGEST = 1 << 28
"""Bytes of the largest file that is read whole; what may be larger is read piece by piece."""

LARGEST_TOML = 1 << 15
"""Bytes of the largest TOML file, whose parser needs seconds for a hundred kilobytes of dots. A recipe has three."""


def opened(path: Path) -> BufferedReader:
    """Open a file to read bytes.

    Raises:
        OSError: it is missing or cannot be read; or it is a folder, or what one would wait for or read without end, as
            a pipe or a device.
        ValueError: no file can have this name.
    """
    kind = os.stat(path).st_mode  # noqa: PTH116 - as that of a `Path`, which some callers do not have
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "It is a pipe or a device and no file", str(path))
    return path.open("rb")


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """The content of a file of at most `limit` bytes; errors as of `opened`, and `ValueError` where it is larger."""
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes, the most that a file of this kind may have")
    return content


def read_text(path: Path, limit: int = LARGEST, *, errors: str = "strict") -> str:
    """The text of a UTF-8 file, with or without a byte order mark; errors as of `read_bytes` where it is not UTF-8."""
    return read_bytes(path, limit).decode("utf-8-sig", errors)


def read_json(path: Path, limit: int = LARGEST) -> Any:
    """What a JSON file holds; errors as of `read_bytes` where it is not JSON, or nested too deeply."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """What JSON says; `ValueError` where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def read_toml(path: Path) -> dict[str, Any]:
    """What a small TOML file holds; errors as of `read_bytes` where it is not TOML, or nested too deeply."""
    text = read_text(path, LARGEST_TOML)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("the TOML is nested too deeply") from error
