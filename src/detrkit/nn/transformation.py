"""The conditional spatial query of Conditional DETR (Meng et al., ICCV 2021, section 3.3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrkit.nn.heads import MLP, xavier

TRANSFORMATIONS = ("identity", "single", "block", "diagonal", "full")
"""None, one factor, a matrix for each head, a factor for each channel, one matrix."""


class Transformation(nn.Module):
    """T of equation 6: what a query has seen transforms its point's encoding (its forms: section 4.3).

    Args:
        form: one of `TRANSFORMATIONS`.
        dim: width of a query and of the encoding.
        heads: attention heads, for `block`.
    """

    def __init__(self, form: str, dim: int, heads: int):
        super().__init__()
        blocks = heads if form == "block" else 1
        numbers = {"identity": 0, "single": 1, "diagonal": dim, "block": dim * dim // heads, "full": dim * dim}[form]
        self.form, self.blocks = form, blocks
        self.scale = xavier(MLP(dim, dim, numbers)) if numbers else None

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Start the forms that are factors at one, whatever was seen."""
        if self.scale is not None and self.form in ("single", "diagonal"):
            weight, bias = self.scale.layers[-1].parameters()
            weight.zero_()
            bias.fill_(1.0)

    def forward(self, x: Float[Tensor, "b q d"], encoded: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        """The conditional spatial query of hidden states `x` at points encoded as `encoded`."""
        if self.scale is None:
            return encoded
        numbers = self.scale(x)
        if self.form in ("single", "diagonal"):
            return numbers * encoded
        parts = encoded.view(*encoded.shape[:-1], self.blocks, -1)
        matrices = numbers.view(*parts.shape, parts.shape[-1])
        return (matrices @ parts[..., None]).flatten(-3)
