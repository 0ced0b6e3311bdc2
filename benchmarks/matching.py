"""Claim: matching all layers and images of a batch takes a fifth of the time of transformers' matcher, layer by layer.

    python benchmarks/matching.py [--rounds 15] [--threads 1]

Six layers, a batch of 32, 100 queries, 10 objects an image, 91 classes; both find the same pairs. Sides in turning
order: `DetrHungarianMatcher` of transformers called for each layer, which computes the cost of every query with the
objects of all images, and our `SetCriterion.match`. Seconds are of processor time in one process, and the ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from _report import machine, parser, show
from torch import Tensor

from detrkit import models
from detrkit.losses.criterion import pad_targets
from detrkit.structures import Target

LAYERS, QUERIES, OBJECTS, CLASSES = 6, 100, 10, 91


class Answers(NamedTuple):
    """What is matched."""

    logits: Tensor
    boxes: Tensor


def matcher() -> Any:
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    return HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    images = 4 if arguments.short else 32
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(LAYERS, images, QUERIES, 4, generator=generator) * 0.4 + 0.1
    answers = Answers(torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=generator), boxes)
    targets = [
        Target(
            torch.randint(CLASSES, (OBJECTS,), generator=generator),
            torch.rand(OBJECTS, 4, generator=generator) * 0.4 + 0.1,
            str(number),
        )
        for number in range(images)
    ]
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    variant, config = models.configure("detr-r50")
    criterion, theirs = variant.criterion(config), matcher()
    padded = pad_targets(targets)

    def plain() -> list[Any]:
        return [
            theirs({"logits": logits, "pred_boxes": found}, labels)
            for logits, found in zip(answers.logits, answers.boxes, strict=True)
        ]

    wanted, found = plain(), criterion.match(answers, padded)
    for layer, pairs in enumerate(wanted):
        queries, objects = (torch.cat([pair[part] for pair in pairs]) for part in (0, 1))
        if not (torch.equal(queries, found.query[layer]) and torch.equal(objects, found.target[layer])):
            raise SystemExit("The sides find different pairs")
    ways = {"transformers": plain, "ours": lambda: criterion.match(answers, padded)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name in [*ways][:: 1 if number % 2 else -1]:
            start = time.process_time()
            ways[name]()
            times[name].append(time.process_time() - start)
    result = {
        "batch": images,
        "milliseconds": {name: f"{1e3 * statistics.median(values):.1f}" for name, values in times.items()},
        "times": f"{statistics.median(a / b for a, b in zip(times['transformers'], times['ours'], strict=True)):.1f}",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": machine(("detrkit", "torch", "transformers", "scipy")),
    }
    show({**result, "seconds": times} if arguments.json else result, arguments.json)


if __name__ == "__main__":
    main()
