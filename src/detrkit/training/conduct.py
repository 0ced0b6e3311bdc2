"""A training in its run folder, of whatever task: begun or gone on with, written down, and told to who listens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from detrkit.data.loading import death_of_worker
from detrkit.documents import read_json
from detrkit.errors import DataError, Error, ModelError, UsageError
from detrkit.training import recipe as recipes
from detrkit.training.alone import alone_in
from detrkit.training.distributed import World, world
from detrkit.training.events import Evaluated, Event, Stopped
from detrkit.training.interruption import Interruption
from detrkit.training.log import RunFolder, TensorBoard
from detrkit.training.loop import fit
from detrkit.training.recipe import AnyRecipe
from detrkit.training.recovery import has_checkpoint
from detrkit.training.session import Session
from detrkit.training.telling import Logged
from detrkit.whole import standing

WEIGHTS_NOTES = ("Start from ", "Backbone ", "Backbone: ")
"""How the note begins that says where a run's first weights came from."""

_FREE_ON_RESUME = {"workers", "device", "log_every", "save_minutes", "tensorboard"}


def conduct(
    recipe: AnyRecipe,
    prepare: Callable[[World, str], Session[Any]],
    out: Path,
    data: str,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, float]:
    """Train from the first step, or from the last checkpoint, to the end.

    Args:
        recipe: the resolved recipe.
        prepare: makes the session of the recipe, given the processes that train together, and what the run noted of its
            first weights where a checkpoint follows (then they are not loaded again), else nothing.
        out: the run folder.
        data: where the data lie, for people.
        resume: go on with the run in `out` where its last checkpoint stands.
        on_event: called with every event in the main process; by default `Logged`.

    Returns:
        The figures of the best checkpoint by name; empty if nothing was evaluated.

    Raises:
        DataError: the data cannot be used, or are not those that the run was begun with.
        ModelError: a checkpoint to go on from is damaged.
        UsageError: an `out` that holds another run, in which one is at work, or none to go on with; or a worker died.
        KeyboardInterrupt: Ctrl-C, after the step was finished and saved; or at once, the second time. SIGTERM is
            answered alike, by whatever the caller's handler does, or by the end of the process.
    """
    check_folder(out)
    if resume:
        _check_same(out, recipe)
    elif (out / "recipe.toml").exists():
        raise UsageError(
            "This folder holds a run already",
            where=out,
            remedy="Go on with it (--resume; in Python resume=True), or choose another folder.",
        )
    best = _best_figures(out) if resume else {}
    with world() as here, alone_in(out) if here.is_main else nullcontext(), _threads(recipe.run.threads):
        goes_on = resume and has_checkpoint(out)
        session = prepare(here, _origin_of_weights(out) if goes_on else "")
        if resume:
            check_data(out, session.describe()["splits"])
        folder, interruption = RunFolder(out, session, data), Interruption()
        listeners: list[Callable[[Event], None]] = []
        if here.is_main:
            listeners.append(folder)
            if recipe.run.tensorboard:
                listeners.append(TensorBoard(out / "tensorboard"))
            listeners.append(on_event or Logged(session.describe()["splits"]))
        try:
            events = fit(session, out, resume=resume, interruption=interruption)
            with interruption.listening(), closing(events):
                for event in events:
                    if isinstance(event, Evaluated) and event.is_best:
                        best = event.figures
                    _tell(event, listeners)
                    for trouble in folder.troubles():
                        _tell(trouble, listeners)
            if interruption or (isinstance(event, Stopped) and event.reason != "finished"):
                interruption.deliver()
        except BaseException as error:
            if here.is_main:
                _note_end(folder, error)
            if isinstance(error, RuntimeError) and (death := death_of_worker(error)):
                raise death from error
            raise
    return best


def _tell(event: Event, listeners: Iterable[Callable[[Event], None]]) -> None:
    for listener in listeners:
        listener(event)


def _note_end(folder: RunFolder, error: BaseException) -> None:
    """Write down how a run ended. The death of a worker is told by a signal, which may arrive in this very moment."""
    try:
        folder.broke_off(error)
    except RuntimeError as again:
        if death_of_worker(again) is None:
            raise
        folder.broke_off(error)


def check_folder(out: Path) -> None:
    """Refuse a run folder that is a file.

    Raises:
        UsageError: it is one.
    """
    if out.exists() and not out.is_dir():
        raise UsageError("The run folder is a file", where=out, remedy="Choose another --out.")


def _check_same(out: Path, recipe: AnyRecipe) -> None:
    """Refuse to go on with a run under another recipe."""
    file = out / "recipe.toml"
    if not file.exists():
        raise UsageError("There is no run to go on with", where=out, remedy="Leave resume out to start one.")
    before = recipes.read(file, type(recipe)())
    differing = [
        f"{name} ({getattr(getattr(before, section), name)!r} before)"
        for name, (section, _, _) in recipes.fields(type(recipe)).items()
        if name not in _FREE_ON_RESUME
        and getattr(getattr(before, section), name) != getattr(getattr(recipe, section), name)
    ]
    if differing:
        raise UsageError(
            "The run was begun with another recipe",
            where=out,
            got=", ".join(differing),
            remedy="Leave these fields out: a run goes on with its own recipe. Or begin a new run with what this one "
            f"has learnt, by the field init: {out}.",
        )


def _origin_of_weights(out: Path) -> str:
    """What a run noted of the weights that it started from; they are not needed again to go on."""
    notes = data_of(out).get("notes", [])
    found = (note for note in notes if isinstance(note, str) and note.startswith(WEIGHTS_NOTES))
    return next(found, "Backbone: of the run's last checkpoint")


def check_data(out: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to go on with a run on other data: its steps would be others, and its figures not comparable.

    Args:
        out: the run folder; where it is no run yet, anything goes.
        splits: what `Session.describe` says of each split.

    Raises:
        DataError: a fingerprint is another than the run noted.
    """
    before = data_of(out).get("splits", {})
    for name, now in splits.items():
        then = before.get(name, now)
        if then["fingerprint"] != now["fingerprint"]:
            counts = [key for key, value in now.items() if isinstance(value, int) and key in then]
            raise DataError(
                f"The run was begun with other data: its {name} images, or what is known of them, have changed",
                where=out,
                got=", ".join(f"{now[key]} {key}" for key in counts),
                expected=f"{', '.join(f'{then[key]} {key}' for key in counts)} as they were",
                remedy="Begin a new run, with --init to start from this one's weights.",
            )


def data_of(out: Path) -> dict[str, Any]:
    """What a run noted of its data; nothing if it was stopped in its very first moment.

    Raises:
        DataError: the file is damaged.
    """
    file = out / "data.json"
    if not file.exists():
        return {}
    remedy = "Restore the file. If the data are as they were, delete it: it is written anew."
    content = _read_json(file, DataError, remedy)
    notes, splits = content.get("notes"), content.get("splits")
    is_whole = isinstance(splits, dict) and all(
        isinstance(one, dict) and "fingerprint" in one for one in splits.values()
    )
    if not is_whole or not isinstance(notes, list):
        raise DataError(
            "The file is damaged", where=file, expected="splits with fingerprints, and notes", remedy=remedy
        )
    return content


def _best_figures(out: Path) -> dict[str, float]:
    """What a run's best checkpoint says of itself.

    Raises:
        ModelError: the file is damaged.
    """
    file = standing(out / "checkpoints" / "best") / "config.json"
    if not file.exists():
        return {}
    remedy = f"Restore the file, or begin a new run with --init {out / 'checkpoints' / 'last'}."
    content = _read_json(file, ModelError, remedy)
    try:
        figures = content["about"]["metrics"]
        return {name: math.nan if value is None else float(value) for name, value in figures.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "The file is damaged", where=file, expected="figures of an evaluation", remedy=remedy
        ) from error


def _read_json(file: Path, kind: type[Error], remedy: str) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise kind("The file cannot be read", where=file, got=error, remedy=remedy) from error
    if not isinstance(content, dict):
        raise kind("The file is damaged", where=file, expected="a JSON object", remedy=remedy)
    return content


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
