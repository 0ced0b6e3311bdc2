"""Errors that say what is wrong, where, what was expected, and what to do about it.

Every error that a user can cause is an `Error`, and so a `ValueError`. The class says whose fault it is, and the
command line turns the class into an exit code.
"""

from __future__ import annotations

from typing import Any

LONGEST_TEXT = 1000
"""Characters of a part of a message: what stands in a damaged file may have a million."""


def printable(text: str) -> str:
    """A text without what could command a terminal or reverse what is read: such characters become escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


def brief(value: object, longest: int = LONGEST_TEXT) -> str:
    """A value of a file as a short text, however large or deep it is."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):  # deeper than Python walks, or a number of more digits than it prints
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def plain(value: Any) -> Any:
    """A number of NumPy as Python's own, which says and means the same; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


class Error(ValueError):
    """A problem that the caller can mend.

    Args:
        what: one sentence that states the problem.
        where: the file, field, image or flag that it is about.
        got: what was found there.
        expected: what should have been there.
        remedy: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", got: object = "", expected: object = "", remedy: str = ""):
        self.what, self.where, self.got, self.expected = map(_part, (what, where, got, expected))
        self.remedy = remedy
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.got:
            parts.append(f"got {self.got}")
        if self.expected:
            parts.append(f"expected {self.expected}")
        message = "; ".join(parts)
        super().__init__(printable(f"{message}. {remedy}" if remedy else message))

    @property
    def cause(self) -> str:
        """What is wrong and what to do, without the place, for lists of places."""
        said = f"{self.what} ({self.got})" if self.got else self.what
        return f"{said}. {self.remedy}" if self.remedy else said


def _part(value: object) -> str:
    """A part of a message, not too long."""
    return brief(value if isinstance(value, dict | list | tuple | int | float) else str(value))


class UsageError(Error):
    """A flag, a recipe field or an argument that makes no sense."""

    exit_code = 2


class DataError(Error):
    """An image, an annotation or a data set that cannot be used."""

    exit_code = 3


class ModelError(Error):
    """A checkpoint, a weight file or an architecture that cannot be used."""

    exit_code = 4


class MissingExtraError(Error):
    """An optional package that is not installed."""

    exit_code = 2

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            remedy=f"Install it with: pip install 'detrkit[{extra}]'",
        )
