"""A model's weights under the names that the official DETR repository gives them, written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from detrkit.models import detr

_WHOLE = {
    "position.row": "backbone.1.row_embed.weight",
    "position.column": "backbone.1.col_embed.weight",
    "query_position": "query_embed.weight",
}
_STARTS = {
    "backbone.": "backbone.0.body.",
    "projection.": "input_proj.",
    "class_head.": "class_embed.",
    "box_head.": "bbox_embed.",
    "encoder.norm.": "transformer.encoder.norm.",
    "decoder_norm.": "transformer.decoder.norm.",
}
_ENCODER = {"self_attention_norm": "norm1", "feedforward_norm": "norm2"}
_DECODER = {"self_attention_norm": "norm1", "cross_attention_norm": "norm2", "feedforward_norm": "norm3"}


def official_state(model: detr.Model) -> dict[str, Tensor]:
    """The state dict that the official code would have saved."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    official: dict[str, Tensor] = {}
    for stack, layers, norms in (
        ("encoder", model.encoder.layers, _ENCODER),
        ("decoder", model.decoder_layers, _DECODER),
    ):
        ours = "encoder.layers" if stack == "encoder" else "decoder_layers"
        for index in range(len(layers)):
            own = {name: state.pop(name) for name in list(state) if name.startswith(f"{ours}.{index}.")}
            for name, value in _layer(own, f"{ours}.{index}.", norms).items():
                official[f"transformer.{stack}.layers.{index}.{name}"] = value
    for name, value in state.items():
        start = next((start for start in _STARTS if name.startswith(start)), None)
        official[_WHOLE[name] if start is None else _STARTS[start] + name.removeprefix(start)] = value
    return official


def _layer(own: dict[str, Tensor], prefix: str, norms: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of one layer, each attention's three projections packed into one."""
    layer: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for attention, theirs in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
            if f"{prefix}{attention}.query.{kind}" not in own:
                continue
            parts = [own.pop(f"{prefix}{attention}.{part}.{kind}") for part in ("query", "key", "value")]
            layer[f"{theirs}.in_proj_{kind}"] = torch.cat(parts)
            layer[f"{theirs}.out_proj.{kind}"] = own.pop(f"{prefix}{attention}.output.{kind}")
        layer[f"linear1.{kind}"] = own.pop(f"{prefix}feedforward.expand.{kind}")
        layer[f"linear2.{kind}"] = own.pop(f"{prefix}feedforward.contract.{kind}")
        for norm, theirs in norms.items():
            layer[f"{theirs}.{kind}"] = own.pop(f"{prefix}{norm}.{kind}")
    assert not own, f"parameters that the official layer does not have: {sorted(own)}"
    return layer
