"""Claim: from JPEG files to detections takes less time and less memory here than in transformers.

    python benchmarks/prediction.py [--rounds 5] [--threads 1]

A DETR with the same weights on both sides looks at a batch of photographs, which are made here. Nothing is drawn and
nothing is written. Sides, each in a process of its own, in turning order:

    transformers  Pillow opens the files, `DetrImageProcessorPil` prepares them, `DetrForObjectDetection` sees them as
                  one batch (eager, fp32), and its processor makes boxes in pixels of what it says
    settled       the same in a process that gets its memory as those of the command `detrkit` do
    library       `Detector.predict` on the list of files, in a process that gets its memory as the system has it
    ours          the same in a settled process: what the command `detrkit predict` does

The weights are random. What the sides say of one photograph must differ by half at most of what two photographs differ
by: photographs that are shown at a quarter of their size or less are decoded at a smaller scale here. Seconds are of
processor time, and a ratio is the median of the rounds' ratios. Memory is of a new process: how far its peak rises in
one batch above what it held before.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _device import now
from _memory import peak_added
from _process import process
from _report import machine, parser, show
from inference import build
from PIL import Image
from reading import make_pictures

from detrkit import models
from detrkit.predict import Detector
from detrkit.structures import Category

SIDES = ("transformers", "settled", "library", "ours")


class Case(NamedTuple):
    """A detector, the shorter and the longest side that it sees, and how many photographs of which size there are."""

    preset: str
    sides: tuple[int, int]
    photographs: int
    size: tuple[int, int]


CASES = {
    "detr-r50, 800 pixels, 4 of 640 × 480": Case("detr-r50", (800, 1333), 4, (640, 480)),
    "detr-r18, 256 pixels, 8 of 640 × 480": Case("detr-r18", (256, 448), 8, (640, 480)),
    "detr-r18, 256 pixels, 8 of 4032 × 3024": Case("detr-r18", (256, 448), 8, (4032, 3024)),
}
SHORT = {"detr-r18, 192 pixels, 4 of 2016 × 1512": Case("detr-r18", (192, 336), 4, (2016, 1512))}

Found = list[tuple[np.ndarray, np.ndarray]]
"""Scores, best first, and boxes (xyxy in [0, 1]) of each photograph."""


def photographs(case: Case, folder: Path) -> list[Path]:
    """JPEG files; those that are enlarged get their own grain, as those of a camera have."""
    folder.mkdir()
    make_pictures(folder, case.photographs)
    rng = np.random.default_rng(0)
    files = sorted(folder.glob("*.jpg"))
    for file in files:
        with Image.open(file) as image:
            if image.size == case.size:
                continue
            pixels = np.asarray(image.resize(case.size, Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 4, (*pixels.shape[:2], 1)).astype(np.float32)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files


def theirs(case: Case, files: Sequence[Path]) -> Callable[[], Found]:
    """The peer."""
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    _, model = build(torch.device("cpu"), case.preset)
    processor = DetrImageProcessorPil(size={"shortest_edge": case.sides[0], "longest_edge": case.sides[1]})

    def predict() -> Found:
        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        with torch.inference_mode():
            said = model(**processor(images=images, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in images]
        found = processor.post_process_object_detection(said, threshold=0.0, target_sizes=sizes)
        return [
            ordered(one["scores"].numpy(), one["boxes"].numpy(), size) for one, size in zip(found, sizes, strict=True)
        ]

    return predict


def ours(case: Case, files: Sequence[Path]) -> Callable[[], Found]:
    """The library."""
    model, _ = build(torch.device("cpu"), case.preset, image_size=case.sides[0], longest=case.sides[1])
    categories = tuple(Category(number, f"thing {number}") for number in range(model.config.num_classes))
    detector = Detector(model, models.variant("detr"), categories)

    def predict() -> Found:
        found = detector.predict(list(files), threshold=0.0, batch_size=len(files))
        return [ordered(one.scores, one.boxes, one.image_size) for one in found]

    return predict


def ordered(scores: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Best first; boxes as fractions, cut at the image's border."""
    order = np.argsort(-scores, kind="stable")
    height, width = size
    return scores[order], np.clip(boxes[order] / (width, height, width, height), 0, 1)


def apart(one: Found, other: Found, of: Callable[[Iterable[float]], float] = max) -> dict[str, float]:
    """How far the scores of photographs differ, best first, and their boxes, each from the nearest of the other side;
    of all pairs the greatest, or the least.
    """
    pairs = list(zip(one, other, strict=True))
    scores = of(float(np.abs(a[0] - b[0]).max()) for a, b in pairs)
    places = of(float(np.abs(a[1][:, None] - b[1]).max(2).min(1).max()) for a, b in pairs)
    return {"scores": scores, "places": places}


held: list[Callable[[], Found]] = []
"""What the process of a side holds."""


def prepare(side: str, case: Case, files: Sequence[Path]) -> Found:
    """Build a side; what it finds."""
    held[:] = [(ours if side in ("library", "ours") else theirs)(case, files)]
    return held[0]()


def take() -> float:
    """Seconds of a batch."""
    start = now(torch.device("cpu"))
    held[0]()
    return now(torch.device("cpu")) - start


def measure_memory(side: str, case: Case, files: Sequence[Path]) -> float:
    """What a batch adds to the peak of this process, in MB."""
    predict = (ours if side in ("library", "ours") else theirs)(case, files)
    return peak_added(predict)


def measure(case: Case, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Agreement, speed and memory of all sides."""
    files = photographs(case, folder)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    settled = {side: side in ("settled", "ours") for side in SIDES}
    with contextlib.ExitStack() as stack:
        pools = {side: stack.enter_context(process(threads, settled=settled[side])) for side in SIDES}
        found = {side: pool.submit(prepare, side, case, files).result() for side, pool in pools.items()}
        difference = {"sides": apart(found["ours"], found["transformers"])}
        difference["photographs"] = apart(found["ours"][1:], found["ours"][:-1], min)
        if any(2 * value > difference["photographs"][key] for key, value in difference["sides"].items()):
            raise SystemExit(f"The sides do not find the same: {difference}")
        for number in range(rounds):
            turn = number % len(SIDES)
            for side in SIDES[turn:] + SIDES[:turn]:
                times[side].append(pools[side].submit(take).result())
    memory = {}
    for side in SIDES:
        with process(threads, settled=settled[side]) as pool:
            memory[side] = pool.submit(measure_memory, side, case, files).result()
    return {
        "seconds": times,
        "images_per_second": {side: len(files) / statistics.median(times[side]) for side in SIDES},
        "ratios": {
            f"{side} against {peer}": statistics.median(a / b for a, b in zip(times[peer], times[side], strict=True))
            for side, peer in (("library", "transformers"), ("ours", "transformers"), ("ours", "settled"))
        },
        "memory_mb": memory,
        "apart": difference,
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, of in result["cases"].items():
        lines[name] = {
            **{
                side: f"{of['images_per_second'][side]:7.2f} images/s, {of['memory_mb'][side]:.0f} MB" for side in SIDES
            },
            **{pair: f"{ratio:.2f} times" for pair, ratio in of["ratios"].items()},
            **{
                f"{key} apart": f"scores {of['apart'][key]['scores']:.1e}, places {of['apart'][key]['places']:.1e}"
                for key in of["apart"]
            },
        }
    return {**lines, "rounds": result["rounds"], "threads": result["threads"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    rounds, cases = (3, SHORT) if arguments.short else (arguments.rounds, CASES)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "cases": {
                name: measure(case, Path(folder) / str(number), rounds, arguments.threads)
                for number, (name, case) in enumerate(cases.items())
            },
            "rounds": rounds,
            "threads": arguments.threads,
            "machine": machine(("detrkit", "torch", "transformers", "pillow", "simplejpeg")),
        }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
