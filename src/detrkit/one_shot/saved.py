"""One-shot detectors on disk: an ordinary model folder, with what belongs to finding by example beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from detrkit.checkpoint import TrainingState, model_folder, size_of_weights
from detrkit.checkpoint import fill as fill_detector
from detrkit.errors import ModelError
from detrkit.evaluation.calibration import Calibration
from detrkit.holders import fill_beside, save_holder
from detrkit.nn.building import built_within
from detrkit.one_shot.model import OneShot
from detrkit.structures import Category

ONE_SHOT = "one_shot"
"""The further weights' file without its ending, and what a model's `about` says of finding by example."""


def save(
    folder: Path, model: OneShot, *, preset: str, about: Mapping[str, Any], state: TrainingState | None = None
) -> None:
    """Write a model folder of the detector and what else the model holds, replacing what stood there.

    Args:
        folder: where to; its parent is made.
        model: what is written; its detector's last class is called `alike`.
        preset: the preset that the detector was built from, for people.
        about: anything JSON can hold; under `one_shot` also what else is to be known, such as the calibration.
        state: what a training needs to go on, which makes it a checkpoint.
    """
    told = {**about, ONE_SHOT: {**about.get(ONE_SHOT, {}), "options": options_of(model)}}
    save_holder(folder, model, ONE_SHOT, preset=preset, categories=_categories(model), about=told, state=state)


def attach(detector: nn.Module, about: Mapping[str, Any], folder: Path) -> OneShot:
    """What `save` wrote, around its detector that was loaded from the same place.

    Args:
        detector: of the folder.
        about: what it says of itself; `is_one_shot` of it holds.
        folder: a run folder, a checkpoint or a model folder.

    Raises:
        ModelError: a file is missing or damaged.
    """
    folder = model_folder(folder)
    try:
        with built_within(size_of_weights(folder, ONE_SHOT)):
            model = OneShot(detector, **about[ONE_SHOT]["options"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "The options of the one-shot detector cannot be understood",
            where=folder / "config.json",
            got=error,
            remedy="Use another checkpoint of the run.",
        ) from error
    fill_heads(model, folder)
    return model


def fill(model: OneShot, folder: Path) -> None:
    """Give a model the weights that `save` wrote.

    Raises:
        ModelError: a file is missing or damaged, or its weights do not fit: names the file and the tensors.
    """
    fill_detector(model.detector, folder)
    fill_heads(model, folder)


def fill_heads(model: OneShot, folder: Path) -> None:
    """Give a model what `save` wrote beside the detector; errors as of `fill`."""
    fill_beside(model, folder, ONE_SHOT)


def is_one_shot(about: Mapping[str, Any] | None) -> bool:
    """Whether a model says of itself that it was trained to find by example, and nothing since."""
    return isinstance((about or {}).get(ONE_SHOT), Mapping)


def calibration_of(about: Mapping[str, Any] | None) -> Calibration | None:
    """How a model's scores become probabilities, where that was measured.

    Raises:
        ModelError: what is noted of it cannot be understood.
    """
    told = (about or {}).get(ONE_SHOT)
    known = told.get("calibration") if isinstance(told, Mapping) else None
    if not isinstance(known, Mapping):
        return None
    try:
        calibration = Calibration(float(known["temperature"]), float(known["shift"]))
    except (KeyError, TypeError, ValueError):
        calibration = Calibration(math.nan, math.nan)
    if not (0 < calibration.temperature < math.inf and math.isfinite(calibration.shift)):
        raise ModelError(
            "The calibration of the one-shot detector cannot be understood",
            where="config.json",
            got=dict(known),
            expected="a temperature above 0 and a shift",
            remedy="Use another checkpoint of the run.",
        )
    return calibration


def options_of(model: OneShot) -> dict[str, Any]:
    """What a model was made with, by the names of the arguments."""
    return {"place": model.place, "prompted": model.prompted, "cells": model.cells, "width": model.width}


def _categories(model: OneShot) -> tuple[Category, ...]:
    """The last class is what is looked for; those before it are never right."""
    config: Any = model.detector.config
    unused = (Category(number, f"unused-{number}") for number in range(1, config.num_classes))
    return (*unused, Category(config.num_classes, "alike"))
