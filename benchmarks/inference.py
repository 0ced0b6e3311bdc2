"""Claim: DETR-R50 detects in less time here than in transformers, with the same weights and answers.

    python benchmarks/inference.py [--rounds 7] [--threads 1] [--size 800 1066] [--device cuda]

One image, batch 1, from its normalised tensor to the predictions of the last layer. Sides in turning order:

    transformers       DetrForObjectDetection, eager, fp32, its own choice of attention
    transformers bf16  the same under autocast
    ours               eager, fp32
    ours bf16          the same with --precision bf16

The bf16 sides only run where the machine has instructions for bf16. The weights are random, under which queries and
places differ, and all sides have them. In fp32 logits and boxes must agree to 1e-4; in bf16 boxes to a pixel and scores
to 0.02. Seconds are of processor time in one process, or of the clock on a GPU, and a ratio is the median of the
rounds' ratios. `share of peak` is the rate of floating-point operations beside that of one large product.

All is measured twice: in a process that gets its memory as the system has it, and (`settled`) in one that gets it as
those of the command `detrkit` do, which helps the peer as well.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _device import now, operations, peak_rate
from _process import process
from _report import machine, parser, show
from torch import Tensor

from detrkit import convert, models
from detrkit.arithmetic import arithmetic, choose_dtype
from detrkit.nn.convolution import direct


def build(device: torch.device, preset: str = "detr-r50", **fields: Any) -> tuple[Any, Any]:
    """Our DETR in the form in which `detrkit.load` gives it, and theirs with its weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    ours: Any = models.build(preset, **fields).eval()
    ours.backbone.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.class_head.weight.mul_(4)
        ours.query_position.mul_(4)
        ours.box_head.layers[-1].weight.mul_(10)
    with tempfile.TemporaryDirectory() as folder:
        convert.to_huggingface(ours, folder)
        theirs = transformers.DetrForObjectDetection.from_pretrained(folder).eval()
    return ours.to(device, memory_format=torch.channels_last), theirs.to(device)


def sides(size: tuple[int, int], device: torch.device) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Each way to detect, to logits and boxes."""
    ours, theirs = build(device)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    padding = torch.zeros(1, *size, dtype=torch.bool, device=device)

    def of_theirs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with arithmetic(device, dtype):
            found = theirs(images)
        return found.logits[0].float(), found.pred_boxes[0].float()

    def of_ours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with arithmetic(device, dtype):
            found = ours(laid_out, padding)
        return found.logits[-1, 0], found.boxes[-1, 0]

    known = {"transformers": lambda: of_theirs(torch.float32), "ours": lambda: of_ours(torch.float32)}
    if choose_dtype("auto", device) == torch.bfloat16:
        known |= {"transformers bf16": lambda: of_theirs(torch.bfloat16), "ours bf16": lambda: of_ours(torch.bfloat16)}
    return known


def check(answers: dict[str, tuple[Tensor, Tensor]], size: tuple[int, int]) -> dict[str, float]:
    """How far our answers are from theirs in fp32."""
    logits, boxes = answers["transformers"]
    apart = {"logits": float((answers["ours"][0] - logits).abs().max())}
    apart["boxes"] = float((answers["ours"][1] - boxes).abs().max())
    wrong = max(apart.values()) > 1e-4
    if "ours bf16" in answers:
        pixels = (answers["ours bf16"][1] - boxes).abs() * boxes.new_tensor([size[1], size[0], size[1], size[0]])
        apart["pixels in bf16"] = float(pixels.max())
        apart["scores in bf16"] = float((answers["ours bf16"][0].softmax(-1) - logits.softmax(-1)).abs().max())
        wrong = wrong or apart["pixels in bf16"] > 1 or apart["scores in bf16"] > 0.02
    if wrong or boxes.std(0).max() < 1e-3:
        raise SystemExit(f"The sides do not answer alike, or answer all alike: {apart}")
    return apart


def measure(device: torch.device, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Agreement and speed of all sides, in this process."""
    with torch.inference_mode():
        ways = sides(size, device)
        apart = check({name: way() for name, way in ways.items()}, size)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            turn = number % len(ways)
            for name in [*ways][turn:] + [*ways][:turn]:
                start = now(device)
                ways[name]()
                times[name].append(now(device) - start)
        with direct():
            needed = operations(ways["ours"])
        peaks = {name: peak_rate(device, torch.bfloat16 if "bf16" in name else torch.float32) for name in ways}
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = {"ours": "transformers", "ours bf16": "transformers bf16"}
    ratios = {
        f"{name} against {peer}": statistics.median(
            theirs / ours for theirs, ours in zip(times[peer], times[name], strict=True)
        )
        for name in ways
        for peer in ways
        if name in peers and peer not in peers
    }
    shares = {name: needed / medians[name] / peaks[name] for name in ways}
    return {"seconds": times, "medians": medians, "ratios": ratios, "shares_of_peak": shares, "apart": apart}


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, of in result["processes"].items():
        lines[name] = {
            **{
                side: f"{seconds:.2f} s, {of['shares_of_peak'][side]:.2f} of peak"
                for side, seconds in of["medians"].items()
            },
            **{pair: f"{ratio:.2f} times" for pair, ratio in of["ratios"].items()},
            "apart": ", ".join(f"{key} {value:.1e}" for key, value in of["apart"].items()),
        }
    return {**lines, **{key: result[key] for key in ("size", "device", "threads", "rounds", "machine")}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--device", default="cpu")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds, size = (3, (320, 416)) if arguments.short else (arguments.rounds, tuple(arguments.size))
    processes = {}
    for name in ("as the system has it", "settled"):
        with process(arguments.threads, settled=name == "settled") as pool:
            processes[name] = pool.submit(measure, device, size, rounds).result()
    result = {
        "processes": processes,
        "size": size,
        "device": arguments.device if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": arguments.threads,
        "rounds": rounds,
        "machine": machine(("detrkit", "torch", "transformers")),
    }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
