"""The doctor on the public side: a data set is held against the model that would be trained on it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detrkit import models
from detrkit.data.annotations import Annotations
from detrkit.data.doctor import Diagnosis, Resolution, examine, examine_briefly
from detrkit.training.recipe import DEFAULT_MODEL


def doctor(
    data: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    image_size: int = 0,
    decode: bool = True,
    annotations: str = "",
    on_start: Callable[[int], Callable[[], None]] | None = None,
) -> Diagnosis:
    """Say what is wrong with a data set: named, counted, and file by file.

    Nothing is changed. `Diagnosis.fix` writes a clean copy, `detrkit.visualize.write_diagnosis` a page with pictures.

    Args:
        data: a data set in COCO, Pascal VOC or YOLO format; which one is recognised.
        model: the preset that would be trained: its queries, resolution and tokens are what objects are held against.
        image_size: the shorter side that images would be resized to, in pixels; 0: the preset's own.
        decode: whether every image is decoded. Without it, damaged images, copies and true sizes are not found.
        annotations: the format that is meant where the folder holds several, such as "coco_panoptic".
        on_start: called with the number of images before they are decoded; gives what is called after each.

    Raises:
        DataError: no data set is there, none that is recognised, or more than one.
        UsageError: there is no such preset or no such format of annotations, or a size that no model has.
    """
    _, config = models.configure(model)
    resolution = resolution_of(model, config, image_size)
    return examine(data, resolution, decode=decode, annotations=annotations, on_start=on_start)


def resolution_of(model: str, config: Any, image_size: int = 0, longest: int = 0) -> Resolution:
    """At which size a model with this config sees images, or would at another `image_size` or `longest`.

    Raises:
        UsageError: no model sees images of that size.
    """
    stride = getattr(config, "stride", 32)
    token = stride // 2 if getattr(config, "dilated", False) else stride
    seen = models.at_size(config, image_size, longest) if image_size else config
    return Resolution(model, config.num_queries, seen.image_size, longest or seen.longest, token)


def notes_before(
    train: Annotations, val: Annotations, resolution: Resolution, data: str | Path, annotations: str = ""
) -> list[str]:
    """What a training should know of its data before it begins, as far as it is to be found in a moment.

    Args:
        train: the split to train on.
        val: the split to validate on.
        resolution: at which the model will see them.
        data: the data set, as the command that says more names it.
        annotations: the format that is meant; empty where there is only one.
    """
    found = [f"{finding}. {finding.remedy}" for finding in examine_briefly(train, val, resolution)]
    meant = f" --annotations {annotations}" if annotations else ""
    return [*found, f"More of this, and a clean copy: detrkit doctor {shlex.quote(str(data))}{meant}"] if found else []
