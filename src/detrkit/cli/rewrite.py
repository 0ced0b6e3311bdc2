"""Write a data set in another format: COCO, COCO panoptic, pictures of masks, Pascal VOC or YOLO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from detrkit.cli._options import CommonOptions
from detrkit.cli._terminal import Outcome, Terminal


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Write a data set in another format.

    What a format cannot express is lost: YOLO and Pascal VOC know no masks, YOLO no crowds. Masks are kept where both
    formats have them: coco, coco_panoptic, instance_masks.
    """

    data: tyro.conf.Positional[str]
    """Data set in any format that is recognised."""
    out: tyro.conf.Positional[Path]
    """New or empty folder."""
    format: str
    """The format to write: coco, coco_panoptic, instance_masks, voc, yolo; or folder, for the images alone."""
    annotations: str = ""
    """Format of the annotations that are meant where a folder holds several, such as coco_panoptic."""
    images: Literal["link", "copy", "none"] = "link"
    """Bring the images along as hard links (which take no space), as copies, or not at all."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Read, and write.

    Raises:
        DataError: the data cannot be read, or the format cannot express it.
        UsageError: an unknown format, or an output folder that holds something or lies inside the data set.
    """
    from detrkit.data import formats
    from detrkit.data.files import check_outside
    from detrkit.errors import UsageError

    if options.format not in formats.names():
        raise UsageError("There is no such format", got=repr(options.format), expected=", ".join(formats.names()))
    check_outside(options.out, options.data)
    splits = formats.read(options.data, masks="any", annotations=options.annotations)
    for part in splits.values():
        for line in part.problems.lines():
            terminal.note(line)
    formats.write(splits, options.out, options.format, copy_images=options.images)
    document = {
        "out": options.out,
        "format": options.format,
        "splits": {name: {"images": len(part), "boxes": len(part.boxes)} for name, part in splits.items()},
        "problems": {name: part.problems.counts for name, part in splits.items()},
    }
    lines = [f"{name}: {part.summary()}" for name, part in splits.items()]
    return Outcome(document, text="\n".join([*lines, f"Written as {options.format} to {options.out}"]))
