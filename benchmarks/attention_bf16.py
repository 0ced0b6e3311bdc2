"""Claim: on a CPU in bf16, training through attention product by product takes less time than through the fused kernel.

    python benchmarks/attention_bf16.py [--rounds 21]

Forward and backward of `detrkit.nn.attention.attend` against torch's `scaled_dot_product_attention` on the same tensors
with the same padding, one thread, rounds paired in alternating order; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from _report import machine, parser, show
from torch import Tensor
from torch.nn import functional as F

from detrkit.nn.attention import attend

CASES = {"nano encoder, 192 px": (4, 192, 192, 4, 128), "nano encoder, 256 px": (4, 352, 352, 4, 128)}
LARGE = {"r50 encoder, 800 px": (2, 850, 850, 8, 256)}


def fused(q: Tensor, k: Tensor, v: Tensor, heads: int, blocked: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~blocked).transpose(1, 2).flatten(2)


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call().float().square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=21)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds = 7 if arguments.short else arguments.rounds
    cases = CASES if arguments.short else CASES | LARGE
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, (batch, queries, keys, heads, dim) in cases.items():
        q, k, v = (
            torch.randn(batch, length, dim, generator=generator).bfloat16().requires_grad_()
            for length in (queries, keys, keys)
        )
        blocked = torch.zeros(batch, 1, 1, keys, dtype=torch.bool)
        blocked[0, ..., -20:] = True
        sides: list[Callable[[], Tensor]] = [
            lambda q=q, k=k, v=v, heads=heads, blocked=blocked: attend(q, k, v, heads, blocked),
            lambda q=q, k=k, v=v, heads=heads, blocked=blocked: fused(q, k, v, heads, blocked),
        ]
        torch.testing.assert_close(sides[0](), sides[1](), atol=2e-2, rtol=2e-2)
        times: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            pair = {side: seconds(sides[side]) for side in order}
            times.append((pair[0], pair[1]))
        ratio = statistics.median(theirs / ours for ours, theirs in times[1:])
        ours, theirs = (statistics.median(column) * 1e3 for column in zip(*times[1:], strict=True))
        rows[name] = f"{ratio:.2f} × (ours {ours:.1f} ms, fused {theirs:.1f} ms)"
    show({"fused / ours": rows, "machine": machine(("detrkit", "torch"))}, arguments.json)


if __name__ == "__main__":
    main()
