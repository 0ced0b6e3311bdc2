"""Training that starts from weights of others: all but the class head is theirs, bit for bit, before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_keys import official_state
from torch import nn
from training.drawing import tiny, write_coco

import detrkit
from detrkit import convert, models
from detrkit.checkpoint import load_model, save_model
from detrkit.structures import Category
from detrkit.training.detection import DetectionSession
from detrkit.training.distributed import World
from detrkit.training.events import Event, Started
from detrkit.training.run import resolve
from detrkit.training.setup import prepare

pytestmark = pytest.mark.usefixtures("narrow", "plotless")

CLASSES = 5
SMALL: dict[str, Any] = {
    "num_classes": CLASSES,
    "backbone": "resnet18",
    "dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 32,
    "num_queries": 6,
}
CATEGORIES = tuple(Category(number, name) for number, name in enumerate("abcde"))


def trained(preset: str = "detr-r18", **fields: Any) -> nn.Module:
    """A model whose weights are those of no fresh one, whatever its seed."""
    model = models.build(preset, **{**SMALL, **fields})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(0.9).add_(0.001)
    return model


@pytest.fixture(scope="module")
def teacher(narrow: None) -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def places(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    torch.save({"model": official_state(teacher)}, root / "official.pth")
    convert.to_huggingface(teacher, root / "huggingface", categories=CATEGORIES)
    save_model(root / "ours", teacher, preset="detr-r18", categories=CATEGORIES)
    return {"official": root / "official.pth", "huggingface": root / "huggingface", "ours": root / "ours"}


def started(data: Path, init: Path, **fields: Any) -> DetectionSession:
    """The state before the first step, of a call that names no model."""
    own = {key: value for key, value in tiny(init=str(init), **fields).items() if key not in ("model", "architecture")}
    return prepare(resolve(None, own), data, World())


def taken(model: nn.Module, source: nn.Module) -> set[str]:
    """The names of the tensors that are the source's, bit for bit."""
    theirs = source.state_dict()
    return {
        name
        for name, tensor in model.state_dict().items()
        if name in theirs and torch.equal(tensor.contiguous(), theirs[name])
    }


@pytest.mark.parametrize("kind", ["official", "huggingface", "ours"])
def test_only_the_class_head_starts_anew(drawn: Path, places: dict[str, Path], teacher: nn.Module, kind: str) -> None:
    session = started(drawn, places[kind])
    names = set(session.model.state_dict())
    assert names - taken(session.model, teacher) == {"class_head.weight", "class_head.bias"}
    assert session.model.class_head.bias.shape == (4,)
    said = next(note for note in session.notes if note.startswith("Start from"))
    assert said.startswith(f"Start from {places[kind]}")
    assert f"{len(names) - 2} tensors kept, class head re-initialised (3 classes for {CLASSES}: class_head." in said


def test_the_same_categories_keep_their_head(drawn: Path, teacher: nn.Module, tmp_path: Path) -> None:
    model = trained(num_classes=3)
    categories = tuple(Category(number, name) for number, name in ((3, "bolt"), (7, "nut"), (12, "washer")))
    convert.to_huggingface(model, tmp_path / "huggingface", categories=categories)
    session = started(drawn, tmp_path / "huggingface")
    assert taken(session.model, model) == set(session.model.state_dict())
    torch.save(official_state(model), tmp_path / "official.pth")
    session = started(drawn, tmp_path / "official.pth")  # as many classes, but nobody knows which
    assert "class_head.weight" not in taken(session.model, model)


def test_a_new_head_of_the_focal_loss_starts_at_its_prior(drawn: Path, tmp_path: Path) -> None:
    model = trained("conditional-detr-r50")
    save_model(tmp_path / "ours", model, preset="conditional-detr-r50", categories=CATEGORIES)
    session = started(drawn, tmp_path / "ours")
    assert session.recipe.model.model == "conditional-detr-r50"
    fresh = models.build("conditional-detr-r50", **{**SMALL, "num_classes": 3})
    assert torch.equal(session.model.class_head.bias, fresh.class_head.bias)
    assert session.model.class_head.bias.max() < -4


def test_a_head_may_have_other_names(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("detr-r18", **SMALL)
    assert models.class_heads(model) == ("class_head.weight", "class_head.bias")
    monkeypatch.setattr(type(model), "class_heads", ("box_head", "class_head"), raising=False)
    assert set(models.class_heads(model)) == {name for name in model.state_dict() if "_head." in name}


@pytest.mark.parametrize("kind", ["official", "huggingface"])
def test_a_whole_training_from_weights_of_others(
    drawn: Path, places: dict[str, Path], teacher: nn.Module, tmp_path: Path, kind: str
) -> None:
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            notes.extend(event.notes)

    own = tiny(epochs=1, init=str(places[kind]), freeze="backbone", samples=0, limit=4)
    fields = {key: value for key, value in own.items() if key not in ("model", "architecture")}
    out = tmp_path / "run"
    detrkit.train(drawn, out=out, on_event=listen, **fields)
    saved = load_model(out)
    assert [category.name for category in saved.categories] == ["bolt", "nut", "washer"]
    kept = taken(saved.model, teacher)
    assert {name for name in saved.model.state_dict() if name.startswith("backbone.")} <= kept
    assert "projection.weight" not in kept
    assert any("(backbone frozen)" in note for note in notes)
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_other_classes_than_the_three(tmp_path: Path, places: dict[str, Path], teacher: nn.Module) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2], "val": [1]})
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] += [{"id": 20 + number, "name": f"more {number}"} for number in range(9)]
        file.write_text(json.dumps(content))
    session = started(data, places["ours"])
    assert session.model.class_head.bias.shape == (13,)
    assert len(session.model.state_dict()) - len(taken(session.model, teacher)) == 2
