"""Claim: training on pictures of unlike shapes is faster where images of like sizes share a batch.

    python benchmarks/grouping.py [--rounds 5] [--data DATA]

A side is an epoch of training on one thread: loading, augmenting, forward, loss, backward and AdamW, over the same
images, each as large as the augmentation makes it for that epoch. Sides in turning order:

    chance    batches as the permutation has them: `--no-group-sizes`
    grouped   `EpochBatches` brings images of like sizes together

`useful` is the share of a side's batches that is no padding. Seconds are of processor time, and a ratio is the median
of the rounds' ratios. Models have random weights, which changes nothing but what they learn.

The pictures are made here, of shapes as photographs have them (three of four are 4:3 or 3:2, one of four of these
upright); or those of `--data` are taken.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _report import machine, parser, show
from PIL import Image

from detrkit.data.loading import LoadedBatch, training_batches
from detrkit.data.order import EpochBatches
from detrkit.training.detection import DetectionSession
from detrkit.training.distributed import World
from detrkit.training.loop import optimize
from detrkit.training.recipe import Recipe, revise
from detrkit.training.setup import prepare

SIDES = ("chance", "grouped")
SHAPES = ((480, 640), (427, 640), (480, 640), (640, 480), (427, 640), (640, 427), (480, 640), (500, 500), (360, 640))


class Case(NamedTuple):
    """A training: fields of its recipe."""

    fields: Mapping[str, Any]


def case(size: int, batch: int, several: bool) -> Case:
    augmentation = {"multi_scale": several, "crop": 0.5 if several else 0.0}
    return Case({"model": "conditional-detr-nano", "image_size": size, "batch_size": batch, **augmentation})


CASES = {
    "one size, 192 px, batches of 4": case(192, 4, several=False),
    "one size, 192 px, batches of 16": case(192, 16, several=False),
    "several sizes and crops, 256 px, batches of 4": case(256, 4, several=True),
    "several sizes and crops, 256 px, batches of 16": case(256, 16, several=True),
}
SHORT = {"one size, 96 px, batches of 4": case(96, 4, several=False)}


def write_data(root: Path, count: int) -> Path:
    """A COCO data set of noise with a box on each picture."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", count), ("val", 1)):
        (root / split).mkdir()
        images, boxes = [], []
        for index in range(number):
            height, width = SHAPES[index % len(SHAPES)]
            noise = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
            noise.resize((width, height)).save(root / split / f"{index}.jpg", quality=90)
            images.append({"id": index + 1, "file_name": f"{index}.jpg", "height": height, "width": width})
            box = {"bbox": [50, 50, 100, 100], "area": 10_000, "iscrowd": 0}
            boxes.append({"id": index + 1, "image_id": index + 1, "category_id": 1, **box})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


class Side:
    """A training with or without groups."""

    def __init__(self, data: Path, case: Case, side: str):
        usual = {"backbone_weights": "random", "workers": 0, "device": "cpu", "precision": "fp32"}
        fields = {**usual, **case.fields, "group_sizes": side == "grouped"}
        self.session: DetectionSession = prepare(revise(Recipe(), fields), data, World())
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def batches(self, epoch: int) -> list[LoadedBatch]:
        """The batches of an epoch."""
        session = self.session
        order = EpochBatches(session.count, session.optimization.batch_size, 0, total_steps=0, size_of=session.size_of)
        order.start_step, order.total_steps = (each * order.steps_per_epoch for each in (epoch, epoch + 1))
        return list(training_batches(session.dataset, order, workers=0))

    def __call__(self, epoch: int) -> float:
        """Train for an epoch; seconds of processor time."""
        start = time.process_time()
        for loaded in self.batches(epoch):
            optimize(self.session, self.session.model, self.scaler, [loaded.batch])
        return time.process_time() - start


def measure(data: Path, case: Case, rounds: int) -> dict[str, Any]:
    """Padding and speed of both sides."""
    sides = {side: Side(data, case, side) for side in SIDES}
    useful, names = {}, {}
    for side, training in sides.items():
        batches = training.batches(0)
        packed = [loaded.batch.packed for loaded in batches]
        shown = sum(height * width for images in packed for height, width in images.sizes)
        useful[side] = shown / sum(images.pixels[:, 0].numel() for images in packed)
        names[side] = sorted(target.name for loaded in batches for target in loaded.batch.targets)
    if names["chance"] != names["grouped"]:
        raise SystemExit("The sides train on other images")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in SIDES if number % 2 else SIDES[::-1]:
            seconds = sides[side](number)
            if number:  # the first round does not count
                times[side].append(seconds)
    ratios = [chance / grouped for chance, grouped in zip(*times.values(), strict=True)]
    return {"useful": useful, "seconds": times, "ratio": statistics.median(ratios)}


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {
        name: {
            "useful pixels": " → ".join(f"{of['useful'][side]:.2f}" for side in SIDES),
            "an epoch": " → ".join(f"{statistics.median(of['seconds'][side]):.1f} s" for side in SIDES),
            "times as fast": f"{of['ratio']:.2f}",
        }
        for name, of in result["cases"].items()
    }
    return {**lines, "rounds": result["rounds"], "images": result["images"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--data", type=Path, help="a data set, instead of the pictures that are made")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds, count, cases = (2, 32, SHORT) if arguments.short else (arguments.rounds, 128, CASES)
    with tempfile.TemporaryDirectory() as made:
        data = arguments.data or write_data(Path(made) / "data", count)
        result = {
            "cases": {name: measure(data, of, rounds) for name, of in cases.items()},
            "rounds": rounds,
            "images": "made" if arguments.data is None else arguments.data.name,
            "machine": machine(("detrkit", "torch")),
        }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
