"""The training loop: an iterator of events. Each step is a function of the weights, the seed and the step number.

The loop knows no task: what a batch is, what its losses are and how the model is evaluated, a `Session` says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrkit.data.dataset import random_stream
from detrkit.data.order import EpochBatches
from detrkit.losses.criterion import Evidence, Losses
from detrkit.losses.matching import NonFiniteError
from detrkit.training.events import Evaluated, Event, Skipped, Started, Step, Stopped, WentBack
from detrkit.training.guard import Guard
from detrkit.training.interruption import Interrupted, Interruption
from detrkit.training.optimizer import note_on_warmup, rate_factor, set_rates
from detrkit.training.recovery import Checkpoints, Position
from detrkit.training.session import Loaded, Session, Validation

_DROPOUT_STREAM = 3  # streams 1 and 2 shuffle and augment


class Figures(NamedTuple):
    """What a step tells of itself.

    `terms` are the names of the loss terms; `values`, on the CPU, the total, the class error, the terms at the last
    layer, and the gradient's norm before clipping.
    """

    terms: tuple[str, ...]
    values: Float[Tensor, " figure"]


def fit(
    session: Session[Any], out: Path, *, resume: bool = False, interruption: Interruption | None = None
) -> Generator[Event, None, None]:
    """Train, evaluate and save, yielding an event for each thing done.

    Args:
        session: what to train, on what.
        out: the run folder.
        resume: go on from the run's newest checkpoint, or from the beginning where there is none yet.
        interruption: when it becomes true, the step is finished and saved, and the training stops. An evaluation is
            left in the middle by one process alone; several finish it and one step more.

    Raises:
        NonFiniteError: step after step is NaN or infinite, and there is nothing to go back to; names the images.
        DataError: images cannot be read.
        ModelError: all checkpoints to resume from are damaged.
        UsageError: another number of processes than before.
    """
    options, world = session.optimization, session.world
    interruption = Interruption() if interruption is None else interruption
    scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
    per_epoch = steps_per_epoch(session)
    guard = Guard(session.optimizer, per_epoch * options.epochs)
    checkpoints = Checkpoints(session, scaler, out, guard)
    position, notes = _begin(checkpoints) if resume else (Position(), session.notes)
    total = per_epoch * options.epochs
    loader = _batches(session, position.step)
    wrapped = world.wrap(session.model, session.device)
    said = (*notes, *note_on_warmup(total, options))
    yield Started(position.step, total, per_epoch, said, position.pending, position.skipped)
    if position.pending:
        position = yield from _end_epoch(checkpoints, position, interruption)
    clock = time.perf_counter()
    while position.step < total and not position.pending:
        waited = time.perf_counter()
        loaded = [next(loader) for _ in range(options.accumulate)]
        waited = time.perf_counter() - waited
        set_rates(session.optimizer, position.rate * rate_factor(position.step, total, options))
        try:
            with _seeded(session, position.step):
                figures = optimize(session, wrapped, scaler, [one.batch for one in loaded], guard.watch)
            event = _step_event(session, scaler, position.step + 1, figures, loaded, clock, waited)
        except NonFiniteError as error:
            position = position.after(skipped=True)
            guard.forget()
            yield Skipped(
                position.step, error.images, error.boxes, position.in_row, position.skipped, _replaced(loaded)
            )
            if position.in_row >= min(options.skip_limit, per_epoch):
                before, position = position, checkpoints.go_back(position, error)
                yield WentBack(position.step, before.step, position.rate, position.returns, position.skipped)
                loader, clock = _batches(session, position.step), time.perf_counter()
                continue
        else:
            position, clock = position.after(), time.perf_counter()
            yield event
            yield from guard.look(event)
        if world.any(bool(interruption), session.device):
            position = yield from _stop(checkpoints, position)
            yield Stopped(position.step, "interrupted")
            return
        if position.step % per_epoch == 0:
            position = yield from _end_epoch(checkpoints, position, interruption)
            clock = time.perf_counter()
        elif checkpoints.is_due:
            yield checkpoints.save(position, within=True)
            clock = time.perf_counter()
    yield Stopped(position.step, "interrupted" if position.pending else "finished")


def steps_per_epoch(session: Session[Any]) -> int:
    """Steps of the optimiser that see each image once, or nearly."""
    options = session.optimization
    return max(1, session.count // (options.batch_size * session.world.size * options.accumulate))


def optimize(
    session: Session[Any],
    model: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Any],
    watch: Callable[[Evidence | None], None] = lambda evidence: None,
) -> Figures:
    """One step of the optimiser.

    Args:
        session: what trains.
        model: `session.model`, wrapped where several processes train.
        scaler: of the gradients.
        batches: whose gradients make the step.
        watch: called with what the losses of each were computed from.

    Returns:
        The figures of the step, averaged over batches and processes.

    Raises:
        NonFiniteError: predictions or their gradient are NaN or infinite, in any process; names the images. Nothing has
            changed then.
    """
    session.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    figures: list[Tensor] = []
    counts = session.shared(batches)
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else session.world.apart(model):
            losses = _losses(session, model, batch, counts)
            watch(losses.evidence)
            scaler.scale(losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
        figures.append(
            torch.cat([losses.total.detach()[None], losses.class_error[None], losses.values.detach()[:, -1]])
        )
    scaler.unscale_(session.optimizer)
    limit = session.optimization.clip if session.optimization.clip > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_([p for p in session.model.parameters() if p.grad is not None], limit)
    means = session.world.mean(torch.stack(figures).mean(0))
    # Here, and for matching, a step waits for its device; the optimiser's work need not be done when this returns.
    values = torch.cat([means, norm[None].to(session.device)]).cpu()
    if not scaler.is_enabled() and not math.isfinite(values[-1]):  # not yet in the weights; fp16's scaler skips it
        raise NonFiniteError(_names(session, batches))
    scaler.step(session.optimizer)
    scaler.update()
    if session.average is not None:
        session.average.update(session.model)
    return Figures(losses.names, values)


def _losses(session: Session[Any], model: nn.Module, batch: Any, counts: Sequence[float]) -> Losses:
    """The losses of a batch, or the same error in all processes: none may wait for the gradient of another."""
    losses, error = None, NonFiniteError(())
    try:
        losses = session.losses(model, batch, counts)
    except NonFiniteError as found:
        error = found
    if not session.world.any(losses is None, session.device):
        assert losses is not None
        return losses
    told = session.world.gather((error.images, error.boxes))
    if told:
        images = [image for images, _ in told for image in images]
        error = NonFiniteError(images, [box for _, boxes in told for box in boxes])
    raise error


def _begin(checkpoints: Checkpoints) -> tuple[Position, tuple[str, ...]]:
    """Go on from the newest checkpoint, or start where there is none; and what is to be said."""
    notes = checkpoints.session.notes
    checkpoint, said = checkpoints.newest()
    if checkpoint is None:
        return Position(), (*notes, "The run was stopped before its first checkpoint: it starts from the beginning")
    return checkpoints.restore(checkpoint), (*notes, *said)


def _batches(session: Session[Any], step: int) -> Iterator[Loaded[Any]]:
    """The batches of all steps from one on."""
    options = session.optimization
    sampler = EpochBatches(
        session.count,
        options.batch_size,
        session.run.seed,
        accumulate=options.accumulate,
        start_step=step,
        total_steps=steps_per_epoch(session) * options.epochs,
        rank=session.world.rank,
        world=session.world.size,
        size_of=session.size_of,
    )
    return session.batches(sampler)


def _asked_for(every: int, session: Session[Any], position: Position) -> bool:
    """Whether something is done here that the recipe asks for after so many epochs, and after the last one.

    It is left out where the last steps were skipped: there would be no sense in evaluating a model that cannot be used,
    and no use in going back to it.
    """
    epoch, within = divmod(position.step, steps_per_epoch(session))
    is_last = epoch == session.optimization.epochs
    return within == 0 and (is_last or (epoch % every == 0 and position.in_row == 0))


def _stop(checkpoints: Checkpoints, position: Position) -> Generator[Event, None, Position]:
    """Save before the training stops; where an epoch was ended, what is done at its end is still to come."""
    session = checkpoints.session
    position = position._replace(pending=position.step % steps_per_epoch(session) == 0)
    yield checkpoints.save(position, within=not _asked_for(session.run.save_every, session, position))
    session.world.share(None)  # nobody leaves before all is written
    return position


def _end_epoch(
    checkpoints: Checkpoints, position: Position, interruption: Interruption
) -> Generator[Event, None, Position]:
    """Evaluate and save, where an epoch is one after which this is done; `pending` if that was interrupted."""
    session = checkpoints.session
    epoch, saves = position.step // steps_per_epoch(session), _asked_for(session.run.save_every, session, position)
    if _asked_for(session.run.evaluate_every, session, position):
        started, waiting = time.perf_counter(), position._replace(pending=True)
        if saves and not position.pending:
            # What an evaluation may meet, such as an image that cannot be read, must not cost what was trained.
            checkpoints.save(waiting)
        try:
            # Processes that evaluate together wait for each other, so that none may leave: they stop at the next step.
            with interruption.at_once() if session.world.size == 1 else nullcontext():
                found = session.evaluate(checkpoints.out, epoch)
        except Interrupted:
            if not saves:
                yield checkpoints.save(waiting, within=True)
            return waiting
        position, event = _evaluated(checkpoints, position, epoch, found, time.perf_counter() - started)
        yield event
    position = position._replace(pending=False)
    if saves:
        yield checkpoints.save(position)
    elif checkpoints.is_due:
        yield checkpoints.save(position, within=True)
    return position


def _evaluated(
    checkpoints: Checkpoints, position: Position, epoch: int, found: Validation, seconds: float
) -> tuple[Position, Evaluated]:
    """Keep the best model so far, and tell what an evaluation found."""
    session = checkpoints.session
    is_best = math.isfinite(found.score) and (position.best is None or found.score > position.best)
    if is_best and session.world.is_main:
        figures = {name: value if math.isfinite(value) else None for name, value in found.figures.items()}
        about = {"epoch": epoch, "step": position.step, "metrics": figures, **found.about}
        session.save_best(checkpoints.folder / "best", about)
    event = Evaluated(
        step=position.step,
        epoch=float(epoch),
        figures=found.figures,
        headline=found.headline,
        seconds=seconds,
        is_best=is_best,
        metrics=found.metrics,
        notes=found.notes,
        conclusion=found.conclusion,
    )
    return position._replace(best=found.score if is_best else position.best), event


def _step_event(
    session: Session[Any],
    scaler: torch.amp.GradScaler,
    step: int,
    figures: Figures,
    loaded: Sequence[Loaded[Any]],
    clock: float,
    waited: float,
) -> Step:
    """What a step tells of itself.

    Raises:
        NonFiniteError: fp16 overflows although the scaler can scale no lower.
    """
    total, class_error, *terms, norm = figures.values.tolist()
    if scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() < 1:
        raise NonFiniteError(_names(session, [one.batch for one in loaded]))
    return Step(
        step=step,
        epoch=step / steps_per_epoch(session),
        loss=total,
        terms=dict(zip(figures.terms, terms, strict=True)),
        class_error=class_error,
        lr=session.optimizer.param_groups[0]["lr"],
        grad_norm=norm,
        seconds=time.perf_counter() - clock,
        waited=waited,
        images=sum(len(one.batch.images) for one in loaded) * session.world.size,
        replaced=_replaced(loaded),
    )


def _replaced(loaded: Sequence[Loaded[Any]]) -> tuple[str, ...]:
    return tuple(place for one in loaded for place in one.replaced)


def _names(session: Session[Any], batches: Sequence[Any]) -> list[str]:
    return [name for batch in batches for name in session.names(batch)]


@contextmanager
def _seeded(session: Session[Any], step: int) -> Iterator[None]:
    """Seed dropout anew for each step and process: resuming needs no random state, and the caller's stays as it is.

    Only the generators that are drawn from are seeded: `torch.manual_seed` would seed those of all devices.
    """
    seed = int(random_stream(_DROPOUT_STREAM, session.run.seed, step, session.world.rank).integers(2**63))
    generators = [torch.default_generator]
    if session.device.type == "cuda":
        place = torch.cuda.current_device() if session.device.index is None else session.device.index
        generators.append(torch.cuda.default_generators[place])
    elif session.device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    before = [generator.get_state() for generator in generators]
    try:
        if session.device.type not in ("cpu", "cuda", "mps"):
            torch.manual_seed(seed)  # of a device that is not known here, by what torch knows of it
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
