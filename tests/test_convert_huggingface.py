"""Hugging Face folders, without the library that they are for: read, written, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detrkit import Category, ModelError, UsageError, convert, models

SMALL = {
    "backbone": "resnet18",
    "num_classes": 3,
    "num_queries": 5,
    "dim": 16,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 8,
    "image_size": 320,
    "longest": 500,
}
pytestmark = pytest.mark.usefixtures("narrow")

CATEGORIES = (Category(4, "nut"), Category(7, "bolt"), Category(9, "gear"))
BACKBONE = "model.backbone.conv_encoder.model."


def small(preset: str = "detr-r50", **changes: Any) -> nn.Module:
    return models.build(preset, **{**SMALL, **changes})


def change(folder: Path, file: str = "config.json", **values: Any) -> Path:
    """Replace entries of a JSON file; None removes one."""
    content = {**json.loads((folder / file).read_text()), **values}
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model(narrow: None) -> nn.Module:
    return small()


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    convert.to_huggingface(model, tmp_path / "folder", categories=CATEGORIES)
    return tmp_path / "folder"


@pytest.mark.parametrize("preset", ["detr-r50", "conditional-detr-r50"])
@pytest.mark.parametrize(
    "changes", [{}, {"position": "learned"}, {"stride": 16}, {"no_object_weight": 0.5, "dropout": 0.0}], ids=str
)
def test_there_and_back(preset: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if preset.startswith("conditional") and "no_object_weight" in changes:
        changes = {"focal_alpha": 0.5, "class_weight": 3.0}
    model = small(preset, **changes)
    convert.to_huggingface(model, tmp_path / "folder", categories=CATEGORIES)
    found = convert.read(tmp_path / "folder")
    assert found.model.config == model.config
    assert same(found.model, model)
    # Their labels are numbers from 0 on; what a data set called them does not travel.
    assert found.categories == tuple(Category(label, each.name) for label, each in enumerate(CATEGORIES))


def test_what_is_written(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["DetrForObjectDetection"], "detr")
    assert config["id2label"] == {"0": "nut", "1": "bolt", "2": "gear"}
    assert config["label2id"] == {"nut": 0, "bolt": 1, "gear": 2}
    assert (config["d_model"], config["encoder_attention_heads"], config["decoder_ffn_dim"]) == (16, 2, 8)
    assert config["backbone_config"]["depths"] == [2, 2, 2, 2]
    assert config["class_cost"] == 1
    assert isinstance(config["class_cost"], int)
    sizes = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert sizes == {"shortest_edge": 320, "longest_edge": 500}
    names = set(load_file(folder / "model.safetensors"))
    assert {"class_labels_classifier.bias", "model.decoder.layers.1.encoder_attn.out_proj.weight"} <= names
    assert f"{BACKBONE}encoder.stages.3.layers.0.shortcut.normalization.running_var" in names


def test_names_are_optional_and_made_up_ones_are_no_categories(model: nn.Module, tmp_path: Path) -> None:
    convert.to_huggingface(model, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["id2label"]["2"] == "LABEL_2"
    assert convert.read(tmp_path / "folder").categories == ()
    change(tmp_path / "folder", id2label={"0": "N/A", "1": "person", "2": "N/A"})
    names = [category.name for category in convert.read(tmp_path / "folder").categories]
    assert names == ["unused-0", "person", "unused-2"]


def test_stuff_of_coco_is_known_by_its_names(tmp_path: Path) -> None:
    names = [Category(label, {92: "banner", 93: "person"}.get(label, f"class-{label}")) for label in range(94)]
    convert.to_huggingface(small(num_classes=94), tmp_path / "folder", categories=tuple(names))
    stuff = [category for category in convert.read(tmp_path / "folder").categories if not category.is_thing]
    assert stuff == [Category(92, "banner", is_thing=False)]


def test_weights_of_the_loss_that_cannot_be_held_are_left_to_the_default(tmp_path: Path) -> None:
    convert.to_huggingface(small(l1_weight=2.5), tmp_path / "folder")
    assert "bbox_cost" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    config: Any = convert.read(tmp_path / "folder").model.config
    assert config.l1_weight == 5.0


def timm_names(model: nn.Module) -> dict[str, Tensor]:
    """The names of published folders, whose backbones are timm's: those of torchvision, with counters."""
    state = convert.rename_back(model.state_dict(), models.variant("detr").HUGGINGFACE.table)  # type: ignore[attr-defined]
    state = {name: value for name, value in state.items() if BACKBONE not in name}
    own = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    state |= {BACKBONE + name.removeprefix("backbone."): value for name, value in own.items()}
    return state | {f"{BACKBONE}bn1.num_batches_tracked": torch.tensor(1)}


def test_published_folders_with_a_backbone_of_timm(model: nn.Module, folder: Path) -> None:
    save_file(timm_names(model), folder / "model.safetensors")
    change(folder, backbone_config=None, use_timm_backbone=True, backbone="resnet18", dilation=True)
    found = convert.read(folder)
    assert same(found.model, model)
    config: Any = found.model.config
    assert (config.dilated, config.heads) == (True, 2)
    assert convert.counts(found.report)["left out"] == 1
    change(folder, dilation=False, backbone_config={"model_type": "timm_backbone", "output_stride": 16})
    config = convert.read(folder).model.config
    assert config.dilated


def test_a_folder_for_timm(tmp_path: Path) -> None:
    model = small(dilated=True)
    convert.to_huggingface(model, tmp_path / "folder", timm=True)
    state = load_file(tmp_path / "folder" / "model.safetensors")
    assert torch.equal(state[f"{BACKBONE}layer4.1.conv2.weight"], model.state_dict()["backbone.layer4.1.conv2.weight"])
    assert not any("embedder" in name for name in state)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["use_timm_backbone"], config["backbone"], config["dilation"]) == (True, "resnet18", True)
    assert convert.read(tmp_path / "folder").model.config == model.config


def test_state_dicts_say_less_than_folders(model: nn.Module, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    assert convert.from_huggingface(state, heads=2, image_size=320, longest=500).config == model.config
    config: Any = convert.read(state).model.config
    assert (config.heads, config.image_size) == (8, 800)
    # The file in its folder is the folder.
    assert convert.read(folder / "model.safetensors").model.config == model.config


def test_weights_in_several_files_and_in_the_old_kind_of_file(model: nn.Module, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    assert same(convert.read(folder).model, model)
    index.unlink()
    with pytest.raises(ModelError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        convert.read(folder)
    torch.save(state, folder / "pytorch_model.bin")
    assert same(convert.read(folder).model, model)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"size": {"shortest_edge": 480, "longest_edge": 600}}, (480, 600)),
        ({"size": 480, "max_size": 600}, (480, 600)),
        ({"size": {"max_height": 480, "max_width": 480}}, (480, 480)),
        ({"size": {"height": 600, "width": 480}}, (480, 600)),
        ({"size": None}, (800, 1333)),
    ],
)
def test_sizes_of_images(folder: Path, size: dict[str, Any], expected: tuple[int, int]) -> None:
    config: Any = convert.read(change(folder, "preprocessor_config.json", **size)).model.config
    assert (config.image_size, config.longest) == expected


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"auxiliary_loss": True}, r"config\.json: The model does something.*auxiliary_loss True"),
        ("config.json", {"activation_function": "gelu"}, "activation_function 'gelu'"),
        ("config.json", {"backbone_config": {"downsample_in_bottleneck": True}}, "downsample_in_bottleneck True"),
        ("config.json", {"decoder_attention_heads": 4}, "heads, is several there; got encoder_attention_heads 2"),
        ("config.json", {"num_queries": 6}, r"query_position_embeddings\.weight \(5, 16\) for \(6, 16\)"),
        ("config.json", {"model_type": "deformable_detr"}, "'deformable_detr', which is no variant here"),
        ("config.json", {"model_type": "conditional_detr"}, "Not all of these are weights of Conditional DETR"),
        ("config.json", {"id2label": {"0": "nut", "1": "bolt"}}, "do not fit the class head; got 2 names; expected 3"),
        ("config.json", {"id2label": {"1": "nut", "2": "bolt", "3": "gear"}}, "not numbered from 0 on"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, r"another way; got image_mean \[0\.5"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert.read(change(folder, file, **changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_mean", None, r"image_mean cannot be understood; got None; expected three numbers: \(0\.485"),
        ("image_mean", 0.5, "image_mean cannot be understood; got 0.5"),
        ("image_std", [0.229, "0.224", 0.225], "image_std cannot be understood"),
        ("image_std", [0.229, 0.224], "image_std cannot be understood"),
        ("image_std", [0.229, float("nan"), 0.225], "normalised in another way; got image_std"),
        ("do_normalize", False, "not normalised; got do_normalize False; expected True"),
        ("do_rescale", False, "not from 0 to 1; got do_rescale False; expected True"),
        ("rescale_factor", 1.0, "pixels of another range; got rescale_factor 1.0; expected 1/255"),
        ("rescale_factor", "1/255", "pixels of another range; got rescale_factor '1/255'"),
    ],
)
def test_other_preparations_of_pixels_are_refused(folder: Path, name: str, value: object, message: str) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ModelError, match=rf"preprocessor_config\.json: The .*{message}"):
        convert.read(folder)


def test_the_usual_preparation_and_half_a_frame_are_followed(folder: Path) -> None:
    size = {"height": None, "width": 480, "shortest_edge": 480}
    change(folder, "preprocessor_config.json", rescale_factor=0.00392156862745098, size=size)
    config: Any = convert.read(folder).model.config
    assert config.image_size == 480


def test_weights_of_the_loss_need_not_be_those_of_matching(folder: Path) -> None:
    change(folder, bbox_cost=5, bbox_loss_coefficient=10, giou_cost=3.0, giou_loss_coefficient=3)
    config: Any = convert.read(folder).model.config
    assert (config.l1_weight, config.giou_weight) == (10, 3)


def test_numbers_are_compared_as_numbers(model: nn.Module, folder: Path) -> None:
    change(folder, encoder_attention_heads=2.0, decoder_attention_heads=2, num_queries=5.0)
    found = convert.read(folder)
    assert found.model.config == model.config
    assert same(found.model, model)


def test_what_is_no_such_folder(tmp_path: Path, folder: Path) -> None:
    assert convert.is_huggingface(folder)
    assert not convert.is_huggingface(tmp_path / "none")
    with pytest.raises(ModelError, match="no Hugging Face model folder"):
        convert.read(tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: The file cannot be read"):
        convert.read(folder)
    (folder / "config.json").write_text("{")
    assert not convert.is_huggingface(folder)


def test_models_without_a_place_there_name_what_stands_in_the_way(tmp_path: Path) -> None:
    ways = {"pre_norm": True, "temperature": 20.0, "query_start": "grid", "query_groups": 4}
    for preset in ("detr-r50", "conditional-detr-r50"):
        with pytest.raises(
            ModelError, match=r"no place in transformers; got pre_norm=True \(there False\), temp"
        ) as said:
            convert.to_huggingface(small(preset, backbone="mobilenet_v2", **ways), tmp_path / "out")
        for name, value in {**ways, "backbone": "mobilenet_v2"}.items():
            assert f"{name}={value!r}" in said.value.got
        assert "Only post-norm DETR and Conditional DETR with a ResNet" in said.value.remedy
    with pytest.raises(ModelError, match=r"dilated=True \(there only with a backbone of timm"):
        convert.to_huggingface(small(dilated=True), tmp_path / "out")
    with pytest.raises(ModelError, match="backbone='resnet-nano'"):
        convert.to_huggingface(small(backbone="resnet-nano"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_variants_that_they_do_not_have(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(models.variant("detr"), "HUGGINGFACE")
    with pytest.raises(ModelError, match=r"This variant has no place in transformers; got detr\. Only post-norm DETR"):
        convert.to_huggingface(model, tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_left_behind(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        convert.to_huggingface(model, folder)
    with pytest.raises(UsageError, match="do not fit the model; got 2 names; expected 3"):
        convert.to_huggingface(model, tmp_path / "other", categories=CATEGORIES[:2])
    assert (folder / "config.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "empty").mkdir()
    convert.to_huggingface(model, tmp_path / "empty")
    assert convert.is_huggingface(tmp_path / "empty")
