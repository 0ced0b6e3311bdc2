"""Claim: the guard and the checkpoints by the clock take less than 2 % of a training.

    python benchmarks/safety_overhead.py [--rounds 40]

A step is forward, loss, backward and AdamW of a model in training, on one thread. Sides in turning order:

    plain     without the guard
    watched   the guard takes the figures of the batch and judges them, blocks of 50 steps included

The guard's share is the processor time of its own calls over that of the plain steps of the same rounds, medians; the
ratio of both sides is given beside it, as a check, and is as noisy as steps are. A checkpoint is what a run writes
every five minutes (`save_minutes`): weights, moments, average and the guard's memory, with checksums, flushed to the
disk and renamed. Its seconds are of the wall clock, because the training waits for the disk, too. Where they would be
more than a hundredth of the time, checkpoints come less often, so that this share has a limit.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _report import machine, parser, show
from PIL import Image, ImageDraw

from detrkit.data.packing import PackedBatch
from detrkit.training.detection import DetectionSession
from detrkit.training.distributed import World
from detrkit.training.events import Step
from detrkit.training.guard import Guard
from detrkit.training.loop import optimize
from detrkit.training.recipe import Recipe, RunOptions, revise
from detrkit.training.recovery import LARGEST_SHARE, Checkpoints, Position
from detrkit.training.setup import prepare
from detrkit.whole import damage

SIDES = ("plain", "watched")
BOXES = 13  # an image, as blood cells have


class Case(NamedTuple):
    """A model and what it learns from."""

    fields: Mapping[str, Any]
    rounds: int


CASES = {
    "conditional-detr-nano, 128 px, batch 4": Case(
        {"model": "conditional-detr-nano", "image_size": 128, "longest": 128, "batch_size": 4}, 1
    ),
}
LARGE = {
    "detr-r50, 320 px, batch 2": Case({"model": "detr-r50", "image_size": 320, "longest": 320, "batch_size": 2}, 4),
}


def write_data(root: Path) -> Path:
    """A COCO data set of 16 images with rectangles of two colours."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(16):
            picture = Image.fromarray(rng.integers(90, 140, (320, 320, 3), np.uint8))
            pen = ImageDraw.Draw(picture)
            for _ in range(BOXES):
                label, (w, h) = int(rng.integers(2)), rng.integers(20, 60, 2).tolist()
                x, y = int(rng.integers(320 - w)), int(rng.integers(320 - h))
                pen.rectangle((x, y, x + w - 1, y + h - 1), fill=((200, 40, 40), (40, 60, 200))[label])
                box = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1}
                annotations.append({**box, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            picture.save(root / split / f"{number}.png")
            images.append({"id": number + 1, "file_name": f"{number}.png", "height": 320, "width": 320})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def open_session(case: Case, data: Path) -> DetectionSession:
    usual = {"backbone_weights": "random", "workers": 0, "device": "cpu", "ema": 0.998}
    return prepare(revise(Recipe(), {**usual, **case.fields}), data, World())


def batches_of(session: DetectionSession) -> list[PackedBatch]:
    from detrkit.training.loop import _batches

    size = session.optimization.batch_size
    loader = _batches(session, 0)
    return [next(loader).batch for _ in range(len(session.dataset) // size)]


class Watch:
    """The guard, and the processor time that it takes."""

    def __init__(self, session: DetectionSession):
        self.guard, self.seconds, self.step = Guard(session.optimizer, 10_000), 0.0, 0

    def watch(self, evidence: Any) -> None:
        start = time.process_time()
        self.guard.watch(evidence)
        self.seconds += time.process_time() - start

    def look(self, values: Sequence[float]) -> None:
        self.step += 1
        event = Step(self.step, 1.0, values[0], {}, values[1], 1e-4, values[-1], 1.0, 0.0, 1, ())
        start = time.process_time()
        self.guard.look(event)
        self.seconds += time.process_time() - start


def measure_guard(session: DetectionSession, rounds: int) -> dict[str, Any]:
    """Processor time of steps with and without the guard, and of the guard alone."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches, watch = batches_of(session), Watch(session)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    own: list[float] = []
    for number in range(rounds + 1):
        for side in SIDES if number % 2 else SIDES[::-1]:
            batch, start = [batches[number % len(batches)]], time.process_time()
            if side == "plain":
                optimize(session, session.model, scaler, batch).values.tolist()
            else:
                watch.seconds = 0.0
                watch.look(optimize(session, session.model, scaler, batch, watch.watch).values.tolist())
            if number:  # the first round does not count
                times[side].append(time.process_time() - start)
                own += [watch.seconds] if side == "watched" else []
    blocks = judging(watch)
    plain = statistics.median(times["plain"])
    return {
        "step_ms": 1e3 * plain,
        "guard_ms": 1e3 * (statistics.median(own) + blocks),
        "guard_share": (statistics.median(own) + blocks) / plain,
        "watched_over_plain": statistics.median(b / a for a, b in zip(times["plain"], times["watched"], strict=True)),
        "seconds": times,
    }


def judging(watch: Watch) -> float:
    """Seconds of processor time for each step that go into the end of a block."""
    before, spent = watch.step, 0.0
    while watch.step < before + 100:
        watch.seconds = 0.0
        watch.look([5.0, 0.5, 1.0])
        spent += watch.seconds
    return spent / 100


def measure_checkpoint(session: DetectionSession, rounds: int) -> dict[str, Any]:
    """What a checkpoint takes."""
    scaler, guard = torch.amp.GradScaler("cpu", enabled=False), Guard(session.optimizer, 10_000)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        checkpoints = Checkpoints(session, scaler, Path(folder), guard)
        wall, processor, check = [], [], []
        for number in range(rounds):
            start, began = time.perf_counter(), time.process_time()
            path = checkpoints.save(Position(number), within=True).path
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - began)
            start = time.perf_counter()
            assert not damage(path)
            check.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in path.iterdir())
    minutes = RunOptions().save_minutes
    seconds = statistics.median(wall)
    return {
        "checkpoint_mb": size / 1e6,
        "checkpoint_seconds": seconds,
        "checkpoint_processor_seconds": statistics.median(processor),
        "checksum_seconds": statistics.median(check),
        "checkpoint_share": min(seconds / (60 * minutes), LARGEST_SHARE),
    }


def measure(case: Case, data: Path, rounds: int) -> dict[str, Any]:
    session = open_session(case, data)
    found = measure_guard(session, max(3, rounds // case.rounds))
    found |= measure_checkpoint(session, 5)
    return {**found, "share": found["guard_share"] + found["checkpoint_share"]}


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, of in result["cases"].items():
        lines[name] = {
            "guard": f"{of['guard_ms']:.2f} ms of a step's {of['step_ms']:.0f} ms: {of['guard_share']:.2%} "
            f"(watched / plain {of['watched_over_plain']:.3f})",
            "checkpoint": f"{of['checkpoint_seconds']:.2f} s for {of['checkpoint_mb']:.0f} MB every "
            f"{RunOptions().save_minutes:g} minutes: {of['checkpoint_share']:.2%} "
            f"(checksums {of['checksum_seconds']:.3f} s)",
            "together": f"{of['share']:.2%}",
        }
    return {**lines, "rounds": result["rounds"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=40)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds = 12 if arguments.short else arguments.rounds
    cases = CASES if arguments.short else CASES | LARGE
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        result = {
            "cases": {name: measure(case, data, rounds) for name, case in cases.items()},
            "rounds": rounds,
            "machine": machine(("detrkit", "torch")),
        }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
