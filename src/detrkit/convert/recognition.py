"""Whose weights these are: the variant, and the family of names that they were published under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from detrkit import models
from detrkit.convert.keys import Table, origin, shortened, targets
from detrkit.convert.layouts import (
    BESIDE,
    HUGGINGFACE,
    MASK_HEAD,
    MASK_TABLE,
    OFFICIAL,
    Layout,
    mask_prefix,
    model_type,
    prefixes,
    spelled,
    table_of,
)
from detrkit.errors import ModelError
from detrkit.models import Variant
from detrkit.structures import Category


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


class Match(NamedTuple):
    """A variant that knows the names of a source.

    `names` are ours for each of the source's tensors, `beside` says of which tensors why they have none. `prefix` and
    `mask_prefix` stand before the source's names of the detector and of the mask head, if there is one.
    """

    variant: str
    module: Variant
    layout: Layout
    table: Table
    prefix: str
    mask_prefix: str | None
    names: dict[str, tuple[str, ...]]
    beside: dict[str, str]
    unknown: list[str]

    @property
    def title(self) -> str:
        """What the weights are, for people."""
        return title(self.variant) + (" with a mask head" if self.has_masks else "")

    @property
    def has_masks(self) -> bool:
        """Whether a mask head is among the weights."""
        return self.mask_prefix is not None

    def theirs(self, name: str) -> str:
        """What the source calls a tensor of ours, or would."""
        if (found := next((key for key, names in self.names.items() if name in names), None)) is not None:
            return found
        is_mask_head = name.startswith(MASK_HEAD)
        known = origin(name, MASK_TABLE if is_mask_head else self.table)
        prefix = self.mask_prefix if is_mask_head else self.prefix
        return name if known is None else f"{prefix or ''}{known.name}"


def title(variant: str) -> str:
    """A variant's name for people."""
    return " ".join("DETR" if word == "detr" else word.capitalize() for word in variant.split("_"))


def recognise(source: Source) -> Match:
    """The variant that knows most of the names, and under which names it knows them.

    Raises:
        ModelError: no variant does, several detectors are there, or tensors that are none of theirs.
    """
    matches = [
        _match(source.tensors, name, layout, prefix)
        for layout in (OFFICIAL, HUGGINGFACE)
        for prefix in prefixes(source.tensors, layout)
        for name in models.names()
        if layout is OFFICIAL or source.model_type in ("", model_type(name))
    ]
    matches = [match for match in matches if match.names]
    if not matches:
        raise _unrecognised(source)
    places = {(match.layout.name, match.prefix) for match in matches}
    if len(places) > 1:
        raise ModelError(
            "The weights hold a detector more than once",
            where=source.where,
            got=f"names under {' and '.join(repr(prefix) for _, prefix in sorted(places))}",
            remedy="Save the one that you mean as a file of its own.",
        )
    best = max(matches, key=lambda match: len(match.names))
    if best.unknown:
        raise ModelError(
            f"Not all of these are weights of {best.title}",
            where=source.where,
            got=f"also {shortened(best.unknown)}",
            remedy="Save the state dict of the model alone.",
        )
    return best


def _match(tensors: Mapping[str, Tensor], variant: str, layout: Layout, prefix: str) -> Match:
    module = models.variant(variant)
    outside = mask_prefix(tensors)
    match = Match(variant, module, layout, table_of(module, layout), prefix, outside, {}, {}, [])
    for key in tensors:
        bare = spelled(key.removeprefix(prefix), layout)
        of_masks = () if outside is None else targets(spelled(key.removeprefix(outside), layout), MASK_TABLE)
        if reason := next((reason for pattern, reason in BESIDE if re.fullmatch(pattern, bare)), ""):
            match.beside[key] = reason
        elif names := of_masks or targets(bare, match.table):
            match.names[key] = names
        else:
            match.unknown.append(key)
    return match


def _unrecognised(source: Source) -> ModelError:
    keys = sorted(source.tensors)
    if {"query_position", "projection.weight"} <= set(keys):
        remedy = "These are weights of detrkit without their config: name the model folder that they lie in."
    elif source.model_type and source.model_type not in {model_type(name) for name in models.names()}:
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
