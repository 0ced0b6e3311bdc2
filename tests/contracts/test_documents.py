"""What the documents say of tables in the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from detrkit.data.doctor.kinds import KINDS
from detrkit.data.problems import POLICIES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_policies_stand_in_the_documents() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (\w+) \| (.+) \|$", (DOCS / "data.md").read_text(), re.MULTILINE)
    assert {kind: tuple(told) for kind, *told in rows} == {kind: tuple(policy) for kind, policy in POLICIES.items()}


def test_what_the_doctor_finds_stands_in_the_documents() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+) \|$", (DOCS / "doctor.md").read_text(), re.MULTILINE)
    assert {kind: (severity, meaning) for kind, severity, meaning in rows} == {
        name: (kind.severity, kind.meaning) for name, kind in KINDS.items() if name not in POLICIES
    }
