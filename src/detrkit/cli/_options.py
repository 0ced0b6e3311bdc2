"""Flags, made from dataclasses."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro

from detrkit.errors import UsageError

Chosen = TypeVar("Chosen")

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is off unless it is given: `--json`, without a `--no-json`."""

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every verb takes."""

    json: Switch = False
    """Print one JSON document to standard output, errors included."""
    traceback: Switch = False
    """Show where in the code an error arose; DETRKIT_TRACEBACK=1 does so too."""


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(CommonOptions):
    """What every verb takes that lets a detector work."""

    ensemble: Switch = False
    """Let all decoder layers answer together, overlaps suppressed."""
    batch_size: int = 8
    """At most so many images go through the model at once; changes nothing but the speed."""
    workers: int = 0
    """Processes that load images; 0: none but this one."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Arithmetic of the model; auto: bf16 where the machine has instructions for it, else fp32. Without these
    instructions bf16 takes hundreds of times as long."""
    pretrained: Switch = False
    """Take a model that was only pre-trained, too, although it has not learnt to detect anything."""


def parse(kind: type[Chosen], verb: str, arguments: Sequence[str], *, quiet: bool = False) -> Chosen:
    """The options of a verb.

    Args:
        kind: a dataclass.
        verb: its name, for the messages.
        arguments: what stands behind the verb.
        quiet: print no usage error, but raise it.

    Raises:
        UsageError: an unknown flag or a bad value, where `quiet`.
        SystemExit: the help, or a usage error that is not `quiet`, was printed.
    """

    # tyro knows of terminals without colours, and not of people who want none (no-color.org).
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")

    def read() -> Chosen:
        return tyro.cli(kind, args=list(arguments), prog=f"detrkit {verb}", config=_CONFIG)

    if not quiet or {"-h", "--help"} & set(arguments):
        return read()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return read()
    except SystemExit as ended:
        raise UsageError(_plain(said.getvalue()), remedy=f"See detrkit {verb} --help.") from ended


def glance(kind: type[Chosen], arguments: Sequence[str]) -> Chosen:
    """Some of the flags, to decide on the defaults of the others; whatever else is there is left alone."""
    kept = [argument for argument in arguments if argument not in ("-h", "--help")]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            found, _ = tyro.cli(kind, args=kept, return_unknown_args=True, add_help=False, config=_CONFIG)
        except SystemExit:  # the full parse says what is wrong
            return kind()
    return found


def _plain(framed: str) -> str:
    """What tyro says in a frame under a heading, as one line: without frame, heading, rules and pointer to the help."""
    bare = re.sub(r"\x1b\[[0-9;]*m", "", framed).splitlines()
    lines = [line.strip(" │|╭╮╰╯─-+") if not line.strip(" │|").startswith("--") else line.strip(" │|") for line in bare]
    said = " ".join(line for line in lines[1:] if line.strip("- "))
    return re.sub(r"\s+", " ", said.partition("For full helptext")[0]).strip().rstrip(".")
