"""Errors that say what is wrong, where, what was expected, and what to do about it.

Every error that a user can cause is an `Error`, and so a `ValueError`. The class says whose fault it is, and the
command line turns the class into an exit code.
"""

from __future__ import annotations


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
        self.what, self.where, self.got = what, str(where), str(got)
        self.expected, self.remedy = str(expected), remedy
        parts = [f"{where}: {what}" if str(where) else what]
        if str(got):
            parts.append(f"got {got}")
        if str(expected):
            parts.append(f"expected {expected}")
        message = "; ".join(parts)
        super().__init__(f"{message}. {remedy}" if remedy else message)


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
