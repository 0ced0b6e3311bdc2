"""Two runs never work in one folder, and nothing that a run leaves behind keeps the next one out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from training.toys import train

from detrkit.errors import Error, UsageError
from detrkit.training.alone import FILE, alone_in

pytestmark = [
    pytest.mark.usefixtures("plotless"),
    pytest.mark.skipif(sys.platform == "win32", reason="no locks that end with a process"),
]

HOLD = """
import os, sys
from pathlib import Path
from detrkit.training.alone import alone_in
with alone_in(Path(sys.argv[1])):
    if not os.fork():  # a worker process, which outlives a killed parent
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    os.waitpid(-1, 0)
"""


@contextmanager
def held(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work in a folder."""
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def files(out: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != FILE}


def test_a_run_is_refused_where_another_is_at_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out)
    before = files(out)
    with held(out) as process:
        said = rf"run: A run is at work in this folder; got process {process.pid} on .*, since 20.*Let it finish"
        with pytest.raises(UsageError, match=said):
            train(out, resume=True)
        assert json.loads((out / FILE).read_text())["process"] == process.pid
        assert files(out) == before
    with held(tmp_path / "new"), pytest.raises(UsageError, match="A run is at work"):
        train(tmp_path / "new")


def test_a_killed_run_keeps_nobody_out_whatever_lives_on_of_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held(out) as process:
        process.kill()
        process.wait()
        assert (out / FILE).exists()
        train(out)
        assert not (out / FILE).exists()


def test_one_run_after_another_and_an_interrupted_one_in_one_process(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train(out, resume=resume, on_event=interrupt)
    train(out, resume=True)
    assert not (out / FILE).exists()
    with held(out):
        pass


def test_a_run_is_refused_where_another_of_the_same_process_is_at_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with alone_in(out):
        with pytest.raises(UsageError, match=f"A run is at work in this folder; got process {os.getpid()} on"):
            train(out)
        shutil.copytree(out, tmp_path / "copy")  # opens and closes the file that is locked
        with pytest.raises(AssertionError), held(out):  # another process is refused, and says nothing
            pass
    train(out)


def test_a_forked_process_that_ends_within_a_run_does_not_end_it(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from detrkit.training.alone import FILE, alone_in
with alone_in(Path(sys.argv[1])):
    if not os.fork():
        sys.exit()
    os.wait()
    print((Path(sys.argv[1]) / FILE).exists())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, text: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with alone_in(tmp_path):
        assert (tmp_path / FILE).read_bytes() == b""
    monkeypatch.undo()
    with held(tmp_path):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    with held(tmp_path) as process, alone_in(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid() != process.pid


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / FILE).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="run folder cannot be written"), alone_in(tmp_path / "file" / "run"):
        pass
