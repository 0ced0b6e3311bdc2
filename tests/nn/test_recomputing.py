"""Layers computed again for their gradients: the same figures, from less that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detrkit import models
from detrkit.nn.recomputing import Recomputable, recompute

PRESETS = ("detr-nano", "conditional-detr-nano")


def build(preset: str, backbone: str = "resnet-nano") -> nn.Module:
    torch.manual_seed(0)
    return models.build(
        preset, backbone=backbone, dim=32, heads=4, encoder_layers=2, decoder_layers=2, feedforward=64, num_queries=4,
        num_classes=2, dropout=0.3, pre_norm=False, query_groups=1, image_size=64, longest=96,
    )  # fmt: skip


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """What a model answers in training, its gradients, and how many bytes are kept for them."""
    kept: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found: Any = model.train()(images, padding)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    (found.boxes.square().sum() + found.logits.square().sum()).backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found.boxes.detach(), gradients, size


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", ["resnet-nano", "mobilenet_v2"])
def test_answers_and_gradients_stay_and_less_is_kept(preset: str, backbone: str) -> None:
    model = build(preset, backbone)
    plain = step(model)
    recompute(model, backbone=False)
    layers = step(model)
    recompute(model, backbone=True)
    everything = step(model)
    for boxes, gradients, _ in (layers, everything):
        assert torch.equal(boxes, plain[0])  # dropout included
        assert gradients.keys() == plain[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-5, atol=1e-6)
    assert layers[2] < 0.97 * plain[2]
    assert everything[2] < 0.8 * layers[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_marked(preset: str) -> None:
    """The transformer's layers; with the backbone its blocks that train. Nothing in use, nothing in a new model."""
    model: Any = build(preset, "mobilenet_v2")

    def marked() -> set[str]:
        return {name for name, one in model.named_modules() if isinstance(one, Recomputable) and one.recomputes}

    layers = {f"{part}.{number}" for part in ("encoder.layers", "decoder_layers") for number in range(2)}
    assert marked() == set()
    recompute(model, backbone=False)
    assert marked() == layers
    model.backbone.freeze(2)
    recompute(model, backbone=True)
    blocks = {name.partition("backbone.")[2] for name in marked() - layers}
    assert "features.4" in blocks  # of the third stage
    assert "features.2" not in blocks  # frozen, and keeps nothing anyway
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
