"""The encoder against torch's own, and positions and padding, which torch's does not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detrkit.nn.transformer import Encoder, EncoderLayer, FeedForward

DIM, HEADS, HIDDEN, LAYERS = 16, 4, 24, 2


def copy_layer(ours: EncoderLayer, theirs: nn.TransformerEncoderLayer) -> None:
    """Our weights into torch's layer."""
    attention = ours.self_attention
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    for mine, his in (
        (attention.output, theirs.self_attn.out_proj),
        (ours.feedforward.expand, theirs.linear1),
        (ours.feedforward.contract, theirs.linear2),
        (ours.self_attention_norm, theirs.norm1),
        (ours.feedforward_norm, theirs.norm2),
    ):
        his.load_state_dict(mine.state_dict())


def stirred(module: Encoder) -> Encoder:
    """Norms and biases away from ones and zeros, which would hide mistakes."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    return module


def both(pre_norm: bool) -> tuple[Encoder, nn.TransformerEncoder]:
    ours = stirred(Encoder(LAYERS, DIM, HEADS, HIDDEN, 0.0, pre_norm))
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=pre_norm)
    theirs = nn.TransformerEncoder(
        layer, LAYERS, norm=nn.LayerNorm(DIM) if pre_norm else None, enable_nested_tensor=False
    )
    for mine, his in zip(ours.layers, theirs.layers, strict=True):
        copy_layer(mine, his)
    if pre_norm:
        theirs.norm.load_state_dict(ours.norm.state_dict())
    return ours, theirs


@pytest.fixture
def padding() -> Tensor:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return padding


@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_torch_without_positions(pre_norm: bool, padding: Tensor) -> None:
    ours, theirs = both(pre_norm)
    x = torch.randn(2, 6, DIM)
    inside = ~padding
    for mask in (None, padding):
        found = ours(x, torch.zeros_like(x), mask)
        expected = theirs(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positions_join_queries_and_keys_of_every_layer_but_no_value(pre_norm: bool) -> None:
    ours, theirs = both(pre_norm)
    x, position = torch.randn(2, 6, DIM), torch.randn(2, 6, DIM)
    expected = x
    for layer in theirs.layers:  # figure 10 of the paper, with torch's attention and norms
        y = layer.norm1(expected) if pre_norm else expected
        y = layer.self_attn(y + position, y + position, y, need_weights=False)[0]
        expected = expected + y if pre_norm else layer.norm1(expected + y)
        y = layer.linear2(layer.linear1(layer.norm2(expected) if pre_norm else expected).relu())
        expected = expected + y if pre_norm else layer.norm2(expected + y)
    expected = theirs.norm(expected) if pre_norm else expected
    torch.testing.assert_close(ours(x, position, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_is_padded_has_no_say(pre_norm: bool, padding: Tensor) -> None:
    encoder = Encoder(LAYERS, DIM, HEADS, HIDDEN, 0.1, pre_norm).eval()
    x, position = torch.randn(2, 6, DIM), torch.randn(2, 6, DIM)
    before = encoder(x, position, padding)
    x, position = x.clone(), position.clone()
    x[padding], position[padding] = 100.0, -50.0
    assert torch.equal(encoder(x, position, padding)[~padding], before[~padding])
    # And an image alone, without what it was padded with, gives the same.
    alone = encoder(x[1:, :4], position[1:, :4], None)
    torch.testing.assert_close(alone[0], before[1, :4], atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    x = torch.randn(2, 6, DIM)
    for module in (Encoder(1, DIM, HEADS, HIDDEN, 0.5, False), FeedForward(DIM, HIDDEN, 0.5)):
        arguments = (x, x, None) if isinstance(module, Encoder) else (x,)
        assert not torch.equal(module(*arguments), module(*arguments))
        module.eval()
        assert torch.equal(module(*arguments), module(*arguments))


def test_an_encoder_without_layers_changes_nothing() -> None:
    x = torch.randn(2, 6, DIM)
    assert torch.equal(Encoder(0, DIM, HEADS, HIDDEN, 0.1, False)(x, x, None), x)
