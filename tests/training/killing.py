"""Trainings in processes of their own, which are killed. Processes are forked from one that has loaded everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what a first step would load
from training.drawing import tiny

import detrkit
import detrkit.training.log
from detrkit.cli import main
from detrkit.training import recovery
from detrkit.training.events import Event, Saved, Started

FIELDS: dict[str, Any] = tiny(
    epochs=6,
    ema=0.9,
    schedule="cosine",
    photometric=0.5,
    log_every=1,
    evaluate_every=3,
    save_every=2,
    save_minutes=0.0005,
    threads=1,
    architecture={"dropout": "0.3"},
)
"""A training of thirty steps in a second or two that saves at every few of them."""


def train(data: Path, out: Path, resume: bool, fields: dict[str, Any]) -> None:
    """Train, and write what is saved and where it goes on into `OUT.events`, line by line."""
    _prepare()
    journal = os.open(f"{out}.events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def listen(event: Event) -> None:
        if isinstance(event, Saved | Started):
            os.write(journal, f"{type(event).__name__} {event.step}\n".encode())

    detrkit.train(data, out=out, resume=resume, on_event=listen, **({} if resume else fields))


def command(arguments: list[str], said: Path) -> None:
    """Run a command line as the leader of a group of processes; standard error goes to a file."""
    _prepare()
    os.setsid()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(arguments))


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Begin something in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.killing", "detrkit.training.run"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until something has come about, or the process has ended."""
    while process.is_alive() and not condition():
        time.sleep(0.002)


def journal(out: Path) -> list[tuple[str, int]]:
    """What `train` noted: names of events and steps."""
    file = Path(f"{out}.events")
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(step)) for name, step in (line.split() for line in lines)]


def _prepare() -> None:
    torch.set_num_threads(1)
    recovery.LARGEST_SHARE = 0.5
    detrkit.training.log.plot_history = lambda lines, out: out
