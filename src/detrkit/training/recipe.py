"""The recipe: every choice of a training run, declared once, with its meaning and unit.

The command line, the recipe files and `detrkit.train`'s keywords are made from these dataclasses. `Recipe` is that of a
detector; another task has a dataclass of its own, an `AnyRecipe`, which the functions here take as well.
Importing this module is cheap, for the sake of `--help`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints, overload

from detrkit.documents import read_toml
from detrkit.errors import UsageError, brief, plain

FOLDER = Path(__file__).parent.parent / "recipes"
"""Where the recipes that come with the package lie."""

DEFAULT_MODEL = "conditional-detr-nano"
"""The preset that is trained where neither a model nor weights to start from are named."""


def within(least: int | float, most: int | float = math.inf) -> dict[str, int | float]:
    """The metadata of a field that holds a number: its bounds, which are checked whenever a recipe is made or read."""
    return {"least": least, "most": most}


@dataclass(frozen=True)
class DataOptions:
    """What is trained on."""

    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split that is evaluated during training and chooses the best checkpoint. Where the data has none, it is made.
    The training split itself: a test of whether its images can be learnt by heart."""
    val_fraction: float = field(default=0.0, metadata=within(0, 1))
    """Set this share of the training split aside for validation, instead of a `val_split`, and leave the data's own
    `val` untouched. With 0, the data's own is used, or a tenth of the training split where it has none."""
    annotations: str = ""
    """Format of the annotations that are meant where a folder holds several, such as coco_panoptic. Empty: those that
    list objects before those that list segments."""
    limit: int = field(default=0, metadata=within(0))
    """Use only the first so many images of the training split, and of the validation split; 0: all."""
    group_sizes: bool = True
    """Bring images into a batch that are going to have much the same size, so that little of it is padding. Training by
    example does without."""
    workers: int = field(default=-1, metadata=within(-1))
    """Processes that load images; -1: as many as there are processors, up to 8. Changes nothing but the speed."""


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model: str = ""
    """Preset of the model: detr or conditional-detr with -nano, -r50, -r101, -r50-dc5 or -r101-dc5 (detr also with -r18
    and -r34). Empty: preset, architecture and image size of `init`, or, without it, the usual one:
    conditional-detr-nano, and detr-nano in pre-training."""
    architecture: dict[str, str] = field(default_factory=dict)
    """Fields of the preset to change, such as: num_queries 50 dim 128."""
    image_size: int = field(default=0, metadata=within(0))
    """Shorter side that images are resized to, in pixels; 0: the preset's own."""
    longest: int = field(default=0, metadata=within(0))
    """Limit of the longer side, in pixels; 0: the preset's own, in proportion to the shorter side."""
    backbone_weights: str = ""
    """File with the backbone's weights (safetensors, pth, npz), or `random`. Empty: looked for in $DETRKIT_WEIGHTS and
    in ~/.cache/detrkit/weights. With `init` the backbone is that one: a file is refused, `random` not heeded."""
    init: str = ""
    """Weights that the training starts from: a run or model folder, a published checkpoint file, a Hugging Face folder
    or a name on the hub (organisation/name). For other categories the class head starts anew, and nothing else."""


@dataclass(frozen=True)
class AugmentationOptions:
    """What is done to training images, at random."""

    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a horizontal flip."""
    vertical_flip: float = field(default=0.0, metadata=within(0, 1))
    """Probability of a vertical flip; for pictures without an up."""
    rotate90: float = field(default=0.0, metadata=within(0, 1))
    """Probability of a turn by a multiple of 90 degrees; for pictures without an up."""
    crop: float = field(default=0.5, metadata=within(0, 1))
    """Probability of resizing, cropping and resizing again."""
    multi_scale: bool = True
    """Resize to one of several sizes (480 to 800 pixels in the paper, in proportion elsewhere) instead of one."""
    photometric: float = field(default=0.0, metadata=within(0, 1))
    """Probability of changing brightness, contrast, saturation and hue."""
    min_visible: float = field(default=0.0, metadata=within(0, 1))
    """A box of which a crop leaves less than this share is no longer a target; the paper keeps all (0)."""


@dataclass(frozen=True)
class OptimizationOptions:
    """How it is trained; defaults are the paper's."""

    epochs: int = field(default=300, metadata=within(1))
    """Passes through the training split."""
    batch_size: int = field(default=2, metadata=within(1))
    """Images that go through the model together, in each process."""
    accumulate: int = field(default=1, metadata=within(1))
    """Batches whose gradients make one step, as one large batch would; DETR's classes are averaged batch by batch."""
    lr: float = field(default=1e-4, metadata=within(0))
    """Learning rate of AdamW."""
    backbone_lr: float = field(default=1e-5, metadata=within(0))
    """Learning rate of the backbone; 0 freezes it."""
    freeze: str = ""
    """Parts of the model that do not train, separated by commas, such as: backbone or backbone,encoder."""
    weight_decay: float = field(default=1e-4, metadata=within(0))
    """Weight decay of AdamW."""
    clip: float = field(default=0.1, metadata=within(0))
    """Limit of the gradient's norm; 0: none."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the rates fall: by ten at `drop_at`, along a half cosine to zero, or not at all."""
    drop_at: float = field(default=2 / 3, metadata=within(0, 1))
    """Where the step schedule drops, as a share of the training."""
    warmup: int = field(default=0, metadata=within(0))
    """Steps over which the rates rise from zero."""
    ema: float = field(default=0.0, metadata=within(0, 1))
    """Decay of the exponential moving average of the weights that is evaluated and kept; 0: none."""
    skip_limit: int = field(default=5, metadata=within(0))
    """A step whose loss or gradient is NaN or infinite changes nothing. After so many in a row, or a whole epoch of
    them, the run goes back to its last checkpoint and on at half the rates. 0: the first such step ends the run."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Arithmetic of the forward pass; weights stay in fp32. `auto`: bf16 where the machine has it, else fp32."""
    channels_last: bool = True
    """Lay images out with the channels last, which is faster on processors and recent GPUs."""
    recompute: Literal["none", "transformer", "all"] = "none"
    """Layers that are computed again for their gradients (activation checkpointing): less memory for more time."""


@dataclass(frozen=True)
class RunOptions:
    """How the run is kept."""

    seed: int = field(default=0, metadata=within(0))
    """Seed of initialisation, order, augmentation and dropout: the same seed, the same
    run, on a CPU with the same number of threads."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""
    threads: int = field(default=0, metadata=within(0))
    """Threads of torch on the CPU; 0: torch's own choice. Another number changes the last bits of the results."""
    evaluate_every: int = field(default=1, metadata=within(1))
    """Epochs between evaluations."""
    save_every: int = field(default=1, metadata=within(1))
    """Epochs between checkpoints."""
    save_minutes: float = field(default=5.0, metadata=within(0))
    """Minutes between further checkpoints inside an epoch, so that little is lost when the machine stops; more where
    they would take over a hundredth of the time. 0: none. Changes no result."""
    log_every: int = field(default=20, metadata=within(1))
    """Steps between lines of metrics."""
    samples: int = field(default=4, metadata=within(0))
    """Validation images whose detections are drawn at each evaluation."""
    tensorboard: bool = False
    """Also write events for TensorBoard (extra `tensorboard`)."""


class AnyRecipe:
    """The recipe of some task: what a frozen dataclass of sections inherits from, each of which has a default.

    The names of the fields are unique over all sections. `model`, `optimization` and `run` are sections of every
    recipe.

    Attributes:
        task: what its files begin with, to be told from those of other tasks; those of a detector say nothing.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    task: ClassVar[str]
    model: ModelOptions
    optimization: OptimizationOptions
    run: RunOptions


Kind = TypeVar("Kind", bound=AnyRecipe)


@dataclass(frozen=True)
class Recipe(AnyRecipe):
    """A training run."""

    task: ClassVar[str] = ""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)


def fields(kind: type[AnyRecipe] = Recipe) -> dict[str, tuple[str, Any, Any]]:
    """Every field by its name, which is unique: its section, its type and its default."""
    table, usual = {}, kind()
    for section in dataclasses.fields(kind):
        part = getattr(usual, section.name)
        hints = get_type_hints(type(part))
        for entry in dataclasses.fields(part):
            table[entry.name] = (section.name, hints[entry.name], getattr(part, entry.name))
    return table


def revise(recipe: Kind, changes: Mapping[str, Any], where: str = "") -> Kind:
    """The recipe with fields replaced by name.

    Raises:
        UsageError: an unknown field (offers the nearest), or a value of the wrong type.
    """
    table = fields(type(recipe))
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in table:
            close = difflib.get_close_matches(name, table, 1, 0.4)
            raise UsageError(
                "The recipe has no such field",
                where=where,
                got=repr(name),
                remedy=f"Did you mean {close[0]!r}?" if close else f"Known are: {', '.join(table)}.",
            )
        section, kind, _ = table[name]
        by_section.setdefault(section, {})[name] = _checked(name, value, kind, where)
    parts = {section: dataclasses.replace(getattr(recipe, section), **values) for section, values in by_section.items()}
    revised = dataclasses.replace(recipe, **parts)
    _check_bounds(revised, where)
    return revised


@overload
def read(name: str | Path) -> Recipe: ...
@overload
def read(name: str | Path, base: Kind) -> Kind: ...
def read(name: str | Path, base: AnyRecipe | None = None) -> AnyRecipe:
    """A recipe from a TOML file, or one that comes with the package, by name.

    Sections are those of `base`, by default of `Recipe`: `[data]`, `[model]`, `[augmentation]`, `[optimization]` and
    `[run]`. What is not said stays as in `base`.

    Raises:
        UsageError: no such file or name, not TOML, the recipe of another task, an unknown section or field, a bad
            value.
    """
    base = base or Recipe()
    kind = type(base)
    file = find(name, kind)
    content = _content(file)
    if (task := content.pop("task", "")) != kind.task:
        raise UsageError(
            "This is a recipe of another task",
            where=file,
            got=f"task = {task!r}" if task else "no task, as for a detector",
            expected=f"task = {kind.task!r}" if kind.task else "no task, as for a detector",
            remedy=f"Recipes of this task begin with: task = {_toml(kind.task)}" if kind.task else "",
        )
    table, changes = fields(kind), {}
    sections = {section for section, _, _ in table.values()}
    for section, values in content.items():
        if section not in sections or not isinstance(values, dict):
            close = difflib.get_close_matches(section, sections, 1, 0.4)
            raise UsageError(
                "The recipe has no such section",
                where=file,
                got=repr(section),
                expected=", ".join(sorted(sections)),
                remedy=f"Did you mean [{close[0]}]?" if close else "",
            )
        for key, value in values.items():
            if key in table and table[key][0] != section:
                raise UsageError(f"The field {key!r} belongs to the section [{table[key][0]}]", where=file)
            changes[key] = value
    return revise(base, changes, str(file))


def find(name: str | Path, kind: type[AnyRecipe] = Recipe) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        UsageError: there is neither; lists the names of those of this kind.
    """
    if (path := Path(name)).is_file():
        return path
    if (packaged := FOLDER / f"{name}.toml").is_file():
        return packaged
    known = ", ".join(packaged_names(kind))
    raise UsageError("There is no such recipe", got=repr(str(name)), expected=f"a TOML file or one of {known}")


def task_of(name: str | Path, kind: type[AnyRecipe] = Recipe) -> str:
    """The task that a recipe is for; empty for a detector. Arguments as of `find`.

    Raises:
        UsageError: there is no such recipe, or it is not TOML.
    """
    return str(_content(find(name, kind)).get("task", ""))


def packaged_names(kind: type[AnyRecipe] = Recipe) -> list[str]:
    """The names of the recipes of a kind that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml") if _content(file).get("task", "") == kind.task)


@overload
def of_preset(preset: str) -> Recipe: ...
@overload
def of_preset(preset: str, base: Kind) -> Kind: ...
def of_preset(preset: str, base: AnyRecipe | None = None) -> AnyRecipe:
    """The recipe that comes with the package for a preset; without one, `base` with that preset.

    That of a detector is named like the preset. That of another task is named by the task and the preset, or names the
    preset as its model.

    Raises:
        UsageError: the packaged file cannot be read.
    """
    base = base or Recipe()
    packaged = FOLDER / f"{base.task}{'-' if base.task else ''}{preset}.toml"
    if packaged.is_file():
        return read(packaged, base)
    names = packaged_names(type(base)) if base.task else ()
    fitting = (name for name in names if _content(FOLDER / f"{name}.toml").get("model", {}).get("model") == preset)
    return read(name, base) if (name := next(fitting, "")) else revise(base, {"model": preset})


def to_toml(recipe: AnyRecipe) -> str:
    """The whole recipe as TOML; reading it gives the same recipe."""
    lines = [f"task = {_toml(recipe.task)}", ""] if recipe.task else []
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        lines.append(f"[{section.name}]")
        lines += [f"{entry.name} = {_toml(getattr(part, entry.name))}" for entry in dataclasses.fields(part)]
        lines.append("")
    return "\n".join(lines)


def _content(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file)
    except (OSError, ValueError) as error:
        raise UsageError("The recipe cannot be read", where=file, got=str(error)) from error


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return repr(value)


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    value = plain(value)
    if get_origin(kind) is Literal:
        fits, expected = value in get_args(kind), ", ".join(map(repr, get_args(kind)))
    elif get_origin(kind) is dict:
        fits, expected = isinstance(value, Mapping), "a table"
        value = {str(key): brief(plain(entry)) for key, entry in value.items()} if fits else value
    elif kind is float:
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        value = _as_float(value) if fits else value
    else:
        fits, expected = type(value) is kind, cast(type, kind).__name__
        if kind is str and isinstance(value, Path):
            fits, value = True, str(value)
    if not fits:
        got = repr(value) if isinstance(value, str) else brief(value)
        raise UsageError(f"Bad value for {name}", where=where, got=got, expected=expected)
    return value


def _as_float(value: int | float) -> float:
    """A float; infinite where an integer is too large for one."""
    return float(value) if abs(value) < 1e300 or value != value else math.inf


def _check_bounds(recipe: AnyRecipe, where: str) -> None:
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        for entry in dataclasses.fields(part):
            value, least, most = getattr(part, entry.name), entry.metadata.get("least"), entry.metadata.get("most")
            if isinstance(value, float) and not math.isfinite(value):
                expected = "a finite number"
            elif least is None or most is None or least <= value <= most:
                continue
            else:
                expected = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UsageError(f"Bad value for {entry.name}", where=where, got=value, expected=expected)
