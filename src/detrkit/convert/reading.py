"""Weights of others into a model of ours: recognise the variant, read its architecture off them, fill it strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detrkit import models
from detrkit.convert.keys import Table, cut, origin, shortened, targets
from detrkit.convert.report import Fate
from detrkit.errors import ModelError
from detrkit.models import Variant
from detrkit.structures import Category


class Layout(NamedTuple):
    """A family of names that weights are published under.

    Attributes:
        name: for people.
        anchor: a name that every detector has there, and that nothing else has: from it the prefix is read that
            wrappers put before all names, such as `module.` or `detr.`.
        spellings: patterns of other spellings of a name, and what stands in the tables instead.
    """

    name: str
    anchor: str
    spellings: tuple[tuple[str, str], ...] = ()


OFFICIAL = Layout("official", "class_embed.weight")

# Since version 5 transformers calls its modules otherwise, but goes on writing the old names into files.
HUGGINGFACE = Layout(
    "Hugging Face",
    "class_labels_classifier.weight",
    (
        (r"(.*)\.backbone\.position_embedding\.(.+)", r"\1.position_embedding.\2"),
        (r"(.*)\.backbone\.model\.(.+)", r"\1.backbone.conv_encoder.model.\2"),
        (r"(.*)_attn\.o_proj\.(.+)", r"\1_attn.out_proj.\2"),
        (r"(.*)\.mlp\.(fc[12]\..+)", r"\1.\2"),
    ),
)

MASK_HEAD, PRETEXT = (
    "the mask head's, which is not part of the detector",
    "UP-DETR's pretext task's, not the detector's",
)

# What published files hold beside a detector, and whose it is.
_BESIDE = (
    (r"(.*\.)?(mask_head|bbox_attention)\..+", MASK_HEAD),
    (r"(patch2query|feature_align)\..+", PRETEXT),
    (r".+\.num_batches_tracked", "a counter, which frozen batch norms do not have"),
)


# Fields that tensors do not show, and that change what a model finds.
_UNSEEN = ("dilated", "heads")


@dataclass(frozen=True)
class Source:
    """Weights of others before they are understood.

    Attributes:
        tensors: by the names that they came under.
        where: the file or folder, for messages; empty for a state dict.
        settings: config fields that stand beside the tensors; what the caller says comes before them.
        categories: the category table, if there is one.
        model_type: what a Hugging Face config calls the variant.
        architecture: the class that a Hugging Face config names.
    """

    tensors: Mapping[str, Tensor]
    where: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    categories: tuple[Category, ...] = ()
    model_type: str = ""
    architecture: str = ""


class _Match(NamedTuple):
    """A variant that knows the names of a source.

    `names` are ours for each of the source's tensors, `beside` says of which tensors why they have none.
    """

    variant: str
    module: Variant
    layout: Layout
    table: Table
    prefix: str
    names: dict[str, tuple[str, ...]]
    beside: dict[str, str]
    unknown: list[str]


@dataclass(frozen=True)
class Conversion:
    """A model made of weights of others, and what became of each tensor.

    Attributes:
        model: the model, with the weights.
        variant: its variant.
        preset: the preset that it is, apart from its classes; empty if it is none.
        categories: the category table, a row for each class, if the source has one; else empty.
        origin: what the source was, for people: `official DETR`.
        report: what became of each tensor.
        left_out: tensors of the source that are no part of the detector, under their names there.
        assumed: fields of the config that nobody said and tensors do not show: they are the paper's.
    """

    model: nn.Module
    variant: str
    preset: str
    categories: tuple[Category, ...]
    origin: str
    report: tuple[Fate, ...]
    left_out: Mapping[str, Tensor]
    assumed: tuple[str, ...] = ()


def understand(source: Source, overrides: Mapping[str, Any]) -> Conversion:
    """The model that weights of others are.

    Args:
        source: the weights.
        overrides: config fields that the caller knows better. Another `num_classes` than the weights' starts the class
            head anew; any other contradiction is refused.

    Raises:
        ModelError: names that no variant knows, missing tensors or other shapes, each named as the source names it.
        UsageError: overrides that are not fields of the config, or backbones that are not known.
    """
    match = _recognise(source)
    state = _under_our_names(source, match)
    fields = _fields(source, match, state)
    defaults = asdict(match.module.Config())
    settings = {name: value for name, value in source.settings.items() if name in defaults}
    said = {**fields, **settings, **overrides}
    _, config = models.configure(_paper(match.module), **{**defaults, **said})
    contradictions = [
        f"{name}={value!r}, not {getattr(config, name)!r}"
        for name, value in fields.items()
        if getattr(config, name) != value and name != "num_classes"
    ]
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays
        model = match.module.Model(config)
    heads = set(models.class_heads(model))
    before = fields.get("num_classes", config.num_classes)
    anew, is_anew = f"{config.num_classes} classes for {before}", config.num_classes != before
    fresh = model.state_dict()
    started = {name: fresh[name] for name in state if is_anew and name in heads}
    filled = {**state, **started}
    _check(fresh, filled, source, match, contradictions)
    model.load_state_dict(filled)
    return Conversion(
        model,
        match.variant,
        preset_of(config),
        () if is_anew else _fitting(source, config.num_classes),
        _origin(source, match, getattr(config, "pre_norm", False)),
        _fates(source, match, started, anew),
        {key: source.tensors[key] for key in match.beside},
        # The config of a Hugging Face folder says all; what it leaves out has the library's defaults, which are ours.
        () if source.model_type else tuple(name for name in _UNSEEN if name in defaults and name not in said),
    )


def preset_of(config: Any) -> str:
    """The preset that a config is, apart from its classes; empty where it is none."""
    for preset in models.presets():
        if models.configure(preset, num_classes=config.num_classes)[1] == config:
            return preset
    return ""


def title(variant: str) -> str:
    """A variant's name for people."""
    return " ".join("DETR" if word == "detr" else word.capitalize() for word in variant.split("_"))


def table_of(module: Variant, layout: Layout) -> Table:
    """A variant's key table for a family of names; empty if it has none."""
    if layout is OFFICIAL:
        return module.OFFICIAL
    known = getattr(module, "HUGGINGFACE", None)
    return () if known is None else known.table


def _recognise(source: Source) -> _Match:
    layouts = {layout: _prefixes(source.tensors, layout.anchor) for layout in (OFFICIAL, HUGGINGFACE)}
    matches = [
        _match(source.tensors, name, layout, prefix)
        for layout, prefixes in layouts.items()
        for prefix in prefixes
        for name in models.names()
        if layout is OFFICIAL or source.model_type in ("", _model_type(name))
    ]
    matches = [match for match in matches if match.names]
    if not matches:
        raise _unrecognised(source)
    prefixes = {(match.layout.name, match.prefix) for match in matches}
    if len(prefixes) > 1:
        raise ModelError(
            "The weights hold a detector more than once",
            where=source.where,
            got=f"names under {' and '.join(repr(prefix) for _, prefix in sorted(prefixes))}",
            remedy="Save the one that you mean as a file of its own.",
        )
    best = max(matches, key=lambda match: len(match.names))
    if best.unknown:
        raise ModelError(
            f"Not all of these are weights of {title(best.variant)}",
            where=source.where,
            got=f"also {shortened(best.unknown)}",
            remedy="Save the state dict of the detector alone.",
        )
    return best


def _match(tensors: Mapping[str, Tensor], variant: str, layout: Layout, prefix: str) -> _Match:
    module = models.variant(variant)
    match = _Match(variant, module, layout, table_of(module, layout), prefix, {}, {}, [])
    for key in tensors:
        bare = key.removeprefix(prefix)
        if reason := next((reason for pattern, reason in _BESIDE if re.fullmatch(pattern, bare)), ""):
            match.beside[key] = reason
        elif names := targets(_spelled(bare, layout), match.table):
            match.names[key] = names
        else:
            match.unknown.append(key)
    return match


def _prefixes(tensors: Mapping[str, Tensor], anchor: str) -> list[str]:
    return sorted({key.removesuffix(anchor) for key in tensors if key == anchor or key.endswith("." + anchor)})


def _spelled(key: str, layout: Layout) -> str:
    for pattern, spelling in layout.spellings:
        if found := re.fullmatch(pattern, key):
            key = found.expand(spelling)
    return key


def _model_type(variant: str) -> str:
    known = getattr(models.variant(variant), "HUGGINGFACE", None)
    return "" if known is None else known.model_type


def _unrecognised(source: Source) -> ModelError:
    keys = sorted(source.tensors)
    if {"query_position", "projection.weight"} <= set(keys):
        remedy = "These are weights of detrkit without their config: name the model folder that they lie in."
    elif source.model_type and source.model_type not in {_model_type(name) for name in models.names()}:
        remedy = f"The config says {source.model_type!r}, which is no variant here."
    else:
        remedy = "Give a whole detector; the weights of a backbone alone are an option of training."
    known = ", ".join(map(title, models.names()))
    return ModelError(
        "These are not the weights of a detector that is known here",
        where=source.where,
        got=shortened(keys, 4) or "no tensors",
        expected=f"{known}, with {OFFICIAL.anchor} (official) or {HUGGINGFACE.anchor} (Hugging Face)",
        remedy=remedy,
    )


def _under_our_names(source: Source, match: _Match) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, names in match.names.items():
        parts = cut(key, source.tensors[key], names)
        if twice := sorted(state.keys() & parts.keys()):
            raise ModelError("The weights hold a tensor under two names", where=source.where, got=f"{key}: {twice[0]}")
        state.update(parts)
    return state


def _fields(source: Source, match: _Match, state: Mapping[str, Tensor]) -> dict[str, Any]:
    read = getattr(match.module, "read_config", None)
    try:
        return {} if read is None else dict(read(state))
    except KeyError as error:
        raise ModelError(
            f"The weights of {title(match.variant)} are not complete",
            where=source.where,
            got=f"no {_theirs(str(error.args[0]), match)}",
            remedy="Give the whole state dict of the detector.",
        ) from None


def _paper(module: Variant) -> str:
    """A preset whose fields are the paper's, as far as there is one."""
    default = module.Config()
    return next((name for name, config in module.PRESETS.items() if config == default), next(iter(module.PRESETS)))


def _theirs(name: str, match: _Match) -> str:
    """What the source calls a tensor of ours, or would."""
    found = next((key for key, names in match.names.items() if name in names), None)
    if found is None:
        known = origin(name, match.table)
        found = name if known is None else match.prefix + known.name
    return found


def _check(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Source, match: _Match, contradictions: list[str]
) -> None:
    """Refuse what does not fit, under the names of the source."""

    def theirs(names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(_theirs(name, match) for name in names))

    shared = [name for name in own if name in state]
    odd = [name for name in shared if state[name].shape != own[name].shape]
    broken = [
        name for name in shared if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all())
    ]
    complaints = {
        "missing": theirs([name for name in own if name not in state]),
        "left over": theirs([name for name in state if name not in own]),
        "other shapes": list(dict.fromkeys(_shapes(_theirs(name, match), own[name], source, match) for name in odd)),
        "not finite": theirs(broken),
    }
    said = "; ".join(f"{word}: {shortened(names)}" for word, names in complaints.items() if names)
    if said:
        remedy = f"The tensors say {'; '.join(contradictions)}: leave that out." if contradictions else ""
        raise ModelError(
            f"The weights do not fit the model, {title(match.variant)}", where=source.where, got=said, remedy=remedy
        )


def _shapes(key: str, own: Tensor, source: Source, match: _Match) -> str:
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


def _origin(source: Source, match: _Match, is_pre_norm: bool) -> str:
    has_masks = MASK_HEAD in match.beside.values()
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


def _fates(source: Source, match: _Match, started: Mapping[str, Tensor], anew: str) -> tuple[Fate, ...]:
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
