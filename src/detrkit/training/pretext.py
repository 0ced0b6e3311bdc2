"""The recipes of the pretext tasks: every choice of a pre-training, declared once, with its meaning and unit.

Defaults are those of the papers and of their official code. Importing this module is cheap, for the sake of `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from detrkit.errors import UsageError
from detrkit.training.recipe import AnyRecipe, ModelOptions, OptimizationOptions, RunOptions, task_of, within

DEFAULT_MODELS = {"up-detr": "conditional-detr-nano", "backbone": "detr-nano"}
"""The preset that each task pre-trains where neither a model nor weights to start from are named."""


@dataclass(frozen=True)
class ImageOptions:
    """What is trained on: images without labels."""

    val_fraction: float = field(default=0.05, metadata=within(0, 1))
    """Share of the images that is held out, to measure on them what has been learnt."""
    val_limit: int = field(default=200, metadata=within(0))
    """Evaluate on so many of the held-out images, spread over all of them; 0: on all."""
    limit: int = field(default=0, metadata=within(0))
    """Train on so many of the other images, spread over all of them; 0: on all."""
    workers: int = field(default=-1, metadata=within(-1))
    """Processes that load images; -1: as many as there are processors, up to 8. Changes nothing but the speed."""


@dataclass(frozen=True)
class PatchOptions:
    """What is asked for: random query patch detection (UP-DETR, CVPR 2021)."""

    shown: Literal["crops", "features"] = "crops"
    """What the detector is shown of a patch: a crop that goes through the backbone, as in the paper; or the mean of
    what the backbone says of the place in the mirrored image. For the latter every image goes through the backbone but
    once, and a step costs a fraction; it takes a frozen backbone and images of one size."""
    patches: int = field(default=10, metadata=within(1))
    """Patches that are cut out of each image; the queries form as many groups, and each group looks for one patch."""
    patch_size: int = field(default=128, metadata=within(1))
    """Side that crops are scaled to, in pixels; of features, only for the pictures of the report."""
    crops: Literal["uniform", "stratified"] = "uniform"
    """Where patches are cut: by the official rule, whose boxes are mostly large and long; or of all sizes alike."""
    smallest: float = field(default=0.08, metadata=within(0, 1))
    """Lowest size of a stratified crop: the root of its share of the image's area."""
    largest: float = field(default=0.7, metadata=within(0, 1))
    """Highest size of a stratified crop: the root of its share of the image's area."""
    most_elongated: float = field(default=3.0, metadata=within(1))
    """Longest side over shortest of a stratified crop."""
    jitter: float = field(default=0.8, metadata=within(0, 1))
    """Probability with which a crop is shown in other colours; features have none."""
    grayscale: float = field(default=0.2, metadata=within(0, 1))
    """Probability with which a crop is shown without colours; features have none."""
    blur: float = field(default=0.5, metadata=within(0, 1))
    """Probability with which a crop is blurred; features are not."""
    mask_out: float = field(default=0.1, metadata=within(0, 1))
    """Probability with which a query is not shown its patch."""
    mask_out_of: Literal["queries", "patches"] = "queries"
    """What is masked out: single queries, as in the official code, or patches with all their queries, as in the
    paper."""
    shuffle: bool = False
    """Exchange the queries among the groups at every step."""
    place: Literal["position", "content", "both"] = "position"
    """What of a query the patch is added to."""
    start: Literal["random", "tokens"] = "random"
    """How the projection of patches starts: at random, or as the projection of the image's tokens."""
    match: Literal["all", "group"] = "all"
    """Among whom the query is chosen that answers for a patch: all, as in the official code, or the patch's group."""
    tie_no_object: bool = True
    """Weigh no-object by the share of queries that find something, as in the paper, instead of as the preset does."""
    reconstruction_weight: float = field(default=1.0, metadata=within(0))
    """Weight of telling the patch's feature; 0: there is no such head."""
    regions_weight: float = field(default=0.0, metadata=within(0))
    """Weight of a second question, after DETReg: where in the image does something stand out? It is asked without any
    patch, so that the queries learn what they will do in the end. 0: it is not asked. Takes `shown` = features."""
    regions: int = field(default=20, metadata=within(1))
    """The most regions that stand out in an image."""
    train_backbone: bool = False
    """Train the backbone, too, at `backbone_lr`; the paper found that detectors lose by it (table 5)."""
    shortest: int = field(default=480, metadata=within(0))
    """Shorter side of the images in pre-training, in pixels; the longer is at most 5/4 of it. 0: the model's own sizes.
    The model's own image size, for which it is kept, is another."""
    multi_scale: bool = True
    """Resize images to one of several sizes (320 to 480 pixels in the paper, in proportion elsewhere)."""
    group_sizes: bool = True
    """Bring features of much the same size into a batch, so that little of it is padding. The sizes of crops' images
    are not known beforehand: these meet by chance."""
    flip: float = field(default=0.0, metadata=within(0, 1))
    """Probability of a mirror image."""


@dataclass(frozen=True)
class ViewOptions:
    """What is asked for: that two views of an image are told to be the same (Barlow Twins, ICML 2021)."""

    view_size: int = field(default=224, metadata=within(1))
    """Side of a view, in pixels."""
    smallest: float = field(default=0.08, metadata=within(0, 1))
    """Lowest share of the image's area that a view shows."""
    largest: float = field(default=1.0, metadata=within(0, 1))
    """Highest share of the image's area that a view shows."""
    most_elongated: float = field(default=4 / 3, metadata=within(1))
    """Longest side over shortest of what a view shows."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a mirror image."""
    vertical_flip: float = field(default=0.0, metadata=within(0, 1))
    """Probability of turning a view upside down; for pictures without an up."""
    rotate90: float = field(default=0.0, metadata=within(0, 1))
    """Probability of a turn by a multiple of 90 degrees; for pictures without an up."""
    jitter: float = field(default=0.8, metadata=within(0, 1))
    """Probability of other colours."""
    grayscale: float = field(default=0.2, metadata=within(0, 1))
    """Probability of no colours."""
    blur: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a blur."""
    width: int = field(default=8192, metadata=within(2))
    """Numbers of an embedding."""
    redundancy_weight: float = field(default=0.005, metadata=within(0))
    """Weight of what the numbers of an embedding have in common."""


def _of_patches() -> OptimizationOptions:
    return OptimizationOptions(epochs=60, batch_size=32)


def _of_views() -> OptimizationOptions:
    return OptimizationOptions(epochs=300, batch_size=64, lr=1e-3, backbone_lr=1e-3, clip=0.0, schedule="cosine")


def _from_nothing() -> ModelOptions:
    return ModelOptions(backbone_weights="random")


@dataclass(frozen=True)
class PatchRecipe(AnyRecipe):
    """A pre-training of a detector by random query patch detection."""

    task: ClassVar[str] = "up-detr"

    images: ImageOptions = field(default_factory=ImageOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    pretext: PatchOptions = field(default_factory=PatchOptions)
    optimization: OptimizationOptions = field(default_factory=_of_patches)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class BackboneRecipe(AnyRecipe):
    """A pre-training of the backbone of a model alone. Its optimiser is AdamW, the paper's LARS."""

    task: ClassVar[str] = "backbone"

    images: ImageOptions = field(default_factory=ImageOptions)
    model: ModelOptions = field(default_factory=_from_nothing)
    pretext: ViewOptions = field(default_factory=ViewOptions)
    optimization: OptimizationOptions = field(default_factory=_of_views)
    run: RunOptions = field(default_factory=RunOptions)


PretextRecipe = PatchRecipe | BackboneRecipe
"""The recipes of all pretext tasks."""

TASKS: dict[str, type[PatchRecipe] | type[BackboneRecipe]] = {kind.task: kind for kind in (PatchRecipe, BackboneRecipe)}
"""Each pretext task with its kind of recipe."""


def of_task(task: str, recipe: str | Path | None = None) -> PretextRecipe:
    """The recipe of a task, all defaults.

    Args:
        task: its name. Empty: that which `recipe` is for, or, without it, `up-detr`.
        recipe: a TOML file, or the name of one that comes with the package.

    Raises:
        UsageError: there is no such task or recipe.
    """
    if not task and recipe is not None and (named := task_of(recipe, PatchRecipe)) in TASKS:
        task = named  # any other is refused where the file is read
    task = task or PatchRecipe.task
    if task not in TASKS:
        raise UsageError("There is no such task", where="task", got=repr(task), expected=f"one of {', '.join(TASKS)}")
    return TASKS[task]()
