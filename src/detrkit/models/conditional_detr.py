"""Conditional DETR for fast training convergence (Meng et al., ICCV 2021).

DETR's cross-attention finds a place by comparing contents. Here each query also has a reference point in the image, and
what it has seen so far says where to look from there: the *conditional spatial query*, a transformation of the point's
encoding, which is compared with the positions of the memory apart from the contents. The file reads as figure 3 of the
paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrkit.losses.criterion import FocalClassification, SetCriterion, TermWeights
from detrkit.models._config import check
from detrkit.models._keys import HuggingFace, huggingface, huggingface_fields, official, read_shapes
from detrkit.nn.attention import attend, projection
from detrkit.nn.backbone import build_backbone
from detrkit.nn.dropout import Dropout
from detrkit.nn.groups import fold_groups, separated
from detrkit.nn.heads import MLP, fit_last_layer, in_float32, xavier
from detrkit.nn.position import LearnedPosition, SinePosition, encode_points, inverse_sigmoid, spread_points
from detrkit.nn.recomputing import Recomputable
from detrkit.nn.transformation import TRANSFORMATIONS, Transformation
from detrkit.nn.transformer import Encoder, FeedForward, cells_outside
from detrkit.postprocess import Scored, sigmoid_detections, sigmoid_ensemble
from detrkit.structures import Hidden, Memory, Predictions, Queries

SHARPER = 2**0.5  # Neighbours' encodings are much alike: larger projections narrow a query's first look.


@dataclass(frozen=True)
class Config:
    """The architecture and its criterion; defaults are the paper's.

    Attributes:
        num_classes: count of categories; each is a yes or no of its own, and there is no class for no-object.
        backbone: name of the backbone (`detrkit.nn.backbone.names`).
        stride: pixels between tokens: which level of the backbone the encoder reads.
        dilated: the last stage keeps the resolution of the one before and dilates (DC5); halves the stride.
        frozen_stages: stages of the backbone that never train, from the image on; the paper's 2 are stem and layer1.
        num_queries: queries, and so the most objects that can be found in an image.
        dim: width of tokens and queries; a multiple of 4 and of `heads`.
        heads: attention heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder; each has its own loss.
        feedforward: width inside the feed-forward blocks.
        dropout: probability, in training.
        pre_norm: normalise before each block rather than after it; the paper's does not.
        position: `sine` or `learned`: the memory's encoding. That of the reference points is always `sine`.
        temperature: of the sine encoding; lower is more local.
        transformation: the form of T, by which what a query has seen transforms its point's encoding (section 4.3):
            `identity` none, `single` one factor, `block` one matrix for each head, `diagonal` a factor for each channel
            (the paper's), `full` one matrix.
        query_start: `normal` is the paper's: random query positions. `grid` starts them as encodings of points spread
            over the image and the reference head so that it reads these points from them. Afterwards all is learned.
        query_groups: so many sets of queries learn side by side and do not see each other; each is matched on its own,
            so every image teaches that many times (Group DETR, Chen et al., ICCV 2023). Only the first set predicts.
        focal_alpha: weight of positives in the focal loss, in [0, 1]; negatives have the rest.
        focal_gamma: how much the focal loss attends to what is hard.
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
    num_queries: int = 300
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    position: str = "sine"
    temperature: float = 10000.0
    transformation: str = "diagonal"
    query_start: str = "normal"
    query_groups: int = 1
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    image_size: int = 800
    longest: int = 1333


class SelfAttention(nn.Module):
    """Queries see each other: content and position are projected apart and added.

    Args:
        dim: width of a query.
        heads: attention heads.
        dropout: probability with which an attention weight is dropped in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content, self.query_position = projection(dim), projection(dim)
        self.key_content, self.key_position = projection(dim), projection(dim)
        self.value, self.output = projection(dim), projection(dim, bias=0.0)

    def forward(
        self, x: Float[Tensor, "b q d"], position: Float[Tensor, "b q d"], blocked: Bool[Tensor, "1 1 q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """What each query gathers from the others; `blocked` is True where it may not."""
        q = self.query_content(x) + self.query_position(position)
        k = self.key_content(x) + self.key_position(position)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(q, k, self.value(x), self.heads, blocked, dropout))


class ConditionalCrossAttention(nn.Module):
    """Queries look at the memory: contents and places are compared apart (section 3.3, equation 2).

    Each head's query is its part of the content beside its part of the conditional spatial query, and each head's key
    its part of the content beside its part of the position. So the product is the sum of the two comparisons.

    Args:
        dim: width of a query and of a token.
        heads: attention heads.
        dropout: probability with which an attention weight is dropped in training.
        is_first: the first layer's contents are empty, so there positions enter the content part, too.
    """

    def __init__(self, dim: int, heads: int, dropout: float, is_first: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content, self.query_spatial = projection(dim), projection(dim)
        self.query_position = projection(dim) if is_first else None
        self.key_content, self.key_position = projection(dim), projection(dim)
        self.value, self.output = projection(dim), projection(dim, bias=0.0)

    @torch.no_grad()
    def look_around(self) -> None:
        """Start so that a place is compared best with itself: a query at first looks around its point."""
        self.query_spatial.weight.mul_(SHARPER)
        self.key_position.weight.copy_(self.query_spatial.weight)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        spatial: Float[Tensor, "b q d"],
        memory: Memory,
        outside: Bool[Tensor, "#b 1 1 n"] | None,
    ) -> Float[Tensor, "b q d"]:
        """What each query gathers; `spatial` is its conditional spatial query, `outside` True for padded tokens."""
        q, k = self.query_content(x), self.key_content(memory.tokens)
        where = self.key_position(memory.position)
        if self.query_position is not None:
            q, k = q + self.query_position(position), k + where
        q, k = self._beside(q, self.query_spatial(spatial)), self._beside(k, where)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(q, k, self.value(memory.tokens), self.heads, outside, dropout))

    def _beside(self, content: Float[Tensor, "b n d"], spatial: Float[Tensor, "b n d"]) -> Float[Tensor, "b n 2*d"]:
        """The two halves of every head next to each other."""
        parts = [x.view(*x.shape[:2], self.heads, -1) for x in (content, spatial)]
        return torch.cat(parts, -1).flatten(-2)


class DecoderLayer(Recomputable):
    """Queries attend to each other, then to the memory, then each is transformed alone.

    Args:
        config: dim, heads, feedforward, dropout and pre_norm are read.
        is_first: it is the first of the decoder.
    """

    def __init__(self, config: Config, is_first: bool):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attention = SelfAttention(config.dim, config.heads, config.dropout)
        self.cross_attention = ConditionalCrossAttention(config.dim, config.heads, config.dropout, is_first)
        self.feedforward = FeedForward(config.dim, config.feedforward, config.dropout)
        self.self_attention_norm = nn.LayerNorm(config.dim)
        self.cross_attention_norm = nn.LayerNorm(config.dim)
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        spatial: Float[Tensor, "b q d"],
        memory: Memory,
        blocked: Bool[Tensor, "1 1 q q"] | None,
        outside: Bool[Tensor, "#b 1 1 n"] | None,
    ) -> Float[Tensor, "b q d"]:
        """One layer; `blocked` and `outside` are True where not to look."""
        if self.pre_norm:
            x = x + self.dropout(self.self_attention(self.self_attention_norm(x), position, blocked))
            y = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(y, position, spatial, memory, outside))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, position, blocked)))
        y = self.cross_attention(x, position, spatial, memory, outside)
        x = self.cross_attention_norm(x + self.dropout(y))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class Model(nn.Module):
    """Conditional DETR, from normalised images to the predictions of every decoder layer.

    Args:
        config: the architecture.

    Raises:
        UsageError: a number that makes no sense, a width that the heads or the position encoding cannot divide, or an
            unknown position encoding, transformation or start of the queries.
    """

    def __init__(self, config: Config):
        super().__init__()
        check(config, position=("sine", "learned"), transformation=TRANSFORMATIONS, query_start=("normal", "grid"))
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
        self.reference_head = xavier(MLP(config.dim, config.dim, 2))
        self.transformation = Transformation(config.transformation, config.dim, config.heads)
        if config.decoder_layers == 1:  # nobody asks what a single layer has seen: no gradient would ever come
            self.transformation.requires_grad_(False)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config, layer == 0) for layer in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.dim)
        self.class_head = nn.Linear(config.dim, config.num_classes)
        self.box_head = MLP(config.dim, config.dim, config.dim, 4)
        # At first every class of every query has probability 0.01, so that the many negatives do not drown the few
        # positives (Lin et al., RetinaNet, ICCV 2017, section 4.1), and every box is centred on its reference point.
        nn.init.constant_(self.class_head.bias, -math.log(99))
        for parameter in self.box_head.layers[-1].parameters():
            nn.init.zeros_(parameter)
        if config.query_start == "grid":
            self._start_on_grid()

    @torch.no_grad()
    def _start_on_grid(self) -> None:
        points = spread_points(len(self.query_position))
        self.query_position.copy_(encode_points(points, self.config.dim, self.config.temperature))
        fit_last_layer(self.reference_head, self.query_position, inverse_sigmoid(points))
        self.transformation.start_as_identity()
        for layer in self.decoder_layers:
            assert isinstance(layer, DecoderLayer)
            layer.cross_attention.look_around()

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
        tokens = self.encoder(tokens, position, hidden)
        return Memory(tokens, position, hidden, (x.shape[-2], x.shape[-1]), features, x)

    def queries(self, batch_size: int) -> Queries:
        """The learned queries: a position and no content. All groups in training."""
        groups = self.config.query_groups if self.training else 1
        count = groups * self.config.num_queries
        position = self.query_position[:count].expand(batch_size, -1, -1)
        return Queries(torch.zeros_like(position), position, separated(count, groups, position.device), groups)

    def decode(self, memory: Memory, queries: Queries) -> Hidden:
        """The decoder: every layer's output, normalised, is an answer; points come from the queries once."""
        blocked = None if queries.blocked is None else queries.blocked[None, None]
        outside = None if memory.padding is None else memory.padding[:, None, None, :]
        reference = in_float32(self.reference_head, queries.position).sigmoid()
        encoded = encode_points(reference, self.config.dim, self.config.temperature).to(memory.tokens.dtype)
        x, spatial, states = queries.content, encoded, list[Tensor]()
        for layer in self.decoder_layers:
            if states:
                spatial = self.transformation(states[-1] if self.config.pre_norm else x, encoded)
            x = layer(x, queries.position, spatial, memory, blocked, outside)
            states.append(self.decoder_norm(x))
        return Hidden(torch.stack(states), reference, queries.groups)

    def predict(self, hidden: Hidden) -> Predictions:
        """The heads, the same for every layer; a box is an offset from its query's point (equation 1)."""
        assert hidden.reference is not None
        x = in_float32(self.box_head, hidden.states)
        centre = x[..., :2] + inverse_sigmoid(hidden.reference)
        logits = in_float32(self.class_head, hidden.states)
        answers = (logits, torch.cat([centre, x[..., 2:]], -1).sigmoid(), hidden.states)
        return Predictions(*(fold_groups(each, hidden.groups) for each in answers))

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
    """Hungarian loss with focal classes; the matching has the same weights, with the focal cost."""
    weights = TermWeights(config.class_weight, config.l1_weight, config.giou_weight)
    classification = FocalClassification(config.focal_alpha, config.focal_gamma)
    return SetCriterion(classification, cost=weights, loss=weights, layers=config.decoder_layers)


def postprocess(predictions: Predictions, sizes: Int64[Tensor, "b 2"], ensemble: bool = False) -> list[Scored]:
    """Scored boxes in pixels: of the last layer, or of all layers together with overlaps suppressed."""
    return sigmoid_ensemble(predictions, sizes) if ensemble else sigmoid_detections(predictions, sizes)


# Published figures on COCO val2017 after 50, 75, 108 epochs: r50 AP 40.9, 42.1, 43.0; r101 42.8, –, 44.5;
# r50-dc5 43.8, –, 45.1; r101-dc5 45.0, –, 45.9 (Table 1).
PRESETS = {
    # Ours, for two processor cores and a few hundred images: what differs from the paper is named by its field.
    "conditional-detr-nano": Config(
        backbone="mobilenet_v2",
        stride=16,
        num_queries=100,
        dim=128,
        heads=4,
        encoder_layers=3,
        decoder_layers=3,
        feedforward=512,
        dropout=0.0,
        pre_norm=True,
        temperature=20.0,
        query_start="grid",
        image_size=256,
        longest=448,
    ),
    "conditional-detr-r50": Config(backbone="resnet50"),
    "conditional-detr-r101": Config(backbone="resnet101"),
    "conditional-detr-r50-dc5": Config(backbone="resnet50", dilated=True),
    "conditional-detr-r101-dc5": Config(backbone="resnet101", dilated=True),
}

_BLOCKS = (("sa", "self_attn", "self_attention"), ("ca", "encoder_attn", "cross_attention"))
_PROJECTIONS = (
    *(("q_content", "query_content"), ("q_pos", "query_position"), ("q_pos_sine", "query_spatial")),
    *(("k_content", "key_content"), ("k_pos", "key_position"), ("v", "value")),
)
_ATTENTION = {
    f"{block}_{theirs.replace('_', '', 1)}_proj.": f"{attention}.{ours}."
    for block, _, attention in _BLOCKS
    for theirs, ours in _PROJECTIONS
} | {"self_attn.out_proj.": "self_attention.output."}
_MODULES = {  # what transformers calls them in memory, but not in files
    f"{module}.{theirs}_proj.": f"{attention}.{ours}."
    for _, module, attention in _BLOCKS
    for theirs, ours in _PROJECTIONS
}
OFFICIAL = official(
    {**_ATTENTION, "cross_attn.out_proj.": "cross_attention.output."},
    {
        "transformer.decoder.ref_point_head.": "reference_head.",
        "transformer.decoder.query_scale.": "transformation.scale.",
    },
)
HUGGINGFACE = HuggingFace(
    "ConditionalDetr",
    "conditional_detr",
    huggingface(
        {**_ATTENTION, "encoder_attn.out_proj.": "cross_attention.output.", **_MODULES},
        {"model.decoder.ref_point_head.": "reference_head.", "model.decoder.query_scale.": "transformation.scale."},
    ),
    huggingface_fields(class_weight=("class_cost", "cls_loss_coefficient"), focal_alpha=("focal_alpha",)),
)
read_config = read_shapes
