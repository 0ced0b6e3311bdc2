"""What the documents say of tables in the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from contracts.sources import Source
from contracts.test_imports import TIERS, part

from detrkit.data.doctor.kinds import KINDS
from detrkit.data.problems import POLICIES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tiers_stand_in_the_documents(sources: list[Source]) -> None:
    text = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+[a-z]? \| (.+?) \|", text, re.MULTILINE)
    told = [tuple(re.findall(r"`(\w+)`", row)) for row in rows]
    assert told == [tuple(name for name in tier if name != "__main__") for tier in TIERS]
    (planned,) = re.findall(r"(`\w+` and `\w+`) are not in the tree yet", text)
    there = {part(source.name) for source in sources}
    assert set(re.findall(r"\w+", planned)) - {"and"} == {name for tier in TIERS for name in tier} - there


def test_the_policies_stand_in_the_documents() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (\w+) \| (.+) \|$", (DOCS / "data.md").read_text(), re.MULTILINE)
    assert {kind: tuple(told) for kind, *told in rows} == {kind: tuple(policy) for kind, policy in POLICIES.items()}


def test_what_the_doctor_finds_stands_in_the_documents() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+) \|$", (DOCS / "doctor.md").read_text(), re.MULTILINE)
    assert {kind: (severity, meaning) for kind, severity, meaning in rows} == {
        name: (kind.severity, kind.meaning) for name, kind in KINDS.items() if name not in POLICIES
    }
