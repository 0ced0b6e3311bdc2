"""Variants and mask heads here and in the `transformers` library: the same weights answer alike, both ways.

In one file, so that one worker alone imports the library, which takes longer than the tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_parity import (
    CASES,
    TOLERANCE,
    Case,
    assert_same,
    batch,
    check_ours_to_theirs,
    check_theirs_to_ours,
    ours,
    theirs,
    varied,
)

from detrkit import convert
from detrkit.segmentation.model import Segmenter

pytestmark = pytest.mark.usefixtures("narrow", "transformers")

FAMILIES = {"Detr": ("detr", "detr-r50"), "ConditionalDetr": ("conditional_detr", "conditional-detr-r50")}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_theirs_in_ours(case: Case, family: str, tmp_path: Path) -> None:
    found = check_theirs_to_ours(case, family, tmp_path / "folder")
    assert (found.origin, found.variant) == (f"Hugging Face {family}ForObjectDetection", FAMILIES[family][0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_ours_in_theirs(case: Case, family: str, tmp_path: Path) -> None:
    check_ours_to_theirs(case, family, FAMILIES[family][1], tmp_path / "folder")


def test_their_config_and_image_processor_understand_the_folder(tmp_path: Path, transformers: ModuleType) -> None:
    model = ours(CASES[0], "detr-r50-dc5")
    convert.to_huggingface(model, tmp_path / "folder", timm=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert isinstance(config, transformers.DetrConfig)
    assert (config.backbone_config.model_type, config.backbone_config.backbone) == ("timm_backbone", "resnet18")
    assert config.backbone_config.output_stride == 16
    assert (config.num_labels, config.num_queries, config.num_attention_heads) == (5, 7, 4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert type(processor).__name__.startswith("DetrImageProcessor")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (480, 640)


# Names of transformers' DETR, by ours: written out, where the tests above go by the library's own tables.
_HUGGING_FACE = (
    (r"backbone\.conv1\.(.+)", r"model.backbone.model.embedder.embedder.convolution.\1"),
    (r"backbone\.bn1\.(.+)", r"model.backbone.model.embedder.embedder.normalization.\1"),
    (r"query_position", r"model.query_position_embeddings.weight"),
    (r"projection\.(.+)", r"model.input_projection.\1"),
    (r"decoder_norm\.(.+)", r"model.decoder.layernorm.\1"),
    (r"class_head\.(.+)", r"class_labels_classifier.\1"),
    (r"box_head\.(.+)", r"bbox_predictor.\1"),
)
_HUGGING_FACE_PARTS = {
    "self_attention.": "self_attn.",
    "cross_attention.": "encoder_attn.",
    "self_attention_norm.": "self_attn_layer_norm.",
    "cross_attention_norm.": "encoder_attn_layer_norm.",
    "feedforward_norm.": "final_layer_norm.",
    "feedforward.expand.": "mlp.fc1.",
    "feedforward.contract.": "mlp.fc2.",
    "query.": "q_proj.",
    "key.": "k_proj.",
    "value.": "v_proj.",
    "output.": "o_proj.",
}


def hugging_face_name(name: str) -> str:
    """The name of one of our tensors in transformers' model (backbone resnet18)."""
    for pattern, target in _HUGGING_FACE:
        if (found := re.fullmatch(pattern, name)) is not None:
            return found.expand(target)
    if (found := re.fullmatch(r"backbone\.layer(\d)\.(\d)\.(conv|bn|downsample)\.?(\d)\.(.+)", name)) is not None:
        stage, block, kind, number, rest = found.groups()
        if kind == "downsample":
            part = f"shortcut.{('convolution', 'normalization')[int(number)]}"
        else:
            part = f"layer.{int(number) - 1}.{'convolution' if kind == 'conv' else 'normalization'}"
        return f"model.backbone.model.encoder.stages.{int(stage) - 1}.layers.{block}.{part}.{rest}"
    found = re.fullmatch(r"(encoder|decoder)[._]layers\.(\d+)\.(.+)", name)
    assert found is not None, name
    stack, layer, rest = found.groups()
    parts = "|".join(map(re.escape, _HUGGING_FACE_PARTS))
    rest = re.sub(rf"(?:^|(?<=\.))(?:{parts})", lambda part: _HUGGING_FACE_PARTS[part[0]], rest)
    return f"model.{stack}.layers.{layer}.{rest}"


def test_layers_and_hidden_states_are_theirs() -> None:
    # A size that is no multiple of the stride, an image that fills the batch, and two that are padded.
    sizes = ((97, 64), (70, 130), (97, 130))
    case = CASES[0]._replace(layers=(2, 3), feedforward=64, sizes=sizes)
    model, other = ours(case, "detr-r50"), theirs(case, "Detr")
    own = {hugging_face_name(name): value for name, value in model.state_dict().items()}
    assert own.keys() == {name for name in other.state_dict() if not name.endswith("num_batches_tracked")}
    other.load_state_dict(own, strict=False)
    images, padding = batch(case)
    with torch.no_grad():
        found = model(images, padding)
        expected = other(pixel_values=images, pixel_mask=(~padding).long(), output_hidden_states=True)
    torch.testing.assert_close(found.logits[-1], expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.hidden[-1], expected.last_hidden_state, atol=TOLERANCE, rtol=0)
    spread = found.boxes[-1].std((0, 1)).min()
    assert float(spread) > TOLERANCE, "answers that are all alike would prove nothing"


# Mask heads.
MASKED = CASES[0]._replace(dim=64, heads=8, layers=(1, 1))
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def attentive(model: nn.Module) -> Any:
    """The model with a mask head that listens to its attention maps, so that each query has its own mask."""
    for name, value in model.state_dict().items():
        if name.endswith(("attention_query.weight", "bbox_attention.q_proj.weight")):
            value *= 3
        if name.endswith(("mask_head.layers.0.weight", "mask_head.conv1.conv.weight")):
            value[:, -MASKED.heads :] *= 100
    return model


@torch.no_grad()
def masks(model: nn.Module) -> Tensor:
    """The masks of all queries, of a model of ours or of theirs; one of the images is padded."""
    images, padding = batch(MASKED)
    if not isinstance(model, Segmenter):
        return model.eval()(images, pixel_mask=(~padding).long()).pred_masks
    found = model.eval()(images, padding)
    count, queries = found.predictions.boxes.shape[1:3]
    image, query = torch.arange(count).repeat_interleave(queries), torch.arange(queries).repeat(count)
    return model.masks(found, image, query).unflatten(0, (count, queries))


def assert_same_masks(one: nn.Module | None, other: nn.Module) -> None:
    """Both draw alike, and not the same for all queries or all places."""
    assert one is not None
    drawn, known = masks(one), masks(other)
    torch.testing.assert_close(drawn, known, atol=TOLERANCE, rtol=0)
    assert float(drawn.std(1).max()) > 100 * TOLERANCE
    assert float(drawn.flatten(2).std(2).min()) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_their_masks_in_ours(family: str, tmp_path: Path) -> None:
    model = attentive(theirs(MASKED, family, "ForSegmentation", stages=STAGES))
    model.save_pretrained(tmp_path / "folder")
    found = convert.read(tmp_path / "folder")
    assert (found.origin, found.assumed) == (f"Hugging Face {family}ForSegmentation", ())
    assert {fate.fate for fate in found.report} == {"kept"}
    assert_same_masks(found.segmenter, model)
    again = convert.read(model.state_dict())  # since version 5 under other names than those in files
    assert (again.origin, again.assumed) == (found.origin, ("dilated",))
    assert_same_masks(again.segmenter, model)
    assert again.segmenter is not None
    again.segmenter.mask_head.attention = "per-head"
    assert float((masks(again.segmenter) - masks(model)).abs().max()) > 100 * TOLERANCE
    if family == "Detr":  # theirs forgets that Conditional DETR's boxes are offsets, in this class alone
        assert_same(found.model, model, MASKED)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_masks_in_theirs(family: str, tmp_path: Path, transformers: ModuleType) -> None:
    model = attentive(varied(Segmenter(ours(MASKED, FAMILIES[family][1]))))
    convert.to_huggingface(model, tmp_path / "folder")
    kind = getattr(transformers, f"{family}ForSegmentation")
    loaded, about = kind.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(about.values()), about
    assert_same_masks(model, loaded)
    again = convert.read(tmp_path / "folder")
    assert again.segmenter is not None
    assert again.model.config == model.detector.config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.segmenter.state_dict().items())
