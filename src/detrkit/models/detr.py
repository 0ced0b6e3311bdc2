"""DETR: end-to-end object detection with transformers (Carion et al., ECCV 2020).

A backbone's map is flattened into tokens, an encoder lets them see each other, and a decoder turns a fixed set of
learned queries into as many boxes, each of one class or of none. The file reads as figures 2 and 10 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrkit.losses.criterion import SetCriterion, SoftmaxClassification, TermWeights
from detrkit.models._config import check
from detrkit.models._keys import HuggingFace, huggingface, huggingface_fields, official, packed, read_shapes, split
from detrkit.nn.attention import Attention
from detrkit.nn.backbone import build_backbone
from detrkit.nn.dropout import Dropout
from detrkit.nn.groups import fold_groups, separated
from detrkit.nn.heads import MLP, in_float32
from detrkit.nn.position import LearnedPosition, SinePosition, encode_points, spread_points
from detrkit.nn.recomputing import Recomputable
from detrkit.nn.transformer import Encoder, FeedForward, cells_outside
from detrkit.postprocess import Scored, softmax_detections, softmax_ensemble
from detrkit.structures import Hidden, Memory, Predictions, Queries


@dataclass(frozen=True)
class Config:
    """The architecture and its criterion; defaults are the paper's.

    Attributes:
        num_classes: count of categories; no-object is one more and is not counted.
        backbone: name of the backbone (`detrkit.nn.backbone.names`).
        stride: pixels between tokens: which level of the backbone the encoder reads.
        dilated: the last stage keeps the resolution of the one before and dilates (DC5); halves the stride.
        frozen_stages: stages of the backbone that never train, from the image on; the paper's 2 are stem and layer1.
        num_queries: the most objects that can be found in an image.
        dim: width of tokens and queries; a multiple of 4 and of `heads`.
        heads: attention heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder; each has its own loss.
        feedforward: width inside the feed-forward blocks.
        dropout: probability, in training.
        pre_norm: normalise before each block rather than after it.
        position: `sine` or `learned`.
        temperature: of the sine encoding; lower is more local.
        query_start: `normal` is the paper's: random query positions, no content. `grid` starts both as the encoding
            of points spread over the image, with each cross-attention's key projection equal to its query projection,
            so that a query at first looks around its point and knows where that is. Afterwards all of it is learned.
        query_groups: so many sets of queries learn side by side and do not see each other; each is matched on its own,
            so every image teaches that many times (Group DETR, Chen et al., ICCV 2023). Only the first set predicts.
        position_in_content: tokens carry their position in what attention gathers, not only in what it compares, so
            that a gathered token says where it was. The paper's do not.
        no_object_weight: weight of no-object in the cross-entropy.
        class_weight: weight of the class part, in matching and loss.
        l1_weight: weight of the L1 part.
        giou_weight: weight of the generalised IoU part.
        image_size: the shorter side that images are resized to for prediction, in pixels.
        longest: limit of the longer side, in pixels.
    """

    num_classes: int = 91
    backbone: str = "resnet50"
    stride: int = 32
    dilated: bool = False
    frozen_stages: int = 2
    num_queries: int = 100
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    position: str = "sine"
    temperature: float = 10000.0
    query_start: str = "normal"
    query_groups: int = 1
    position_in_content: bool = False
    no_object_weight: float = 0.1
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    image_size: int = 800
    longest: int = 1333


class DecoderLayer(Recomputable):
    """Queries attend to each other, then to the memory, then each is transformed alone.

    Args:
        config: dim, heads, feedforward, dropout and pre_norm are read.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attention = Attention(config.dim, config.heads, config.dropout)
        self.cross_attention = Attention(config.dim, config.heads, config.dropout)
        self.feedforward = FeedForward(config.dim, config.feedforward, config.dropout)
        self.self_attention_norm = nn.LayerNorm(config.dim)
        self.cross_attention_norm = nn.LayerNorm(config.dim)
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        queries: Queries,
        memory: Memory,
        key: Float[Tensor, "#b n d"],
        blocked: Bool[Tensor, "1 1 q q"] | None,
        outside: Bool[Tensor, "#b 1 1 n"] | None,
    ) -> Float[Tensor, "b q d"]:
        """One layer: `key` is the memory with its positions; `blocked` and `outside` are True where not to look."""
        position = queries.position
        if self.pre_norm:
            y = self.self_attention_norm(x)
            x = x + self.dropout(self.self_attention(y + position, y + position, y, blocked))
            y = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(y + position, key, memory.tokens, outside))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        y = self.self_attention(x + position, x + position, x, blocked)
        x = self.self_attention_norm(x + self.dropout(y))
        y = self.cross_attention(x + position, key, memory.tokens, outside)
        x = self.cross_attention_norm(x + self.dropout(y))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class Model(nn.Module):
    """DETR, from normalised images to the predictions of every decoder layer.

    Args:
        config: the architecture.

    Raises:
        UsageError: a number that makes no sense, a width that the heads or the position encoding cannot divide, or an
            unknown position encoding.
    """

    def __init__(self, config: Config):
        super().__init__()
        check(config, position=("sine", "learned"), query_start=("normal", "grid"))
        self.config = config
        self.backbone = build_backbone(
            config.backbone, levels=(config.stride,), dilated=config.dilated, frozen_stages=config.frozen_stages
        )
        self.projection = nn.Conv2d(self.backbone.channels[-1], config.dim, kernel_size=1)
        self.position = (
            SinePosition(config.dim, config.temperature) if config.position == "sine" else LearnedPosition(config.dim)
        )
        self.encoder = Encoder(
            config.encoder_layers, config.dim, config.heads, config.feedforward, config.dropout, config.pre_norm
        )
        self.query_position = nn.Parameter(torch.randn(config.query_groups * config.num_queries, config.dim))
        self.query_content: nn.Parameter | None = None
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.dim)
        self.class_head = nn.Linear(config.dim, config.num_classes + 1)
        self.box_head = MLP(config.dim, config.dim, config.dim, 4)
        if config.query_start == "grid":
            self._start_on_grid()

    def _start_on_grid(self) -> None:
        points = spread_points(self.config.query_groups * self.config.num_queries)
        start = encode_points(points, self.config.dim, self.config.temperature)
        self.query_position = nn.Parameter(start.clone())
        self.query_content = nn.Parameter(start.clone())
        with torch.no_grad():
            for layer in self.decoder_layers:
                assert isinstance(layer, DecoderLayer)
                layer.cross_attention.key.weight.copy_(layer.cross_attention.query.weight)

    def encode(self, images: Float[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"] | None) -> Memory:
        """Backbone, projection to `dim`, position encoding, encoder."""
        return self.encode_features(tuple(self.backbone(images)), padding)

    def encode_features(
        self, features: tuple[Float[Tensor, "b _ _ _"], ...], padding: Bool[Tensor, "b _ _"] | None
    ) -> Memory:
        """What follows the backbone; `padding` in any resolution, that of the image or of its features."""
        x = self.projection(features[-1])
        outside, hidden = cells_outside(padding, x)
        position = self.position(outside).to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2)
        if self.config.position_in_content:
            tokens = tokens + position
        tokens = self.encoder(tokens, position, hidden)
        return Memory(tokens, position, hidden, (x.shape[-2], x.shape[-1]), features, x)

    def queries(self, batch_size: int) -> Queries:
        """The learned queries: a position and, unless they started on a grid, no content. All groups in training."""
        groups = self.config.query_groups if self.training else 1
        count = groups * self.config.num_queries
        position = self.query_position[:count].expand(batch_size, -1, -1)
        content = torch.zeros_like(position)
        if self.query_content is not None:
            content = self.query_content[:count].expand(batch_size, -1, -1)
        return Queries(content, position, separated(count, groups, position.device), groups)

    def decode(self, memory: Memory, queries: Queries) -> Hidden:
        """The decoder: every layer's output, normalised, is an answer."""
        key = memory.tokens + memory.position
        blocked = None if queries.blocked is None else queries.blocked[None, None]
        outside = None if memory.padding is None else memory.padding[:, None, None, :]
        x, states = queries.content, []
        for layer in self.decoder_layers:
            x = layer(x, queries, memory, key, blocked, outside)
            states.append(self.decoder_norm(x))
        return Hidden(torch.stack(states), groups=queries.groups)

    def predict(self, hidden: Hidden) -> Predictions:
        """The heads, the same for every layer. Groups of queries become further layers, the first group the last."""
        states = fold_groups(hidden.states, hidden.groups)
        return Predictions(in_float32(self.class_head, states), in_float32(self.box_head, states).sigmoid(), states)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"] | None, queries: Queries | None = None
    ) -> Predictions:
        """Detect.

        Args:
            images: normalised (`detrkit.structures.NORMALIZATION_MEAN`), zeros where padded.
            padding: True where padded; None: nowhere.
            queries: what to ask; by default the learned queries.
        """
        queries = self.queries(len(images)) if queries is None else queries
        return self.predict(self.decode(self.encode(images, padding), queries))


def criterion(config: Config) -> SetCriterion:
    """Hungarian loss with the config's weights; the matching has the same weights, on probabilities."""
    weights = TermWeights(config.class_weight, config.l1_weight, config.giou_weight)
    return SetCriterion(
        SoftmaxClassification(config.no_object_weight), cost=weights, loss=weights, layers=config.decoder_layers
    )


def postprocess(predictions: Predictions, sizes: Int64[Tensor, "b 2"], ensemble: bool = False) -> list[Scored]:
    """Scored boxes in pixels: of the last layer, or of all layers together with overlaps suppressed."""
    return softmax_ensemble(predictions, sizes) if ensemble else softmax_detections(predictions, sizes)


# Published figures on COCO val2017: AP 42.0 (r50), 43.3 (r50-dc5), 43.5 (r101), 44.9 (r101-dc5), 500 epochs.
PRESETS = {
    # Ours, for two processor cores and a few hundred images: what differs from the paper is named by its field.
    "detr-nano": Config(
        backbone="mobilenet_v2",
        stride=16,
        num_queries=60,
        dim=128,
        heads=4,
        encoder_layers=3,
        decoder_layers=3,
        feedforward=512,
        dropout=0.0,
        pre_norm=True,
        temperature=20.0,
        query_start="grid",
        query_groups=4,
        position_in_content=True,
        image_size=256,
        longest=448,
    ),
    "detr-r18": Config(backbone="resnet18"),
    "detr-r34": Config(backbone="resnet34"),
    "detr-r50": Config(backbone="resnet50"),
    "detr-r101": Config(backbone="resnet101"),
    "detr-r18-dc5": Config(backbone="resnet18", dilated=True),
    "detr-r34-dc5": Config(backbone="resnet34", dilated=True),
    "detr-r50-dc5": Config(backbone="resnet50", dilated=True),
    "detr-r101-dc5": Config(backbone="resnet101", dilated=True),
}

OFFICIAL = official({**packed("self_attn", "self_attention"), **packed("multihead_attn", "cross_attention")})
HUGGINGFACE = HuggingFace(
    "Detr",
    "detr",
    huggingface({**split("self_attn", "self_attention"), **split("encoder_attn", "cross_attention")}),
    huggingface_fields(class_weight=("class_cost",), no_object_weight=("eos_coefficient",)),
)


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the config that tensors show: the class head has a row more, for no-object."""
    fields = read_shapes(state)
    return {**fields, "num_classes": fields["num_classes"] - 1}
