"""`detrkit pretrain`: flags over recipes, what it says, and what other verbs say of what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import TINY, Detrkit
from PIL import Image

from detrkit.cli import main, pretrain
from detrkit.cli._options import parse
from detrkit.errors import UsageError
from detrkit.training import pretext, pretraining
from detrkit.training.events import Evaluated, Saved
from detrkit.training.pretext import BackboneRecipe, PatchRecipe
from detrkit.training.recipe import Recipe, read, revise, to_toml
from detrkit.training.telling import News

LITTLE = (*TINY, "--patches", "2", "--patch-size", "32", "--shortest", "0", "--epochs", "1", "--val-fraction", "0.3")


def options_of(*arguments):
    given = ["images", "--out", "out", *arguments]
    return parse(pretrain.options_for(given), "pretrain", given, quiet=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("drawn") / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 64)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pre-training of one epoch; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.recipe.FOLDER", out.parent)
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        arguments = ["pretrain", str(images), "--out", str(out), "--train-backbone", "--json", *LITTLE]
        assert main(arguments) == 0
    return out


@pytest.fixture
def recipe_of(monkeypatch, detrkit):
    """The recipe that a command line would train with."""
    seen = []

    def fake(images, *, out, recipe, resume, on_event):
        seen.append((images, recipe))
        return pretraining.PretrainedRun(out, {}, "It was well.", (), (), None)

    monkeypatch.setattr(pretraining, "pretrain", fake)

    def get(*arguments):
        said = detrkit("pretrain", "images", "--out", "out", *arguments)
        assert said.code == 0, said.err
        assert seen[-1][0][0] == "images"
        return seen.pop()[1]

    return get


def test_flags_are_those_of_the_task(recipe_of):
    assert recipe_of() == revise(PatchRecipe(), {"model": pretext.DEFAULT_MODELS["up-detr"]})
    assert recipe_of("--patches", "7", "--model", "detr-r50") == revise(
        PatchRecipe(), {"model": "detr-r50", "patches": 7}
    )
    of_views = recipe_of("--task", "backbone", "--view-size", "64", "--lr", "1e-2")
    assert of_views == revise(
        BackboneRecipe(), {"model": pretext.DEFAULT_MODELS["backbone"], "view_size": 64, "lr": 1e-2}
    )
    with pytest.raises(UsageError, match="view-size"):
        options_of("--view-size", "64")
    with pytest.raises(UsageError, match="no such task; got 'puzzle'"):
        options_of("--task", "puzzle")


def test_a_recipe_of_the_task_and_the_preset_is_found(recipe_of, tmp_path, monkeypatch):
    monkeypatch.setattr("detrkit.training.recipe.FOLDER", tmp_path)
    (tmp_path / "any.toml").write_text(to_toml(revise(PatchRecipe(), {"model": "detr-r18", "epochs": 7})))
    (tmp_path / "views.toml").write_text(to_toml(revise(BackboneRecipe(), {"model": "detr-r18", "epochs": 9})))
    assert recipe_of("--model", "detr-r18").optimization.epochs == 7
    assert recipe_of("--model", "detr-r18", "--task", "backbone").optimization.epochs == 9
    assert recipe_of("--model", "detr-r34").optimization.epochs == 60
    assert recipe_of("--recipe", "any", "--patches", "3").pretext.patches == 3
    assert recipe_of("--recipe", "views").optimization.epochs == 9  # which says the task
    with pytest.raises(UsageError, match="of another task"):
        options_of("--recipe", "views", "--task", "up-detr")
    (tmp_path / "labels.toml").write_text(to_toml(Recipe()))
    with pytest.raises(UsageError, match="of another task; got no task, as for a detector"):
        options_of("--recipe", "labels")


def test_the_ending_says_what_to_do_next(detrkit: Detrkit, images: Path, tmp_path: Path):
    out = tmp_path / "run"
    said = detrkit("pretrain", images, "--out", out, "--train-backbone", *LITTLE)
    assert said.code == 0
    assert "recall50" in said.err
    assert "held-out image" in said.out
    assert f"detrkit train DATA --init {out} --out RUN" in said.out
    assert str(out / "samples" / "epoch-0001" / "report.html") in said.out
    found = detrkit("pretrain", images, "--out", out, "--resume", "--json").document  # it was finished
    assert found["conclusion"] in said.out
    assert found["figures"].keys() >= {"recall50", "consistency"}
    assert all(alarm in said.out for alarm in found["alarms"])


def test_an_interruption_says_how_to_go_on(detrkit: Detrkit, images: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "a run"

    def interrupt(self, event):
        if isinstance(event, Saved):
            raise KeyboardInterrupt

    monkeypatch.setattr("detrkit.cli._progress.PlainProgress.__call__", interrupt)
    given = ("--task", "backbone", *TINY, "--view-size", "32", "--width", "8", "--epochs", "2", "--val-fraction", "0.7")
    said = detrkit("pretrain", images, "--out", out, *given)
    assert said.code == 130
    assert f"detrkit pretrain {images} --out '{out}' --resume" in said.err
    monkeypatch.undo()
    assert read(out / "recipe.toml", BackboneRecipe()).pretext.width == 8
    said = detrkit("pretrain", images, "--out", out, "--resume")
    assert said.code == 0, said.err
    model = "--model detr-nano --architecture backbone resnet-nano stride 32"
    assert f"detrkit train DATA {model}" in said.out
    assert f" --backbone-weights '{out}' --out RUN" in said.out
    said = detrkit("inspect", out)
    assert "Backbone    resnet-nano of detr-nano, alone" in said.out
    assert "retrieval" in said.out


def test_a_backbone_that_would_see_nothing_is_refused(detrkit: Detrkit, images: Path, tmp_path: Path):
    said = detrkit("pretrain", images, "--out", tmp_path / "run", *LITTLE)
    assert said.code == 2
    assert "it sees nothing" in said.err
    assert "--train-backbone" in said.err


def test_what_was_only_pretrained_is_no_detector(detrkit: Detrkit, pretrained: Path, data, tmp_path: Path):
    for verb in (("predict", pretrained, data / "val", "--out", tmp_path / "out"), ("evaluate", pretrained, data)):
        said = detrkit(*verb)
        assert said.code == 4
        assert f"Train it first: detrkit train DATA --init {pretrained} --out RUN" in said.err
    said = detrkit("predict", pretrained, data / "val", "--out", tmp_path / "out", "--pretrained")
    assert said.code == 0
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["images"]


def test_inspect_says_that_it_is_pretrained(detrkit: Detrkit, pretrained: Path):
    said = detrkit("inspect", pretrained)
    assert "Pre-trained by up-detr, on " in said.out
    assert "recall50" in said.out
    assert "epoch 1" in said.out
    about = detrkit("inspect", pretrained, "--json").document["model"]["about"]
    assert about["pretext"]["options"]["patches"] == 2


def test_what_an_evaluation_says_is_told_when_it_arises():
    news = News()

    def told(*notes):
        event = Evaluated(step=1, epoch=1.0, figures={}, headline=(), seconds=0.0, is_best=False, notes=notes)
        return news(event)

    assert told("Boxes: 1 %") == ["Boxes: 1 %"]
    assert told("Boxes: 2 %", "Lost: 3") == ["Lost: 3"]
    assert told("Lost: 3") == []
    assert told("Boxes: 3 %", "Lost: 4") == ["Boxes: 3 %"]
