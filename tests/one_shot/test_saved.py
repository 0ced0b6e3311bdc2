"""One-shot detectors on disk: what was written is found again, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_shot.squares import SMALL, episode, preset_of, small
from safetensors.torch import load_file, save_file

import detrkit
from detrkit import models
from detrkit.checkpoint import TrainingState, read_tensors
from detrkit.errors import ModelError, UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.one_shot.model import OneShot
from detrkit.one_shot.saved import calibration_of, fill, is_one_shot, save
from detrkit.whole import standing

CALIBRATION = {"temperature": 1.5, "shift": -0.25}
ABOUT = {"epoch": 3, "one_shot": {"seen": ["red"], "calibration": CALIBRATION}}


def written(folder: Path, model: OneShot, variant: str = "detr", about: dict[str, Any] = ABOUT) -> Path:
    save(folder, model, preset=preset_of(variant), about=about)
    return folder


@pytest.mark.parametrize("variant", models.names())
@pytest.mark.parametrize("options", [{}, {"place": "both", "cells": 2, "width": 8}, {"prompted": False}])
def test_what_was_written_is_found_again(variant: str, options: dict[str, Any], tmp_path: Path):
    model = small(variant, **options)
    model.sharpness.data += 1
    folder, before = written(tmp_path / "model", model, variant), torch.get_rng_state()
    detector = detrkit.load(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    again = detector.one_shot
    assert again is not None
    assert not again.training
    assert again.detector is detector.model
    assert (again.place, again.prompted, again.cells, again.width) == (
        model.place,
        model.prompted,
        model.cells,
        model.width,
    )
    inputs = episode()
    model.to(memory_format=torch.channels_last)  # as it is loaded
    with torch.inference_mode():
        assert torch.equal(again(*inputs).logits, model(*inputs).logits)
    assert detector.calibration == Calibration(1.5, -0.25)
    assert detector.about is not None
    assert detector.about["epoch"] == 3
    assert detector.about["one_shot"]["seen"] == ["red"]
    assert [category.name for category in detector.categories] == ["alike"]


def test_finding_by_example_is_in_float32_alone(tmp_path: Path):
    path = written(tmp_path / "model", small())
    with pytest.raises(UsageError, match="fp32 alone"):
        detrkit.load(path, device="cpu", precision="bf16")
    assert detrkit.load(path, device="cpu", precision="auto").one_shot is not None


def test_all_classes_but_the_last_are_unused(tmp_path: Path):
    detector = detrkit.load(written(tmp_path / "model", small(config={"num_classes": 3})), device="cpu")
    assert [category.name for category in detector.categories] == ["unused-1", "unused-2", "alike"]


def test_a_checkpoint_fills_a_model_again(tmp_path: Path):
    model, other = small(), small()
    state = TrainingState({"optimizer": {"x": torch.ones(2)}}, {"step": 7})
    save(tmp_path / "last", model, preset="detr-nano", about=ABOUT, state=state)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    fill(other, standing(tmp_path / "last"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(read_tensors(standing(tmp_path / "last") / "optimizer.safetensors")["x"], torch.ones(2))


def test_damaged_files_are_named(tmp_path: Path):
    folder = written(tmp_path / "model", small())
    file = folder / "one_shot.safetensors"
    intact = file.read_bytes()
    for content, said in ((b"nothing", "cannot be read"), (intact[: len(intact) // 2], "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=rf"one_shot\.safetensors.*{said}"):
            detrkit.load(folder, device="cpu")
    file.write_bytes(intact)
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "sharpness"}, file)
    with pytest.raises(ModelError, match=r"one_shot\.safetensors.*sharpness"):
        detrkit.load(folder, device="cpu")
    file.unlink()
    with pytest.raises(ModelError, match=r"one_shot\.safetensors"):
        detrkit.load(folder, device="cpu")


@pytest.mark.parametrize(
    "options",
    [None, {}, {"place": "content", "flavour": 3}, {"cells": "many"}, {"cells": 0}, {"place": "above"}, [], "text"],
)
def test_options_that_cannot_be_understood_are_named(options: Any, tmp_path: Path):
    folder = written(tmp_path / "model", small())
    config = json.loads((folder / "config.json").read_text())
    about = config["about"]["one_shot"]
    if options is None:
        del about["options"]
    elif options != {}:
        about["options"] = options
    else:
        about["options"] = {"width": 8}  # not what the weights are of
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json.*cannot be understood|one_shot\.safetensors"):
        detrkit.load(folder, device="cpu")


@pytest.mark.parametrize(
    "known",
    [
        {"temperature": 1.0},
        {"temperature": "hot", "shift": 0},
        {"temperature": 0, "shift": 0},
        {"temperature": 1, "shift": None},
    ],
)
def test_a_calibration_that_cannot_be_understood_is_named(known: dict[str, Any], tmp_path: Path):
    about = {"one_shot": {"calibration": known}}
    with pytest.raises(ModelError, match="calibration"):
        calibration_of(about)


def test_what_says_that_it_finds_by_example():
    assert is_one_shot({"one_shot": {}})
    assert not is_one_shot({})
    assert not is_one_shot(None)
    assert not is_one_shot({"one_shot": True})
    assert calibration_of(None) is None
    assert calibration_of({"one_shot": {}}) is None
    assert calibration_of(ABOUT) == Calibration(1.5, -0.25)


def test_weights_of_another_detector_do_not_fit(tmp_path: Path):
    folder = written(tmp_path / "model", small())
    with pytest.raises(ModelError):
        fill(small(config={"dim": 2 * SMALL["dim"]}), folder)
