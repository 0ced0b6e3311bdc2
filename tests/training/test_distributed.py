"""Two processes that train together, started by torchrun as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.drawing import content, tiny, tiny_recipe, without_times, write_coco

import detrkit
from detrkit.training.distributed import World
from detrkit.training.recipe import to_toml
from detrkit.training.setup import prepare

pytestmark = pytest.mark.usefixtures("plotless")

PROGRAM = """
import json, os, random, signal, sys, warnings
import torch
import detrkit
from detrkit.training import conduct, detection, log, loop
from detrkit.losses.matching import NonFiniteError
from detrkit.training.events import Saved, Skipped, Step
from safetensors.torch import save_file

torch.set_num_threads(1)
data, out, recipe, how = sys.argv[1:]
rank = os.environ["RANK"]
seen, sessions, evaluations = [], [], []
fit, evaluate = loop.fit, detection.evaluate

def kept(session, *args, **options):
    sessions.append(session)
    return fit(session, *args, **options)

def counted(annotations, detections, **options):
    evaluations.append(len(detections))
    if how == "signal in an evaluation":  # the other process waits for the figures
        signal.raise_signal(signal.SIGINT)
    return evaluate(annotations, detections, **options)

conduct.fit, detection.evaluate, log.plot_history = kept, counted, lambda lines, out: out
def listen(event):
    seen.append(event.message if isinstance(event, Skipped) else type(event).__name__)
    if how == "stop" and isinstance(event, Saved):
        raise KeyboardInterrupt
    if how == "signal" and isinstance(event, Step) and event.step == 3:
        signal.raise_signal(signal.SIGINT)

def spoilt(self, *args):
    losses = real(self, *args)
    calls.append(losses)
    if how == "spoil" and rank == "1" and len(calls) == 3:
        raise NonFiniteError(["spoilt.png"], ["a box"])
    return losses

real, calls = detection.DetectionSession.losses, []
detection.DetectionSession.losses = spoilt

before = random.getstate()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    run = detrkit.train(data, out=out, on_event=listen, recipe=recipe, resume=how == "resume")
report = {
    "events": seen,
    "evaluations": evaluations,
    "figures": run.figures,
    "kept_python_random": random.getstate() == before,
}
weights = {name: tensor.contiguous() for name, tensor in sessions[0].model.state_dict().items()}
save_file(weights, f"{out}.{rank}.safetensors")
with open(f"{out}.{rank}.json", "w") as file:
    json.dump(report, file)
"""


def torchrun(tmp_path: Path, data: Path, out: Path, fields: dict[str, Any], how: str = "train") -> list[dict[str, Any]]:
    """Train with two processes, and what each of them says.

    They `stop` after the first checkpoint, or by a `signal` that one of them gets in mid-epoch or in an evaluation; or
    they `resume`; or in one of them something is not finite (`spoil`).
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_recipe(**fields)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(program), str(data), str(out), str(recipe), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=220,
    )
    if how.startswith(("stop", "signal")):
        return []
    reports = [out.with_name(f"{out.name}.{rank}.json") for rank in range(2)]
    # The files count and not the exit code: on a busy machine gloo sometimes aborts when all is done.
    assert all(report.exists() for report in reports), done.stderr[-4000:]
    return [json.loads(report.read_text()) for report in reports]


def weights_of(out: Path, rank: int) -> dict[str, torch.Tensor]:
    return load_file(out.with_name(f"{out.name}.{rank}.safetensors"))


STILL: dict[str, Any] = {
    # One process and two pad alike only where images are of one size.
    "crop": 0.0,
    "multi_scale": False,
    "architecture": {"dropout": "0.0"},
    "lr": 1e-4,
    "backbone_lr": 1e-4,
}


@pytest.mark.timeout(240)
def test_two_processes_train_as_one_does_on_the_same_global_batch(tmp_path: Path) -> None:
    """Each image holds two boxes: class weights and box counts are then the same in every part of a batch."""
    data = write_coco(tmp_path / "data", {"train": [2] * 20, "val": [2, 1, 3]}, sizes=[(64, 64)])
    two, one = tmp_path / "two", tmp_path / "one"
    reports = torchrun(tmp_path, data, two, {"batch_size": 1, "accumulate": 2, **STILL})
    single = detrkit.train(data, out=one, **tiny(batch_size=4, **STILL))
    first, second = weights_of(two, 0), weights_of(two, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = load_file(one / "checkpoints" / "last" / "model.safetensors")
    start = load_start(data, tmp_path)
    assert max(float((first[name] - last[name]).abs().max()) for name in last) < 1e-5
    assert max(float((start[name] - last[name]).abs().max()) for name in last) > 5e-4  # ten steps of 1e-4
    for ours, theirs in zip(without_times(two), without_times(one), strict=True):
        assert ours["step"] == theirs["step"]
        if ours["event"] == "step":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert reports[0]["evaluations"] == [3, 3]  # the whole split, once for each epoch
    assert reports[1]["evaluations"] == []
    assert reports[0]["figures"] == reports[1]["figures"]
    assert reports[0]["figures"].keys() == single.figures.keys()
    assert reports[0]["events"].count("Step") == 10
    assert reports[1]["events"] == []  # one process speaks
    assert [report["kept_python_random"] for report in reports] == [True, True]
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert json.loads((two / "status.json").read_text())["state"] == "finished"


def load_start(data: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    return prepare(tiny_recipe(batch_size=2, **STILL), data, World()).model.state_dict()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_process_without_boxes_does_not_hold_up_the_other(tmp_path: Path) -> None:
    """Most batches are without boxes in one process at least; also EMA, accumulation, dropout and unequal sizes."""
    data = write_coco(tmp_path / "data", {"train": [0, 0, 0, 0, 0, 0, 3, 0], "val": [2, 1, 3]})
    out = tmp_path / "run"
    reports = torchrun(tmp_path, data, out, {"epochs": 3, "batch_size": 1, "ema": 0.9, "accumulate": 2})
    first, second = weights_of(out, 0), weights_of(out, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert reports[0]["events"].count("Step") == 6
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first.values())


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_two_processes_resume_exactly(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [2, 1, 3, 1, 2, 2, 1, 1], "val": [2, 1, 3]})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    torchrun(tmp_path, data, whole, {"ema": 0.9})
    torchrun(tmp_path, data, stopped, {"ema": 0.9}, "stop")
    assert json.loads((stopped / "status.json").read_text())["state"] == "interrupted"
    reports = torchrun(tmp_path, data, stopped, {"ema": 0.9}, "resume")
    assert reports[0]["events"].count("Step") == 2  # of four
    assert content(stopped / "checkpoints" / "last") == content(whole / "checkpoints" / "last")
    assert without_times(stopped) == without_times(whole)


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("how", ["signal", "signal in an evaluation"])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path, how: str) -> None:
    data = write_coco(tmp_path / "data", {"train": [2, 1, 3, 1, 2, 2, 1, 1], "val": [2, 1, 3]})
    whole, stopped, fields = tmp_path / "whole", tmp_path / "stopped", {"ema": 0.9, "log_every": 1}
    torchrun(tmp_path, data, whole, fields)
    torchrun(tmp_path, data, stopped, fields, how)
    status = json.loads((stopped / "status.json").read_text())
    assert (status["state"], status["step"], status["saved"]) == ("interrupted", 3, 3)
    reports = torchrun(tmp_path, data, stopped, fields, "resume")
    assert reports[0]["events"].count("Step") == 1  # of four
    assert content(stopped / "checkpoints" / "last") == content(whole / "checkpoints" / "last")
    assert without_times(stopped) == without_times(whole)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_is_not_finite_in_one_process_is_skipped_in_both(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [2, 1, 3, 1, 2, 2, 1, 1], "val": [2, 1, 3]})
    reports = torchrun(tmp_path, data, tmp_path / "run", {"ema": 0.9}, "spoil")
    (message,) = [event for event in reports[0]["events"] if event.startswith("Step ")]
    assert message == "Step 3 was skipped: an annotated box makes the loss NaN or infinite: a box"
    assert reports[0]["events"].count("Step") == 3
    first, second = weights_of(tmp_path / "run", 0), weights_of(tmp_path / "run", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_alone_needs_no_others() -> None:
    world = World()
    value = torch.tensor(3.0)
    assert world.is_main
    assert float(world.mean(value)) == 3.0
    assert [world.any(flag, torch.device("cpu")) for flag in (False, True)] == [False, True]
    assert world.gather("x") == ["x"]
    assert world.share("y") == "y"
    assert world.wrap(module := torch.nn.Linear(1, 1), torch.device("cpu")) is module


def test_the_items_of_all_processes_are_all_items() -> None:
    items = list(range(7))
    parts = [World(rank, 3).share_of(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
