"""The smallest variant that there can be: each query looks at the backbone's map once a layer.

A test puts a copy of this file among the variants, where it must work without an edit elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detrkit.losses.criterion import SetCriterion, SoftmaxClassification, TermWeights
from detrkit.nn.attention import Attention
from detrkit.nn.backbone import build_backbone
from detrkit.nn.heads import MLP
from detrkit.nn.position import SinePosition
from detrkit.nn.transformer import cells_outside
from detrkit.postprocess import Scored, softmax_detections
from detrkit.structures import Hidden, Memory, Predictions, Queries


@dataclass(frozen=True)
class Config:
    """The architecture.

    Attributes:
        num_classes: count of categories.
        backbone: name of the backbone.
        frozen_stages: stages of the backbone that never train.
        num_queries: the most objects that can be found.
        dim: width of tokens and queries.
        looks: decoder layers.
        image_size: shorter side of images, in pixels.
        longest: limit of the longer side, in pixels.
    """

    num_classes: int = 91
    backbone: str = "resnet-nano"
    frozen_stages: int = 2
    num_queries: int = 6
    dim: int = 16
    looks: int = 2
    image_size: int = 64
    longest: int = 96


class Model(nn.Module):
    """The detector.

    Args:
        config: the architecture.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, frozen_stages=config.frozen_stages)
        self.projection = nn.Conv2d(self.backbone.channels[-1], config.dim, 1)
        self.position = SinePosition(config.dim)
        self.query_position = nn.Parameter(torch.randn(config.num_queries, config.dim))
        self.layers = nn.ModuleList(Attention(config.dim, 2) for _ in range(config.looks))
        self.class_head = nn.Linear(config.dim, config.num_classes + 1)
        self.box_head = MLP(config.dim, config.dim, 4)

    def encode(self, images: Tensor, padding: Tensor | None) -> Memory:
        """Backbone and projection."""
        features = self.backbone(images)
        x = self.projection(features[-1])
        outside, hidden = cells_outside(padding, x)
        return Memory(
            x.flatten(2).transpose(1, 2),
            self.position(outside),
            hidden,
            (x.shape[-2], x.shape[-1]),
            tuple(features),
            x,
        )

    def queries(self, batch_size: int) -> Queries:
        """The learned queries."""
        position = self.query_position.expand(batch_size, -1, -1)
        return Queries(torch.zeros_like(position), position)

    def decode(self, memory: Memory, queries: Queries) -> Hidden:
        """Look again and again."""
        outside = None if memory.padding is None else memory.padding[:, None, None]
        x, states = queries.content, []
        for layer in self.layers:
            key = memory.tokens + memory.position
            x = x + layer(x + queries.position, key, memory.tokens, outside)
            states.append(x)
        return Hidden(torch.stack(states))

    def predict(self, hidden: Hidden) -> Predictions:
        """The heads."""
        return Predictions(self.class_head(hidden.states), self.box_head(hidden.states).sigmoid(), hidden.states)

    def forward(self, images: Tensor, padding: Tensor | None, queries: Queries | None = None) -> Predictions:
        """Detect."""
        queries = self.queries(len(images)) if queries is None else queries
        return self.predict(self.decode(self.encode(images, padding), queries))


def criterion(config: Config) -> SetCriterion:
    """The Hungarian loss."""
    weights = TermWeights(1.0, 5.0, 2.0)
    return SetCriterion(SoftmaxClassification(), cost=weights, loss=weights)


def postprocess(predictions: Predictions, sizes: Tensor, ensemble: bool = False) -> list[Scored]:
    """Scored boxes in pixels."""
    return softmax_detections(predictions, sizes)


PRESETS = {"toy-tiny": Config()}
OFFICIAL = ()
