"""`detrkit train`: flags over recipes, streams, resuming, interruption."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil

import pytest
from cli.conftest import TINY, write_coco

from detrkit import evaluate
from detrkit.cli import train
from detrkit.cli._options import parse
from detrkit.cli._progress import PlainProgress
from detrkit.errors import DataError, UsageError
from detrkit.training import run as running
from detrkit.training.advice import Choice
from detrkit.training.events import Saved
from detrkit.training.recipe import (
    DEFAULT_MODEL,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    Recipe,
    read,
    to_toml,
)

DEFAULT = Recipe(model=ModelOptions(model=DEFAULT_MODEL))


def options_of(*arguments):
    given = ["data", "--out", "out", *arguments]
    return parse(train.options_for(given), "train", given, quiet=True)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of packaged recipes with one in it, which is named like a preset."""
    recipe = Recipe(
        data=DataOptions(limit=7),
        model=ModelOptions(model="detr-r18", architecture={"dim": "64", "heads": "4"}),
        optimization=OptimizationOptions(epochs=5, channels_last=False),
    )
    (tmp_path / "detr-r18.toml").write_text(to_toml(recipe))
    monkeypatch.setattr("detrkit.training.recipe.FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def recipe_of(monkeypatch, detrkit):
    """The recipe that a command line would train with."""
    seen = []

    def fake(data, *, out, recipe, resume, on_event, notes):
        seen.append(recipe)
        return running.Run(out, {})

    monkeypatch.setattr(running, "train", fake)

    def get(*arguments):
        said = detrkit("train", "data", "--out", "out", *arguments)
        assert said.code == 0, said.err
        return seen.pop()

    return get


def test_without_flags_it_is_the_default_recipe(recipes, recipe_of):
    assert recipe_of() == DEFAULT


def test_every_kind_of_flag(recipes, recipe_of):
    given = ("--epochs", "3", "--lr", "5e-4", "--no-multi-scale", "--tensorboard", "--schedule", "cosine")
    more = ("--val_split", "test", "--architecture", "dim", "32", "num_queries", "5")
    recipe = recipe_of(*given, *more)
    base = DEFAULT
    assert recipe == Recipe(
        data=dataclasses.replace(base.data, val_split="test"),
        model=dataclasses.replace(base.model, architecture={"dim": "32", "num_queries": "5"}),
        augmentation=dataclasses.replace(base.augmentation, multi_scale=False),
        optimization=dataclasses.replace(base.optimization, epochs=3, lr=5e-4, schedule="cosine"),
        run=dataclasses.replace(base.run, tensorboard=True),
    )


@pytest.fixture
def asked(monkeypatch, recipe_of):
    """The recipe of a command line for the data set `data`, whose advice is known, and how often it was asked for."""
    choices = (
        Choice(("model",), "why this model", {"model": DEFAULT_MODEL}),
        Choice(("num_queries",), "why so many queries", {"architecture": {"num_queries": "150"}}),
        Choice(("epochs",), "why so long", {"epochs": 90, "evaluate_every": 9}),
    )
    times = []

    def advice_for(data, given):
        times.append((str(data), given))
        return choices

    monkeypatch.setattr("detrkit.training.advice.advice_for", advice_for)

    def get(*arguments):
        times.clear()
        return recipe_of(*arguments), list(times)

    return get


def test_without_a_recipe_the_data_decide(recipes, asked):
    recipe, ((data, given),) = asked("--limit", "5", "--device", "cpu")
    assert (data, given.data.limit, given.run.device) == ("data", 5, "cpu")
    assert (recipe.model.model, recipe.model.architecture) == (DEFAULT_MODEL, {"num_queries": "150"})
    assert (recipe.optimization.epochs, recipe.run.evaluate_every) == (90, 9)
    assert (recipe.data.limit, recipe.run.device) == (5, "cpu")


def test_flags_override_what_the_data_advise(recipes, asked):
    usual = OptimizationOptions().epochs
    for given in (7, usual, 90):  # also the usual number, and the one that would be advised
        recipe, _ = asked("--epochs", str(given))
        assert (recipe.optimization.epochs, recipe.run.evaluate_every) == (given, 1)
    recipe, _ = asked("--evaluate-every", "1", "--architecture", "num_queries", "120", "dim", "64")
    assert (recipe.optimization.epochs, recipe.run.evaluate_every) == (90, 1)
    assert recipe.model.architecture == {"num_queries": "120", "dim": "64"}


def test_advice_is_asked_for_only_where_nothing_is_named(recipes, asked, detrkit, trained):
    for named in (("--recipe", "detr-r18"), ("--model", "detr-r18"), ("--init", trained)):
        assert asked(*named)[1] == []
    assert detrkit("train", "--help").code == 0
    assert asked("--resume")[1] == []
    assert asked()[1] != []


def test_the_run_notes_why(detrkit, data, tmp_path, monkeypatch):
    choices = (
        Choice(("model",), "why this model", {"model": DEFAULT_MODEL}),
        Choice(("lr",), "why this rate", {"lr": 1e-3}),
    )
    monkeypatch.setattr("detrkit.training.advice.advice_for", lambda data, given: choices)
    out = tmp_path / "run"
    tiny = [flag for flag in TINY if flag not in ("--model", "detr-nano")]
    said = detrkit("train", data, "--out", out, "--epochs", "1", "--lr", "2e-3", *tiny)
    assert said.code == 0, said.err
    assert "why this model" in said.err
    assert "why this rate" not in said.err
    assert json.loads((out / "data.json").read_text())["notes"][0] == "why this model"
    assert read(out / "recipe.toml").optimization.lr == 2e-3
    monkeypatch.setattr("detrkit.training.advice.advice_for", lambda data, given: pytest.fail("a run has its recipe"))
    assert detrkit("train", data, "--out", out, "--resume").code == 0


@pytest.mark.parametrize("chosen", [("--recipe", "detr-r18"), ("--model", "detr-r18")])
def test_only_given_flags_override_a_recipe(recipes, recipe_of, chosen):
    base = read(recipes / "detr-r18.toml")
    assert recipe_of(*chosen) == base
    changed = recipe_of("--limit", "0", "--channels-last", "--architecture", "heads", "8", *chosen)
    assert changed.data.limit == 0
    assert changed.optimization == dataclasses.replace(base.optimization, channels_last=True)
    assert changed.model.architecture == {"dim": "64", "heads": "8"}


def test_weights_to_start_from_say_the_model(recipes, recipe_of, trained, tmp_path):
    own = read(trained / "recipe.toml").model.architecture
    recipe = recipe_of("--init", trained, "--epochs", "3")
    assert (recipe.model.model, recipe.model.init, recipe.optimization.epochs) == ("detr-nano", str(trained), 3)
    assert own.items() <= {**recipe.model.architecture, "backbone": "resnet-nano", "stride": "32"}.items()
    changed = recipe_of("--architecture", "dropout", "0.3", "--init", trained).model.architecture
    assert changed == {**recipe.model.architecture, "dropout": "0.3"}
    assert recipe_of("--init", trained, "--model", "detr-r18") == replaced(read(recipes / "detr-r18.toml"), trained)
    (tmp_path / "mine.toml").write_text(f'[model]\ninit = "{trained}"\n[run]\nseed = 3\n')
    named = recipe_of("--recipe", tmp_path / "mine.toml")
    assert (named.model, named.run.seed) == (recipe.model, 3)


def replaced(recipe, init):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init=str(init)))


def test_help_does_not_look_for_the_weights_to_start_from(detrkit):
    said = detrkit("train", "--init", "nobody/nothing", "--help")
    assert (said.code, said.err) == (0, "")


def test_weights_to_start_from_that_are_not_there(detrkit, data, tmp_path):
    said = detrkit("train", data, "--out", tmp_path / "run", "--init", tmp_path / "nothing")
    assert said.code == 4
    assert "no such file or folder" in said.err


def test_the_help_shows_the_defaults_of_the_recipe(recipes, detrkit):
    assert "Passes through the training split. (default: 5)" in detrkit("train", "--recipe", "detr-r18", "--help").out


def test_resuming_takes_the_recipe_of_the_run(tmp_path, recipe_of):
    own = Recipe(optimization=OptimizationOptions(epochs=9))
    (tmp_path / "recipe.toml").write_text(to_toml(own))
    assert recipe_of("--out", tmp_path, "--resume") == own
    assert recipe_of("--out", tmp_path).optimization.epochs == 300


def test_an_unknown_recipe_is_refused(detrkit, recipes):
    said = detrkit("train", "data", "--out", "out", "--recipe", "nothing")
    assert said.code == 2
    assert "detr-r18" in said.err


def test_values_that_make_no_sense_are_refused(detrkit, data, tmp_path):
    for flag, value in (("--epochs", "0"), ("--flip", "2"), ("--model", "detr-r51"), ("--architecture", "dim x")):
        said = detrkit("train", data, "--out", tmp_path / "out", *TINY, flag, *value.split())
        assert said.code == 2, flag
        assert not said.out
        assert value.split()[-1] in said.err
    assert not (tmp_path / "out").exists()


def test_options_are_typed():
    assert options_of("--batch-size", "4").recipe.optimization.batch_size == 4
    with pytest.raises(UsageError, match="--batch-size"):
        options_of("--batch-size", "4.5")


def test_results_and_progress_go_separate_ways(detrkit, data, tmp_path):
    out = tmp_path / "a run"
    said = detrkit("train", data, "--out", out, "--epochs", "1", *TINY)
    assert said.code == 0
    assert said.out.startswith("Best AP ")
    assert f"detrkit evaluate '{out}' {data}" in said.out
    assert "Training: 4 images, 4 boxes, 2 classes" in said.err
    assert "Training for 2 steps, 2 an epoch" in said.err
    assert "epoch 1 evaluated in" in said.err
    assert "\x1b" not in said.out + said.err
    again = detrkit("train", data, "--out", out, "--epochs", "1", *TINY)
    assert again.code == 2
    assert "--resume" in again.err


def test_the_ending_names_the_annotations_that_were_meant(detrkit, data, recipe_of, tmp_path):
    plain = detrkit("train", data, "--out", tmp_path / "run", *TINY).out
    assert f"{data} --report" in plain
    for more in ([], ["--masks"]):
        meant = detrkit("train", data, "--out", tmp_path / "run", "--annotations", "coco", *more, *TINY).out
        assert f"{data} --annotations coco --report" in meant


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        ((), "1 image with 1 box (set aside by the run)"),
        (("--val-fraction", "0.4", "--limit", "2"), "2 images with 2 boxes (set aside by the run)"),
        (("--val-split", "train"), "12 images with 12 boxes (train)"),
    ],
)
def test_the_command_that_it_ends_with_works_without_a_validation_split(detrkit, tmp_path, rng, flags, images):
    write_coco(tmp_path / "alone", "train", 12, rng)
    out = tmp_path / "run"
    said = detrkit("train", tmp_path / "alone", "--out", out, "--epochs", "1", *TINY, *flags)
    assert said.code == 0
    ap = float(re.search(r"Best AP (\S+)", said.out)[1])
    command = shlex.split(re.search("Look at it:  detrkit (.*)", said.out)[1])
    looked = detrkit(*command, "--json")
    assert looked.code == 0
    assert looked.document["figures"]["AP"] == pytest.approx(ap, abs=0.001)
    assert images in detrkit(*command).out
    python = evaluate(out, tmp_path / "alone")
    assert python["AP"] == looked.document["figures"]["AP"]
    write_coco(tmp_path / "other", "train", 12, rng)  # of which the run set nothing aside
    said = detrkit("evaluate", out, tmp_path / "other")
    assert said.code == 3
    assert "There is no split 'val'" in said.err
    for name in ("foo", "bar"):
        write_coco(tmp_path / "third", name, 2, rng)
    said = detrkit("evaluate", out, tmp_path / "third")
    assert (said.code, "There is no split 'val'" in said.err) == (3, True)


def test_the_document(detrkit, data, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    said = detrkit("train", data, "--out", out, "--resume", "--json")
    assert said.code == 0
    assert (said.document["run"], said.document["model"]) == (str(out), str(out / "model"))
    assert "This training has taken all its steps: 2 steps" in said.err


def test_data_and_weights_that_are_missing(detrkit, data, tmp_path):
    assert detrkit("train", tmp_path / "none", "--out", tmp_path / "out", *TINY).code == 3
    missing = ("--backbone-weights", tmp_path / "none.npz")
    said = detrkit("train", data, "--out", tmp_path / "out", *TINY, *missing, "--json")
    assert said.code == 4
    assert said.document["error"]["kind"] == "ModelError"


def test_an_interruption_says_how_to_go_on(detrkit, data, tmp_path, monkeypatch):
    def interrupted(*_, out, **__):
        (out / "checkpoints" / "last").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", interrupted)
    out = tmp_path / "run"
    said = detrkit("train", data, "--out", out, "--json")
    assert said.code == 130
    assert f"detrkit train {data} --out {out} --resume" in said.err
    assert said.document["error"]["kind"] == "Interrupted"


def test_an_interruption_before_the_first_checkpoint(detrkit, data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", interrupted)
    said = detrkit("train", data, "--out", tmp_path / "run")
    assert said.code == 130
    assert "before the first checkpoint" in said.err


def test_going_on_after_ctrl_c(detrkit, data, tmp_path, monkeypatch):
    def interrupt(self, event):
        if isinstance(event, Saved):
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PlainProgress, "__call__", interrupt)
        assert detrkit("train", data, "--out", out, "--epochs", "2", *TINY).code == 130
    said = detrkit("train", data, "--out", out, "--resume")
    assert said.code == 0
    assert "Going on at step 2 of 4 steps" in said.err
    assert "epoch 2 evaluated in" in said.err
    assert "epoch 1 evaluated in" not in said.err
    assert json.loads((out / "status.json").read_text())["step"] == 4


def test_data_that_break_a_training_are_told_from_data_that_it_refuses(detrkit, data, tmp_path, monkeypatch):
    def spoil(self, event):
        if isinstance(event, Saved):
            raise DataError("The image cannot be read")

    out, other = tmp_path / "run", tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(PlainProgress, "__call__", spoil)
        said = detrkit("train", data, "--out", out, "--epochs", "2", *TINY)
    assert said.code == 3
    assert f"When that is mended, go on with: detrkit train {data} --out {out} --resume" in said.err
    shutil.copytree(data, other)
    next((other / "train").glob("*.*")).unlink()
    said = detrkit("train", other, "--out", out, "--resume")
    assert said.code == 3
    assert "begun with other data" in said.err
    assert "go on with" not in said.err
