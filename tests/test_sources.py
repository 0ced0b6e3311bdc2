"""Models from wherever they lie, and what is said where none lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_keys import official_segmentation_state, official_state
from torch import nn

import detrkit
from detrkit import convert, models, sources
from detrkit.checkpoint import save_model
from detrkit.errors import ModelError
from detrkit.segmentation.model import Segmenter
from detrkit.sources import architecture_of, differences, open_model, unnamed
from detrkit.structures import Category

pytestmark = pytest.mark.usefixtures("narrow")

CATEGORIES = tuple(Category(number, name) for number, name in enumerate(("ant", "bee", "wasp")))
SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "dim": 32,
    "heads": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward": 32,
    "num_queries": 5,
}


def build(**fields: Any) -> Any:
    return models.build("detr-r18", **{"num_classes": 3, **SMALL, **fields})


@pytest.fixture(scope="module")
def model(narrow: None) -> nn.Module:
    return build()


def same(model: nn.Module, other: nn.Module) -> bool:
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def places(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as each kind of source."""
    root = tmp_path_factory.mktemp("places")
    save_model(root / "ours", model, preset="detr-r18", categories=CATEGORIES, about={"epoch": 3})
    save_model(root / "run" / "model", model, preset="detr-r18", categories=CATEGORIES)
    state = official_state(model)
    torch.save({"model": state, "epoch": 9}, root / "official.pth")
    (root / "lone").mkdir()
    torch.save(state, root / "lone" / "weights.pth")
    convert.to_huggingface(model, root / "huggingface", categories=CATEGORIES)
    return {
        "ours": root / "ours",
        "run": root / "run",
        "file of ours": root / "ours" / "model.safetensors",
        "official": root / "official.pth",
        "lone": root / "lone",
        "huggingface": root / "huggingface",
        "file of huggingface": root / "huggingface" / "model.safetensors",
    }


@pytest.mark.parametrize(
    ("kind", "origin", "names"),
    [
        ("ours", "", ["ant", "bee", "wasp"]),
        ("run", "", ["ant", "bee", "wasp"]),
        ("file of ours", "", ["ant", "bee", "wasp"]),
        ("official", "official DETR", ["class-0", "class-1", "class-2"]),
        ("lone", "official DETR", ["class-0", "class-1", "class-2"]),
        ("huggingface", "Hugging Face DetrForObjectDetection", ["ant", "bee", "wasp"]),
        ("file of huggingface", "Hugging Face DetrForObjectDetection", ["ant", "bee", "wasp"]),
    ],
)
def test_every_kind_of_source(
    places: dict[str, Path], model: nn.Module, kind: str, origin: str, names: list[str]
) -> None:
    saved = open_model(places[kind])
    assert same(saved.model, model)
    assert (saved.variant, saved.origin) == ("detr", origin)
    assert [category.name for category in saved.categories] == names
    assert bool(saved.report) is bool(origin)
    assert same(open_model(str(places[kind])).model, model)


def test_a_detector_is_loaded_from_weights_of_others(places: dict[str, Path]) -> None:
    picture = np.full((40, 60, 3), 90, np.uint8)
    expected = detrkit.load(places["ours"], device="cpu").predict(picture, threshold=0.0)
    detector = detrkit.load(places["huggingface"], device="cpu")
    found = detector.predict(picture, threshold=0.0)
    assert found.names == expected.names
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    assert detector.about == {"converted_from": "Hugging Face DetrForObjectDetection"}


def test_a_mask_head_is_opened_with_its_detector(tmp_path: Path) -> None:
    segmenter = Segmenter(build())
    torch.save({"model": official_segmentation_state(segmenter)}, tmp_path / "official.pth")
    saved = open_model(tmp_path / "official.pth")
    assert saved.segmenter is not None
    assert saved.segmenter.detector is saved.model
    assert same(saved.segmenter, segmenter)


def test_the_labels_of_panoptic_coco_have_their_names_and_stuff_is_known() -> None:
    table = unnamed(250)
    assert (table[1], table[12], table[92]) == (
        *(Category(1, "person"), Category(12, "unused-12"), Category(92, "banner", is_thing=False)),
    )
    assert (len(table), sum(not category.is_thing for category in table)) == (250, 53)
    assert table[200].name == "rug-merged"


def test_the_labels_of_coco_have_their_names(tmp_path: Path) -> None:
    torch.save(official_state(build(num_classes=91)), tmp_path / "coco.pth")
    names = [category.name for category in open_model(tmp_path / "coco.pth").categories]
    assert (len(names), names[0], names[1], names[12], names[90]) == (
        (91, "unused-0", "person", "unused-12", "toothbrush")
    )


@pytest.fixture
def hubbed(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that has each place as `me/its-kind`; what was asked for."""
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        folder = tmp_path / "0123456789abcdef"
        kind = name.partition("@")[0].removeprefix("me/")
        if not folder.exists():
            folder.symlink_to(places[kind])
        return folder

    monkeypatch.setattr("detrkit.hub.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_on_the_hub_is_fetched(hubbed: list[str], model: nn.Module) -> None:
    saved = open_model("me/ours")
    assert same(saved.model, model)
    assert saved.origin == "detrkit, hub revision 01234567"
    assert saved.about == {"epoch": 3, "hub": "me/ours"}
    assert hubbed == ["me/ours"]


def test_weights_of_others_on_the_hub(hubbed: list[str], model: nn.Module) -> None:
    saved = open_model("me/huggingface@main")
    assert same(saved.model, model)
    assert saved.origin == "Hugging Face DetrForObjectDetection, hub revision 01234567"
    assert saved.about["hub"] == "me/huggingface"
    assert hubbed == ["me/huggingface@main"]


def test_a_path_comes_before_the_hub(hubbed: list[str], tmp_path: Path, model: nn.Module) -> None:
    save_model(tmp_path / "me" / "ours", model, preset="detr-r18", categories=CATEGORIES)
    assert open_model("me/ours").about == {}
    assert not hubbed


def test_a_mistyped_path_does_not_travel(hubbed: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match=r"^runs/cels: There is no such.*got a folder runs without it") as caught:
        open_model("runs/cels")
    assert caught.value.remedy == "If you mean the model of that name on the hub, say runs/cels@main."
    for path in ("weights/detr.pth", "./me/ours", "../me/ours", "/me/ours", Path("me/ours")):
        with pytest.raises(ModelError, match="no such file or folder"):
            open_model(path)
    assert not hubbed


def test_a_preset_is_no_model(hubbed: list[str]) -> None:
    with pytest.raises(
        ModelError, match=r"detr-r50: This is a preset, .* without weights.*train DATA --model detr-r50"
    ):
        open_model("detr-r50")
    with pytest.raises(ModelError, match=r"nowhere: There is no such file or folder.*hub \(organisation/name\)"):
        open_model("nowhere")
    assert not hubbed


def test_two_weights_files_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"more than one weights file.*a\.pth, b\.safetensors.*Name one"):
        open_model(tmp_path)


def test_nothing_of_a_folder_is_executed(tmp_path: Path) -> None:
    content = {"model_type": "detr", "auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelError):
        open_model(tmp_path)


def test_the_architecture_as_a_recipe_states_it(places: dict[str, Path], model: nn.Module) -> None:
    for kind in ("ours", "huggingface"):
        preset, fields = architecture_of(open_model(places[kind]))
        assert preset == "detr-r18"
        assert fields == {name: str(value) for name, value in SMALL.items() if name not in ("backbone", "heads")}
        rebuilt = models.build(preset, **fields, num_classes=3)
        assert not differences(rebuilt.config, model.config)


def test_without_a_preset_it_is_the_nearest_one() -> None:
    model = build(backbone="resnet34", dim=64)
    saved = sources.SavedModel(model, "detr", "", CATEGORIES, {})
    preset, fields = architecture_of(saved)
    assert (preset, fields["dim"]) == ("detr-r34", "64")
    assert "backbone" not in fields


def test_classes_and_sizes_of_images_are_no_architecture(model: Any) -> None:
    assert not differences(build(num_classes=7, image_size=64, longest=70).config, model.config)
    assert differences(build(heads=4).config, model.config) == {"heads": (4, 8)}


def test_a_dc5_model_is_not_taken_for_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = official_state(build(dilated=True))
    bare, told = tmp_path / "a" / "detr-r18-DC5.pth", tmp_path / "b" / "dc5.pth"
    for file, content in ((bare, state), (told, {"model": state, "args": {"dilation": True, "nheads": 8}})):
        file.parent.mkdir()
        torch.save(content, file)
    for name in (bare, bare.parent):
        with pytest.raises(ModelError, match=r"By its name this is a DC5 model.*got 'detr-r18-DC5.pth'") as caught:
            open_model(name)
        assert f"detrkit convert {name} OUT --dilated" in caught.value.remedy
    config: Any = open_model(told).model.config
    assert config.dilated
    (tmp_path / "0123456789").mkdir()
    torch.save(state, tmp_path / "0123456789" / "weights.pth")
    monkeypatch.setattr("detrkit.hub.fetch", lambda name: tmp_path / "0123456789")
    with pytest.raises(ModelError, match=r"me/detr-dc5@main: By its name.*convert me/detr-dc5@main OUT"):
        open_model("me/detr-dc5@main")


def test_what_tensors_do_not_show_is_told_as_assumed(places: dict[str, Path], tmp_path: Path, model: nn.Module) -> None:
    assert convert.read(places["official"]).assumed == ("dilated", "heads")
    assert convert.read(places["official"], dilated=False).assumed == ("heads",)
    assert convert.read(places["huggingface"]).assumed == ()
    arguments = {"dilation": False, "nheads": 8}
    torch.save({"model": official_state(model), "args": arguments}, tmp_path / "told.pth")
    assert convert.read(tmp_path / "told.pth").assumed == ()
