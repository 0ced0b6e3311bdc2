"""A small data set for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from training.drawing import write_coco


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO data set of 10 training and 3 validation images of three sizes; one training image has no box."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    return write_coco(root, {"train": [2, 1, 3, 2, 0, 1, 2, 4, 1, 2], "val": [2, 3, 1]})


@pytest.fixture(autouse=True, scope="session")
def _no_packaged_recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start from the defaults: the packaged recipe of the preset is tuned now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.recipe.FOLDER", tmp_path_factory.mktemp("recipes"))
        yield


@pytest.fixture(scope="module")
def plotless() -> Iterator[None]:
    """Leave out the plots of a module's runs, those of its fixtures included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        yield


@pytest.fixture(autouse=True, scope="module")
def _flushless(flushless: None) -> None:
    """Dozens of checkpoints are written, and none of them has to last."""
