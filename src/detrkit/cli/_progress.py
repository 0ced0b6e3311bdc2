"""What is shown while a training runs: functions of its events."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from detrkit.cli._terminal import PLAIN_SECONDS, Terminal, duration, share

if TYPE_CHECKING:
    from rich.console import RenderableType

    from detrkit.training.events import Evaluated, Event, Started, Step

RECENT = 50
"""Steps over which live figures are averaged."""


class Listener(Protocol):
    """What `detrkit.train` calls with every event."""

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        ...


@contextmanager
def training_progress(terminal: Terminal, evaluate_every: int) -> Iterator[Listener]:
    """Show a training on standard error: a bar with live figures on a terminal, else a line now and then.

    Args:
        terminal: where to.
        evaluate_every: epochs between evaluations.
    """
    if not terminal.is_live:
        yield PlainProgress(terminal)
        return
    with LiveProgress(terminal, evaluate_every) as progress:
        yield progress


class Pace:
    """How fast a training is, and what its last steps were like.

    Args:
        terminal: whose clock counts.
    """

    def __init__(self, terminal: Terminal):
        self._clock = terminal.clock
        self._recent: deque[Step] = deque(maxlen=RECENT)
        self._began, self._first = terminal.clock(), 0
        self.step, self.total, self.per_epoch = 0, 1, 1

    def start(self, event: Started) -> None:
        """Count from here."""
        self._began, self._first = self._clock(), event.step
        self.step, self.total, self.per_epoch = event.step, event.total_steps, event.steps_per_epoch

    def add(self, event: Step) -> None:
        """Take one step into account."""
        self.step = event.step
        self._recent.append(event)

    @property
    def epochs(self) -> int:
        """Passes through the data, in all."""
        return round(self.total / self.per_epoch)

    @property
    def left(self) -> float:
        """Seconds until the end, evaluations included, if it goes on like this."""
        done = self.step - self._first
        return (self._clock() - self._began) / done * (self.total - self.step) if done else 0.0

    def figures(self) -> list[str]:
        """Means over the last steps: losses, class error, learning rate, speed, share of the time without images."""
        steps = len(self._recent)
        if not steps:
            return []
        last = self._recent[-1]
        seconds = max(sum(step.seconds for step in self._recent), 1e-9)
        terms = {name: sum(step.terms[name] for step in self._recent) / steps for name in last.terms}
        class_error = sum(step.class_error for step in self._recent) / steps
        return [
            f"loss {sum(step.loss for step in self._recent) / steps:.3f}",
            *(f"{name} {value:.3f}" for name, value in terms.items()),
            *([] if math.isnan(class_error) else [f"class error {class_error:.0%}"]),
            f"lr {last.lr:.2g}",
            f"{sum(step.images for step in self._recent) / seconds:.1f} images/s",
            f"waiting {sum(step.waited for step in self._recent) / seconds:.0%}",
        ]


class PlainProgress:
    """Lines without any control codes, for files and build servers.

    Args:
        terminal: where to.
    """

    def __init__(self, terminal: Terminal):
        from detrkit.training.telling import Complaints, News

        self.terminal, self.pace, self._news, self._complaints = terminal, Pace(terminal), News(), Complaints()
        self._said = terminal.clock()

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        from detrkit.training.events import Evaluated, Preparing, Skipped, Started, Step, Warned, WentBack
        from detrkit.training.telling import opening, preparation

        if isinstance(event, Preparing):
            if event.done == event.total or self.terminal.clock() - self._said >= PLAIN_SECONDS:
                self._said = self.terminal.clock()
                self.terminal.note(preparation(event))
        elif isinstance(event, Started):
            self.pace.start(event)
            for line in opening(event):
                self.terminal.note(line)
        elif isinstance(event, Step):
            self.pace.add(event)
            for line in self._complaints(event):
                self.terminal.note(line)
            if self.terminal.clock() - self._said >= PLAIN_SECONDS:
                self._said = self.terminal.clock()
                place = f"epoch {event.epoch:.2f} of {self.pace.epochs}, step {event.step:,} of {self.pace.total:,}"
                left = f"{duration(self.pace.left)} left"
                self.terminal.note(", ".join([place, left, *self.pace.figures()]))
        elif isinstance(event, Skipped | WentBack | Warned):
            for line in self._complaints(event):
                self.terminal.note(line)
        elif isinstance(event, Evaluated):
            figures = ", ".join(f"{name} {share(event.figures.get(name, math.nan))}" for name in event.headline)
            best = ", best so far" if event.is_best else ""
            self.terminal.note(f"epoch {event.epoch:g} evaluated in {duration(event.seconds)}: {figures}{best}")
            for line in self._news(event):
                self.terminal.note(line)


class LiveProgress:
    """A bar, live figures below it, and above it a table that grows by a line with each evaluation.

    Args:
        terminal: where to.
        evaluate_every: epochs between evaluations.
    """

    def __init__(self, terminal: Terminal, evaluate_every: int):
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        from detrkit.training.telling import Complaints, News

        self.terminal, self.pace, self.evaluate_every = terminal, Pace(terminal), evaluate_every
        self._news, self._complaints = News(), Complaints()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[place]}", style="dim", markup=False),
        )
        self._task = self._bar.add_task("preparing", total=None, place="")
        self._figures = ""
        self._has_heading = False
        console = terminal.console
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        from detrkit.training.events import Evaluated, Preparing, Skipped, Started, Step, Warned, WentBack
        from detrkit.training.telling import opening, preparation

        if isinstance(event, Preparing):
            self._bar.update(self._task, total=event.total, completed=event.done, description=preparation(event))
        elif isinstance(event, Started):
            self.pace.start(event)
            for line in opening(event):
                self.terminal.console.print(line)
            self._bar.update(self._task, total=event.total_steps, completed=event.step, description="starting")
        elif isinstance(event, Step):
            for line in self._complaints(event):
                self.terminal.console.print(line, style="yellow")
            self._show(event)
        elif isinstance(event, Skipped | WentBack | Warned):
            for line in self._complaints(event):
                self.terminal.console.print(line, style="yellow")
        elif isinstance(event, Evaluated):
            self._add_line(event)

    def _show(self, event: Step) -> None:
        self.pace.add(event)
        self._figures = " · ".join(self.pace.figures())
        done = event.step // self.pace.per_epoch
        at_end = event.step % self.pace.per_epoch == 0
        evaluating = at_end and (done % self.evaluate_every == 0 or event.step == self.pace.total)
        epoch = done if at_end else done + 1
        place = f"step {event.step:,}/{self.pace.total:,} · {duration(self.pace.left)} left"
        description = f"epoch {epoch}/{self.pace.epochs}"
        if evaluating:
            description += " evaluating"
        self._bar.update(self._task, completed=event.step, description=description, place=place)

    def _add_line(self, event: Evaluated) -> None:
        from rich.text import Text

        if not self._has_heading:
            heading = _columns(["epoch", *event.headline, "time"], event.headline)
            self.terminal.console.print(heading, style="bold")
            self._has_heading = True
        cells = [
            f"{event.epoch:g}",
            *(share(event.figures.get(name, math.nan)) for name in event.headline),
            duration(event.seconds),
        ]
        line = Text(_columns(cells, event.headline))
        if event.is_best:
            line.append("  ★ best so far", style="green")
        self.terminal.console.print(line)
        for note in self._news(event):
            self.terminal.console.print(note, style="yellow")
        self._bar.update(self._task, description=f"epoch {event.epoch:g}/{self.pace.epochs}")

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(self._bar, Text(self._figures, style="dim"))


def _columns(cells: list[str], headline: tuple[str, ...]) -> str:
    """A line of the table of evaluations: the epoch, the figures of the headline, the time."""
    widths = (8, *(max(8, len(name) + 2) for name in headline), 11)
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def how_to_go_on(out: Path, command: str) -> str:
    """What to say when a training was interrupted, by what the run folder says of it.

    Args:
        out: the run folder.
        command: the command line that goes on with it.
    """
    from detrkit.documents import read_json
    from detrkit.training.recovery import has_checkpoint

    if not has_checkpoint(out):
        return "Interrupted before the first checkpoint; there is nothing to go on from."
    try:
        status = read_json(out / "status.json")
        step, saved, total = int(status["step"]), int(status["saved"]), int(status["total_steps"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return f"Interrupted. Go on from the last checkpoint with: {command}"
    if step == saved:
        return f"Stopped after step {step:,} of {total:,}, and saved: nothing is lost. Go on with: {command}"
    return f"Interrupted at step {step:,} of {total:,}. Go on from the checkpoint of step {saved:,} with: {command}"
