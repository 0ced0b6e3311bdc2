"""The variants of the family: one module each, found by name. A new file here is all that a new variant needs.

A variant's module offers:

- `Config`: a frozen dataclass, architecture and criterion only, every field with a default; data, training and
  prediction read `num_classes`, `backbone`, `frozen_stages`, `num_queries`, `image_size` and `longest`;
- `Model(config)`: an `nn.Module` with `encode`, `queries`, `decode`, `predict` and `forward`. What depends on the
  categories, and so starts anew for others, lies in its part `class_head`; where it lies elsewhere or in several
  parts, `class_heads` of the class is the tuple of their names;
- `PRESETS`: names to configs;
- `criterion(config)`: the loss;
- `postprocess(predictions, sizes, ensemble=…)`: scored boxes in pixels;
- `OFFICIAL`: the key table from the published weights to ours, empty if there are none (`detrkit.models._keys`).

It may offer `HUGGINGFACE`, how the `transformers` library holds it, and `read_config(state)`, the fields of its config
that names and shapes of our tensors show. By these three `detrkit.convert` recognises a variant's weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from detrkit.errors import UsageError, plain
from detrkit.losses.criterion import SetCriterion
from detrkit.models._config import check_size
from detrkit.postprocess import Scored
from detrkit.structures import Predictions


@runtime_checkable
class Variant(Protocol):
    """What the module of a variant offers."""

    __name__: str
    Config: type[Any]
    Model: Callable[[Any], nn.Module]
    PRESETS: Mapping[str, Any]
    OFFICIAL: Sequence[tuple[str, str | tuple[str, ...]]]

    def criterion(self, config: Any) -> SetCriterion:
        """The loss of a model with this config."""
        ...

    def postprocess(self, predictions: Predictions, sizes: Tensor, ensemble: bool = False) -> list[Scored]:
        """Scored boxes in pixels of images of `sizes` (height, width)."""
        ...


def names() -> tuple[str, ...]:
    """The names of all variants, by what lies in this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def variant(name: str) -> Variant:
    """The module of a variant.

    Raises:
        UsageError: there is no variant of that name; offers the nearest.
    """
    if name not in names():
        raise UsageError(
            "There is no such variant",
            got=repr(name),
            expected=f"one of {', '.join(names())}",
            remedy=_nearest(name, names()),
        )
    return cast(Variant, importlib.import_module(f"{__name__}.{name}"))


def presets() -> dict[str, str]:
    """All presets: the name of each and the variant that it belongs to."""
    return {preset: name for name in names() for preset in variant(name).PRESETS}


def configure(preset: str, **overrides: Any) -> tuple[Variant, Any]:
    """The variant and the config of a preset, with fields replaced.

    Args:
        preset: a name such as `detr-r50`.
        **overrides: fields of the variant's `Config`; text is read as the field's type.

    Raises:
        UsageError: unknown preset or field, or a value that the field cannot take; offers the nearest.
    """
    known = presets()
    if preset not in known:
        raise UsageError(
            "There is no such preset",
            got=repr(preset),
            expected=f"one of {', '.join(known)}",
            remedy=_nearest(preset, list(known)),
        )
    module = variant(known[preset])
    config = module.PRESETS[preset]
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {}
    for key, value in overrides.items():
        if key not in fields:
            raise UsageError(
                f"The preset {preset} has no such field",
                got=repr(key),
                expected=f"one of {', '.join(fields)}",
                remedy=_nearest(key, list(fields)),
            )
        values[key] = _as_type_of(fields[key], plain(value), key)
    return module, dataclasses.replace(config, **values)


def at_size(config: Any, image_size: int, longest: int = 0) -> Any:
    """The config of a model that sees images at another size.

    Args:
        config: of any variant.
        image_size: the shorter side that images are resized to, in pixels.
        longest: limit of the longer side, in pixels; 0: in proportion to the shorter side, as in the config.

    Raises:
        UsageError: no model sees images of that size.
    """
    longest = longest or round(config.longest * image_size / config.image_size)
    check_size(image_size, longest)
    return dataclasses.replace(config, image_size=image_size, longest=longest)


def build(preset: str, **overrides: Any) -> nn.Module:
    """The bare model of a preset, with random parameters as the paper initialises them.

    Weights come from `detrkit.load`, `detrkit.convert` or `detrkit.nn.weights.load_backbone_weights`.

    Args:
        preset: a name such as `detr-r50`.
        **overrides: fields of the variant's `Config`, above all `num_classes`, the count of categories.

    Raises:
        UsageError: unknown preset or field; offers the nearest.
    """
    module, config = configure(preset, **overrides)
    return module.Model(config)


def class_heads(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's tensors that mean something for its own categories only, in their order."""
    parts = tuple(f"{part}." for part in getattr(model, "class_heads", ("class_head",)))
    return tuple(name for name in model.state_dict() if name.startswith(parts))


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    """Text from a command line or a recipe, as the type that the field's value has."""
    kind, result = type(default), value
    if isinstance(value, str) and kind is not str:
        try:
            result = _TRUTH[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise UsageError(f"Bad value for {name}", got=repr(value), expected=kind.__name__) from error
    elif kind is float and type(value) is int:
        result = float(value)
    if type(result) is not kind or (kind is float and not math.isfinite(result)):
        raise UsageError(f"Bad value for {name}", got=repr(value), expected=kind.__name__)
    return result


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.4)
    return f"Did you mean {close[0]!r}?" if close else ""
