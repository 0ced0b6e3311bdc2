"""Claim: a training step of DETR-R50 takes less time and less memory than a plain one of the same weights.

    python benchmarks/training_step.py [--rounds 7] [--precision bf16] [--threads 2] [--device cuda]

A step is forward, loss, backward, clipping and AdamW over all that DETR trains, two images of 480 × 640 with ten boxes
each. Loading is in no side. Sides, each in a process of its own, in turning order:

    plain    as the paper's code has it: `nn.MultiheadAttention` with a mask and with its weights returned, torch's
             dropout and convolutions, norms that pass over every map, images as they are laid out by default, costs
             and assignments image by image and layer by layer, losses layer by layer, fp32
    settled  the same in a process that gets its memory as those of the command `detrkit` do
    ours     what `detrkit train` does: `detrkit.training.loop.optimize`, in fp32 or in the precision that is asked for
    lean     the same with --recompute transformer
    leanest  the same with --recompute all

and, where the machine has tcmalloc, `plain, tcmalloc` and `ours, tcmalloc`: with it in the C library's place.

All start from the same weights, and without dropout they must find the same loss. Seconds are of processor time, or of
the clock on a GPU, and a ratio is the median of the rounds' ratios. `share of peak` is the rate of the floating-point
operations that a plain step needs beside that of one large product. Memory is of a new process: how far its peak rises
in two steps above what model, data and libraries hold, or what torch holds on a GPU at most; with gradients and AdamW's
state.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _device import now, operations, peak_rate
from _memory import peak_added
from _process import TCMALLOC, process
from _report import machine, parser, show
from safetensors.torch import save_file
from safety_overhead import Case as Recipe
from safety_overhead import open_session, write_data
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit import models
from detrkit.boxes import cxcywh_to_xyxy, elementwise_giou, pairwise_giou
from detrkit.nn import resnet
from detrkit.nn.attention import Attention
from detrkit.nn.backbone import build_backbone
from detrkit.nn.convolution import direct
from detrkit.nn.dropout import Dropout, ReluDropout
from detrkit.structures import Batch, Target
from detrkit.training.detection import DetectionSession
from detrkit.training.loop import optimize

PLAIN = ("plain", "settled", "plain, tcmalloc")
WITH_TCMALLOC = ("plain, tcmalloc", "ours, tcmalloc")
SIDES = ("plain", "settled", "ours", "lean", "leanest", *(WITH_TCMALLOC if TCMALLOC else ()))
RECOMPUTED = {"lean": "transformer", "leanest": "all"}
OBJECTS = 10


class Case(NamedTuple):
    """A detector, and height and width of its two images."""

    preset: str
    size: tuple[int, int]


CASES = {"detr-r50, 2 × 480 × 640": Case("detr-r50", (480, 640))}
SHORT = {"detr-r18, 2 × 192 × 256": Case("detr-r18", (192, 256))}
TINY = Case("detr-r18", (64, 64))


class How(NamedTuple):
    """In what our sides compute, and where all do."""

    precision: str
    device: str


class PlainAttention(nn.Module):
    """Torch's own attention with the weights of ours."""

    def __init__(self, ours: Attention):
        super().__init__()
        dim = ours.query.in_features
        self.attention = nn.MultiheadAttention(dim, ours.heads, ours.dropout, batch_first=True)
        parts = (ours.query, ours.key, ours.value)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            self.attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            self.attention.out_proj.load_state_dict(ours.output.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        whole = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        mask = whole if blocked is None else blocked[:, 0, 0]
        found: Tensor = self.attention(query, key, value, key_padding_mask=mask)[0]
        return found


def plain_conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """A convolution, and a frozen norm after it as the paper's code computes it."""
    assert isinstance(norm, resnet.FrozenBatchNorm2d)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv(x) * scale.view(1, -1, 1, 1) + (norm.bias - norm.running_mean * scale).view(1, -1, 1, 1)


def make_plain(module: nn.Module) -> None:
    """Replace every attention and all dropout inside a model of ours by torch's."""
    for name, child in module.named_children():
        if isinstance(child, Attention):
            setattr(module, name, PlainAttention(child))
        elif isinstance(child, ReluDropout):
            setattr(module, name, nn.Sequential(nn.ReLU(), nn.Dropout(child.dropout)))
        elif isinstance(child, Dropout):
            setattr(module, name, nn.Dropout(child.dropout))
        else:
            make_plain(child)


def plain_losses(logits: Tensor, boxes: Tensor, targets: Sequence[Target], no_object: float) -> Tensor:
    """The weighted loss of one decoder layer, matched image by image."""
    pairs = []
    with torch.no_grad():
        for chance, found, target in zip(logits.softmax(-1), boxes, targets, strict=True):
            cost = -chance[:, target.labels] + 5 * torch.cdist(found, target.boxes, p=1)
            cost -= 2 * pairwise_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(target.boxes))
            pairs.append([torch.as_tensor(rows, device=boxes.device) for rows in linear_sum_assignment(cost.cpu())])
    image = torch.cat([torch.full_like(queries, number) for number, (queries, _) in enumerate(pairs)])
    query = torch.cat([queries for queries, _ in pairs])
    wanted = torch.cat([target.boxes[rows] for target, (_, rows) in zip(targets, pairs, strict=True)])
    classes = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
    classes[image, query] = torch.cat([target.labels[rows] for target, (_, rows) in zip(targets, pairs, strict=True)])
    weight = logits.new_ones(logits.shape[-1])
    weight[-1] = no_object
    answers, count = boxes[image, query], sum(len(target.labels) for target in targets)
    overlap = elementwise_giou(cxcywh_to_xyxy(answers), cxcywh_to_xyxy(wanted))
    distance = F.l1_loss(answers, wanted, reduction="none").sum() / count
    return F.cross_entropy(logits.transpose(1, 2), classes, weight) + 5 * distance + 2 * (1 - overlap).sum() / count


class Side:
    """One way to train."""

    def __init__(self, case: Case, side: str, data: Path, how: How, dropout: float):
        fields: dict[str, Any] = {"model": case.preset, "precision": how.precision, "ema": 0.0, "clip": 0.1}
        fields |= {"device": how.device}
        fields |= {"channels_last": True, "recompute": RECOMPUTED.get(side, "none")}
        fields |= {"architecture": {"dropout": str(dropout)}, "backbone_weights": backbone_file(case, data)}
        torch.manual_seed(0)
        self.session: DetectionSession = open_session(Recipe(fields, 1), data)
        self.batch = make_batch(case)
        self.device = torch.device(how.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.is_plain = side in PLAIN
        if self.is_plain:
            model: Any = self.session.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            make_plain(model)
            self.model = model.train()
            trained = [one for one in self.model.parameters() if one.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)

    def __call__(self) -> float:
        """Take a step; its loss."""
        torch.manual_seed(0)
        if not self.is_plain:
            return float(optimize(self.session, self.session.model, self.scaler, [self.batch]).values[0])
        ours, resnet.conv_norm = resnet.conv_norm, plain_conv_norm
        try:
            with direct():
                return self.plain_step()
        finally:
            resnet.conv_norm = ours

    def plain_step(self) -> float:
        """Take a step as the paper's code does."""
        self.optimizer.zero_grad()
        batch = self.batch.to(self.device)
        found = self.model(batch.images, batch.padding)
        layers = zip(found.logits, found.boxes, strict=True)
        loss = torch.stack([plain_losses(*layer, batch.targets, 0.1) for layer in layers]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_([one for one in self.model.parameters() if one.grad is not None], 0.1)
        self.optimizer.step()
        return float(loss.detach())


def backbone_file(case: Case, data: Path) -> str:
    """Weights for the backbone: one that starts at random would not be frozen up to its second stage, as DETR's is."""
    name = models.configure(case.preset)[1].backbone
    file = data / f"{name}.safetensors"
    if not file.exists():
        backbone = build_backbone(name)
        backbone.initialise(torch.Generator().manual_seed(0))
        save_file(backbone.state_dict(), file)
    return str(file)


def make_batch(case: Case) -> Batch:
    """Two images of noise with their boxes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *case.size, generator=generator)
    targets = tuple(
        Target(
            torch.randint(2, (OBJECTS,), generator=generator),
            torch.rand(OBJECTS, 4, generator=generator) * torch.tensor([0.4, 0.4, 0.2, 0.2]) + 0.2,
            name,
        )
        for name in ("first", "second")
    )
    return Batch(images, torch.zeros(2, *case.size, dtype=torch.bool), targets)


def check(case: Case, data: Path, how: How) -> float:
    """How far the losses of both sides are apart, relatively, without dropout."""
    losses = [Side(case, side, data, how._replace(precision="fp32"), 0.0)() for side in SIDES]
    apart = (max(losses) - min(losses)) / losses[0]
    if apart > 1e-4:
        raise SystemExit(f"The sides compute different losses: {dict(zip(SIDES, losses, strict=True))}")
    return apart


steps: list[Side] = []
"""What the process of a side holds."""


def prepare(case: Case, side: str, data: Path, how: How) -> None:
    """Build a side, and take a step that does not count."""
    steps[:] = [Side(case, side, data, how, 0.1)]
    steps[0]()


def take(device: str) -> float:
    """Seconds of a step."""
    start = now(torch.device(device))
    steps[0]()
    return now(torch.device(device)) - start


def begin(side: str, threads: int) -> contextlib.AbstractContextManager[ProcessPoolExecutor]:
    """A process for a side."""
    preload = TCMALLOC if side in WITH_TCMALLOC else None
    return process(threads, settled=side not in ("plain", "plain, tcmalloc"), preload=preload)


def measure_time(case: Case, data: Path, how: How, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each side in every round, after one that does not count."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        pools = {side: stack.enter_context(begin(side, threads)) for side in SIDES}
        for side, pool in pools.items():
            pool.submit(prepare, case, side, data, how).result()
        for number in range(rounds):
            turn = number % len(SIDES)
            for side in SIDES[turn:] + SIDES[:turn]:
                times[side].append(pools[side].submit(take, how.device).result())
    return times


def measure_memory(case: Case, side: str, data: Path, how: How) -> float:
    """How much two steps add to the peak of this process, in MB; on a GPU, all that it holds at most."""
    Side(TINY, side, data, how, 0.1)()  # what libraries set up in a first step is no part of one
    step = Side(case, side, data, how, 0.1)
    added = peak_added(lambda: (step(), step()))
    return torch.cuda.max_memory_allocated() / 2**20 if how.device.startswith("cuda") else added


def measure(case: Case, data: Path, how: How, rounds: int, threads: int) -> dict[str, Any]:
    apart, times = check(case, data, how), measure_time(case, data, how, rounds, threads)
    medians = {side: statistics.median(times[side]) for side in SIDES}
    dtypes = {
        side: torch.bfloat16 if side not in PLAIN and how.precision == "bf16" else torch.float32 for side in SIDES
    }
    device = torch.device(how.device)
    with direct():
        needed = operations(Side(case, "ours", data, how, 0.1))
    memory = {}
    for side in SIDES:
        with begin(side, 1) as pool:
            memory[side] = pool.submit(measure_memory, case, side, data, how).result()
    return {
        "seconds": times,
        "medians": medians,
        "shares_of_peak": {side: needed / medians[side] / peak_rate(device, dtypes[side]) for side in SIDES},
        "ratios": {
            side: statistics.median(plain / ours for plain, ours in zip(times["plain"], times[side], strict=True))
            for side in SIDES[1:]
        },
        "memory_mb": memory,
        "memory_ratios": {side: memory[side] / memory["plain"] for side in SIDES[1:]},
        "losses_apart": apart,
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, of in result["cases"].items():
        lines[name] = {
            side: f"{of['medians'][side]:.2f} s, {of['shares_of_peak'][side]:.2f} of peak, "
            f"{of['memory_mb'][side]:.0f} MB"
            + ("" if side == "plain" else f": {of['ratios'][side]:.2f} times, {of['memory_ratios'][side]:.2f} of it")
            for side in SIDES
        } | {"losses apart": f"{of['losses_apart']:.1e}"}
    return {**lines, "precision": result["precision"], "rounds": result["rounds"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    how = How(arguments.precision, arguments.device)
    rounds, cases = (3, SHORT) if arguments.short else (arguments.rounds, CASES)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        result = {
            "cases": {name: measure(case, data, how, rounds, arguments.threads) for name, case in cases.items()},
            "precision": arguments.precision,
            "rounds": rounds,
            "device": how.device if how.device == "cpu" else torch.cuda.get_device_name(how.device),
            "threads": arguments.threads,
            "machine": machine(("detrkit", "torch")),
        }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
