"""Training and evaluation as one call: what is accepted, what is refused, what is taken over."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from training.drawing import tiny, tiny_recipe, write_coco

import detrkit
from detrkit import models
from detrkit.checkpoint import load_model
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.holders import save_segmenter
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category
from detrkit.training import recipe as recipes
from detrkit.training.events import Event, Saved, Started
from detrkit.training.recipe import Recipe, to_toml
from detrkit.training.run import evaluate_in_detail, resolve
from detrkit.training.setup import build_model, start_from

pytestmark = pytest.mark.usefixtures("plotless")


@pytest.fixture(scope="module")
def run(plotless: None, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    detrkit.train(drawn, out=out, **tiny(epochs=1))
    return out


def test_another_run_is_never_written_over(drawn: Path, run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"holds a run already.*--resume") as caught:
        detrkit.train(drawn, out=run, **tiny(epochs=1))
    assert str(run) in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_file_is_no_run_folder(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        detrkit.train(drawn, out=tmp_path / "file", **tiny())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"epocs": 3}, UsageError, "no such field; got 'epocs'. Did you mean 'epochs'"),
        ({"epochs": 0}, UsageError, "epochs; got 0"),
        ({"model": "detr-nana"}, UsageError, "no such preset.*Did you mean 'detr-nano'"),
        ({"architecture": {"num_querys": "3"}}, UsageError, "no such field.*Did you mean 'num_queries'"),
        ({"architecture": {"dim": "wide"}}, UsageError, "Bad value for dim"),
        ({"device": "gpu"}, UsageError, "no such device"),
        ({"train_split": "nothing"}, DataError, "no split 'nothing'"),
        ({"backbone_weights": "/none.pth"}, ModelError, "none.pth"),
        ({"init": "/none"}, ModelError, "no such file or folder"),
        ({"recipe": "no-such"}, UsageError, "no such recipe"),
    ],
)
def test_a_bad_call_is_refused_before_anything_is_written(
    drawn: Path, tmp_path: Path, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        detrkit.train(drawn, out=tmp_path / "run", **{**tiny(), **fields})
    assert not (tmp_path / "run").exists()


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        detrkit.train(tmp_path / "none", out=tmp_path / "run", **tiny())


def test_a_recipe_may_be_a_recipe_a_file_or_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(epochs=7)
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(recipe))
    assert resolve(recipe, {"lr": 0.5}).optimization.lr == 0.5
    assert resolve(file, {}) == resolve(str(file), {}) == recipe
    (tmp_path / "detr-r18.toml").write_text("[optimization]\nepochs = 5\n")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert resolve("mine", {}) == recipe
    assert resolve(None, {"model": "detr-r18"}).optimization.epochs == 5  # the preset's own
    assert resolve(None, {"model": "detr-r18", "epochs": 2}).optimization.epochs == 2
    assert resolve(None, {"model": "detr-r34"}).optimization == Recipe().optimization


def test_init_takes_all_weights_over(drawn: Path, run: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    _, model = build_model(tiny_recipe(init=str(run)).model, 3, notes)
    expected = load_model(run).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert len(notes) == 1
    kept = f"Start from {run}: {len(expected)} tensors kept"
    assert notes[0] == f"{kept}; frozen_stages 0 there and 2 here"  # one began from nothing, the other does not


def test_init_with_other_classes_starts_the_class_head_anew(run: Path, tmp_path: Path) -> None:
    _, model = build_model(tiny_recipe().model, 5, [])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = start_from(model, str(run))
    expected = load_model(run).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("class_head.") else expected[name]), name
    assert f"{len(expected) - 2} tensors kept, class head re-initialised (5 classes for 3: class_head." in said
    assert "class_head.weight, class_head.bias)" in said


def test_init_says_that_a_detector_leaves_the_mask_head_behind(tmp_path: Path) -> None:
    _, model = build_model(tiny_recipe().model, 3, [])
    segmenter, categories = Segmenter(model), tuple(Category(label, str(label)) for label in range(3))
    save_segmenter(tmp_path / "segmenter", segmenter, preset="", categories=categories)
    assert f"{len(model.state_dict())} tensors kept, its mask head's not among them" in start_from(
        model, str(tmp_path / "segmenter")
    )


def test_init_for_other_categories_of_the_same_number_starts_the_class_head_anew(run: Path) -> None:
    names = [category.name for category in load_model(run).categories]
    _, model = build_model(tiny_recipe().model, 3, [])
    assert "re-initialised" not in start_from(model, str(run), names)
    said = start_from(model, str(run), names[::-1])
    assert "class head re-initialised (for other categories: class_head.weight, class_head.bias)" in said


def test_the_number_of_classes_is_not_for_the_architecture_to_say() -> None:
    with pytest.raises(UsageError, match=r"does not take num_classes.*comes from the data"):
        build_model(tiny_recipe(architecture={"num_classes": "9"}).model, 3, [])


def test_init_from_another_architecture_names_fields_and_tensors(run: Path) -> None:
    _, model = build_model(tiny_recipe(architecture={"num_queries": "9"}).model, 3, [])
    with pytest.raises(ModelError, match=r"another architecture; got .*num_queries 8.*; query_position") as caught:
        start_from(model, str(run))
    assert "num_queries 9" in caught.value.expected
    assert "leave out --model and --architecture, or say: --model detr-nano --architecture" in caught.value.remedy
    assert " num_queries 8" in caught.value.remedy
    _, model = build_model(tiny_recipe(architecture={"decoder_layers": "1"}).model, 3, [])
    with pytest.raises(ModelError, match=r"decoder_layers 2.*; decoder.*\.1\.cross_attention.* and \d+ more"):
        start_from(model, str(run))


def test_init_from_another_variant_names_both(run: Path) -> None:
    other = next(name for name in models.names() if name != "detr")
    preset = next(iter(models.variant(other).PRESETS))
    model = models.build(preset, num_classes=3)
    with pytest.raises(ModelError, match=rf"another variant; got detr; expected {other}.*--model detr-nano"):
        start_from(model, str(run))


def test_init_brings_preset_and_architecture(run: Path) -> None:
    fields = {name: value for name, value in tiny(init=str(run)).items() if name not in ("model", "architecture")}
    recipe = resolve(None, fields)
    config = load_model(run).model.config
    assert recipe.model.model == "detr-nano"
    assert recipe.model.architecture["num_queries"] == "8"
    assert {"num_classes", "image_size", "longest"}.isdisjoint(recipe.model.architecture)
    _, model = build_model(recipe.model, 3, [])
    assert dataclasses.replace(model.config, num_classes=config.num_classes) == config
    assert resolve(recipe, {}) == recipe  # complete: nothing is looked up again


def test_init_brings_the_recipe_of_its_preset(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "detr-nano.toml").write_text('[model]\nmodel = "detr-nano"\n[optimization]\nepochs = 5\n')
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    alone = resolve(None, {"init": str(run)})
    assert alone.optimization.epochs == 5
    assert (alone.model.image_size, alone.model.longest) == (64, 96)  # the run's, not its preset's
    assert resolve(None, {"init": str(run), "image_size": 128}).model.longest == 0
    named = tmp_path / "mine.toml"
    named.write_text(f'[model]\ninit = "{run}"\n[optimization]\nepochs = 7\n')
    recipe = resolve(named, {"architecture": {"dropout": "0.3"}})
    assert (recipe.model.model, recipe.optimization.epochs) == ("detr-nano", 7)
    assert (recipe.model.architecture["dim"], recipe.model.architecture["dropout"]) == ("32", "0.3")


def test_a_size_that_is_given_scales_the_limit(run: Path) -> None:
    recipe = resolve(None, {"init": str(run), "image_size": 32})
    assert build_model(recipe.model, 3, [])[1].config.longest == 56  # the preset's proportion
    with pytest.raises(UsageError, match="longer side is below the shorter side; got longest 20"):
        build_model(tiny_recipe(image_size=64, longest=20).model, 3, [])


def test_one_source_of_weights_at_a_time(run: Path) -> None:
    with pytest.raises(UsageError, match="hold a backbone already"):
        build_model(tiny_recipe(init=str(run), backbone_weights="other.pth").model, 3, [])


def test_a_run_goes_on_without_the_weights_that_it_began_with(drawn: Path, run: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(run, tmp_path / "begun")
    fields = tiny(init=str(begun), epochs=2, seed=5)
    out = tmp_path / "next"

    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=out, on_event=stop, **fields)
    before = json.loads((out / "data.json").read_text())["notes"]
    shutil.rmtree(begun)
    detrkit.train(drawn, out=out, resume=True)
    after = json.loads((out / "data.json").read_text())["notes"]
    assert [note for note in after if note.startswith("Start from")] == [
        note for note in before if note.startswith("Start from")
    ]


def test_a_model_that_is_named_stays(run: Path) -> None:
    assert resolve(None, {"init": str(run), "model": "detr-r18"}).model.architecture == {}
    assert resolve(None, {}).model.model == recipes.DEFAULT_MODEL
    assert resolve(Recipe(), {"epochs": 2}).model.model == recipes.DEFAULT_MODEL


def test_a_run_started_from_another_says_so_and_trains(drawn: Path, run: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            notes.extend(event.notes)

    detrkit.train(drawn, out=tmp_path / "next", on_event=listen, **tiny(epochs=1, init=str(run)))
    assert any(note.startswith(f"Start from {run}") for note in notes)


def test_a_run_without_a_model_of_its_own_goes_on(drawn: Path, run: Path, tmp_path: Path) -> None:
    fields = {**tiny(epochs=1, init=str(run)), "model": "", "architecture": {}}
    detrkit.train(drawn, out=tmp_path / "next", **fields)
    assert load_model(tmp_path / "next").preset == "detr-nano"
    written = recipes.read(tmp_path / "next" / "recipe.toml")
    assert written.model.architecture["dim"] == "32"
    detrkit.train(drawn, out=tmp_path / "next", resume=True)


def test_sizes_of_images_are_the_recipes(drawn: Path) -> None:
    _, model = build_model(tiny_recipe(image_size=80, longest=0).model, 3, [])
    assert (model.config.image_size, model.config.longest) == (80, 140)  # in the preset's proportion, 256 to 448
    _, model = build_model(tiny_recipe(image_size=0, longest=300).model, 3, [])
    assert (model.config.image_size, model.config.longest) == (256, 300)


def test_evaluation_is_that_of_the_training(drawn: Path, run: Path) -> None:
    figures = detrkit.evaluate(run, drawn)
    told = load_model(run).about["metrics"]
    for name, value in told.items():
        assert math.isnan(figures[name]) if value is None else figures[name] == pytest.approx(value, abs=1e-9), name
    assert {"VOC07", "VOC12"} <= figures.keys()
    assert detrkit.evaluate(detrkit.load(run), drawn, split="valid") == pytest.approx(figures, nan_ok=True)
    train = evaluate_in_detail(run, drawn, split="train", batch_size=3)
    assert len(train.detections) == len(train.annotations) == 10


def test_evaluation_needs_a_split_and_a_common_category(drawn: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'"):
        detrkit.evaluate(run, drawn, split="test")
    data = write_coco(tmp_path / "data", {"val": [1, 2]})
    file = data / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"bolt"', '"a"').replace('"nut"', '"b"').replace('"washer"', '"c"'))
    with pytest.raises(DataError, match=r"knows none of the data set's categories.*data: a, b, c"):
        detrkit.evaluate(run, data)


def test_splits_without_a_common_category_are_refused_before_the_training(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2], "val": [1, 2]})
    file = data / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"bolt"', '"a"').replace('"nut"', '"b"').replace('"washer"', '"c"'))
    with pytest.raises(DataError):
        detrkit.train(data, out=tmp_path / "run", **tiny())
    assert not (tmp_path / "run").exists()
