"""What happens in a training, as values. Progress bars, log files and trackers are functions of an event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from detrkit.evaluation.run import Metrics


@dataclass(frozen=True)
class Preparing:
    """Something is done once, before the first step: `done` of `total` images."""

    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """The training begins or goes on.

    Attributes:
        step: steps already done.
        total_steps: steps in all.
        steps_per_epoch: steps that see each image once.
        notes: what the user should know: data, splits, weights, problems.
        pending: the evaluation of the last step that was done comes first; the run was stopped in it.
        skipped: steps that were skipped so far.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    notes: tuple[str, ...]
    pending: bool = False
    skipped: int = 0


@dataclass(frozen=True)
class Step:
    """One step of the optimiser.

    Attributes:
        step: steps done, this one included.
        epoch: passes through the data, with a fraction.
        loss: weighted sum of all terms of all layers.
        terms: each term at the last decoder layer, by name, unweighted.
        class_error: share of matched queries of the last layer with the wrong class; NaN where there are no classes.
        lr: learning rate of the optimiser's first group, which is the transformer of a detector.
        grad_norm: norm of the gradient before clipping.
        seconds: since the step before.
        waited: of these, seconds spent waiting for images.
        images: number of images in the step, all processes together.
        replaced: unreadable images that others stood in for.
    """

    step: int
    epoch: float
    loss: float
    terms: dict[str, float]
    class_error: float
    lr: float
    grad_norm: float
    seconds: float
    waited: float
    images: int
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A step changed nothing, because its loss or its gradient was NaN or infinite; it comes in the place of `Step`.

    Attributes:
        step: steps done, this one included.
        images: those that it happened on, as far as it can be told.
        boxes: annotated boxes that are the cause; empty where it cannot be told, or where it is the model.
        in_row: how many of the last steps were skipped.
        skipped: how many were in all.
        replaced: unreadable images that others stood in for.
    """

    step: int
    images: tuple[str, ...]
    boxes: tuple[str, ...]
    in_row: int
    skipped: int
    replaced: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        row = f" ({self.in_row} in a row)" if self.in_row > 1 else ""
        if self.boxes:
            why = f"an annotated box makes the loss NaN or infinite: {'; '.join(self.boxes)}"
        else:
            why = f"the loss or its gradient was NaN or infinite on {', '.join(self.images)}"
        return f"Step {self.step:,} was skipped{row}: {why}"


@dataclass(frozen=True)
class WentBack:
    """Too many steps in a row were skipped: the training goes on from its last checkpoint, at lower rates.

    Attributes:
        step: steps done now, which are those of the checkpoint.
        after: steps that had been done.
        rate: what the recipe's learning rates are multiplied with from now on.
        returns: how often the training went back so far.
        skipped: how many steps were skipped in all.
    """

    step: int
    after: int
    rate: float
    returns: int
    skipped: int

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        return (
            f"After step {self.after:,} the training went back to its checkpoint of step {self.step:,} and goes on at "
            f"{self.rate:g} of the recipe's learning rates, because step after step was NaN or infinite"
        )


@dataclass(frozen=True)
class Warned:
    """Something is wrong with the training, or the files of the run; each alarm is raised once until it clears.

    Attributes:
        step: steps done.
        alarm: its name.
        message: what is wrong, in a sentence.
        remedy: what to do.
        cleared: it is over; `message` says so.
    """

    step: int
    alarm: str
    message: str
    remedy: str = ""
    cleared: bool = False


@dataclass(frozen=True)
class Evaluated:
    """The validation split was evaluated.

    Attributes:
        step: steps done.
        epoch: passes through the data.
        figures: all of them by name; NaN where undefined.
        headline: the names of those that are worth showing, the first ones first; what could not be told is no figure.
        seconds: that it took.
        is_best: no evaluation before was as good, by the figure that the task chooses by; for a detector AP.
        metrics: all tables, where a detector was trained.
        notes: what the user should know at once.
        conclusion: what it comes to so far, in plain sentences; empty where the figures speak for themselves.
    """

    step: int
    epoch: float
    figures: dict[str, float]
    headline: tuple[str, ...]
    seconds: float
    is_best: bool
    metrics: Metrics | None = None
    notes: tuple[str, ...] = ()
    conclusion: str = ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written to `path`, from which the run can go on at `step`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """The training ended: `reason` is `finished`, or `interrupted` where a signal ended it after all was saved.

    One that is ended at once, or that fails, ends with the exception instead.
    """

    step: int
    reason: str


Event = Preparing | Started | Step | Skipped | WentBack | Warned | Evaluated | Saved | Stopped
