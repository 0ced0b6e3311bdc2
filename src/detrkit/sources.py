"""A model from wherever it lies: our runs and folders, published checkpoints, Hugging Face folders, the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from detrkit import convert, hub, models
from detrkit.checkpoint import SavedModel, load_model, standing
from detrkit.data.coco_names import NAMES as COCO_NAMES
from detrkit.errors import ModelError
from detrkit.structures import Category

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz")
"""Endings of weight files."""

EXPECTED = (
    "a run folder, a checkpoint, a model folder, a published weights file, a Hugging Face folder, or a name on the "
    "Hugging Face hub (organisation/name)"
)

_OF_A_FOLDER = ("config.json", "model.safetensors", "pytorch_model.bin")
_NOT_ARCHITECTURE = {"num_classes", "image_size", "longest"}


def open_model(name: str | Path) -> SavedModel:
    """Read a model of ours or of others.

    Args:
        name: a run folder, a checkpoint or a model folder; a checkpoint file of the official repositories; a folder
            that `transformers` wrote; or `organisation/name` on the Hugging Face hub, with `@revision` where it must be
            that one. What exists as a path is a path.

    Returns:
        The model. Where others wrote it, `origin` says who and `report` what became of each tensor; categories that
        are not known are called `class-0`, `class-1` … (COCO's have their names).

    Raises:
        MissingExtraError: a name on the hub, and `huggingface_hub` is not installed.
        ModelError: nothing there, a damaged file, or weights that are no detector's.
    """
    path = Path(name)
    if standing(path).exists():
        return _read(path)
    text = str(name)
    if isinstance(name, str) and hub.is_name(text) and not _means_path(text):
        folder = hub.fetch(text)
        saved = _read(folder)
        origin = f"{saved.origin or 'detrkit'}, hub revision {folder.name[:8]}"
        return saved._replace(origin=origin, about={**saved.about, "hub": text.partition("@")[0]})
    raise _missing(text)


def architecture_of(saved: SavedModel) -> tuple[str, dict[str, str]]:
    """The preset of a model, and the fields in which its architecture differs from it, as a recipe states them.

    Where the model was built from no preset that is known, it is the nearest one of its variant. The number of classes
    and the sizes of images are no part of it.
    """
    config: Any = saved.model.config
    presets = models.variant(saved.variant).PRESETS
    differing = {preset: differences(config, known) for preset, known in presets.items()}
    preset = saved.preset if saved.preset in presets else min(differing, key=lambda name: len(differing[name]))
    return preset, {name: str(value) for name, (value, _) in differing[preset].items()}


def differences(config: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs of a variant differ, with both values; classes and image sizes do not count."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_ARCHITECTURE]
    pairs = {name: (getattr(config, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _read(path: Path) -> SavedModel:
    if path.is_file() and path.name in _OF_A_FOLDER and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_file():
        return _converted(path)
    if (path / "config.json").is_file():
        return _converted(path) if convert.is_huggingface(path) else load_model(path)
    weights = [file for file in sorted(path.glob("*")) if file.suffix in WEIGHTS] if path.is_dir() else []
    if len(weights) > 1:
        raise ModelError(
            "There is more than one weights file here",
            where=path,
            got=", ".join(file.name for file in weights),
            remedy="Name one of them.",
        )
    return _converted(weights[0]) if weights else load_model(path)


def _converted(path: Path) -> SavedModel:
    found = convert.read(path)
    config: Any = found.model.config
    return SavedModel(
        found.model,
        found.variant,
        found.preset,
        found.categories or _unnamed(config.num_classes),
        {"converted_from": found.origin},
        found.origin,
        found.report,
    )


def _unnamed(count: int) -> tuple[Category, ...]:
    """A table for labels whose names did not come along; the official models of COCO have its ids for labels."""
    names = COCO_NAMES if count == 91 else {}
    return tuple(
        Category(label, names.get(label, f"{'unused' if names else 'class'}-{label}")) for label in range(count)
    )


def _means_path(text: str) -> bool:
    """Whether a text that could be a name on the hub is more likely a mistyped path."""
    return "@" not in text and (Path(text).suffix in WEIGHTS or Path(text).parent.is_dir())


def _missing(text: str) -> ModelError:
    if text in models.presets():
        return ModelError(
            "This is a preset, an architecture without weights",
            where=text,
            expected=EXPECTED,
            remedy=f"Train it with: detrkit train DATA --model {text} --out RUN",
        )
    beside = Path(text).parent
    named = hub.is_name(text) and beside.is_dir()
    return ModelError(
        "There is no such file or folder",
        where=text,
        got=f"a folder {beside} without it" if named else "",
        expected=EXPECTED,
        remedy=f"If you mean the model of that name on the hub, say {text}@main."
        if named
        else "Train one with: detrkit train DATA --out RUN",
    )
