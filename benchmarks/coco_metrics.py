"""How fast COCO metrics are computed, against pycocotools, on the same made detections.

    python benchmarks/coco_metrics.py --images 5000 --detections 100 --json

Both sides start from the same `Annotations` and `Detections` and end with the twelve figures. Rounds are paired, in
alternating order; the ratio is the median of the rounds' ratios. The figures themselves must agree to 1e-9.
"""

from __future__ import annotations

import contextlib
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _report import machine, parser, show

from detrkit.data.annotations import Annotations, Strings
from detrkit.evaluation import evaluate, figures
from detrkit.structures import Category, Detections


def made(images: int, detections: int, boxes: int, classes: int, seed: int) -> tuple[Annotations, list[Detections]]:
    """Random ground truth, and detections that lie near it with a name that is right one time in two."""
    random = np.random.default_rng(seed)
    total = images * boxes
    corner = random.uniform(0, 400, (total, 2))
    truth = np.concatenate([corner, corner + np.exp(random.uniform(2, 5.5, (total, 2)))], 1)
    annotations = Annotations(
        root=Path(),
        file_names=Strings(f"{index}.jpg" for index in range(images)),
        image_ids=np.arange(images, dtype=np.int64),
        image_sizes=np.full((images, 2), 640, np.int32),
        offsets=np.arange(0, total + 1, boxes, dtype=np.int64),
        boxes=truth,
        labels=random.integers(0, classes, total),
        areas=np.prod(truth[:, 2:] - truth[:, :2], 1),
        crowd=random.random(total) < 0.01,
        difficult=np.zeros(total, bool),
        categories=tuple(Category(label + 1, f"class {label}") for label in range(classes)),
    )
    found = []
    for index in range(images):
        near = index * boxes + random.integers(0, boxes, detections)
        shaken = truth[near] + random.normal(0, 12, (detections, 4))
        corners = [np.minimum(shaken[:, :2], shaken[:, 2:]), np.maximum(shaken[:, :2], shaken[:, 2:])]
        guessed = random.integers(0, classes, detections)
        labels = np.where(random.random(detections) < 0.5, annotations.labels[near], guessed)
        found.append(
            Detections(
                np.concatenate(corners, 1).astype(np.float32),
                random.random(detections).astype(np.float32),
                labels,
                annotations.categories,
                (640, 640),
            )
        )
    return annotations, found


def reference(annotations: Annotations, found: list[Detections]) -> list[float]:
    """The twelve figures from pycocotools, −1 where undefined."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    owner = np.repeat(annotations.image_ids, np.diff(annotations.offsets)).tolist()
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in annotations.image_ids.tolist()],
        "categories": [{"id": category.id, "name": category.name} for category in annotations.categories],
        "annotations": [
            {
                "id": row + 1,
                "image_id": owner[row],
                "category_id": annotations.categories[annotations.labels[row]].id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(annotations.areas[row]),
                "iscrowd": int(annotations.crowd[row]),
            }
            for row, (x0, y0, x1, y1) in enumerate(annotations.boxes.tolist())
        ],
    }
    ids = annotations.image_ids.tolist()
    results = [entry for number, one in zip(ids, found, strict=True) for entry in one.to_coco(number)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peak_mb() -> float | None:
    """The process's largest memory so far in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--detections", type=int, default=100, help="an image")
    options.add_argument("--boxes", type=int, default=7, help="ground-truth boxes an image")
    options.add_argument("--classes", type=int, default=80)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    if arguments.short:
        arguments.images, arguments.rounds = 500, 1
    case = made(arguments.images, arguments.detections, arguments.boxes, arguments.classes, arguments.seed)
    before = peak_mb()
    whole, _ = timed(lambda: evaluate(*case, voc=True))
    after = peak_mb()
    sides: dict[str, Callable[[], Any]] = {
        "detrkit": lambda: list(dict(figures(*case)).values()),
        "pycocotools": lambda: reference(*case),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, np.ndarray] = {}
    for number in range(arguments.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            elapsed, result = timed(sides[name])
            seconds[name].append(elapsed)
            values[name] = np.asarray(result)
    theirs = np.where(values["pycocotools"] == -1, np.nan, values["pycocotools"])
    np.testing.assert_allclose(values["detrkit"], theirs, rtol=0, atol=1e-9)
    result = {
        "case": {key: value for key, value in vars(arguments).items() if key != "json"},
        "seconds": {name: round(statistics.median(rounds), 4) for name, rounds in seconds.items()},
        "ratio": round(
            statistics.median(b / a for a, b in zip(seconds["detrkit"], seconds["pycocotools"], strict=True)), 2
        ),
        "largest_difference": float(np.nanmax(np.abs(values["detrkit"] - theirs))),
        "whole_evaluation": {
            "seconds": round(whole, 3),
            "added_peak_mb": None if before is None or after is None else round(after - before),
        },
        "machine": machine(("detrkit", "hotcoco", "pycocotools", "numpy")),
    }
    show(result, arguments.json)


if __name__ == "__main__":
    main()
