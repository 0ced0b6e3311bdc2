"""What a run leaves behind: its folder's files, written as functions of events."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detrkit import __version__
from detrkit.documents import parse_json, read_json
from detrkit.errors import Error, MissingExtraError
from detrkit.training.distributed import processors
from detrkit.training.events import Evaluated, Event, Saved, Skipped, Started, Step, Stopped, Warned, WentBack
from detrkit.training.recipe import to_toml
from detrkit.training.session import Session
from detrkit.visualize import plot_history
from detrkit.whole import append_line, how_to_make_room, standing, write_text_whole, write_whole


class RunFolder:
    """Keeps `recipe.toml`, `environment.json`, `data.json`, `metrics.jsonl`, `status.json`, `plots/` and `model/`.

    Args:
        out: the run folder.
        session: whose run it is.
        data: the path of the data set.
    """

    def __init__(self, out: Path, session: Session[Any], data: str):
        self.out, self.session, self.data = out, session, data
        self._window: list[Step] = []
        self._started, self._before = time.monotonic(), 0.0
        self._step = self._total = self._saved = self._skipped = 0
        self._per_epoch = 1
        self._alarms: dict[str, Warned] = {}
        self._troubles: list[Warned] = []

    def __call__(self, event: Event) -> None:
        """Write down what happened.

        Raises:
            Error: a file cannot be written, as on a full disk. What was written before stands, line by line.
        """
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Step | Skipped):
            self._add(event)
        elif isinstance(event, WentBack):
            self._window.clear()
            self._rewind(event.step)
            self._append("metrics.jsonl", {"event": "went back", **dataclasses.asdict(event)})
            self._status("training", event.step)
        elif isinstance(event, Warned):
            self._append("metrics.jsonl", {"event": "warned", **dataclasses.asdict(event)})
            self._alarms.pop(event.alarm, None) if event.cleared else self._alarms.update({event.alarm: event})
            self._status("training", self._step)
        elif isinstance(event, Saved):
            self._saved = event.step
            self._status("training", event.step)
        elif isinstance(event, Evaluated):
            record = {"event": "evaluated", "step": event.step, "epoch": event.epoch, "best": event.is_best}
            said = {"notes": list(event.notes), "conclusion": event.conclusion}
            told = {name: value for name, value in said.items() if value}
            self._append("metrics.jsonl", {**record, **finite(event.figures), **told})
            self._plot()
        elif isinstance(event, Stopped):
            self._status(event.reason, event.step)
            if event.reason == "finished":
                self._keep_best()
                self._plot()

    def troubles(self) -> list[Warned]:
        """What could not be written since one asked last, of that which is not worth losing a training for."""
        troubles, self._troubles = self._troubles, []
        return troubles

    def broke_off(self, error: BaseException) -> None:
        """Write down that the training ended before its time."""
        if self._total:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError, Error):  # the error itself is what matters
                self._status(state, self._step)

    def _begin(self, event: Started) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._step, self._total, self._per_epoch = event.step, event.total_steps, event.steps_per_epoch
        write_text_whole(self.out / "recipe.toml", f"# data: {json.dumps(self.data)}\n{to_toml(self.session.recipe)}")
        write_text_whole(self.out / "environment.json", json.dumps(environment(self.session), indent=1))
        about = {"path": self.data, **self.session.describe(), "notes": list(event.notes)}
        write_text_whole(self.out / "data.json", json.dumps(about, indent=1))
        self._rewind(event.step, event.pending)
        self._before = _seconds_so_far(self.out / "status.json") if event.step else 0.0
        self._saved, self._skipped = event.step, event.skipped
        self._status("training", event.step)

    def _add(self, event: Step | Skipped) -> None:
        self._step = event.step
        for place in event.replaced:
            self._append("replaced.jsonl", {"step": event.step, "image": place})
        if isinstance(event, Step):
            self._window.append(event)
        # An epoch's end closes the line: a run that goes on from there must write the same lines.
        closes = event.step % self.session.run.log_every == 0 or event.step % self._per_epoch == 0
        if closes and self._window:
            self._append("metrics.jsonl", summarize(self._window))
            self._window.clear()
        if isinstance(event, Skipped):
            self._skipped = event.skipped
            told = {"images": list(event.images), "boxes": list(event.boxes), "in_row": event.in_row}
            self._append("metrics.jsonl", {"event": "skipped", "step": event.step, **told})
        if closes:
            self._status("training", event.step)

    def _rewind(self, step: int, is_pending: bool = False) -> None:
        """Drop lines of steps after the checkpoint that the run goes on from, and of an evaluation that comes again."""
        for name in ("metrics.jsonl", "replaced.jsonl"):
            file = self.out / name
            if file.exists():
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                lines = [line for line in lines if _belongs_before(line, step, is_pending)]
                write_text_whole(file, "".join(f"{line}\n" for line in lines))

    def _append(self, name: str, record: dict[str, Any]) -> None:
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        append_line(self.out / name, json.dumps(known))

    def _status(self, state: str, step: int) -> None:
        status = {
            "state": state,
            "step": step,
            "total_steps": self._total,
            "seconds": round(self._before + time.monotonic() - self._started, 1),
            "saved": self._saved,
            "skipped": self._skipped,
            "alarms": [{"alarm": one.alarm, "message": one.message} for one in self._alarms.values()],
        }
        write_text_whole(self.out / "status.json", json.dumps(status), flush=state != "training")

    def _plot(self) -> None:
        file = self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if not any(line["event"] in ("step", "evaluated") for line in lines):
            return
        plots, name = self.out / "plots", "plots cannot be written"
        try:
            plots.mkdir(exist_ok=True)
            try:
                plot_history(lines, plots / "history.png")
            except MissingExtraError:
                write_text_whole(plots / "README.txt", "Plots need: pip install 'detrkit[plot]'\n")
        except (OSError, Error) as error:
            if name not in self._alarms:
                remedy = how_to_make_room(error) if isinstance(error, OSError) else ""  # an Error says its own
                remedy = f"{remedy} The training goes on without.".lstrip()
                self._troubles.append(Warned(self._step, name, f"Plots cannot be written: {error}", remedy))
        else:
            if name in self._alarms:
                self._troubles.append(Warned(self._step, name, "Plots can be written again", cleared=True))

    def _keep_best(self) -> None:
        best = standing(self.out / "checkpoints" / "best")

        def copy(to: Path) -> None:
            shutil.copytree(best, to, dirs_exist_ok=True)

        if best.is_dir():
            write_whole(self.out / "model", copy)


class TensorBoard:
    """Writes the same figures for TensorBoard.

    Args:
        folder: where the event files go.

    Raises:
        MissingExtraError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "run.tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Write down what happened."""
        if isinstance(event, Step):
            figures = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, **event.terms}
        elif isinstance(event, Evaluated):
            figures = finite(event.figures)
        else:
            if isinstance(event, Stopped):
                self._writer.close()
            return
        for name, value in figures.items():
            self._writer.add_scalar(name, value, event.step)


def summarize(window: list[Step]) -> dict[str, Any]:
    """One line of metrics for several steps: means, and the state after the last."""
    last = window[-1]
    means = {name: float(np.mean([step.terms[name] for step in window])) for name in last.terms}
    class_error = float(np.mean([step.class_error for step in window]))
    seconds = sum(step.seconds for step in window)
    # The steps that fp16 skips for their overflow have no norm.
    norms = [step.grad_norm for step in window if math.isfinite(step.grad_norm)]
    return {
        "event": "step",
        "step": last.step,
        "epoch": last.epoch,
        "loss": float(np.mean([step.loss for step in window])),
        **means,
        **({} if math.isnan(class_error) else {"class_error": class_error}),
        "lr": last.lr,
        "grad_norm": float(np.mean(norms)) if norms else math.nan,
        "images_per_second": round(sum(step.images for step in window) / max(seconds, 1e-9), 2),
        "waited": round(sum(step.waited for step in window) / max(seconds, 1e-9), 3),
    }


def _seconds_so_far(file: Path) -> float:
    """How long a run that goes on has taken already; 0 where it cannot be told."""
    try:
        return max(0.0, float(read_json(file)["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _belongs_before(line: str, checkpoint: int, is_pending: bool) -> bool:
    """Whether what a line tells was done when the run goes on; one that was cut off by its end is dropped."""
    try:
        record = parse_json(line)
        step, comes_again = float(record["step"]), is_pending and record.get("event") == "evaluated"
    except (ValueError, OverflowError, KeyError, TypeError):
        return False
    return step < checkpoint or (step == checkpoint and not comes_again)


def finite(figures: dict[str, float]) -> dict[str, float]:
    """The figures that are defined."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def environment(session: Session[Any]) -> dict[str, Any]:
    """Versions and machine, as far as they change results."""
    return {
        "detrkit": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": str(session.device),
        "gpu": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "processors": processors(),
        "processes": session.world.size,
        "platform": platform.platform(),
    }
