"""What can be wrong with a data set, what is done about each, and how often it was seen.

A problem is never silent: it is counted under its name with the places where it occurred, and the table below states
the policy. `noted`: told, and nothing else. `repaired`: mended and kept. `dropped`: the box or image is left out.
`refused`: reading stops with an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from detrkit.errors import DataError


class Policy(NamedTuple):
    """What is done about one kind of problem, what is counted of it, and what it means in words."""

    action: Literal["noted", "repaired", "dropped", "refused"]
    unit: Literal["image", "box", "mask", "file", "category"]
    meaning: str


POLICIES: dict[str, Policy] = {
    "missing-image": Policy("dropped", "image", "the annotation file names an image that does not exist"),
    "unreadable-image": Policy("dropped", "image", "the image cannot be decoded"),
    "unread-image": Policy(
        "noted",
        "image",
        "a picture is of a kind that is not read (GIF, HEIC, AVIF, JPEG 2000, SVG, DICOM, camera raw); convert it to "
        "JPEG or PNG",
    ),
    "unusable-image": Policy(
        "dropped", "image", "a picture is empty, cannot be decoded, or is too small to cut patches from"
    ),
    "repeated-path": Policy("dropped", "file", "a file or folder is reached twice, and counts once"),
    "unreadable-folder": Policy("dropped", "file", "a folder cannot be listed"),
    "compressed-shard": Policy(
        "dropped", "file", "a tar shard is compressed, so single images cannot be read; decompress it"
    ),
    "damaged-shard": Policy("dropped", "file", "a tar shard is damaged; what comes after the damage is lost"),
    "missing-annotation": Policy("dropped", "image", "a split lists an image that has no annotation file"),
    "unreadable-annotation": Policy(
        "dropped", "file", "the annotation file of an image cannot be parsed, and the image is left out, too"
    ),
    "emptied-image": Policy(
        "dropped", "image", "no box of an image can be understood, and without them it would be taught as empty"
    ),
    "unread-annotation": Policy(
        "noted",
        "file",
        "a file beside the images may hold annotations, in no format that is known here; export COCO, VOC or YOLO",
    ),
    "missing-split": Policy("noted", "file", "a split is declared, but its folder does not exist"),
    "duplicate-file-name": Policy("noted", "image", "two entries of one split name the same image file"),
    "escaped-file-name": Policy(
        "repaired", "image", "a file name is percent-escaped, as in an address, and the file of the plain name is taken"
    ),
    "text-image-id": Policy("repaired", "image", "an image id is not an integer; images are numbered anew"),
    "unannotated-image": Policy("noted", "image", "an image lies in the folder but no annotation file mentions it"),
    "size-mismatch": Policy(
        "repaired", "image", "the annotated image size is not the size of the file; the file is believed"
    ),
    "unknown-category": Policy("dropped", "box", "a box has a category that the category table lacks"),
    "unknown-image": Policy("dropped", "box", "a box belongs to an image that the file does not list"),
    "outside-box": Policy("repaired", "box", "a box reaches beyond its image and is cut at the border"),
    "inverted-box": Policy("repaired", "box", "a box has its corners swapped, or a negative width or height"),
    "degenerate-box": Policy("dropped", "box", "a box has no area, or none inside its image"),
    "non-finite-box": Policy("dropped", "box", "a box has a coordinate that is NaN or infinite"),
    "text-box": Policy("repaired", "box", "the numbers of a box are written as text, and are taken as numbers"),
    "malformed-box": Policy("dropped", "box", "a box does not consist of four numbers"),
    "malformed-annotation": Policy("dropped", "box", "an annotation lacks a readable image or category id"),
    "missing-mask": Policy("noted", "mask", "an object has no mask, though others have; its box is used"),
    "missing-mask-file": Policy("noted", "image", "a picture of masks does not exist; its objects have none"),
    "unreadable-mask-file": Policy("dropped", "image", "a picture of masks cannot be used; what it holds is left out"),
    "malformed-mask": Policy(
        "dropped", "mask", "a mask cannot be understood, or does not fit its image; its object stays"
    ),
    "mask-size-mismatch": Policy("dropped", "mask", "a mask is of another size than its image, and left out"),
    "polygon-label": Policy("repaired", "box", "a label is a polygon and is taken as the box around it"),
    "zero-based-voc": Policy(
        "noted", "file", "as many boxes begin at 0 as at 1, so the files count from 0; nothing is subtracted"
    ),
    "malformed-line": Policy("dropped", "box", "a line of a label file cannot be understood"),
    "duplicate-image-id": Policy("refused", "image", "two images share one id"),
    "duplicate-annotation-id": Policy("repaired", "box", "two annotations share one id; ids are numbered anew"),
    "duplicate-category": Policy("refused", "category", "two categories share one id"),
    "unsafe-path": Policy("refused", "file", "a file name points outside the data folder"),
    "malformed-file": Policy("refused", "file", "an annotation file cannot be parsed or lacks what its format demands"),
}

EXAMPLES_KEPT = 20
"""Places that are kept of each kind, unless all are asked for."""

_KEPT: ContextVar[int] = ContextVar("places kept of each kind of problem", default=EXAMPLES_KEPT)


@contextmanager
def every_place() -> Iterator[None]:
    """Within it, what is read keeps every place of a problem and not only the first ones: for a log of each change."""
    token = _KEPT.set(sys.maxsize)
    try:
        yield
    finally:
        _KEPT.reset(token)


@dataclass
class Problems:
    """Counts of problems by kind, each with the first `kept` places where it occurred."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kept: int = field(default_factory=_KEPT.get)

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count a problem of `kind` at `where` (file, line, annotation id).

        Raises:
            DataError: the policy for this kind is to refuse.
        """
        policy = POLICIES[kind]
        if policy.action == "refused":
            raise DataError(f"{kind}: {policy.meaning}", where=where, remedy="Mend the file and try again.")
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.examples.setdefault(kind, [])
        if len(kept) < self.kept:
            kept.append(where)

    def merge(self, other: Problems) -> None:
        """Add the counts and examples of another report to this one."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            kept = self.examples.setdefault(kind, [])
            kept.extend(other.examples[kind][: self.kept - len(kept)])

    def lines(self) -> Iterator[str]:
        """A sentence for each kind: how many, what was done, what it means, and an example."""
        for kind, count in sorted(self.counts.items()):
            action, _, meaning = POLICIES[kind]
            yield f"{count} × {kind} ({action}): {meaning}; for example {self.examples[kind][0]}"
