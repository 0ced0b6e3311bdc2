"""A model from wherever it lies: our runs and folders, published checkpoints, Hugging Face folders, the hub."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from detrkit import convert, hub, models
from detrkit.checkpoint import SavedModel, load_model
from detrkit.convert import Conversion
from detrkit.data.coco_names import NAMES, STUFF
from detrkit.errors import ModelError
from detrkit.holders import attach_mask_head, has_mask_head
from detrkit.structures import Category
from detrkit.whole import standing

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz")
"""Endings of weight files."""

EXPECTED = (
    "a run folder, a checkpoint, a model folder, a published weights file, a Hugging Face folder, or a name on the "
    "Hugging Face hub (organisation/name)"
)

_OF_A_FOLDER = ("config.json", "model.safetensors", "pytorch_model.bin")
_NOT_ARCHITECTURE = {"num_classes", "image_size", "longest"}


class Place(NamedTuple):
    """Where a model lies.

    Attributes:
        name: what the caller called it.
        path: a weights file of others, or a folder: of ours, or a Hugging Face folder.
        hub: its name on the hub, without the revision; empty for what lies here.
        revision: the beginning of the commit on the hub.
    """

    name: str
    path: Path
    hub: str = ""
    revision: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is to be read by `load_model`, and not by `read_weights`."""
        return not self.path.is_file() and not convert.is_huggingface(self.path)

    def origin(self, author: str) -> str:
        """Who wrote it and, of what was fetched, the revision."""
        return f"{author or 'detrkit'}, hub revision {self.revision}" if self.hub else author


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
        ModelError: nothing there, a damaged file, weights that are no detector's, or a DC5 model by its name whose
            file does not say so.
    """
    place = locate(name)
    if place.is_ours:
        saved = load_model(place.path)
        segmenter = attach_mask_head(saved.model, saved.about, place.path) if has_mask_head(saved.about) else None
        saved = saved._replace(origin=place.origin(saved.origin), segmenter=segmenter)
    else:
        found = read_weights(place)
        refuse_plain_dc5(place, found)
        saved = _saved(found)
    return saved._replace(about={**saved.about, "hub": place.hub}) if place.hub else saved


def locate(name: str | Path) -> Place:
    """Find what `open_model` reads, and fetch it where it lies on the hub.

    Raises:
        MissingExtraError: a name on the hub, and `huggingface_hub` is not installed.
        ModelError: nothing there, nothing to be had, or several weights files.
    """
    text, path = str(name), Path(name)
    if standing(path).exists():
        return Place(text, _narrowed(path))
    if isinstance(name, str) and is_on_hub(name):
        folder = hub.fetch(name)
        return Place(text, _narrowed(folder), name.partition("@")[0], folder.name[:8])
    raise _missing(text)


def is_on_hub(name: str) -> bool:
    """Whether a text that is no path here is meant as a name on the hub, rather than as a path that is mistyped."""
    return hub.is_name(name) and not _means_path(name)


def read_weights(place: Place, **overrides: Any) -> Conversion:
    """The model that weights of others are; arguments and errors as of `detrkit.convert.read`."""
    found = convert.read(place.path, **overrides)
    return dataclasses.replace(found, origin=place.origin(found.origin))


def refuse_plain_dc5(place: Place, found: Conversion) -> None:
    """Refuse to take a model that is called DC5 for one without dilation: it would load, and find little.

    Raises:
        ModelError: its name says DC5, and whether it is dilated was only assumed.
    """
    names = (Path(place.hub or place.name).name, place.path.name, place.path.parent.name)
    called = next((name for name in names if "dc5" in name.lower()), "")
    config: Any = found.model.config
    if called and "dilated" in found.assumed and not config.dilated:
        raise ModelError(
            "By its name this is a DC5 model, but its file does not say so, and tensors do not show it",
            where=place.name,
            got=repr(called),
            remedy=f"Say so: detrkit convert {shlex.quote(place.name)} OUT --dilated "
            "(if it is no DC5 model, give it another name).",
        )


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


def unnamed(count: int) -> tuple[Category, ...]:
    """A table for labels whose names did not come along.

    The official models of COCO have its ids for labels: 91 of boxes, 250 of panoptic segmentation with its stuff.
    """
    names = {91: NAMES, 250: {**NAMES, **STUFF}}.get(count, {})
    other = "unused" if names else "class"
    return tuple(
        Category(label, names.get(label, f"{other}-{label}"), not (names and label in STUFF)) for label in range(count)
    )


def _narrowed(path: Path) -> Path:
    """The folder that a file describes a part of, or the one weights file of a folder; else the path itself."""
    if path.is_file() and path.name in _OF_A_FOLDER and (path.parent / "config.json").is_file():
        return path.parent
    if path.is_file() or (path / "config.json").is_file():
        return path
    weights = [file for file in sorted(path.glob("*")) if file.suffix in WEIGHTS] if path.is_dir() else []
    if len(weights) > 1:
        raise ModelError(
            "There is more than one weights file here",
            where=path,
            got=", ".join(file.name for file in weights),
            remedy="Name one of them.",
        )
    return weights[0] if weights else path


def _saved(found: Conversion) -> SavedModel:
    config: Any = found.model.config
    return SavedModel(
        found.model,
        found.variant,
        found.preset,
        found.categories or unnamed(config.num_classes),
        {"converted_from": found.origin},
        found.origin,
        found.report,
        found.segmenter,
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
