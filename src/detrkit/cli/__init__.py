"""The command line: one module a verb, found by its name; a new file here is all that a new verb needs.

A verb's module offers

- its docstring, whose first line stands in the list of verbs;
- `Options`: a frozen dataclass, a `CommonOptions`; flags and help are made from it;
- `run(options, terminal) -> Outcome`;
- where defaults depend on other flags, `options_for(arguments) -> type[Options]`.

Importing a verb is cheap: what computes is imported when it runs, so that `--help` answers at once. Standard output is
for results, standard error for everything else, and `--json` makes the results one JSON document.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import NoReturn

from detrkit.cli._terminal import Outcome, Terminal
from detrkit.errors import Error, UsageError

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after SIGINT and SIGTERM, as shells count them: 128 and the signal's number."""

_STEPS = """\
From images to a detector:
  detrkit demo                                      see it work, nothing to download
  detrkit doctor DATA                               what is wrong with a data set; --fix OUT writes a clean copy
  detrkit pretrain IMAGES --out runs/pretrained     where labels are few: learn from images without any first
  detrkit find runs/pretrained IMAGES --example …   one box drawn: all that is like it, before any label exists
  detrkit train DATA --out runs/mine                train; DATA in COCO, Pascal VOC or YOLO format
  detrkit evaluate runs/mine DATA --report report   figures, and a page to look at
  detrkit predict runs/mine IMAGES --out found      boxes on new images

Flags of one verb: detrkit VERB --help"""


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived: end as after Ctrl-C."""


def verbs() -> tuple[str, ...]:
    """The names of all verbs, by what lies in this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 data, 4 model, 5 and 6 what the doctor found, 130 interrupted, 143
        terminated.
    """
    is_own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by 2>&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    terminal = Terminal(json="--json" in arguments)
    try:
        with _terminable():
            outcome = _dispatch(arguments, terminal, is_own_process)
            terminal.finish(outcome)
            return outcome.exit_code
    except BrokenPipeError:
        terminal.give_up_results()  # the reader of our output has gone (`detrkit … | head`)
        return 1
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, _Terminated) else INTERRUPTED
        return terminal.fail(str(error) or "Interrupted.", "Interrupted", code)
    except Exception as error:
        if "--traceback" in arguments or os.environ.get("DETRKIT_TRACEBACK", "0") not in ("", "0"):
            terminal.note(traceback.format_exc().rstrip())
        return _report(error, terminal)


def _dispatch(arguments: list[str], terminal: Terminal, is_own_process: bool) -> Outcome:
    if not arguments:
        terminal.note(_overview())
        return Outcome(exit_code=UsageError.exit_code)
    if arguments[0] in ("-h", "--help", "help"):
        return Outcome({"verbs": _summaries()}, text=_overview())
    if arguments[0] == "--version":
        from detrkit import __version__

        return Outcome({"version": __version__}, text=f"detrkit {__version__}")
    from detrkit.cli._options import parse

    verb, module = _module(arguments[0])
    kind = module.options_for(arguments[1:]) if hasattr(module, "options_for") else module.Options
    try:
        options = parse(kind, verb, arguments[1:], quiet=terminal.json)
    except SystemExit as ended:  # tyro has printed the help, or what is wrong
        return Outcome(exit_code=int(ended.code or 0))
    if is_own_process:
        from detrkit.cli._memory import settle_memory

        settle_memory()
    outcome: Outcome = module.run(options, terminal)
    return outcome


def _module(verb: str) -> tuple[str, ModuleType]:
    known = verbs()
    if verb not in known:
        close = difflib.get_close_matches(verb, known, 1, 0.5)
        raise UsageError(
            "There is no such verb",
            got=repr(verb),
            expected=f"one of {', '.join(known)}",
            remedy=f"Did you mean {close[0]!r}?" if close else "See detrkit --help.",
        )
    return verb, importlib.import_module(f"{__name__}.{verb}")


def _summaries() -> dict[str, str]:
    documents = {verb: importlib.import_module(f"{__name__}.{verb}").__doc__ or "" for verb in verbs()}
    return {verb: document.partition("\n")[0] for verb, document in documents.items()}


def _overview() -> str:
    rows = "\n".join(f"  {verb:<10}{summary}" for verb, summary in _summaries().items())
    return f"usage: detrkit VERB …\n\nObject detection with the DETR family.\n\nVerbs:\n{rows}\n\n{_STEPS}"


def _report(error: Exception, terminal: Terminal) -> int:
    """Say what went wrong, and return the exit code."""
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        from detrkit.data.loading import death_of_worker

        error = death_of_worker(error) or error  # PyTorch raises it wherever the main process is, even twice
    if isinstance(error, Error):
        parts = {name: getattr(error, name) for name in ("what", "where", "got", "expected", "remedy")}
        return terminal.fail(str(error), type(error).__name__, error.exit_code, **parts)
    from detrkit.whole import how_to_make_room

    remedy = how_to_make_room(error)
    if isinstance(error, OSError) and (error.filename is not None or remedy):  # those of a full disk name no file
        place = "" if error.filename is None else f"{error.filename}: "
        return terminal.fail(f"{place}{error.strerror}. {remedy}".strip(), "OSError", 1, remedy=remedy)
    # On a processor torch raises a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "CPUAllocator" in str(error):
        remedy = "Try a smaller --batch-size or --image-size."
        return terminal.fail(f"The memory does not suffice. {remedy}", "OutOfMemoryError", 1, remedy=remedy)
    said = f"{type(error).__name__}: {error}"
    return terminal.fail(f"{said}. This should not happen: --traceback shows where.", type(error).__name__, 1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, with files closed and worker processes gone."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
