"""What a training tells where nobody listens to its events."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from training.drawing import tiny_recipe

import detrkit
from detrkit.errors import UsageError
from detrkit.training.events import Skipped, Started, Step, Warned
from detrkit.training.telling import Logged


def step(number: int, *replaced: str) -> Step:
    return Step(number, float(number), 1.0, {}, 0.5, 1e-4, 1.0, 1.0, 0.0, 4, replaced)


def test_warnings_are_of_what_is_wrong_and_all_else_is_information(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "detrkit")
    tell = Logged({"train": {"problems": {"missing-image": 1, "outside-box": 1200}}, "val": {"problems": {}}})
    tell(Started(0, 10, 5, ("Device: cpu",)))
    tell(step(1, "a.jpg: empty"))
    tell(step(2, "a.jpg: empty"))
    tell(Skipped(3, ("b.jpg",), (), 1, 1))
    tell(Warned(4, "boxes", "Boxes are odd", "Look at them."))
    tell(Warned(5, "boxes", "No longer so: boxes", cleared=True))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    problems = "1 × missing-image, 1,200 × outside-box"
    assert said[:4] == [
        ("INFO", "Device: cpu"),
        ("INFO", "Training for 10 steps, 5 an epoch"),
        (
            "WARNING",
            f"Problems of the train images, which data.json of the run counts: {problems}",
        ),
        ("WARNING", "Another image stands in for one that cannot be read: a.jpg: empty"),
    ]
    assert [level for level, _ in said[4:]] == ["WARNING", "WARNING", "INFO"]


def test_a_training_in_python_is_told_to_logging(drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "detrkit")
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    next((data / "train").glob("*.png")).unlink()
    detrkit.train(data, out=tmp_path / "run", recipe=tiny_recipe(epochs=1))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("1 × missing-image" in line for line in warnings)
    assert any(record.getMessage().startswith("epoch 1: AP ") for record in caplog.records)


def test_several_data_sets_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one data set; got list; expected its folder or its file"):
        detrkit.train.__wrapped__(["a", "b"], out=tmp_path / "run")  # types unchecked
