"""`detrkit demo`: with a stand-in for the packaged model, and training."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from detrkit import models
from detrkit.checkpoint import save_model
from detrkit.cli import demo
from detrkit.structures import Category
from detrkit.training.recipe import ModelOptions, OptimizationOptions, Recipe, RunOptions, to_toml

ARCHITECTURE = {
    **{"backbone": "resnet-nano", "stride": "32", "dim": "32", "heads": "2", "encoder_layers": "1"},
    **{"decoder_layers": "1", "feedforward": "32", "num_queries": "8"},
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of the digits that has learned nothing, where the packaged one should be."""
    folder = tmp_path / "assets"
    network = models.build("detr-nano", **ARCHITECTURE, num_classes=10, image_size=64, longest=96)
    save_model(folder, network, preset="detr-nano", categories=tuple(Category(d + 1, str(d)) for d in range(10)))
    monkeypatch.setattr(demo, "MODEL", folder)
    return folder


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A training of one epoch, where the packaged recipe should be."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    options = ModelOptions(architecture=ARCHITECTURE, image_size=64, longest=96, backbone_weights="random")
    short = Recipe(model=options, optimization=OptimizationOptions(epochs=1), run=RunOptions(samples=0))
    (folder / "digits.toml").write_text(to_toml(short))
    monkeypatch.setattr("detrkit.training.recipe.FOLDER", folder)
    monkeypatch.setattr(demo, "VALIDATION_IMAGES", 2)


@pytest.fixture
def curveless(monkeypatch):
    """Leave the curves out of reports, which take longer than all the rest; one test draws them."""
    monkeypatch.setattr("detrkit.evaluation.report._write_plots", lambda metrics, out: [])


def test_figures_pictures_and_what_to_do_next(detrkit, model, tmp_path, request):
    out = tmp_path / "demo"
    said = detrkit("demo", "--out", out, "--images", "3")
    assert said.code == 0, said.err
    assert "Making 3 photographs" in said.err
    assert "in 3 images that the detector never saw" in said.out
    assert f"detrkit predict {model} {out / 'data' / 'test'}" in said.out
    with Image.open(out / "digits.jpg") as picture:
        assert picture.width > demo.LONGEST_SIDE
    for name in ("report.html", "pr_curves.png", "confusion.png"):
        assert (out / "report" / name).is_file()
    request.getfixturevalue("curveless")
    again = detrkit("demo", "--out", out, "--images", "3", "--json")
    assert "Making" not in again.err
    assert again.document["images"] == 3
    other = detrkit("demo", "--out", out, "--images", "4")
    assert other.code == 2
    assert "not empty" in other.err


@pytest.mark.usefixtures("curveless")
def test_training(detrkit, model, recipe, tmp_path):
    out = tmp_path / "demo"
    arguments = ("demo", "--out", out, "--images", "2", "--train", "--train-images", "4")
    said = detrkit(*arguments, "--json")
    assert said.code == 0, said.err
    assert "epoch 1 evaluated in" in said.err
    assert "tensors kept" in said.err  # it starts from the packaged weights, class head and all
    assert "re-initialised" not in said.err
    assert said.document["model"] == str(out / "run")
    assert json.loads((out / "run" / "status.json").read_text())["state"] == "finished"
    again = detrkit(*arguments)
    assert again.code == 2
    assert "trained here before" in again.err


def test_what_cannot_be_shown(detrkit, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", tmp_path / "none")
    said = detrkit("demo", "--out", tmp_path / "demo")
    assert said.code == 4
    assert "lacks the demo's detector" in said.err
    assert "pip install detrkit" in said.err
    assert detrkit("demo", "--images", "0", "--json").document["error"]["exit_code"] == 2
    assert not (tmp_path / "demo").exists()


def test_a_missing_package_is_named(detrkit, model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    said = detrkit("demo", "--out", tmp_path / "demo")
    assert said.code == 2
    assert "pip install 'detrkit[demo]'" in said.err


def test_randomness_stays_outside(detrkit, model, tmp_path):
    before = torch.get_rng_state()
    detrkit("demo", "--out", tmp_path / "demo", "--images", "1")
    assert torch.equal(before, torch.get_rng_state())
