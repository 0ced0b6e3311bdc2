"""DETR against torch's decoder, and what padding may not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from official_keys import official_state
from torch import Tensor, nn

from detrkit import Batch, Target, UsageError
from detrkit.models import detr
from detrkit.structures import Memory, Queries

TINY = detr.Config(
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


def make(**changes: Any) -> detr.Model:
    """A tiny model in which nothing is one or zero by default, which would hide mistakes."""
    model = detr.Model(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.copy_(
                    0.5 + torch.rand_like(value) if name.endswith(("weight", "var")) else torch.randn_like(value) / 9
                )
    return model


def images_of(*sizes: tuple[int, int]) -> Batch:
    return Batch.from_images([torch.randn(3, height, width) for height, width in sizes])


class Pooled(nn.Module):
    """A backbone without borders: each cell sees its own square of pixels and nothing else."""

    channels = (12,)

    def __init__(self, stride: int):
        super().__init__()
        self.shrink = nn.Conv2d(3, 12, stride, stride)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.shrink(images),)


def make_pooled(stride: int = 8, **changes: Any) -> detr.Model:
    model = make(**changes)
    model.backbone = Pooled(stride)
    model.projection = nn.Conv2d(12, TINY.dim, 1)
    return model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_equals_torch_without_positions(pre_norm: bool) -> None:
    model = make(pre_norm=pre_norm)
    theirs = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=pre_norm), 3, norm=nn.LayerNorm(32)
    )
    prefix = "transformer.decoder."
    state = {key.removeprefix(prefix): value for key, value in official_state(model).items() if key.startswith(prefix)}
    theirs.load_state_dict(state)

    tokens, content, nothing = torch.randn(2, 6, 32), torch.randn(2, 7, 32), torch.zeros(2, 7, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    blocked = torch.rand(7, 7) > 0.6
    blocked.fill_diagonal_(False)
    found = model.decode(
        Memory(tokens, torch.zeros_like(tokens), padding, (2, 3)), Queries(content, nothing, blocked)
    ).states
    assert found.shape == (3, 2, 7, 32)
    x = content
    for layer, state_ in zip(theirs.layers, found, strict=True):
        x = layer(x, tokens, tgt_mask=blocked, memory_key_padding_mask=padding)
        torch.testing.assert_close(state_, theirs.norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positions_join_queries_and_keys_but_no_value(pre_norm: bool) -> None:
    model = make(pre_norm=pre_norm, decoder_layers=1)
    layer = model.decoder_layers[0]
    assert isinstance(layer, detr.DecoderLayer)
    x, position = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    tokens, where = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    found = model.decode(Memory(tokens, where, None, (2, 3)), Queries(x, position)).states[0]

    def block(norm: nn.Module, inner: Any, x: Tensor) -> Tensor:
        return x + inner(norm(x)) if pre_norm else norm(x + inner(x))

    x = block(layer.self_attention_norm, lambda y: layer.self_attention(y + position, y + position, y), x)
    x = block(layer.cross_attention_norm, lambda y: layer.cross_attention(y + position, tokens + where, tokens), x)
    x = block(layer.feedforward_norm, layer.feedforward, x)
    torch.testing.assert_close(found, model.decoder_norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_padded_tokens_have_no_say(position: str, pre_norm: bool) -> None:
    model = make(position=position, pre_norm=pre_norm)
    batch = images_of((64, 128), (96, 96))
    with torch.no_grad():
        before, memory = model(batch.images, batch.padding), model.encode(batch.images, batch.padding)
        assert memory.padding is not None
        assert memory.padding.view(2, 3, 4).sum((1, 2)).tolist() == [4, 3]
        outside = memory.padding.view(2, 1, 3, 4)
        handle = model.projection.register_forward_hook(lambda _, __, x: torch.where(outside, x + 100, x))
        after, changed = model(batch.images, batch.padding), model.encode(batch.images, batch.padding)
        handle.remove()
    assert torch.equal(changed.tokens[~memory.padding], memory.tokens[~memory.padding])
    assert not torch.equal(changed.tokens, memory.tokens)
    assert torch.equal(after.boxes, before.boxes)
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_an_answer_does_not_depend_on_padding(pre_norm: bool) -> None:
    """Apart from what a backbone's convolutions see at the border."""
    model = make_pooled(pre_norm=pre_norm)
    batch = images_of((32, 56), (48, 40), (48, 56))
    with torch.no_grad():
        together = model(batch.images, batch.padding)
        for row, (height, width) in enumerate([(32, 56), (48, 40), (48, 56)]):
            alone = images_of((height, width))
            single = model(batch.images[row : row + 1, :, :height, :width], alone.padding)
            torch.testing.assert_close(single.boxes[:, 0], together.boxes[:, row], atol=1e-5, rtol=0)
            torch.testing.assert_close(single.logits[:, 0], together.logits[:, row], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 64), (65, 97), (31, 5)])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_sizes_need_not_be_multiples_of_the_stride(height: int, width: int, stride: int) -> None:
    model = make(stride=stride)
    batch = images_of((height, width), (40, 50))
    with torch.no_grad():
        memory, found = model.encode(batch.images, batch.padding), model(batch.images, batch.padding)
    rows, columns = (-(-side // stride) for side in batch.images.shape[2:])
    assert memory.grid == (rows, columns)
    assert memory.tokens.shape == memory.position.shape == (2, rows * columns, 32)
    assert memory.padding is not None
    assert not bool(memory.padding.all(1).any()), "an image of which nothing is left"
    assert all(bool(part.isfinite().all()) for part in found)


def test_learned_positions_take_grids_beyond_their_cells() -> None:
    model = make_pooled(stride=4, position="learned")
    with torch.no_grad():
        found = model(torch.randn(1, 3, 8, 240), torch.zeros(1, 8, 240, dtype=torch.bool))
    assert bool(found.boxes.isfinite().all())


def test_queries_are_positions_without_content() -> None:
    model = make()
    queries = model.queries(3)
    assert queries.blocked is None
    assert not bool(queries.content.any())
    assert queries.position.shape == (3, 7, 32)
    assert all(torch.equal(row, model.query_position) for row in queries.position)


def test_queries_that_start_on_a_grid_begin_around_their_points() -> None:
    model = detr.Model(dataclasses.replace(TINY, query_start="grid"))
    queries = model.queries(2)
    assert torch.equal(queries.content, queries.position)
    assert model.query_content is not None
    assert model.query_content is not model.query_position
    for layer in model.decoder_layers:
        assert isinstance(layer, detr.DecoderLayer)
        assert torch.equal(layer.cross_attention.key.weight, layer.cross_attention.query.weight)


def test_predictions_are_boxes_of_all_layers() -> None:
    model = make()
    batch = images_of((64, 64))
    with torch.no_grad():
        found = model(batch.images, batch.padding)
    assert found.logits.shape == (3, 1, 7, 6)
    assert found.boxes.shape == (3, 1, 7, 4)
    assert bool(((found.boxes > 0) & (found.boxes < 1)).all())
    for layer in range(3):
        assert torch.equal(found.logits[layer], model.class_head(found.hidden[layer]))


def test_dropout_acts_in_training_alone() -> None:
    model, batch = make(dropout=0.3), images_of((64, 64))
    with torch.no_grad():
        calm = [model(batch.images, batch.padding).logits for _ in range(2)]
        model.train()
        wild = [model(batch.images, batch.padding).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*wild)


def test_criterion_has_the_weights_of_the_config() -> None:
    criterion = detr.criterion(dataclasses.replace(TINY, class_weight=3.0, l1_weight=4.0, giou_weight=6.0))
    assert criterion.cost == criterion.loss == (3.0, 4.0, 6.0)
    assert detr.criterion(detr.Config()).cost == (1.0, 5.0, 2.0)


def test_frozen_stages_do_not_train() -> None:
    model = make(frozen_stages=2)
    batch = images_of((64, 64))
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    detr.criterion(model.config)(model.train()(batch.images, batch.padding), [target]).total.backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen
    assert all(name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1")) for name in frozen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "heads": 3}, "got dim 30, heads 3; expected dim a multiple of 4 and of heads"),
        ({"heads": 5}, "got dim 32, heads 5"),
        ({"heads": 0}, "Bad value for heads; got 0; expected at least 1"),
        ({"dim": 0}, "Bad value for dim"),
        ({"num_classes": 0}, "Bad value for num_classes"),
        ({"num_queries": -3}, "Bad value for num_queries; got -3"),
        ({"decoder_layers": 0}, "Bad value for decoder_layers"),
        ({"encoder_layers": -1}, "Bad value for encoder_layers; got -1; expected at least 0"),
        ({"feedforward": 0}, "Bad value for feedforward"),
        ({"dropout": 1.5}, "Bad value for dropout; got 1.5"),
        ({"l1_weight": -5.0}, r"Bad value for l1_weight; got -5\.0; expected at least 0"),
        ({"temperature": 0.0}, "Bad value for temperature"),
        ({"image_size": 0}, "Bad value for image_size"),
        ({"position": "cosine"}, "Bad value for position; got 'cosine'; expected one of sine, learned"),
        ({"backbone": "resnet5"}, "no backbone of this name; got 'resnet5'.*Did you mean"),
        ({"stride": 7}, "not levels of a backbone"),
        ({"stride": 16, "dilated": True}, "Only the last stage can be dilated.*got dilated with stride 16"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        detr.Model(dataclasses.replace(TINY, **changes))


def test_an_encoder_is_not_needed() -> None:
    batch = images_of((64, 64))
    assert make(encoder_layers=0)(batch.images, batch.padding).logits.shape == (3, 1, 7, 6)


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
        assert together.boxes.shape == (9, 2, 7, 4)
        alone = []
        for group in range(3):
            position = model.query_position[7 * group : 7 * (group + 1)].expand(2, -1, -1)
            alone.append(model(batch.images, batch.padding, Queries(torch.zeros_like(position), position)))
        predicted = model.eval()(batch.images, batch.padding)
    for layer in range(3):
        for group in range(3):
            torch.testing.assert_close(
                together.boxes[3 * layer + 2 - group], alone[group].boxes[layer], atol=1e-6, rtol=0
            )
    assert torch.equal(predicted.boxes, alone[0].boxes)
    single = detr.criterion(dataclasses.replace(model.config, query_groups=1))
    totals = torch.stack([single(each, targets).total for each in alone])
    losses = detr.criterion(model.config)(together, targets)
    torch.testing.assert_close(losses.total, totals.mean(), atol=1e-4, rtol=1e-5)
    assert torch.equal(losses.class_error, single(alone[0], targets).class_error)
