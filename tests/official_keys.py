"""A model's weights under the names that the official repositories give them, written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from detrkit.models import conditional_detr, detr
from detrkit.segmentation.model import Segmenter

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
    "reference_head.": "transformer.decoder.ref_point_head.",
    "transformation.scale.": "transformer.decoder.query_scale.",
}
_ENCODER = {"self_attention_norm": "norm1", "feedforward_norm": "norm2"}
_DECODER = {"self_attention_norm": "norm1", "cross_attention_norm": "norm2", "feedforward_norm": "norm3"}
_CONDITIONAL = {
    "self_attention.query_content": "sa_qcontent_proj",
    "self_attention.query_position": "sa_qpos_proj",
    "self_attention.key_content": "sa_kcontent_proj",
    "self_attention.key_position": "sa_kpos_proj",
    "self_attention.value": "sa_v_proj",
    "self_attention.output": "self_attn.out_proj",
    "cross_attention.query_content": "ca_qcontent_proj",
    "cross_attention.query_position": "ca_qpos_proj",
    "cross_attention.query_spatial": "ca_qpos_sine_proj",
    "cross_attention.key_content": "ca_kcontent_proj",
    "cross_attention.key_position": "ca_kpos_proj",
    "cross_attention.value": "ca_v_proj",
    "cross_attention.output": "cross_attn.out_proj",
}


def official_state(model: detr.Model | conditional_detr.Model) -> dict[str, Tensor]:
    """The state dict that the official code would have saved."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    official: dict[str, Tensor] = {}
    for stack, layers, norms in (
        ("encoder", model.encoder.layers, _ENCODER),
        ("decoder", model.decoder_layers, _DECODER),
    ):
        ours = "encoder.layers" if stack == "encoder" else "decoder_layers"
        for index in range(len(layers)):
            prefix = f"{ours}.{index}."
            own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
            for name, value in _layer(own, norms).items():
                official[f"transformer.{stack}.layers.{index}.{name}"] = value
    for name, value in state.items():
        start = next((start for start in _STARTS if name.startswith(start)), None)
        official[_WHOLE[name] if start is None else _STARTS[start] + name.removeprefix(start)] = value
    return official


def _layer(own: dict[str, Tensor], norms: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of one layer; torch's own attention packs its three projections into one."""
    layer: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for attention, theirs in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
            if f"{attention}.query.{kind}" not in own:
                continue
            parts = [own.pop(f"{attention}.{part}.{kind}") for part in ("query", "key", "value")]
            layer[f"{theirs}.in_proj_{kind}"] = torch.cat(parts)
            layer[f"{theirs}.out_proj.{kind}"] = own.pop(f"{attention}.output.{kind}")
        for ours, theirs in _CONDITIONAL.items():
            if f"{ours}.{kind}" in own:
                layer[f"{theirs}.{kind}"] = own.pop(f"{ours}.{kind}")
        layer[f"linear1.{kind}"] = own.pop(f"feedforward.expand.{kind}")
        layer[f"linear2.{kind}"] = own.pop(f"feedforward.contract.{kind}")
        for norm, theirs in norms.items():
            layer[f"{theirs}.{kind}"] = own.pop(f"{norm}.{kind}")
    assert not own, f"parameters that the official layer does not have: {sorted(own)}"
    return layer


_MASK_HEAD = {
    "attention_query": "bbox_attention.q_linear",
    "attention_key": "bbox_attention.k_linear",
    **{f"layers.{number}": f"mask_head.lay{number + 1}" for number in range(5)},
    **{f"norms.{number}": f"mask_head.gn{number + 1}" for number in range(5)},
    **{f"adapters.{number}": f"mask_head.adapter{number + 1}" for number in range(3)},
    "output": "mask_head.out_lay",
}


def official_segmentation_state(segmenter: Segmenter) -> dict[str, Tensor]:
    """The state dict that the official code would have saved of a detector with a mask head."""
    assert isinstance(segmenter.detector, detr.Model | conditional_detr.Model)
    official = {f"detr.{name}": value for name, value in official_state(segmenter.detector).items()}
    for name, value in segmenter.mask_head.state_dict().items():
        part, _, kind = name.rpartition(".")
        official[f"{_MASK_HEAD[part]}.{kind}"] = value.clone()
    return official
