"""Claim: learning the masks of 100 objects takes at most a quarter of the memory of the straightforward way.

    python benchmarks/mask_memory.py [--rounds 5]

One step is forward, loss and backward of a detector with a mask head, on one image of 640 × 640 pixels that holds 100
objects, on one thread, with the same weights:

    plain     masks of all queries at once, each with its own copy of the map, of which the matched are judged:
              as the published code does it
    ours      masks of matched queries alone, eight at a time, computed again for the gradient

Both sides must find the same loss. `together` learns boxes and masks, `head alone` freezes the detector. Memory is of a
new process a side: how far its peak rises in a step above what model and data hold, gradients included. It is taken
twice: in processes that get it as those of the command `detrkit` do, and with the settings that the C library has
(`usual`), under which it keeps much of what is freed. Seconds are of processor time in one process, sides in turn, and
a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from _memory import peak_added
from _report import machine, parser, show
from torch import Tensor
from torch.nn import functional as F

from detrkit import Target, models
from detrkit.cli._memory import LARGE as LARGE_BLOCK
from detrkit.cli._memory import SPARE
from detrkit.losses.criterion import SetCriterion, pad_targets
from detrkit.losses.functional import dice_loss, mask_focal_loss
from detrkit.losses.matching import Matches
from detrkit.nn.pooling import extents
from detrkit.segmentation.head import Canvas, MaskHead
from detrkit.segmentation.model import Segmenter, Wanted, wanted_masks
from detrkit.structures import Memory, Predictions

SIDE, OBJECTS, CLASSES = 640, 100, 10
SIDES = ("plain", "ours")
SETTLED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK),
    "MALLOC_TRIM_THRESHOLD_": str(SPARE),
}
"""What `detrkit.cli._memory.settle_memory` does, said to a process that is to start."""
CASES = {
    "conditional-detr-nano, head alone": ("conditional-detr-nano", True),
    "conditional-detr-nano, together": ("conditional-detr-nano", False),
}
LARGE = {"detr-r50, head alone": ("detr-r50", True), "detr-r50, together": ("detr-r50", False)}


def build(preset: str, frozen: bool) -> tuple[Segmenter, SetCriterion]:
    """A detector with a mask head, always with the same weights, and its criterion."""
    torch.manual_seed(0)
    variant, config = models.configure(preset, num_classes=CLASSES, dropout=0.0)
    detector: Any = variant.Model(config)
    detector.backbone.initialise(torch.Generator().manual_seed(0))
    return Segmenter(detector, frozen=frozen).train(), variant.criterion(config)


def make_target() -> Target:
    """Ellipses at random places."""
    generator = torch.Generator().manual_seed(0)
    centre = 0.1 + 0.8 * torch.rand(OBJECTS, 2, generator=generator)
    size = 0.03 + 0.15 * torch.rand(OBJECTS, 2, generator=generator)
    x, y, w, h = torch.cat([centre, size], 1)[:, :, None, None].unbind(1)
    cells = (torch.arange(SIDE) + 0.5) / SIDE
    masks = ((cells - x) / w * 2) ** 2 + ((cells[:, None] - y) / h * 2) ** 2 <= 1
    labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
    return Target(labels, torch.cat([centre, size], 1), "ellipses", masks)


class Step:
    """One step of a side."""

    def __init__(self, side: str, preset: str, frozen: bool):
        self.side = side
        self.model, self.criterion = build(preset, frozen)
        self.targets = (make_target(),)
        self.images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        self.padding = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)

    def __call__(self) -> float:
        """Take a step; its loss."""
        self.model.zero_grad()
        matches: list[Matches] = []

        def wanted(predictions: Predictions) -> Wanted:
            matches.append(self.criterion.match(predictions, pad_targets(self.targets)))
            return wanted_masks(matches[0], self.targets, (SIDE, SIDE))

        if self.side == "ours":
            found = self.model(self.images, self.padding, wanted)
            assert found.terms is not None
            predictions = found.predictions
            masks = found.terms.focal + found.terms.dice
        else:
            with torch.set_grad_enabled(not self.model.frozen):
                detector: Any = self.model.detector
                memory = detector.encode(self.images, self.padding)
                predictions = detector.predict(detector.decode(memory, detector.queries(1)))
            extent = extents(self.images, self.padding, memory.grid, detector.backbone.strides[-1])
            canvas = self.model.mask_head.prepare(memory, extent)
            masks = judged(self.model.mask_head, memory, canvas, predictions, wanted(predictions))
        boxes = self.criterion.terms(predictions, pad_targets(self.targets), matches[0]).total
        loss = boxes + masks / OBJECTS
        loss.backward()
        return float(loss.detach())


def judged(head: MaskHead, memory: Memory, canvas: Canvas, predictions: Predictions, wanted: Wanted) -> Tensor:
    """The loss of masks, straightforwardly."""
    hidden = predictions.hidden[-1].flatten(0, 1)
    every = torch.zeros(len(hidden), dtype=torch.int64)
    assert memory.projected is not None
    x = torch.cat([memory.projected.expand(len(hidden), -1, -1, -1), head.attention_maps(canvas, every, hidden)], 1)
    for layer, norm in zip(head.layers[:2], head.norms[:2], strict=True):
        x = F.relu(norm(layer(x)))
    for layer, norm, skip in zip(head.layers[2:], head.norms[2:], canvas.skips, strict=True):
        x = skip.expand(len(hidden), -1, -1, -1) + F.interpolate(x, size=skip.shape[-2:], mode="nearest")
        x = F.relu(norm(layer(x)))
    logits = head.output(x)[wanted.query]
    logits = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    true = wanted.masks.float()
    return mask_focal_loss(logits, true).sum() + dice_loss(logits, true).sum()


def measure_memory(side: str, preset: str, frozen: bool) -> float:
    """How much a step adds to the peak of this process, in MB."""
    torch.set_num_threads(1)
    step = Step(side, preset, frozen)
    small = torch.randn(1, 3, 64, 64)
    step.model(small, torch.zeros(1, 64, 64, dtype=torch.bool)).predictions.boxes.sum()  # what libraries set up first
    return peak_added(step)


def in_new_process(side: str, preset: str, frozen: bool, environment: Mapping[str, str]) -> float:
    """`measure_memory` in a process of its own."""
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(measure_memory, side, preset, frozen).result()
    finally:
        for name in environment:
            del os.environ[name]


def measure(preset: str, frozen: bool, rounds: int) -> dict[str, Any]:
    """Memory and time of both sides, and how they compare."""
    memory, usual = (
        {side: in_new_process(side, preset, frozen, setting) for side in SIDES} for setting in (SETTLED, {})
    )
    steps = {side: Step(side, preset, frozen) for side in SIDES}
    losses = [step() for step in steps.values()]
    if abs(losses[0] - losses[1]) > 1e-4 * losses[0]:
        raise SystemExit(f"The sides compute different losses: {losses}")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 else -1]:
            start = time.process_time()
            steps[side]()
            times[side].append(time.process_time() - start)
    return {
        "memory_mb": memory,
        "memory_share": memory["ours"] / memory["plain"],
        "usual_memory_mb": usual,
        "usual_memory_share": usual["ours"] / usual["plain"],
        "times_faster": statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True)),
        "seconds": times,
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines = {
        name: f"{of['memory_mb']['plain']:6.0f} MB plain, {of['memory_mb']['ours']:6.0f} MB ours: "
        f"{of['memory_share']:.0%} (usual allocator {of['usual_memory_share']:.0%}); {of['times_faster']:.2f} × as fast"
        for name, of in result["cases"].items()
    }
    return {**lines, "rounds": result["rounds"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if arguments.short else arguments.rounds
    result = {
        "cases": {name: measure(*case, rounds) for name, case in (CASES if arguments.short else CASES | LARGE).items()},
        "rounds": rounds,
        "machine": machine(("detrkit", "torch")),
    }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
