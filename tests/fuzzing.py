"""Damage to files, drawn from a seed, and a process of its own in which whatever reads them is watched."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from detrkit.errors import Error

SECONDS = 10
"""The longest that one input may take, of the processor's time: other work on the machine changes no verdict. Whatever
waits, for a pipe or a lock, is ended after three times as long by the clock."""

MEMORY = 2 << 30
"""Bytes that a process may grow by, whatever it reads."""

ODD_NAMES = (
    '"../../../../etc/passwd"',
    '"/etc/passwd"',
    r'"C:\\Windows\\win.ini"',
    r'"..\\..\\a.png"',
    '"."',
    '""',
    r'"a\u0000.png"',
    r'"\ud800.png"',
    r'"\u001b[2J.png"',
    '"pipe.png"',
    '"zero.png"',
    '"folder.png"',
    '"nowhere.png"',
    f'"{"a" * 5000}.png"',
    f'"{"a/" * 3000}a.png"',
)
"""Names of files as JSON: outside their folder, impossible, or of what is no file (`add_odd_files`)."""

ODD_VALUES = (
    *("null", "true", "false", "0", "-1", "-0.0", "0.5", "1e400", "-1e400", "1e300", "1e15", "NaN", "Infinity"),
    *("-Infinity", "2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    *("4611686018427387904", "-4611686018427387904", "-4611686018427387903", "9" * 400, "9" * 5000, "-" + "9" * 4000),
    *('"12"', '"1e400"', '"NaN"', '"text"', "[]", "{}", "[[]]", "[1]", "[1, 2, 3, 4, 5]", '["a", "b", "c", "d"]'),
    *("[null, null, null, null]", "[NaN, 0, 1e400, 1]", "[1e9, 1e9, 1e9, 1e9]", "[[1, 2], [3, 4]]", '{"a": {"b": 1}}'),
    *(f'"{"x" * 200_000}"', "[" * 300 + "]" * 300, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
    *("[" * 100_000 + "]" * 100_000, "[" * 100_000, '{"a":' * 100_000, "[" + "0," * 50_000 + "0]"),
)
"""What no reader of JSON expects, as text."""


def damage_bytes(content: bytes, rng: random.Random, other: bytes = b"") -> tuple[bytes, str]:
    """Some bytes changed, and what was done to them.

    Args:
        content: of a sound file.
        rng: where the damage is drawn from.
        other: of another file, for splices.
    """
    data, size = bytearray(content), len(content)
    place, length = rng.randrange(size + 1), rng.randrange(1, max(2, size // 4))
    kind = rng.choice(("flip", "flip", "truncate", "insert", "delete", "repeat", "overwrite", "splice", "empty"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 4, 32))):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "insert":
        data[place:place] = rng.randbytes(length)
    elif kind == "delete":
        del data[place : place + length]
    elif kind == "repeat":
        data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
    elif kind == "overwrite":
        data[place : place + length] = rng.choice((b"\0", b"\xff", b"9", b"[")) * length
    elif kind == "splice":
        data[place:] = other[rng.randrange(len(other) + 1) :]
    else:
        data.clear()
    return bytes(data), f"{kind} at byte {place}"


def damage_json(text: str, rng: random.Random) -> tuple[str, str]:
    """JSON with one or two values replaced, keys lost, keys that stand twice or lists repeated, and what was done."""
    tree, raw, told = json.loads(text), {}, []
    for number in range(rng.choice((1, 1, 1, 2))):
        if not (places := list(_places(tree))):
            break
        holder, key = rng.choice(places)
        kind = rng.choice(("value", "value", "value", "value", "loss", "twice", "repeat"))
        value = rng.choice(ODD_NAMES if "name" in str(key) and rng.random() < 0.7 else ODD_VALUES)
        if kind == "loss":
            del holder[key]
        elif kind == "twice" and isinstance(holder, dict):
            raw[f"@{number}@"] = f"{json.dumps(holder[key])}, {json.dumps(key)}: {value}"
            holder[key] = f"@{number}@"
        elif kind == "repeat" and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((2, 200))
        else:
            raw[f"@{number}@"] = value
            holder[key] = f"@{number}@"
        told.append(f"{kind} at {key!r}: {value[:40]}")
    damaged = json.dumps(tree)
    for mark, value in raw.items():
        damaged = damaged.replace(f'"{mark}"', value)
    return damaged, "; ".join(told)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All members of a tree, as what holds them and their key."""
    keys: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def add_odd_files(folder: Path) -> None:
    """Put names into a folder that belong to no ordinary file, and would be waited for or read without end."""
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(folder / "gone.png")


class Verdict(NamedTuple):
    """What became of one input: `outcome` is "accepted", "refused", or what went wrong."""

    name: str
    outcome: str
    seconds: float
    message: str

    @property
    def is_good(self) -> bool:
        return self.outcome in ("accepted", "refused")


class Case(NamedTuple):
    """An input: `name` says how it was damaged, `read` reads it, `told` is what a refusal has to name."""

    name: str
    read: Callable[[], object]
    told: str


class _TimedOut(BaseException):
    """No library may catch it."""


def judge(case: Case) -> Verdict:
    """Read an input, which has to succeed or to be refused by a message that names it."""
    start, message = time.process_time(), ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(3 * SECONDS)
    try:
        case.read()
        outcome = "accepted"
    except Error as error:
        message = str(error)
        outcome = "refused" if case.told in message else f"the message does not name {case.told}: {message[:500]}"
        if len(message) > 5000:
            outcome = f"a message of {len(message):,} characters: {message[:500]}"
    except _TimedOut:
        outcome = f"more than {SECONDS} s:\n{traceback.format_exc(limit=-6)}"
    except BaseException as error:  # panics of Rust are no `Exception`
        outcome = f"{type(error).__name__}:\n{traceback.format_exc(limit=-6)}"[:3000]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return Verdict(case.name, outcome, time.process_time() - start, message)


def judge_apart(cases: Callable[[], Iterator[Case]]) -> tuple[list[Verdict], int]:
    """Judge inputs in a process of its own, whose memory is bounded.

    Args:
        cases: makes the inputs, one after the other.

    Returns:
        The verdicts, and by how many bytes the process grew at most. A process that died gives a last verdict that says
        so.
    """
    # Not a fork of this process: other tests may have left threads in it, for whose locks a fork would wait for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["untrusted_inputs"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(cases, sender))
    process.start()
    sender.close()
    verdicts, peak, doing = [], 0, ""
    try:
        while True:
            if not receiver.poll(6 * SECONDS):
                verdicts.append(Verdict(doing, "it hangs where no signal is heard", 6.0 * SECONDS, ""))
                break
            kind, value = receiver.recv()
            if kind == "done":
                peak = value
                break
            if kind == "next":
                doing = value
            else:
                verdicts.append(value)
    except EOFError:
        process.join()
        verdicts.append(Verdict(doing, f"the process died, exit code {process.exitcode}", 0.0, ""))
    process.kill()
    process.join()
    return verdicts, peak


def _work(cases: Callable[[], Iterator[Case]], sender: Connection) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        raise _TimedOut

    signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGPROF, end)
    with warnings.catch_warnings():
        # What warns in a test is an error; here it is what a library says of damaged files.
        warnings.simplefilter("ignore")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        before = _largest()
        for case in cases():
            sender.send(("next", case.name))
            sender.send(("verdict", judge(case)))
        sender.send(("done", _largest() - before))
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # what the parent registered for its own end is none of ours


def _largest() -> int:
    """The most memory that this process has used so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
