"""Signals, damage, full disks and losses that are no numbers: what is saved stays saved, and nothing is silent."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training.drawing import tiny, without_times
from training.test_resume import HARD
from training.test_resume import everything as everything_of_a_detector
from training.toys import ToyBatch, ToyRecipe, ToySession, everything, session_of, train

import detrkit
from detrkit.errors import Error, ModelError
from detrkit.losses.matching import NonFiniteError
from detrkit.training import interruption, recovery
from detrkit.training.conduct import conduct
from detrkit.training.distributed import World
from detrkit.training.events import Event, Saved, Skipped, Started, Step, Stopped, Warned, WentBack
from detrkit.training.guard import Guard
from detrkit.training.recipe import revise
from detrkit.training.recovery import Checkpoints, Position

pytestmark = pytest.mark.usefixtures("plotless")

FULL = Path("/dev/full")
RECIPE = revise(ToyRecipe(), {"log_every": 1, "save_every": 2, "epochs": 4})  # three steps an epoch


def kinds(events: list[Event], *wanted: type) -> list[Event]:
    return [event for event in events if isinstance(event, wanted)]


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def signal_at(step: int, number: int, events: list[Event] | None = None) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if events is not None:
            events.append(event)
        if isinstance(event, Step | Skipped) and event.step == step:
            signal.raise_signal(number)

    return listen


@pytest.fixture
def sigterm_interrupts() -> Any:
    """As the command line has it: SIGTERM is an interruption."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        train(tmp_path_factory.mktemp("whole") / "run", RECIPE)
    return tmp_path_factory.getbasetemp() / next(tmp_path_factory.getbasetemp().glob("whole*")) / "run"


@pytest.mark.parametrize("step", [2, 3, 6, 11, 12])
def test_a_signal_ends_a_training_after_its_step_and_nothing_is_lost(
    whole: Path, tmp_path: Path, sigterm_interrupts: None, step: int
) -> None:
    """Inside an epoch, at its end with and without a checkpoint in the recipe, and after the last step of all."""
    out, events = tmp_path / "run", list[Event]()
    with pytest.raises(KeyboardInterrupt, match="terminated"):
        train(out, RECIPE, on_event=signal_at(step, signal.SIGTERM, events))
    assert [type(event) for event in events[-3:]] == [Step, Saved, Stopped]
    assert events[-1] == Stopped(step, "interrupted")
    assert (status_of(out)["state"], status_of(out)["step"], status_of(out)["saved"]) == ("interrupted", step, step)
    again: list[Event] = []
    train(out, RECIPE, resume=True, on_event=again.append)
    assert [event.step for event in kinds(again, Started)] == [step]
    assert [event.step for event in kinds(again, Step)] == list(range(step + 1, 13))
    assert everything(out) == everything(whole)
    assert not (out / "checkpoints" / "within").exists()


def test_ctrl_c_does_the_same(whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", RECIPE, on_event=signal_at(4, signal.SIGINT))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert status_of(tmp_path / "run")["saved"] == 4


def test_a_detector_goes_on_in_mid_epoch(drawn: Path, tmp_path: Path) -> None:
    """Order, augmentation, dropout, accumulation, average and schedule; and the scaler of fp16."""
    for name, fields in {"hard": {**HARD, "epochs": 2}, "fp16": {"precision": "fp16", "workers": 1}}.items():
        fields = tiny(**{**fields, "log_every": 1})
        step = 3 if name == "hard" else 7
        detrkit.train(drawn, out=tmp_path / name, **fields)
        with pytest.raises(KeyboardInterrupt):
            detrkit.train(drawn, out=tmp_path / "run", on_event=signal_at(step, signal.SIGINT), **fields)
        assert (tmp_path / "run" / "checkpoints" / "within").is_dir()
        detrkit.train(drawn, out=tmp_path / "run", resume=True)
        assert everything_of_a_detector(tmp_path / "run") == everything_of_a_detector(tmp_path / name)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_in_an_evaluation_ends_it_at_once(whole: Path, tmp_path: Path, epoch: int) -> None:
    """After the epoch 2 the recipe has a checkpoint, which is there already; after the first one it is made now."""
    out, came = tmp_path / "run", []

    def interrupt(out: Path, now: int) -> None:
        if now == epoch and not came:
            came.append(now)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the evaluation went on")

    with pytest.raises(KeyboardInterrupt):
        train(out, RECIPE, on_evaluation=interrupt)
    assert status_of(out)["state"] == "interrupted"
    again: list[Event] = []
    train(out, RECIPE, resume=True, on_event=again.append)
    assert kinds(again, Started) == [Started(3 * epoch, 12, 3, ("Start from nothing",), pending=True)]
    assert everything(out) == everything(whole)


class Pair(World):
    """Two processes, of which the other does the same."""

    def sum(self, value: Tensor) -> Tensor:
        return value * 2

    def share(self, value: Any) -> Any:
        return value

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model


def test_a_signal_in_an_evaluation_of_several_processes_lets_it_finish(tmp_path: Path) -> None:
    """None may leave where another waits for it; the step after it is the last."""
    evaluated: list[int] = []

    def interrupt(out: Path, epoch: int) -> None:
        signal.raise_signal(signal.SIGINT)
        evaluated.append(epoch)

    recipe = revise(ToyRecipe(), {"save_every": 2, "epochs": 4, "batch_size": 1})
    with pytest.raises(KeyboardInterrupt):
        conduct(
            recipe,
            lambda world, came_from: session_of(recipe, Pair(size=2), came_from, on_evaluation=interrupt),
            tmp_path / "run",
            "toys",
        )
    assert evaluated == [1]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"], status["saved"]) == ("interrupted", 4, 4)


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append(event.step)

    with pytest.raises(KeyboardInterrupt):  # who starts several processes passes the terminal's signal on: one, not two
        train(tmp_path / "once", RECIPE, on_event=listen)
    assert (reached, status_of(tmp_path / "once")["saved"]) == ([5], 5)
    reached.clear()
    monkeypatch.setattr(interruption, "SAME_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", RECIPE, on_event=listen)
    assert reached == []
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"], status["saved"]) == ("interrupted", 5, 0)


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """As a shell has it for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(tmp_path / "run", RECIPE, on_event=signal_at(2, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status_of(tmp_path / "run")["state"] == "finished"


def test_the_clock_saves_inside_an_epoch_and_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, events = revise(RECIPE, {"save_minutes": 1e-9}), tmp_path / "run", list[Event]()
    monkeypatch.setattr(recovery, "LARGEST_SHARE", math.inf)
    train(out, recipe, on_event=events.append)
    assert [(event.step, event.path.name) for event in kinds(events, Saved)] == [
        *((1, "within"), (2, "within"), (3, "within"), (4, "within"), (5, "within"), (6, "last")),
        *((7, "within"), (8, "within"), (9, "within"), (10, "within"), (11, "within"), (12, "last")),
    ]
    assert everything(out) == everything(whole)


def test_a_checkpoint_is_due_by_the_minutes_but_takes_no_large_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]

    def write(session: ToySession, folder: Path, state: Any) -> None:
        now[0] += 10

    monkeypatch.setattr(ToySession, "save_training", write)
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def due_after(checkpoints: Checkpoints) -> float:
        start = now[0]
        while not checkpoints.is_due and now[0] < start + 5000:
            now[0] += 10
        return now[0] - start

    def checkpoints_every(minutes: float) -> Checkpoints:
        session = session_of(revise(RECIPE, {"save_minutes": minutes}))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return Checkpoints(session, scaler, tmp_path, Guard(session.optimizer, 12))

    checkpoints = checkpoints_every(5.0)
    assert due_after(checkpoints) == 300
    checkpoints.save(Position(7))
    assert due_after(checkpoints) == 1000  # of which the ten seconds are a hundredth
    assert due_after(checkpoints_every(0.0)) == 5000


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.json", "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(whole: Path, tmp_path: Path, name: str) -> None:
    out, events = tmp_path / "run", list[Event]()
    shutil.copytree(whole, out)
    last = out / "checkpoints" / "last"
    spoilt = bytearray((last / name).read_bytes())
    spoilt[len(spoilt) // 2] ^= 255
    (last / name).write_bytes(spoilt)
    train(out, RECIPE, resume=True, on_event=events.append)
    (note,) = [note for event in kinds(events, Started) for note in event.notes if "damaged" in note]
    assert note.startswith(f"The checkpoint {last} is damaged and not used: ")
    assert name in note
    assert f"goes on from the one before, {last.with_name('previous')}, at step 12" in note
    assert (out / "checkpoints" / "damaged" / name).read_bytes() == spoilt
    assert everything(out) == everything(whole)


def test_the_newest_sound_checkpoint_is_taken(whole: Path, tmp_path: Path) -> None:
    out, starts = tmp_path / "run", list[int]()
    with pytest.raises(KeyboardInterrupt):
        train(out, RECIPE, on_event=signal_at(8, signal.SIGINT))
    (out / "checkpoints" / "within" / "model.safetensors").write_bytes(b"")
    train(out, RECIPE, resume=True, on_event=lambda e: starts.append(e.step) if isinstance(e, Started) else None)
    assert starts == [6]
    assert everything(out) == everything(whole)


def test_where_all_checkpoints_are_damaged_all_are_named(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints" / "last" / "model.safetensors").write_bytes(b"1")
    (out / "checkpoints" / "previous" / "training.json").unlink()
    with pytest.raises(
        ModelError, match=r"Every checkpoint of the run is damaged; got .*last: model.safetensors"
    ) as caught:
        train(out, RECIPE, resume=True)
    assert "previous: training.json cannot be read" in str(caught.value)
    assert f"--init {out / 'checkpoints' / 'best'}" in str(caught.value)
    assert (out / "checkpoints" / "last").is_dir()


def spoil_picture(number: int) -> Callable[[ToySession, ToyBatch], None]:
    def spoil(session: ToySession, batch: ToyBatch) -> None:
        if f"picture {number}" in batch.names:
            raise NonFiniteError([f"picture {number}"], [f"box 1 of 1 in picture {number}: cx, cy, w, h = nan"])

    return spoil


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(tmp_path: Path) -> None:
    events: list[Event] = []
    train(tmp_path / "whole", RECIPE, on_event=events.append, on_losses=spoil_picture(4))
    skipped = kinds(events, Skipped)
    assert [event.skipped for event in skipped] == [1, 2, 3, 4]  # each epoch shows the picture once
    assert len(kinds(events, Step)) == 8
    assert "Step 1" in skipped[0].message or "skipped: an annotated box" in skipped[0].message
    assert all(event.images == ("picture 4",) and "box 1 of 1 in picture 4" in event.message for event in skipped)
    lines = [line for line in without_times(tmp_path / "whole") if line["event"] == "skipped"]
    assert [line["step"] for line in lines] == [event.step for event in skipped]
    assert status_of(tmp_path / "whole")["skipped"] == 4
    for step in (skipped[0].step, skipped[1].step, 12):  # also where the last step before was skipped
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", RECIPE, on_event=signal_at(step, signal.SIGINT), on_losses=spoil_picture(4))
        train(tmp_path / "run", RECIPE, resume=True, on_losses=spoil_picture(4))
        assert everything(tmp_path / "run") == everything(tmp_path / "whole")
        assert status_of(tmp_path / "run")["skipped"] == 4
        shutil.rmtree(tmp_path / "run")


def test_a_gradient_that_is_not_finite_is_skipped_before_it_reaches_anything(tmp_path: Path) -> None:
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def spoil(session: ToySession, batch: ToyBatch) -> None:
        state = session.optimizer.state_dict()["state"]
        weights = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
        weights |= {f"average {name}": tensor.clone() for name, tensor in session.average.tensors().items()}
        kept.append((weights, {key: float(entry["step"]) for key, entry in state.items()}))
        if len(kept) == 2:
            batch.images[0, 0, 0, 0] = math.nan

    events: list[Event] = []
    train(tmp_path / "run", RECIPE, on_event=events.append, on_losses=spoil)
    (skipped,) = kinds(events, Skipped)
    assert (skipped.step, len(skipped.images), skipped.boxes) == (2, 2, ())
    assert "was NaN or infinite on picture" in skipped.message
    assert all(torch.equal(tensor, kept[1][0][name]) for name, tensor in kept[2][0].items())
    assert kept[1][1] == kept[2][1]


def test_without_a_limit_the_first_such_step_ends_the_run(tmp_path: Path) -> None:
    seen: list[ToyBatch] = []

    def spoil(session: ToySession, batch: ToyBatch) -> None:
        seen.append(batch)
        if len(seen) == 8:
            raise NonFiniteError(batch.names)

    events: list[Event] = []
    with pytest.raises(NonFiniteError, match=r"; got step 8\. Lower"):
        train(tmp_path / "run", revise(RECIPE, {"skip_limit": 0}), on_event=events.append, on_losses=spoil)
    assert len(seen) == 8
    assert not kinds(events, WentBack)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["saved"]) == ("failed", 6)  # there is a checkpoint, and it is left alone


def test_without_a_checkpoint_a_row_of_them_ends_the_run(tmp_path: Path) -> None:
    def spoil(session: ToySession, batch: ToyBatch) -> None:
        raise NonFiniteError(batch.names)

    with pytest.raises(NonFiniteError, match=r"picture \d, picture \d: .*got 3 steps in a row, up to step 3\. Lower"):
        train(tmp_path / "run", RECIPE, on_losses=spoil)


def fragile(session: ToySession, batch: ToyBatch) -> None:
    """Breaks from the eighth step on where the rate is above a third of the recipe's."""
    state = session.optimizer.state_dict()["state"]
    done = max((float(entry["step"]) for entry in state.values()), default=0.0)
    if done >= 7 and session.optimizer.param_groups[0]["lr"] > 0.034:
        raise NonFiniteError(batch.names)


FRAGILE = revise(RECIPE, {"skip_limit": 2, "schedule": "constant", "epochs": 6})


@pytest.fixture(scope="module")
def rescued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    out, events = tmp_path_factory.mktemp("rescued") / "run", list[Event]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        train(out, FRAGILE, on_event=events.append, on_losses=fragile)
    return out, events


def test_after_a_row_of_them_the_run_goes_back_at_lower_rates(rescued: tuple[Path, list[Event]]) -> None:
    out, events = rescued
    assert kinds(events, WentBack) == [WentBack(6, 9, 0.5, 1, 2), WentBack(6, 9, 0.25, 2, 4)]
    assert (
        "After step 9 the training went back to its checkpoint of step 6 and goes on at 0.5 of"
        in kinds(events, WentBack)[0].message
    )
    steps = [(event.step, event.lr) for event in kinds(events, Step)]
    assert [step for step, _ in steps] == [*range(1, 8), 7, *range(7, 19)]
    assert steps[7][1] == pytest.approx(0.05)
    assert {round(rate, 6) for _, rate in steps[8:]} == {0.025}
    lines = without_times(out)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [(line["rate"], line["skipped"]) for line in lines if line["event"] == "went back"] == [(0.5, 2), (0.25, 4)]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 19))


@pytest.mark.parametrize("number", [9, 11, 14, 20])
def test_a_run_that_went_back_can_be_killed_and_goes_on(
    rescued: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also where the clock saved meanwhile: where a run goes back to must not depend on it."""
    monkeypatch.setattr(recovery, "LARGEST_SHARE", math.inf)
    recipe, out, count = revise(FRAGILE, {"save_minutes": 1e-9}), tmp_path / "run", [0]

    def stop(event: Event) -> None:
        count[0] += isinstance(event, Step | Skipped)
        if count[0] == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(out, recipe, on_event=stop, on_losses=fragile)
    train(out, recipe, resume=True, on_losses=fragile)
    assert everything(out) == everything(rescued[0])


def test_a_run_that_cannot_be_rescued_is_given_up(tmp_path: Path) -> None:
    def hopeless(session: ToySession, batch: ToyBatch) -> None:
        if session.optimizer.state_dict()["state"] and next(
            float(entry["step"]) >= 7 for entry in session.optimizer.state_dict()["state"].values()
        ):
            raise NonFiniteError(batch.names)

    with pytest.raises(
        NonFiniteError, match=r"got 2 steps in a row, up to step 9, although the rates were halved 5 times"
    ):
        train(tmp_path / "run", FRAGILE, on_losses=hopeless)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_costs_pictures_but_not_the_training(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, events = tmp_path / "run", list[Event]()

    def plot(lines: Any, file: Path) -> None:
        file.write_bytes(b"a plot")

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Started):
            (out / "samples").mkdir()
            (out / "plots").mkdir()
            (out / "samples" / "epoch-0001.jpg").symlink_to(FULL)
            (out / "plots" / "history.png").symlink_to(FULL)
        elif isinstance(event, Step) and event.step == 6:
            (out / "plots" / "history.png").unlink()

    monkeypatch.setattr("detrkit.training.log.plot_history", plot)
    detrkit.train(drawn, out=out, on_event=listen, **tiny())
    (told, cleared) = kinds(events, Warned)
    assert (told.cleared, cleared.cleared) == (False, True)
    assert "Plots cannot be written: [Errno 28] No space left on device" in told.message
    notes = [note for event in events for note in getattr(event, "notes", ()) if "Pictures" in note]
    assert len(notes) == 1
    assert "No space left on device" in notes[0]
    assert (out / "samples" / "epoch-0002.jpg").is_file()
    assert status_of(out)["alarms"] == []


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("name", ["metrics.jsonl", ".status.json.new"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"

    def fill(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 6:
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to(FULL)

    with pytest.raises(
        Error, match=r"(metrics\.jsonl|status\.json): The file cannot be written; got .*No space left.*Make room"
    ):
        train(out, RECIPE, on_event=fill)
    (out / name).unlink(missing_ok=True)
    starts: list[int] = []
    train(out, RECIPE, resume=True, on_event=lambda e: starts.append(e.step) if isinstance(e, Started) else None)
    assert starts == [6]


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(whole: Path, tmp_path: Path) -> None:
    def full(session: ToySession, folder: Path, state: Any) -> None:
        raise Error("The folder cannot be written", where=folder, remedy="Make room on the disk.")

    with pytest.MonkeyPatch.context() as patch:

        def fill(event: Event) -> None:
            if isinstance(event, Step) and event.step == 11:
                patch.setattr(ToySession, "save_training", full)

        with pytest.raises(Error, match="last: The folder cannot be written"):
            train(tmp_path / "run", RECIPE, on_event=fill)
    train(tmp_path / "run", RECIPE, resume=True)
    assert everything(tmp_path / "run")["checkpoints/last"] == everything(whole)["checkpoints/last"]


def test_a_checkpoint_of_an_earlier_version_is_read(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    last = out / "checkpoints" / "last"
    (last / "checksums.json").unlink()
    told = json.loads((last / "training.json").read_text())
    for name in ("skipped", "in_row", "rate", "returns"):
        del told["position"][name]
    (last / "training.json").write_text(json.dumps(told))
    train(out, RECIPE, resume=True)
    assert status_of(out)["state"] == "finished"
