"""Mask heads here and in the `transformers` library: the same weights draw the same masks, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_parity import CASES, TOLERANCE, assert_same, batch, ours, theirs, varied

from detrkit import convert
from detrkit.segmentation.model import Segmenter

transformers = pytest.importorskip("transformers")

CASE = CASES[0]._replace(dim=64, heads=8, layers=(1, 1))
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def attentive(model: nn.Module) -> Any:
    """The model with a mask head that listens to its attention maps, so that each query has its own mask."""
    for name, value in model.state_dict().items():
        if name.endswith(("attention_query.weight", "bbox_attention.q_proj.weight")):
            value *= 3
        if name.endswith(("mask_head.layers.0.weight", "mask_head.conv1.conv.weight")):
            value[:, -CASE.heads :] *= 100
    return model


@torch.no_grad()
def masks(model: nn.Module) -> Tensor:
    """The masks of all queries, of a model of ours or of theirs; one of the images is padded."""
    images, padding = batch(CASE)
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


@pytest.mark.parametrize("family", ["Detr", "ConditionalDetr"])
def test_theirs_in_ours(family: str, tmp_path: Path) -> None:
    model = attentive(theirs(CASE, family, "ForSegmentation", stages=STAGES))
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
        assert_same(found.model, model, CASE)


@pytest.mark.parametrize(("family", "preset"), [("Detr", "detr-r50"), ("ConditionalDetr", "conditional-detr-r50")])
def test_ours_in_theirs(family: str, preset: str, tmp_path: Path) -> None:
    model = attentive(varied(Segmenter(ours(CASE, preset))))
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
