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
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    notes: tuple[str, ...]
    pending: bool = False


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
class Evaluated:
    """The validation split was evaluated.

    Attributes:
        step: steps done.
        epoch: passes through the data.
        figures: all of them by name; NaN where undefined.
        headline: the names of those that are worth showing, the first ones first.
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
    """The training ended: `reason` is `finished`. One that is interrupted ends with the exception instead."""

    step: int
    reason: str


Event = Preparing | Started | Step | Evaluated | Saved | Stopped
