"""Pretext tasks: each holds a model, brings its loss, and needs no labels.

The package is also the function `detrkit.pretrain(images, out=…)`; `help(detrkit.training.pretraining.pretrain)` shows
what it takes and gives.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

_FUNCTION = "detrkit.training.pretraining"


class _CallableModule(ModuleType):
    """A package that is a function, too.

    The public function has the name of this package, and importing any module of it would put the package in the
    function's place: `detrkit.pretrain` must be both. The function lies in a tier above, of which nothing else here may
    know; it is looked up at the call, as the list of public names does.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module(_FUNCTION).pretrain(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the function, for editors and shells that show it."""
        return inspect.signature(importlib.import_module(_FUNCTION).pretrain)


sys.modules[__name__].__class__ = _CallableModule
