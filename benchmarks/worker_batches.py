"""Claim: batches that leave a worker as bytes take half of the time of those that leave it as numbers.

    python benchmarks/worker_batches.py [--rounds 7] [--batches 16]

A process loads JPEG files, augments them and makes batches; this one takes them. Both on one thread, eight pictures of
640 × 480 a batch, at the paper's sizes. Sides, in turning order:

    numbers   normalised in the worker, as the official code does; the floats go through shared memory
    bytes     `training_batches`: bytes go through shared memory, and become numbers here

The batches must be equal, bit for bit. Seconds an image are of the clock, from the first batch on (nothing else is
done, so that this is how fast one worker can feed a training), and of processor time of both processes. A ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _report import machine, parser, show
from reading import BATCH, annotate, make_pictures
from torch import Tensor
from torch.utils.data import DataLoader

from detrkit.data.dataset import DetectionDataset, TrainingItem
from detrkit.data.loading import training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedImages
from detrkit.data.transforms import Training, training_sizes
from detrkit.structures import Batch, Target

SIDES = ("numbers", "bytes")
WHAT = ("wall_ms", "processor_ms")


def collate(items: list[TrainingItem]) -> tuple[Tensor, Tensor, list[Target]]:
    """Normalised images and padding, in the worker."""
    return *PackedImages.of([item.image for item in items]).normalised(), [item.target for item in items]


def numbers(dataset: DetectionDataset, order: EpochBatches) -> Iterator[Batch]:
    """The plain way."""
    for images, padding, targets in DataLoader(
        dataset, batch_sampler=order, collate_fn=collate, num_workers=1, multiprocessing_context="fork"
    ):
        yield Batch(images, padding, tuple(targets))


def as_bytes(dataset: DetectionDataset, order: EpochBatches) -> Iterator[Batch]:
    """Ours."""
    for loaded in training_batches(dataset, order, workers=1):
        yield loaded.batch.to("cpu")


Way = Callable[[DetectionDataset, EpochBatches], Iterator[Batch]]
WAYS: Mapping[str, Way] = {"numbers": numbers, "bytes": as_bytes}


def processor_time() -> float:
    """Of this process and of those that have ended, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def take(way: Way, dataset: DetectionDataset, batches: int) -> tuple[float, float]:
    """Milliseconds an image, by the clock and of both processors."""
    before = processor_time()
    loader = way(dataset, EpochBatches(len(dataset), BATCH, 0, total_steps=batches))
    next(loader)
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in loader)
    seconds = time.perf_counter() - start
    del loader
    return 1e3 * seconds / count, 1e3 * (processor_time() - before) / (count + BATCH)


def check(dataset: DetectionDataset) -> None:
    """End the benchmark where the sides differ."""
    both = (way(dataset, EpochBatches(len(dataset), BATCH, 0, total_steps=2)) for way in WAYS.values())
    for plain, ours in zip(*both, strict=True):
        if not torch.equal(plain.images, ours.images) or not torch.equal(plain.padding, ours.padding):
            raise SystemExit("The sides make different batches")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--batches", type=int, default=16)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds, batches = (2, 5) if arguments.short else (arguments.rounds, arguments.batches)
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), 32)
        dataset = DetectionDataset(annotate(Path(folder), 32), Training(**training_sizes(800)._asdict()), 0)
        check(dataset)
        for number in range(rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                taken[side].append(take(WAYS[side], dataset, batches))
    columns = {side: dict(zip(WHAT, map(list, zip(*taken[side], strict=True)), strict=True)) for side in SIDES}
    result = {
        **columns,
        "ratios": {
            what: statistics.median(a / b for a, b in zip(*(columns[side][what] for side in SIDES), strict=True))
            for what in WHAT
        },
        "rounds": rounds,
        "machine": machine(("detrkit", "torch", "pillow", "simplejpeg")),
    }
    show(result if arguments.json else table(result), arguments.json)


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines = {
        side: ", ".join(f"{statistics.median(result[side][what]):.1f} {what.replace('_', ' ')}" for what in WHAT)
        for side in SIDES
    }
    times = ", ".join(f"{value:.2f} ({what.partition('_')[0]})" for what, value in result["ratios"].items())
    return {**lines, "times as fast": times, "rounds": result["rounds"], "machine": result["machine"]}


if __name__ == "__main__":
    main()
