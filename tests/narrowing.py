"""ResNets with an eighth of their channels: for names, files and answers that agree, to which width adds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from detrkit.nn.resnet import ARCHITECTURES


@contextmanager
def narrow_resnets() -> Iterator[None]:
    """Build all ResNets with frozen norms so, under their own names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, architecture in ARCHITECTURES.items():
            if not architecture.groups:
                widths = tuple(width // 8 for width in architecture.widths)
                patch.setitem(ARCHITECTURES, name, architecture._replace(widths=widths, stem=architecture.stem // 8))
        yield
