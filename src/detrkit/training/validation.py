"""A detector on an annotated split: detections, figures, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detrkit.data.annotations import Annotations
from detrkit.data.dataset import masks_in_file
from detrkit.data.files import annotated_frame
from detrkit.errors import DataError, Error
from detrkit.evaluation.panoptic_quality import panoptic_quality
from detrkit.evaluation.run import Metrics, evaluate
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.predict import Detector
from detrkit.structures import Category, Detections, rows_of
from detrkit.training.distributed import World
from detrkit.visualize import compare, compare_panoptic, mosaic
from detrkit.visualize.truth import panoptic_in_frame

SAMPLE_SIDE = 480  # pixels, of each half of a sample picture


def detect(
    detector: Detector,
    annotations: Annotations,
    *,
    batch_size: int = 8,
    workers: int = 0,
    ensemble: bool = False,
    world: World | None = None,
    on_image: Callable[[], None] | None = None,
) -> list[Detections]:
    """Detections for every image of a split, in order, labelled by the split's own category table.

    All that the model answers, as many as it has queries: COCO's limit is of an image and a class, and the evaluator's.
    `on_image` is called after each image, to show how far it is.

    Raises:
        DataError: an image cannot be read, or the model knows none of the split's categories.
    """
    world = world or World()
    table = label_table(detector.categories, annotations.categories)
    mine = world.share_of(range(len(annotations)))
    found = detector.stream(
        [annotations.path(index) for index in mine],
        threshold=0.0,
        ensemble=ensemble,
        batch_size=batch_size,
        workers=workers,
    )
    answers = []
    for index, one in zip(mine, found, strict=True):
        answers.append((index, _in_annotated_frame(_relabelled(one, table, annotations), annotations, index)))
        if on_image is not None:
            on_image()
    gathered = dict(pair for part in world.gather(answers) for pair in part)
    return [gathered[index] for index in range(len(annotations))] if gathered else []


def segment(
    detector: Detector,
    annotations: Annotations,
    *,
    batch_size: int = 8,
    workers: int = 0,
    world: World | None = None,
    on_image: Callable[[], None] | None = None,
) -> list[PanopticMap]:
    """Segments of every image of a split, in order, labelled by the split's own category table; as of `detect`."""
    world = world or World()
    table = label_table(detector.categories, annotations.categories)
    mine = world.share_of(range(len(annotations)))
    found = detector.segment_stream([annotations.path(index) for index in mine], batch_size=batch_size, workers=workers)
    answers = []
    for index, one in zip(mine, found, strict=True):
        answers.append((index, _map_in_annotated_frame(_map_relabelled(one, table, annotations), annotations, index)))
        if on_image is not None:
            on_image()
    gathered = dict(pair for part in world.gather(answers) for pair in part)
    return [gathered[index] for index in range(len(annotations))] if gathered else []


class Judgement(NamedTuple):
    """What a detector made of a split, and the figures of it; `maps` are empty unless the split holds stuff."""

    metrics: Metrics
    detections: list[Detections]
    maps: list[PanopticMap]


def judge(
    detector: Detector,
    annotations: Annotations,
    *,
    voc: bool = False,
    ensemble: bool = False,
    world: World | None = None,
    **options: Any,
) -> Judgement:
    """Detections of a split and their figures: of boxes, of masks where both sides have them, and of the images as a
    whole where some categories are stuff.

    Args:
        detector: a model of any kind that knows classes.
        annotations: the split.
        voc: also compute Pascal VOC's average precision.
        ensemble: let all decoder layers answer together.
        world: processes that share the images; all of them get the figures, the main one the rest as well.
        **options: of `detect` and `segment`.

    Raises:
        DataError: an image cannot be read, or the model knows none of the split's categories.
    """
    world = world or World()
    detections = detect(detector, annotations, ensemble=ensemble, world=world, **options)
    found: Metrics | None = evaluate(annotations, detections, voc=voc) if world.is_main else None
    metrics = world.share(found)
    if detector.segmenter is None or annotations.masks is None or not has_stuff(annotations):
        return Judgement(metrics, detections, [])
    # A query makes a segment from the score on from which a detection counts.
    chosen = replace(detector, about={"threshold": metrics.threshold}) if detector.about is None else detector
    maps = segment(chosen, annotations, world=world, **options)
    quality = world.share(panoptic_quality(annotations, maps) if world.is_main else None)
    figures = {**metrics.figures, **quality.figures}
    return Judgement(replace(metrics, figures=figures, panoptic=quality.per_class), detections, maps)


def has_stuff(annotations: Annotations) -> bool:
    """Whether some categories are stuff, so that images are cut up as a whole."""
    return not all(category.is_thing for category in annotations.categories)


def label_table(known: Sequence[Category], wanted: Sequence[Category]) -> np.ndarray:
    """For each label of the model that of the same category of the data set, by `rows_of`, or −1.

    Raises:
        DataError: not one category agrees.
    """
    table = np.array(rows_of(known, wanted), np.int64)
    if len(wanted) and (table < 0).all():
        raise DataError(
            "The model knows none of the data set's categories",
            got=f"model: {_listed(known)}; data: {_listed(wanted)}",
            remedy="Use the data set that the model was trained on, or rename the categories.",
        )
    return table


def draw_samples(
    annotations: Annotations, detections: Sequence[Detections], count: int, file: Path, threshold: float = 0.5
) -> None:
    """A picture of some fixed images, spread over the split: truth on the left, detections on the right."""
    _draw_some(
        annotations,
        count,
        file,
        lambda index: compare(annotations, index, detections[index].above(threshold), longest_side=SAMPLE_SIDE),
    )


def draw_panoptic_samples(annotations: Annotations, maps: Sequence[PanopticMap], count: int, file: Path) -> None:
    """The same of images that were cut into segments."""
    _draw_some(
        annotations,
        count,
        file,
        lambda index: compare_panoptic(annotations, index, maps[index], longest_side=SAMPLE_SIDE),
    )


def _draw_some(annotations: Annotations, count: int, file: Path, drawn: Callable[[int], Image.Image]) -> None:
    chosen = np.unique(np.linspace(0, len(annotations) - 1, min(count, len(annotations))).astype(int))
    pictures = [drawn(index) for index in chosen.tolist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    mosaic(pictures, columns=1 if len(pictures) < 4 else 2).save(file, quality=88)


@contextmanager
def forgiving(notes: list[str]) -> Iterator[None]:
    """Pictures are no reason to lose a training: one that cannot be drawn or written becomes a note.

    Args:
        notes: what the user should know is added here.
    """
    try:
        yield
    except (OSError, Error) as error:
        notes.append(f"Pictures cannot be written: {error}")


def _relabelled(found: Detections, table: np.ndarray, annotations: Annotations) -> Detections:
    labels = table[found.labels]
    return replace(found, labels=labels, categories=annotations.categories)[labels >= 0]


def _map_relabelled(found: PanopticMap, table: np.ndarray, annotations: Annotations) -> PanopticMap:
    """Segments of categories that the data set knows; the pixels of others belong to none."""
    labels = table[found.labels]
    known = labels >= 0
    numbers = np.concatenate([[0], np.where(known, np.cumsum(known), 0)]).astype(np.int32)
    return replace(
        found,
        ids=numbers[found.ids],
        labels=labels[known],
        scores=found.scores[known],
        categories=annotations.categories,
    )


def _in_annotated_frame(found: Detections, annotations: Annotations, index: int) -> Detections:
    """Boxes and masks scaled to the size that the annotation file states, where the image was scaled after that.

    The inverse of what training does to the annotated boxes (`boxes_in_file`): where the aspect ratios differ, boxes
    stay where they are, and masks are cut or filled up.
    """
    annotated = _annotated_size(annotations, index)
    height, width = annotated_frame(annotated, found.image_size)
    if (height, width) != found.image_size:
        factors = np.array([width / found.image_size[1], height / found.image_size[0]] * 2, np.float32)
        found = replace(found, boxes=found.boxes * factors, image_size=(height, width))
    if found.segments is not None and 0 not in annotated and len(found) and (found.segments.sizes != annotated).any():
        pixels = masks_in_file(found.segments.decode(), annotated)
        found = replace(found, segments=RunLengths.encode(pixels), image_size=annotated)
    return found


def _map_in_annotated_frame(found: PanopticMap, annotations: Annotations, index: int) -> PanopticMap:
    """Segments in pixels of the image as the annotation file states its size; as of boxes and masks."""
    annotated = _annotated_size(annotations, index)
    return found if 0 in annotated else panoptic_in_frame(found, annotated)


def _annotated_size(annotations: Annotations, index: int) -> tuple[int, int]:
    height, width = annotations.image_sizes[index].tolist()
    return int(height), int(width)


def _listed(categories: Sequence[Category], limit: int = 8) -> str:
    return ", ".join(category.name for category in categories[:limit]) + (" …" if len(categories) > limit else "")
