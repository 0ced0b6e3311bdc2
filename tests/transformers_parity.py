"""The same weights here and in the `transformers` library: what both answer to the same images."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrkit import convert, models

TOLERANCE = 1e-4


class Case(NamedTuple):
    """One architecture, and the sizes (height, width) of the images of a batch."""

    backbone: str
    dim: int
    heads: int
    layers: tuple[int, int]
    feedforward: int
    queries: int
    classes: int
    position: str
    sizes: tuple[tuple[int, int], ...]


CASES = (
    Case("resnet18", 32, 4, (1, 3), 48, 7, 5, "sine", ((96, 130), (64, 96))),
    Case("resnet34", 48, 6, (2, 1), 64, 11, 1, "learned", ((70, 64),)),
    Case("resnet50", 64, 2, (2, 2), 32, 3, 91, "sine", ((64, 64), (33, 97), (128, 50))),
)
BLOCKS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
}


def config_of(case: Case, family: str, **more: Any) -> Any:
    """The config of the case in `transformers`."""
    transformers = pytest.importorskip("transformers")
    kind, depths = BLOCKS[case.backbone]
    widths = [width * (4 if kind == "bottleneck" else 1) for width in (8, 16, 32, 64)]  # the fixture `narrow`
    stages = more.pop("stages", ["stage4"])
    backbone = transformers.ResNetConfig(
        layer_type=kind, depths=depths, embedding_size=8, hidden_sizes=widths, out_features=stages
    )
    return getattr(transformers, f"{family}Config")(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=case.dim,
        encoder_attention_heads=case.heads,
        decoder_attention_heads=case.heads,
        encoder_layers=case.layers[0],
        decoder_layers=case.layers[1],
        encoder_ffn_dim=case.feedforward,
        decoder_ffn_dim=case.feedforward,
        num_queries=case.queries,
        num_labels=case.classes,
        position_embedding_type=case.position,
        **more,
    )


def theirs(case: Case, family: str, kind: str = "ForObjectDetection", **more: Any) -> nn.Module:
    """Their model of the case, with the weights of `varied`."""
    transformers = pytest.importorskip("transformers")
    return varied(getattr(transformers, f"{family}{kind}")(config_of(case, family, **more)))


def ours(case: Case, preset: str) -> nn.Module:
    """Our model of the case, with the weights of `varied`."""
    return varied(
        models.build(
            preset,
            backbone=case.backbone,
            dim=case.dim,
            heads=case.heads,
            encoder_layers=case.layers[0],
            decoder_layers=case.layers[1],
            feedforward=case.feedforward,
            num_queries=case.queries,
            num_classes=case.classes,
            position=case.position,
            image_size=480,
            longest=640,
        )
    )


def varied(model: nn.Module) -> nn.Module:
    """The model with weights from its names alone, under which queries and places differ; in evaluation mode."""
    for name, value in model.state_dict().items():
        draws = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(value.shape))
        x = torch.from_numpy(np.asarray(draws)).float()
        if name.endswith("running_var"):
            x = 1 + 0.2 * x.tanh()
        elif value.ndim == 1 and name.endswith("weight"):
            x = 1 + 0.1 * x.tanh()
        elif value.ndim == 1:
            x = 0.1 * x
        elif not any(table in name for table in ("query_position", "embeddings", "position.")):
            x = x * math.sqrt((1.0 if value.ndim == 4 else 3.0) / value[0].numel())
        value.copy_(x)
    return model.eval()


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Images of noise, zero where padded, and where they are padded."""
    height, width = (max(size[axis] for size in case.sizes) for axis in (0, 1))
    images = torch.randn(len(case.sizes), 3, height, width, generator=torch.Generator().manual_seed(1))
    padding = torch.ones(len(case.sizes), height, width, dtype=torch.bool)
    for number, (h, w) in enumerate(case.sizes):
        padding[number, :h, :w] = False
    return images.masked_fill(padding[:, None], 0), padding


@torch.no_grad()
def answers(model: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Logits and boxes of the last layer, of a model of ours or of theirs."""
    images, padding = batch(case)
    if hasattr(model, "decode"):
        predictions = model.eval()(images, padding)
        return predictions.logits[-1], predictions.boxes[-1]
    output = model.eval()(images, pixel_mask=(~padding).long())
    return output.logits, output.pred_boxes


def assert_same(one: nn.Module, other: nn.Module, case: Case) -> None:
    """Both models answer alike, and not because they answer the same to everything."""
    (logits, boxes), (other_logits, other_boxes) = answers(one, case), answers(other, case)
    torch.testing.assert_close(logits, other_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(boxes, other_boxes, atol=TOLERANCE, rtol=0)
    assert float(boxes.std(1).max()) > 10 * TOLERANCE
    assert float(logits.std(1).max()) > 10 * TOLERANCE


def check_theirs_to_ours(case: Case, family: str, folder: Path) -> convert.Conversion:
    """Their model, written by them, answers alike when it is read here, from its folder and from its state dict."""
    model = theirs(case, family)
    model.save_pretrained(folder)  # type: ignore[operator]
    found = convert.read(folder)
    assert_same(found.model, model, case)
    again = convert.from_huggingface(model.state_dict(), heads=case.heads)  # since version 5 under other names
    assert_same(again, model, case)
    assert {fate.fate for fate in found.report} == {"kept"}
    other = 1 if case.heads > 1 else 2
    wrong = convert.from_huggingface(model.state_dict(), heads=other)
    assert float((answers(wrong, case)[1] - answers(model, case)[1]).abs().max()) > 10 * TOLERANCE
    return found


def check_ours_to_theirs(case: Case, family: str, preset: str, folder: Path) -> Any:
    """Our model, written for them, is loaded by them without a tensor too many or too few, and answers alike."""
    transformers = pytest.importorskip("transformers")
    model = ours(case, preset)
    convert.to_huggingface(model, folder)
    loaded, about = getattr(transformers, f"{family}ForObjectDetection").from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(about.values()), about
    assert_same(loaded, model, case)
    again = convert.read(folder)
    assert again.model.config == model.config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    return loaded
