"""Find objects in images: boxes as pictures and as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from detrkit.cli._book import Book as _Book
from detrkit.cli._book import check_out
from detrkit.cli._book import summary as summary
from detrkit.cli._options import DetectionOptions, Switch
from detrkit.cli._segments import SegmentBook
from detrkit.cli._terminal import Outcome, Terminal
from detrkit.errors import UsageError

if TYPE_CHECKING:
    from detrkit.predict import Detector


@dataclass(frozen=True, kw_only=True)
class Options(DetectionOptions):
    """Find objects in images.

    Writes a picture with boxes for each image, all boxes as `detections.json`, and the same as `results.coco.json`: a
    COCO data set of the original images, with scores, which annotation tools take as a first draft. A model with a mask
    head adds the masks. With --panoptic it cuts each image into segments, things and stuff, and writes them as COCO's
    panoptic tools read them: `panoptic.json`, and a PNG for each image in `panoptic/`.
    """

    model: tyro.conf.Positional[str]
    """Run folder or model folder, weights of others (file or folder), or a name on the Hugging Face hub."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders (with all that is in them) and patterns such as 'photos/*.jpg'."""
    out: Path
    """Folder to write into."""
    threshold: float | None = None
    """Least score of a box, from 0 to 1. None: where F1 was best on the model's validation images, else 0.5."""
    pictures: bool = True
    """Write a picture with boxes for each image."""
    panoptic: Switch = False
    """Cut images into segments instead, each pixel in one at most; for models with a mask head."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Predict, draw and write; images that cannot be read are named at the end.

    Raises:
        DataError: no image is found.
        ModelError: there is no model.
        UsageError: an option that makes no sense, or a folder that must not be written into.
    """
    from detrkit.cli._images import find_images
    from detrkit.cli._weights import load_detector

    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError("Bad value for --threshold", got=options.threshold, expected="between 0 and 1")
    check_out(options.out)
    images = find_images(options.images, options.out, terminal.note)
    detector = load_detector(options.model, options)
    if options.panoptic:
        return _cut_up(options, detector, images, terminal)
    threshold = detector.threshold if options.threshold is None else options.threshold
    options.out.mkdir(parents=True, exist_ok=True)
    book = _Book(detector.categories, options.out, terminal, pictures=options.pictures)
    answers = detector.stream(
        list(images),
        threshold=threshold,
        ensemble=options.ensemble,
        batch_size=options.batch_size,
        workers=options.workers,
        unreadable=book.leave_out,
    )
    try:
        book.fill(answers, images, "Detecting")
    finally:
        book.close(threshold=threshold)
    outcome = book.outcome(threshold)
    config: Any = detector.model.config
    if book.images and 2 * book.boxes > config.num_queries * len(book.images):
        terminal.note(
            f"More than half of the {config.num_queries} queries find something in every image. A detector that has "
            "learnt little takes anything for an object: a higher --threshold leaves out what it is less sure of."
        )
    if book.images and 10 * book.boxes < len(book.images):
        terminal.note(
            f"Hardly anything scores {threshold:.2g} or more. "
            "A detector that has learnt little is unsure of what it finds: a lower --threshold shows it."
        )
    return outcome


def _cut_up(options: Options, detector: Detector, images: Mapping[Path, str], terminal: Terminal) -> Outcome:
    """Cut images into segments, draw and write them."""
    from detrkit.visualize.fonts import unwritable

    if options.ensemble:
        raise UsageError("Segments are of the last decoder layer, and the ensemble is of all", where="--ensemble")
    threshold = detector.panoptic_threshold if options.threshold is None else options.threshold
    book = SegmentBook(options.out, terminal, pictures=options.pictures)
    answers = detector.segment_stream(
        list(images),
        threshold=threshold,
        batch_size=options.batch_size,
        workers=options.workers,
        unreadable=book.leave_out,
    )
    try:
        book.fill(answers, images, "Cutting up")
    finally:
        book.close(detector.categories, threshold=threshold)
    for text in unwritable([category.name for category in detector.categories]) if options.pictures else ():
        terminal.note(text)
    return book.outcome(threshold=threshold)
