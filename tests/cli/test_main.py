"""Verbs, help, errors, exit codes: what all commands have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import detrkit as package
from detrkit import cli
from detrkit.cli import _options, verbs
from detrkit.cli._terminal import Outcome, Terminal, count, duration, plain, share, table
from detrkit.errors import DataError, Error, MissingExtraError, ModelError, UsageError
from detrkit.training import recipe
from detrkit.training.pretext import TASKS as PRETEXTS
from detrkit.training.pretext import of_task as pretext_of_task
from detrkit.training.recipe import fields
from detrkit.training.tasks import TASKS, of_task

FOLDER = recipe.FOLDER
FULL = Path("/dev/full")


def test_verbs_are_found_and_listed(detrkit):
    assert {"doctor", "predict", "train"} <= set(verbs())
    said = detrkit("--help")
    assert said.code == 0
    assert all(f"\n  {verb} " in said.out for verb in verbs())
    assert not said.err


def test_no_verb_is_a_usage_error_that_shows_the_help(detrkit):
    said = detrkit()
    assert said.code == 2
    assert not said.out
    assert "usage: detrkit VERB" in said.err


def test_version(detrkit):
    assert detrkit("--version").out == f"detrkit {package.__version__}\n"
    assert detrkit("--version", "--json").document == {"version": package.__version__}


@pytest.mark.parametrize("name", sorted(file.stem for file in recipe.FOLDER.glob("*.toml")))
def test_packaged_recipes_can_be_named(detrkit, monkeypatch, name):
    monkeypatch.setattr(recipe, "FOLDER", FOLDER)
    task = recipe.task_of(name)
    usual = pretext_of_task(task) if task in PRETEXTS else of_task(task)
    said = detrkit("pretrain" if task in PRETEXTS else "train", "--recipe", name, "--help")
    assert said.code == 0
    known = recipe.read(name, usual)
    assert f"(default: {known.optimization.epochs})" in said.out


def test_an_unknown_verb_is_refused_with_the_nearest(detrkit):
    said = detrkit("trian")
    assert said.code == 2
    assert not said.out
    assert "Did you mean 'train'?" in said.err
    assert detrkit("qqqq", "--json").document["error"]["expected"].startswith("one of convert")


@pytest.mark.parametrize("verb", verbs())
def test_each_verb_explains_itself(detrkit, verb):
    said = detrkit(verb, "--help")
    assert said.code == 0
    assert f"usage: detrkit {verb}" in said.out
    assert "--json" in said.out
    assert not said.err


def test_the_help_of_train_lists_every_field_with_its_default(detrkit):
    text = detrkit("train", "--help").out
    assert len(fields()) > 30
    for name, (section, kind, _) in fields().items():
        assert f"{section} options" in text
        flag = "--" + name.replace("_", "-")
        assert flag in text
        assert (f"--no-{flag[2:]}" in text) == (kind is bool)
    assert "Passes through the training split. (default: 300)" in text


@pytest.mark.parametrize("own", TASKS)
def test_the_help_of_train_names_the_choices_of_other_tasks(detrkit, own):
    texts = {task: detrkit("train", "--task", task, "--help").out for task in TASKS}
    for kind in TASKS.values():
        assert all(f"--{name.replace('_', '-')}" in texts[own] for name in fields(kind))
    assert all(f"--task {task} has" in texts[own] for task in set(TASKS) - {own, "detection"})


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": "", "TERM": "dumb"}, False)],
)
def test_the_help_has_colours_where_they_are_wanted(capsys, monkeypatch, environment, is_coloured):
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["predict", "--help"]) == 0
    assert ("\x1b[" in capsys.readouterr().out) == is_coloured


def test_help_is_cheap():
    code = (
        "import sys; from detrkit.cli import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["train", "--help"], ["predict", "--help"], ["inspect", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments} imports a heavy package"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "detrkit", "nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("detrkit: There is no such verb")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("train", "data", "--out", "x", "--epocs", "3"), "--epochs"),
        (("train", "--out", "x"), "DATA"),
        (("train", "data"), "--out"),
        (("train", "data", "--out", "x", "--epochs", "many"), "many"),
        (("train", "data", "--out", "x", "--schedule", "linear"), "cosine"),
        (("train", "data", "--out", "x", "--architecture", "dim"), "architecture"),
        (("predict", "run"), "--out"),
        (("find", "run", "a.jpg"), "--out"),
        (("find", "run", "a.jpg", "--out", "x", "--example", "a.jpg", "1", "2", "3"), "--example"),
        (("find", "run", "a.jpg", "--out", "x", "--candidates", "window"), "windows"),
        (("predict", "run", "a.jpg", "--out", "x", "--threshold", "high"), "high"),
        (("evaluate", "run"), "DATA"),
        (("rewrite", "data", "out"), "--format"),
        (("rewrite", "data", "out", "--format", "coco", "--images", "move"), "link"),
        (("convert", "file.pth"), "OUT"),
        (("inspect",), "PATH"),
        (("demo", "--images", "lots"), "lots"),
    ],
)
def test_bad_flags(detrkit, arguments, part):
    said = detrkit(*arguments)
    assert said.code == 2
    assert not said.out
    assert part in said.err
    error = detrkit(*arguments, "--json").document["error"]
    assert part in error["message"]
    assert (error["kind"], error["exit_code"]) == ("UsageError", 2)
    assert "─" not in error["message"]
    assert "--------" not in error["message"]


@pytest.fixture
def failing(monkeypatch):
    """Make the verb `inspect` raise what is given."""

    def fail_with(error: BaseException) -> None:
        def run(options, terminal):
            raise error

        module = SimpleNamespace(Options=_options.CommonOptions, run=run)
        monkeypatch.setattr(cli, "_module", lambda verb: (verb, module))

    return fail_with


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Error("a"), 1),
        (UsageError("a"), 2),
        (DataError("a"), 3),
        (ModelError("a"), 4),
        (MissingExtraError("sklearn", "demo", "a"), 2),
        (OSError(28, "No space left on device", "runs/x"), 1),
        (OSError(28, "No space left on device"), 1),
        (OSError(2, "No such file or directory", "runs/x"), 1),
        (MemoryError(), 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
        (cli._Terminated(), 143),
    ],
)
def test_exit_codes(detrkit, failing, error, code):
    failing(error)
    said = detrkit("inspect")
    assert said.code == code
    assert not said.out
    assert said.err.startswith("detrkit: ")
    assert "Traceback" not in said.err
    assert ("This should not happen" in said.err) == isinstance(error, ZeroDivisionError)
    assert ("Make room on the disk" in said.err) == (getattr(error, "errno", None) == 28)
    document = detrkit("inspect", "--json").document
    assert document["error"]["exit_code"] == code


def test_the_parts_of_an_error_are_in_the_document(detrkit, failing):
    failing(DataError("It is bad", where="a.json", got="x", expected="y", remedy="Mend it."))
    error = detrkit("inspect", "--json").document["error"]
    assert error == {
        "kind": "DataError",
        "message": "a.json: It is bad; got x; expected y. Mend it.",
        "exit_code": 3,
        **{"what": "It is bad", "where": "a.json", "got": "x", "expected": "y", "remedy": "Mend it."},
    }


def test_a_traceback_is_shown_when_asked_for(detrkit, failing, monkeypatch):
    failing(DataError("It is bad"))
    assert "Traceback" in detrkit("inspect", "--traceback").err
    monkeypatch.setenv("DETRKIT_TRACEBACK", "1")
    said = detrkit("inspect", "--json")
    assert "Traceback" in said.err
    assert said.document["error"]["what"] == "It is bad"
    monkeypatch.setenv("DETRKIT_TRACEBACK", "0")
    assert "Traceback" not in detrkit("inspect").err


def test_sigterm_ends_the_work_and_the_old_handler_comes_back(detrkit, monkeypatch):
    def run(options, terminal):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_module", lambda verb: (verb, SimpleNamespace(Options=_options.CommonOptions, run=run)))
    assert detrkit("inspect").code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from types import SimpleNamespace; from detrkit import cli; from detrkit.cli import _options\n"
        "def run(options, terminal):\n"
        "    for _ in range(100000): terminal.result('x' * 100)\n"
        "cli._module = lambda verb: (verb, SimpleNamespace(Options=_options.CommonOptions, run=run))\n"
        "sys.exit(cli.main(['inspect']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["--help", "--json"], ["nonsense", "--json"]])
def test_output_that_cannot_be_written_is_told_without_a_traceback(arguments):
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "detrkit", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == (2 if "nonsense" in arguments else 1)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("detrkit: There is no such verb" if "nonsense" in arguments else "detrkit: No space")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes streams")
@pytest.mark.parametrize(("closed", "results", "notes"), [("2>&-", 1, 0), (">&-", 0, 1), (">&- 2>&-", 0, 0)])
def test_streams_that_are_closed_take_nothing_and_stop_nothing(tmp_path, closed, results, notes):
    command = f"{shlex.quote(sys.executable)} -m detrkit inspect {shlex.quote(str(tmp_path / 'none'))} --json {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == DataError.exit_code
    documents = [json.loads(text)["error"]["kind"] for text in [done.stdout] if text]
    assert documents == ["DataError"] * results
    assert done.stderr.count("\n") == notes


def test_only_the_first_process_talks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    terminal = Terminal(json=True)
    terminal.note("a")
    terminal.result("b")
    terminal.finish(Outcome({"c": 1}))
    assert capsys.readouterr() == ("", "")
    terminal.fail("broken", "Error", 1)
    assert "broken" in capsys.readouterr().err


def test_file_names_that_are_no_text_are_printed_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    Terminal().result("a\udcff.jpg")
    assert stream.buffer.getvalue() == b"a\\udcff.jpg\n"  # type: ignore[attr-defined]


def test_counting_tells_now_and_then(capsys):
    moments = iter([0.0, 5.0, 21.0, 22.0])
    terminal = Terminal(clock=lambda: next(moments))
    with terminal.counting(3, "Detecting") as tick:
        for _ in range(3):
            tick()
    assert capsys.readouterr().err == "Detecting: 2 of 3\n"


COUNTING = """
from detrkit.cli._terminal import Terminal
terminal = Terminal()
with terminal.counting(3, "Detecting") as tick:
    for number in range(3):
        terminal.result(f"{number}.jpg: " + "1 nut, " * 30)
        tick()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("redirected", [False, True])
def test_lines_of_results_stand_above_the_bar(tmp_path, redirected):
    import pty

    own, other = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    with (tmp_path / "out").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", COUNTING],
            stdout=file if redirected else other,
            stderr=other,
            env={**environment, "TERM": "xterm", "COLUMNS": "80"},
        )
    os.close(other)
    screen = b""
    with contextlib.suppress(OSError):  # Linux says so when the other side is closed
        while part := os.read(own, 4096):
            screen += part
    os.close(own)
    assert process.wait() == 0
    assert b"Detecting" in screen
    lines = (tmp_path / "out").read_text().splitlines() if redirected else _drawn(screen.decode())
    whole = [f"{number}.jpg: " + "1 nut, " * 30 for number in range(3)]
    assert [line.strip() for line in lines if "jpg" in line] == [line.strip() for line in whole]


def _drawn(screen: str) -> list[str]:
    """What is left on a screen, line by line: a line that is erased leaves nothing of what stood in it."""
    lines = [part.rpartition("\x1b[2K")[2] for part in screen.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in lines]


def test_undefined_figures_are_null():
    document = plain({"a": float("nan"), "b": [1.5, float("inf")], "c": None, 3: (True, "x")})
    assert json.dumps(document, allow_nan=False) == '{"a": null, "b": [1.5, null], "c": null, "3": [true, "x"]}'


def test_words():
    assert [duration(seconds) for seconds in (0.4, 59.0, 61.0, 3600.0, 7384.0)] == [
        *("0 s", "59 s", "1:01 min", "1:00:00 h", "2:03:04 h"),
    ]
    assert (share(0.12345), share(float("nan"))) == ("0.123", "–")
    assert (count(1, "box", "boxes"), count(1200, "box", "boxes"), count(2, "image")) == (
        *("1 box", "1,200 boxes", "2 images"),
    )
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\n───  ──\nccc   d"


def test_common_options_are_off():
    assert dataclasses.asdict(_options.parse(_options.CommonOptions, "x", [])) == {"json": False, "traceback": False}
