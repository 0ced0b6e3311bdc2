"""Random annotated sets with everything that trips evaluators, and pycocotools as the judge."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from detrkit.data.annotations import Annotations, Strings
from detrkit.masks import RunLengths
from detrkit.structures import Category, Detections


def annotations_of(
    boxes: list[list[list[float]]],
    labels: list[list[int]],
    *,
    classes: int = 2,
    crowd: list[list[bool]] | None = None,
    difficult: list[list[bool]] | None = None,
    image_ids: list[int] | None = None,
    size: tuple[int, int] = (100, 100),
    root: Path = Path(),
) -> Annotations:
    """Annotations from nested lists, an image an entry."""
    counts = [len(image) for image in boxes]
    flat = np.array([box for image in boxes for box in image], np.float64).reshape(-1, 4)
    flags = [
        np.array([value for image in given for value in image], bool)
        if given is not None
        else np.zeros(len(flat), bool)
        for given in (crowd, difficult)
    ]
    return Annotations(
        root=root,
        file_names=Strings(f"{index}.png" for index in range(len(boxes))),
        image_ids=np.array(image_ids if image_ids is not None else range(1, len(boxes) + 1), np.int64),
        image_sizes=np.tile(np.array(size, np.int32), (len(boxes), 1)),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=flat,
        labels=np.array([label for image in labels for label in image], np.int64),
        areas=(flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1]),
        crowd=flags[0],
        difficult=flags[1],
        categories=tuple(Category(label, f"class {label}") for label in range(classes)),
    )


def detections_of(annotations: Annotations, rows: list[list[tuple[list[float], int, float]]]) -> list[Detections]:
    """Detections from nested lists of (box, label, score), an image an entry."""
    return [
        Detections(
            np.array([box for box, _, _ in image], np.float32).reshape(-1, 4),
            np.array([score for _, _, score in image], np.float32),
            np.array([label for _, label, _ in image], np.int64),
            annotations.categories,
            (100, 100),
        )
        for image in rows
    ]


def random_set(seed: int) -> tuple[Annotations, list[Detections]]:
    """A small set: crowds, tied scores, more than 100 detections, id 0, empty images, classes without boxes."""
    random = np.random.default_rng(seed)
    images, classes = int(random.integers(1, 7)), int(random.integers(1, 6))
    present = random.random(classes) < 0.8
    choices = np.flatnonzero(present) if present.any() else np.arange(classes)
    counts = random.integers(0, 9, images) * (random.random(images) < 0.8)
    total = int(counts.sum())
    corner = random.uniform(0, 300, (total, 2))
    boxes = np.concatenate([corner, corner + np.exp(random.uniform(1.5, 5.5, (total, 2)))], 1)
    boxes = np.round(boxes, 1) if seed % 2 else boxes
    ids = random.permutation(np.arange(images) * 3)
    annotations = Annotations(
        root=Path(),
        file_names=Strings(f"{index}.png" for index in range(images)),
        image_ids=ids.astype(np.int64),
        image_sizes=np.full((images, 2), 600, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=random.choice(choices, total).astype(np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * random.uniform(0.5, 1, total),
        crowd=random.random(total) < 0.15,
        difficult=random.random(total) < 0.2,
        categories=tuple(Category(label * 2, f"class {label}") for label in range(classes)),
    )
    detections = [_random_detections(annotations, index, random) for index in range(images)]
    return annotations, detections


def _random_detections(annotations: Annotations, index: int, random: np.random.Generator) -> Detections:
    rows = annotations.rows(index)
    count = int(random.choice([0, 3, 20, 60, 260], p=[0.15, 0.2, 0.35, 0.2, 0.1]))
    classes = len(annotations.categories)
    labels = random.integers(0, classes, count)
    corner = random.uniform(0, 300, (count, 2))
    boxes = np.concatenate([corner, corner + np.exp(random.uniform(1.5, 5.5, (count, 2)))], 1)
    near = np.flatnonzero(random.random(count) < 0.6) if rows.stop > rows.start else np.empty(0, np.int64)
    copied = random.integers(rows.start, max(rows.stop, rows.start + 1), len(near))
    if len(near):
        boxes[near] = annotations.boxes[copied] + random.normal(0, 4, (len(near), 4)) * (
            random.random((len(near), 1)) < 0.8
        )
        labels[near] = np.where(random.random(len(near)) < 0.85, annotations.labels[copied], labels[near])
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    scores = random.random(count)
    scores = np.round(scores, 1) if random.random() < 0.5 else scores
    return Detections(
        boxes.astype(np.float32),
        scores.astype(np.float32),
        labels.astype(np.int64),
        annotations.categories,
        (600, 600),
    )


def with_masks(
    annotations: Annotations, detections: list[Detections], seed: int
) -> tuple[Annotations, list[Detections]]:
    """The same set with masks in images of 140 × 130 pixels: ellipses in the boxes, rectangles, some empty."""
    random = np.random.default_rng(seed)
    height, width = 140, 130
    annotations = replace(
        annotations,
        image_sizes=np.tile(np.array([height, width], np.int32), (len(annotations), 1)),
        boxes=annotations.boxes / 4,
        masks=_masks(annotations.boxes / 4, height, width, random),
    )
    return annotations, [
        replace(
            one,
            boxes=one.boxes / 4,
            image_size=(height, width),
            segments=_masks(one.boxes / 4, height, width, random),
        )
        for one in detections
    ]


def _masks(boxes: np.ndarray, height: int, width: int, random: np.random.Generator) -> RunLengths:
    pixels = np.zeros((len(boxes), height, width), bool)
    rows, columns = np.mgrid[:height, :width] + 0.5
    for mask, (x0, y0, x1, y1) in zip(pixels, boxes, strict=True):
        inside = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
        if random.random() < 0.7:
            centre, half = ((x0 + x1) / 2, (y0 + y1) / 2), (max(x1 - x0, 1) / 2, max(y1 - y0, 1) / 2)
            inside &= ((columns - centre[0]) / half[0]) ** 2 + ((rows - centre[1]) / half[1]) ** 2 <= 1
        mask[:] = inside & (random.random() < 0.95)
    return RunLengths.encode(pixels)


def pycocotools_figures(annotations: Annotations, detections: list[Detections], kind: str = "bbox") -> np.ndarray:
    """COCO's twelve figures of boxes ("bbox") or masks ("segm") from pycocotools, −1 where undefined."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    masks = annotations.masks.to_coco() if isinstance(annotations.masks, RunLengths) else [None] * len(image_of_box)
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": int(number), "height": int(height), "width": int(width)}
            for number, (height, width) in zip(annotations.image_ids, annotations.image_sizes, strict=True)
        ],
        "categories": [{"id": category.id, "name": category.name} for category in annotations.categories],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(image_of_box[row]),
                "category_id": annotations.categories[annotations.labels[row]].id,
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                "area": float(annotations.areas[row]),
                "iscrowd": int(annotations.crowd[row]),
                **({} if masks[row] is None else {"segmentation": masks[row]}),
            }
            for row, (x0, y0, x1, y1) in enumerate(annotations.boxes)
        ],
    }
    results = [
        entry
        for number, one in zip(annotations.image_ids, detections, strict=True)
        for entry in one.to_coco(int(number))
    ]
    if kind == "segm":  # pycocotools sizes a result by its box where it has one
        results = [{name: value for name, value in entry.items() if name != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(results) if results else _no_results(truth)
        evaluator = COCOeval(truth, found, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return np.asarray(evaluator.stats)


def _no_results(truth):
    from pycocotools.coco import COCO

    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found
