"""What is shown during a training."""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from detrkit.cli._progress import LiveProgress, Pace, PlainProgress, how_to_go_on, training_progress
from detrkit.cli._terminal import Terminal
from detrkit.evaluation.run import Metrics
from detrkit.training.events import Evaluated, Preparing, Saved, Skipped, Started, Step, Stopped, Warned, WentBack


def step(number, loss=2.0, replaced=()):
    terms = {"class": 0.5, "l1": 0.25, "giou": 1.0}
    return Step(number, number / 10, loss, terms, 0.5, 1e-4, 3.0, 2.0, 0.5, 8, replaced)


def evaluated(epoch, ap=0.25, best=True):
    figures = {"AP": ap, "AP50": 0.5, "AP75": float("nan")}
    empty = np.zeros((1, 101))
    metrics = Metrics(figures, (), empty[0], empty, np.zeros((2, 2), np.int64), 0.5, 2, 3)
    return Evaluated(int(epoch * 10), epoch, figures, tuple(figures), 65.0, best, metrics)


STARTED = Started(0, 100, 10, ("a note",))


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_pace_is_a_mean_over_the_last_steps(clock):
    pace = Pace(Terminal(clock=clock))
    pace.start(STARTED)
    assert pace.figures() == []
    for number in range(1, 101):
        pace.add(step(number, loss=float(number)))
    assert pace.figures() == [
        *("loss 75.500", "class 0.500", "l1 0.250", "giou 1.000", "class error 50%", "lr 0.0001"),
        *("4.0 images/s", "waiting 25%"),
    ]
    assert pace.epochs == 10


def test_time_left_counts_from_where_a_run_went_on(clock):
    pace = Pace(Terminal(clock=clock))
    pace.start(Started(60, 100, 10, ()))
    assert pace.left == 0
    clock.now = 30.0
    pace.add(step(70))
    assert pace.left == 90


def test_plain_lines(capsys, clock):
    show = PlainProgress(Terminal(clock=clock))
    show(STARTED)
    for number in range(1, 4):
        clock.now = number * 11.0
        show(step(number, replaced=("bad.jpg",) if number == 3 else ()))
    show(evaluated(1.0))
    show(evaluated(2.0, ap=0.125, best=False))
    show(Saved(20, Path("last")))
    show(Stopped(20, "finished"))
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "a note",
        "Training for 100 steps, 10 an epoch",
        "epoch 0.20 of 10, step 2 of 100, 17:58 min left, loss 2.000, class 0.500, l1 0.250, giou 1.000, "
        "class error 50%, lr 0.0001, 4.0 images/s, waiting 25%",
        "Another image stands in for one that cannot be read: bad.jpg",
        "epoch 1 evaluated in 1:05 min: AP 0.250, AP50 0.500, AP75 –, best so far",
        "epoch 2 evaluated in 1:05 min: AP 0.125, AP50 0.500, AP75 –",
    ]


def test_an_image_that_cannot_be_read_is_named_once(capsys, clock):
    show = PlainProgress(Terminal(clock=clock))
    show(STARTED)
    for number, replaced in ((1, ("a.jpg",)), (2, ("b.jpg | a.jpg", "a.jpg")), (3, ("b.jpg",))):
        show(step(number, replaced=replaced))
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert [line.rpartition(": ")[2] for line in said] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("live", [False, True])
def test_a_figure_that_could_not_be_told_is_a_dash(capsys, clock, live):
    event = dataclasses.replace(evaluated(1.0), headline=("AP", "ece"))
    terminal = live_terminal(clock)
    with (
        LiveProgress(terminal, evaluate_every=1) if live else nullcontext(PlainProgress(Terminal(clock=clock))) as show
    ):
        show(STARTED)
        show(event)
    text = terminal.console.file.getvalue() if live else capsys.readouterr().err
    assert "0.250       –" in text if live else "AP 0.250, ece –" in text


TROUBLE = (
    Skipped(4, ("a.jpg", "b.jpg"), (), 2, 3),
    WentBack(10, 14, 0.5, 1, 5),
    Warned(50, "boxes", "Boxes are odd", "Look at them."),
    Warned(100, "boxes", "No longer so: boxes", cleared=True),
)
TROUBLE_LINES = [
    "Step 4 was skipped (2 in a row): the loss or its gradient was NaN or infinite on a.jpg, b.jpg",
    "After step 14 the training went back to its checkpoint of step 10 and goes on at 0.5 of the recipe's learning "
    "rates, because step after step was NaN or infinite",
    "Warning, step 50: Boxes are odd. Look at them.",
    "No longer so: boxes",
]


def test_trouble_is_told_on_both_views(capsys, clock):
    show = PlainProgress(Terminal(clock=clock))
    for event in TROUBLE:
        show(event)
    assert capsys.readouterr().err.splitlines() == TROUBLE_LINES
    terminal = live_terminal(clock)
    with LiveProgress(terminal, evaluate_every=1) as live:
        for event in TROUBLE:
            live(event)
    shown = " ".join(terminal.console.file.getvalue().split())
    assert all(line in shown for line in TROUBLE_LINES)


def test_how_a_run_goes_on(tmp_path):
    assert how_to_go_on(tmp_path, "detrkit train") == (
        "Interrupted before the first checkpoint; there is nothing to go on from."
    )
    (tmp_path / "checkpoints" / "within").mkdir(parents=True)
    assert how_to_go_on(tmp_path, "again") == "Interrupted. Go on from the last checkpoint with: again"
    status = {"step": 1200, "saved": 1200, "total_steps": 9000}
    (tmp_path / "status.json").write_text(json.dumps(status))
    said = "Stopped after step 1,200 of 9,000, and saved: nothing is lost. Go on with: again"
    assert how_to_go_on(tmp_path, "again") == said
    (tmp_path / "status.json").write_text(json.dumps({**status, "saved": 1000}))
    said = "Interrupted at step 1,200 of 9,000. Go on from the checkpoint of step 1,000 with: again"
    assert how_to_go_on(tmp_path, "again") == said


def live_terminal(clock):
    terminal = Terminal(clock=clock)
    terminal._console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    return terminal


def test_the_live_view(clock):
    terminal = live_terminal(clock)
    shown = terminal.console.file
    assert isinstance(shown, io.StringIO)
    with LiveProgress(terminal, evaluate_every=1) as show:
        show(STARTED)
        clock.now = 5.0
        show(step(5, replaced=("bad[0].jpg",)))
        with terminal.console.capture() as view:
            terminal.console.print(show._render())
        for number in (9, 10):
            show(step(number))
        with terminal.console.capture() as later:
            terminal.console.print(show._render())
        show(evaluated(1.0))
        show(evaluated(2.0, best=False))
    assert "epoch 1/10" in view.get()
    assert "step 5/100 · 1:35 min left" in view.get()
    assert "loss 2.000 · class 0.500 · l1 0.250" in view.get()
    assert "evaluating" not in view.get()
    assert "epoch 1/10 evaluating" in later.get()
    text = shown.getvalue()
    assert "a note" in text
    assert "cannot be read: bad[0].jpg" in text
    assert text.count("AP50") == 1
    assert "       1   0.250   0.500       –   1:05 min  ★ best so far" in text
    assert text.count("★") == 1


@pytest.mark.parametrize(("tty", "variables", "live"), [
    (True, {}, True),
    (False, {}, False),
    (True, {"CI": "1"}, False),
    (True, {"TERM": "dumb"}, False),
    (True, {"RANK": "1"}, False),
])  # fmt: skip
def test_which_view(monkeypatch, tty, variables, live):
    for name in ("CI", "TERM", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    terminal.err = SimpleNamespace(isatty=lambda: tty, write=lambda text: None, flush=lambda: None)
    with training_progress(terminal, 1) as show:
        assert isinstance(show, LiveProgress if live else PlainProgress)


def test_what_is_done_once_is_told_now_and_then(capsys, clock):
    show = PlainProgress(Terminal(clock=clock))
    for done in range(1, 1501):
        clock.now = done / 16
        show(Preparing(done, 1500))
    show(STARTED)
    said = "Every image goes through the backbone once"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{said}: {done} of 1,500" for done in ("320", "640", "960", "1,280", "1,500")] + lines[5:]
    assert lines[5:] == ["a note", "Training for 100 steps, 10 an epoch"]


def test_the_live_view_counts_what_is_done_once(clock):
    terminal = live_terminal(clock)
    with LiveProgress(terminal, evaluate_every=1) as show:
        show(Preparing(3, 1200))
        (before,) = show._bar.tasks
        assert (before.description, before.completed, before.total) == (
            "Every image goes through the backbone once: 3 of 1,200", 3, 1200,
        )  # fmt: skip
        show(STARTED)
        assert (before.description, before.completed, before.total) == ("starting", 0, 100)


def test_another_task_shows_its_own_figures(capsys, clock):
    found = Evaluated(10, 1.0, {"same patch": 0.75, "IoU": 0.5, "loss": 9.0}, ("same patch", "IoU"), 5.0, True)
    plain = step(1)
    no_classes = dataclasses.replace(plain, terms={"contrast": 1.5}, class_error=float("nan"))
    show = PlainProgress(Terminal(clock=clock))
    show(STARTED)
    clock.now = 31.0
    show(no_classes)
    show(found)
    lines = capsys.readouterr().err.splitlines()
    assert "contrast 1.500, lr 0.0001" in lines[-2]
    assert lines[-1] == "epoch 1 evaluated in 5 s: same patch 0.750, IoU 0.500, best so far"
    terminal = live_terminal(clock)
    with LiveProgress(terminal, evaluate_every=1) as live:
        live(STARTED)
        live(found)
    text = terminal.console.file.getvalue()
    assert "   epoch  same patch     IoU       time\n" in text
    assert "       1       0.750   0.500        5 s  ★ best so far\n" in text
