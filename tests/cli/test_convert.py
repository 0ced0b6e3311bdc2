"""`detrkit convert`: weights of others to a model folder, the categories that they lack, and models to Hugging Face."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from official_keys import official_segmentation_state
from torch import nn

import detrkit as package
from detrkit import models
from detrkit.data.coco_names import NAMES
from detrkit.nn.backbone import build_backbone
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category

pytestmark = pytest.mark.usefixtures("narrow")

DIM, QUERIES = 32, 7


def official_state(num_classes: int) -> dict[str, torch.Tensor]:
    """The tensors of a small DETR under the official names, which are those of torch's own transformer layers."""
    backbone = build_backbone("resnet18")
    parts = {
        "backbone.0.body": backbone,
        "input_proj": nn.Conv2d(backbone.channels[-1], DIM, 1),
        "query_embed": nn.Embedding(QUERIES, DIM),
        "transformer.encoder.layers.0": nn.TransformerEncoderLayer(DIM, 8, 64),
        "transformer.decoder.layers.0": nn.TransformerDecoderLayer(DIM, 8, 64),
        "transformer.decoder.norm": nn.LayerNorm(DIM),
        "class_embed": nn.Linear(DIM, num_classes + 1),
        "bbox_embed.layers": nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 4)]),
    }
    return {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.state_dict().items()}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A training checkpoint as the official code writes it."""
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": official_state(3)}, file)
    return file


def test_the_folder_can_be_loaded_and_used(detrkit, official, tmp_path):
    out = tmp_path / "model"
    said = detrkit("convert", official, out)
    assert said.code == 0
    assert "3 classes" in said.out
    detector = package.load(out)
    assert [category.name for category in detector.categories] == ["class-0", "class-1", "class-2"]
    assert detector.model.config.num_queries == QUERIES
    stored = torch.load(official, weights_only=True)["model"]["query_embed.weight"]
    assert torch.equal(detector.model.state_dict()["query_position"], stored)
    assert detrkit("inspect", out).code == 0


def test_options_reach_the_config(detrkit, official, tmp_path):
    options = ("--dilated", "--heads", "4", "--half", "--json")
    document = detrkit("convert", official, tmp_path / "model", *options).document
    assert (document["config"]["dilated"], document["config"]["heads"]) == (True, 4)
    assert document["preset"] == ""
    whole = detrkit("convert", official, tmp_path / "whole", "--json").document
    assert whole["parameters"] == document["parameters"]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("model", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_names_from_a_data_set_stand_at_their_ids(detrkit, official, data, tmp_path):
    document = detrkit("convert", official, tmp_path / "model", "--categories", data, "--json").document
    assert document["categories"] == [[0, "unused-0"], [1, "nut"], [2, "bolt"]]


def test_names_from_a_text_file(detrkit, official, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\n\ndog\n")
    document = detrkit("convert", official, tmp_path / "model", "--categories", names, "--json").document
    assert document["categories"] == [[0, "cat"], [1, "unused-1"], [2, "dog"]]


def test_coco_names_where_there_are_91_classes(detrkit, tmp_path):
    file = tmp_path / "coco.pth"
    torch.save(official_state(91), file)
    categories = dict(detrkit("convert", file, tmp_path / "model", "--json").document["categories"])
    assert (categories[0], categories[1], categories[12], categories[90]) == (
        *("unused-0", "person", "unused-12", "toothbrush"),
    )
    assert len(NAMES) == 80


def test_a_preset_is_recognised(detrkit, monkeypatch, official, tmp_path):
    from detrkit.models import detr

    config = detr.Config(
        num_classes=3,
        backbone="resnet18",
        num_queries=QUERIES,
        dim=DIM,
        encoder_layers=1,
        decoder_layers=1,
        feedforward=64,
    )
    monkeypatch.setitem(detr.PRESETS, "detr-tiny", config)
    assert detrkit("convert", official, tmp_path / "model", "--json").document["preset"] == "detr-tiny"


def test_what_cannot_be_converted(detrkit, official, tmp_path, data):
    other, names = tmp_path / "other.pth", tmp_path / "names.txt"
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    names.write_text("a\n" * 4)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "none.pth", out), 4, "none.pth"),
        ((other, out), 4, "not the weights of a detector"),
        ((official, full), 2, "not empty"),
        ((official, out, "--categories", names), 2, "below 3"),
        ((official, out, "--categories", tmp_path / "none.txt"), 3, "none.txt"),
        ((official, out, "--categories", tmp_path / "nothing"), 3, "nothing"),
        ((official, out, "--heads", "5"), 2, "heads 5"),
        ((official, out, "--to", "onnx"), 2, "huggingface"),
        ((official, out, "--to", "huggingface", "--half"), 2, "32 bits"),
        ((official, out, "--to", "huggingface", "--dilated"), 4, "dilated=True"),
    ]
    for arguments, code, part in cases:
        said = detrkit("convert", *arguments)
        assert (said.code, said.out) == (code, ""), arguments
        assert part in said.err
        assert not out.exists()


def test_the_text_says_what_it_was_and_what_became_of_the_tensors(detrkit, official, tmp_path):
    said = detrkit("convert", official, tmp_path / "model")
    for part in (
        "Origin        official DETR",
        "Architecture  resnet18, 1 encoder and 1 decoder layers, width 32, 8 heads, 7 queries, 3 classes",
        "tensors kept, 6 reshaped",
        "  reshaped: transformer.encoder.layers.0.self_attn.in_proj_weight: cut into query, key, value",
    ):
        assert part in said.out
    assert "query_embed" not in said.out
    whole = detrkit("convert", official, tmp_path / "again", "--report").out
    assert "  kept: query_embed.weight (7 × 32) → query_position" in whole
    document = detrkit("convert", official, tmp_path / "third", "--json").document
    assert document["tensors"]["reshaped"] == 6
    assert len(document["report"]) == len(official_state(3))
    assert document["report"][0].keys() == {"source", "targets", "shape", "fate", "note"}


def test_to_hugging_face_and_back(detrkit, official, data, tmp_path):
    """From a file, and from a model folder; each folder is understood again."""
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    assert detrkit("convert", official, model, "--categories", data).code == 0
    said = detrkit("convert", model, one, "--to", "huggingface")
    assert (said.code, said.err) == (0, "")
    assert "from_pretrained" in said.out
    assert detrkit("convert", official, two, "--to", "huggingface", "--categories", data).code == 0
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    document = detrkit("convert", one, tmp_path / "back", "--json").document
    assert document["origin"] == "Hugging Face DetrForObjectDetection"
    assert document["categories"] == [[0, "unused-0"], [1, "nut"], [2, "bolt"]]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, tmp_path / "back")]
    assert weights[0] == weights[1]


def test_models_of_our_own(detrkit, trained, tmp_path):
    said = detrkit("convert", trained, tmp_path / "out")
    assert said.code == 2
    assert "a model of detrkit already" in said.err
    said = detrkit("convert", trained, tmp_path / "out", "--to", "huggingface")
    assert said.code == 4
    assert "backbone='resnet-nano'" in said.err
    assert not (tmp_path / "out").exists()


def test_a_file_of_our_own_model(detrkit, trained, tmp_path):
    said = detrkit("convert", trained / "model" / "model.safetensors", tmp_path / "out")
    assert said.code == 2
    assert "a model of detrkit already" in said.err


def test_flags_reach_the_only_file_of_a_folder(detrkit, official, tmp_path, monkeypatch):
    lone = tmp_path / "lone-dc5"
    lone.mkdir()
    official.rename(lone / "weights.pth")
    for source in (lone, lone / "weights.pth"):
        said = detrkit("convert", source, tmp_path / "out")
        assert (said.code, said.out) == (4, "")
        assert "OUT --dilated" in said.err
    said = detrkit("convert", lone, tmp_path / "out", "--dilated")
    assert (said.code, said.err) == (0, "")
    assert "resnet18 DC5" in said.out
    assert "Assumed       heads 8: the tensors do not show it; convert with --heads if" in said.out
    assert package.load(tmp_path / "out").model.config.dilated
    monkeypatch.setattr("detrkit.hub.fetch", {"me/detr-dc5": lone}.__getitem__)
    monkeypatch.chdir(tmp_path)
    document = detrkit("convert", "me/detr-dc5", tmp_path / "hub", "--dilated", "--heads", "4", "--json").document
    assert (document["config"]["dilated"], document["config"]["heads"], document["assumed"]) == (True, 4, [])
    assert document["origin"] == "official DETR, hub revision lone-dc5"


def test_flags_that_a_config_answers_are_refused(detrkit, official, trained, tmp_path):
    assert detrkit("convert", official, tmp_path / "folder", "--to", "huggingface").code == 0
    for source in (trained, tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
        said = detrkit("convert", source, tmp_path / "out", "--dilated")
        assert (said.code, said.out) == (2, "")
        assert "says this already" in said.err


@pytest.fixture
def segmenter():
    return Segmenter(models.build("detr-r18", num_classes=3, dim=32, heads=8, encoder_layers=1, decoder_layers=1))


@pytest.fixture
def with_masks(segmenter, tmp_path):
    """A training checkpoint as the official code writes it of a segmentation model."""
    file = tmp_path / "segmentation.pth"
    torch.save({"model": official_segmentation_state(segmenter)}, file)
    return file


def test_a_mask_head_comes_along(detrkit, with_masks, segmenter, tmp_path):
    model, half, one, two = (tmp_path / name for name in ("model", "half", "one", "two"))
    said = detrkit("convert", with_masks, model)
    assert (said.code, said.err) == (0, "")
    assert "Masks         a mask head, its attention maps normalised joint" in said.out
    detector = package.load(model)
    assert torch.equal(detector.segmenter.mask_head.output.weight, segmenter.mask_head.output.weight)
    said = detrkit("inspect", model)
    assert "Masks       a mask head, its attention maps normalised joint" in said.out
    assert f"mask_head {sum(tensor.numel() for tensor in segmenter.mask_head.parameters()):,}" in said.out
    assert detrkit("convert", with_masks, half, "--half").code == 0
    sizes = [(folder / "mask_head.safetensors").stat().st_size for folder in (half, model)]
    assert sizes[0] < 0.6 * sizes[1]
    # To Hugging Face from our folder and from their file, and back.
    for source, out in ((model, one), (with_masks, two)):
        said = detrkit("convert", source, out, "--to", "huggingface")
        assert (said.code, said.err) == (0, "")
        assert "transformers.DetrForSegmentation.from_pretrained" in said.out
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert detrkit("convert", one, tmp_path / "back").code == 0
    for name in ("model", "mask_head"):
        files = [folder / f"{name}.safetensors" for folder in (model, tmp_path / "back")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_how_attention_maps_are_normalised_can_be_said(detrkit, with_masks, official, tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    document = detrkit("convert", with_masks, model, "--mask-attention", "per-head", "--json").document
    assert (document["mask_attention"], document["assumed"]) == ("per-head", ["dilated"])
    assert package.load(model).segmenter.mask_head.attention == "per-head"
    said = detrkit("convert", model, other, "--to", "huggingface")
    assert said.code == 4
    assert "mask_attention='per-head'" in said.err
    said = detrkit("convert", official, other, "--mask-attention", "joint")
    assert said.code == 2
    assert "no mask head" in said.err
    said = detrkit("convert", model, other, "--to", "huggingface", "--mask-attention", "joint")
    assert said.code == 2
    assert "says this already; got --mask-attention" in said.err
    assert not other.exists()


def test_stuff_stays_stuff(detrkit, with_masks, data, tmp_path, monkeypatch):
    categories = (Category(0, "nut"), Category(2, "sky", is_thing=False))
    monkeypatch.setattr("detrkit.data.formats.read", lambda *_, **__: {"all": SimpleNamespace(categories=categories)})
    document = detrkit("convert", with_masks, tmp_path / "model", "--categories", data, "--json").document
    assert document["categories"] == [[0, "nut"], [1, "unused-1"], [2, "sky", False]]
    said = detrkit("inspect", tmp_path / "model")
    assert (said.code, said.err) == (0, "")
    assert "Categories  3: nut, unused-1, sky" in said.out
