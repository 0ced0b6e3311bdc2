"""Pre-training without labels, end to end: what a run leaves, how it goes on, and what a training takes from it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from training.drawing import content, tiny, without_times

import detrkit
from detrkit import models
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.nn.backbone import build_backbone
from detrkit.pretrain.up_detr import UpDetr
from detrkit.training.distributed import World
from detrkit.training.events import Evaluated, Event, Saved, Started
from detrkit.training.patches import prepare_patches
from detrkit.training.pretext import TASKS, BackboneRecipe, PatchRecipe, of_task
from detrkit.training.recipe import read, revise, task_of, to_toml
from detrkit.training.views import prepare_backbone

pytestmark = pytest.mark.usefixtures("plotless")

NOWHERE = Path("nowhere")  # a run folder, in which sessions of crops keep nothing


def little(**fields: Any) -> dict[str, Any]:
    """Recipe fields of a pre-training that takes a second; the backbone trains."""
    more = {"val_fraction": 0.25, "patches": 3, "patch_size": 32, "shortest": 0, "multi_scale": False}
    return tiny(**{**more, "train_backbone": True, **fields})


def little_backbone(**fields: Any) -> dict[str, Any]:
    """The same of a backbone alone."""
    return tiny(**{"val_fraction": 0.5, "view_size": 32, "width": 16, "batch_size": 4, **fields})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of coarse coloured noise."""
    folder, rng = tmp_path_factory.mktemp("drawn") / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 64)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for the backbone, which may be frozen then."""
    file = tmp_path_factory.mktemp("weights") / "resnet-nano.safetensors"
    backbone = build_backbone("resnet-nano")
    backbone.initialise(torch.Generator().manual_seed(1))
    save_file(backbone.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def pretrained(plotless: None, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pre-training of two epochs; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    detrkit.pretrain(images, out=out, **little())
    return out


def notes_of(out: Path) -> str:
    return "\n".join(json.loads((out / "data.json").read_text())["notes"])


def lines_of(out: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in without_times(out) if line["event"] == event]


def test_the_public_function_shows_what_it_takes() -> None:
    assert list(inspect.signature(detrkit.pretrain).parameters)[:2] == ["images", "out"]


@pytest.mark.parametrize("model", ["detr-nano", "conditional-detr-nano"])
def test_a_detector_is_pretrained_from_end_to_end(model: str, images: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    out = tmp_path / "run"
    run = detrkit.pretrain(images, out=out, on_event=seen.append, **little(model=model))
    steps, evaluated = lines_of(out, "step"), lines_of(out, "evaluated")
    count = json.loads((out / "data.json").read_text())["splits"]["val"]["images"]
    assert {"loss", "class", "l1", "giou", "feature", "lr"} <= steps[0].keys()
    assert "class_error" not in steps[0]  # there is only one class
    assert [line["epoch"] for line in evaluated] == [1, 2]
    assert {"recall50", "recall75", "consistency", "box_spread", "feature_spread"} <= evaluated[0].keys()
    assert evaluated[-1]["conclusion"] == run.sentence
    assert f"n {count} held-out image" in run.sentence
    assert run.alarms == tuple(evaluated[-1].get("notes", ()))
    assert run.figures["recall50"] == max(line["recall50"] for line in evaluated)
    told = next(event for event in seen if isinstance(event, Evaluated))
    assert told.headline == ("recall50", "recall75", "consistency")
    assert run.page is not None
    assert "held-out images" in run.page.read_text().lower()
    detector = detrkit.load(out, device="cpu")
    assert [category.name for category in detector.categories] == ["patch"]
    assert detector.about is not None
    assert detector.about["pretext"]["images"] == 12 - count
    assert str(images) not in (out / "model" / "config.json").read_text()  # the model may go to others
    assert read(out / "recipe.toml", PatchRecipe()).pretext.patches == 3


def test_the_task_is_found_again_as_it_was(pretrained: Path) -> None:
    before = torch.get_rng_state()
    task = UpDetr.load(pretrained).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert (task.patches, task.mask_out, task.place) == (3, 0.1, "position")
    assert any(parameter.requires_grad for parameter in task.detector.backbone.parameters())
    heads = load_file(pretrained / "model" / "pretext.safetensors")
    assert sorted(heads) == sorted(name for name in task.state_dict() if not name.startswith("detector."))
    assert all(torch.equal(task.state_dict()[name], tensor) for name, tensor in heads.items())
    detector = detrkit.load(pretrained, device="cpu")
    assert same(task.detector, detector.model)


def same(one: nn.Module, other: nn.Module) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_model_that_was_not_pretrained_holds_no_task(drawn: Path, pretrained: Path, tmp_path: Path) -> None:
    detrkit.train(drawn, out=tmp_path / "run", **tiny(epochs=1))
    with pytest.raises(ModelError, match="no pre-training of UP-DETR"):
        UpDetr.load(tmp_path / "run")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (pretrained / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "pretext.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"pretext\.safetensors: The weights cannot be read"):
        UpDetr.load(broken)
    config = json.loads((broken / "config.json").read_text())
    config["about"]["pretext"]["options"] = {"patchs": 3}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"options of the pre-training cannot be understood.*patchs"):
        UpDetr.load(broken)


def test_a_training_starts_from_it_with_a_class_head_of_its_own(drawn: Path, pretrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    fields = tiny(epochs=1, init=str(pretrained))
    for name in ("model", "architecture", "image_size", "longest", "backbone_weights"):
        del fields[name]
    detrkit.train(drawn, out=out, **fields)
    model = detrkit.load(out, device="cpu")
    assert len(model.categories) == 3
    notes = notes_of(out)
    assert f"Start from {pretrained}" in notes
    assert "class head re-initialised (3 classes for 1" in notes
    assert not (out / "model" / "pretext.safetensors").exists()
    assert "pretext" not in (model.about or {})


def test_a_pretraining_starts_from_another_with_its_heads(images: Path, pretrained: Path, tmp_path: Path) -> None:
    fields = little(init=str(pretrained), lr=0.0, backbone_lr=0.0, weight_decay=0.0, epochs=1)
    del fields["backbone_weights"]
    run = detrkit.pretrain(images, out=tmp_path / "same", **fields)
    assert "heads of the pretext task are kept" in notes_of(run.folder)
    assert same(UpDetr.load(run.folder), UpDetr.load(pretrained / "model"))
    other = detrkit.pretrain(images, out=tmp_path / "other", **{**fields, "reconstruction_weight": 0.0})
    assert "begin anew" in notes_of(other.folder)
    assert UpDetr.load(other.folder).reconstruction_head is None


def interrupt_at(kind: type[Event]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, kind):
            raise KeyboardInterrupt

    return listen


@pytest.fixture(scope="module")
def kept_fields(weights: Path) -> dict[str, Any]:
    return little(train_backbone=False, backbone_weights=str(weights), ema=0.9, mask_out=0.4, samples=0)


@pytest.fixture(scope="module")
def whole(plotless: None, images: Path, kept_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pre-training that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    detrkit.pretrain(images, out=out, **kept_fields)
    return out


@pytest.mark.parametrize("kind", [Evaluated, Saved])  # the checkpoint of before the evaluation, and of after it
def test_a_run_goes_on_exactly(
    kind: type[Event], images: Path, kept_fields: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        detrkit.pretrain(images, out=stopped, on_event=interrupt_at(kind), **kept_fields)
    seen: list[Event] = []
    run = detrkit.pretrain(images, out=stopped, resume=True, on_event=seen.append)
    started = seen[0]
    assert isinstance(started, Started)
    assert (started.step, started.pending) == (started.total_steps // 2, kind is Evaluated)
    for checkpoint in ("checkpoints/last", "checkpoints/best", "model"):
        assert content(stopped / checkpoint) == content(whole / checkpoint)
    assert without_times(stopped) == without_times(whole)
    assert run.sentence == lines_of(whole, "evaluated")[-1]["conclusion"]
    assert "Backbone resnet-nano: " in notes_of(stopped)  # what the run began with


def test_a_frozen_backbone_stays_and_gets_no_rate(images: Path, weights: Path, tmp_path: Path) -> None:
    fields = little(train_backbone=False, backbone_weights=str(weights))
    given = (folder for folder in [images])  # it can be gone through once
    out = detrkit.pretrain(given, out=tmp_path / "run", **{**fields, "samples": 0}).folder
    kept, began = load_file(out / "model" / "model.safetensors"), load_file(weights)
    names = [name.removeprefix("backbone.") for name in kept if name.startswith("backbone.")]
    assert names
    assert all(torch.equal(kept[f"backbone.{name}"], began[name]) for name in names)
    session = prepare_patches(revise(PatchRecipe(), fields), images, World(), NOWHERE)
    assert [group["lr"] for group in session.optimizer.param_groups] == [1e-3]
    fields = {**fields, "train_backbone": True, "backbone_lr": 1e-4}
    session = prepare_patches(revise(PatchRecipe(), fields), images, World(), NOWHERE)
    assert [group["lr"] for group in session.optimizer.param_groups] == [1e-3, 1e-4]
    count = sum(parameter.requires_grad for parameter in session.model.detector.backbone.parameters())
    assert 0 < count == len(session.optimizer.param_groups[1]["params"])
    frozen = prepare_patches(revise(PatchRecipe(), {**fields, "freeze": "decoder"}), images, World(), NOWHERE).model
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if name.startswith("detector.decoder"))


@pytest.mark.parametrize("how", [{"train_backbone": False}, {"backbone_lr": 0.0}, {"freeze": "backbone"}])
def test_a_backbone_that_would_see_nothing_is_refused(how: dict[str, Any], images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"starts at random and does not train.*--task backbone.*--train-backbone"):
        detrkit.pretrain(images, out=tmp_path / "run", **little(**how))
    assert not (tmp_path / "run").exists()


def test_folders_and_recipes_that_are_none(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="no such file or folder"):
        detrkit.pretrain(tmp_path / "nowhere", out=out, **little())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image here"):
        detrkit.pretrain(tmp_path / "empty", out=out, **little())
    with pytest.raises(DataError, match="One image cannot be divided"):
        detrkit.pretrain(images / "00.png", out=out, **little())
    with pytest.raises(UsageError, match="Some images must be held out"):
        detrkit.pretrain(images, out=out, **little(val_fraction=0.0))
    with pytest.raises(UsageError, match="no such task; got 'jigsaw'; expected one of up-detr, backbone"):
        detrkit.pretrain(images, out=out, task="jigsaw")
    with pytest.raises(UsageError, match=r"no such field; got 'patchs'. Did you mean 'patches'"):
        detrkit.pretrain(images, out=out, patchs=3)
    with pytest.raises(UsageError, match="Every group needs a query"):
        detrkit.pretrain(images, out=out, **little(patches=9))
    (tmp_path / "views.toml").write_text(to_toml(BackboneRecipe()))
    with pytest.raises(UsageError, match="recipe of another task; got task = 'backbone'"):
        detrkit.pretrain(images, out=out, recipe=tmp_path / "views.toml", task="up-detr")
    with pytest.raises(UsageError, match="recipe of another task; got task = 'backbone'; expected no task"):
        detrkit.train(images, out=out, recipe=tmp_path / "views.toml")
    assert not out.exists()


def test_other_images_end_a_run(images: Path, pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "fewer").mkdir()
    for file in sorted(images.iterdir())[:-2]:
        (tmp_path / "fewer" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="begun with other data"):
        detrkit.pretrain(tmp_path / "fewer", out=pretrained, resume=True)


def test_images_that_cannot_be_read_are_told_and_counted(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in images.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = little(val_fraction=0.5)
    session = prepare_patches(revise(PatchRecipe(), fields), folder, World(), NOWHERE)
    pictures = session.train.pictures, session.val.pictures
    broken = [Path(part.name(index)) for part, index in zip(pictures, (1, 0), strict=True)]
    for file in broken:
        file.write_bytes(b"broken" * 10)
    run = detrkit.pretrain(folder, out=tmp_path / "run", **fields)
    assert run.problems == (f"1 of {session.count} training images could not be used; replaced.jsonl names them",)
    assert str(broken[0]) in (run.folder / "replaced.jsonl").read_text()
    (told,) = [note for note in run.alarms if note.startswith("Held-out images")]
    assert f"1 of {len(session.val)}" in told
    assert str(broken[1]) in told
    assert f"n {len(session.val) - 1} held-out image" in run.sentence


def test_limits_take_images_from_everywhere(images: Path) -> None:
    recipe = revise(PatchRecipe(), little(val_fraction=0.5, limit=3, val_limit=2))
    session = prepare_patches(recipe, images, World(), NOWHERE)
    everything = prepare_patches(revise(recipe, {"limit": 0, "val_limit": 0}), images, World(), NOWHERE)
    for part, whole, count in ((session.train, everything.train, 3), (session.val, everything.val, 2)):
        names = [Path(whole.pictures.name(index)).name for index in range(len(whole))]
        chosen = [Path(part.pictures.name(index)).name for index in range(len(part))]
        assert len(chosen) == count < len(names)
        assert (chosen[0], chosen[-1]) == (names[0], names[-1])


def test_images_have_the_size_that_the_recipe_says(images: Path) -> None:
    paper = prepare_patches(revise(PatchRecipe(), little(shortest=480, multi_scale=True)), images, World(), NOWHERE)
    assert (min(paper.train.resizing.sizes), max(paper.train.resizing.sizes)) == (320, 480)
    assert paper.train.resizing.longest == 600
    assert paper.model.detector.config.image_size == 64  # what it is kept for
    own = prepare_patches(revise(PatchRecipe(), little(flip=0.5, crops="stratified")), images, World(), NOWHERE)
    assert (own.train.resizing.sizes, own.train.resizing.longest) == ((64,), 96)
    assert own.train.resizing.flip == 0.5
    assert type(own.train.crops).__name__ == "StratifiedCrops"
    assert own.val.augmentation.jitter == 0.0 < own.train.augmentation.jitter


def test_predictions_that_are_no_numbers_name_the_images(images: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"images.\d\d\.png"):
        detrkit.pretrain(images, out=tmp_path / "run", **little(lr=1e30, backbone_lr=1e30, clip=0.0, epochs=9))


def test_a_backbone_is_trained_and_a_detector_on_it(images: Path, drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = detrkit.pretrain(images, out=out, task="backbone", **little_backbone())
    step, evaluated = lines_of(out, "step")[0], lines_of(out, "evaluated")
    assert {"loss", "invariance", "redundancy"} <= step.keys()
    assert {"retrieval", "chance", "feature_rank", "feature_spread"} <= evaluated[0].keys()
    assert run.sentence == evaluated[-1]["conclusion"]
    assert run.page is None
    with pytest.raises(ModelError, match=r"This is a backbone without a detector.*resnet-nano.*--backbone-weights"):
        detrkit.load(out)
    tuned = detrkit.train(drawn, out=tmp_path / "tuned", **tiny(backbone_weights=str(out), epochs=1, backbone_lr=0.0))
    kept = load_file(tuned.folder / "model" / "model.safetensors")
    began = load_file(out / "model" / "backbone.safetensors")
    assert began
    assert all(torch.equal(kept[f"backbone.{name}"], tensor) for name, tensor in began.items())
    assert str(out / "model" / "backbone.safetensors") in notes_of(tuned.folder)


def test_a_backbone_goes_on_exactly(images: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fields = little_backbone(ema=0.9)
    detrkit.pretrain(images, out=whole, task="backbone", **fields)
    with pytest.raises(KeyboardInterrupt):
        detrkit.pretrain(images, out=stopped, task="backbone", on_event=interrupt_at(Saved), **fields)
    detrkit.pretrain(images, out=stopped, resume=True)  # the run knows its task
    for checkpoint in ("checkpoints/last", "checkpoints/best"):
        assert content(stopped / checkpoint) == content(whole / checkpoint)
    assert without_times(stopped) == without_times(whole)


def test_a_single_image_has_nothing_to_be_compared_with(images: Path) -> None:
    with pytest.raises(UsageError, match="compared between images"):
        prepare_backbone(revise(BackboneRecipe(), little_backbone(batch_size=1)), images, World(), NOWHERE)
    with pytest.raises(DataError, match=r"at least 2 held-out images.*Raise val_fraction"):
        prepare_backbone(revise(BackboneRecipe(), little_backbone(val_fraction=0.01)), images, World(), NOWHERE)


def test_the_weights_of_every_backbone_are_taken_again(tmp_path: Path) -> None:
    from detrkit.checkpoint import save_backbone
    from detrkit.nn.weights import load_backbone_weights

    for name in ("resnet-nano", "resnet18", "mobilenet_v2", "mobilenet_v2_torchvision"):
        backbone, again = build_backbone(name), build_backbone(name)
        backbone.initialise(torch.Generator().manual_seed(0))
        again.initialise(torch.Generator().manual_seed(1))
        save_backbone(tmp_path / name, backbone, name, preset="")
        load_backbone_weights(again, name, tmp_path / name)
        assert same(again, backbone)


PACKAGED = sorted((Path(detrkit.__file__).parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", [file for file in PACKAGED if task_of(file) in TASKS], ids=lambda file: file.stem)
def test_packaged_recipes_fit_their_models(file: Path) -> None:
    recipe = read(file, of_task("", file))
    variant, config = models.configure(recipe.model.model, **recipe.model.architecture)
    if isinstance(recipe, PatchRecipe):
        assert recipe.pretext.patches <= config.num_queries
        assert variant.Model(config).config.num_queries == config.num_queries
    assert "detrkit pretrain IMAGES" in file.read_text()


def test_the_defaults_are_those_of_the_paper() -> None:
    file = next(file for file in PACKAGED if file.stem == "up-detr")
    fields = {"model": "detr-r50", "architecture": {"pre_norm": "true"}}
    assert read(file, PatchRecipe()) == revise(PatchRecipe(), fields)
    tuned = read(next(file for file in PACKAGED if file.stem == "up-detr-r50-finetune-150"))
    assert (tuned.optimization.backbone_lr, tuned.optimization.drop_at * tuned.optimization.epochs) == (5e-5, 100)
    assert tuned.model.architecture == fields["architecture"]  # what differs would not fit


PROGRAM = """
import json, os, sys
import torch
import detrkit
from detrkit.training import log
from detrkit.training.recipe import read
from detrkit.training.pretext import of_task

torch.set_num_threads(1)
images, out, recipe, task = sys.argv[1:]
log.plot_history = lambda lines, out: out
run = detrkit.pretrain(images, out=out, recipe=recipe, task=task)
with open(f"{out}.{os.environ['RANK']}.json", "w") as file:
    json.dump({"figures": run.figures, "sentence": run.sentence}, file)
"""


@pytest.mark.parametrize(("task", "shown"), [("up-detr", "crops"), ("up-detr", "features"), ("backbone", "")])
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_pretrain_together(task: str, shown: str, images: Path, weights: Path, tmp_path: Path) -> None:
    """Finding patches, they train as one does on the same global batch; views are compared in each for itself."""
    still = {"lr": 1e-4, "backbone_lr": 1e-4, "architecture": {"dropout": "0.0"}}
    fields = little(**still, mask_out=0.0) if task == "up-detr" else little_backbone(**still)
    if shown == "features":  # focal: a softmax weighs the regions of each process by their own number
        asked = {"model": "conditional-detr-nano", "backbone_weights": str(weights), "train_backbone": False}
        fields = {**fields, **asked, "shown": shown, "regions_weight": 1.0, "flip": 0.5}
    recipe, program, out = tmp_path / "recipe.toml", tmp_path / "program.py", tmp_path / "two"
    recipe.write_text(to_toml(revise(of_task(task), {**fields, "batch_size": 2})))
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        [*command, str(images), str(out), str(recipe), task],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=220,
    )
    reports = [out.with_name(f"two.{rank}.json") for rank in range(2)]
    assert all(report.exists() for report in reports), done.stderr[-4000:]
    first, second = (json.loads(report.read_text()) for report in reports)
    assert first == second
    assert first["sentence"]
    one = detrkit.pretrain(images, out=tmp_path / "one", task=task, **{**fields, "batch_size": 4})
    ours, theirs = lines_of(out, "evaluated"), lines_of(one.folder, "evaluated")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    if task == "up-detr":
        assert ("region_iou" in theirs[-1]) == (shown == "features")
        for name, value in theirs[-1].items():
            if isinstance(value, float):
                assert ours[-1][name] == pytest.approx(value, abs=2e-3)
        weights = [load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (out, one.folder)]
        assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5


def test_the_package_is_the_function_in_either_order() -> None:
    program = (
        "import sys, detrkit\n"
        "assert callable(detrkit.pretrain), 'first use'\n"
        "assert 'torch' not in sys.modules, 'it costs nothing'\n"
        "import detrkit.pretrain.up_detr\n"
        "assert callable(detrkit.pretrain) and detrkit.pretrain.up_detr.UpDetr\n"
        "for name in [name for name in sys.modules if name.startswith('detrkit')]: del sys.modules[name]\n"
        "import detrkit.pretrain.figures\n"
        "from detrkit import pretrain\n"
        "assert callable(pretrain) and pretrain is detrkit.pretrain\n"
        "try: pretrain('nowhere', out='nowhere either', backbone_weights='random', train_backbone=True, shown='crops',"
        " regions_weight=0.0)\n"
        "except detrkit.DataError as error: assert 'nowhere' in str(error)\n"
        "else: raise AssertionError('it was not called')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
