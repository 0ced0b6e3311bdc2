"""Where a training stands, how that is saved, and how it goes on from there: after an interruption, or after a failure.

Three checkpoints lie in a run's `checkpoints`: `last`, written at the end of an epoch where the recipe says so;
`previous`, which stood there before; and `within`, which the clock or an interruption wrote at some step since. A run
goes on from the newest. What changes results, such as going back, uses `last` alone, where the clock has no say.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detrkit.checkpoint import LAST, PREVIOUS, WITHIN, TrainingState, load_training
from detrkit.convert import load_strictly
from detrkit.documents import read_json
from detrkit.errors import ModelError, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.training.events import Saved
from detrkit.training.guard import Guard
from detrkit.training.session import Session
from detrkit.whole import damage, kept, standing

DAMAGED = "damaged"
"""The folder to which a checkpoint is moved that cannot be used."""

LARGEST_SHARE = 0.01
"""The most of a training's time that checkpoints by the clock may take: where they are slow, they come less often."""

MOST_RETURNS = 5
"""How often a training goes back to a checkpoint before it is given up."""


class Position(NamedTuple):
    """How far a training is.

    `step`: steps done. `best`: the best score of an evaluation so far, more is better; None before the first.
    `pending`: the evaluation of this step is still to come. `skipped`: steps so far that changed nothing, because
    something was not finite; `in_row`: how many of them were the last ones. `rate`: what the recipe's rates are
    multiplied with; below 1 once the training had to go back to a checkpoint, as it did `returns` times.
    """

    step: int = 0
    best: float | None = None
    pending: bool = False
    skipped: int = 0
    in_row: int = 0
    rate: float = 1.0
    returns: int = 0

    def after(self, *, skipped: bool = False) -> Position:
        """The position after one step more."""
        count = int(skipped)
        in_row = self.in_row + 1 if skipped else 0
        return self._replace(step=self.step + 1, pending=False, skipped=self.skipped + count, in_row=in_row)


class Checkpoints:
    """The checkpoints of a run: written, found again, and read.

    Args:
        session: what trains.
        scaler: of its gradients.
        out: the run folder.
        guard: watches the training, and remembers what it saw.
    """

    def __init__(self, session: Session[Any], scaler: torch.amp.GradScaler, out: Path, guard: Guard):
        self.session, self.scaler, self.out, self.guard = session, scaler, out, guard
        self.folder = out / "checkpoints"
        self._saved, self._cost = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether the clock asks for a checkpoint: by the recipe's minutes, but not more often than saving is cheap."""
        seconds = 60 * self.session.run.save_minutes
        return seconds > 0 and time.monotonic() - self._saved >= max(seconds, self._cost / LARGEST_SHARE)

    def save(self, position: Position, *, within: bool = False) -> Saved:
        """Write the checkpoint that a run goes on from.

        Args:
            position: where the training stands.
            within: it comes by the clock or by an interruption, not where the recipe asks for it.

        Raises:
            Error: the disk is full or cannot be written; the checkpoints before still stand.
        """
        started, session = time.monotonic(), self.session
        path = self.folder / (WITHIN if within else LAST)
        if session.world.is_main:
            tensors = {"optimizer": _optimizer_tensors(session.optimizer)}
            if session.average is not None:
                tensors["average"] = session.average.tensors()
            about = {
                **position._asdict(),
                "average_steps": session.average.steps if session.average else 0,
                "scaler": self.scaler.state_dict(),
                "processes": session.world.size,
                "guard": self.guard.state(),
            }
            session.save_training(path, TrainingState(tensors, about))
            if not within:
                shutil.rmtree(self.folder / WITHIN, ignore_errors=True)
        self._saved = time.monotonic()
        self._cost = self._saved - started
        return Saved(position.step, path)

    def newest(self) -> tuple[Path | None, tuple[str, ...]]:
        """The newest checkpoint that is not damaged, and a note for each that is; None where there is none at all.

        A damaged one is moved to `damaged`. Going on from an older one repeats steps and changes no result.

        Raises:
            ModelError: there are checkpoints, and all are damaged; names each.
        """
        found = newest(self.out) if self.session.world.is_main else None
        shared: tuple[Path | None, tuple[str, ...]] = self.session.world.share(found)
        return shared

    def restore(self, folder: Path) -> Position:
        """Bring the session to where a checkpoint stands.

        Raises:
            ModelError: the checkpoint is missing or damaged, or belongs to another model.
            UsageError: it was written by another number of processes, for which a step means other images.
        """
        session, state = self.session, load_training(folder)
        if (processes := state.position.get("processes")) != session.world.size:
            raise UsageError(
                "The run was begun with another number of processes",
                where=folder,
                got=session.world.size,
                expected=processes,
                remedy="Start as many, or begin a new run with --init.",
            )
        session.fill(folder)
        try:
            _restore_optimizer(session.optimizer, state.tensors["optimizer"])
            if session.average is not None:
                load_strictly(session.average.model, state.tensors["average"])
                session.average.steps = int(state.position["average_steps"])
            if state.position["scaler"]:
                self.scaler.load_state_dict(state.position["scaler"])
            if "guard" in state.position:
                self.guard.restore(state.position["guard"])
            return _position(state.position)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                "The checkpoint does not fit this training",
                where=folder,
                got=error,
                remedy="Begin a new run with --init.",
            ) from error

    def go_back(self, position: Position, error: NonFiniteError) -> Position:
        """Bring the session back to its last checkpoint, and go on at half the rates.

        Of the checkpoints only that counts which the recipe asked for: where the clock wrote one must change no result.

        Args:
            position: where the training stands.
            error: why it cannot go on there.

        Raises:
            NonFiniteError: there is none yet, going back did not help, or the recipe allows no step to be skipped.
        """
        last = standing(self.folder / LAST)
        source = last if last.exists() else kept(last, self.folder / PREVIOUS)
        most = MOST_RETURNS if self.session.optimization.skip_limit else 0
        if position.returns >= most or not source.exists():
            tried = f", although the rates were halved {position.returns} times" if position.returns else ""
            row = f"{position.in_row} steps in a row, up to " if position.in_row > 1 else ""
            got = f"{row}step {position.step:,}{tried}"
            raise NonFiniteError(error.images, error.boxes, got) from error
        before = self.restore(source)
        self.session.world.share(None)  # before the main process replaces what the others may still be reading
        back = position._replace(step=before.step, in_row=0, rate=position.rate / 2, returns=position.returns + 1)
        if self.session.world.is_main:
            shutil.rmtree(self.folder / WITHIN, ignore_errors=True)  # it is of steps that are now to be done anew
        self.save(back)
        return back


def has_checkpoint(out: Path) -> bool:
    """Whether there is anything to go on from, damaged or not."""
    return any(place.exists() for place in _places(out))


def _position(told: dict[str, Any]) -> Position:
    # Earlier versions saved after the evaluation only, and knew of no steps that are skipped.
    best = told["best"]
    return Position(
        step=int(told["step"]),
        best=None if best is None else float(best),
        pending=bool(told.get("pending", False)),
        skipped=int(told.get("skipped", 0)),
        in_row=int(told.get("in_row", 0)),
        rate=float(told.get("rate", 1.0)),
        returns=int(told.get("returns", 0)),
    )


def _places(out: Path) -> tuple[Path, ...]:
    folder = out / "checkpoints"
    last = folder / LAST
    return standing(folder / WITHIN), standing(last), kept(last, folder / PREVIOUS)


def newest(out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest checkpoint of a run, and a note for each that is damaged; errors as of `Checkpoints.newest`."""
    places = [place for place in _places(out) if place.exists()]
    faults: dict[Path, str] = {}
    for place in sorted(places, key=_step, reverse=True):
        fault = damage(place) or ("" if (place / "training.json").is_file() else "training.json is missing")
        if not fault:
            return place, tuple(_set_aside(out, at, said, place) for at, said in faults.items())
        faults[place] = fault
    if not faults:
        return None, ()
    raise ModelError(
        "Every checkpoint of the run is damaged",
        where=out / "checkpoints",
        got="; ".join(f"{place.name}: {fault}" for place, fault in faults.items()),
        remedy="Begin a new run; its best model so far, where there is one, is a start: --init "
        f"{out / 'checkpoints' / 'best'}.",
    )


def _set_aside(out: Path, place: Path, fault: str, other: Path) -> str:
    aside = out / "checkpoints" / DAMAGED
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)
    return (
        f"The checkpoint {place} is damaged and not used: {fault}. The run goes on from the one before, {other}, at "
        f"step {_step(other):,.0f}, and comes to the same results; the damaged one now lies in {aside}"
    )


def _step(place: Path) -> float:
    """The step of a checkpoint; one that does not say is looked at first, so that it is named."""
    try:
        return float(read_json(place / "training.json")["position"]["step"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return float("inf")


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    content = optimizer.state_dict()
    content["state"] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.ndim:
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} for {tuple(parameter.shape)}")
            # The fused kernel walks through memory: moments must lie as their parameter does, channels last or not.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        content["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(content)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}
