"""What there is to say about weights of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from detrkit.cli._options import DetectionOptions
from detrkit.cli._terminal import count, shell
from detrkit.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from detrkit.convert import Fate
    from detrkit.predict import Detector
    from detrkit.segmentation.model import Segmenter
    from detrkit.structures import Category


@runtime_checkable
class Found(Protocol):
    """A model, where it comes from, and what became of each tensor on the way."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    @property
    def segmenter(self) -> Segmenter | None:
        """The model with its mask head, if it has one."""

    @property
    def variant(self) -> str:
        """Its variant."""

    @property
    def preset(self) -> str:
        """The preset that it is; may be empty."""

    @property
    def categories(self) -> tuple[Category, ...]:
        """The category table; may be empty."""

    @property
    def origin(self) -> str:
        """Who wrote the weights."""

    @property
    def report(self) -> tuple[Fate, ...]:
        """What became of each tensor."""


def weights_document(found: Found) -> dict[str, Any]:
    """All that is known, for `--json`."""
    from detrkit.convert import counts

    config: Any = found.model.config
    whole = found.model if found.segmenter is None else found.segmenter
    return {
        "origin": found.origin,
        "variant": found.variant,
        "preset": found.preset,
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "config": dataclasses.asdict(config),
        "mask_attention": None if found.segmenter is None else found.segmenter.mask_head.attention,
        "categories": [category.to_json() for category in found.categories],
        "assumed": list(_assumed(found)),
        "tensors": counts(found.report),
        "report": [dataclasses.asdict(fate) for fate in found.report],
    }


def weights_lines(found: Found, document: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """What it is, its architecture, and what became of the tensors.

    Args:
        found: the model.
        document: of `weights_document`.
        whole: name every tensor, and not only those that were not simply kept.
    """
    from detrkit.convert import summarise

    config = document["config"]
    layers = [
        f"{config[name]} {name.partition('_')[0]}" for name in ("encoder_layers", "decoder_layers") if name in config
    ]
    of = [
        config["backbone"] + (" DC5" if config.get("dilated") else ""),
        *([f"{' and '.join(layers)} layers"] if layers else []),
        *([f"width {config['dim']}"] if "dim" in config else []),
        *([f"{config['heads']} heads"] if "heads" in config else []),
        *(["pre-norm"] if config.get("pre_norm") else []),
        count(config["num_queries"], "query", "queries"),
        count(config["num_classes"], "class", "classes"),
    ]
    lines = [
        f"Model         {found.preset or 'no preset'}, variant {found.variant}, {document['parameters']:,} parameters",
        f"Architecture  {', '.join(of)}",
    ]
    if attention := document["mask_attention"]:
        lines.append(f"Masks         a mask head, its attention maps normalised {attention}")
    if not found.report:  # a model of our own
        return lines
    if assumed := _assumed(found):
        values = {**config, "mask_attention": document["mask_attention"]}
        fields = ", ".join(f"{name} {values[name]}" for name in assumed)
        flags = " or ".join(map(flag, assumed))
        them = "them" if len(assumed) > 1 else "it"
        lines.append(f"Assumed       {fields}: the tensors do not show {them}; convert with {flags} if it is otherwise")
    lines = [f"Origin        {found.origin}", *lines, f"Tensors       {summarise(found.report)}"]
    return [*lines, *(_every(found) if whole else _exceptions(found))]


def flag(name: str) -> str:
    """What a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _assumed(found: Found) -> tuple[str, ...]:
    """Fields that nobody said; of a model of our own there are none."""
    from detrkit.convert import Conversion

    return found.assumed if isinstance(found, Conversion) else ()


def _exceptions(found: Found) -> list[str]:
    from detrkit.convert import exceptions

    return [
        f"  {group.fate}: {group.name}{f' (× {group.number})' if group.number > 1 else ''}: {group.note}"
        for group in exceptions(found.report)
    ]


def _every(found: Found) -> list[str]:
    lines = []
    for fate in found.report:
        shape = " × ".join(map(str, fate.shape)) or "a number"
        goes = f" → {', '.join(fate.targets)}" if fate.targets else ""
        lines.append(f"  {fate.fate}: {fate.source} ({shape}){goes}{f': {fate.note}' if fate.note else ''}")
    return lines


def load_detector(name: str, options: DetectionOptions, *, by_example: bool = False) -> Detector:
    """A detector that has learnt to detect, as of `detrkit.load`.

    Args:
        name: of the model.
        options: of the verb.
        by_example: take a model that was trained to find by example, too.

    Raises:
        ModelError: as `detrkit.load`; or the model was only pre-trained, and `--pretrained` was not given; or it has to
            be shown what it is to find.
    """
    from detrkit.predict import load
    from detrkit.pretrain.saved import is_pretrained

    detector = load(name, device=options.device, precision=options.precision)
    if is_pretrained(detector.about) and not options.pretrained:
        raise ModelError(
            "The model was only pre-trained, without labels: it finds what it is shown, and knows no objects",
            where=name,
            remedy=f"Train it first: detrkit train DATA --init {shell(name)} --out RUN (or say --pretrained, to see "
            "what it answers all the same).",
        )
    if detector.one_shot is not None and not by_example:
        raise ModelError(
            "The model was trained to find by example: it finds what it is shown, and knows no classes",
            where=name,
            remedy=f"Show it one: detrkit find {shell(name)} --example IMAGE LEFT TOP RIGHT BOTTOM IMAGES --out FOUND",
        )
    return detector
