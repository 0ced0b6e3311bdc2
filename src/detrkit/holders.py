"""What holds a detector, on disk: an ordinary model folder of the detector, with the holder's own weights beside it.

The mask head is one; the heads of pretext tasks and of finding by example are others, and have modules of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from detrkit.checkpoint import (
    TrainingState,
    model_folder,
    read_tensors,
    save_model,
    save_training,
    size_of_weights,
)
from detrkit.checkpoint import fill as fill_detector
from detrkit.convert import load_strictly
from detrkit.errors import ModelError
from detrkit.nn.building import built_within
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category

SEGMENTATION = "segmentation"
"""Where a model's `about` says how its mask head was made; of one that makes no masks there is nothing."""

MASK_HEAD = "mask_head"
"""The file of a mask head's weights without its ending."""

_DETECTOR = "detector."  # what the names of a detector begin with in whatever holds it


def save_holder(
    folder: Path,
    holder: nn.Module,
    part: str,
    *,
    preset: str,
    categories: tuple[Category, ...],
    about: Mapping[str, Any],
    half: bool = False,
    state: TrainingState | None = None,
) -> None:
    """Write a model folder of the detector that something holds, with the holder's own weights beside it.

    Args:
        folder: where to; its parent is made.
        holder: has the detector as `detector`.
        part: the name of the file of the holder's weights, without its ending.
        preset: the preset that the detector was built from, for people.
        categories: the category table.
        about: anything JSON can hold.
        half: store floats in 16 bits; loading gives 32 bits again. A checkpoint has 32 always.
        state: what a training needs to go on, which makes it a checkpoint.
    """
    detector: Any = holder.detector
    described: dict[str, Any] = {"preset": preset, "categories": categories, "about": about}
    own = {name: tensor for name, tensor in holder.state_dict().items() if not name.startswith(_DETECTOR)}
    if state is None:
        save_model(folder, detector, **described, half=half, beside={part: own})
    else:
        save_training(folder, detector, state._replace(tensors={**state.tensors, part: own}), **described)


def fill_beside(holder: nn.Module, folder: Path, part: str) -> None:
    """Give what holds a detector its own weights, which lie beside those of the detector.

    Args:
        holder: has the detector as `detector`, which stays as it is.
        folder: a model folder.
        part: the file's name without its ending.

    Raises:
        ModelError: the file is missing or damaged, or its weights do not fit: names the file and the tensors.
    """
    file = folder / f"{part}.safetensors"
    held = {name: tensor for name, tensor in holder.state_dict().items() if name.startswith(_DETECTOR)}
    own = read_tensors(file)
    try:
        load_strictly(holder, {**held, **own})
    except ModelError as error:
        raise ModelError(error.what, where=file, got=error.got) from error


def save_segmenter(
    folder: Path,
    segmenter: Segmenter,
    *,
    preset: str,
    categories: tuple[Category, ...],
    about: Mapping[str, Any] | None = None,
    half: bool = False,
    state: TrainingState | None = None,
) -> None:
    """Write a model folder of a detector with its mask head; arguments as of `save_holder`.

    Whoever wants the detector alone reads the folder as any other model.
    """
    about = {**(about or {}), SEGMENTATION: options_of(segmenter)}
    described: dict[str, Any] = {"preset": preset, "categories": categories, "about": about}
    save_holder(folder, segmenter, MASK_HEAD, **described, half=half, state=state)


def attach_mask_head(detector: nn.Module, about: Mapping[str, Any], folder: Path) -> Segmenter:
    """What `save_segmenter` wrote, around its detector that was loaded from the same place.

    Args:
        detector: of the folder.
        about: what it says of itself; `has_mask_head` of it holds.
        folder: a run folder, a checkpoint or a model folder.

    Raises:
        ModelError: a file is missing or damaged, or what is said of the mask head cannot be understood.
    """
    folder = model_folder(folder)
    try:
        with built_within(size_of_weights(folder, MASK_HEAD)):
            segmenter = Segmenter(detector, **about[SEGMENTATION])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "What is said of the mask head cannot be understood",
            where=folder / "config.json",
            got=about[SEGMENTATION],
            remedy="Use another checkpoint of the run.",
        ) from error
    fill_beside(segmenter, folder, MASK_HEAD)
    return segmenter


def fill_segmenter(segmenter: Segmenter, folder: Path) -> None:
    """Give a segmenter the weights that `save_segmenter` wrote; errors as of `fill_beside`."""
    fill_detector(segmenter.detector, folder)
    fill_beside(segmenter, folder, MASK_HEAD)


def options_of(segmenter: Segmenter) -> dict[str, Any]:
    """What a mask head was made with, by the names of the arguments."""
    return {"attention": segmenter.mask_head.attention, "box": segmenter.mask_head.box}


def has_mask_head(about: Mapping[str, Any] | None) -> bool:
    """Whether a model says of itself that it has a mask head."""
    return isinstance((about or {}).get(SEGMENTATION), Mapping)
