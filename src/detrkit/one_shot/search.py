"""How things are looked for by example: the options of a search. Importing this is cheap, for the sake of `--help`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from detrkit.errors import UsageError, plain

Candidates = Literal["", "queries", "windows", "both"]
Combine = Literal["mean", "max"]


@dataclass(frozen=True)
class Search:
    """How things are looked for."""

    threshold: float = 0.5
    """Least score of what is reported, from 0 to 1."""
    candidates: Candidates = ""
    """Which places are looked at: those that the detector's queries propose, windows of the examples' sizes everywhere,
    or both. Empty: queries of a model that was trained to find by example, else windows."""
    combine: Combine = "mean"
    """How several examples of one thing are taken together: averaged; or their features pooled by maximum for the
    queries, and each compared on its own, the most alike counting."""
    overlap: float = 0.5
    """A place that overlaps a better one by more than this (IoU) is left out; 1: none is."""
    exclusive: bool = True
    """Where several things are looked for, a place is only that one which it is most like."""
    image_size: int = 0
    """Shorter side at which images are searched, in pixels. 0: the model's own; for windows so large that the smallest
    example is seen in detail, at most 640."""

    def __post_init__(self) -> None:
        for name in ("threshold", "overlap"):
            value = plain(getattr(self, name))
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"Bad value for {name}", got=repr(value), expected="a number between 0 and 1")
        if not isinstance(plain(self.image_size), int) or self.image_size < 0:
            raise UsageError("Bad value for image_size", got=repr(self.image_size), expected="a number of pixels, or 0")
        for name, known in (("candidates", get_args(Candidates)), ("combine", get_args(Combine))):
            if (value := getattr(self, name)) not in known:
                close = difflib.get_close_matches(str(value), known, 1)
                remedy = f"Did you mean {close[0]!r}?" if close else ""
                raise UsageError(f"Bad value for {name}", got=repr(value), expected=f"one of {known}", remedy=remedy)
