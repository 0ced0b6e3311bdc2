"""Compare a detector's answers with the truth, in figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from detrkit.cli._figures import figures_document, figures_text
from detrkit.cli._options import DetectionOptions
from detrkit.cli._terminal import Outcome, Terminal, count
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.data.annotations import Annotations
    from detrkit.structures import Detections


@dataclass(frozen=True, kw_only=True)
class Options(DetectionOptions):
    """Compare a detector's answers with the truth, in figures.

    COCO's twelve figures, Pascal VOC's average precision, and a table of the classes.
    """

    model: tyro.conf.Positional[str]
    """Run folder or model folder, weights of others, or a name on the Hugging Face hub; or a JSON file of COCO results,
    which are evaluated as they are."""
    data: tyro.conf.Positional[str]
    """Data set in COCO, Pascal VOC or YOLO format; which one is recognised."""
    split: str = "val"
    """Split to evaluate on."""
    report: Path | None = None
    """Folder for a page with figures, curves, confusions and the best and worst images."""
    results: Path | None = None
    """File for the detections as COCO results."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Evaluate, and write what was asked for.

    Raises:
        DataError, ModelError, UsageError: as `detrkit.evaluate`.
    """
    from detrkit.data import formats
    from detrkit.evaluation import evaluate, write_report, write_results

    _check_files(options)
    (annotations,) = formats.read(options.data, options.split).values()
    for line in annotations.problems.lines():
        terminal.note(line)
    if not len(annotations):
        raise DataError("The split has no images", where=annotations.source or options.data, got=options.split)
    detections = _detections(options, annotations, terminal)
    metrics = evaluate(annotations, detections, voc=True)
    document = {"model": options.model, "data": options.data, "split": options.split, **figures_document(metrics)}
    heading = f"{options.model} on {count(metrics.images, 'image')} with {count(metrics.boxes, 'box', 'boxes')}"
    text = [f"{heading} ({options.split})", "", figures_text(metrics)]
    if options.results is not None:
        write_results(options.results, annotations, detections)
        document["results"] = options.results
        text.append(f"Detections: {options.results}")
    if options.report is not None:
        title = f"{options.model} on {options.data}, {options.split}"
        write_report(metrics, annotations, detections, options.report, title=title)
        document["report"] = options.report / "report.html"
        text.append(f"Report: {options.report / 'report.html'}")
    return Outcome(document, text="\n".join(text))


def _detections(options: Options, annotations: Annotations, terminal: Terminal) -> list[Detections]:
    from detrkit.cli._weights import load_detector
    from detrkit.evaluation import read_results
    from detrkit.training.validation import detect

    if options.model.endswith(".json"):
        return read_results(options.model, annotations)
    detector = load_detector(options.model, options)
    with terminal.counting(len(annotations), "Detecting") as tick:
        return detect(
            detector,
            annotations,
            batch_size=options.batch_size,
            workers=options.workers,
            ensemble=options.ensemble,
            on_image=tick,
        )


def _check_files(options: Options) -> None:
    """Refuse before minutes of work what could not be written after them."""
    if options.results is not None and (options.results.is_dir() or not options.results.parent.is_dir()):
        raise UsageError("The file of results cannot be written there", where=options.results, expected="a new file")
    if options.report is not None and options.report.is_file():
        raise UsageError("The report needs a folder", where=options.report, got="a file")
