"""Narrow ResNets for single tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from narrowing import narrow_resnets


@pytest.fixture
def narrow() -> Iterator[None]:
    """Narrow ResNets for one test: beside it there are others that compare with published numbers."""
    with narrow_resnets():
        yield
