"""What all tests share: repeatable randomness, one thread a worker, checks of types, and the reference cases."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import checking
import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

# The process that hands the tests to the workers reads this file, too: what is slow to import, functions import.

ROOT = Path(__file__).resolve().parents[1]

checking.install()  # before anything imports the library

# The same examples in every run, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Give each parallel worker, and whatever it starts, one thread: two workers with two threads each only wait.

    Where the tests run in the background, a shell may have had SIGINT ignored; tests that send it want it heard.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the collector of garbage all that is imported and collected, which lives to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the reference cases, so that `-m golden` chooses it."""
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from one global random state: layers are initialised from it, and the order must not matter."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what reads the legacy state is not ours to choose
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A freshly seeded source for functions that take a `torch.Generator`."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A freshly seeded source for functions that take a `np.random.Generator`."""
    return np.random.default_rng(0)


@pytest.fixture
def plotless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots of a run, which take longer than all the rest of a tiny training."""
    monkeypatch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)


@pytest.fixture(scope="module")
def flushless() -> Iterator[None]:
    """Do not wait for the disk, which may take a tenth of a second each time; no machine fails in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.whole._flush", lambda path: None)
        yield


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Narrow ResNets for a whole module, its fixtures included."""
    from narrowing import narrow_resnets

    with narrow_resnets():
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference cases: `$DETRKIT_GOLDEN`, or `shared/golden` beside the checkout."""
    named = os.environ.get("DETRKIT_GOLDEN")
    folder = Path(named) if named else ROOT.parent / "shared" / "golden"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"DETRKIT_GOLDEN names {named}, which is not a folder")
    pytest.skip("no reference cases: set DETRKIT_GOLDEN to their folder")
