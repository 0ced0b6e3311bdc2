"""The sources that the contracts are about."""

from __future__ import annotations

from pathlib import Path

import pytest
from contracts.sources import Source, read_sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every module of the library, parsed."""
    found = read_sources(ROOT / "src", "detrkit")
    assert len(found) > 5, "the library's sources were not found"
    return found
