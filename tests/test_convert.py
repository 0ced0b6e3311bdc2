"""Weights of others into ours: the architecture is read off, every tensor lands, and what does not fit is named."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from official_keys import official_state
from safetensors.torch import save_file
from torch import Tensor, nn

from detrkit import ModelError, UsageError, convert, models
from detrkit.models import conditional_detr, detr

SIZES = {
    "num_classes": 5,
    "backbone": "resnet18",
    "num_queries": 7,
    "dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward": 48,
}
SMALL = detr.Config(**SIZES)


pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def model(narrow: None) -> detr.Model:
    return detr.Model(SMALL)


@pytest.fixture(scope="module")
def conditional(narrow: None) -> conditional_detr.Model:
    return conditional_detr.Model(conditional_detr.Config(**SIZES))


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
        {"backbone": "resnet34", "stride": 16},
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


def test_conditional_detr_is_recognised(conditional: conditional_detr.Model) -> None:
    found = convert.read(official_state(conditional))
    assert (found.variant, found.origin) == ("conditional_detr", "official Conditional DETR")
    assert isinstance(found.model, conditional_detr.Model)
    assert found.model.config == conditional.config  # each row of its class head is a class
    assert same(found.model, conditional)


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


def test_other_classes_start_the_class_head_anew_and_nothing_else(
    model: detr.Model, conditional: conditional_detr.Model, state: dict[str, Tensor]
) -> None:
    found = convert.read(state, num_classes=2)
    anew = {fate.source: fate for fate in found.report if fate.fate == "re-initialised"}
    assert set(anew) == {"class_embed.weight", "class_embed.bias"}
    assert anew["class_embed.weight"].targets == ("class_head.weight",)
    assert anew["class_embed.weight"].note == "2 classes for 5"
    ours, theirs = found.model.state_dict(), model.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set(models.class_heads(model))
    assert "2 re-initialised (class_head.weight, class_head.bias)" in convert.summarise(found.report)
    focal = convert.read(official_state(conditional), num_classes=2).model
    assert torch.allclose(focal.class_head.bias.sigmoid(), torch.tensor(0.01))
    assert not any(fate.fate == "re-initialised" for fate in convert.read(state, num_classes=5).report)


def test_the_caller_keeps_its_random_state(state: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    convert.read(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_checkpoints_are_unwrapped(model: detr.Model, state: dict[str, Tensor]) -> None:
    checkpoint = {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 299, "args": object()}
    assert same(converted(checkpoint), model)


@pytest.mark.parametrize("prefix", ["module.", "detr.", "model.", "module.detr."])
def test_prefixes_of_wrappers_are_seen_through(prefix: str, model: detr.Model, state: dict[str, Tensor]) -> None:
    found = convert.read({prefix + name: value for name, value in state.items()})
    assert same(found.model, model)
    assert found.report[0].source.startswith(prefix)


def test_what_the_checkpoints_arguments_say_is_used(tmp_path: Path, state: dict[str, Tensor]) -> None:
    arguments = argparse.Namespace(nheads=4, dilation=True, lr=1e-4, output_dir="out")
    torch.save({"model": state, "args": arguments, "epoch": 1}, tmp_path / "checkpoint.pth")
    for source in (tmp_path / "checkpoint.pth", {"model": state, "args": arguments}):
        config: Any = convert.read(source).model.config
        assert (config.heads, config.dilated) == (4, True)
        config = convert.read(source, heads=2, dilated=False).model.config
        assert (config.heads, config.dilated) == (2, False)


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


def test_every_tensor_is_accounted_for(state: dict[str, Tensor]) -> None:
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    found = convert.read(state)
    fates = {fate.source: fate for fate in found.report}
    assert list(fates) == list(state)
    packed = fates["transformer.decoder.layers.1.multihead_attn.in_proj_bias"]
    assert (packed.fate, packed.shape, packed.note) == ("reshaped", (96,), "cut into query, key, value")
    assert packed.targets == tuple(
        f"decoder_layers.1.cross_attention.{part}.bias" for part in ("query", "key", "value")
    )
    assert fates["query_embed.weight"] == convert.Fate("query_embed.weight", ("query_position",), (7, 32), "kept")
    assert fates["backbone.0.body.bn1.num_batches_tracked"].fate == "left out"
    assert convert.counts(found.report) == {
        "kept": len(state) - 17, "reshaped": 16, "re-initialised": 0, "missing": 0, "left out": 1
    }  # fmt: skip
    assert convert.summarise(found.report) == f"{len(state) - 17} tensors kept, 16 reshaped, 1 left out"
    groups = {group.name: group.number for group in convert.exceptions(found.report)}
    assert groups["transformer.encoder.layers.*.self_attn.in_proj_weight"] == 2
    assert groups["backbone.0.body.bn1.num_batches_tracked"] == 1
    assert sum(groups.values()) == 17


def test_missing_tensors_are_named_in_a_summary() -> None:
    report = (convert.Fate("", ("a.b",), (1,), "missing"), convert.Fate("x", ("y",), (1,), "kept"))
    assert convert.summarise(report) == "1 tensor kept, 1 missing (a.b)"
    assert convert.summarise(()) == "0 tensors kept"


@pytest.mark.parametrize("has_it", [True, False])
def test_the_order_of_norms_is_not_overruled(has_it: bool) -> None:
    state = official_state(detr.Model(dataclasses.replace(SMALL, pre_norm=has_it)))
    where = "left over" if has_it else "missing"
    with pytest.raises(
        ModelError, match=rf"{where}: transformer\.encoder\.norm\.weight, transformer\.enc.*pre_norm={has_it}, not"
    ):
        convert.from_official(state, pre_norm=not has_it)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            {"num_queries": 9},
            r"query_embed\.weight \(7, 32\) for \(9, 32\)\. The tensors say num_queries=7, not 9: leave",
        ),
        ({"dim": 64}, r"input_proj\.weight .*self_attn\.in_proj_weight \(96, 32\) for \(192, 64\).*dim=32, not 64"),
        ({"decoder_layers": 2}, r"left over: transformer\.decoder\.layers\.2\..*decoder_layers=3"),
        ({"position": "learned"}, r"missing: backbone\.1\.row_embed\.weight, backbone\.1\.col_embed\.weight"),
        ({"backbone": "resnet34"}, r"missing: backbone\.0\.body\.layer1\.2\.conv1\.weight.*backbone='resnet18'"),
    ],
)
def test_contradictions_are_refused(state: dict[str, Tensor], override: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        convert.from_official(state, **override)


def test_unknown_keys_are_named(state: dict[str, Tensor], conditional: conditional_detr.Model) -> None:
    state["something.weight"] = torch.zeros(1)
    with pytest.raises(ModelError, match=r"Not all of these are weights of DETR; got also something\.weight"):
        convert.from_official(state)
    mixed = {**official_state(conditional), **state}
    with pytest.raises(ModelError, match=r"got also transformer\.decoder\.layers\.0\.self_attn\.in_proj_weight"):
        convert.from_official(mixed)


def test_missing_keys_are_named(state: dict[str, Tensor]) -> None:
    del state["transformer.decoder.layers.1.self_attn.in_proj_bias"]
    del state["bbox_embed.layers.2.bias"]
    expected = (
        r"do not fit.*missing: transformer\.decoder\.layers\.1\.self_attn\.in_proj_bias, bbox_embed\.layers\.2\.bias"
    )
    with pytest.raises(ModelError, match=expected):
        convert.from_official(state)


def test_other_shapes_are_named(state: dict[str, Tensor]) -> None:
    state["input_proj.weight"] = torch.zeros(16, 64, 1, 1)
    with pytest.raises(ModelError, match=r"other shapes: input_proj\.weight \(16, 64, 1, 1\) for \(32, 64, 1, 1\)"):
        convert.from_official(state)


def test_broken_numbers_are_named(state: dict[str, Tensor]) -> None:
    state["input_proj.bias"][3] = torch.nan
    with pytest.raises(ModelError, match=r"not finite: input_proj\.bias"):
        convert.from_official(state)


def test_two_detectors_in_one_state_are_not_guessed_between(state: dict[str, Tensor]) -> None:
    twice = {f"{prefix}.{name}": value for prefix in ("model", "ema") for name, value in state.items()}
    with pytest.raises(ModelError, match=r"more than once; got names under 'ema\.' and 'model\.'"):
        convert.from_official(twice)


@pytest.mark.parametrize("key", ["query_embed.weight", "transformer.decoder.layers.0.linear1.weight"])
def test_what_tells_the_architecture_is_asked_for(state: dict[str, Tensor], key: str) -> None:
    del state[key]
    with pytest.raises(ModelError, match=f"DETR are not complete; got no {key}"):
        convert.from_official(state)


def test_empty_and_foreign_states_are_refused(model: detr.Model, state: dict[str, Tensor]) -> None:
    del state["class_embed.weight"]
    for foreign in ({}, {"model": {}}, {"fc.weight": torch.zeros(2, 2)}, state):
        with pytest.raises(
            ModelError, match=r"not the weights of a detector.*expected .*DETR, with class_embed\.weight"
        ):
            convert.from_official(foreign)
    with pytest.raises(ModelError, match="name the model folder"):
        convert.from_official(model.state_dict())


def test_unknown_backbones_are_refused(state: dict[str, Tensor]) -> None:
    for name in ("conv1.weight", "conv2.weight"):
        state[f"backbone.0.body.layer1.2.{name}"] = torch.zeros(8, 8, 3, 3)
    with pytest.raises(UsageError, match="no backbone of this name; got 'resnet20'"):
        convert.from_official(state)


def test_files(tmp_path: Path, model: detr.Model, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "a.pth")
    torch.save({"model": state}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        assert same(convert.read(tmp_path / name).model, model)
        whole = (tmp_path / name).read_bytes()
        for part in (0.3, 0.999):
            (tmp_path / f"cut-{name}").write_bytes(whole[: int(len(whole) * part)])
            with pytest.raises(ModelError, match=f"cut-{name}: The (weight )?file"):
                convert.read(tmp_path / f"cut-{name}")
    with pytest.raises(ModelError, match=r"none\.pth: There is no such weight file"):
        convert.read(tmp_path / "none.pth")


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("trap").write_text, ("sprung",))


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "args": Trap()}, "trap.pth")
    with pytest.raises(ModelError, match=r"trap\.pth: The file is damaged, or holds objects that only code"):
        convert.read("trap.pth")
    assert not Path("trap").exists()


def test_rename_cuts_and_moves() -> None:
    table = ((r"a\.(\d+)\.packed", (r"b.\1.first", r"b.\1.second")), (r"c", "d"))
    found = convert.rename({"a.3.packed": torch.arange(4), "c": torch.zeros(1)}, table)
    assert {name: value.tolist() for name, value in found.items()} == {
        "b.3.first": [0, 1],
        "b.3.second": [2, 3],
        "d": [0.0],
    }
    with pytest.raises(ModelError, match="does not know; got e"):
        convert.rename({"e": torch.zeros(1)}, table)
    back = convert.rename_back(found, table)
    assert {name: value.tolist() for name, value in back.items()} == {"a.3.packed": [0, 1, 2, 3], "c": [0.0]}
    with pytest.raises(ModelError, match=r"no place under the other names; got x, a\.3\.packed"):
        convert.rename_back({"x": torch.zeros(1), "b.3.first": torch.zeros(1)}, table)


def test_tables_can_be_read_both_ways(
    model: detr.Model, conditional: conditional_detr.Model, state: dict[str, Tensor]
) -> None:
    for ours, theirs in ((model, state), (conditional, official_state(conditional))):
        table = models.variant(type(ours).__module__.rpartition(".")[2]).OFFICIAL
        back = convert.rename_back(ours.state_dict(), table)
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_packed_tensors_that_cannot_be_cut_are_named() -> None:
    with pytest.raises(ModelError, match=r"x: The tensor cannot be cut into 3 equal parts; got \(4,\)"):
        convert.rename({"x": torch.zeros(4)}, ((r"x", ("a", "b", "c")),))


def test_load_strictly_names_what_is_left_over(model: detr.Model) -> None:
    with pytest.raises(ModelError, match="left over: extra"):
        convert.load_strictly(model, {**model.state_dict(), "extra": torch.zeros(1)})
