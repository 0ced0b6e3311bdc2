"""What a training learns from and what it is judged on: the splits of a data set, found or made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.files import split_name, upright_size
from detrkit.data.splits import split as make_split
from detrkit.errors import DataError
from detrkit.training.recipe import DataOptions
from detrkit.training.validation import label_table
from detrkit.visualize.fonts import unwritable

DEFAULT_VAL_FRACTION = 0.1

FEW = 10
"""Validation images below which their figures are said to say little."""

LISTED = 5
"""Images that a message names."""


def open_splits(
    data: str | Path, options: DataOptions, seed: int, notes: list[str], *, masks: bool | Literal["any"] = False
) -> tuple[Annotations, Annotations]:
    """The training and the validation split: found, or made from the training split; says which in `notes`.

    Args:
        data: the data set.
        options: the recipe's.
        seed: of the division, where the validation split is made.
        notes: what the user should know is added here.
        masks: whether masks are read with the boxes; "any" does without where there are none.

    Raises:
        DataError: no such split, one without images, boxes or, where they are asked for, masks, or splits without a
            common category.
        UsageError: an unknown format of annotations.
    """
    wanted, other = split_name(options.train_split), split_name(options.val_split)
    if options.val_fraction and other != DataOptions().val_split:
        notes.append(f"The split {options.val_split!r} is not looked at: a share to validate on is set (val_fraction)")
    found = formats.recognise(data, annotations=options.annotations)
    name = wanted if wanted in found or len(found) > 1 else next(iter(found))
    train = formats.read(data, name, masks=masks, annotations=options.annotations)[name]
    _refuse_boxless(train, "There is nothing to learn from", data)
    if options.val_fraction == 0 and other == name:
        val = train
        notes.append("Validation: the training images themselves, which shows whether they can be learnt by heart")
    elif options.val_fraction == 0 and other in found:
        val = formats.read(data, other, masks=masks, annotations=options.annotations)[other]
        notes.append(f"Validation: the data's split {other!r}, {val.summary()}")
    elif options.val_fraction == 0 and other != DataOptions().val_split:
        raise DataError(
            "There is no such split to validate on", where=data, got=repr(options.val_split), expected=", ".join(found)
        )
    else:
        share = options.val_fraction or DEFAULT_VAL_FRACTION
        parts = make_split(train, {"train": 1 - share, "val": share}, seed)
        train, val = parts["train"], parts["val"]
        notes.append(f"Validation: {share:.0%} of the split {name!r}, chosen by seed {seed}, {val.summary()}")
    if options.limit:
        train, val = (part.select(range(min(options.limit, len(part)))) for part in (train, val))
        notes.append(f"Limited to the first {len(train)} training and {len(val)} validation images")
    notes.insert(0, f"Training: {train.summary()}, from {train.source or data}")
    notes.extend(unwritable([category.name for category in train.categories]))
    for part, what in ((train, "There is nothing to learn from"), (val, "There is nothing to validate on")):
        notes.extend(line for line in part.problems.lines() if line not in notes)
        _refuse_boxless(part, what, data)
    label_table(train.categories, val.categories)
    _refuse_unreadable(val)
    if len(val) < FEW:
        validated = "validation image" if len(val) == 1 else "validation images"
        notes.append(
            f"Only {len(val)} {validated}: figures, the choice of the best checkpoint and the threshold for detections "
            "depend on few boxes, and say little. More of them (--val-fraction) say more"
        )
    return train, val


def _refuse_boxless(part: Annotations, what: str, data: str | Path) -> None:
    """Refuse a split without a box, and say what became of those that it may have had.

    Raises:
        DataError: there is no box that is no crowd's, or no image.
    """
    if not part.crowd.all():
        return
    unread = part.problems.examples.get("unread-annotation", [])
    raise DataError(
        what,
        where=part.source or data,
        got="; ".join([f"a split of {len(part)} images and no box", *part.problems.lines()]),
        remedy=f"{unread[0]} was not read: export the annotations as COCO, Pascal VOC or YOLO, or arrange files and "
        "folders as docs/data.md shows."
        if unread
        else "Annotate some of them, choose another split, or set val_fraction.",
    )


def _refuse_unreadable(val: Annotations) -> None:
    """Look at the headers of the validation images before hours of work: an evaluation cannot do without one of them.

    Raises:
        DataError: some cannot be read; names the first ones.
    """
    faults = []
    for index in range(len(val)):
        try:
            upright_size(val.path(index))
        except DataError as error:
            faults.append(f"{error.where}: {error.cause}")
    if faults:
        more = f" and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise DataError(
            f"{len(faults)} of the {len(val)} validation images cannot be read, and leaving them out would change the "
            "figures",
            where=val.source,
            got="; ".join(faults[:LISTED]) + more,
            remedy="Mend them, or write a copy without: detrkit doctor DATA --fix COPY.",
        )
