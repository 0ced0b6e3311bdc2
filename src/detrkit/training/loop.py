"""The training loop: an iterator of events. Each step is a function of the weights, the seed and the step number."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detrkit.checkpoint import TrainingState, fill, load_training, save_model, save_training, standing
from detrkit.convert import load_strictly
from detrkit.data.dataset import random_stream
from detrkit.data.loading import EpochBatches, LoadedBatch, training_batches
from detrkit.errors import ModelError, UsageError
from detrkit.evaluation.run import Metrics, evaluate
from detrkit.losses.criterion import Losses
from detrkit.losses.matching import NonFiniteError
from detrkit.predict import Detector
from detrkit.structures import Batch
from detrkit.training.events import Evaluated, Event, Saved, Started, Step, Stopped
from detrkit.training.optimizer import rate_factor, set_rates
from detrkit.training.setup import Session
from detrkit.training.validation import detect, draw_samples

_DROPOUT_STREAM = 3  # streams 1 and 2 shuffle and augment


class Position(NamedTuple):
    """How far a training is: `step` steps done, and the best AP of the validation split so far."""

    step: int = 0
    best: float = -1.0


def fit(session: Session, out: Path, *, resume: bool = False) -> Generator[Event, None, None]:
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
    options, world = session.recipe.optimization, session.world
    scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
    position, notes = Position(), session.notes
    if resume and (last_checkpoint := standing(out / "checkpoints" / "last")).exists():
        position = restore(session, scaler, last_checkpoint)
    elif resume:
        notes += ("The run was stopped before its first checkpoint: it starts from the beginning",)
    sizes = (len(session.dataset), options.batch_size, session.recipe.run.seed)
    per_epoch = max(1, len(session.dataset) // (options.batch_size * world.size) // options.accumulate)
    total = per_epoch * options.epochs
    batches = EpochBatches(
        *sizes,
        start_step=position.step * options.accumulate,
        total_steps=total * options.accumulate,
        rank=world.rank,
        world=world.size,
    )
    loader = training_batches(
        session.dataset, batches, workers=session.workers, pin_memory=session.device.type == "cuda"
    )
    wrapped = world.wrap(session.model, session.device)
    yield Started(position.step, total, per_epoch, notes)
    clock = time.perf_counter()
    while position.step < total:
        loaded, waited = [], time.perf_counter()
        for _ in range(options.accumulate):
            loaded.append(next(loader))
        waited = time.perf_counter() - waited
        set_rates(session.optimizer, rate_factor(position.step, total, options))
        with _seeded(session, position.step):
            figures = optimize(session, wrapped, scaler, [one.batch for one in loaded])
        position = position._replace(step=position.step + 1)
        now = time.perf_counter()
        yield _step_event(session, position.step, per_epoch, figures, loaded, now - clock, waited)
        clock = now
        epoch, within = divmod(position.step, per_epoch)
        last = position.step == total
        if within == 0 and (epoch % session.recipe.run.evaluate_every == 0 or last):
            position, event = _evaluate(session, out, position, epoch)
            yield event
        if within == 0 and (epoch % session.recipe.run.save_every == 0 or last):
            yield save(session, scaler, out, position)
        if within == 0:
            clock = time.perf_counter()
    yield Stopped(position.step, "finished")


def optimize(session: Session, model: nn.Module, scaler: torch.amp.GradScaler, batches: list[Batch]) -> Tensor:
    """One step of the optimiser.

    Returns:
        The figures of the step in one tensor, averaged over batches and processes: the total, the class error, the
        terms at the last layer, the gradient's norm.
    """
    options = session.recipe.optimization
    session.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    figures = []
    for batch in batches:
        losses = forward(session, model, batch)
        scaler.scale(losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
        figures.append(
            torch.cat([losses.total.detach()[None], losses.class_error[None], losses.values.detach()[:, -1]])
        )
    scaler.unscale_(session.optimizer)
    limit = options.clip if options.clip > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_([p for p in session.model.parameters() if p.grad is not None], limit)
    if not scaler.is_enabled() and not torch.isfinite(norm):  # before it reaches the weights; fp16's scaler skips it
        raise NonFiniteError([target.name for batch in batches for target in batch.targets])
    scaler.step(session.optimizer)
    scaler.update()
    if session.average is not None:
        session.average.update(session.model)
    return torch.cat([session.world.mean(torch.stack(figures).mean(0)), norm[None].to(session.device)])


def forward(session: Session, model: nn.Module, batch: Batch) -> Losses:
    """The losses of a batch, under the recipe's arithmetic."""
    options, world = session.recipe.optimization, session.world
    batch = batch.to(session.device)
    images = batch.images
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor(float(sum(len(target.labels) for target in batch.targets)), device=session.device)
    num_boxes = max(float(world.mean(boxes)), 1.0)
    enabled = session.dtype != torch.float32
    with torch.autocast(session.device.type, dtype=session.dtype if enabled else None, enabled=enabled):
        predictions = model(images, batch.padding)
    return session.criterion(predictions, batch.targets, num_boxes)


def evaluated_model(session: Session) -> nn.Module:
    """The model that is evaluated and kept: the moving average where there is one."""
    return session.model if session.average is None else session.average.model


def save(session: Session, scaler: torch.amp.GradScaler, out: Path, position: Position) -> Saved:
    """Write the checkpoint that a run goes on from."""
    path = out / "checkpoints" / "last"
    if session.world.is_main:
        tensors = {"optimizer": _optimizer_tensors(session.optimizer)}
        if session.average is not None:
            tensors["average"] = session.average.tensors()
        about = {
            "step": position.step,
            "best": position.best,
            "average_steps": session.average.steps if session.average else 0,
            "scaler": scaler.state_dict(),
            "processes": session.world.size,
        }
        save_training(
            path,
            session.model,
            TrainingState(tensors, about),
            preset=session.recipe.model.model,
            categories=session.train.categories,
        )
    return Saved(position.step, path)


def restore(session: Session, scaler: torch.amp.GradScaler, folder: Path) -> Position:
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
    fill(session.model, folder)
    try:
        _restore_optimizer(session.optimizer, state.tensors["optimizer"])
        if session.average is not None:
            load_strictly(session.average.model, state.tensors["average"])
            session.average.steps = int(state.position["average_steps"])
        if state.position["scaler"]:
            scaler.load_state_dict(state.position["scaler"])
        return Position(int(state.position["step"]), float(state.position["best"]))
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


def _evaluate(session: Session, out: Path, position: Position, epoch: int) -> tuple[Position, Evaluated]:
    started = time.perf_counter()
    model = evaluated_model(session)
    detector = Detector(
        model.eval(), session.variant, session.train.categories, session.recipe.model.model, session.device
    )
    batch_size = max(session.recipe.optimization.batch_size, 4)
    detections = detect(detector, session.val, batch_size=batch_size, workers=session.workers, world=session.world)
    metrics: Metrics | None = evaluate(session.val, detections) if session.world.is_main else None
    metrics = session.world.share(metrics)
    assert metrics is not None
    ap = metrics.figures["AP"]
    is_best = ap > position.best
    if session.world.is_main:
        if session.recipe.run.samples:
            file = out / "samples" / f"epoch-{epoch:04d}.jpg"
            draw_samples(session.val, detections, session.recipe.run.samples, file, metrics.threshold)
        if is_best:
            save_model(
                out / "checkpoints" / "best",
                model,
                preset=session.recipe.model.model,
                categories=session.train.categories,
                about={
                    "epoch": epoch,
                    "step": position.step,
                    "metrics": metrics.to_json()["figures"],
                    "threshold": metrics.threshold,
                },
            )
    event = Evaluated(position.step, float(epoch), metrics, time.perf_counter() - started, is_best)
    return position._replace(best=max(position.best, ap)), event


def _step_event(
    session: Session,
    step: int,
    per_epoch: int,
    figures: Tensor,
    loaded: list[LoadedBatch],
    seconds: float,
    waited: float,
) -> Step:
    total, class_error, *terms, norm = figures.tolist()
    return Step(
        step=step,
        epoch=step / per_epoch,
        loss=total,
        terms=dict(zip(("class", "l1", "giou"), terms, strict=True)),
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
def _seeded(session: Session, step: int) -> Iterator[None]:
    """Seed dropout anew for each step and process: resuming needs no random state, and the caller's stays as it is."""
    devices, seed = [session.device] if session.device.type == "cuda" else [], session.recipe.run.seed
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(random_stream(_DROPOUT_STREAM, seed, step, session.world.rank).integers(2**63)))
        yield
