"""Weights that travel: official checkpoints and Hugging Face models into ours, and ours to Hugging Face.

Each variant owns its key tables; the architecture is read off names and shapes. Strict: every tensor of the source has
its place or a reason why it has none, every tensor of ours is filled, or an error names what differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detrkit.convert.huggingface import HUGGINGFACE_WEIGHTS, is_huggingface, read_folder
from detrkit.convert.keys import rename, rename_back, shortened
from detrkit.convert.reading import Attention, Conversion, preset_of, understand
from detrkit.convert.recognition import Source
from detrkit.convert.report import FATES, Fate, counts, exceptions, summarise
from detrkit.convert.writing import to_huggingface
from detrkit.errors import ModelError
from detrkit.nn.weights import WRAPPERS, read_checkpoint

__all__ = [
    "FATES",
    "Attention",
    "Conversion",
    "Fate",
    "counts",
    "exceptions",
    "from_huggingface",
    "from_official",
    "is_huggingface",
    "load_strictly",
    "preset_of",
    "read",
    "rename",
    "rename_back",
    "summarise",
    "to_huggingface",
]

# What the command lines that official checkpoints carry call the fields that tensors do not show.
_ARGUMENTS = {"nheads": "heads", "dilation": "dilated"}


def read(
    source: str | Path | Mapping[str, Any], *, mask_attention: Attention | None = None, **overrides: Any
) -> Conversion:
    """The model that weights of others are, and what became of each tensor.

    Where a mask head is among them, `Conversion.segmenter` holds the model with it.

    Args:
        source: a weight file (`detrkit.nn.weights.ENDINGS`), a Hugging Face folder, or a state dict, which may stand in
            a training checkpoint.
        mask_attention: over what the attention maps of a mask head are normalised, which tensors do not show. None:
            `joint`, as in the official DETR and in `transformers`, but `per-head` for official weights of a pre-norm
            model, which UP-DETR's are; of official weights this is told as `assumed`.
        **overrides: config fields that tensors do not show, such as `dilated=True` for a DC5 model or `heads`; Hugging
            Face folders and most training checkpoints say these themselves, and what nobody said is told as `assumed`.
            Another `num_classes` than the weights'
            starts the class head anew. Anything else that contradicts the tensors is refused.

    Raises:
        ModelError: a file that cannot be read or holds code, tensors that no variant knows, that are missing or that
            have other shapes, each named as the source names it.
        UsageError: overrides that are not fields of the config, backbones that are not known, a `mask_attention` that
            there is not, or one of weights without a mask head.
    """
    return understand(_open(source), overrides, mask_attention)


def from_official(state_dict: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """A model with the weights of an official checkpoint; the architecture is read off keys and shapes.

    The labels of official models are their data set's ids themselves: 91 for COCO, where eleven are never used. DETR's
    class head has a row more, for no-object, which `num_classes` does not count. Of a segmentation model this is the
    detector; `read(state_dict).segmenter` has the mask head, too.

    Args:
        state_dict: tensors by official key, or a training checkpoint that holds them under `model`.
        **overrides: config fields that tensors do not show; see `read`, which also says what became of each tensor.

    Raises:
        ModelError: tensors that no variant knows, that are missing or that have other shapes, each named.
        UsageError: overrides that are not fields of the config, or backbones that are not known.
    """
    return read(state_dict, **overrides).model


def from_huggingface(state_dict_or_folder: Mapping[str, Any] | str | Path, **overrides: Any) -> nn.Module:
    """A model with the weights of a DETR or Conditional DETR of the `transformers` library.

    Of a segmentation model this is the detector; `read(…).segmenter` has the mask head, too.

    Args:
        state_dict_or_folder: what `save_pretrained` wrote, or a state dict.
        **overrides: as for `read`; a state dict does not show `heads` and `dilated`.

    Raises:
        ModelError: tensors that no variant knows, that are missing or that have other shapes, each named; or a config
            that no model of ours can follow.
        UsageError: overrides that are not fields of the config.
    """
    return read(state_dict_or_folder, **overrides).model


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
        f"{word}: {shortened(keys)}"
        for word, keys in (("missing", missing), ("left over", unknown), ("other shapes", reshaped))
        if keys
    ]
    if complaints:
        raise ModelError("The weights do not fit the model", got="; ".join(complaints))
    model.load_state_dict(state)


def _open(source: str | Path | Mapping[str, Any]) -> Source:
    if isinstance(source, Mapping):
        inner = next((source[key] for key in WRAPPERS if isinstance(source.get(key), Mapping)), source)
        tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
        return Source(tensors, settings=_settings(source.get("args")))
    path = Path(source)
    if path.is_file() and path.name in HUGGINGFACE_WEIGHTS and is_huggingface(path.parent):
        path = path.parent  # the config beside the weights says what they do not show
    if path.is_dir():
        return read_folder(path)
    checkpoint = read_checkpoint(path)
    return Source(checkpoint.tensors, str(path), _settings(checkpoint.arguments))


def _settings(arguments: object) -> dict[str, Any]:
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(given, Mapping):
        return {}
    return {ours: given[theirs] for theirs, ours in _ARGUMENTS.items() if isinstance(given.get(theirs), int | bool)}
