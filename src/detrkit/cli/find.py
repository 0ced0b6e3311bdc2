"""Find by example: a box around one object, and everything like it is found."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from detrkit.cli._book import Book, check_out
from detrkit.cli._options import CommonOptions
from detrkit.cli._terminal import Outcome, Terminal, count, shell
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.data.annotations import Annotations
    from detrkit.find import Thing
    from detrkit.one_shot.search import Search
    from detrkit.structures import Detections

ACCEPTED = 0.5
"""Least score of an annotation where nothing else is said."""

NAMELESS = "object"
"""What the thing is called where nothing else is said."""

SPLIT = "train"

Example = tuple[str, float, float, float, float]
"""An image, and left, top, right and bottom of a box in it, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Find everything that is like an example, without a label or a training.

    Draw a box around one object, or take the boxes of a data set as examples. Writes what `detrkit predict` writes: a
    picture with boxes for each image, `detections.json`, and `results.coco.json`. With --write also a data set to check
    and to train on.
    """

    model: tyro.conf.Positional[str]
    """Run folder or model folder, weights of others (file or folder), or a name on the Hugging Face hub. A model that
    was only pre-trained will do."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders (with all that is in them) and patterns such as 'photos/*.jpg'."""
    out: Path
    """Folder to write into."""
    example: Annotated[
        tyro.conf.UseAppendAction[tuple[Example, ...]], tyro.conf.arg(metavar="IMAGE LEFT TOP RIGHT BOTTOM")
    ] = ()
    """An image and a box around one object in it, in pixels of the image as viewers show it."""
    unlike: Annotated[
        tyro.conf.UseAppendAction[tuple[Example, ...]],
        tyro.conf.arg(name="not", metavar="IMAGE LEFT TOP RIGHT BOTTOM"),
    ] = ()
    """The same for something that looks alike and is not meant."""
    name: str = NAMELESS
    """What the objects of --example are called."""
    examples: str = ""
    """Data set in COCO, Pascal VOC or YOLO format in place of --example: its boxes are the examples, and all its
    categories are looked for."""
    split: str = ""
    """Split of --examples to take them from. Empty: the only one, else train."""
    annotations: str = ""
    """Format of the annotations of --examples that are meant where the folder holds several, such as coco_panoptic."""
    pictures: bool = True
    """Write a picture with boxes for each image."""
    write: Annotated[tuple[str, str], tyro.conf.arg(metavar="FORMAT OUT", help_behavior_hint="")] = ("", "")
    """Write what is found as a data set, too: coco, voc or yolo, and a new or empty folder. Images come along as hard
    links, which take no space; those without an object too."""
    accept: float | None = None
    """Least score of what becomes an annotation of --write, from --threshold to 1. None: 0.5, or --threshold where that
    is higher."""
    workers: int = 0
    """Processes that load images; 0: none but this one."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    search: Annotated[Any, tyro.conf.arg(name="")] = None
    """How things are looked for."""


@dataclass(frozen=True)
class _Annotating:
    """How what is found becomes a data set: in which format, where, from which score on, and of which images."""

    format: str
    out: Path
    accept: float
    root: Path
    names: dict[str, str]


def options_for(arguments: Sequence[str]) -> type[Options]:
    """The options with the fields of a search, which are defined where it is computed."""
    from detrkit.one_shot.search import Search

    search = ("search", Annotated[Search, tyro.conf.arg(name="")], field(default_factory=Search))
    return dataclasses.make_dataclass(
        "Options", [search], bases=(Options,), namespace={"__doc__": Options.__doc__}, frozen=True, kw_only=True
    )


def run(options: Options, terminal: Terminal) -> Outcome:
    """Search, draw and write; images that cannot be read are named at the end.

    Raises:
        DataError: no image is found, or an example cannot be read.
        ModelError: there is no model.
        UsageError: an option or a box that makes no sense, or a folder that must not be written into.
    """
    from detrkit.cli._images import find_images
    from detrkit.find import find
    from detrkit.one_shot.saved import calibration_of
    from detrkit.predict import load
    from detrkit.structures import Category

    search: Search = options.search
    _check(options)
    images = find_images(options.images, options.out, terminal.note)
    annotating = _annotating(options, list(images))
    things = _things(options, terminal)
    detector = load(options.model, device=options.device)
    categories = tuple(Category(number, thing.name) for number, thing in enumerate(things, 1))
    book = Book(categories, options.out, terminal, pictures=options.pictures)
    files = [str(file) for file in images]
    answers = find(detector, things, files, search, workers=options.workers, unreadable=book.leave_out)
    found: list[tuple[str, Detections]] = []
    try:
        book.fill(_kept(answers, annotating, found), images, "Searching")
    finally:
        if book.images or book.unreadable:  # else an example was no good, and nothing was looked at
            book.close(**dataclasses.asdict(search), things=_counts(things))
    is_calibrated = calibration_of(detector.about) is not None
    if not is_calibrated:
        terminal.note("Scores say how alike a place is, and are no probabilities: the model was never calibrated.")
    if book.images and not book.boxes:
        terminal.note(
            f"Nothing scores {search.threshold:g} or more: a lower --threshold shows what is most alike, and more "
            "examples make it clearer what is meant."
        )
    outcome = book.outcome(search.threshold, things=_counts(things), calibrated=is_calibrated)
    written = _written(annotating, found, options.model, terminal) if annotating else None
    return dataclasses.replace(outcome, document={**(outcome.document or {}), "annotations": written})


def _check(options: Options) -> None:
    """Refuse what makes no sense before anything is read."""
    if bool(options.example) == bool(options.examples):
        both = bool(options.example)
        raise UsageError(
            "Examples come from --example or from --examples, and not from both" if both else "There is no example",
            expected="" if both else "--example IMAGE LEFT TOP RIGHT BOTTOM, or --examples DATA",
            remedy="Leave one of them out." if both else "Draw a box around one object that is to be found.",
        )
    if options.examples and options.name != NAMELESS:
        raise UsageError(
            "The things of --examples have names of their own", where="--name", got=options.name, remedy="Leave it out."
        )
    for flag, given in (("--split", options.split), ("--annotations", options.annotations)):
        if given and not options.examples:
            raise UsageError(
                "That is about --examples, and there are none", where=flag, got=given, remedy="Leave it out."
            )
    if not options.name.strip() or len(options.name.splitlines()) > 1:
        raise UsageError("Bad value for --name", got=repr(options.name), expected="a name in one line")
    check_out(options.out)


def _annotating(options: Options, images: list[Path]) -> _Annotating | None:
    """What --write and --accept ask for; None where nothing is to be written.

    Raises:
        DataError: an image that cannot be part of a data set.
        UsageError: an unknown format, a folder that holds something, or a score that makes no sense.
    """
    from detrkit.data.drafts import common_root

    format, folder = options.write
    accept, threshold = options.accept, options.search.threshold
    if not format and not folder:
        if accept is not None:
            raise UsageError("--accept is about annotations, and none are written", remedy="Add --write FORMAT OUT.")
        return None
    _check_target(format, Path(folder), options.out)
    if accept is None:
        accept = max(ACCEPTED, threshold)
    if not 0 <= accept <= 1:
        raise UsageError("Bad value for --accept", got=accept, expected="between 0 and 1")
    if accept < threshold:
        raise UsageError(
            "Annotations would be asked of what is not reported",
            where="--accept",
            got=accept,
            expected=f"at least --threshold, which is {threshold:g}",
            remedy=f"Say --threshold {accept:g} to have those reported.",
        )
    root, names = common_root(images)
    by_file = {str(file): name for file, name in zip(images, names, strict=True)}
    return _Annotating(format, Path(folder), accept, root, by_file)


def _check_target(format: str, folder: Path, out: Path) -> None:
    """Refuse before minutes of work what could not be written after them."""
    from detrkit.data import formats

    known = formats.of_objects()
    if format not in known:
        close = difflib.get_close_matches(format.lower(), known, 1)
        raise UsageError(
            "There is no such format of annotations",
            where="--write",
            got=repr(format),
            expected=", ".join(known),
            remedy=f"Did you mean {close[0]!r}?" if close else "",
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            "The folder for the annotations is not empty", where=folder, remedy="Name a folder that does not exist yet."
        )
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(
            "The annotations need a folder of their own", where=folder, got=f"--out {out}", remedy="Name another one."
        )


def _things(options: Options, terminal: Terminal) -> list[Thing]:
    """What is looked for: one thing of the examples that were drawn, or one for each category of a data set."""
    from detrkit.data.dataset import boxes_in_file
    from detrkit.data.images import open_image
    from detrkit.find import Thing

    unlike = tuple((file, tuple(box)) for file, *box in options.unlike)
    if options.example:
        for file, *box in options.example:
            image = open_image(file)
            left, top, right, bottom = box
            if -1 <= min(left, top, image.width - right, image.height - bottom) < 1:  # what is further out is refused
                terminal.note(f"{file}: the example touches the border; one that is whole finds more.")
        return [Thing(options.name.strip(), tuple((file, tuple(box)) for file, *box in options.example), unlike)]
    annotations = _examples(options, terminal)
    chosen: dict[int, list[tuple[str, tuple[float, ...]]]] = {row: [] for row in range(len(annotations.categories))}
    tiny = 0
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        if rows.start == rows.stop:
            continue
        image = open_image(annotations.path(index))
        height, width = annotations.image_sizes[index].tolist()
        boxes, _ = boxes_in_file(annotations.boxes[rows], (height, width), (image.height, image.width))
        for row, (x0, y0, x1, y1) in zip(range(rows.start, rows.stop), boxes.tolist(), strict=True):
            if min(x1 - x0, y1 - y0) < 1:
                tiny += 1
            elif not annotations.crowd[row]:
                chosen[int(annotations.labels[row])].append((str(annotations.path(index)), (x0, y0, x1, y1)))
    if tiny:
        terminal.note(f"Less than a pixel wide or high, and no example: {count(tiny, 'box', 'boxes')}")
    names = [category.name for category in annotations.categories]
    if without := [names[label] for label, boxes in chosen.items() if not boxes]:
        terminal.note(f"Without an example, and not looked for: {', '.join(without)}")
    things = [Thing(names[label], tuple(boxes), unlike) for label, boxes in chosen.items() if boxes]
    if not things:
        raise DataError(
            "The examples have no box",
            where=annotations.source or options.examples,
            remedy="Annotate at least one object, or draw it with --example.",
        )
    return things


def _examples(options: Options, terminal: Terminal) -> Annotations:
    """The split of --examples.

    Raises:
        DataError: it cannot be read, or two of its categories have one name.
        UsageError: which split is meant is not clear.
    """
    from detrkit.data import formats

    split = options.split
    if not split:
        known = list(formats.recognise(options.examples, annotations=options.annotations))
        if len(known) > 1 and SPLIT not in known:
            raise UsageError(
                "Which split the examples are taken from is not clear",
                where=options.examples,
                got=", ".join(known),
                remedy="Name one of them: --split NAME.",
            )
        split = known[0] if len(known) == 1 else SPLIT
    (annotations,) = formats.read(options.examples, split, annotations=options.annotations).values()
    for line in annotations.problems.lines():
        terminal.note(line)
    names = [category.name for category in annotations.categories]
    if len(set(names)) < len(names):
        raise DataError(
            "Two categories of the examples have one name",
            where=annotations.source or options.examples,
            got=next(name for name in names if names.count(name) > 1),
            remedy="Rename one of them.",
        )
    return annotations


def _counts(things: Iterable[Thing]) -> list[dict[str, Any]]:
    return [{"name": thing.name, "examples": len(thing.examples), "unlike": len(thing.unlike)} for thing in things]


def _kept(
    answers: Iterable[Detections], annotating: _Annotating | None, found: list[tuple[str, Detections]]
) -> Iterator[Detections]:
    """The answers; fills `found` with those that are to become annotations."""
    for answer in answers:
        if annotating is not None:
            found.append((annotating.names[answer.source], answer.above(annotating.accept)))
        yield answer


def _written(
    annotating: _Annotating, found: list[tuple[str, Detections]], model: str, terminal: Terminal
) -> dict[str, Any] | None:
    """Write the annotations, and say what they hold and what is next."""
    from detrkit.data import formats
    from detrkit.data.drafts import boxes_by_name, drafted

    out, accept = annotating.out, annotating.accept
    if not found:
        terminal.note("No image could be read, so no annotations are written.")
        return None
    draft = drafted(annotating.root, found, accept=accept)
    for line in draft.problems.lines():
        terminal.note(line)
    formats.write({SPLIT: draft}, out, annotating.format)
    by_name = boxes_by_name(draft)
    listed = ", ".join(f"{number:,} {name}" for name, number in by_name.items())
    terminal.note(
        f"Annotations in {out} ({annotating.format}): {draft.summary()}; {listed}, with scores from {accept:g} on."
    )
    if len(draft.boxes):
        terminal.note(f"Look through them, then train:  detrkit train {shell(out)} --init {shell(model)} --out RUN")
    else:
        terminal.note("That is nothing to train on; a lower --threshold and --accept would accept more.")
    document = {"out": out, "format": annotating.format, "accept": accept, "images": len(draft)}
    return {**document, "boxes": len(draft.boxes), "boxes_of": by_name, "problems": draft.problems.counts}
