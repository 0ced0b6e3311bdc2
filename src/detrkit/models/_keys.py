"""Names of tensors in published weights and in ours: what the key tables of several variants share.

It belongs to no variant. A table is read from top to bottom: patterns over whole names of others, each with one name of
ours, or with several among which the tensor is cut into equal parts along its first axis. Patterns hold nothing but
literal text and the groups `(\\d+)` and `(.+)`, so that a table can be read backwards, too (`detrkit.convert.keys`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from detrkit.nn.backbone import LEVELS
from detrkit.nn.resnet import ARCHITECTURES

Table = tuple[tuple[str, str | tuple[str, ...]], ...]

Names = Mapping[str, str | tuple[str, ...]]
"""Their names to ours. Where theirs ends in `.` or `_`, it is the beginning of names, and the rest is the same."""


class HuggingFace(NamedTuple):
    """How the `transformers` library holds a variant.

    Attributes:
        family: what the names of its classes begin with: `Detr` of `DetrForObjectDetection`.
        model_type: its name in a config.json.
        table: its names of tensors, those that stand in files, to ours.
        fields: fields of our config that its config.json has, too, each with all the names that it has there. A model
            whose other fields are not the paper's has no place in that library.
    """

    family: str
    model_type: str
    table: Table
    fields: Mapping[str, tuple[str, ...]]


def packed(theirs: str, ours: str) -> dict[str, str | tuple[str, ...]]:
    """The names of an attention of torch's own, which keeps the projections of query, key and value in one tensor."""
    return {
        f"{theirs}.in_proj_": tuple(f"{ours}.{part}." for part in ("query", "key", "value")),
        f"{theirs}.out_proj.": f"{ours}.output.",
    }


def split(theirs: str, ours: str) -> dict[str, str | tuple[str, ...]]:
    """The names of an attention of `transformers`, with a tensor for each projection."""
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    return {f"{theirs}.{name}.": f"{ours}.{part}." for name, part in parts.items()}


def official(decoder: Names, outside: Names | None = None) -> Table:
    """The table of a member of the family whose code descends from the official DETR's.

    Args:
        decoder: names inside a decoder layer, without the feed-forward block and the norms.
        outside: further names, outside the layers.
    """
    block = {"linear1.": "feedforward.expand.", "linear2.": "feedforward.contract.", "norm1.": "self_attention_norm."}
    encoder = {**packed("self_attn", "self_attention"), **block, "norm2.": "feedforward_norm."}
    norms = {"norm2.": "cross_attention_norm.", "norm3.": "feedforward_norm."}
    whole = {
        **(outside or {}),
        "backbone.0.body.": "backbone.",
        "backbone.1.row_embed.weight": "position.row",
        "backbone.1.col_embed.weight": "position.column",
        "input_proj.": "projection.",
        "query_embed.weight": "query_position",
        "class_embed.": "class_head.",
        "bbox_embed.": "box_head.",
        "transformer.encoder.norm.": "encoder.norm.",
        "transformer.decoder.norm.": "decoder_norm.",
    }
    return (
        *_entries(whole),
        *_entries(encoder, "transformer.encoder.layers", "encoder.layers"),
        *_entries({**decoder, **block, **norms}, "transformer.decoder.layers", "decoder_layers"),
    )


def huggingface(decoder: Names, outside: Names | None = None) -> Table:
    """The table of a member of the family in `transformers`; arguments as for `official`.

    Of the two forms that a backbone has there (its own ResNet's and timm's, which are torchvision's names), a model of
    ours is written in the first.
    """
    block = {
        "fc1.": "feedforward.expand.",
        "fc2.": "feedforward.contract.",
        "self_attn_layer_norm.": "self_attention_norm.",
        "final_layer_norm.": "feedforward_norm.",
    }
    norms = {"encoder_attn_layer_norm.": "cross_attention_norm."}
    whole = {
        **(outside or {}),
        "model.position_embedding.row_embeddings.weight": "position.row",
        "model.position_embedding.column_embeddings.weight": "position.column",
        "model.input_projection.": "projection.",
        "model.query_position_embeddings.weight": "query_position",
        "class_labels_classifier.": "class_head.",
        "bbox_predictor.": "box_head.",
        "model.decoder.layernorm.": "decoder_norm.",
    }
    encoder = {**split("self_attn", "self_attention"), **block}
    return (
        *_entries(whole),
        *_entries(encoder, "model.encoder.layers", "encoder.layers"),
        *_entries({**decoder, **block, **norms}, "model.decoder.layers", "decoder_layers"),
        *_RESNET,
        *TIMM,
    )


def huggingface_fields(**more: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The fields that the configs of all variants share with `transformers`, and those of one variant."""
    return {
        "num_queries": ("num_queries",),
        "dim": ("d_model",),
        "heads": ("encoder_attention_heads", "decoder_attention_heads"),
        "encoder_layers": ("encoder_layers",),
        "decoder_layers": ("decoder_layers",),
        "feedforward": ("encoder_ffn_dim", "decoder_ffn_dim"),
        "dropout": ("dropout",),
        "position": ("position_embedding_type",),
        "dilated": ("dilation",),
        "l1_weight": ("bbox_cost", "bbox_loss_coefficient"),
        "giou_weight": ("giou_cost", "giou_loss_coefficient"),
        **more,
    }


def read_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of our tensors say about the config; `num_classes` are the class head's rows.

    Raises:
        KeyError: a tensor that would tell is not there.
    """
    queries = state["query_position"]
    fields = {
        "num_classes": len(state["class_head.weight"]),
        "num_queries": len(queries),
        "dim": queries.shape[-1],
        "encoder_layers": _count(state, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(state, r"decoder_layers\.(\d+)\."),
        "feedforward": len(state["decoder_layers.0.feedforward.expand.weight"]),
        "position": "learned" if "position.row" in state else "sine",
    }
    if fields["encoder_layers"]:  # without an encoder, nothing shows the order of its norms
        fields["pre_norm"] = "encoder.norm.weight" in state
    blocks = tuple(_count(state, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    if any(blocks):
        fields["backbone"] = _resnet(blocks, "backbone.layer1.0.conv3.weight" in state)
        fields["stride"] = LEVELS[sum(map(bool, blocks)) - 1]
    return fields


def _resnet(blocks: tuple[int, ...], is_bottleneck: bool) -> str:
    """The name of the ResNet with so many blocks in each stage; stages that are not needed may be missing."""
    built = [number for number in blocks if number]
    for name, known in ARCHITECTURES.items():
        if known.bottleneck == is_bottleneck and not known.groups and list(known.blocks[: len(built)]) == built:
            return name
    return f"resnet{sum(built) * (3 if is_bottleneck else 2) + 2}"


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return len({match[1] for match in found if match})


def _entries(names: Names, theirs: str = "", ours: str = "") -> Table:
    """Table entries for names, or for names inside each layer of a stack that is called `theirs` and `ours`."""
    before = rf"{re.escape(theirs)}\.(\d+)\." if theirs else ""
    start = rf"{ours}.\1." if ours else ""
    rest = r"\2" if theirs else r"\1"
    table: list[tuple[str, str | tuple[str, ...]]] = []
    for name, target in names.items():
        is_beginning = name.endswith((".", "_"))
        pattern = before + re.escape(name) + ("(.+)" if is_beginning else "")
        targets = [
            f"{start}{one}{rest if is_beginning else ''}" for one in ((target,) if isinstance(target, str) else target)
        ]
        table.append((pattern, targets[0] if len(targets) == 1 else tuple(targets)))
    return tuple(table)


_BACKBONE = "model.backbone.conv_encoder.model."
_RESNET: Table = (
    *_entries(
        {
            f"{_BACKBONE}embedder.embedder.convolution.": "backbone.conv1.",
            f"{_BACKBONE}embedder.embedder.normalization.": "backbone.bn1.",
        }
    ),
    *(
        entry
        for stage in range(4)
        for entry in _entries(
            {
                **{
                    f"{layer}.{part}.": f"{ours}."
                    for number in (1, 2, 3)
                    for layer, part, ours in (
                        (f"layer.{number - 1}", "convolution", f"conv{number}"),
                        (f"layer.{number - 1}", "normalization", f"bn{number}"),
                    )
                },
                "shortcut.convolution.": "downsample.0.",
                "shortcut.normalization.": "downsample.1.",
            },
            f"{_BACKBONE}encoder.stages.{stage}.layers",
            f"backbone.layer{stage + 1}",
        )
    ),
)

TIMM = _entries({_BACKBONE: "backbone."})
"""The other form of a backbone in `transformers`."""
