"""What jaxtyping's import hook decorates the library with: the same checks at a fraction of their cost.

The hook (`--jaxtyping-packages` in pyproject.toml) gives each function `jaxtyped(typechecker=beartype)`. That opens a
scope for the names of axes in every call, and checks the arguments twice: before the call, and with the result. Most
functions name no axes and need no scope; and beartype around a function, within one scope, sees all that the two
passes see. This was a fifth of the time of the whole suite.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_whole = jaxtyping.jaxtyped
_typed = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install() -> None:
    """Let the hook decorate by `checked` all that is imported from now on."""
    jaxtyping.jaxtyped = checked


def checked(item: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """A function or class whose arguments and results are checked as `jaxtyping.jaxtyped` would check them."""
    if item is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(item) or inspect.isgeneratorfunction(item):
        return _whole(item, typechecker=typechecker)
    try:
        hints = get_type_hints(item)
    except NameError:  # names that are imported for type checkers alone, or local ones: they may stand for anything
        return _whole(item, typechecker=typechecker)
    decorated = _typed(item)
    if any("jaxtyping." in repr(hint) for hint in hints.values()):
        decorated = _whole(decorated, typechecker=None)
    decorated.__wrapped__ = item  # for tests that ask what comes of types that a user gets wrong
    return decorated
