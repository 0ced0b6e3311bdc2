"""Compare a detector's answers with the truth, in figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from detrkit.cli._book import check_report
from detrkit.cli._figures import by_example_text, figures_document, figures_text
from detrkit.cli._options import CommonOptions, DetectionOptions
from detrkit.cli._terminal import Outcome, Terminal, count
from detrkit.cli._weights import flag, load_detector
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.data.annotations import Annotations
    from detrkit.evaluation import Metrics
    from detrkit.panoptic import PanopticMap
    from detrkit.predict import Detector
    from detrkit.structures import Detections


@dataclass(frozen=True, kw_only=True)
class Options(DetectionOptions):
    """Compare a detector's answers with the truth, in figures.

    COCO's twelve figures, of masks too where there are any, Pascal VOC's average precision, and a table of the classes.
    A model that was trained to find by example (detrkit train --task one-shot) is asked about each class that an image
    holds, shown by others.
    """

    model: tyro.conf.Positional[str]
    """Run folder or model folder, weights of others, or a name on the Hugging Face hub; or a JSON file of COCO results,
    which are evaluated as they are: flags of a model are refused then."""
    data: tyro.conf.Positional[str]
    """Data set in COCO, Pascal VOC or YOLO format; which one is recognised."""
    split: str = "val"
    """Split to evaluate on. Where there is no val, a run is evaluated on the images that it set aside."""
    annotations: str = ""
    """Format of the annotations that are meant where a folder holds several, such as coco_panoptic."""
    report: Path | None = None
    """Folder for a page with figures, curves, confusions and the best and worst images."""
    results: Path | None = None
    """File for the detections as COCO results; earlier results are replaced, and nothing else."""
    segments: Path | None = None
    """File for the segments of panoptic data as COCO's panoptic results; PNG files go into a folder of its name."""
    draws: int = 5
    """Of a model that finds by example: draws of exemplars, over which figures are means."""
    shots: int = 1
    """Of a model that finds by example: exemplars for each question."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Evaluate, and write what was asked for.

    Raises:
        DataError, ModelError, UsageError: as `detrkit.evaluate`.
    """
    from detrkit.evaluation import write_panoptic, write_report, write_results
    from detrkit.training.by_example import refuse_draws
    from detrkit.training.judged_on import judged_on
    from detrkit.training.validation import has_stuff
    from detrkit.visualize.fonts import unwritable

    _check_files(options)
    if options.model.endswith(".json"):
        _refuse_flags_of_models(options)
    detector = None if options.model.endswith(".json") else load_detector(options.model, options, by_example=True)
    masks: Literal["any", False] = "any" if detector is None or detector.segmenter is not None else False
    annotations, split = judged_on(
        options.model, options.data, options.split, masks=masks, annotations=options.annotations
    )
    options = dataclasses.replace(options, split=split)
    for line in annotations.problems.lines():
        terminal.note(line)
    if not len(annotations):
        raise DataError("The split has no images", where=annotations.source or options.data, got=options.split)
    has_segmenter = detector is not None and detector.segmenter is not None
    if options.segments is not None and not (has_segmenter and has_stuff(annotations)):
        raise UsageError(
            "There are no segments to write",
            where="--segments",
            expected="a model with a mask head, and annotations in which some categories are stuff",
            remedy="Where a folder holds panoptic annotations beside others: --annotations coco_panoptic.",
        )
    if detector is not None and detector.one_shot is not None:
        return _by_example(options, detector, annotations, terminal)
    refuse_draws(options.draws, options.shots)
    if detector is not None:
        _note_unknown(detector, annotations, terminal)
    metrics, detections, maps = _judged(options, detector, annotations, terminal)
    document = {"model": options.model, "data": options.data, "split": options.split, **figures_document(metrics)}
    heading = f"{options.model} on {count(metrics.images, 'image')} with {count(metrics.boxes, 'box', 'boxes')}"
    text = [f"{heading} ({options.split})", "", figures_text(metrics)]
    if options.results is not None:
        write_results(options.results, annotations, detections)
        document["results"] = options.results
        text.append(f"Detections: {options.results}")
    if options.segments is not None:
        write_panoptic(options.segments, options.segments.with_suffix(""), annotations, maps)
        document["segments"] = options.segments
        text.append(f"Segments: {options.segments}")
    if options.report is not None:
        title = f"{options.model} on {options.data}, {options.split}"
        write_report(metrics, annotations, detections, options.report, title=title, panoptic=maps or None)
        for note in unwritable([category.name for category in annotations.categories]):
            terminal.note(note)
        document["report"] = options.report / "report.html"
        text.append(f"Report: {options.report / 'report.html'}")
    return Outcome(document, text="\n".join(text))


def _note_unknown(detector: Detector, annotations: Annotations, terminal: Terminal) -> None:
    known = {category.name for category in detector.categories}
    unknown = [category.name for category in annotations.categories if category.name not in known]
    if 0 < len(unknown) < len(annotations.categories):
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        terminal.note(
            f"The model does not know {len(unknown)} of the {len(annotations.categories)} categories and "
            f"finds none of their objects: {names}. Categories go by name."
        )


def _by_example(options: Options, detector: Detector, annotations: Annotations, terminal: Terminal) -> Outcome:
    """Evaluate a model that finds by example, and write the report where it was asked for."""
    from detrkit.training.by_example import evaluate_by_example, write_report

    if options.results is not None:
        raise UsageError(
            "Answers that depend on exemplars are no COCO results",
            where="--results",
            got=options.results,
            remedy="Leave it out; detrkit find writes what is found by given examples.",
        )
    with terminal.counting(2 * len(annotations), "Searching") as tick:
        found = evaluate_by_example(
            detector,
            annotations,
            draws=options.draws,
            shots=options.shots,
            ensemble=options.ensemble,
            batch_size=options.batch_size,
            workers=options.workers,
            on_image=tick,
        )
    metrics = found.evaluation.metrics
    asked = (
        f"{count(metrics.questions, 'question')} in {count(metrics.draws, 'draw')} of {count(found.shots, 'exemplar')}"
    )
    heading = f"{options.model} on {count(len(annotations), 'image')}, by example: {asked} ({options.split})"
    document = {"model": options.model, "data": options.data, "split": options.split, **found.to_json()}
    text = [heading, "", by_example_text(found)]
    if options.report is not None:
        write_report(found, options.report, title=f"{options.model} on {options.data}, {options.split}, by example")
        document["report"] = options.report / "report.html"
        text.append(f"Report: {options.report / 'report.html'}")
    return Outcome(document, text="\n".join(text))


def _judged(
    options: Options, detector: Detector | None, annotations: Annotations, terminal: Terminal
) -> tuple[Metrics, list[Detections], list[PanopticMap]]:
    from detrkit.evaluation import evaluate, read_results
    from detrkit.training.validation import has_stuff, judge

    if detector is None:
        detections = read_results(options.model, annotations)
        return evaluate(annotations, detections, voc=True), detections, []
    passes = 2 if detector.segmenter is not None and annotations.masks is not None and has_stuff(annotations) else 1
    with terminal.counting(passes * len(annotations), "Detecting") as tick:
        return judge(
            detector,
            annotations,
            voc=True,
            batch_size=options.batch_size,
            workers=options.workers,
            ensemble=options.ensemble,
            on_image=tick,
        )


def _refuse_flags_of_models(options: Options) -> None:
    """Refuse what says how a model works where there is none."""
    flags = {entry.name for entry in dataclasses.fields(DetectionOptions)}
    flags -= {entry.name for entry in dataclasses.fields(CommonOptions)}
    usual = DetectionOptions()
    if given := [flag(name) for name in sorted(flags) if getattr(options, name) != getattr(usual, name)]:
        raise UsageError(
            "Results are evaluated as they are, and no model works",
            where=options.model,
            got=", ".join(given),
            remedy="Leave it out, or name the model.",
        )


def _check_files(options: Options) -> None:
    """Refuse before minutes of work what could not be written after them."""
    from detrkit.evaluation import check_results

    if options.results is not None:
        check_results(options.results)
    if options.segments is not None:
        if options.segments.suffix != ".json":
            raise UsageError("Segments need a file of that kind", where=options.segments, expected="a name with .json")
        check_results(options.segments, panoptic=True)
    check_report(options.report)
