"""Training and evaluation as one call each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from detrkit import models
from detrkit.data.annotations import Annotations
from detrkit.errors import DataError, UsageError
from detrkit.evaluation.run import Metrics
from detrkit.one_shot.protocol import DRAWS
from detrkit.panoptic import PanopticMap
from detrkit.predict import Detector, load
from detrkit.sources import architecture_of, open_model
from detrkit.structures import Detections
from detrkit.training import advice
from detrkit.training import recipe as recipes
from detrkit.training.by_example import SHOTS, ByExample, evaluate_by_example, refuse_draws
from detrkit.training.conduct import check_folder, conduct
from detrkit.training.distributed import World
from detrkit.training.episode_recipe import EpisodeRecipe
from detrkit.training.episodes import prepare_episodes
from detrkit.training.events import Event
from detrkit.training.judged_on import judged_on
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.recipe import AnyRecipe, Recipe
from detrkit.training.segmentation import prepare_segmentation
from detrkit.training.session import Session
from detrkit.training.setup import prepare
from detrkit.training.tasks import of_task, task_with
from detrkit.training.validation import judge


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
    task: str = "",
    masks: bool = False,
    recipe: AnyRecipe | str | Path | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    notes: Sequence[str] = (),
    **fields: Any,
) -> Run:
    """Train a detector on an annotated folder.

    Where neither a recipe nor a model nor weights to start from are named, preset, resolution, queries, epochs and
    batches are chosen by the data and the machine; the run's notes say why.

    Args:
        data: a data set in COCO, Pascal VOC or YOLO format; which one is recognised.
        out: the run folder to make.
        task: what is trained for: `detection` of the data's classes, `segmentation` of them with masks, or `one-shot`,
            to find whatever is like an example that it is shown. Empty: that of the recipe, else `detection`.
        masks: the same as the task `segmentation`.
        recipe: a recipe of the task, a TOML file, or the name of a recipe that comes with the package; by default the
            one named like the model's preset, where there is one. A run that goes on has its own.
        resume: go on with the run in `out` where its last checkpoint stands.
        on_event: called with every event, such as a step or an evaluation. By default Python's logging is told, under
            the name `detrkit`: warnings are seen, and the course of it after `logging.basicConfig(level=logging.INFO)`.
        notes: what the run notes first, such as why its recipe is what it is.
        **fields: any field of the recipe, such as `model="detr-r50"`, `epochs=50`, `lr=1e-4`, or
            `init="facebook/detr-resnet-50"` to start from the weights, and with the architecture, of another model.

    Returns:
        The run, with the figures of its best checkpoint.

    Raises:
        DataError: the data cannot be used; says what is wrong where.
        ModelError: weights that are missing or do not fit.
        UsageError: a task or field that does not exist, or an `out` that holds another run.
    """
    if not isinstance(data, str | Path):
        raise UsageError(
            "A training has one data set", where="data", got=type(data).__name__, expected="its folder or its file"
        )
    out = Path(out)
    check_folder(out)
    if resume and recipe is None and (out / "recipe.toml").exists():
        recipe = out / "recipe.toml"
    usual = of_task(task_with(task, masks=masks), recipe)
    if recipe is None and isinstance(usual, Recipe) and not (fields.get("model") or fields.get("init")):
        resolved, why = advised(data, fields)
        notes = (*notes, *why)
    else:
        resolved = resolve(recipe, fields, usual, recipes.DEFAULT_MODEL)

    def open_session(here: World, came_from: str) -> Session[Any]:
        session: Session[Any]
        if isinstance(resolved, EpisodeRecipe):
            session = prepare_episodes(resolved, data, here, came_from=came_from)
        elif isinstance(resolved, SegmentationRecipe):
            session = prepare_segmentation(resolved, data, here, came_from=came_from)
        else:
            assert isinstance(resolved, Recipe)
            session = prepare(resolved, data, here, came_from=came_from)
        return dataclasses.replace(session, notes=(*notes, *session.notes))

    best = conduct(resolved, open_session, out, str(data), resume=resume, on_event=on_event)
    return Run(out, best)


def advised(data: str | Path, fields: dict[str, Any]) -> tuple[AnyRecipe, tuple[str, ...]]:
    """The recipe that suits a data set and this machine, with fields replaced, and the reasons of what was chosen.

    Neither a model nor weights to start from are among the fields.

    Raises:
        UsageError: an unknown field, or a bad value.
    """
    fields = {name: value for name, value in fields.items() if name not in ("model", "init")}  # which are empty
    choices = advice.without(advice.advice_for(data, recipes.revise(Recipe(), fields)), fields)
    if not choices:
        return resolve(None, fields, Recipe(), recipes.DEFAULT_MODEL), ()
    recipe = advice.revised(choices)
    architecture = {**recipe.model.architecture, **fields.get("architecture", {})}
    recipe = recipes.revise(recipe, {**fields, "architecture": architecture})
    return recipe, advice.reasons(choices, recipe)


@overload
def resolve(recipe: Recipe | str | Path | None, fields: dict[str, Any]) -> Recipe: ...
@overload
def resolve(
    recipe: recipes.Kind | str | Path | None, fields: dict[str, Any], usual: recipes.Kind, default_model: str
) -> recipes.Kind: ...
def resolve(
    recipe: AnyRecipe | str | Path | None,
    fields: dict[str, Any],
    usual: AnyRecipe | None = None,
    default_model: str = recipes.DEFAULT_MODEL,
) -> AnyRecipe:
    """The recipe of a run: the packaged one of the preset, or the one named, with fields replaced.

    A run that starts from other weights and names no model takes preset, architecture and image size from there.

    Args:
        recipe: a recipe, a TOML file, or the name of one that comes with the package.
        fields: of the recipe, by name.
        usual: the task's recipe with all its defaults; by default that of a detector.
        default_model: the preset where nothing says which.

    Raises:
        ModelError: the weights to start from are not there or cannot be read.
        UsageError: an unknown recipe or field, or a bad value.
    """
    usual = usual or Recipe()
    base = recipe if isinstance(recipe, AnyRecipe) else None if recipe is None else recipes.read(recipe, usual)
    given = recipes.revise(base or usual, fields).model
    if not given.model and given.init:
        saved = open_model(given.init)
        preset, architecture = architecture_of(saved)
        fields = {**fields, "model": preset, "architecture": {**architecture, **given.architecture}}
        if not given.image_size:
            shortest, longest = _image_size(saved.model, models.configure(preset)[1])
            fields |= {"image_size": shortest, "longest": given.longest or longest}
    elif not given.model:
        fields = {**fields, "model": default_model}
    if base is None:
        base = recipes.of_preset(fields["model"], usual)
    return recipes.revise(base, fields)


def evaluate(
    model: str | Path | Detector,
    data: str | Path,
    *,
    split: str = "val",
    ensemble: bool = False,
    batch_size: int = 8,
    workers: int = 0,
    draws: int = DRAWS,
    shots: int = SHOTS,
    annotations: str = "",
) -> dict[str, float]:
    """The figures of a detector on a split of an annotated folder.

    One that was trained on episodes is asked about each class that an image holds, shown by objects in other images
    (Hsieh et al., "One-Shot Object Detection with Co-Attention and Co-Excitation", NeurIPS 2019).

    Args:
        model: a run folder, a model folder, or a loaded detector.
        data: a data set in COCO, Pascal VOC or YOLO format.
        split: the split to evaluate on; where there is no "val", a run folder is evaluated on what the run validated
            on.
        ensemble: let all decoder layers answer together, overlaps suppressed.
        batch_size: at most so many images go through the model at once; changes nothing but the speed.
        workers: processes that load images.
        draws: of a model that finds by example: draws of exemplars, over which figures are means.
        shots: of a model that finds by example: exemplars for each question.
        annotations: the format that is meant where the folder holds several, such as "coco_panoptic".

    Returns:
        COCO's twelve figures and Pascal VOC's AP of 2007 and 2012, in [0, 1]; NaN where undefined. Of a model with a
        mask head, on data with masks, COCO's figures of masks, too (`mask_AP` and so on), and on panoptic data panoptic
        quality (`PQ`, `SQ`, `RQ`, and the same of things and of stuff). Of a model that finds by example AP50 of seen
        and of unseen classes, their spread and ratio, and how honest its scores are.

    Raises:
        DataError: no such split, images that cannot be read, categories that the model does not know, or, of a model
            that finds by example, no class in two images.
        ModelError: no model there.
        UsageError: a number that makes no sense, or an option that is not for this kind of model.
    """
    return evaluate_in_detail(
        model,
        data,
        split=split,
        ensemble=ensemble,
        batch_size=batch_size,
        workers=workers,
        draws=draws,
        shots=shots,
        annotations=annotations,
    ).figures


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures with what they were computed from."""

    metrics: Metrics
    annotations: Annotations
    detections: list[Detections]
    maps: list[PanopticMap]

    @property
    def figures(self) -> dict[str, float]:
        """All of them by name."""
        return self.metrics.figures


def evaluate_in_detail(
    model: str | Path | Detector,
    data: str | Path,
    *,
    split: str,
    draws: int = DRAWS,
    shots: int = SHOTS,
    annotations: str = "",
    **options: Any,
) -> Evaluation | ByExample:
    """The same as `evaluate`, with the detections and all tables; takes its options and raises its errors."""
    detector = model if isinstance(model, Detector) else load(model)
    masks: Literal["any", False] = "any" if detector.segmenter is not None else False
    truth, _ = judged_on(model, data, split, masks=masks, annotations=annotations)
    if not len(truth):
        raise DataError("The split has no images", where=truth.source or data, got=split)
    if detector.one_shot is not None:
        return evaluate_by_example(detector, truth, draws=draws, shots=shots, **options)
    refuse_draws(draws, shots)
    metrics, detections, maps = judge(detector, truth, voc=True, **options)
    return Evaluation(metrics, truth, detections, maps)


def _image_size(model: Any, preset: Any) -> tuple[int, int]:
    """The image size of a model as a recipe states it; the longer side is 0 where the preset's proportion gives it."""
    config = model.config
    usual = round(preset.longest * config.image_size / preset.image_size)
    return config.image_size, 0 if config.longest == usual else config.longest
