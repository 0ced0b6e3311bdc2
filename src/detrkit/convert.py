"""Weights of the official repositories into ours. Each variant owns its key table (`OFFICIAL`); this file applies it.

Strict: every tensor of the source lands somewhere and every parameter of ours is filled, or the error names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from detrkit import models
from detrkit.errors import ModelError

Table = Sequence[tuple[str, str | tuple[str, ...]]]

# From these the architecture is read.
_TELLING = ("class_embed.weight", "query_embed.weight", "transformer.decoder.layers.0.linear1.weight")


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors under our keys.

    Args:
        state: tensors under the official keys.
        table: patterns over whole official keys, each with one target or with several among which the tensor is cut
            into equal parts along its first axis.

    Raises:
        ModelError: a key that no pattern matches, or a tensor that cannot be cut.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, target in table:
            found = re.fullmatch(pattern, key)
            if found is None:
                continue
            targets = (target,) if isinstance(target, str) else target
            if tensor.ndim and len(tensor) % len(targets):
                raise ModelError(
                    f"The tensor cannot be cut into {len(targets)} equal parts", where=key, got=tuple(tensor.shape)
                )
            for name, part in zip(targets, tensor.chunk(len(targets)), strict=True):
                renamed[found.expand(name)] = part
            break
        else:
            unknown.append(key)
    if unknown:
        raise ModelError(
            "The state dict holds keys that this variant does not know",
            got=_shortened(unknown),
            remedy="Convert the plain detector; mask heads and optimiser states are not part of it.",
        )
    return renamed


def from_official(state_dict: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """A model with the weights of an official checkpoint; the architecture is read off keys and shapes.

    The official class head has one row for each id from 0 to the highest and one for no-object. So `num_classes` is
    its rows less one and the labels are the data set's ids themselves: 91 for COCO, where eleven are never used.

    Args:
        state_dict: tensors by official key, or a training checkpoint that holds them under `model`.
        **overrides: config fields that shapes do not show, such as `dilated=True` for a DC5 model or `heads`.

    Raises:
        ModelError: keys that no variant knows, missing keys or other shapes, each named.
        UsageError: overrides that are not fields of the config, or backbones that are not known.
    """
    state = dict(state_dict.get("model", state_dict))
    if missing := [key for key in _TELLING if key not in state]:
        raise ModelError(
            "This is not a DETR checkpoint",
            got=f"{_shortened(sorted(state))}, without {' and '.join(missing)}",
            remedy="Give the state dict of the plain detector, or a checkpoint that holds it under 'model'.",
        )
    module, config = models.configure("detr-r50", **{**_architecture(state), **overrides})
    model = module.Model(config)
    load_strictly(model, rename(state, module.OFFICIAL))
    return model


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill every parameter and buffer of a model.

    Raises:
        ModelError: names what is missing, what is left over, and what has another shape.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    complaints = [
        f"{word}: {_shortened(keys)}"
        for word, keys in (("missing", missing), ("left over", unknown), ("other shapes", reshaped))
        if keys
    ]
    if complaints:
        raise ModelError("The weights do not fit the model", got="; ".join(complaints))
    model.load_state_dict(state)


def _architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What keys and shapes say about the config."""
    dim = state["query_embed.weight"].shape[1]
    blocks = {stage: _count(state, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)}
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    depth = sum(blocks.values()) * (3 if bottleneck else 2) + 2
    return {
        "num_classes": state["class_embed.weight"].shape[0] - 1,
        "backbone": f"resnet{depth}",
        "num_queries": state["query_embed.weight"].shape[0],
        "dim": dim,
        "encoder_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "feedforward": state["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "pre_norm": "transformer.encoder.norm.weight" in state,
        "position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return len({match[1] for match in found if match})


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
