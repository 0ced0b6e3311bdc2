"""How things are looked for by example: the options of a search. Importing this is cheap, for the sake of `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detrkit.errors import UsageError


@dataclass(frozen=True)
class Search:
    """How things are looked for."""

    threshold: float = 0.5
    """Least score of what is reported, from 0 to 1."""
    candidates: Literal["", "queries", "windows", "both"] = ""
    """Which places are looked at: those that the detector's queries propose, windows of the examples' sizes everywhere,
    or both. Empty: queries of a model that was trained to find by example, else windows."""
    combine: Literal["mean", "max"] = "mean"
    """How several examples of one thing are taken together: averaged, or each on its own."""
    overlap: float = 0.5
    """A place that overlaps a better one by more than this (IoU) is left out; 1: none is."""
    exclusive: bool = True
    """Where several things are looked for, a place is only that one which it is most like."""
    image_size: int = 0
    """Shorter side at which images are searched, in pixels. 0: the model's own; for windows so large that the smallest
    example is seen in detail, at most 640."""

    def __post_init__(self) -> None:
        for name in ("threshold", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"Bad value for {name}", got=getattr(self, name), expected="between 0 and 1")
        if self.image_size < 0:
            raise UsageError("Bad value for image_size", got=self.image_size, expected="at least 0")
