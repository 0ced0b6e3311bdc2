"""A run that was stopped and goes on is, to the last bit, the run that was not stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.drawing import content, tiny, tiny_recipe, without_times, write_coco

import detrkit
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.training.distributed import World
from detrkit.training.events import Event, Saved, Started, Step
from detrkit.training.log import RunFolder
from detrkit.training.loop import fit
from detrkit.training.setup import prepare
from detrkit.whole import CHECKSUMS

pytestmark = pytest.mark.usefixtures("plotless")

HARD: dict[str, Any] = {
    "epochs": 3,
    "accumulate": 2,
    "ema": 0.9,
    "schedule": "cosine",
    "warmup": 2,
    "log_every": 3,  # not a divisor of the epoch's two steps
    "photometric": 0.5,
    "architecture": {"dropout": "0.3"},
}


def stop_when(condition: Callable[[Event], bool]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if condition(event):
            raise KeyboardInterrupt

    return listen


def after_save(event: Event) -> bool:
    return isinstance(event, Saved)


def in_the_second_epoch(event: Event) -> bool:
    return isinstance(event, Step) and event.step == 3


def everything(run: Path) -> dict[str, Any]:
    """All that must not depend on an interruption."""
    return {
        "lines": without_times(run),
        "last": content(run / "checkpoints" / "last"),
        "best": content(run / "checkpoints" / "best"),
        "model": content(run / "model"),
        "samples": content(run / "samples"),
    }


@pytest.mark.parametrize(
    ("fields", "condition"),
    [
        (HARD, after_save),
        ({**HARD, "epochs": 2, "precision": "bf16", "schedule": "step", "channels_last": False}, in_the_second_epoch),
        ({"precision": "fp16", "workers": 1, "backbone_lr": 0.0, "limit": 6}, after_save),
    ],
    ids=["fp32-ema-accumulated", "bf16-in-mid-epoch", "fp16-workers-frozen"],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    drawn: Path, tmp_path: Path, fields: dict[str, Any], condition: Callable[[Event], bool]
) -> None:
    fields = tiny(**fields)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps: dict[int, float] = {}
    again: list[tuple[int, float]] = []
    detrkit.train(
        drawn, out=whole, on_event=lambda e: steps.update({e.step: e.loss}) if isinstance(e, Step) else None, **fields
    )
    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=stopped, on_event=stop_when(condition), **fields)
    assert json.loads((stopped / "status.json").read_text())["state"] == "interrupted"
    resumed = detrkit.train(
        drawn,
        out=stopped,
        resume=True,
        on_event=lambda e: again.append((e.step, e.loss)) if isinstance(e, Step) else None,
    )
    assert len(again) < len(steps)
    assert all(steps[step] == loss for step, loss in again)
    assert everything(stopped) == everything(whole)
    assert resumed.load().about == detrkit.load(whole).about
    assert json.loads((stopped / "status.json").read_text())["state"] == "finished"


def test_a_validation_image_that_cannot_be_read_costs_no_step(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2, 1], "val": [1, 1]})
    whole, out, steps = tmp_path / "whole", tmp_path / "run", []
    detrkit.train(data, out=whole, **tiny(ema=0.9))
    image = data / "val" / "001.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:100])
    with pytest.raises(DataError, match=r"001\.png"):
        detrkit.train(data, out=out, **tiny(ema=0.9))
    image.write_bytes(intact)
    detrkit.train(data, out=out, resume=True, on_event=lambda e: steps.append(e.step) if isinstance(e, Step) else None)
    assert steps == [2]
    assert everything(out) == everything(whole)


def test_an_abandoned_iterator_leaves_a_run_that_goes_on(drawn: Path, tmp_path: Path) -> None:
    recipe, out = tiny_recipe(**{**HARD, "epochs": 2}), tmp_path / "run"

    def run(stop: bool, resume: bool) -> dict[str, torch.Tensor]:
        session = prepare(recipe, drawn, World())
        keep = RunFolder(out, session, str(drawn))
        for event in fit(session, out, resume=resume):
            keep(event)
            if stop and isinstance(event, Saved):
                break
        return {name: tensor.clone() for name, tensor in session.model.state_dict().items()}

    run(stop=True, resume=False)
    for _ in range(2):  # the second time there is nothing left to do
        resumed = run(stop=False, resume=True)
    out = tmp_path / "whole"
    whole = run(stop=False, resume=False)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_line_that_was_cut_off_is_dropped(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=out, on_event=stop_when(after_save), **tiny(limit=2))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    detrkit.train(drawn, out=out, resume=True)
    steps = [line["step"] for line in without_times(out)]
    assert steps == sorted(steps)


SHORT = tiny(epochs=1, ema=0.9)


@pytest.fixture(scope="module")
def finished(plotless: None, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    detrkit.train(drawn, out=out, **SHORT)
    return out


def test_a_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(
    drawn: Path, finished: Path, tmp_path: Path
) -> None:
    out, notes = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=out, on_event=stop_when(lambda event: isinstance(event, Step)), **SHORT)

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            notes.extend(event.notes)

    detrkit.train(drawn, out=out, resume=True, on_event=listen)
    assert any("before its first checkpoint" in note for note in notes)
    assert everything(out) == everything(finished)


def test_a_finished_run_has_nothing_left_to_do(drawn: Path, finished: Path) -> None:
    before = everything(finished)
    run = detrkit.train(drawn, out=finished, resume=True)
    assert everything(finished) == before
    assert run.figures["AP"] == detrkit.load(finished).about["metrics"]["AP"]


def test_another_recipe_is_refused_by_its_fields(drawn: Path, finished: Path) -> None:
    with pytest.raises(UsageError, match=r"another recipe; got lr \(0\.001 before\), epochs \(1 before\)|epochs.*lr"):
        detrkit.train(drawn, out=finished, resume=True, lr=5e-4, epochs=9)
    with pytest.raises(
        UsageError, match=r"Leave these fields out: a run goes on with its own recipe\. .* init: "
    ) as caught:
        detrkit.train(drawn, out=finished, resume=True, epochs=9)
    assert "--" not in str(caught.value)
    with pytest.raises(UsageError, match=r"architecture"):
        detrkit.train(drawn, out=finished, resume=True, architecture={"dim": "64"})


def test_what_changes_no_result_may_change(drawn: Path, finished: Path) -> None:
    detrkit.train(drawn, out=finished, resume=True, workers=1, log_every=1)


def test_other_data_is_refused(drawn: Path, finished: Path, tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2], "val": [2, 3, 1]})
    with pytest.raises(DataError, match="begun with other data: its train images"):
        detrkit.train(data, out=finished, resume=True)


def test_there_must_be_a_run_to_go_on_with(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to go on with"):
        detrkit.train(drawn, out=tmp_path / "none", resume=True, **tiny())


def test_damaged_checkpoints_are_named(drawn: Path, finished: Path, tmp_path: Path) -> None:
    for name, text in (
        ("optimizer.safetensors", b"\x00"),
        ("model.safetensors", b""),
        ("training.json", b"[]"),
        ("training.json", b'{"parts": ["../x"], "position": {}}'),
        ("training.json", b'{"parts": ["optimizer"], "position": {"processes": 1}}'),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(finished, out)
        last = out / "checkpoints" / "last"
        (last / name).write_bytes(text)
        shutil.copytree(last, out / "checkpoints" / "previous", dirs_exist_ok=True)
        with pytest.raises(ModelError, match=r"Every checkpoint of the run is damaged.*last: "):
            detrkit.train(drawn, out=out, resume=True)
        (last / CHECKSUMS).unlink()  # as of an earlier version: then it is found by its content
        with pytest.raises(ModelError, match=str(last)):
            detrkit.train(drawn, out=out, resume=True)


def test_another_number_of_processes_is_refused(drawn: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "checkpoints" / "last" / "training.json"
    file.write_text(file.read_text().replace('"processes": 1', '"processes": 2'))
    (file.parent / CHECKSUMS).unlink()  # nobody damaged it
    with pytest.raises(UsageError, match="another number of processes; got 1; expected 2"):
        detrkit.train(drawn, out=out, resume=True)
