"""Training and evaluation as one call each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detrkit import evaluation, models
from detrkit.checkpoint import standing
from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.errors import DataError, UsageError
from detrkit.evaluation.run import Metrics
from detrkit.predict import Detector, load
from detrkit.sources import architecture_of, open_model
from detrkit.structures import Detections
from detrkit.training import recipe as recipes
from detrkit.training.distributed import world
from detrkit.training.events import Evaluated, Event
from detrkit.training.log import RunFolder, TensorBoard, describe
from detrkit.training.loop import fit
from detrkit.training.recipe import Recipe
from detrkit.training.setup import WEIGHTS_NOTES, Session, prepare
from detrkit.training.validation import detect

_FREE_ON_RESUME = {"workers", "device", "log_every", "tensorboard"}


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run folder; `detrkit.load` takes it.
        figures: the validation figures of the best checkpoint, by name; empty if nothing was evaluated.
    """

    folder: Path
    figures: dict[str, float]

    def load(self, **options: Any) -> Detector:
        """The best model, as `detrkit.load` gives it."""
        return load(self.folder, **options)


def train(
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | str | Path | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    **fields: Any,
) -> Run:
    """Train a detector on an annotated folder.

    Args:
        data: a data set in COCO, Pascal VOC or YOLO format; which one is recognised.
        out: the run folder to make.
        recipe: a `Recipe`, a TOML file, or the name of a recipe that comes with the package; by default the one named
            like the preset, where there is one. A run that goes on has its own.
        resume: go on with the run in `out` where its last checkpoint stands.
        on_event: called with every event, such as a step or an evaluation.
        **fields: any field of the recipe, such as `model="detr-r50"`, `epochs=50`, `lr=1e-4`, or
            `init="facebook/detr-resnet-50"` to start from the weights, and with the architecture, of another model.

    Returns:
        The run, with the figures of its best checkpoint.

    Raises:
        DataError: the data cannot be used; says what is wrong where.
        ModelError: weights that are missing or do not fit.
        UsageError: a field that does not exist, or an `out` that holds another run.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError("The run folder is a file", where=out, remedy="Choose another --out.")
    if resume and recipe is None and (out / "recipe.toml").exists():
        recipe = out / "recipe.toml"
    resolved = resolve(recipe, fields)
    if resume:
        _check_same(out, resolved)
    elif (out / "recipe.toml").exists():
        raise UsageError(
            "This folder holds a run already",
            where=out,
            remedy="Say --resume to go on with it, or choose another --out.",
        )
    best = _best_figures(out) if resume else {}
    with world() as here, _threads(resolved.run.threads):
        goes_on = resume and standing(out / "checkpoints" / "last").exists()
        session = prepare(resolved, data, here, came_from=_origin_of_weights(out) if goes_on else "")
        if resume:
            _check_data(out, session)
        folder = RunFolder(out, session, str(data))
        listeners: list[Callable[[Event], None]] = []
        if here.is_main:
            listeners.append(folder)
            if resolved.run.tensorboard:
                listeners.append(TensorBoard(out / "tensorboard"))
            if on_event is not None:
                listeners.append(on_event)
        try:
            with closing(fit(session, out, resume=resume)) as events:
                for event in events:
                    if isinstance(event, Evaluated) and event.is_best:
                        best = event.metrics.figures
                    for listener in listeners:
                        listener(event)
        except BaseException as error:
            if here.is_main:
                folder.broke_off(error)
            raise
    return Run(out, best)


def resolve(recipe: Recipe | str | Path | None, fields: dict[str, Any]) -> Recipe:
    """The recipe of a run: the packaged one of the preset, or the one named, with fields replaced.

    A run that starts from other weights and names no model takes preset, architecture and image size from there.

    Raises:
        ModelError: the weights to start from are not there or cannot be read.
        UsageError: an unknown recipe or field, or a bad value.
    """
    base = recipe if isinstance(recipe, Recipe) else None if recipe is None else recipes.read(recipe)
    given = recipes.revise(base or Recipe(), fields).model
    if not given.model and given.init:
        saved = open_model(given.init)
        preset, architecture = architecture_of(saved)
        fields = {**fields, "model": preset, "architecture": {**architecture, **given.architecture}}
        if not given.image_size:
            shortest, longest = _image_size(saved.model, models.configure(preset)[1])
            fields |= {"image_size": shortest, "longest": given.longest or longest}
    elif not given.model:
        fields = {**fields, "model": recipes.DEFAULT_MODEL}
    if base is None:
        base = recipes.of_preset(fields["model"])
    return recipes.revise(base, fields)


def evaluate(
    model: str | Path | Detector,
    data: str | Path,
    *,
    split: str = "val",
    ensemble: bool = False,
    batch_size: int = 8,
    workers: int = 0,
) -> dict[str, float]:
    """The figures of a detector on a split of an annotated folder.

    Args:
        model: a run folder, a model folder, or a loaded detector.
        data: a data set in COCO, Pascal VOC or YOLO format.
        split: the split to evaluate on.
        ensemble: let all decoder layers answer together, overlaps suppressed.
        batch_size: at most so many images go through the model at once; changes nothing but the speed.
        workers: processes that load images.

    Returns:
        COCO's twelve figures and Pascal VOC's AP of 2007 and 2012, in [0, 1]; NaN where undefined.

    Raises:
        DataError: no such split, images that cannot be read, or categories that the model does not know.
        ModelError: no model there.
    """
    return evaluate_in_detail(
        model, data, split=split, ensemble=ensemble, batch_size=batch_size, workers=workers
    ).metrics.figures


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures with what they were computed from."""

    metrics: Metrics
    annotations: Annotations
    detections: list[Detections]


def evaluate_in_detail(model: str | Path | Detector, data: str | Path, *, split: str, **options: Any) -> Evaluation:
    """The same as `evaluate`, with the detections and all tables; takes its options and raises its errors."""
    detector = model if isinstance(model, Detector) else load(model)
    (annotations,) = formats.read(data, split).values()  # `valid` and `val` are the same split
    if not len(annotations):
        raise DataError("The split has no images", where=annotations.source or data, got=split)
    detections = detect(detector, annotations, **options)
    return Evaluation(evaluation.run.evaluate(annotations, detections, voc=True), annotations, detections)


def _image_size(model: Any, preset: Any) -> tuple[int, int]:
    """The image size of a model as a recipe states it; the longer side is 0 where the preset's proportion gives it."""
    config = model.config
    usual = round(preset.longest * config.image_size / preset.image_size)
    return config.image_size, 0 if config.longest == usual else config.longest


def _origin_of_weights(out: Path) -> str:
    """What a run noted of the weights that it started from; they are not needed again to go on."""
    file = out / "data.json"
    notes = json.loads(file.read_text(encoding="utf-8"))["notes"] if file.exists() else []
    return next((note for note in notes if note.startswith(WEIGHTS_NOTES)), "Backbone: of the run's last checkpoint")


def _check_same(out: Path, resolved: Recipe) -> None:
    """Refuse to go on with a run under another recipe."""
    file = out / "recipe.toml"
    if not file.exists():
        raise UsageError("There is no run to go on with", where=out, remedy="Leave out --resume to start one.")
    before, now = recipes.read(file), resolved
    differing = [
        f"{entry.name} ({getattr(getattr(before, section.name), entry.name)!r} before)"
        for section in dataclasses.fields(Recipe)
        for entry in dataclasses.fields(getattr(now, section.name))
        if entry.name not in _FREE_ON_RESUME
        and getattr(getattr(before, section.name), entry.name) != getattr(getattr(now, section.name), entry.name)
    ]
    if differing:
        raise UsageError(
            "The run was begun with another recipe",
            where=out,
            got=", ".join(differing),
            remedy=f"Resume with --recipe {file}.",
        )


def _check_data(out: Path, session: Session) -> None:
    """Refuse to go on with a run on other data: its steps would be others, and its AP not comparable."""
    file = out / "data.json"
    if not file.exists():  # stopped in its very first moment
        return
    before = json.loads(file.read_text(encoding="utf-8"))["splits"]
    for name, part in (("train", session.train), ("val", session.val)):
        now = describe(part)
        if before[name]["fingerprint"] != now["fingerprint"]:
            raise DataError(
                f"The run was begun with other data: its {name} images, boxes or labels have changed",
                where=out,
                got=f"{now['images']} images, {now['boxes']} boxes",
                expected=f"{before[name]['images']} images, {before[name]['boxes']} boxes as they were",
                remedy="Begin a new run, with --init to start from this one's weights.",
            )


def _best_figures(out: Path) -> dict[str, float]:
    """What a run's best checkpoint says of itself."""
    file = standing(out / "checkpoints" / "best") / "config.json"
    if not file.exists():
        return {}
    figures = json.loads(file.read_text(encoding="utf-8"))["about"]["metrics"]
    return {name: math.nan if value is None else value for name, value in figures.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
