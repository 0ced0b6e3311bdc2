"""Multi-head attention: the mathematics as a function, the projections as a module.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


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
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2).expand(len(q), -1, -1, -1) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        out = _attend_in_steps(q, k, v, blocked, dropout)
    else:
        mask = None if blocked is None else ~blocked
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def _attend_in_steps(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    blocked: Bool[Tensor, "#b #h #q n"] | None,
    dropout: float,
) -> Float[Tensor, "b h q e"]:
    """The same, product by product: on a CPU in bf16 the fused kernel's backward takes two to three times as long."""
    with torch.autocast("cpu", enabled=False):
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if blocked is not None:
            # Not minus infinity, of which a query that may see nothing would become NaN.
            weights = weights + torch.zeros_like(blocked, dtype=q.dtype).masked_fill_(blocked, torch.finfo(q.dtype).min)
        return F.dropout(weights.softmax(-1), dropout) @ v


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
