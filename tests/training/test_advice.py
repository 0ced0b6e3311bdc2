"""Which recipe suits which data and which machine, and that whatever was said wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.drawing import write_coco

from detrkit.data import formats
from detrkit.training import run as running
from detrkit.training.advice import Facts, Machine, advise, reasons, revised, without
from detrkit.training.recipe import Recipe, of_preset

SMALL = """
[model]
model = "conditional-detr-nano"
[optimization]
epochs = 90
batch_size = 4
[run]
evaluate_every = 10
save_every = 5
"""
LARGE = """
[model]
model = "conditional-detr-r50"
[optimization]
epochs = 50
batch_size = 2
"""


@pytest.fixture(autouse=True)
def _two_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packaged recipes whose numbers stay as they are."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "conditional-detr-nano.toml").write_text(SMALL)
    (folder / "conditional-detr-r50.toml").write_text(LARGE)
    monkeypatch.setattr("detrkit.training.recipe.FOLDER", folder)


LARGE_THINGS = np.full(100, 0.2)
HERE = Machine(2, 24.0, "", frozenset({"mobilenet_v2"}))
GPU = Machine(16, 24.0, "a GPU", frozenset({"mobilenet_v2", "resnet50"}))


def facts_of(shares: np.ndarray, size: tuple[int, int] = (480, 640)) -> Facts:
    """Images of a size, whose objects have these sides, as shares of the shorter one."""
    return Facts(292, 30, size, shares * min(size), np.tile(size, (len(shares), 1)))


CELLS = facts_of(LARGE_THINGS)


def small_things(share: float, side: float) -> np.ndarray:
    """A share of the objects has this side, as a share of the image's shorter one."""
    return np.where(np.arange(100) < 100 * share, side, 0.2)


def changed(facts: Facts, machine: Machine = HERE) -> dict[str, Any]:
    """What the advice has otherwise than the packaged recipe of the default preset."""
    advised = revised(advise(facts, machine))
    usual = of_preset("conditional-detr-nano")
    found: dict[str, Any] = {}
    for section in ("data", "model", "augmentation", "optimization", "run"):
        before, after = vars(getattr(usual, section)), vars(getattr(advised, section))
        found |= {name: value for name, value in after.items() if value != before[name]}
    return found


@pytest.mark.parametrize(
    ("facts", "machine", "expected"),
    [
        (CELLS, HERE, {}),
        (replace(CELLS, images=250), HERE, {}),
        (replace(CELLS, images=500), GPU, {}),
        (Facts(292, 30), HERE, {}),
        (replace(CELLS, images=125), HERE, {"epochs": 180, "evaluate_every": 20, "save_every": 10}),
        (replace(CELLS, images=10), HERE, {"epochs": 500, "evaluate_every": 56, "save_every": 28}),
        (replace(CELLS, images=900), HERE, {"epochs": 50, "evaluate_every": 6, "save_every": 3}),
        (replace(CELLS, images=900), GPU, {}),
        (replace(CELLS, images=9000), HERE, {"epochs": 30, "evaluate_every": 3, "save_every": 2}),
        (replace(CELLS, most_boxes=100), HERE, {}),
        (replace(CELLS, most_boxes=101), HERE, {"architecture": {"num_queries": "150"}}),
        (replace(CELLS, most_boxes=3000), HERE, {"architecture": {"num_queries": "900"}}),
        (facts_of(small_things(0.1, 0.05)), HERE, {}),
        (facts_of(small_things(0.2, 0.052)), HERE, {"image_size": 320}),
        (facts_of(small_things(0.2, 0.045)), HERE, {"image_size": 384}),
        (facts_of(small_things(0.2, 0.03)), HERE, {}),
        (facts_of(small_things(0.2, 0.036), (1080, 1440)), GPU, {"image_size": 448}),
        (facts_of(small_things(0.2, 0.052), (240, 320)), HERE, {}),
        (facts_of(np.full(100, 0.001), (4000, 4000)), GPU, {}),
        (facts_of(np.linspace(0, 0.05, 100), (4000, 4000)), HERE, {"image_size": 384}),
        (facts_of(np.full(100, 0.25), (300, 6000)), HERE, {}),
        (CELLS, replace(HERE, memory=0.5), {"batch_size": 2, "accumulate": 2}),
        (CELLS, replace(HERE, memory=0.0), {}),
        (CELLS, replace(HERE, backbones=frozenset()), {}),
        (
            CELLS,
            replace(HERE, backbones=frozenset({"mobilenet_v2_torchvision"})),
            {"architecture": {"backbone": "mobilenet_v2_torchvision"}},
        ),
    ],
)
def test_the_small_model_is_adapted_where_there_is_a_reason(facts, machine, expected):
    assert changed(facts, machine) == expected


@pytest.mark.parametrize(
    ("images", "machine", "model"),
    [
        (10_000, GPU, "conditional-detr-r50"),
        (9_999, GPU, "conditional-detr-nano"),
        (118_000, replace(GPU, memory=8.0), "conditional-detr-nano"),
        (118_000, replace(GPU, backbones=frozenset({"mobilenet_v2"})), "conditional-detr-nano"),
        (118_000, replace(GPU, gpu=""), "conditional-detr-nano"),
    ],
)
def test_a_published_model_needs_images_a_gpu_and_weights(images, machine, model):
    choices = advise(replace(CELLS, images=images), machine)
    recipe = revised(choices)
    assert recipe.model.model == model
    if model == "conditional-detr-r50":
        assert recipe.optimization.epochs == 50
        assert recipe.optimization.batch_size * recipe.optimization.accumulate == 16
        assert recipe.optimization.batch_size == 4  # 800 × 1067 pixels in half of 24 GB
    elif not machine.backbones >= {"resnet50"}:
        assert "the weights of resnet50 are not on this machine" in choices[0].reason


def test_each_choice_has_its_reason():
    choices = advise(replace(facts_of(small_things(0.26, 0.043)), most_boxes=150), HERE)
    told = reasons(choices, revised(choices))
    assert told[:5] == (
        "Preset conditional-detr-nano: 292 training images, on 2 processors",
        "Images at 384 pixels instead of 256: 26% of the objects are smaller than one token (16 pixels) at 256, 0% at "
        "384; a step takes about 2.2 times as long",
        "200 queries instead of 100: an image holds up to 150 objects",
        "90 epochs, the preset's own: about 6,570 steps",
        "Batches of 4, the preset's own",
    )
    assert len(told) == 6


def test_long_images_are_judged_as_they_are_seen_and_size_is_not_raised_for_nothing():
    long = facts_of(np.full(100, 0.25), (300, 6000))  # seen at 22 × 448 pixels
    told = reasons(choices := advise(long, HERE), revised(choices))
    small = "100% of the objects are smaller than one token (16 pixels) at 256"
    assert told[1] == f"Images at 256 pixels, the preset's own: {small}, and 100% at 384 still"
    (chosen,) = (choice for choice in advise(long, HERE, longest=6000) if "image_size" in choice.about)
    assert chosen.reason.startswith("Images at 256 pixels, the preset's own: 0% of the objects")
    crowded = facts_of(small_things(0.26, 0.043))
    (chosen,) = (choice for choice in advise(crowded, HERE, longest=350) if "image_size" in choice.about)
    assert not chosen.fields  # 384 is above the limit, and at 320 the limit decides
    assert chosen.reason.endswith("at 320 still")
    (chosen,) = (choice for choice in advise(crowded, HERE, longest=300) if "image_size" in choice.about)
    assert chosen.reason.endswith("but no side may be longer than 300")


def test_what_was_said_is_neither_chosen_nor_reasoned_about():
    choices = advise(replace(CELLS, images=100, most_boxes=150), HERE)
    left = without(choices, {"epochs"})
    assert revised(left).run.evaluate_every == of_preset("conditional-detr-nano").run.evaluate_every
    assert not any("epochs" in reason for reason in reasons(left, revised(left)))
    left = without(choices, {"evaluate_every"})
    assert (revised(left).optimization.epochs, revised(left).run.evaluate_every) == (225, 10)
    recipe = revised(choices)
    other = replace(recipe, model=replace(recipe.model, architecture={"num_queries": "120"}))
    assert any("200 queries" in reason for reason in reasons(choices, recipe))
    assert not any("queries" in reason for reason in reasons(choices, other))
    assert reasons((), recipe) == ()


def test_facts_of_a_data_set(tmp_path: Path):
    root = write_coco(tmp_path / "parts", {"train": [3, 1, 0]}, sizes=((64, 80),))
    facts = Facts.of(formats.read(root)["train"])
    assert (facts.images, facts.most_boxes, facts.size) == (3, 3, (64, 80))
    assert len(facts.sides) == 4
    assert facts.sides.min() >= 12
    assert facts.frames.tolist() == [[64, 80]] * 4
    assert Facts.of(formats.read(root)["train"].select([2])).most_boxes == 0


@pytest.fixture
def trained_with(monkeypatch: pytest.MonkeyPatch):
    """What `detrkit.train` would train with: the recipe, and the notes that it begins with."""
    seen = []

    def conduct(recipe, open_session, *rest, **options):
        seen.append((recipe, open_session))
        return {}

    monkeypatch.setattr(running, "conduct", conduct)
    monkeypatch.setattr("detrkit.training.advice.Machine.here", lambda device="auto": HERE)

    def get(data, out, **fields) -> Recipe:
        running.train(data, out=out, **fields)
        return seen.pop()[0]

    return get


def test_without_a_recipe_the_data_decide(trained_with, drawn, tmp_path):
    recipe = trained_with(drawn, tmp_path / "run")
    assert (recipe.model.model, recipe.optimization.epochs) == ("conditional-detr-nano", 500)
    recipe = trained_with(drawn, tmp_path / "run", epochs=7, lr=1e-3, architecture={"dim": "64"})
    assert (recipe.optimization.epochs, recipe.optimization.lr, recipe.run.evaluate_every) == (7, 1e-3, 10)
    assert recipe.model.architecture == {"dim": "64"}
    usual = of_preset("conditional-detr-nano")
    assert trained_with(drawn, tmp_path / "run", model="conditional-detr-nano") == usual
    assert trained_with(drawn, tmp_path / "run", recipe="conditional-detr-nano") == usual
    assert trained_with(tmp_path / "nothing", tmp_path / "run") == usual
