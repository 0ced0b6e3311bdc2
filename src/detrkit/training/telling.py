"""What a training says in words, from its events; and where nobody listens, through Python's own logging."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detrkit.training.events import Evaluated, Event, Preparing, Skipped, Started, Step, Warned, WentBack

LOGGER = logging.getLogger("detrkit")


class News:
    """What evaluations have to say, each thing when it arises and not again while it lasts."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, event: Evaluated) -> list[str]:
        """The notes that the evaluation before did not have; what stands after a colon are figures."""
        subjects = {note.partition(":")[0]: note for note in event.notes}
        fresh = [note for subject, note in subjects.items() if subject not in self._known]
        self._known = set(subjects)
        return fresh


class Complaints:
    """What went wrong without ending the training, or is over; an image that cannot be read is named once."""

    def __init__(self) -> None:
        self._unreadable: set[str] = set()

    def __call__(self, event: Step | Skipped | WentBack | Warned) -> list[str]:
        """What is to be said of an event."""
        if isinstance(event, Step):
            failures = dict.fromkeys(failure for places in event.replaced for failure in places.split(" | "))
            fresh = [failure for failure in failures if failure not in self._unreadable]
            self._unreadable.update(fresh)
            return [f"Another image stands in for one that cannot be read: {failure}" for failure in fresh]
        if isinstance(event, Warned):
            message = event.message.rstrip(".")
            return [message] if event.cleared else [f"Warning, step {event.step:,}: {message}. {event.remedy}".rstrip()]
        return [event.message]


def preparation(event: Preparing) -> str:
    """How far it is with what is done once."""
    return f"Every image goes through the backbone once: {event.done:,} of {event.total:,}"


def opening(event: Started) -> list[str]:
    """What is said before the first step."""
    lines = list(event.notes)
    steps = f"{event.total_steps:,} steps, {event.steps_per_epoch:,} an epoch"
    if not event.step:
        return [*lines, f"Training for {steps}"]
    if event.step == event.total_steps and not event.pending:
        return [*lines, f"This training has taken all its steps: {steps}"]
    return [*lines, f"Going on at step {event.step:,} of {steps}"]


class Logged:
    """Tells a training to Python's logging, as `detrkit`: what is wrong as warnings, the rest as information.

    Warnings reach standard error where a program has set up nothing; `logging.basicConfig(level=logging.INFO)` shows
    the rest.

    Args:
        splits: what `Session.describe` says of each split.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Any]]):
        self._splits, self._news, self._complaints = splits, News(), Complaints()

    def __call__(self, event: Event) -> None:
        """Tell what happened."""
        if isinstance(event, Started):
            for line in opening(event):
                LOGGER.info("%s", line)
            for name, split in self._splits.items():
                if found := split.get("problems"):
                    listed = ", ".join(f"{count:,} × {kind}" for kind, count in found.items())
                    LOGGER.warning("Problems of the %s images, which data.json of the run counts: %s", name, listed)
        elif isinstance(event, Step | Skipped | WentBack | Warned):
            level = logging.INFO if isinstance(event, Warned) and event.cleared else logging.WARNING
            for line in self._complaints(event):
                LOGGER.log(level, "%s", line)
        elif isinstance(event, Evaluated):
            known = [name for name in event.headline if name in event.figures]
            figures = ", ".join(f"{name} {event.figures[name]:.3f}" for name in known)
            LOGGER.info("epoch %g: %s%s", event.epoch, figures, ", best so far" if event.is_best else "")
            for line in self._news(event):
                LOGGER.warning("%s", line)
