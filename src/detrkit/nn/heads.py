"""Small networks that turn a hidden state into an answer."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: input width, hidden widths, output width.
    """

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Apply the layers in turn; no activation after the last."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


def in_float32(head: nn.Module, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
    """What a head answers, in the type of its weights even where all before it computes in less.

    bf16 has eight bits: a box would be right to a few pixels only. Heads are small, and cost nothing. They are in
    float32, unless somebody cast the whole model.
    """
    with torch.autocast(x.device.type, enabled=False):
        answer: Tensor = head(x.to(next(head.parameters()).dtype))
    return answer


def xavier(network: MLP) -> MLP:
    """The network with every matrix started by Xavier's rule, as transformers are."""
    for layer in network.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
    return network


@torch.no_grad()
def fit_last_layer(network: MLP, x: Float[Tensor, "n i"], y: Float[Tensor, "n o"]) -> None:
    """Set the last layer so that the network gives about `y` for `x`: least squares with small weights.

    Large weights would fit better, and every step of a training would then shake the answers.

    Args:
        network: at least two layers; all but the last stay as they are.
        x: inputs.
        y: the outputs that are wanted.
    """
    *hidden, last = network.layers
    for layer in hidden:
        x = layer(x).relu()
    assert isinstance(last, nn.Linear)
    x, y = x.double(), y.double()
    ridge = 10 * torch.eye(x.shape[1], dtype=x.dtype)
    last.bias.zero_()
    last.weight.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y).T)
