"""Real signals to real processes: killed at random moments, a run that goes on ends as if it had never been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from training.killing import FIELDS, command, journal, start, train, wait_for
from training.test_resume import everything

import detrkit

pytestmark = pytest.mark.usefixtures("plotless")

STEPS_BETWEEN_SAVES = 10
"""Of these runs at most: two epochs. As a rule they save by the clock long before."""


@pytest.fixture(scope="module")
def undisturbed(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody kills, and how many seconds it takes from its first file to its end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(train, drawn, out, False, FIELDS)
    wait_for((out / "recipe.toml").exists, process)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return out, time.monotonic() - began


def killed_and_resumed(data: Path, whole: Path, out: Path, seconds: float, **fields: object) -> tuple[bool, int]:
    """Kill a run so many seconds after its first file and go on with it; whether it was cut off, and the steps lost."""
    process = start(train, data, out, False, {**FIELDS, **fields})
    wait_for((out / "recipe.toml").exists, process)
    time.sleep(seconds)
    process.kill()
    process.join()
    before = journal(out)
    done = [json.loads(line)["step"] for line in whole_lines(out / "metrics.jsonl")]
    again = start(train, data, out, True, {})
    again.join()
    assert again.exitcode == 0, (out, before, journal(out))
    (went_on,) = [step for name, step in journal(out)[len(before) :] if name == "Started"]
    saved = max((step for name, step in before if name == "Saved"), default=0)
    assert went_on >= saved, "steps were lost that had been saved"
    assert everything(out) == everything(whole)
    return process.exitcode == -signal.SIGKILL, max(done, default=0) - went_on


def whole_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines(True) if line.endswith("}\n")] if file.exists() else []


def test_a_killed_run_ends_as_if_it_had_not_been(drawn: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    for number in range(2):
        moment = random.Random(number).uniform(0, seconds)
        _, lost = killed_and_resumed(drawn, whole, tmp_path / str(number), moment, workers=number)
        assert lost <= STEPS_BETWEEN_SAVES


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_kills(drawn: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    cut, lost = 0, []
    for number in range(30):
        moment = random.Random(100 + number).uniform(0, seconds)
        was_cut, steps = killed_and_resumed(drawn, whole, tmp_path / str(number), moment, workers=int(number % 5 == 4))
        cut += was_cut
        lost.append(steps)
    print(f"{cut} of 30 were cut off; steps done again: {lost}")
    assert cut >= 20
    assert max(lost) <= STEPS_BETWEEN_SAVES


def test_a_command_line_that_is_terminated_saves_and_says_how_to_go_on(
    drawn: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """SIGTERM to the whole group, loading processes included, as batch systems send it."""
    out, said = tmp_path / "a run", tmp_path / "said"
    recipe = undisturbed[0] / "recipe.toml"
    process = start(command, ["train", str(drawn), "--out", str(out), "--recipe", str(recipe), "--workers", "2"], said)
    wait_for(lambda: len(whole_lines(out / "metrics.jsonl")) >= 7, process)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["saved"]) == ("interrupted", status["step"])
    expected = f"detrkit: Stopped after step {status['step']} of 30, and saved: nothing is lost. Go on with: "
    assert f"{expected}detrkit train {drawn} --out '{out}' --resume" in said.read_text()
    detrkit.train(drawn, out=out, resume=True)
    assert everything(out) == everything(undisturbed[0])


def test_a_dead_worker_is_told(drawn: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    recipe = undisturbed[0] / "recipe.toml"
    process = start(command, ["train", str(drawn), "--out", str(out), "--recipe", str(recipe), "--workers", "1"], said)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not say which processes another one started")
    wait_for(lambda: len(whole_lines(out / "metrics.jsonl")) >= 3, process)
    for worker in children.read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    process.join()
    assert process.exitcode == 2
    assert "detrkit: A process that loads images died or gave no answer; got " in said.read_text()
    assert "use fewer workers" in said.read_text()
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
