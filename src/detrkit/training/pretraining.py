"""Pre-training on images without labels, as one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrkit.training import pretext
from detrkit.training.conduct import check_folder, conduct
from detrkit.training.distributed import World
from detrkit.training.events import Event, Preparing
from detrkit.training.patches import prepare_patches
from detrkit.training.pretext import PatchRecipe, PretextRecipe
from detrkit.training.run import resolve
from detrkit.training.session import Session
from detrkit.training.unlabelled import Sources, evaluations, left_out, replaced
from detrkit.training.views import prepare_backbone


@dataclass(frozen=True)
class PretrainedRun:
    """A finished pre-training.

    Attributes:
        folder: the run folder; `init` of a training takes it or, of a backbone alone, `backbone_weights`.
        figures: those of the best checkpoint on held-out images, by name.
        sentence: what it comes to, in plain sentences.
        alarms: what is wrong by the last evaluation, each with its remedy; empty where nothing is.
        problems: what was wrong with the images.
        page: pictures of what the best checkpoint finds on held-out images; None where none were drawn.
    """

    folder: Path
    figures: dict[str, float]
    sentence: str
    alarms: tuple[str, ...]
    problems: tuple[str, ...]
    page: Path | None


def pretrain(
    images: Sources,
    *,
    out: str | Path,
    task: str = "",
    recipe: PretextRecipe | str | Path | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    **fields: Any,
) -> PretrainedRun:
    """Train a detector, or its backbone, on images without labels.

    Args:
        images: one folder, image or tar shard, or several of them.
        out: the run folder to make.
        task: what is trained for: `up-detr`, a detector that finds patches of an image in it (Dai et al., UP-DETR, CVPR
            2021), or `backbone`, a backbone alone that tells images apart (Zbontar et al., Barlow Twins, ICML 2021).
            Empty: that of the recipe, else `up-detr`.
        recipe: a recipe of the task, a TOML file, or the name of one that comes with the package; by default the one
            of the task and the preset, where there is one. A run that goes on has its own.
        resume: go on with the run in `out` where its last checkpoint stands.
        on_event: called with every event, such as a step or an evaluation. By default Python's logging is told, under
            the name `detrkit`: warnings are seen, and the course of it after `logging.basicConfig(level=logging.INFO)`.
        **fields: any field of the recipe, such as `model="detr-r50"` or `epochs=50`.

    Returns:
        The run, with the figures of its best checkpoint.

    Raises:
        DataError: the images cannot be used; says what is wrong where.
        ModelError: weights that are missing or do not fit.
        UsageError: a task or field that does not exist, a backbone that would see nothing, or an `out` that holds
            another run.
    """
    out = Path(out)
    check_folder(out)
    images = images if isinstance(images, str | Path) else tuple(images)  # they are gone through more than once
    if resume and recipe is None and (out / "recipe.toml").exists():
        recipe = out / "recipe.toml"
    usual = pretext.of_task(task, recipe) if recipe is None or isinstance(recipe, str | Path) else type(recipe)()
    resolved: PretextRecipe = resolve(recipe, fields, usual, pretext.DEFAULT_MODELS[usual.task])
    sessions: list[Session[Any]] = []

    def open_session(here: World, came_from: str) -> Session[Any]:
        if isinstance(resolved, PatchRecipe):
            tell = on_event if here.is_main and on_event is not None else None
            progress = None if tell is None else lambda done, total: tell(Preparing(done, total))
            sessions.append(prepare_patches(resolved, images, here, out, came_from=came_from, on_picture=progress))
        else:
            sessions.append(prepare_backbone(resolved, images, here, out, came_from=came_from))
        return sessions[0]

    figures = conduct(resolved, open_session, out, _named(images), resume=resume, on_event=on_event)
    return _finished(out, figures, sessions[0].count)


def _named(images: Sources) -> str:
    return str(images) if isinstance(images, str | Path) else ", ".join(map(str, images))


def _finished(out: Path, figures: dict[str, float], count: int) -> PretrainedRun:
    """What the run wrote down of itself; a run that was finished before says the same again."""
    told = evaluations(out)
    last = told[-1] if told else {}
    chosen = next((line for line in reversed(told) if line["best"]), last)
    page = out / "samples" / f"epoch-{round(chosen.get('epoch', 0)):04d}" / "report.html"
    problems = []
    if lost := replaced(out):
        problems.append(f"{lost:,} of {count:,} training images could not be used; replaced.jsonl names them")
    if (file := left_out(out)).is_file() and (named := len(file.read_text(encoding="utf-8").splitlines())):
        images = "1 image" if named == 1 else f"{named:,} images"
        names = "it" if named == 1 else "them"
        problems.append(f"{images} could not be used; {file.name} names {names}")
    return PretrainedRun(
        out,
        figures,
        str(last.get("conclusion", "")),
        tuple(last.get("notes", ())),
        tuple(problems),
        page if page.is_file() else None,
    )
