"""The transformer encoder that the family shares, and the feed-forward block of every layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.nn.attention import Attention
from detrkit.nn.dropout import Dropout, ReluDropout
from detrkit.nn.recomputing import Recomputable


def cells_outside(
    padding: Bool[Tensor, "b _ _"] | None, x: Float[Tensor, "b _ h w"]
) -> tuple[Bool[Tensor, "b h w"], Bool[Tensor, "b h*w"] | None]:
    """Which cells of a map lie outside their image, and the same as a mask of tokens; no mask where nothing does.

    Whether anything does is looked up on a processor alone, and not while the model is exported, as what is found would
    hold for these images only. Elsewhere the look would wait for the device, which has the backbone before it.

    Args:
        padding: True where padded, in any resolution; None: nowhere.
        x: the map.
    """
    if padding is None:
        return torch.zeros(len(x), *x.shape[2:], dtype=torch.bool, device=x.device), None
    outside = F.interpolate(padding[:, None].float(), size=x.shape[2:])[:, 0].bool()
    may_look = padding.device.type == "cpu" and not torch.compiler.is_compiling()
    is_needless = may_look and not padding.any()
    return outside, None if is_needless else outside.flatten(1)


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear.

    Args:
        dim: width of the input and the output.
        hidden: width between.
        dropout: probability with which a hidden unit is dropped in training.
    """

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.expand, self.contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.relu_dropout = ReluDropout(dropout)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The same function at every token."""
        return self.contract(self.relu_dropout(self.expand(x)))


class EncoderLayer(Recomputable):
    """Self-attention and feed-forward with residuals; positions are added to queries and keys, never to values.

    Args:
        dim: width of a token.
        heads: attention heads.
        hidden: width inside the feed-forward block.
        dropout: probability, at every place where the paper has one.
        pre_norm: normalise before each block rather than after its residual.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attention = Attention(dim, heads, dropout)
        self.feedforward = FeedForward(dim, hidden, dropout)
        self.self_attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        position: Float[Tensor, "b n d"],
        blocked: Bool[Tensor, "b 1 1 n"] | None,
    ) -> Float[Tensor, "b n d"]:
        """One layer; `blocked` is True for keys that nobody may attend to."""
        if self.pre_norm:
            y = self.self_attention_norm(x)
            asked = y + position
            x = x + self.dropout(self.self_attention(asked, asked, y, blocked))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        asked = x + position
        x = self.self_attention_norm(x + self.dropout(self.self_attention(asked, asked, x, blocked)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class Encoder(nn.Module):
    """A stack of encoder layers; with `pre_norm` the stack ends in a normalisation.

    Args:
        layers: how many.
        dim: width of a token.
        heads: attention heads.
        hidden: width inside the feed-forward blocks.
        dropout: probability.
        pre_norm: normalise before each block rather than after its residual.
    """

    def __init__(self, layers: int, dim: int, heads: int, hidden: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        position: Float[Tensor, "b n d"],
        padding: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n d"]:
        """Let every token see every other; `padding` is True for tokens outside the image."""
        blocked = None if padding is None else padding[:, None, None, :]
        for layer in self.layers:
            x = layer(x, position, blocked)
        return self.norm(x)
