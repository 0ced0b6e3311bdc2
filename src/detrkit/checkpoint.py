"""Models and training states on disk: safetensors and JSON, written whole or not at all, never a pickle.

A model folder holds `model.safetensors` and `config.json` (format, variant, preset, config, categories) and is all that
`detrkit.load` needs. A training checkpoint is such a folder with the optimiser, the average and the position added.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detrkit import __version__, models
from detrkit.convert import load_strictly
from detrkit.convert.report import Fate
from detrkit.documents import opened, read_json
from detrkit.errors import ModelError
from detrkit.nn.building import built_within
from detrkit.nn.weights import BACKBONE_FILE
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category
from detrkit.whole import damage, standing, write_whole

FORMAT = 1

LAST, PREVIOUS, WITHIN = "last", "previous", "within"
"""A run's training checkpoints: of the end of an epoch, the one before that, and of a step in between."""


class SavedModel(NamedTuple):
    """A model read from disk, with what is needed to use it. `origin` and `report` are empty for models of our own:
    who wrote it, and what became of each of its tensors. `segmenter` holds the model where it makes masks, too
    (`detrkit.sources.open_model`).
    """

    model: nn.Module
    variant: str
    preset: str
    categories: tuple[Category, ...]
    about: dict[str, Any]
    origin: str = ""
    report: tuple[Fate, ...] = ()
    segmenter: Segmenter | None = None


class TrainingState(NamedTuple):
    """What a training needs to go on: tensors by name for each part, and the position."""

    tensors: dict[str, dict[str, Tensor]]
    position: dict[str, Any]


def save_model(
    folder: Path,
    model: nn.Module,
    *,
    preset: str,
    categories: tuple[Category, ...],
    about: Mapping[str, Any] | None = None,
    half: bool = False,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a self-contained model folder, replacing what stood there.

    Args:
        folder: where to; its parent is made.
        model: a variant's model.
        preset: the preset that it was built from, for people.
        categories: the category table.
        about: anything JSON can hold, such as the metrics.
        half: store floats in 16 bits; loading gives 32 bits again.
        beside: further tensors by name for each file that they are written to, without its ending.
    """

    def write(to: Path) -> None:
        _write_model(to, model, preset, categories, about or {}, half)
        for part, tensors in (beside or {}).items():
            _write_tensors(_stored(tensors, half), to / f"{part}.safetensors")

    write_whole(folder, write)


def save_training(
    folder: Path,
    model: nn.Module,
    state: TrainingState,
    *,
    preset: str,
    categories: tuple[Category, ...],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a training checkpoint with checksums; where it is called `last`, the one before is kept as `previous`.

    Arguments are those of `save_model`.
    """

    def write(to: Path) -> None:
        _write_model(to, model, preset, categories, about or {}, half=False)
        _write_state(to, state)

    _write_checkpoint(folder, write)


def save_backbone(
    folder: Path,
    backbone: nn.Module,
    name: str,
    *,
    preset: str,
    about: Mapping[str, Any] | None = None,
    state: TrainingState | None = None,
) -> None:
    """Write a folder that holds a backbone alone, which `load_model` refuses and `load_backbone_weights` takes.

    Args:
        folder: where to; its parent is made.
        backbone: from `build_backbone(name)`.
        name: its name.
        preset: whose backbone it is, for people.
        about: anything JSON can hold.
        state: what a training needs to go on, which makes it a training checkpoint.
    """

    def write(to: Path) -> None:
        _write_tensors(backbone.state_dict(), to / BACKBONE_FILE)
        described = {"backbone": name, "preset": preset, "about": dict(about or {})}
        content = {"format": FORMAT, "detrkit": __version__, **described}
        (to / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        if state is not None:
            _write_state(to, state)

    write_whole(folder, write) if state is None else _write_checkpoint(folder, write)


def load_model(path: str | Path) -> SavedModel:
    """Read a model from a run folder, a checkpoint or a model folder.

    Raises:
        ModelError: nothing there, a damaged file, or weights that do not fit their config.
    """
    folder = model_folder(Path(path))
    about = _read_json(folder / "config.json")
    if about.get("format") != FORMAT:
        raise ModelError(
            "This model was written in another format",
            where=folder / "config.json",
            got=about.get("format"),
            expected=FORMAT,
            remedy="Use the version of detrkit that wrote it.",
        )
    if "variant" not in about and "backbone" in about:
        raise ModelError(
            "This is a backbone without a detector",
            where=folder,
            got=about["backbone"],
            remedy=f"Train a detector on it: detrkit train DATA --model {about.get('preset')} --architecture backbone "
            f"{about['backbone']} --backbone-weights {folder / BACKBONE_FILE} --out RUN",
        )
    try:
        with built_within(size_of_weights(folder)):
            model, categories = _described(about)
    except Exception as error:  # a config may hold anything, and layers raise whatever they like
        raise ModelError(
            "The config cannot be understood",
            where=folder / "config.json",
            got=f"no {error}" if isinstance(error, KeyError) else error,
            remedy="Use another checkpoint of the run.",
        ) from error
    fill(model, folder)
    told = about.get("about")
    told = dict(told) if isinstance(told, Mapping) else {}
    return SavedModel(model, about["variant"], str(about.get("preset", "")), categories, told)


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of a model folder.

    Raises:
        ModelError: the file is missing or damaged, or its weights do not fit: names the file and the tensors.
    """
    file = folder / "model.safetensors"
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read_tensors(file).items()
    }
    try:
        load_strictly(model, weights)
    except ModelError as error:
        raise ModelError(error.what, where=file, got=error.got) from error


def load_training(folder: Path) -> TrainingState:
    """Read what `save_training` added to a model folder, whose files are compared with their checksums first.

    Raises:
        ModelError: it is no training checkpoint, or a file of it is damaged.
    """
    if found := damage(folder):
        raise ModelError(
            "The checkpoint is damaged", where=folder, got=found, remedy="Use another checkpoint of the run."
        )
    about = _read_json(folder / "training.json")
    parts, position = about.get("parts"), about.get("position")
    if not isinstance(parts, list) or not isinstance(position, dict) or not all(map(_is_part, parts)):
        raise ModelError(
            "This is not the position of a training", where=folder / "training.json", expected="parts and position"
        )
    return TrainingState({part: read_tensors(folder / f"{part}.safetensors") for part in parts}, position)


def model_folder(path: Path) -> Path:
    """The model folder that a path means: itself, a run's `model`, or a run's best or newest checkpoint.

    Raises:
        ModelError: there is none.
    """
    # What was saved within an epoch goes when its end is saved: where it stands, it is newer than `last`.
    tried = [path, path / "model", *(path / "checkpoints" / name for name in ("best", WITHIN, LAST))]
    for folder in map(standing, tried):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        "There is no model here" if path.exists() else "There is no such file or folder",
        where=path,
        expected="a run folder, a checkpoint or a model folder with config.json and model.safetensors",
        remedy="Train one with: detrkit train DATA --out RUN",
    )


def size_of_weights(folder: Path, part: str = "model") -> int:
    """The bytes of a model folder's weights, or of a part of them; 0 where there are none."""
    file = folder / f"{part}.safetensors"
    return file.stat().st_size if file.is_file() else 0


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        with opened(file):  # no pipe or device, which would be waited for
            return load_file(file)
    except Exception as error:  # the parser fails in several ways on bytes that it was not made for
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError("The weights cannot be read", where=file, got=error, remedy="Use another checkpoint of the run.")


def _described(about: Mapping[str, Any]) -> tuple[nn.Module, tuple[Category, ...]]:
    """The model and the categories of a description; anything may be wrong with it."""
    module = models.variant(about["variant"])
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in about["config"].items()}
    defaults = vars(module.Config())
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"unknown field {name!r}")
        wanted = (int, float) if type(defaults[name]) is float else (type(defaults[name]),)
        if type(value) not in wanted:
            raise ValueError(f"{name} = {value!r}, which should be of type {wanted[-1].__name__}")
    config = module.Config(**values)
    categories = tuple(
        Category(int(number), str(name), not rest or bool(rest[0])) for number, name, *rest in about["categories"]
    )
    if len(categories) != config.num_classes:
        raise ValueError(f"{len(categories)} categories for num_classes {config.num_classes}")
    return module.Model(config), categories


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _stored(tensors: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    return {
        name: tensor.to(torch.float16) if half and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _write_checkpoint(folder: Path, write: Callable[[Path], None]) -> None:
    keep = folder.with_name(PREVIOUS) if folder.name == LAST else None
    write_whole(folder, write, keep=keep, checksums=True)


def _write_state(to: Path, state: TrainingState) -> None:
    for part, tensors in state.tensors.items():
        _write_tensors(tensors, to / f"{part}.safetensors")
    (to / "training.json").write_text(json.dumps({"parts": list(state.tensors), "position": state.position}, indent=1))


def _is_part(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _write_model(
    to: Path, model: nn.Module, preset: str, categories: tuple[Category, ...], about: Mapping[str, Any], half: bool
) -> None:
    _write_tensors(_stored(model.state_dict(), half), to / "model.safetensors")
    description = {
        "format": FORMAT,
        "detrkit": __version__,
        "variant": type(model).__module__.rsplit(".", 1)[-1],
        "preset": preset,
        "config": dataclasses.asdict(model.config),  # type: ignore[call-overload]
        "categories": [category.to_json() for category in categories],
        "about": dict(about),
    }
    (to / "config.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            "The file cannot be read", where=file, got=str(error), remedy="Use another checkpoint of the run."
        ) from error
    if not isinstance(content, dict):
        raise ModelError("The file does not hold a JSON object", where=file)
    return content
