"""What became of each tensor when weights came into a model: nothing is skipped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from detrkit.convert.keys import shortened

FateName = Literal["kept", "reshaped", "re-initialised", "missing", "left out"]

FATES: tuple[FateName, ...] = ("kept", "reshaped", "re-initialised", "missing", "left out")
"""Taken as it is; taken in another shape; not taken, its place starts anew; wanted and not there; without a place."""


@dataclass(frozen=True)
class Fate:
    """What became of one tensor.

    Attributes:
        source: its name where it came from; empty if it was not there.
        targets: our names for it or for its parts; none if it was left out.
        shape: its shape where it came from, else in the model.
        fate: one of `FATES`.
        note: why, or how.
    """

    source: str
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    fate: FateName
    note: str = ""


class Group(NamedTuple):
    """Tensors with the same fate and name, numbers apart; `name` has `*` where their numbers differ."""

    fate: FateName
    name: str
    number: int
    note: str


def counts(report: Iterable[Fate]) -> dict[FateName, int]:
    """How many tensors had each fate; all fates are there."""
    found = dict.fromkeys(FATES, 0)
    for each in report:
        found[each.fate] += 1
    return found


def summarise(report: Iterable[Fate]) -> str:
    """One sentence without a full stop: `296 tensors kept, 2 re-initialised (class_head.weight, class_head.bias)`."""
    report = tuple(report)
    parts: list[str] = []
    for fate, number in counts(report).items():
        if not number and fate != "kept":
            continue
        noun = "" if parts else " tensor" if number == 1 else " tensors"
        ours = [name for each in report if each.fate == fate for name in each.targets]
        named = f" ({shortened(ours)})" if fate in ("re-initialised", "missing") else ""
        parts.append(f"{number:,}{noun} {fate}{named}")
    return ", ".join(parts)


def exceptions(report: Iterable[Fate]) -> list[Group]:
    """All tensors that were not simply kept, alike ones together, in the order of `FATES`."""
    groups: dict[tuple[FateName, str, str], list[str]] = {}
    for each in report:
        if each.fate != "kept":
            name = each.source or ", ".join(each.targets)
            groups.setdefault((each.fate, re.sub(r"\d+", "*", name), each.note), []).append(name)
    found = [
        Group(fate, names[0] if len(names) == 1 else pattern, len(names), note)
        for (fate, pattern, note), names in groups.items()
    ]
    return sorted(found, key=lambda group: FATES.index(group.fate))
