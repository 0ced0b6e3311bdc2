"""The training loop: an iterator of events. Each step is a function of the weights, the seed and the step number.

The loop knows no task: what a batch is, what its losses are and how the model is evaluated, a `Session` says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrkit.checkpoint import TrainingState, load_training
from detrkit.convert import load_strictly
from detrkit.data.dataset import random_stream
from detrkit.data.loading import EpochBatches
from detrkit.errors import ModelError, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.training.events import Evaluated, Event, Saved, Started, Step, Stopped
from detrkit.training.optimizer import rate_factor, set_rates
from detrkit.training.session import Loaded, Session
from detrkit.whole import standing

_DROPOUT_STREAM = 3  # streams 1 and 2 shuffle and augment


class Position(NamedTuple):
    """How far a training is.

    `step`: steps done. `best`: the best score of an evaluation so far, more is better; None before the first.
    `pending`: the evaluation of this step is still to come.
    """

    step: int = 0
    best: float | None = None
    pending: bool = False


class Figures(NamedTuple):
    """What a step tells of itself.

    `terms` are the names of the loss terms; `values` the total, the class error, the terms at the last layer, and the
    gradient's norm before clipping.
    """

    terms: tuple[str, ...]
    values: Float[Tensor, " figure"]


def fit(session: Session[Any], out: Path, *, resume: bool = False) -> Generator[Event, None, None]:
    """Train, evaluate and save, yielding an event for each thing done.

    Args:
        session: what to train, on what.
        out: the run folder.
        resume: go on from the run's last checkpoint, or from the beginning where there is none yet.

    Raises:
        NonFiniteError: the predictions became NaN; names the images.
        DataError: images cannot be read.
        ModelError: the checkpoint to resume from is damaged.
        UsageError: another number of processes than before.
    """
    options, world = session.optimization, session.world
    scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
    position, notes = Position(), session.notes
    if resume and (last_checkpoint := standing(out / "checkpoints" / "last")).exists():
        position = restore(session, scaler, last_checkpoint)
    elif resume:
        notes += ("The run was stopped before its first checkpoint: it starts from the beginning",)
    per_epoch = max(1, session.count // (options.batch_size * world.size) // options.accumulate)
    total = per_epoch * options.epochs
    sampler = EpochBatches(
        session.count,
        options.batch_size,
        session.run.seed,
        start_step=position.step * options.accumulate,
        total_steps=total * options.accumulate,
        rank=world.rank,
        world=world.size,
    )
    loader = session.batches(sampler)
    wrapped = world.wrap(session.model, session.device)
    yield Started(position.step, total, per_epoch, notes, position.pending)
    if position.pending:
        position = yield from _end_epoch(session, scaler, out, position, position.step // per_epoch)
    clock = time.perf_counter()
    while position.step < total:
        waited = time.perf_counter()
        loaded = [next(loader) for _ in range(options.accumulate)]
        waited = time.perf_counter() - waited
        set_rates(session.optimizer, rate_factor(position.step, total, options))
        with _seeded(session, position.step):
            figures = optimize(session, wrapped, scaler, [one.batch for one in loaded])
        position = position._replace(step=position.step + 1)
        now = time.perf_counter()
        yield _step_event(session, position.step, per_epoch, figures, loaded, now - clock, waited)
        clock = now
        epoch, within = divmod(position.step, per_epoch)
        if within == 0:
            position = yield from _end_epoch(session, scaler, out, position, epoch)
            clock = time.perf_counter()
    yield Stopped(position.step, "finished")


def optimize(session: Session[Any], model: nn.Module, scaler: torch.amp.GradScaler, batches: Sequence[Any]) -> Figures:
    """One step of the optimiser.

    Returns:
        The figures of the step, averaged over batches and processes.

    Raises:
        NonFiniteError: predictions or their gradient are NaN or infinite; names the images.
    """
    session.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    figures: list[Tensor] = []
    for batch in batches:
        losses = session.losses(model, batch)
        scaler.scale(losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
        figures.append(
            torch.cat([losses.total.detach()[None], losses.class_error[None], losses.values.detach()[:, -1]])
        )
    scaler.unscale_(session.optimizer)
    limit = session.optimization.clip if session.optimization.clip > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_([p for p in session.model.parameters() if p.grad is not None], limit)
    if not scaler.is_enabled() and not torch.isfinite(norm):  # before it reaches the weights; fp16's scaler skips it
        raise NonFiniteError([name for batch in batches for name in session.names(batch)])
    scaler.step(session.optimizer)
    scaler.update()
    if session.average is not None:
        session.average.update(session.model)
    means = session.world.mean(torch.stack(figures).mean(0))
    return Figures(losses.names, torch.cat([means, norm[None].to(session.device)]))


def save(session: Session[Any], scaler: torch.amp.GradScaler, out: Path, position: Position) -> Saved:
    """Write the checkpoint that a run goes on from."""
    path = out / "checkpoints" / "last"
    if session.world.is_main:
        tensors = {"optimizer": _optimizer_tensors(session.optimizer)}
        if session.average is not None:
            tensors["average"] = session.average.tensors()
        about = {
            **position._asdict(),
            "average_steps": session.average.steps if session.average else 0,
            "scaler": scaler.state_dict(),
            "processes": session.world.size,
        }
        session.save_training(path, TrainingState(tensors, about))
    return Saved(position.step, path)


def restore(session: Session[Any], scaler: torch.amp.GradScaler, folder: Path) -> Position:
    """Bring a session to where a checkpoint stands.

    Raises:
        ModelError: the checkpoint is missing or damaged, or belongs to another model.
        UsageError: it was written by another number of processes, for which a step means other images.
    """
    state = load_training(folder)
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
            scaler.load_state_dict(state.position["scaler"])
        best = state.position["best"]
        return Position(
            int(state.position["step"]),
            None if best is None else float(best),
            bool(state.position.get("pending", False)),  # earlier versions saved after the evaluation only
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "The checkpoint does not fit this training", where=folder, got=error, remedy="Begin a new run with --init."
        ) from error


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


def _end_epoch(
    session: Session[Any], scaler: torch.amp.GradScaler, out: Path, position: Position, epoch: int
) -> Generator[Event, None, Position]:
    """Evaluate and save, where an epoch is one after which this is done."""
    is_last = epoch == session.optimization.epochs
    evaluates = epoch % session.run.evaluate_every == 0 or is_last
    saves = epoch % session.run.save_every == 0 or is_last
    if evaluates and saves and not position.pending:
        # What an evaluation may meet, such as an image that cannot be read, must not cost what was trained.
        save(session, scaler, out, position._replace(pending=True))
    if evaluates:
        position, event = _evaluate(session, out, position, epoch)
        yield event
    if saves:
        yield save(session, scaler, out, position)
    return position


def _evaluate(session: Session[Any], out: Path, position: Position, epoch: int) -> tuple[Position, Evaluated]:
    started = time.perf_counter()
    found = session.evaluate(out, epoch)
    is_best = math.isfinite(found.score) and (position.best is None or found.score > position.best)
    if is_best and session.world.is_main:
        figures = {name: value if math.isfinite(value) else None for name, value in found.figures.items()}
        about = {"epoch": epoch, "step": position.step, "metrics": figures, **found.about}
        session.save_best(out / "checkpoints" / "best", about)
    event = Evaluated(
        step=position.step,
        epoch=float(epoch),
        figures=found.figures,
        headline=found.headline,
        seconds=time.perf_counter() - started,
        is_best=is_best,
        metrics=found.metrics,
        notes=found.notes,
        conclusion=found.conclusion,
    )
    return Position(position.step, found.score if is_best else position.best), event


def _step_event(
    session: Session[Any],
    step: int,
    per_epoch: int,
    figures: Figures,
    loaded: Sequence[Loaded[Any]],
    seconds: float,
    waited: float,
) -> Step:
    total, class_error, *terms, norm = figures.values.tolist()
    return Step(
        step=step,
        epoch=step / per_epoch,
        loss=total,
        terms=dict(zip(figures.terms, terms, strict=True)),
        class_error=class_error,
        lr=session.optimizer.param_groups[0]["lr"],
        grad_norm=norm,
        seconds=seconds,
        waited=waited,
        images=sum(len(one.batch.images) for one in loaded) * session.world.size,
        replaced=tuple(place for one in loaded for place in one.replaced),
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


@contextmanager
def _seeded(session: Session[Any], step: int) -> Iterator[None]:
    """Seed dropout anew for each step and process: resuming needs no random state, and the caller's stays as it is."""
    devices, seed = [session.device] if session.device.type == "cuda" else [], session.run.seed
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(random_stream(_DROPOUT_STREAM, seed, step, session.world.rank).integers(2**63)))
        yield
