"""Multi-head attention: the mathematics as a function, the projections as a module.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detrkit.nn.blocks import blocks
from detrkit.nn.dropout import draw_kept

AT_ONCE = 2**18
"""How many attention weights are computed at a time on a processor: few enough for a cache."""


def attend(
    q: Float[Tensor, "b q d"],
    k: Float[Tensor, "#b n d"],
    v: Float[Tensor, "#b n e"],
    heads: int,
    blocked: Bool[Tensor, "#b #h #q n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b q e"]:
    """Scaled dot-product attention, softmax(q kᵀ / √(d / heads)) v for each head.

    Args:
        q: projected queries.
        k: projected keys; one row of them serves all queries, so that what is asked again costs no projection.
        v: projected values; their width may differ from that of the keys.
        heads: the widths are divided into this many heads.
        blocked: True where a query may not attend to a key; broadcast over images, heads and queries.
        dropout: probability with which an attention weight is dropped.
    """
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2).expand(len(q), -1, -1, -1) for x in (q, k, v))
    if q.device.type == "cpu" and q.requires_grad and (dropout or q.dtype == torch.bfloat16):
        return _attend_in_steps(q, k, v, blocked, dropout).flatten(2)
    mask = None if blocked is None else ~blocked
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


def _attend_in_steps(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    blocked: Bool[Tensor, "#b #h #q n"] | None,
    dropout: float,
) -> Float[Tensor, "b q h e"]:
    """The same, product by product: on a CPU torch's fused kernel knows no dropout, and its bf16 backward is slow."""
    added = kept = None
    if blocked is not None:
        # Not minus infinity, of which a query that may see nothing would become NaN.
        added = torch.zeros_like(blocked, dtype=q.dtype).masked_fill_(blocked, torch.finfo(q.dtype).min)
        added = added.expand(*q.shape[:2], -1, -1)
    if dropout:
        kept = draw_kept((*q.shape[:3], k.shape[2]), dropout)
    result: Tensor = _Steps.apply(q, k, v, added, kept, 1 / (1 - dropout))  # type: ignore[no-untyped-call]
    return result


class _Steps(torch.autograd.Function):
    """Attention that with dropout keeps a byte a weight, for what was dropped, and computes the weights again.

    A few heads at a time, so that their weights stay in the cache (as Dao et al. do, "FlashAttention", NeurIPS 2022).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, kept: Tensor | None, scale: float
    ) -> Tensor:
        result, found = v.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]), []
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(q, k):
                weights = _weights(q[block], k[block], None if added is None else added[block])
                if kept is None:
                    found.append(weights)
                else:
                    weights *= kept[block]
                result.transpose(1, 2)[block] = weights @ v[block]
        ctx.save_for_backward(q, k, v, added, kept, *found)
        ctx.scale = scale
        return result.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, added, kept, *found = ctx.saved_tensors
        of_q, of_k, of_v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            gradient = (gradient * ctx.scale).transpose(1, 2)
            for number, block in enumerate(_blocks(q, k)):
                if found:
                    weights = found[number]
                else:
                    weights = _weights(q[block], k[block], None if added is None else added[block])
                dropped = weights if kept is None else weights * kept[block]
                of_v[block] = dropped.transpose(-1, -2) @ gradient[block]
                of_weights = (gradient[block] @ v[block].transpose(-1, -2)).mul_(dropped)
                # The gradient of a softmax: w * (g - sum(w * g)).
                of_products = of_weights.addcmul_(weights, of_weights.sum(-1, keepdim=True), value=-1)
                of_q[block] = of_products @ k[block] * q.shape[-1] ** -0.5
                of_k[block] = of_products.transpose(-1, -2) @ (q[block] * q.shape[-1] ** -0.5)
        return of_q, of_k, of_v, None, None, None


def _weights(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h n d"], added: Float[Tensor, "b h _ n"] | None
) -> Float[Tensor, "b h q n"]:
    products = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if added is not None:
        products += added
    return products.softmax(-1)


def _blocks(q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h n d"]) -> Iterator[tuple[slice, slice]]:
    images, heads, queries = q.shape[:3]
    return blocks(images, heads, queries * k.shape[2], AT_ONCE)


def projection(dim: int, bias: float | None = None) -> nn.Linear:
    """A projection of its own, by Xavier's rule, for attention that is not packed into one matrix.

    Args:
        dim: width of the input and the output.
        bias: where the bias starts; None: at random, as torch has it.
    """
    layer = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(layer.weight)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


class Attention(nn.Module):
    """Multi-head attention with its four projections.

    Args:
        dim: width of the input and the output.
        heads: number of heads; divides `dim`.
        dropout: probability with which an attention weight is dropped in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        # The official models hold query, key and value in one matrix of 3·dim rows, so Xavier sees that fan-out.
        bound = math.sqrt(6 / (dim + 3 * dim))
        for projection in (self.query, self.key, self.value):
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Float[Tensor, "#b n d"],
        value: Float[Tensor, "#b n d"],
        blocked: Bool[Tensor, "#b #h #q n"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Attend from `query` to `key` and gather `value`; `blocked` is True where this is not allowed."""
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(self.query(query), self.key(key), self.value(value), self.heads, blocked, dropout))
