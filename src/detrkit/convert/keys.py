"""Key tables (`detrkit.models._keys`) applied: tensors under the names of others, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from detrkit.errors import ModelError

Table = Sequence[tuple[str, str | tuple[str, ...]]]

_GROUP = re.compile(r"\((?:\\d\+|\.\+)\)")


class Origin(NamedTuple):
    """Where a tensor of ours comes from: part `part` of `parts` equal ones of the tensor `name`."""

    name: str
    part: int
    parts: int


def targets(key: str, table: Table) -> tuple[str, ...]:
    """Our names for the parts of a tensor; none where the table does not know it."""
    for pattern, target in table:
        if found := re.fullmatch(pattern, key):
            return tuple(found.expand(name) for name in ((target,) if isinstance(target, str) else target))
    return ()


def origin(name: str, table: Table) -> Origin | None:
    """What a tensor of ours is called elsewhere; None where the table has no word for it."""
    for pattern, target in table:
        names = (target,) if isinstance(target, str) else target
        for part, ours in enumerate(names):
            if found := _turned(ours, pattern).fullmatch(name):
                values = [found[f"g{number}"] for number in range(1, len(_GROUP.findall(pattern)) + 1)]
                return Origin(_with_values(pattern, values), part, len(names))
    return None


@cache  # every row of a table is asked for every tensor
def _turned(target: str, pattern: str) -> re.Pattern[str]:
    """A target as a pattern: its references are the groups of the row's pattern again."""
    groups = _GROUP.findall(pattern)
    turned = re.sub(r"\\\\(\d)", lambda digit: f"(?P<g{digit[1]}>{groups[int(digit[1]) - 1][1:]}", re.escape(target))
    return re.compile(turned)


def _with_values(pattern: str, values: Sequence[str]) -> str:
    """A pattern as a name: its groups have values."""
    following = iter(values)
    return _GROUP.sub(lambda _: next(following), pattern).replace("\\", "")


def cut(key: str, tensor: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """A tensor's equal parts along its first axis, under a name each.

    Raises:
        ModelError: it cannot be cut so.
    """
    if tensor.ndim and len(tensor) % len(names):
        raise ModelError(f"The tensor cannot be cut into {len(names)} equal parts", where=key, got=tuple(tensor.shape))
    return dict(zip(names, tensor.chunk(len(names)), strict=True)) if tensor.ndim else {names[0]: tensor}


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors under our names.

    Args:
        state: tensors under the names of others.
        table: the key table of a variant.

    Raises:
        ModelError: a name that no pattern matches, or a tensor that cannot be cut.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        names = targets(key, table)
        if names:
            renamed.update(cut(key, tensor, names))
        else:
            unknown.append(key)
    if unknown:
        raise ModelError("The state dict holds keys that this variant does not know", got=shortened(unknown))
    return renamed


def rename_back(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under the names of others, joined where those keep several in one.

    Args:
        state: tensors under our names.
        table: the key table of a variant; of several patterns that could be meant, the first.

    Raises:
        ModelError: tensors that have no name there, or of which only some parts are given.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    whole: dict[str, int] = {}
    unknown = []
    for name, tensor in state.items():
        if (found := origin(name, table)) is None:
            unknown.append(name)
            continue
        parts.setdefault(found.name, {})[found.part] = tensor
        whole[found.name] = found.parts
    unknown += [name for name, given in parts.items() if len(given) != whole[name]]
    if unknown:
        raise ModelError("These tensors have no place under the other names", got=shortened(unknown))
    return {
        name: torch.cat([given[part] for part in sorted(given)]) if len(given) > 1 else given[0]
        for name, given in parts.items()
    }


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """A list of names for a message, not longer than a message may be."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
