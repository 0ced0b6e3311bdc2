"""What the doctor can find: how grave each kind is, what it means, and what to do about it.

`note`: true and worth knowing, and a training is sound all the same. `repairable`: wrong; a clean copy can be written
without it, by mending or by leaving out. `broken`: wrong in a way that only a person can mend.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from detrkit.data.problems import POLICIES

Severity = Literal["note", "repairable", "broken"]

SEVERITIES: tuple[Severity, ...] = ("note", "repairable", "broken")
"""In the order of their gravity."""


class Kind(NamedTuple):
    """One kind of finding."""

    severity: Severity
    meaning: str
    remedy: str


_OWN: dict[str, Kind] = {
    "unreadable-split": Kind("broken", "a split cannot be read at all", "Mend the file that is named."),
    "disagreeing-splits": Kind(
        "broken",
        "the splits cannot be joined under one category table",
        "Give each category the same id everywhere, and call it a thing or stuff everywhere (isthing).",
    ),
    "no-boxes": Kind(
        "broken",
        "the training split has no box, so there is nothing to learn from",
        "Annotate some of its images, or export annotations that were not read as COCO, Pascal VOC or YOLO.",
    ),
    "no-training": Kind(
        "note", "no split is called train", "Say which one to train on: detrkit train --train-split NAME."
    ),
    "no-validation": Kind(
        "note",
        "there is no validation split, so a part of the training split is set aside",
        "Nothing needs to be done; --val-fraction says how much.",
    ),
    "repeated-image": Kind(
        "repairable",
        "a split holds the same file twice, byte for byte",
        "Keep one of them. Look at both where their boxes differ: the clean copy has the one with the most boxes.",
    ),
    "image-in-two-splits": Kind(
        "repairable",
        "the same file stands in two splits, so figures are measured on what was learnt by heart",
        "Take it out of the training split.",
    ),
    "uncompared-image": Kind(
        "note",
        "before a training: an image is not compared with those of the other split, which would take too long there",
        "Run detrkit doctor, which compares all images.",
    ),
    "similar-image": Kind(
        "note",
        "two images of a split look as if they were one picture, saved or taken twice",
        "Look at them; a copy teaches nothing new.",
    ),
    "similar-image-in-two-splits": Kind(
        "note",
        "two images of different splits look as if they were one picture, which makes figures better than they are",
        "Look at them, and put what belongs together into one split (all frames of a film, all shots of a scene).",
    ),
    "orientation-flag": Kind(
        "note",
        "an image is stored turned, with a flag that says so; it is applied here, and many other tools ignore it",
        "Nothing needs to be done here.",
    ),
    "orientation-disagrees": Kind(
        "repairable",
        "the annotated size is that of the picture as stored, and not as its orientation flag shows it",
        "See whether the boxes fit the upright picture. Best is to save the images upright and to export again.",
    ),
    "image-without-boxes": Kind(
        "note", "an image without boxes is trained on as background", "See whether they were left unannotated."
    ),
    "box-format": Kind(
        "repairable",
        "it looks as if boxes were written in another order than their format has",
        "Export again in the right order. The clean copy has them as they seem to be meant: look at it.",
    ),
    "normalised-boxes": Kind(
        "repairable",
        "it looks as if coordinates were divided by the image's size once too often",
        "Export again in pixels (COCO, VOC) or divided once (YOLO). The clean copy multiplies them: look at it.",
    ),
    "one-based-boxes": Kind(
        "repairable",
        "it looks as if pixels were counted from 1, as Pascal VOC does, in a format that counts from 0",
        "Subtract 1 when converting from VOC. The clean copy has that done.",
    ),
    "repeated-box": Kind(
        "repairable", "a box stands twice in an image, with the same class and on the same spot", "Keep one."
    ),
    "contradicting-boxes": Kind(
        "note", "a box stands twice in an image, on the same spot, with two classes", "Decide which class is right."
    ),
    "category-ids": Kind(
        "note",
        "the ids of the categories are not 0, 1, 2, and so on; here they are mapped, elsewhere they often go wrong",
        "Nothing needs to be done here. Programs that ask for a number of classes may need the largest id + 1.",
    ),
    "class-ids-from-one": Kind(
        "broken",
        "it looks as if class numbers counted from 1 where the format counts from 0",
        "Subtract 1 from the class of every line, or write a name for number 0 before the others.",
    ),
    "class-without-examples": Kind(
        "note", "a class has no box in any split", "Leave it out of the table, or find examples of it."
    ),
    "class-not-in-training": Kind(
        "note",
        "a class has boxes to be evaluated on and none to learn from, so its figures will be 0",
        "Move some of its images into the training split.",
    ),
    "similar-class-names": Kind(
        "note", "two classes look as if they were one, spelt in two ways", "Give them one name if they are one."
    ),
    "more-objects-than-queries": Kind(
        "note",
        "an image holds more objects than the model has queries, so that it cannot find them all",
        "Take more queries: --architecture num_queries N. Without --model, detrkit train does so by itself.",
    ),
    "small-objects": Kind(
        "note",
        "many objects are smaller than one token of the model at its training resolution, and are learnt badly",
        "Take a larger --image-size, or --longest for long images; or cut the images into tiles.",
    ),
}

_SEVERITY_OF: dict[str, Severity] = {
    "noted": "note",
    "repaired": "repairable",
    "dropped": "repairable",
    "refused": "broken",
}

_REMEDIES = {
    "missing-image": "Put the file where the annotation says, or take its entry out.",
    "unreadable-image": "Do what is said of it, or take it out.",
    "unread-image": "Convert it to JPEG or PNG.",
    "missing-annotation": "Add its annotation file, or take it out of the list.",
    "unreadable-annotation": "Export the file again, or take it out together with its image.",
    "unread-annotation": "Export COCO, Pascal VOC or YOLO; or arrange files and folders as docs/data.md shows (YOLO "
    "needs a data.yaml).",
    "emptied-image": "Draw its boxes again, or take it out.",
    "missing-split": "Add the folder, or take the entry out.",
    "duplicate-file-name": "Join the two entries.",
    "escaped-file-name": "Nothing needs to be done here; other tools miss such images.",
    "text-box": "Nothing needs to be done here; other tools stumble over them.",
    "text-image-id": "Nothing needs to be done here.",
    "unannotated-image": "Annotate them; or list them without boxes, if they are background.",
    "size-mismatch": "Export again with the images as they are now, and look whether the boxes still fit.",
    "unknown-category": "Add the category to the table, or correct its number.",
    "unknown-image": "Add the image to the list, or take its boxes out.",
    "outside-box": "Nothing needs to be done, unless there are many: then look at the pictures.",
    "inverted-box": "Nothing needs to be done, unless there are many: then look at the pictures.",
    "degenerate-box": "Draw them again, or take them out.",
    "non-finite-box": "Draw them again, or take them out.",
    "missing-mask": "Draw it, if masks are to be learnt.",
    "polygon-label": "Nothing needs to be done if boxes are enough.",
    "zero-based-voc": "Nothing needs to be done.",
    "duplicate-annotation-id": "Nothing needs to be done here; other tools lose one of them.",
}

_LEFT_OUT = "Export it again, or take it out."

KINDS: dict[str, Kind] = _OWN | {
    kind: Kind(_SEVERITY_OF[action], meaning, _REMEDIES.get(kind, _LEFT_OUT))
    for kind, (action, _, meaning) in POLICIES.items()
}
"""All kinds: the doctor's own, and the problems that reading a data set counts."""
