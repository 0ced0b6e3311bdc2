"""Turn an official DETR checkpoint into a model folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from detrkit.cli._options import CommonOptions, Switch
from detrkit.cli._terminal import Outcome, Terminal, shell
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.structures import Category


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Turn an official DETR checkpoint into a model folder.

    The architecture is read off the file; every tensor must find its place. Labels of official models are the ids of
    the data set itself, so that the categories say which of them are used: 91 for COCO, of which 80 are.
    """

    weights: tyro.conf.Positional[Path]
    """File of the official repository (.pth) or the same tensors as .safetensors or .npz."""
    out: tyro.conf.Positional[Path]
    """Model folder to make."""
    categories: str = ""
    """Where the names of the categories come from: an annotated data set, or a text file with one name a line, from
    label 0 on. Empty: COCO's where there are 91, else numbers."""
    dilated: Switch = False
    """It is a DC5 model, which its tensors do not show."""
    heads: int = 8
    """Attention heads, which its tensors do not show."""
    half: Switch = False
    """Store the weights in 16 bits."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Convert and write.

    Raises:
        DataError: categories that cannot be read.
        ModelError: a file that cannot be read, or that holds no such model.
        UsageError: an output folder that holds something, or categories that do not fit.
    """
    from detrkit.checkpoint import save_model
    from detrkit.convert import from_official
    from detrkit.nn.weights import read_weight_file

    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise UsageError("The output folder is not empty", where=options.out, remedy="Name a new folder.")
    overrides: dict[str, Any] = {"dilated": options.dilated, "heads": options.heads}
    model = from_official(read_weight_file(options.weights), **overrides)
    config: Any = model.config
    categories = _categories(options.categories, config.num_classes)
    preset = _preset(config)
    save_model(
        options.out,
        model,
        preset=preset,
        categories=categories,
        about={"converted_from": options.weights.name},
        half=options.half,
    )
    number = sum(parameter.numel() for parameter in model.parameters())
    document = {
        "model": options.out,
        "preset": preset,
        "parameters": number,
        "config": dataclasses.asdict(config),
        "categories": [list(category) for category in categories],
    }
    text = (
        f"{preset or 'A model of no preset'}, {number:,} parameters, {config.num_classes} classes, in {options.out}\n"
        f"Use it:  detrkit predict {shell(options.out)} IMAGES --out found"
    )
    return Outcome(document, text=text)


def _preset(config: Any) -> str:
    """The preset that a config is, apart from its classes; empty where it is none."""
    from detrkit import models

    for preset in models.presets():
        if models.configure(preset, num_classes=config.num_classes)[1] == config:
            return preset
    return ""


def _categories(source: str, num_classes: int) -> tuple[Category, ...]:
    """The table of a model whose labels are the ids of its data set."""
    from detrkit.structures import Category

    if source:
        names = _names(source)
        if max(names, default=0) >= num_classes:
            raise UsageError(
                "The categories do not fit the model",
                where=source,
                got=f"an id or line number {max(names)}",
                expected=f"below {num_classes}, the number of the model's classes",
            )
    elif num_classes == 91:
        from detrkit.cli._coco import NAMES as names
    else:
        names = {}
    return tuple(
        Category(label, names.get(label, f"unused-{label}" if names else str(label))) for label in range(num_classes)
    )


def _names(source: str) -> dict[int, str]:
    path = Path(source)
    if path.suffix.lower() in (".txt", ".names"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError("The names cannot be read", where=path, got=error) from error
        return {label: line.strip() for label, line in enumerate(lines) if line.strip()}
    from detrkit.data import formats

    splits = formats.read(path, check_files=False)
    return {category.id: category.name for part in splits.values() for category in part.categories}
