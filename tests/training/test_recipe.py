"""Recipes: TOML there and back, and refusals that say what was meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from detrkit import models
from detrkit.errors import UsageError
from detrkit.training import recipe as recipes
from detrkit.training.recipe import (
    AnyRecipe,
    OptimizationOptions,
    Recipe,
    RunOptions,
    fields,
    read,
    revise,
    to_toml,
)

OTHER: dict[str, Any] = {
    "schedule": "cosine",
    "precision": "bf16",
    "recompute": "all",
    "architecture": {"dim": "64", "odd key": 'a "b"'},
}


def changed(name: str, kind: Any, default: Any) -> Any:
    """A valid value that is not the default."""
    if name in OTHER:
        return OTHER[name]
    if kind is bool:
        return not default
    if kind is str:
        return 'C:\\data "x"\n\ttab\x7f é 🙂'
    return default + 3 if kind is int else 0.123456789012345 if default != 0.123456789012345 else 0.5


def test_every_field_survives_toml(tmp_path: Path) -> None:
    values = {name: changed(name, kind, default) for name, (_, kind, default) in fields().items()}
    recipe = revise(Recipe(), values)
    for name, (section, _, default) in fields().items():
        assert getattr(getattr(recipe, section), name) != default, name
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert read(file) == recipe


def test_the_default_survives_toml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(Recipe()), encoding="utf-8")
    assert read(file) == Recipe()


def test_field_names_are_unique_over_sections() -> None:
    parts = [getattr(Recipe(), section.name) for section in dataclasses.fields(Recipe)]
    assert len(fields()) == sum(len(dataclasses.fields(part)) for part in parts)


PACKAGED = recipes.FOLDER


@pytest.mark.parametrize("name", recipes.packaged_names())
def test_packaged_recipes_are_read_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", PACKAGED)
    recipe = read(name)
    assert isinstance(recipe, Recipe)
    assert recipe.model.model in models.presets()


def test_what_a_recipe_does_not_say_stays(tmp_path: Path) -> None:
    file = tmp_path / "part.toml"
    file.write_text("[optimization]\nepochs = 7\nlr = 1\n")
    base = revise(Recipe(), {"batch_size": 9, "epochs": 3})
    recipe = read(file, base)
    assert (recipe.optimization.epochs, recipe.optimization.batch_size, recipe.optimization.lr) == (7, 9, 1.0)
    assert isinstance(recipe.optimization.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimisation]\nlr = 1e-4\n", r"no such section; got 'optimisation'.*Did you mean \[optimization\]"),
        ("lr = 1e-4\n", "no such section; got 'lr'"),
        ("[optimization]\nepocs = 3\n", "no such field; got 'epocs'. Did you mean 'epochs'"),
        ("[data]\nepochs = 3\n", r"'epochs' belongs to the section \[optimization\]"),
        ("[optimization]\nepochs = 3.0\n", "Bad value for epochs; got 3.0; expected int"),
        ("[optimization]\nepochs = true\n", "Bad value for epochs; got True; expected int"),
        ("[optimization]\nlr = '1e-4'\n", "Bad value for lr; got '1e-4'; expected a number"),
        ("[optimization]\nlr = true\n", "Bad value for lr; got True; expected a number"),
        ("[optimization]\nlr = inf\n", "Bad value for lr; got inf; expected a finite number"),
        ("[optimization]\nlr = nan\n", "Bad value for lr; got nan"),
        ("[optimization]\nlr = -1e-4\n", "Bad value for lr; got -0.0001; expected at least 0"),
        ("[optimization]\nschedule = 'linear'\n", "Bad value for schedule; got 'linear'; expected 'step', 'cosine'"),
        ("[optimization]\nepochs = 0\n", "Bad value for epochs; got 0; expected at least 1"),
        ("[augmentation]\nflip = 1.5\n", "Bad value for flip; got 1.5; expected between 0 and 1"),
        ("[run]\ntensorboard = 1\n", "Bad value for tensorboard; got 1; expected bool"),
        ("[model]\narchitecture = 3\n", "Bad value for architecture; got 3; expected a table"),
        ("[model\n", "cannot be read"),
        ("[model]\nmodel = '\xff'\n", "cannot be read"),
    ],
)
def test_bad_recipes_are_refused_by_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe; got 'no-such'"):
        read("no-such")
    with pytest.raises(UsageError, match="no such recipe"):
        read(tmp_path)


def test_a_path_may_stand_for_text_and_a_number_for_text_in_the_architecture() -> None:
    recipe = revise(Recipe(), {"init": Path("a/b"), "architecture": {"dim": 32}})
    assert recipe.model.init == "a/b"
    assert recipe.model.architecture == {"dim": "32"}


def test_numbers_may_be_numpys() -> None:
    said = {"epochs": np.int64(3), "lr": np.float32(0.5), "tensorboard": np.bool_(True), "schedule": np.str_("cosine")}
    recipe = revise(Recipe(), {**said, "architecture": {"num_queries": np.int64(50), "dropout": np.float32(0.25)}})
    plain = revise(Recipe(), {"epochs": 3, "lr": 0.5, "tensorboard": True, "schedule": "cosine"})
    plain = revise(plain, {"architecture": {"num_queries": "50", "dropout": "0.25"}})
    assert recipe == plain
    assert recipes.to_toml(recipe) == recipes.to_toml(plain)
    for name, value in (("epochs", np.float64(1)), ("lr", np.bool_(True)), ("epochs", np.array([1]))):
        with pytest.raises(UsageError, match=f"Bad value for {name}"):
            revise(Recipe(), {name: value})


@dataclasses.dataclass(frozen=True)
class PatchOptions:
    patches: int = dataclasses.field(default=10, metadata=recipes.within(1, 20))
    model: str = ""


@dataclasses.dataclass(frozen=True)
class PatchRecipe(AnyRecipe):
    """The recipe of another task, with other defaults in a section that all have."""

    task: ClassVar[str] = "patches"

    pretext: PatchOptions = dataclasses.field(default_factory=PatchOptions)
    optimization: OptimizationOptions = dataclasses.field(default_factory=lambda: OptimizationOptions(epochs=60))
    run: RunOptions = dataclasses.field(default_factory=RunOptions)


def test_a_recipe_of_another_task_survives_toml(tmp_path: Path) -> None:
    assert fields(PatchRecipe)["patches"] == ("pretext", int, 10)
    assert fields(PatchRecipe)["epochs"] == ("optimization", int, 60)
    assert "flip" not in fields(PatchRecipe)
    recipe = revise(PatchRecipe(), {"patches": 7, "lr": 0.5})
    assert isinstance(recipe, PatchRecipe)
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert read(file, PatchRecipe()) == recipe
    with pytest.raises(UsageError, match="Bad value for patches; got 21; expected between 1 and 20"):
        revise(PatchRecipe(), {"patches": 21})
    with pytest.raises(UsageError, match=r"no such field; got 'patchs'. Did you mean 'patches'"):
        revise(PatchRecipe(), {"patchs": 7})


def test_a_recipe_of_another_task_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(PatchRecipe()))
    with pytest.raises(UsageError, match="of another task; got task = 'patches'; expected no task, as for a detector"):
        read(file)
    file.write_text(to_toml(Recipe()))
    with pytest.raises(UsageError, match=r"expected task = 'patches'\. .* begin with: task = .patches") as caught:
        read(file, PatchRecipe())
    assert str(file) in str(caught.value)


def test_packaged_recipes_are_those_of_their_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "detr-nano.toml").write_text('[model]\nmodel = "detr-nano"\n')
    (tmp_path / "patches-detr-nano.toml").write_text('task = "patches"\n[optimization]\nepochs = 7\n')
    assert recipes.packaged_names() == ["detr-nano"]
    assert recipes.packaged_names(PatchRecipe) == ["patches-detr-nano"]
    assert recipes.of_preset("detr-nano", PatchRecipe()).optimization.epochs == 7
    assert recipes.of_preset("detr-r18", PatchRecipe()) == revise(PatchRecipe(), {"model": "detr-r18"})
    assert recipes.of_preset("detr-nano").model.model == "detr-nano"
    with pytest.raises(UsageError, match=r"one of patches-detr-nano$"):
        read("nothing", PatchRecipe())
