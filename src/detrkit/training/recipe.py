"""The recipe: every choice of a training run, declared once, with its meaning and unit.

The command line, the recipe files and `detrkit.train`'s keywords are made from these dataclasses. Importing this module
is cheap, for the sake of `--help`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from detrkit.errors import UsageError

FOLDER = Path(__file__).parent.parent / "recipes"
"""Where the recipes that come with the package lie."""

DEFAULT_MODEL = "conditional-detr-nano"
"""The preset that is trained where neither a model nor weights to start from are named."""


@dataclass(frozen=True)
class DataOptions:
    """What is trained on."""

    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split that is evaluated during training and chooses the best checkpoint. Where the data has none, it is made.
    The training split itself: a test of whether its images can be learnt by heart."""
    val_fraction: float = 0.0
    """Set this share of the training split aside for validation and leave the data's own `val` untouched. With 0, the
    data's own is used, or a tenth of the training split where it has none."""
    limit: int = 0
    """Use only the first so many images of the training split, and of the validation split; 0: all."""
    workers: int = -1
    """Processes that load images; -1: as many as there are processors, up to 8. Changes nothing but the speed."""


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model: str = ""
    """Preset of the model, such as detr-r50. Empty: preset, architecture and image size of `init`, or, without it,
    conditional-detr-nano."""
    architecture: dict[str, str] = field(default_factory=dict)
    """Fields of the preset to change, such as: num_queries 50 dim 128."""
    image_size: int = 0
    """Shorter side that images are resized to, in pixels; 0: the preset's own."""
    longest: int = 0
    """Limit of the longer side, in pixels; 0: the preset's own, in proportion to the shorter side."""
    backbone_weights: str = ""
    """File with the backbone's weights (safetensors, pth, npz), or `random`. Empty: looked for in $DETRKIT_WEIGHTS and
    in ~/.cache/detrkit/weights."""
    init: str = ""
    """Weights that the training starts from: a run or model folder, a published checkpoint file, a Hugging Face folder
    or a name on the hub (organisation/name). For other categories the class head starts anew, and nothing else."""


@dataclass(frozen=True)
class AugmentationOptions:
    """What is done to training images, at random."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip; for pictures without an up."""
    rotate90: float = 0.0
    """Probability of a turn by a multiple of 90 degrees; for pictures without an up."""
    crop: float = 0.5
    """Probability of resizing, cropping and resizing again."""
    multi_scale: bool = True
    """Resize to one of several sizes (480 to 800 pixels in the paper, in proportion elsewhere) instead of one."""
    photometric: float = 0.0
    """Probability of changing brightness, contrast, saturation and hue."""
    min_visible: float = 0.0
    """A box of which a crop leaves less than this share is no longer a target; the paper keeps all (0)."""


@dataclass(frozen=True)
class OptimizationOptions:
    """How it is trained; defaults are the paper's."""

    epochs: int = 300
    """Passes through the training split."""
    batch_size: int = 2
    """Images that go through the model together, in each process."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    backbone_lr: float = 1e-5
    """Learning rate of the backbone; 0 freezes it."""
    freeze: str = ""
    """Parts of the model that do not train, separated by commas, such as: backbone or backbone,encoder."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    clip: float = 0.1
    """Limit of the gradient's norm; 0: none."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the rates fall: by ten at `drop_at`, along a half cosine to zero, or not at all."""
    drop_at: float = 2 / 3
    """Where the step schedule drops, as a share of the training."""
    warmup: int = 0
    """Steps over which the rates rise from zero."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights that is evaluated and kept; 0: none."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Arithmetic of the forward pass; weights stay in fp32. `auto`: bf16 where the machine has it, else fp32."""
    channels_last: bool = True
    """Lay images out with the channels last, which is faster on processors and recent GPUs."""


@dataclass(frozen=True)
class RunOptions:
    """How the run is kept."""

    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout: the same seed, the same
    run, on a CPU with the same number of threads."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""
    threads: int = 0
    """Threads of torch on the CPU; 0: torch's own choice. Another number changes the last bits of the results."""
    evaluate_every: int = 1
    """Epochs between evaluations."""
    save_every: int = 1
    """Epochs between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics."""
    samples: int = 4
    """Validation images whose detections are drawn at each evaluation."""
    tensorboard: bool = False
    """Also write events for TensorBoard (extra `tensorboard`)."""


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)


def fields() -> dict[str, tuple[str, Any, Any]]:
    """Every field by its name, which is unique: its section, its type and its default."""
    table = {}
    for section in dataclasses.fields(Recipe):
        kind = get_type_hints(Recipe)[section.name]
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            table[entry.name] = (section.name, hints[entry.name], getattr(kind(), entry.name))
    return table


def revise(recipe: Recipe, changes: Mapping[str, Any], where: str = "") -> Recipe:
    """The recipe with fields replaced by name.

    Raises:
        UsageError: an unknown field (offers the nearest), or a value of the wrong type.
    """
    table = fields()
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
    return _validated(dataclasses.replace(recipe, **parts), where)


def read(name: str | Path, base: Recipe | None = None) -> Recipe:
    """A recipe from a TOML file, or one that comes with the package, by name.

    Sections are `[data]`, `[model]`, `[augmentation]`, `[optimization]` and `[run]`. What is not said stays as in
    `base`.

    Raises:
        UsageError: no such file or name, not TOML, an unknown section or field, a bad value.
    """
    file = find(name)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("The recipe cannot be read", where=file, got=str(error)) from error
    table, changes = fields(), {}
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
    return revise(base or Recipe(), changes, str(file))


def find(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        UsageError: there is neither; lists the names.
    """
    if (path := Path(name)).is_file():
        return path
    if (packaged := FOLDER / f"{name}.toml").is_file():
        return packaged
    known = sorted(file.stem for file in FOLDER.glob("*.toml"))
    raise UsageError(
        "There is no such recipe", got=repr(str(name)), expected=f"a TOML file or one of {', '.join(known)}"
    )


def of_preset(preset: str) -> Recipe:
    """The recipe that comes with the package for a preset; without one, the defaults with that preset.

    Raises:
        UsageError: the packaged file cannot be read.
    """
    packaged = FOLDER / f"{preset}.toml"
    return read(packaged) if packaged.is_file() else revise(Recipe(), {"model": preset})


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML; reading it gives the same recipe."""
    lines = []
    for section in dataclasses.fields(Recipe):
        part = getattr(recipe, section.name)
        lines.append(f"[{section.name}]")
        lines += [f"{entry.name} = {_toml(getattr(part, entry.name))}" for entry in dataclasses.fields(part)]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return repr(value)


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        fits, expected = value in get_args(kind), ", ".join(map(repr, get_args(kind)))
    elif get_origin(kind) is dict:
        fits, expected = isinstance(value, Mapping), "a table"
        value = {str(key): str(entry) for key, entry in value.items()} if fits else value
    elif kind is float:
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        value = float(value) if fits else value
    else:
        fits, expected = type(value) is kind, cast(type, kind).__name__
        if kind is str and isinstance(value, Path):
            fits, value = True, str(value)
    if not fits:
        raise UsageError(f"Bad value for {name}", where=where, got=repr(value), expected=expected)
    return value


_AT_LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "evaluate_every": 1, "save_every": 1, "log_every": 1, "samples": 0,
    "lr": 0, "backbone_lr": 0, "weight_decay": 0, "clip": 0, "warmup": 0, "limit": 0, "workers": -1, "image_size": 0,
    "longest": 0, "threads": 0, "seed": 0,
}  # fmt: skip
_SHARES = ("flip", "vertical_flip", "rotate90", "crop", "photometric", "min_visible", "val_fraction", "ema", "drop_at")


def _validated(recipe: Recipe, where: str) -> Recipe:
    for name, (section, _, _) in fields().items():
        value = getattr(getattr(recipe, section), name)
        if name in _AT_LEAST and not value >= _AT_LEAST[name]:
            raise UsageError(f"Bad value for {name}", where=where, got=value, expected=f"at least {_AT_LEAST[name]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"Bad value for {name}", where=where, got=value, expected="a finite number")
        if name in _SHARES and not 0 <= value <= 1:
            raise UsageError(f"Bad value for {name}", where=where, got=value, expected="between 0 and 1")
    return recipe
