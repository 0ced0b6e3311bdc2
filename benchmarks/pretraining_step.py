"""Claim: kept features at least halve the time and the memory of a step of random query patch detection.

    python benchmarks/pretraining_step.py [--rounds 7] [--precision bf16]

One step is forward, loss, backward and AdamW, on one thread, of the same task with the same weights and pictures:

    plain     patches go through the backbone one by one, which keeps what its gradient needs although its rate is 0;
              costs and assignments image by image and layer by layer
    frozen    the backbone keeps nothing and sees all patches at once; assignments as in `plain`
    crops     ours on pixels: the same, with the costs of all images and layers at once
    features  ours on kept features (`detrkit.pretrain.features`): maps are made before, as in a run's later epochs

The first three must find the same loss. Loading is in none of them. Seconds are of processor time in one process, sides
in turning order, and a ratio is the median of the rounds' ratios, so that other work on the machine counts little.
Memory is of one new process a side: how far its peak rises in two steps above what model, data and libraries hold; with
gradients and AdamW's state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _memory import peak_added
from _report import machine, parser, show
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrkit import models
from detrkit.boxes import cxcywh_to_xyxy, pairwise_giou, xyxy_to_cxcywh
from detrkit.data.crops import StratifiedCrops
from detrkit.losses.criterion import Answers, SetCriterion
from detrkit.losses.matching import Matches, PaddedTargets
from detrkit.nn.convolution import direct
from detrkit.nn.pooling import pool_boxes
from detrkit.pretrain.up_detr import PatchPredictions, UpDetr, criterion

PATCHES = 10
SIDES = ("plain", "frozen", "crops", "features")


class Case(NamedTuple):
    """A detector and its batch: `size` is height and width of the pictures, `patch` the side of patches, in pixels."""

    preset: str
    architecture: Mapping[str, Any]
    batch: int
    size: tuple[int, int]
    patch: int


CASES = {"detr-nano, 192 px, batch 8": Case("detr-nano", {}, 8, (192, 256), 64)}
LARGE = {"detr-r50, 320 px, batch 2": Case("detr-r50", {"pre_norm": True}, 2, (320, 416), 128)}
TINY = Case("detr-nano", {"backbone": "resnet-nano", "dim": 32, "feedforward": 32}, 1, (64, 64), 32)


class OneByOne(SetCriterion):
    """The criterion, matching layer by layer and image by image."""

    @torch.no_grad()
    def match(self, predictions: Answers, targets: PaddedTargets) -> Matches:
        pairs: list[list[Any]] = []
        for logits, boxes in zip(predictions.logits.float(), predictions.boxes.float(), strict=True):
            pairs.append([])
            for row, count in enumerate(targets.counts):
                labels, wanted = targets.labels[row, :count], targets.boxes[row, :count]
                cost = -self.cost.classification * logits[row].softmax(-1)[:, labels]
                cost += self.cost.l1 * torch.cdist(boxes[row], wanted, p=1)
                cost -= self.cost.giou * pairwise_giou(cxcywh_to_xyxy(boxes[row]), cxcywh_to_xyxy(wanted))
                pairs[-1].append(linear_sum_assignment(cost.numpy()))
        joined = torch.from_numpy(np.stack([np.concatenate(layer, 1) for layer in pairs]))
        image = torch.arange(len(targets.counts)).repeat_interleave(torch.tensor(targets.counts))
        return Matches(image, joined[:, 0], joined[:, 1])


class Step:
    """A task in training, in the way of one side."""

    def __init__(self, case: Case, side: str, data: Mapping[str, Tensor], dtype: torch.dtype):
        self.side, self.data, self.dtype = side, data, dtype
        self.task = build(case, frozen=side != "plain").train()
        self.criterion = criterion(self.task.detector, PATCHES)
        if side in ("plain", "frozen"):
            one_by_one = OneByOne(**vars(self.criterion.detection))
            self.criterion = dataclasses.replace(self.criterion, detection=one_by_one)
        backbone = {id(parameter) for parameter in self.task.detector.backbone.parameters()}
        trained = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in trained if (id(one) in backbone) == inside], "lr": rate}
            for inside, rate in ((False, 1e-4), (True, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)

    def __call__(self) -> float:
        """Take a step; its loss."""
        torch.manual_seed(0)  # dropout and mask-out, alike on all sides
        self.optimizer.zero_grad()
        convolutions = direct() if self.side == "plain" else contextlib.nullcontext()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32), convolutions:
            found = self.found()
        loss = self.criterion(found, self.data["boxes"], self.task.group).total
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def found(self) -> PatchPredictions:
        if self.side == "features":
            return self.task(self.data["maps"], self.data["map_padding"], self.data["features"], known=True)
        if self.side != "plain":
            return self.task(self.data["images"], self.data["padding"], self.data["patches"])
        memory = self.task.detector.encode(self.data["images"], self.data["padding"])
        patches = self.data["patches"].flatten(0, 1).split(1)
        described = torch.cat([self.task.detector.backbone(patch)[-1].mean((-2, -1)) for patch in patches])
        return self.task.find(memory, described.unflatten(0, (-1, PATCHES)))


def build(case: Case, *, frozen: bool) -> UpDetr:
    """The task; always with the same weights."""
    torch.manual_seed(0)
    detector: Any = models.build(case.preset, num_classes=1, **case.architecture)
    detector.backbone.initialise(torch.Generator().manual_seed(0))
    task = UpDetr(detector, patches=PATCHES, frozen_backbone=frozen)
    return task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def make_data(case: Case) -> dict[str, Tensor]:
    """Pictures of noise with places in them: as pixels, and as what the backbone says."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    height, width = case.size
    images = torch.randn(case.batch, 3, height, width, generator=generator)
    corners = [StratifiedCrops()(height, width, PATCHES, rng) for _ in range(case.batch)]
    patches = [
        torch.nn.functional.interpolate(image[None, :, y0:y1, x0:x1], (case.patch, case.patch), mode="bilinear")[0]
        for image, places in zip(images, corners, strict=True)
        for x0, y0, x1, y1 in places.tolist()
    ]
    boxes = xyxy_to_cxcywh(torch.tensor(np.stack(corners)) / torch.tensor([width, height, width, height])).float()
    backbone = build(case, frozen=True).detector.backbone
    images = images.contiguous(memory_format=torch.channels_last)
    maps, mirrored = backbone(images)[-1].contiguous(), backbone(images.flip(-1))[-1].flip(-1)
    return {
        "images": images,
        "padding": torch.zeros(case.batch, height, width, dtype=torch.bool),
        "patches": torch.stack(patches).unflatten(0, (case.batch, PATCHES)),
        "boxes": boxes,
        "maps": maps,
        "map_padding": torch.zeros(case.batch, *maps.shape[-2:], dtype=torch.bool),
        "features": torch.stack([pool_boxes(one, places) for one, places in zip(mirrored, boxes, strict=True)]),
    }


def read(file: Path, side: str) -> dict[str, Tensor]:
    """What a side needs, laid out as in a run."""
    data = load_file(file)
    unneeded = ("images", "padding", "patches") if side == "features" else ("maps", "map_padding", "features")
    data = {name: tensor for name, tensor in data.items() if name not in unneeded}
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if name == "images" else tensor
        for name, tensor in data.items()
    }


def measure_time(case: Case, file: Path, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each side in every round, after one that does not count."""
    steps = {side: Step(case, side, read(file, side), dtype) for side in SIDES}
    losses = [step() for step in steps.values()]
    if dtype == torch.float32 and max(losses[:3]) - min(losses[:3]) > 1e-3 * losses[0]:
        raise SystemExit(f"The sides compute different losses: {dict(zip(SIDES, losses, strict=True))}")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        turn = number % len(SIDES)
        for side in SIDES[turn:] + SIDES[:turn]:
            start = time.process_time()
            steps[side]()
            times[side].append(time.process_time() - start)
    return times


def measure_memory(case: Case, side: str, file: Path, dtype: torch.dtype) -> float:
    """How much two steps add to the peak of this process, in MB."""
    torch.set_num_threads(1)
    Step(TINY, side, make_data(TINY), dtype)()  # what libraries set up in a first step is no part of one
    step = Step(case, side, read(file, side), dtype)
    return peak_added(lambda: (step(), step()))


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Speed and memory of every side, and how they compare with those of the first."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in make_data(case).items()}, file)
        memory = {}
        for side in SIDES:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                memory[side] = fresh.submit(measure_memory, case, side, file, dtype).result()
        times = measure_time(case, file, dtype, rounds)
    first = SIDES[0]
    return {
        side: {
            "images_per_second": case.batch / statistics.median(times[side]),
            "memory_mb": memory[side],
            "times_faster": statistics.median(a / b for a, b in zip(times[first], times[side], strict=True)),
            "times_smaller": memory[first] / memory[side],
            "seconds": times[side],
        }
        for side in SIDES
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, sides in result["cases"].items():
        lines[name] = {
            side: f"{of['images_per_second']:7.2f} images/s ({of['times_faster']:.2f} × plain)   "
            f"{of['memory_mb']:6.0f} MB (plain / {of['times_smaller']:.2f})"
            for side, of in sides.items()
        }
    return {**lines, "precision": result["precision"], "rounds": result["rounds"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds = 5 if arguments.short else arguments.rounds
    dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
    cases = CASES if arguments.short else CASES | LARGE
    result = {
        "cases": {name: measure(case, dtype, rounds) for name, case in cases.items()},
        "precision": arguments.precision,
        "rounds": rounds,
        "machine": machine(("detrkit", "torch", "scipy")),
    }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
