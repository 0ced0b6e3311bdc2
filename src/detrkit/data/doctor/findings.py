"""A finding, and all findings together: what is wrong with a data set, where, how badly, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.doctor.kinds import KINDS, SEVERITIES, Severity
from detrkit.data.doctor.pictures import Pictures

if TYPE_CHECKING:
    from detrkit.data.doctor.fixing import Fixed

Verdict = Literal["clean", "repairable", "broken"]

MANY_LOST, FEWEST_LOST = 0.2, 5
"""To leave out more than this share of the boxes or images, and so many, is no repair."""

PLACES_TOLD = 1000
"""Places of a finding that a JSON document lists."""


class Place(NamedTuple):
    """Where something was found.

    `where` is a file, or a place in one; `said` is what was found there. For a picture of it: `image`, its row in the
    annotations of `split` (-1: none), `boxes`, (k, 4) xyxy in pixels as they are annotated, `meant`, the same as they
    seem to be meant, and `beside`, an image to compare it with, as a split and a row.
    """

    where: str
    said: str = ""
    split: str = ""
    image: int = -1
    boxes: np.ndarray | None = None
    meant: np.ndarray | None = None
    beside: tuple[str, int] | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.said}" if self.said else self.where


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing that is wrong, or worth knowing, with all its places.

    Attributes:
        kind: its name, a key of `KINDS`.
        split: the split, or the splits, that it is about.
        count: how often it was found: boxes, images or classes.
        said: what was found, in a sentence with figures; "" where the meaning says all.
        places: where, the worst first where there is an order.
        severity: as of its kind, unless this case is another.
    """

    kind: str
    split: str
    count: int
    said: str = ""
    places: Sequence[Place] = ()
    severity: Severity = "note"

    @staticmethod
    def of(
        kind: str,
        split: str,
        places: Sequence[Place],
        said: str = "",
        *,
        count: int = 0,
        severity: Severity | None = None,
    ) -> Finding:
        """A finding of the severity that its kind has; it counts its places unless `count` is given."""
        return Finding(kind, split, count or len(places), said, places, severity or KINDS[kind].severity)

    @property
    def meaning(self) -> str:
        """What it means, in plain words."""
        return KINDS[self.kind].meaning

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].remedy

    def __str__(self) -> str:
        example = f"; for example {self.places[0]}" if self.places else ""
        said = (self.said or self.meaning).rstrip(".")
        return f"{self.split}: {self.count:,} × {self.kind} ({self.severity}): {said}{example}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON document holds it, with at most `PLACES_TOLD` places."""
        told = [
            {"where": place.where, **({"said": place.said} if place.said else {})}
            for place in self.places[:PLACES_TOLD]
        ]
        return {
            "kind": self.kind,
            "severity": self.severity,
            "split": self.split,
            "count": self.count,
            "said": self.said,
            "meaning": self.meaning,
            "remedy": self.remedy,
            "places": told,
        }


class Resolution(NamedTuple):
    """At which size a model sees images: the shorter side is resized to `image_size` pixels unless the longer one would
    exceed `longest`. `token` is the side of the square that one token stands for; `queries` the most objects that are
    found in an image.
    """

    model: str
    queries: int
    image_size: int
    longest: int
    token: int

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """The factors (n,) by which images of `sizes` (n, 2) are resized; 1 where a size is not known."""
        short, long = np.maximum(sizes.min(1), 1), np.maximum(sizes.max(1), 1)
        factors = np.minimum(self.image_size / short, self.longest / long)
        return np.where((sizes > 0).all(1), factors, 1.0)

    def sides(self, annotations: Annotations) -> np.ndarray:
        """The roots (k,) of the areas of all boxes, in pixels as the model sees them."""
        owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
        return self.scales(annotations.image_sizes)[owners] * root_areas(annotations.boxes)


def root_areas(boxes: np.ndarray) -> np.ndarray:
    """The roots (k,) of the areas of boxes (k, 4) in xyxy, in their unit."""
    roots: np.ndarray = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], 1))
    return roots


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What the doctor found in a data set.

    Attributes:
        path: the data set.
        format: how it is written.
        splits: what could be read of it, in the order train, val, test.
        findings: the gravest first.
        resolution: the model that it was held against.
        looked: whether the images were decoded; without, copies and unreadable images are not found.
        pictures: what was seen in the images of each split; empty where they were not decoded.
    """

    path: Path
    format: str
    splits: Mapping[str, Annotations]
    findings: tuple[Finding, ...]
    resolution: Resolution
    looked: bool
    pictures: Mapping[str, Pictures] = field(default_factory=dict)

    def __repr__(self) -> str:
        found = f"{len(self.findings)} finding{'' if len(self.findings) == 1 else 's'}"
        return f"<Diagnosis of {self.path}: {self.verdict}, {found}>"

    @property
    def verdict(self) -> Verdict:
        """`clean` where there are notes at most, else `repairable`, or `broken` where a person is needed."""
        grave = {finding.severity for finding in self.findings}
        return "broken" if "broken" in grave else "repairable" if "repairable" in grave else "clean"

    def of(self, kind: str) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def fix(self, out: str | Path) -> Fixed:
        """Write a clean copy, the images as hard links, and `changes.jsonl` with a line for each change.

        See `detrkit.data.doctor.fixing.fix`.
        """
        from detrkit.data.doctor.fixing import fix

        return fix(self, out)

    def figures(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """For each split its counts, and the sizes of its objects as the model would see them."""
        for name, part in self.splits.items():
            sides = self.resolution.sides(part)
            yield (
                name,
                {
                    "source": part.source,
                    "summary": part.summary(),
                    "images": len(part),
                    "boxes": len(part.boxes),
                    "most_boxes": int(np.diff(part.offsets).max(initial=0)),
                    "median_side": round(float(np.median(sides)), 1) if len(sides) else None,
                    "below_a_token": round(float((sides < self.resolution.token).mean()), 4) if len(sides) else None,
                },
            )

    def to_json(self) -> dict[str, Any]:
        """As one document."""
        return {
            "path": str(self.path),
            "format": self.format,
            "verdict": self.verdict,
            "images_decoded": self.looked,
            "model": self.resolution._asdict(),
            "splits": dict(self.figures()),
            "findings": [finding.to_json() for finding in self.findings],
        }


def is_loss(lost: int, count: int) -> bool:
    """Whether to leave out `lost` of `count` boxes or images is a loss, and no repair any more."""
    return lost >= FEWEST_LOST and lost > MANY_LOST * count


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The gravest first, else as they come; findings of one kind, split and gravity are one."""
    joined: dict[tuple[str, str, str], Finding] = {}
    for found in findings:
        key = (found.kind, found.split, found.severity)
        if (before := joined.get(key)) is not None:
            said = " ".join(filter(None, (before.said, found.said)))
            places = (*before.places, *found.places)
            found = replace(found, count=before.count + found.count, said=said, places=places)
        joined[key] = found
    return tuple(sorted(joined.values(), key=lambda found: -SEVERITIES.index(found.severity)))
