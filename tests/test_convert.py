"""Official weights into ours: the architecture is read off, every tensor lands, and what does not fit is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from official_keys import official_state
from torch import Tensor, nn

from detrkit import ModelError, UsageError, convert
from detrkit.models import detr

SMALL = detr.Config(
    num_classes=5,
    backbone="resnet18",
    num_queries=7,
    dim=32,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=48,
)


@pytest.fixture(scope="module")
def model() -> detr.Model:
    return detr.Model(SMALL)


@pytest.fixture
def state(model: detr.Model) -> dict[str, Tensor]:
    return official_state(model)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def converted(state: dict[str, Any], **overrides: Any) -> detr.Model:
    model = convert.from_official(state, **overrides)
    assert isinstance(model, detr.Model)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pre_norm": True},
        {"position": "learned"},
        {"num_classes": 1, "num_queries": 3, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16},
        {"backbone": "resnet34"},
        {"backbone": "resnet50"},
        {"backbone": "resnet101", "pre_norm": True, "position": "learned"},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "plain",
)
def test_architecture_is_read_off_keys_and_shapes(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    model = detr.Model(config)
    again = converted(official_state(model))
    assert again.config == config
    assert same(again, model)


def test_the_names_written_out_are_those_of_torch(state: dict[str, Tensor]) -> None:
    """The official layers descend from torch's: the same attributes, so the same keys and shapes."""
    for stack, layer in (("encoder", nn.TransformerEncoderLayer), ("decoder", nn.TransformerDecoderLayer)):
        prefix = f"transformer.{stack}.layers.1."
        shapes = {name.removeprefix(prefix): value.shape for name, value in state.items() if name.startswith(prefix)}
        assert shapes == {name: value.shape for name, value in layer(32, 8, 48).state_dict().items()}


def test_num_classes_is_the_heads_rows_less_no_object(state: dict[str, Tensor]) -> None:
    assert state["class_embed.weight"].shape[0] == 6
    again = converted(state)
    assert again.config.num_classes == 5
    assert torch.equal(again.class_head.weight, state["class_embed.weight"])


def test_training_checkpoints_are_unwrapped(model: detr.Model, state: dict[str, Tensor]) -> None:
    checkpoint = {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 299, "args": object()}
    assert same(converted(checkpoint), model)


def test_what_shapes_do_not_show_is_said_by_the_caller(state: dict[str, Tensor]) -> None:
    config = converted(state, dilated=True, heads=4, dropout=0.0).config
    assert config == dataclasses.replace(SMALL, dilated=True, heads=4, dropout=0.0)
    with pytest.raises(UsageError, match=r"no such field; got 'head'.*Did you mean 'heads'"):
        convert.from_official(state, head=4)
    with pytest.raises(UsageError, match="Bad value for heads; got 'many'"):
        convert.from_official(state, heads="many")


def test_the_source_is_left_alone(state: dict[str, Tensor]) -> None:
    keys, before = list(state), state["input_proj.weight"].clone()
    model = converted(state)
    with torch.no_grad():
        model.projection.weight.zero_()
    assert list(state) == keys
    assert torch.equal(state["input_proj.weight"], before)


def test_half_precision_becomes_single(state: dict[str, Tensor]) -> None:
    model = converted({name: value.half() for name, value in state.items()})
    assert model.projection.weight.dtype == torch.float32


def test_unknown_keys_are_named(state: dict[str, Tensor]) -> None:
    state["mask_head.lay1.weight"] = torch.zeros(1)
    with pytest.raises(ModelError, match=r"does not know; got mask_head\.lay1\.weight\. Convert the plain detector"):
        convert.from_official(state)


def test_missing_keys_are_named(state: dict[str, Tensor]) -> None:
    del state["transformer.decoder.layers.1.self_attn.in_proj_bias"]
    del state["bbox_embed.layers.2.bias"]
    with pytest.raises(
        ModelError, match=r"do not fit.*missing: box_head\.layers\.2\.bias, decoder_layers\.1\.self_att"
    ):
        convert.from_official(state)


def test_other_shapes_are_named(state: dict[str, Tensor]) -> None:
    state["input_proj.weight"] = torch.zeros(16, 512, 1, 1)
    with pytest.raises(ModelError, match=r"other shapes: projection\.weight \(16, 512, 1, 1\) for \(32, 512, 1, 1\)"):
        convert.from_official(state)


@pytest.mark.parametrize(
    "key", ["class_embed.weight", "query_embed.weight", "transformer.decoder.layers.0.linear1.weight"]
)
def test_what_is_no_detr_is_refused(state: dict[str, Tensor], key: str) -> None:
    del state[key]
    with pytest.raises(ModelError, match=f"not a DETR checkpoint; got .* and [0-9]+ more, without {key}"):
        convert.from_official(state)


def test_empty_and_foreign_states_are_refused() -> None:
    for state in ({}, {"model": {}}, {"fc.weight": torch.zeros(2, 2)}):
        with pytest.raises(ModelError, match="not a DETR checkpoint"):
            convert.from_official(state)


def test_unknown_backbones_are_refused(state: dict[str, Tensor]) -> None:
    for name in ("conv1.weight", "conv2.weight"):
        state[f"backbone.0.body.layer1.2.{name}"] = torch.zeros(64, 64, 3, 3)
    with pytest.raises(UsageError, match="no backbone of this name; got 'resnet20'"):
        convert.from_official(state)


def test_rename_cuts_and_moves() -> None:
    table = ((r"a\.(\d)\.packed", (r"b.\1.first", r"b.\1.second")), (r"c", "d"))
    found = convert.rename({"a.3.packed": torch.arange(4), "c": torch.zeros(1)}, table)
    assert {name: value.tolist() for name, value in found.items()} == {
        "b.3.first": [0, 1],
        "b.3.second": [2, 3],
        "d": [0.0],
    }


def test_packed_tensors_that_cannot_be_cut_are_named() -> None:
    with pytest.raises(ModelError, match=r"x: The tensor cannot be cut into 3 equal parts; got \(4,\)"):
        convert.rename({"x": torch.zeros(4)}, ((r"x", ("a", "b", "c")),))


def test_load_strictly_names_what_is_left_over(model: detr.Model) -> None:
    with pytest.raises(ModelError, match="left over: extra"):
        convert.load_strictly(model, {**model.state_dict(), "extra": torch.zeros(1)})
