"""What a detector is judged on: a split of a data set, or the images that a run set aside of its training split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.files import split_name
from detrkit.training import recipe as recipes
from detrkit.training.conduct import data_of
from detrkit.training.detection import describe
from detrkit.training.recipe import DataOptions
from detrkit.training.splits import open_splits
from detrkit.training.tasks import DETECTION, TASKS

SET_ASIDE = "set aside by the run"
"""What those images are called where the name of a split would stand."""

Masks = bool | Literal["any"]


def judged_on(
    model: object, data: str | Path, split: str, *, masks: Masks = False, annotations: str = ""
) -> tuple[Annotations, str]:
    """The images that a detector is to be evaluated on, and what they are called.

    A data set without a validation split has no `val`. A run that was trained on it validated on other images, which
    its recipe finds again: these are meant then, if their fingerprint is the same.

    Args:
        model: what is evaluated: a run folder, or anything else.
        data: the data set.
        split: as of `formats.read`.
        masks: as of `formats.read`.
        annotations: as of `formats.read`.

    Raises:
        DataError: there is no such split, or it cannot be read.
        UsageError: there is no such format of annotations, or the run's recipe is damaged.
    """
    found = formats.recognise(data, annotations=annotations)
    is_missing = not {split, split_name(split)} & set(found)
    if is_missing and split_name(split) == DataOptions().val_split and isinstance(model, str | Path):
        part = _of_run(Path(model), data, found, masks, annotations)
        if part is not None:
            return part
    (read,) = formats.read(data, split, masks=masks, annotations=annotations).values()
    return read, split


def _of_run(
    run: Path, data: str | Path, found: Mapping[str, formats.Source], masks: Masks, annotations: str
) -> tuple[Annotations, str] | None:
    """What a run validated on; None where there is no such run, or where it was trained on other data."""
    file = run / "recipe.toml"
    if not file.is_file() or (kind := TASKS.get(recipes.task_of(file) or DETECTION)) is None:
        return None
    recipe: Any = recipes.read(file, kind())
    noted = data_of(run).get("splits", {}).get("val", {})
    options: DataOptions = dataclasses.replace(recipe.data, annotations=annotations)
    if (len(found) > 1 and split_name(options.train_split) not in found) or not noted:
        return None
    _, val = open_splits(data, options, recipe.run.seed, [], masks=masks)
    val = val.select(range(min(len(val), noted.get("images", 0))))  # a recipe may limit them
    if describe(val)["fingerprint"] != noted.get("fingerprint"):
        return None
    other = split_name(options.val_split)
    return val, other if options.val_fraction == 0 and other in found else SET_ASIDE
