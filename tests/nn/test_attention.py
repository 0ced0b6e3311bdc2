"""Attention against `torch.nn.MultiheadAttention` with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from detrkit.nn import attention
from detrkit.nn.attention import Attention, attend

DIM, HEADS = 16, 4


def copied(ours: Attention) -> nn.MultiheadAttention:
    """Torch's layer with our weights."""
    theirs = nn.MultiheadAttention(DIM, HEADS, dropout=ours.dropout, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    return theirs.train(ours.training)


def masks(name: str) -> tuple[Tensor | None, Tensor | None]:
    """Which of 7 keys 5 queries may not see, and which keys of 3 images are padded."""
    blocked = torch.zeros(5, 7, dtype=torch.bool)
    blocked[:2, 3:] = True
    blocked[2, ::2] = True
    padded = torch.zeros(3, 7, dtype=torch.bool)
    padded[1, 6:] = True
    padded[2, 1:3] = True
    return (blocked if "blocked" in name else None), (padded if "padded" in name else None)


@pytest.mark.parametrize("which", ["all", "blocked", "padded", "blocked and padded"])
def test_equals_torch_with_gradients(which: str) -> None:
    ours = Attention(DIM, HEADS)
    for part in (ours.query, ours.key, ours.value, ours.output):
        nn.init.normal_(part.bias)  # zeros would hide a bias that is left out
    theirs = copied(ours)
    q, k, v = torch.randn(3, 5, DIM), torch.randn(3, 7, DIM), torch.randn(3, 7, DIM)
    direction = torch.randn(3, 5, DIM)
    blocked, padded = masks(which)
    ways = [part for part in (blocked, None if padded is None else padded[:, None, None]) if part is not None]
    mask = None if not ways else torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    for way in ways:
        mask = mask | way

    inputs = [part.clone().requires_grad_() for part in (q, k, v)]
    expected = [part.clone().requires_grad_() for part in (q, k, v)]
    out = ours(*inputs, mask)
    reference = theirs(*expected, attn_mask=blocked, key_padding_mask=padded, need_weights=False)[0]
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    for result in (out, reference):
        (result * direction).sum().backward()
    for mine, his in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mine.grad, his.grad, atol=1e-5, rtol=1e-4)
    packed = torch.cat([part.weight.grad for part in (ours.query, ours.key, ours.value)])
    torch.testing.assert_close(packed, theirs.in_proj_weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.output.weight.grad, theirs.out_proj.weight.grad, atol=1e-5, rtol=1e-4)


def test_the_function_is_the_formula() -> None:
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 6)  # values of another width
    found = attend(q, k, v, heads=2)
    for image in range(2):
        for head in range(2):
            wide, narrow = slice(4 * head, 4 * head + 4), slice(3 * head, 3 * head + 3)
            weights = (q[image, :, wide] @ k[image, :, wide].T / math.sqrt(4)).softmax(-1)
            torch.testing.assert_close(found[image, :, narrow], weights @ v[image, :, narrow])


def test_blocked_keys_have_no_say() -> None:
    layer = Attention(DIM, HEADS)
    query, memory = torch.randn(2, 3, DIM), torch.randn(2, 5, DIM)
    blocked = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    blocked[1, ..., 3:] = True
    other = memory.clone()
    other[1, 3:] = 1e3
    assert torch.equal(layer(query, memory, memory, blocked), layer(query, other, other, blocked))
    assert not torch.allclose(layer(query, memory, memory), layer(query, other, other))


@pytest.mark.parametrize("which", ["all", "blocked", "padded"])
def test_half_precision_is_the_same_function(which: str) -> None:
    blocked, padded = masks(which)
    mask = blocked[None, None] if blocked is not None else None if padded is None else padded[:, None, None]
    parts = [torch.randn(3, count, DIM).bfloat16() for count in (5, 7, 7)]
    direction = torch.randn(3, 5, DIM)
    results = []
    for kind in (torch.float32, torch.bfloat16):
        inputs = [part.to(kind).requires_grad_() for part in parts]
        out = attend(*inputs, HEADS, mask)
        assert out.dtype == kind
        (out * direction.to(kind)).sum().backward()
        results.append([out, *(part.grad for part in inputs)])
    for single, half in zip(*results, strict=True):
        torch.testing.assert_close(half.float(), single, atol=0.05, rtol=0.05)
    with torch.no_grad():  # another kernel where nothing is to be learned
        torch.testing.assert_close(attend(*parts, HEADS, mask).float(), results[0][0].detach(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
@pytest.mark.parametrize("which", ["all", "blocked", "padded"])
def test_dropout_is_the_formula_with_its_gradients(which: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads at a time or all at once, with keys that serve all images, and with values of another width."""
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    blocked, padded = masks(which)
    mask = blocked[None, None] if blocked is not None else None if padded is None else padded[:, None, None]
    q, k, v = (torch.randn(size, dtype=torch.float64) for size in ((3, 5, 8), (1, 7, 8), (1, 7, 12)))

    def ours(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attend(*inputs, 4, mask, dropout=0.3)

    def formula(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        kept = attention.draw_kept((3, 4, 5, 7), 0.3)
        q, k, v = (one.unflatten(2, (4, -1)).transpose(1, 2) for one in inputs)
        products = q @ k.transpose(2, 3) / math.sqrt(2)
        weights = (products if mask is None else products.masked_fill(mask, -math.inf)).softmax(-1)
        return (weights * kept / 0.7 @ v).transpose(1, 2).flatten(2)

    inputs = [one.requires_grad_() for one in (q, k, v)]
    direction = torch.randn(3, 5, 12, dtype=torch.float64)
    found, wanted = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(found, wanted)
    results = [torch.autograd.grad((one * direction).sum(), inputs) for one in (found, wanted)]
    for of_ours, of_formula in zip(*results, strict=True):
        torch.testing.assert_close(of_ours, of_formula)


def test_dropout_keeps_a_byte_a_weight() -> None:
    parts, sizes = [torch.randn(2, 50, 8, requires_grad=True) for _ in range(3)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.nbytes), lambda _: None):
        attend(*parts, 2, dropout=0.1)
    assert sum(sizes) == 2 * 2 * 50 * 50 + sum(part.nbytes for part in parts)


def test_half_precision_drops_attention_too() -> None:
    q = torch.randn(1, 3, DIM).bfloat16().requires_grad_()
    assert torch.equal(attend(q, q, q, HEADS), attend(q, q, q, HEADS))
    assert not torch.equal(attend(q, q, q, HEADS, dropout=0.5), attend(q, q, q, HEADS, dropout=0.5))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_query_that_may_see_nothing_is_not_nan(kind: torch.dtype) -> None:
    q = torch.randn(1, 3, 8, dtype=kind, requires_grad=True)
    blocked = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    blocked[..., 1, :] = True
    out = attend(q, q, q, 2, blocked)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


def test_start_is_that_of_the_official_packed_matrix() -> None:
    layer = Attention(64, 8)
    # Xavier on one matrix of 3 · 64 rows and 64 columns, as torch's own layer starts.
    bound = math.sqrt(6 / (64 + 3 * 64))
    for part in (layer.query, layer.key, layer.value):
        assert 0.98 * bound < float(part.weight.detach().abs().max()) <= bound
    assert 0.98 * math.sqrt(6 / 128) < float(layer.output.weight.detach().abs().max()) <= math.sqrt(6 / 128)
    theirs = nn.MultiheadAttention(64, 8)
    assert float(theirs.in_proj_weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    assert not any(bool(part.bias.any()) for part in (layer.query, layer.key, layer.value, layer.output))


def test_dropout_acts_in_training_alone() -> None:
    layer, x = Attention(DIM, HEADS, dropout=0.5), torch.randn(2, 6, DIM)
    assert not torch.equal(layer(x, x, x), layer(x, x, x))
    layer.eval()
    assert torch.equal(layer(x, x, x), layer(x, x, x))
    torch.testing.assert_close(layer(x, x, x), copied(layer)(x, x, x)[0], atol=1e-5, rtol=1e-5)
