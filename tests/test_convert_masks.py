"""Mask heads of others into ours: beside any variant, every tensor, and over what attention maps are normalised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_keys import official_segmentation_state, official_state
from safetensors.torch import load_file
from torch import Tensor, nn

from detrkit import Category, ModelError, UsageError, convert, models
from detrkit.segmentation.model import Segmenter

SMALL = {
    "backbone": "resnet18",
    "stride": 16,
    "num_classes": 5,
    "num_queries": 7,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward": 48,
}


def small(preset: str = "detr-r50", **changes: Any) -> Segmenter:
    return Segmenter(models.build(preset, **{**SMALL, **changes}))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return small()


@pytest.fixture(scope="module")
def of_up_detr() -> Segmenter:
    """As the official UP-DETR has it after fine-tuning."""
    return small(pre_norm=True)


@pytest.fixture
def state(segmenter: Segmenter) -> dict[str, Tensor]:
    return official_segmentation_state(segmenter)


def same(one: nn.Module | None, other: nn.Module) -> bool:
    assert one is not None
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("prefix", "stride"), [("", 32), ("module.", 16)])
def test_a_mask_head_comes_with_its_detector(prefix: str, stride: int) -> None:
    segmenter = small(stride=stride)
    state = {prefix + name: value for name, value in official_segmentation_state(segmenter).items()}
    found = convert.read({"model": state})
    assert same(found.segmenter, segmenter)
    assert found.segmenter is not None
    assert found.segmenter.detector is found.model
    assert found.origin == "official DETR, with a mask head"
    fates = {fate.source: fate for fate in found.report}
    assert list(fates) == list(state)
    assert not found.left_out
    expected = convert.Fate(f"{prefix}mask_head.gn4.bias", ("mask_head.norms.3.bias",), (4,), "kept")
    assert fates[f"{prefix}mask_head.gn4.bias"] == expected
    assert all(fate.fate == "kept" for name, fate in fates.items() if ".detr." not in f".{name}")
    landed = [name for fate in found.report for name in fate.targets]
    assert len(landed) == len(set(landed)) == len(segmenter.state_dict())


def test_heads_are_read_off_the_mask_head(segmenter: Segmenter, state: dict[str, Tensor]) -> None:
    found = convert.read(state)
    assert found.model.config == segmenter.detector.config  # heads among them, which no tensor of a detector shows
    assert "heads" not in found.assumed
    with pytest.raises(ModelError, match=r"other shapes: mask_head\.lay1\.weight.*say heads=4, not 8: leave that out"):
        convert.read(state, heads=8)


def test_beside_another_variant() -> None:
    segmenter = small("conditional-detr-r50")
    found = convert.read(official_segmentation_state(segmenter))
    assert (found.variant, found.origin) == ("conditional_detr", "official Conditional DETR, with a mask head")
    assert same(found.segmenter, segmenter)


def test_attention_is_assumed_and_said_so(state: dict[str, Tensor], of_up_detr: Segmenter) -> None:
    """Each official code has its own way, which no tensor shows: UP-DETR, whose models are pre-norm, and all others."""

    def attention(found: convert.Conversion) -> str:
        assert found.segmenter is not None
        return found.segmenter.mask_head.attention

    found = convert.read(state)
    assert (attention(found), found.assumed) == ("joint", ("dilated", "mask_attention"))
    found = convert.read(state, mask_attention="per-head", dilated=False)
    assert (attention(found), found.assumed) == ("per-head", ())
    found = convert.read(official_segmentation_state(of_up_detr))
    assert (attention(found), found.assumed) == ("per-head", ("dilated", "mask_attention"))
    assert found.origin == "official DETR, pre-norm as UP-DETR's, with a mask head"
    assert same(found.segmenter, of_up_detr)
    found = convert.read(official_segmentation_state(of_up_detr), mask_attention="joint")
    assert (attention(found), found.assumed) == ("joint", ("dilated",))


def test_nothing_is_said_of_a_mask_head_that_is_not_there(of_up_detr: Segmenter) -> None:
    detector: Any = of_up_detr.detector
    found = convert.read(official_state(detector))
    assert (found.segmenter, found.assumed) == (None, ("dilated", "heads"))
    with pytest.raises(UsageError, match=r"no mask head; got mask_attention='joint'\. Leave it out"):
        convert.read(official_state(detector), mask_attention="joint")


@pytest.mark.parametrize("which", ["segmenter", "of_up_detr"])
def test_a_detector_takes_its_weights_from_a_segmentation_checkpoint(which: str, request: Any) -> None:
    """And not none of them in silence, as where names are only compared: `detr.` stands before all."""
    segmenter = request.getfixturevalue(which)
    detector = convert.from_official({"model": official_segmentation_state(segmenter)}, heads=4)
    assert same(detector, segmenter.detector)
    images, padding = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        found, known = (model.eval()(images, padding) for model in (detector, segmenter.detector))
    torch.testing.assert_close(found.boxes, known.boxes)


def test_other_classes_leave_the_mask_head_as_it_is(segmenter: Segmenter, state: dict[str, Tensor]) -> None:
    found = convert.read(state, num_classes=2)
    assert found.segmenter is not None
    assert same(found.segmenter.mask_head, segmenter.mask_head)
    assert "2 re-initialised (class_head.weight, class_head.bias)" in convert.summarise(found.report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask_head.lay3.weight": None, "bbox_attention.k_linear.bias": None},
            r"do not fit the model, DETR with a mask head; got missing: bbox_attention\.k_linear\.bias, "
            r"mask_head\.lay3\.weight",
        ),
        (
            {"mask_head.adapter2.weight": (8, 99, 1, 1)},
            r"other shapes: mask_head\.adapter2\.weight \(8, 99, 1, 1\) for \(8, 64, 1, 1\)$",
        ),
        ({"mask_head.gn1.bias": (35,)}, r"other shapes: mask_head\.gn1\.bias \(35,\) for \(36,\)"),
        ({"mask_head.adapter3.weight": (2, 64, 1, 1)}, r"left over: mask_head\.adapter3\.weight$"),
        (
            {"mask_head.lay6.weight": (2, 64, 1, 1)},
            r"Not all of these are weights of DETR with a mask head; got also mask_head\.lay6\.weight",
        ),
        ({"mask_head.out_lay.bias": float("nan")}, r"not finite: mask_head\.out_lay\.bias"),
        ({"ema.mask_head.out_lay.bias": (1,)}, r"got also ema\.mask_head\.out_lay\.bias"),
    ],
)
def test_what_does_not_fit_is_named(state: dict[str, Tensor], changes: dict[str, Any], message: str) -> None:
    for name, change in changes.items():
        if change is None:
            del state[name]
        else:
            state[name] = torch.zeros(change) if isinstance(change, tuple) else torch.full_like(state[name], change)
    with pytest.raises(ModelError, match=message):
        convert.read(state)


def test_a_mask_head_alone_is_no_detector(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="not the weights of a detector"):
        convert.read({name: value for name, value in state.items() if not name.startswith("detr.")})


def of_huggingface(**changes: Any) -> Segmenter:
    """What `transformers` has a place for, as far as `changes` do not say otherwise."""
    return small(**{"stride": 32, "dim": 32, "heads": 8, **changes})


def test_to_hugging_face_and_back(tmp_path: Path) -> None:
    segmenter = of_huggingface()
    categories = (*(Category(number, f"thing-{number}") for number in range(4)), Category(9, "sky", is_thing=False))
    convert.to_huggingface(segmenter, tmp_path / "folder", categories=categories)
    config, preprocessor = (
        json.loads((tmp_path / "folder" / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
    )
    assert config["architectures"] == ["DetrForSegmentation"]
    assert config["backbone_config"]["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    assert preprocessor["format"] == "coco_panoptic"
    names = set(load_file(tmp_path / "folder" / "model.safetensors"))
    assert {"detr.class_labels_classifier.bias", "mask_head.lay5.weight", "bbox_attention.q_linear.bias"} <= names
    found = convert.read(tmp_path / "folder")
    assert same(found.segmenter, segmenter)
    assert found.model.config == segmenter.detector.config
    assert (found.origin, found.assumed) == ("Hugging Face DetrForSegmentation", ())
    assert [category.name for category in found.categories] == [category.name for category in categories]
    convert.to_huggingface(segmenter.detector, tmp_path / "detector")
    assert convert.read(tmp_path / "detector").segmenter is None


def test_a_folder_for_timm(tmp_path: Path) -> None:
    segmenter = of_huggingface(dilated=True)
    convert.to_huggingface(segmenter, tmp_path / "folder", timm=True)
    found = convert.read(tmp_path / "folder")
    assert same(found.segmenter, segmenter)
    assert found.model.config == segmenter.detector.config


def test_mask_heads_without_a_place_there_name_what_stands_in_the_way(tmp_path: Path) -> None:
    cases = [
        (
            Segmenter(of_huggingface().detector, attention="per-head", box=True),
            r"got mask_attention='per-head' \(there 'joint'\), mask_box=True \(there False\)",
        ),
        (small(), r"got a mask head on 2 finer maps \(there 3\), 36 channels .* \(there a multiple of 8, or fewer\)"),
        (of_huggingface(dim=48, heads=8), r"got 12 channels in the mask head"),
        (Segmenter(models.build("detr-nano", num_classes=5)), r"got pre_norm=True.*backbone='mobilenet_v2'"),
    ]
    for segmenter, message in cases:
        with pytest.raises(ModelError, match=message) as said:
            convert.to_huggingface(segmenter, tmp_path / "out")
        assert "normalise attention over all heads at once" in said.value.remedy
    assert not list(tmp_path.iterdir())
