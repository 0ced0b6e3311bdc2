"""Where a command's words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 20.0
"""Time between lines of progress where nothing can be redrawn."""


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say in the end.

    Attributes:
        document: the results, as `--json` prints them; None where they were printed already.
        text: the same for people.
        exit_code: 0, unless something is to be noticed.
    """

    document: Mapping[str, Any] | None = None
    text: str = ""
    exit_code: int = 0


class Terminal:
    """Standard output and standard error, as they are when this is made.

    Args:
        json: print the outcome's document and no other results.
        clock: seconds, from any moment on.
    """

    def __init__(self, *, json: bool = False, clock: Callable[[], float] = time.monotonic):
        self.json, self.clock = json, clock
        self.out, self.err = _tolerant(sys.stdout), _tolerant(sys.stderr)
        # Of several processes that train together, the first one talks.
        self.silent = os.environ.get("RANK", "0") != "0"
        self._console: Console | None = None
        self._has_bar = False

    @property
    def console(self) -> Console:
        """Standard error, for what is drawn."""
        from rich.console import Console

        if self._console is None:
            self._console = Console(file=self.err, highlight=False, markup=False, emoji=False, quiet=self.silent)
        return self._console

    @property
    def is_live(self) -> bool:
        """Whether standard error can be redrawn: a terminal, and no log of a build server."""
        return self.err.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI") and not self.silent

    def result(self, text: str) -> None:
        """A line of results; not under `--json`. Names of files and classes may be anything, and are made harmless."""
        if not self.json and not self.silent:
            self._say(text, self.out)

    def note(self, text: str) -> None:
        """A line for people, on standard error."""
        if not self.silent:
            self._say(text, self.err)

    def _say(self, text: str, stream: Any) -> None:
        if self._has_bar and stream.isatty():  # the screen that the bar is drawn on, which makes room above it
            self.console.print(printable(text), soft_wrap=True)
        else:
            print(printable(text), file=stream, flush=True)

    def finish(self, outcome: Outcome) -> None:
        """Print what a verb has to say in the end."""
        if self.json and outcome.document is not None and not self.silent:
            print(json.dumps(plain(outcome.document), indent=1, allow_nan=False), file=self.out, flush=True)
        elif outcome.text:
            self.result(outcome.text)

    def fail(self, message: str, kind: str, exit_code: int, **parts: str) -> int:
        """Say what went wrong; returns the exit code."""
        print(f"detrkit: {message}", file=self.err, flush=True)
        said = {name: value for name, value in parts.items() if value}
        try:
            self.finish(Outcome({"error": {"kind": kind, "message": message, "exit_code": exit_code, **said}}))
        except OSError:  # it may be what has failed already
            self.give_up_results()
        return exit_code

    def give_up_results(self) -> None:
        """Take no more results: Python would complain of a standard output that cannot be written when it closes it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())

    @contextmanager
    def counting(self, total: int, what: str) -> Iterator[Callable[[], None]]:
        """Show how far a loop of `total` rounds is; gives the function to call after each."""
        if not self.is_live:
            yield _PlainCounter(self, total, what).tick
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            self._has_bar = True
            try:
                yield lambda: progress.advance(task)
            finally:
                self._has_bar = False


class _PlainCounter:
    """A line now and then."""

    def __init__(self, terminal: Terminal, total: int, what: str):
        self.terminal, self.total, self.what = terminal, total, what
        self.done, self.said = 0, terminal.clock()

    def tick(self) -> None:
        self.done += 1
        if (now := self.terminal.clock()) - self.said >= PLAIN_SECONDS:
            self.said = now
            self.terminal.note(f"{self.what}: {self.done:,} of {self.total:,}")


def table(rows: Sequence[Sequence[str]], alignment: str = "") -> str:
    """Rows as aligned columns.

    Args:
        rows: cells, the same number in each row; the first row is the heading.
        alignment: a letter for each column, `l` or `r`; the first to the left and all others to the right where empty.
    """
    alignment = alignment or "l" + "r" * (len(rows[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["─" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(cells, widths, alignment, strict=True)
        ).rstrip()
        for cells in ruled
    )


def share(value: float) -> str:
    """A figure in [0, 1] with three digits; a dash where it is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def duration(seconds: float) -> str:
    """A time for people: 8 s, 3:05 min, 2:10:00 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def count(number: int, noun: str, plural: str = "") -> str:
    """1 image, 2 images."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def plain(value: Any) -> Any:
    """The same as what JSON can hold: undefined figures are null, paths are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.as_posix() if isinstance(value, Path) else value


def shell(word: str | Path) -> str:
    """A path as it can be typed after a prompt."""
    import shlex

    return shlex.quote(str(word))


def _tolerant(stream: Any) -> Any:
    """A stream that prints file names which are no text in its encoding with escapes, rather than fail."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream
