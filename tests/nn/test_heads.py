"""The small networks behind the answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrkit.nn.heads import MLP, in_float32


@pytest.mark.parametrize("widths", [(6, 4), (6, 8, 4), (6, 8, 7, 4)])
@pytest.mark.parametrize("leading", [(5,), (3, 2, 5)])
def test_mlp_is_linear_layers_with_relu_between(widths: tuple[int, ...], leading: tuple[int, ...]) -> None:
    head = MLP(*widths)
    plain = nn.Sequential()
    for layer in head.layers:
        plain.extend([layer, nn.ReLU()])
    x = torch.randn(*leading, 6)
    out = head(x)
    assert out.shape == (*leading, 4)
    torch.testing.assert_close(out, plain[:-1](x))
    assert bool((out < 0).any()), "an activation after the last layer"


def test_parameters_have_the_official_names() -> None:
    assert list(MLP(6, 8, 4).state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def test_heads_answer_in_float32_whatever_comes_before() -> None:
    head, x = MLP(6, 8, 4), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        rough, answer = head(x), in_float32(head, x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert torch.equal(answer, head(x.bfloat16().float()))
    for dtype in (torch.bfloat16, torch.float64):
        assert in_float32(MLP(6, 8, 4).to(dtype), x.to(dtype)).dtype == dtype
