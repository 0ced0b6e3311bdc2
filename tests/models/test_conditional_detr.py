"""Conditional DETR: the cross-attention against its definition, the forms of T, the start on a grid, groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detrkit import Batch, Target, UsageError
from detrkit.models import conditional_detr
from detrkit.nn.position import SinePosition, encode_points, spread_points
from detrkit.nn.transformation import TRANSFORMATIONS
from detrkit.structures import Memory, Queries

TINY = conditional_detr.Config(
    num_classes=5,
    backbone="resnet-nano",
    num_queries=7,
    dim=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=64,
    dropout=0.0,
)


def make(**changes: Any) -> conditional_detr.Model:
    """A tiny model in which nothing is one or zero by default, which would hide mistakes."""
    model = conditional_detr.Model(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.copy_(0.5 + torch.rand_like(value) if "norm" in name else torch.randn_like(value) / 9)
        for layer in model.box_head.layers:
            layer.weight.normal_(std=0.2)
    return model


def images_of(*sizes: tuple[int, int]) -> Batch:
    return Batch.from_images([torch.randn(3, height, width) for height, width in sizes])


def test_a_place_is_encoded_alike_in_queries_and_memory() -> None:
    """The middle of a cell, asked for as a point, has the encoding that the memory gives to the cell's far edge."""
    memory = SinePosition(32)(torch.zeros(1, 5, 8, dtype=torch.bool))[0]
    points = torch.stack(torch.meshgrid(torch.arange(1, 6) / 5, torch.arange(1, 9) / 8, indexing="ij"), -1).flip(-1)
    torch.testing.assert_close(encode_points(points.flatten(0, 1), 32), memory, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_first", [True, False])
def test_cross_attention_is_the_sum_of_two_comparisons(is_first: bool) -> None:
    """Equation 2 head by head: contents are compared with contents and places with places."""
    attention = conditional_detr.ConditionalCrossAttention(32, 4, 0.0, is_first).eval()
    assert (attention.query_position is not None) == is_first
    x, position, spatial = torch.randn(3, 2, 7, 32).unbind(0)
    memory = Memory(torch.randn(2, 6, 32), torch.randn(2, 6, 32), None, (2, 3))
    outside = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    outside[1, ..., 4:] = True
    found = attention(x, position, spatial, memory, outside)

    q, k = attention.query_content(x), attention.key_content(memory.tokens)
    where, places = attention.query_spatial(spatial), attention.key_position(memory.position)
    if attention.query_position is not None:
        q, k = q + attention.query_position(position), k + places
    values, heads = attention.value(memory.tokens), []
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        score = q[..., own] @ k[..., own].mT + where[..., own] @ places[..., own].mT
        score = (score / math.sqrt(16)).masked_fill(outside[:, 0], -torch.inf)
        heads.append(score.softmax(-1) @ values[..., own])
    torch.testing.assert_close(found, attention.output(torch.cat(heads, -1)))


def test_only_the_first_layer_compares_positions_with_contents() -> None:
    layers = make().decoder_layers
    has = ["cross_attention.query_position.weight" in dict(layer.named_parameters()) for layer in layers]
    assert has == [True, False, False]


@pytest.mark.parametrize("form", TRANSFORMATIONS)
@pytest.mark.parametrize(("dim", "heads", "layers"), [(32, 4, 3), (24, 3, 3), (20, 5, 3), (32, 4, 1)])
def test_every_form_and_width_learns(form: str, dim: int, heads: int, layers: int) -> None:
    """All parameters do: processes that train together would wait for the gradient of one that is not used."""
    model = make(transformation=form, dim=dim, heads=heads, decoder_layers=layers).train()
    batch = images_of((64, 96), (64, 64))
    targets = [
        Target(torch.tensor([1, 4]), 0.2 + 0.3 * torch.rand(2, 4)),
        Target(torch.tensor([], dtype=torch.int64), torch.zeros(0, 4)),
    ]
    losses = conditional_detr.criterion(model.config)(model(batch.images, batch.padding), targets)
    losses.total.backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert silent == []


def test_the_first_layer_looks_around_the_point_itself() -> None:
    """T has seen nothing yet there, so it is the identity: other weights of T change the later layers alone."""
    model, batch = make(), images_of((64, 64))
    with torch.no_grad():
        before = model(batch.images, batch.padding).boxes
        assert model.transformation.scale is not None
        model.transformation.scale.layers[-1].bias.add_(1.0)
        after = model(batch.images, batch.padding).boxes
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_points_are_exact_where_all_else_is_computed_in_less() -> None:
    """A point is half of every box's centre: in eight bits it would be right to some pixels only."""
    model, batch = make(), images_of((64, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory, queries = model.encode(batch.images, batch.padding), model.queries(1)
        found = model.decode(memory, queries).reference
    with torch.no_grad():
        wanted = model.reference_head(queries.position).sigmoid()
    assert memory.tokens.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


def test_boxes_start_at_their_points_and_classes_at_one_percent() -> None:
    model, batch = conditional_detr.Model(TINY).eval(), images_of((64, 64))
    with torch.no_grad():
        predictions = model(batch.images, batch.padding)
        points = model.reference_head(model.query_position).sigmoid()
    torch.testing.assert_close(predictions.boxes[..., :2], points.expand(3, 1, 7, 2), atol=1e-5, rtol=0)
    assert bool((predictions.boxes[..., 2:] == 0.5).all())
    assert torch.allclose(model.class_head.bias.sigmoid(), torch.tensor(0.01))


def test_queries_that_start_on_a_grid_read_their_points() -> None:
    preset = conditional_detr.PRESETS["conditional-detr-nano"]
    model = conditional_detr.Model(dataclasses.replace(preset, backbone="resnet-nano"))
    wanted = spread_points(100)
    with torch.no_grad():
        points = model.reference_head(model.query_position).sigmoid()
    torch.testing.assert_close(model.query_position.detach(), encode_points(wanted, 128, 20.0))
    assert (points - wanted).abs().mean() < 0.05
    assert (points - wanted).abs().max() < 0.2
    for layer in model.decoder_layers:
        look = layer.cross_attention
        assert torch.equal(look.key_position.weight, look.query_spatial.weight)


def test_a_decoder_without_blocked_queries_sees_all_and_with_them_none_of_the_others() -> None:
    model = make()
    memory = model.encode(*images_of((64, 64))[:2])
    content, position = torch.zeros(1, 6, 32), torch.randn(1, 6, 32)
    group = torch.arange(6) // 3
    blocked = group[:, None] != group[None, :]
    changed = position.clone()
    changed[:, 3:] += 1

    def states(at: Tensor, separation: Tensor | None) -> Tensor:
        with torch.no_grad():
            return model.decode(memory, Queries(content, at, separation)).states[:, :, :3]

    assert torch.equal(states(position, blocked), states(changed, blocked))
    assert not torch.allclose(states(position, None), states(changed, None))


def test_padding_changes_nothing() -> None:
    model = make(temperature=20.0)
    image = torch.randn(3, 64, 64)
    alone, together = Batch.from_images([image]), Batch.from_images([image, torch.randn(3, 128, 160)])
    with torch.no_grad():
        memory, padded = model.encode(*alone[:2]), model.encode(*together[:2])
        cells = [2 * 64 // 32, 128 // 32, 160 // 32]
        assert padded.padding is not None
        assert int((~padded.padding[0]).sum()) == cells[0] * cells[0] // 4
        # The backbone sees borders, so the comparison is of the decoder: same tokens, more padding behind them.
        filled = Memory(
            torch.cat([memory.tokens, torch.randn(1, 9, 32)], 1),
            torch.cat([memory.position, torch.randn(1, 9, 32)], 1),
            torch.cat([torch.zeros(1, memory.tokens.shape[1]), torch.ones(1, 9)], 1).bool(),
            (1, 1),
        )
        queries = model.queries(1)
        torch.testing.assert_close(
            model.predict(model.decode(filled, queries)).boxes, model.predict(model.decode(memory, queries)).boxes
        )


def test_groups_of_queries_learn_side_by_side() -> None:
    """Each group's part of the loss is what it would be alone, and the first one alone predicts."""
    model = make(query_groups=3).train()
    batch = images_of((64, 96), (64, 64))
    targets = [
        Target(torch.tensor([1, 4]), 0.2 + 0.3 * torch.rand(2, 4)),
        Target(torch.tensor([2]), torch.rand(1, 4) / 2),
    ]
    with torch.no_grad():
        together = model(batch.images, batch.padding)
        alone = []
        for group in range(3):
            position = model.query_position[7 * group : 7 * (group + 1)].expand(2, -1, -1)
            alone.append(model(batch.images, batch.padding, Queries(torch.zeros_like(position), position)))
        predicted = model.eval()(batch.images, batch.padding)
    for layer in range(3):
        for group in range(3):
            torch.testing.assert_close(together.boxes[3 * layer + 2 - group], alone[group].boxes[layer])
    torch.testing.assert_close(predicted.boxes, alone[0].boxes)
    criterion = conditional_detr.criterion(model.config)
    totals = torch.stack([criterion(each, targets).total for each in alone])
    torch.testing.assert_close(criterion(together, targets).total, totals.mean(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformation": "rotation"},
            "Bad value for transformation; got 'rotation'; expected one of identity, sing",
        ),
        ({"query_start": "middle"}, "Bad value for query_start"),
        ({"position": "cosine"}, "Bad value for position"),
        ({"dim": 30, "heads": 3}, "got dim 30, heads 3; expected dim a multiple of 4 and of heads"),
        ({"focal_gamma": -1.0}, "Bad value for focal_gamma"),
        ({"dropout": 1.0}, "Bad value for dropout"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        conditional_detr.Model(dataclasses.replace(TINY, **changes))
