"""DETR's mask head (Carion et al., ECCV 2020, section 5 and figure 8).

A query's attention to the encoder's memory is a coarse picture of its object; convolutions sharpen it with the
backbone's finer maps. Whatever is the same for all queries of an image is computed once for the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.errors import UsageError
from detrkit.nn.convolution import Conv2d, conv2d, settings_of
from detrkit.structures import Memory

Normalisation = Literal["joint", "per-head", "peak"]
"""How attention maps are normalised: to a sum of one over all heads and positions at once (the official DETR and
`transformers`), over the positions of each head (the official UP-DETR), or to a greatest value of one in each head
(ours: maps are as large as features from the first step, whatever the size of the image). Weights of one do not serve
another."""

_GROUPS = 8  # of a group norm, as far as the channels can be divided by it


class Canvas(NamedTuple):
    """What a mask head makes of images once, for all their queries.

    Attributes:
        base: the first convolution of the projected map, without what the attention maps add to it.
        keys: what queries are compared with.
        outside: True where a position is padding; None where nothing is.
        extent: height and width of each image, as shares of what the cells of its map stand for.
        skips: the backbone's finer maps at the widths of the layers that take them, coarsest first.
    """

    base: Float[Tensor, "b c h w"]
    keys: Float[Tensor, "b d h w"]
    outside: Bool[Tensor, "b h w"] | None
    extent: Float[Tensor, "b 2"]
    skips: tuple[Float[Tensor, "b _ _ _"], ...]


class MaskHead(nn.Module):
    """From queries to masks at the finest of the backbone's levels.

    Args:
        dim: width of queries and tokens; a multiple of `heads`.
        heads: attention maps of a query.
        channels: of the backbone's finer maps, coarsest first; each halves the width of the layers and doubles the
            resolution.
        attention: how attention maps are normalised.
        box: tell it the predicted box of a query as well, as a further map; the paper's does not.

    Raises:
        UsageError: an unknown normalisation, a width that the heads do not divide, or one too small for the layers.
    """

    def __init__(self, dim: int, heads: int, channels: Sequence[int], attention: str = "joint", *, box: bool = False):
        super().__init__()
        if attention not in get_args(Normalisation):
            expected = ", ".join(get_args(Normalisation))
            raise UsageError("Bad value for attention of the mask head", got=repr(attention), expected=expected)
        maps = heads + box
        widths = [dim + maps, dim + maps, *(dim // 2 ** (level + 1) for level in range(len(channels) + 1))]
        if dim % heads or not widths[-1]:
            raise UsageError(
                "A mask head cannot have this width",
                where="dim",
                got=dim,
                expected=f"a multiple of {heads} heads, at least {2 ** (len(channels) + 1)}",
            )
        self.heads, self.attention, self.box, self.maps = heads, attention, box, maps
        self.attention_query, self.attention_key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(
            Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(_GROUPS, width), width) for width in widths[1:])
        self.adapters = nn.ModuleList(
            nn.Conv2d(inputs, width, 1) for inputs, width in zip(channels, widths[2:], strict=False)
        )
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for linear in (self.attention_query, self.attention_key):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for convolution in (*self.layers, *self.adapters, self.output):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        if attention == "peak":
            first = self.layers[0]
            assert isinstance(first, nn.Conv2d)
            with torch.no_grad():  # few maps among many features: at first they count as much
                first.weight[:, -maps:] *= (dim / maps) ** 0.5

    def prepare(self, memory: Memory, extent: Float[Tensor, "b 2"]) -> Canvas:
        """What all queries of the images share.

        Args:
            memory: of the images.
            extent: height and width of each image, as shares of what the cells of the memory stand for.
        """
        assert memory.projected is not None
        height, width = memory.grid
        first, key = self.layers[0], self.attention_key
        assert isinstance(first, nn.Conv2d)
        dim = memory.projected.shape[1]
        base = conv2d(memory.projected, first.weight[:, :dim], first.bias, settings_of(first))
        keys = key(memory.tokens).transpose(1, 2).reshape(len(memory.tokens), dim, height, width)
        outside = None if memory.padding is None else memory.padding.view(-1, height, width)
        finer = memory.features[-2::-1]
        skips = tuple(adapt(features) for adapt, features in zip(self.adapters, finer, strict=True))
        return Canvas(base, keys, outside, extent, skips)

    def forward(
        self, canvas: Canvas, image: Int64[Tensor, " p"], hidden: Float[Tensor, "p d"], boxes: Float[Tensor, "p 4"]
    ) -> Float[Tensor, "p _ _"]:
        """The mask of each query, as logits of the pixels at the finest level.

        Args:
            canvas: of the images.
            image: which of them each query looks at.
            hidden: the decoder's last answer of each query.
            boxes: what it found, cxcywh in [0, 1] of the unpadded image.
        """
        maps = self.attention_maps(canvas, image, hidden)
        if self.box:
            inside = box_maps(boxes * canvas.extent[image].flip(-1).repeat(1, 2), maps.shape[-2:])
            maps = torch.cat([maps, inside[:, None].to(maps.dtype)], 1)
        first = self.layers[0]
        assert isinstance(first, nn.Conv2d)
        x = canvas.base[image] + conv2d(maps, first.weight[:, -self.maps :], None, settings_of(first))
        x = F.relu(self.norms[0](x))
        x = F.relu(self.norms[1](self.layers[1](x)))
        for layer, norm, skip in zip(self.layers[2:], self.norms[2:], canvas.skips, strict=True):
            x = skip[image] + F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = F.relu(norm(layer(x)))
        return self.output(x)[:, 0]

    def attention_maps(
        self, canvas: Canvas, image: Int64[Tensor, " p"], hidden: Float[Tensor, "p d"]
    ) -> Float[Tensor, "p heads h w"]:
        """Where each query looks, one map a head; arguments as for the whole."""
        width = hidden.shape[1] // self.heads
        q = self.attention_query(hidden).view(-1, self.heads, width) * width**-0.5
        k = canvas.keys.view(len(canvas.keys), self.heads, width, *canvas.keys.shape[-2:])[image]
        weights = torch.einsum("phc,phcyx->phyx", q, k)
        if canvas.outside is not None:
            weights = weights.masked_fill(canvas.outside[image][:, None], -math.inf)
        if self.attention == "peak":
            return (weights - weights.amax((2, 3), keepdim=True)).exp()
        start = 1 if self.attention == "joint" else 2
        return weights.flatten(start).float().softmax(-1).to(weights.dtype).view_as(weights)


def box_maps(boxes: Float[Tensor, "p 4"], grid: Sequence[int]) -> Float[Tensor, "p h w"]:
    """How much of each cell of a grid lies in a box, in [0, 1].

    Args:
        boxes: cxcywh in [0, 1] of the grid.
        grid: height and width of it.
    """
    shares = []
    for axis, cells in ((1, grid[0]), (0, grid[1])):
        centre, half = boxes[:, axis, None] * cells, boxes[:, axis + 2, None] * cells / 2
        edges = torch.arange(cells, device=boxes.device, dtype=boxes.dtype)
        low, high = torch.maximum(centre - half, edges), torch.minimum(centre + half, edges + 1)
        shares.append((high - low).clamp(min=0))
    return shares[0][:, :, None] * shares[1][:, None, :]


OFFICIAL: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    (r"bbox_attention\.q_linear\.(.+)", r"attention_query.\1"),
    (r"bbox_attention\.k_linear\.(.+)", r"attention_key.\1"),
    (r"mask_head\.out_lay\.(.+)", r"output.\1"),
    *(
        (rf"mask_head\.{theirs}{number + 1}\.(.+)", rf"{ours}.{number}.\1")
        for theirs, ours in (("lay", "layers"), ("gn", "norms"), ("adapter", "adapters"))
        for number in range(5)
    ),
)
"""The official names of a mask head's tensors to ours, as the tables of the variants are (`detrkit.models._keys`)."""
