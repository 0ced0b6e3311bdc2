"""Weights of others into a model of ours: recognise the variant, read its architecture off them, fill it strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from detrkit import models
from detrkit.convert.keys import cut, shortened
from detrkit.convert.layouts import HUGGINGFACE, MASK_HEAD, OFFICIAL, PRETEXT
from detrkit.convert.recognition import Match, Source, recognise, title
from detrkit.convert.report import Fate
from detrkit.errors import Error, ModelError, UsageError
from detrkit.models import Variant
from detrkit.nn.building import built_within
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category

Attention = Literal["joint", "per-head"]
"""How mask heads of others normalise attention maps (`detrkit.segmentation.head.Normalisation`)."""

# Fields that tensors do not show, and that change what a model finds.
_UNSEEN = ("dilated", "heads")


@dataclass(frozen=True)
class Conversion:
    """A model made of weights of others, and what became of each tensor.

    Attributes:
        model: the model, with the weights.
        variant: its variant.
        preset: the preset that it is, apart from its classes; empty if it is none.
        categories: the category table, a row for each class, if the source has one; else empty.
        origin: what the source was, for people: `official DETR`.
        report: what became of each tensor; our names of a mask head's begin with `mask_head.`.
        left_out: tensors of the source that are no part of a model here, under their names there.
        assumed: fields of the config that nobody said and tensors do not show: they are the paper's. `mask_attention`
            is among them where the normalisation of a mask head's attention maps was assumed.
        segmenter: the model with its mask head, where the source has one.
    """

    model: nn.Module
    variant: str
    preset: str
    categories: tuple[Category, ...]
    origin: str
    report: tuple[Fate, ...]
    left_out: Mapping[str, Tensor]
    assumed: tuple[str, ...] = ()
    segmenter: Segmenter | None = None


def understand(source: Source, overrides: Mapping[str, Any], mask_attention: Attention | None = None) -> Conversion:
    """The model that weights of others are.

    Args:
        source: the weights.
        overrides: config fields that the caller knows better. Another `num_classes` than the weights' starts the class
            head anew; any other contradiction is refused.
        mask_attention: over what the attention maps of the mask head are normalised, if the caller knows.

    Raises:
        ModelError: names that no variant knows, missing tensors or other shapes, each named as the source names it.
        UsageError: overrides that are not fields of the config, backbones that are not known, or something said of a
            mask head that cannot be, or where there is none.
    """
    match = recognise(source)
    if mask_attention is not None:
        _refuse_attention(mask_attention, source, match)
    state = _under_our_names(source, match)
    defaults = asdict(match.module.Config())
    fields = _fields(source, match, state, "heads" in defaults)
    settings = {name: value for name, value in source.settings.items() if name in defaults}
    said = {**fields, **settings, **overrides}
    _, config = models.configure(_paper(match.module), **{**defaults, **said})
    contradictions = [
        f"{name}={value!r}, not {getattr(config, name)!r}"
        for name, value in fields.items()
        if getattr(config, name) != value and name != "num_classes"
    ]
    size = sum(tensor.nbytes for tensor in source.tensors.values())
    try:
        with built_within(size):
            model = match.module.Model(config)
            attention = _usual_attention(match, config) if mask_attention is None else mask_attention
            segmenter = Segmenter(model, attention=attention) if match.has_masks else None
    except (ValueError, RuntimeError) as error:
        if isinstance(error, Error):
            raise
        raise ModelError(
            "The architecture that the source states cannot be built", where=source.where, got=error
        ) from error
    heads = set(models.class_heads(model))
    before = fields.get("num_classes", config.num_classes)
    anew, is_anew = f"{config.num_classes} classes for {before}", config.num_classes != before
    fresh = _own(model, segmenter)
    started = {name: fresh[name] for name in state if is_anew and name in heads}
    filled = {**state, **started}
    _check(fresh, filled, source, match, contradictions)
    _fill(model, segmenter, filled)
    return Conversion(
        model,
        match.variant,
        preset_of(config),
        () if is_anew else _fitting(source, config.num_classes),
        _origin(source, match, getattr(config, "pre_norm", False)),
        _fates(source, match, started, anew),
        {key: source.tensors[key] for key in match.beside},
        _assumed(source, match, [name for name in _UNSEEN if name in defaults and name not in said], mask_attention),
        segmenter,
    )


def preset_of(config: Any) -> str:
    """The preset that a config is, apart from its classes; empty where it is none."""
    for preset in models.presets():
        if models.configure(preset, num_classes=config.num_classes)[1] == config:
            return preset
    return ""


def _under_our_names(source: Source, match: Match) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, names in match.names.items():
        parts = cut(key, source.tensors[key], names)
        if twice := sorted(state.keys() & parts.keys()):
            raise ModelError("The weights hold a tensor under two names", where=source.where, got=f"{key}: {twice[0]}")
        state.update(parts)
    return state


def _fields(source: Source, match: Match, state: Mapping[str, Tensor], has_heads: bool) -> dict[str, Any]:
    """What the tensors say of the config, which may have attention heads."""
    read = getattr(match.module, "read_config", None)
    try:
        fields = {} if read is None else dict(read(state))
    except KeyError as error:
        raise ModelError(
            f"The weights of {title(match.variant)} are not complete",
            where=source.where,
            got=f"no {match.theirs(str(error.args[0]))}",
            remedy="Give the whole state dict of the detector.",
        ) from None
    heads = _heads(state, fields.get("dim", 0)) if has_heads else 0
    return {**fields, "heads": heads} if heads else fields


def _heads(state: Mapping[str, Tensor], dim: int) -> int:
    """The attention heads of a mask head, each a channel beside the width; 0 where nothing shows them."""
    norm = state.get(f"{MASK_HEAD}norms.0.weight")
    heads = 0 if norm is None else norm.numel() - dim
    return heads if heads > 0 and dim % heads == 0 else 0


def _paper(module: Variant) -> str:
    """A preset whose fields are the paper's, as far as there is one."""
    default = module.Config()
    return next((name for name, config in module.PRESETS.items() if config == default), next(iter(module.PRESETS)))


def _own(model: nn.Module, segmenter: Segmenter | None) -> dict[str, Tensor]:
    """All tensors of a model; those of its mask head, if there is one, begin with `MASK_HEAD`."""
    masks = {} if segmenter is None else segmenter.mask_head.state_dict(prefix=MASK_HEAD)
    return {**model.state_dict(), **masks}


def _fill(model: nn.Module, segmenter: Segmenter | None, state: Mapping[str, Tensor]) -> None:
    own = {name: tensor for name, tensor in state.items() if not name.startswith(MASK_HEAD)}
    model.load_state_dict(own)
    if segmenter is not None:
        masks = {name.removeprefix(MASK_HEAD): tensor for name, tensor in state.items() if name not in own}
        segmenter.mask_head.load_state_dict(masks)


def _refuse_attention(said: str, source: Source, match: Match) -> None:
    if not match.has_masks:
        got = f"mask_attention={said!r}"
        raise UsageError("The weights have no mask head", where=source.where, got=got, remedy="Leave it out.")
    if said not in get_args(Attention):
        raise UsageError("Bad value for mask_attention", got=repr(said), expected=" or ".join(get_args(Attention)))


def _usual_attention(match: Match, config: Any) -> Attention:
    """What a mask head of these weights most likely normalises its attention maps over.

    The official UP-DETR does it for each head, and its models are pre-norm; everybody else does it over all heads.
    """
    return "per-head" if match.layout is OFFICIAL and getattr(config, "pre_norm", False) else "joint"


def _assumed(source: Source, match: Match, fields: list[str], mask_attention: str | None) -> tuple[str, ...]:
    if match.layout is OFFICIAL and match.has_masks and mask_attention is None:
        fields = [*fields, "mask_attention"]
    # The config of a Hugging Face folder says all; what it leaves out has the library's defaults, which are ours.
    return () if source.model_type else tuple(fields)


def _check(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Source, match: Match, contradictions: list[str]
) -> None:
    """Refuse what does not fit, under the names of the source."""

    def theirs(names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(match.theirs(name) for name in names))

    shared = [name for name in own if name in state]
    odd = [name for name in shared if state[name].shape != own[name].shape]
    broken = [
        name for name in shared if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all())
    ]
    complaints = {
        "missing": theirs([name for name in own if name not in state]),
        "left over": theirs([name for name in state if name not in own]),
        "other shapes": list(dict.fromkeys(_shapes(match.theirs(name), own[name], source, match) for name in odd)),
        "not finite": theirs(broken),
    }
    said = "; ".join(f"{word}: {shortened(names)}" for word, names in complaints.items() if names)
    if said:
        remedy = f"The tensors say {'; '.join(contradictions)}: leave that out." if contradictions else ""
        raise ModelError(
            f"The weights do not fit the model, {match.title}", where=source.where, got=said, remedy=remedy
        )


def _shapes(key: str, own: Tensor, source: Source, match: Match) -> str:
    """The shape of a tensor of the source, and that which it should have; `own` is one of its parts here."""
    first, *rest = own.shape
    return f"{key} {tuple(source.tensors[key].shape)} for {(first * len(match.names[key]), *rest)}"


def _fitting(source: Source, num_classes: int) -> tuple[Category, ...]:
    if source.categories and len(source.categories) != num_classes:
        raise ModelError(
            "The names of the categories do not fit the class head",
            where=source.where,
            got=f"{len(source.categories)} names",
            expected=f"{num_classes}",
        )
    return source.categories


def _origin(source: Source, match: Match, is_pre_norm: bool) -> str:
    has_masks = match.has_masks
    if match.layout is HUGGINGFACE:
        family = getattr(match.module, "HUGGINGFACE").family  # noqa: B009 - the protocol does not ask for it
        return (
            f"Hugging Face {source.architecture or family + ('ForSegmentation' if has_masks else 'ForObjectDetection')}"
        )
    if PRETEXT in match.beside.values():
        return "official UP-DETR pre-training"
    name = f"official {title(match.variant)}"
    if is_pre_norm:
        name += ", pre-norm as UP-DETR's"
    return f"{name}, with a mask head" if has_masks else name


def _fates(source: Source, match: Match, started: Mapping[str, Tensor], anew: str) -> tuple[Fate, ...]:
    report = []
    for key, tensor in source.tensors.items():
        shape, names = tuple(tensor.shape), match.names.get(key, ())
        if key in match.beside:
            report.append(Fate(key, (), shape, "left out", match.beside[key]))
        elif any(name in started for name in names):
            report.append(Fate(key, names, shape, "re-initialised", anew))
        elif len(names) > 1:
            parts = ", ".join(name.rsplit(".", 2)[-2] for name in names)
            report.append(Fate(key, names, shape, "reshaped", f"cut into {parts}"))
        else:
            report.append(Fate(key, names, shape, "kept"))
    return tuple(report)
