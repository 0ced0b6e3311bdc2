"""A training on episodes, end to end: what a run leaves, how it goes on, and what it takes from other models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training.drawing import CATEGORIES, content, tiny, without_times, write_coco

import detrkit
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.one_shot.finder import Finder
from detrkit.one_shot.protocol import evaluate_one_shot
from detrkit.training.distributed import World
from detrkit.training.episode_recipe import EpisodeRecipe
from detrkit.training.episodes import EpisodeSession, prepare_episodes
from detrkit.training.events import Evaluated, Event, Saved, Step
from detrkit.training.recipe import read, revise
from detrkit.training.tasks import of_task
from detrkit.visualize.plots import plot_reliability

pytestmark = pytest.mark.usefixtures("plotless")


@pytest.fixture(scope="module", autouse=True)
def _no_reliability() -> Iterator[None]:
    """Leave that plot out, too, but where it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.episodes.plot_reliability", lambda curves, file: file)
        yield


def little(**fields: Any) -> dict[str, Any]:
    """Recipe fields of a training on episodes that takes two seconds."""
    return tiny(**{"look_width": 8, "cells": 2, "log_every": 1, **fields})


def train(data: Path, out: Path, **options: Any) -> detrkit.Run:
    return detrkit.train(data, out=out, task="one-shot", **options)


def session_of(data: Path, **fields: Any) -> EpisodeSession:
    return prepare_episodes(revise(EpisodeRecipe(), little(**fields)), data, World())


def lines_of(out: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in without_times(out) if line["event"] == event]


def notes_of(out: Path) -> str:
    return "\n".join(json.loads((out / "data.json").read_text())["notes"])


def stop_when(kind: type[Event], step: int = 0) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, kind) and (not step or (isinstance(event, Step) and event.step == step)):
            raise KeyboardInterrupt

    return listen


@pytest.fixture(scope="module")
def trained(plotless: None, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of one epoch; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(drawn, out, **little(epochs=1, unseen="washer"))
    return out


def test_the_packaged_recipe_fits_its_model() -> None:
    file = Path(detrkit.__file__).parent / "recipes" / "one-shot-conditional-nano.toml"
    recipe = read(file, of_task("", file))
    assert isinstance(recipe, EpisodeRecipe)
    _, config = detrkit.models.configure(recipe.model.model)
    assert config.num_queries
    with pytest.raises(UsageError, match="recipe of another task; got task = 'one-shot'"):
        detrkit.pretrain("images", out="run", recipe=file)


@pytest.mark.parametrize("model", ["detr-nano", "conditional-detr-nano"])
def test_a_one_shot_detector_is_trained_from_end_to_end(model: str, drawn: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    out = tmp_path / "run"
    run = train(drawn, out, on_event=seen.append, **little(model=model, turned=0.5, questions=2))
    steps, evaluated = lines_of(out, "step"), lines_of(out, "evaluated")
    assert {"loss", "class", "l1", "giou", "lr"} <= steps[0].keys()
    assert "class_error" not in steps[0]  # there is only one class
    assert [line["epoch"] for line in evaluated] == [1, 2]
    assert {"AP50_seen", "AP_seen"} <= evaluated[0].keys()
    assert run.figures["AP50_seen"] == max(line["AP50_seen"] for line in evaluated)
    told = next(event for event in seen if isinstance(event, Evaluated))
    assert told.headline == ("AP50_seen", "ece")
    for file in ("recipe.toml", "environment.json", "data.json", "status.json", "samples/epoch-0001.jpg"):
        assert (out / file).is_file(), file
    for folder in ("model", "checkpoints/best", "checkpoints/last"):
        assert (out / folder / "one_shot.safetensors").is_file(), folder
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    recipe = read(out / "recipe.toml", EpisodeRecipe())
    assert (recipe.episodes.turned, recipe.episodes.questions) == (0.5, 2)
    detector = run.load(device="cpu")
    assert detector.one_shot is not None
    assert detector.about is not None
    assert detector.about["one_shot"]["seen"] == ["bolt", "nut", "washer"]
    assert str(drawn) not in (out / "model" / "config.json").read_text()  # the model may go to others


def test_the_loaded_model_finds_what_the_session_found(drawn: Path, trained: Path) -> None:
    detector = detrkit.load(trained, device="cpu")
    session = session_of(drawn, unseen="washer")
    session.fill(trained / "model")
    model = session.model.eval()
    options = {"sizes": (64, 96), "seen": session.seen, "draws": 1}
    ours, theirs = (evaluate_one_shot(Finder(one), session.val, **options) for one in (model, detector.one_shot))
    for one, other in zip(ours.draws[0], theirs.draws[0], strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)  # the session's weights are laid out otherwise
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    figures = lines_of(trained, "evaluated")[-1]
    assert theirs.metrics.figures["AP50_seen"] == pytest.approx(figures["AP50_seen"])
    image = session.val.path(0)
    found = detector.find(image, session.val.boxes[0].tolist(), image, threshold=0.0)
    assert len(found)
    assert found.scores.max() <= 1


def test_what_is_learnt_is_a_function_of_the_seed(drawn: Path, trained: Path, tmp_path: Path) -> None:
    again = train(drawn, tmp_path / "again", **little(epochs=1, unseen="washer"))
    assert content(again.folder / "model") == content(trained / "model")
    other = train(drawn, tmp_path / "other", **little(epochs=1, unseen="washer", seed=1))
    assert content(other.folder / "model") != content(trained / "model")


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({"ema": 0.9, "accumulate": 2, "batch_size": 1, "turned": 0.5}, stop_when(Saved)),
        ({"workers": 1, "precision": "bf16", "architecture": {"dropout": "0.3"}}, stop_when(Step, 4)),
    ],
    ids=["after-an-epoch", "in-mid-epoch"],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    drawn: Path, tmp_path: Path, fields: dict[str, Any], stop: Callable[[Event], None]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fields = {**fields, "limit": 6}  # three steps an epoch
    train(drawn, whole, **little(**fields))
    with pytest.raises(KeyboardInterrupt):
        train(drawn, stopped, on_event=stop, **little(**fields))
    detrkit.train(drawn, out=stopped, resume=True)  # the run knows its task
    assert [line["step"] for line in lines_of(whole, "evaluated")] == [3, 6]
    for folder in ("checkpoints/last", "checkpoints/best", "model", "samples"):
        assert content(stopped / folder) == content(whole / folder), folder
    assert without_times(stopped) == without_times(whole)


def test_images_of_unseen_classes_are_left_out_of_training_and_stay_in_validation(drawn: Path, trained: Path) -> None:
    everything, session = session_of(drawn), session_of(drawn, unseen=" washer ,")
    assert session.seen == (0, 1)
    assert 2 in everything.train.labels
    assert 2 not in session.train.labels
    assert 2 in session.val.labels
    images = np.repeat(np.arange(len(everything.train)), np.diff(everything.train.offsets))
    holding = set(images[everything.train.labels == 2].tolist())
    assert len(session.train) == len(everything.train) - len(holding)
    kept = [name for index, name in enumerate(everything.train.file_names) if index not in holding]
    assert list(session.train.file_names) == kept
    assert f"{len(holding)} training images that hold such are left out" in notes_of(trained)
    figures = lines_of(trained, "evaluated")[-1]
    assert figures["AP50_unseen"] is not None
    assert detrkit.load(trained, device="cpu").about["one_shot"]["seen"] == ["bolt", "nut"]


def test_classes_that_cannot_be_unseen_are_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no such class to leave unseen; got 'wsher'.*bolt, nut.*Did you mean 'washer'"
    ):
        session_of(drawn, unseen="wsher")
    with pytest.raises(UsageError, match="Every class is to be unseen"):
        session_of(drawn, unseen="bolt,nut,washer")
    data = write_coco(tmp_path / "bolts", {"train": [2, 1, 3], "val": [1, 1]}, classes=1)
    with pytest.raises(DataError, match="Every training image holds a class that is to be unseen; got bolt"):
        session_of(data, unseen="bolt")
    with pytest.raises(DataError, match="No class is in two images"):
        session_of(write_coco(tmp_path / "one", {"train": [2], "val": [1, 1]}, classes=1))


def labelled(root: Path, **splits: Sequence[Sequence[int]]) -> Path:
    """A data set whose images hold boxes of these classes: bolt, nut, washer."""
    write_coco(root, {split: [len(labels) for labels in images] for split, images in splits.items()})
    for split, images in splits.items():
        file = root / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        for box, label in zip(document["annotations"], chain(*images), strict=True):
            box["category_id"] = CATEGORIES[label]["id"]
        file.write_text(json.dumps(document))
    return root


def test_seen_classes_are_known_by_name_where_the_validation_numbers_them_otherwise(tmp_path: Path) -> None:
    data = labelled(tmp_path / "data", train=[[0, 1], [0], [1, 2]], val=[[0, 2], [0, 1], [1, 2]])
    file = data / "annotations" / "instances_val.json"
    document = json.loads(file.read_text())
    document["categories"] = [{"id": 1, "name": "washer"}, *CATEGORIES[:2]]
    for box in document["annotations"]:
        box["category_id"] = 1 if box["category_id"] == CATEGORIES[2]["id"] else box["category_id"]
    file.write_text(json.dumps(document))
    session = session_of(data, unseen="washer")
    assert [category.name for category in session.val.categories] == ["washer", "bolt", "nut"]
    asked = session._asked()
    assert {one.name: one.seen for one in asked.metrics.per_class} == {"washer": False, "bolt": True, "nut": True}


def test_classes_without_a_box_in_training_are_unseen_too(tmp_path: Path) -> None:
    val = [[0, 1, 2], [0, 1, 2]]
    two = labelled(tmp_path / "two", train=[[0], [0, 1], [1]], val=val)
    session = session_of(two)
    assert session.seen == (0, 1)
    note = "Without a box in the training images, and so unseen, too: washer"
    assert note in session.notes
    assert session._about() == {"seen": ["bolt", "nut"]}
    # The only washer is in an image that is left out for the nut in it.
    beside = session_of(labelled(tmp_path / "beside", train=[[0], [0], [1, 2]], val=val), unseen="nut")
    assert beside.seen == (0,)
    assert note in beside.notes
    assert not any("Without a box" in line for line in session_of(two, unseen="washer").notes)
    file = two / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    for box in document["annotations"]:
        box["iscrowd"] = int(box["category_id"] == CATEGORIES[1]["id"])
    file.write_text(json.dumps(document))
    assert session_of(two).seen == (0,)  # a crowd shows no nut


def test_a_validation_that_can_ask_nothing_is_refused_before_the_training(tmp_path: Path) -> None:
    train_images = [[0, 1], [0, 1], [2]]
    single = labelled(tmp_path / "single", train=train_images, val=[[0], [1], [2]])
    said = r"Nothing can be asked of the validation images.*got 3 images, 3 boxes.*--val-limit 0.*fewer classes unseen"
    with pytest.raises(DataError, match=said):
        session_of(single)
    with pytest.raises(DataError, match="Nothing can be asked of the validation images"):
        train(single, tmp_path / "run", **little())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    apart = labelled(tmp_path / "apart", train=train_images, val=[[2], [2], [0], [0]])
    with pytest.raises(DataError, match="got 3 images, 3 boxes"):
        session_of(apart, unseen="washer", val_limit=3)  # only washers are in two of them
    assert session_of(apart, unseen="washer").seen == (0, 1)
    assert session_of(apart, val_limit=3).seen == (0, 1, 2)


def test_validation_is_of_the_first_images(drawn: Path) -> None:
    assert len(session_of(drawn, val_limit=2).val) == 2
    assert len(session_of(drawn, val_limit=0).val) == len(session_of(drawn).val) == 3


def test_the_loss_asks_for_what_is_shown_and_nothing_else(drawn: Path) -> None:
    session = session_of(drawn, questions=3, architecture={"dropout": "0.0"})
    from detrkit.data.order import EpochBatches

    (loaded,) = session.batches(EpochBatches(session.count, 2, 0, total_steps=1))
    session.model.train()
    plain = session.losses(session.model, loaded.batch, (5.0,))
    assert torch.isnan(plain.class_error).all()
    shuffled = loaded.batch._replace(
        targets=tuple(target._replace(boxes=target.boxes / 2) for target in loaded.batch.targets)
    )
    assert session.losses(session.model, shuffled, (5.0,)).total != plain.total
    assert list(session.names(loaded.batch)) == list(loaded.batch.names)
    assert session.counts(loaded.batch) == (sum(len(target.boxes) for target in loaded.batch.targets),)
    spread = session.losses(session.model, loaded.batch, (10.0,))
    torch.testing.assert_close(spread.values[1:], plain.values[1:] / 2)


@pytest.fixture(scope="module")
def pretrained(plotless: None, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pre-training of one epoch; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    more = {"val_fraction": 0.25, "patches": 3, "patch_size": 32, "shortest": 0, "multi_scale": False, "epochs": 1}
    detrkit.pretrain(drawn / "train", out=out, **tiny(**more, train_backbone=True))
    return out


@pytest.mark.parametrize("start", ["pretrained", "tokens", "nothing"])
def test_what_a_pretraining_learnt_is_taken_over(drawn: Path, pretrained: Path, start: str) -> None:
    heads = load_file(pretrained / "model" / "pretext.safetensors")
    session = session_of(drawn, init=str(pretrained), start=start)
    projection = session.model.exemplar_projection
    notes = "\n".join(session.notes)
    assert torch.equal(projection.weight, heads["patch_projection.weight"]) == (start == "pretrained")
    assert torch.equal(projection.bias, heads["patch_projection.bias"]) == (start == "pretrained")
    assert ("as patches were in the pre-training" in notes) == (start == "pretrained")
    if start == "nothing":
        assert not projection.weight.any()
        assert not projection.bias.any()
    if start == "tokens":
        own = session.model.detector.projection
        torch.testing.assert_close(projection.weight, 4 * own.weight[:, :, 0, 0])


def test_a_training_goes_on_from_another_and_says_so(drawn: Path, trained: Path) -> None:
    learnt = load_file(trained / "model" / "one_shot.safetensors")
    session = session_of(drawn, init=str(trained))
    assert "finding by example is kept, too" in "\n".join(session.notes)
    state = session.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in learnt.items())
    other = session_of(drawn, init=str(trained), look_width=4)
    assert "of another make, and begins anew" in "\n".join(other.notes)


def test_a_damaged_start_is_an_error_and_no_new_beginning(drawn: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    file = folder / "one_shot.safetensors"
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], b"nothing"):
        file.write_bytes(broken)
        with pytest.raises(ModelError, match=r"one_shot\.safetensors.*cannot be read"):
            session_of(drawn, init=str(folder))
    file.unlink()
    with pytest.raises(ModelError, match=r"one_shot\.safetensors"):
        session_of(drawn, init=str(folder))
    file.write_bytes(content)
    assert "finding by example is kept, too" in "\n".join(session_of(drawn, init=str(folder)).notes)


def test_a_detector_is_trained_on_what_finds_by_example(drawn: Path, trained: Path, tmp_path: Path) -> None:
    tuned = detrkit.train(drawn, out=tmp_path / "tuned", **tiny(init=str(trained), epochs=1)).load(device="cpu")
    assert tuned.one_shot is None
    assert [category.name for category in tuned.categories] == ["bolt", "nut", "washer"]
    assert isinstance(tuned.predict(drawn / "val" / "000.png", threshold=0.0).scores, np.ndarray)


def test_an_unreadable_training_image_is_told(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2, 1, 2], "val": [1, 1, 1]}, classes=1)
    (data / "train" / "001.png").write_bytes(b"broken" * 10)
    train(data, tmp_path / "run", **little(epochs=1))
    assert "001.png" in (tmp_path / "run" / "replaced.jsonl").read_text()


def test_scores_that_cannot_be_calibrated_are_told(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(found):
        raise UsageError("No detection is right, so there is nothing to calibrate on")

    monkeypatch.setattr("detrkit.training.episodes.calibrate", refuse)
    run = train(drawn, tmp_path / "run", **little(epochs=1, limit=4))
    (evaluated,) = lines_of(run.folder, "evaluated")
    assert "Scores are not calibrated: no detection is right" in " ".join(evaluated["notes"])
    assert "ece" not in evaluated
    assert run.load(device="cpu").calibration == (1.0, 0.0)


def test_honest_scores_are_kept_and_plotted(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detrkit.training.episodes.plot_reliability", plot_reliability)
    run = train(drawn, tmp_path / "run", **little(epochs=1, limit=4, lr=0.0, backbone_lr=0.0))
    (evaluated,) = lines_of(run.folder, "evaluated")
    told = run.load(device="cpu").about["one_shot"]["calibration"]
    assert told["temperature"] > 0
    assert 0 <= evaluated["ece"] <= 1
    assert 0 <= evaluated["ece_before"] <= 1
    assert (run.folder / "plots" / "reliability.png").is_file()


def test_predictions_that_are_no_numbers_name_the_images(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"train.\d\d\d\.png"):
        train(drawn, tmp_path / "run", **little(lr=1e30, backbone_lr=1e30, clip=0.0, epochs=9))


def test_tasks_and_fields_that_do_not_exist_are_refused(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="no such task; got 'two-shot'; expected one of detection, one-shot"):
        detrkit.train(drawn, out=out, task="two-shot")
    with pytest.raises(UsageError, match=r"no such field; got 'question'. Did you mean 'questions'"):
        train(drawn, out, question=3)
    with pytest.raises(UsageError, match="no such field; got 'questions'"):
        detrkit.train(drawn, out=out, questions=3)
    with pytest.raises(UsageError, match="turned"):
        train(drawn, out, turned=1.5)
    assert not out.exists()
    assert isinstance(of_task("one-shot"), EpisodeRecipe)
    assert isinstance(of_task("", EpisodeRecipe()), EpisodeRecipe)


PACKAGED = sorted((Path(detrkit.__file__).parent / "recipes").glob("one-shot*.toml"))


@pytest.mark.parametrize("file", PACKAGED, ids=lambda file: file.stem)
def test_packaged_recipes_are_of_the_task(file: Path) -> None:
    recipe = read(file, of_task("", file))
    assert isinstance(recipe, EpisodeRecipe)
    assert recipe.model.model in detrkit.models.presets()


def test_images_turned_by_their_file_are_answered_upright(tmp_path: Path, drawn: Path, trained: Path) -> None:
    picture = Image.open(drawn / "val" / "000.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    detector = detrkit.load(trained, device="cpu")
    box = (10.0, 10.0, 40.0, 40.0)
    plain, turned = (
        detector.find(name, box, name, threshold=0.0) for name in (drawn / "val" / "000.png", tmp_path / "turned.png")
    )
    assert turned.image_size == plain.image_size
    np.testing.assert_allclose(turned.boxes, plain.boxes, atol=1e-3)
    np.testing.assert_allclose(turned.scores, plain.scores, atol=1e-5)
