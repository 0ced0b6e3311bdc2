"""The task of UP-DETR on disk: the detector as an ordinary model folder, with the task's two heads beside it.

Whoever wants the detector reads the folder as any other model and need not know of the heads. What the config says of
the pre-training stands under `about.pretext`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrkit.checkpoint import TrainingState, load_model, model_folder, size_of_weights
from detrkit.checkpoint import fill as fill_detector
from detrkit.errors import ModelError
from detrkit.holders import fill_beside, save_holder
from detrkit.nn.building import built_within
from detrkit.pretrain.up_detr import UpDetr
from detrkit.structures import Category

PRETEXT = "pretext"
"""The heads' file without its ending, and what a model's `about` says of its pre-training."""

TASK = "up-detr"


def save(
    folder: Path, task: UpDetr, *, preset: str, about: Mapping[str, Any], state: TrainingState | None = None
) -> None:
    """Write a model folder of the detector and the heads, replacing what stood there.

    Args:
        folder: where to; its parent is made.
        task: what is written; its detector's last class is called `patch`.
        preset: the preset that the detector was built from, for people.
        about: anything JSON can hold; under `pretext` also what else is to be known of the pre-training.
        state: what a training needs to go on, which makes it a checkpoint.
    """
    told = {**about, PRETEXT: {**about.get(PRETEXT, {}), "task": TASK, "options": options_of(task)}}
    save_holder(folder, task, PRETEXT, preset=preset, categories=_categories(task), about=told, state=state)


def load(folder: str | Path) -> UpDetr:
    """The task that `save` wrote, with the options that it was made with.

    Args:
        folder: a run folder, a checkpoint or a model folder.

    Raises:
        ModelError: nothing there, a damaged file, or a detector that was not pre-trained so.
    """
    saved = load_model(folder)
    if not is_pretrained(saved.about):
        raise ModelError(
            "This is a detector, but no pre-training of UP-DETR",
            where=folder,
            expected=f"a model that detrkit pretrain --task {TASK} wrote",
        )
    try:
        with built_within(size_of_weights(model_folder(Path(folder)), PRETEXT)):
            task = UpDetr(saved.model, **saved.about[PRETEXT]["options"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "The options of the pre-training cannot be understood",
            where=model_folder(Path(folder)) / "config.json",
            got=error,
            remedy="Use another checkpoint of the run.",
        ) from error
    fill_heads(task, model_folder(Path(folder)))
    return task


def fill(task: UpDetr, folder: Path) -> None:
    """Give a task the weights that `save` wrote.

    Raises:
        ModelError: a file is missing or damaged, or its weights do not fit: names the file and the tensors.
    """
    fill_detector(task.detector, folder)
    fill_heads(task, folder)


def fill_heads(task: UpDetr, folder: Path) -> None:
    """Give a task's heads the weights that `save` wrote; errors as of `fill`."""
    fill_beside(task, folder, PRETEXT)


def is_pretrained(about: Mapping[str, Any] | None) -> bool:
    """Whether what a model says of itself is that it was pre-trained by this task, and nothing since."""
    pretext = (about or {}).get(PRETEXT)
    return isinstance(pretext, Mapping) and pretext.get("task") == TASK


def options_of(task: UpDetr) -> dict[str, Any]:
    """What a task was made with, by the names of the arguments; how its heads started does not matter any more."""
    backbone: Any = task.detector.backbone
    return {
        "patches": task.patches,
        "mask_out": task.mask_out,
        "mask_out_of": task.mask_out_of,
        "shuffle": task.shuffle,
        "reconstruct": task.reconstruction_head is not None,
        "place": task.place,
        "frozen_backbone": not any(parameter.requires_grad for parameter in backbone.parameters()),
    }


def _categories(task: UpDetr) -> tuple[Category, ...]:
    """The last class is the patch; those before it are never right."""
    config: Any = task.detector.config
    unused = (Category(number, f"unused-{number}") for number in range(1, config.num_classes))
    return (*unused, Category(config.num_classes, "patch"))
