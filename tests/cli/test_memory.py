"""How a command's own process gets its memory, seen from outside of it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from detrkit import cli
from detrkit.cli import _memory

ASK = """
import ctypes, json, os, sys
from detrkit.cli._memory import settle_memory

class Usage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd rest0 rest1 u f keep".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Usage, ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "settled":
    settle_memory()
counts = []
for _ in range(3):
    before = libc.mallinfo2().hblks
    block = libc.malloc(ctypes.c_size_t(20 * 2**20))
    counts.append(libc.mallinfo2().hblks - before)
    libc.free(block)
print(json.dumps({"alone": counts, "torch": os.environ.get("THP_MEM_ALLOC_ENABLE"), "loaded": "torch" in sys.modules}))
"""

has_gnu_c = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")


def ask(how: str, **environment: str) -> dict[str, Any]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    command = [sys.executable, "-c", ASK, how]
    said = subprocess.run(command, env=known | environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(said.stdout)
    return found


@pytest.mark.skipif(not has_gnu_c, reason="the GNU C library's memory")
def test_large_blocks_are_got_and_given_back_by_themselves() -> None:
    assert ask("as it is")["alone"] == [1, 0, 0]  # what was free once stays with the small blocks
    settled = ask("settled")
    assert settled == {"alone": [1, 1, 1], "torch": "1", "loaded": False}


@pytest.mark.skipif(not has_gnu_c, reason="the GNU C library's memory")
def test_the_environment_has_the_last_word() -> None:
    found = ask("settled", THP_MEM_ALLOC_ENABLE="0", MALLOC_MMAP_THRESHOLD_=str(2**30))
    assert found["torch"] == "0"
    assert found["alone"] == [0, 0, 0]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _: pytest.fail("nothing to be set there"))
    _memory.settle_memory()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_a_c_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    asked: list[object] = []
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda name: asked.append(name) or object())
    _memory.settle_memory()
    assert asked == [None]


def test_commands_do_it_and_programs_that_call_them_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[bool] = []
    monkeypatch.setattr(_memory, "settle_memory", lambda: done.append(True))
    line = ["doctor", "nowhere", "--json"]
    assert cli.main(line) != 0
    assert not done
    monkeypatch.setattr(sys, "argv", ["detrkit", *line])
    assert cli.main() != 0
    assert done == [True]
    assert capsys.readouterr().out
