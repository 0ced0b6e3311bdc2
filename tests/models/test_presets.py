"""Variants and presets by name, fields by name, and what is said where a name is wrong."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detrkit import UsageError, models
from detrkit.models import detr
from detrkit.nn.backbone import names as backbone_names


def test_variants_are_found_by_what_lies_in_the_package() -> None:
    assert "detr" in models.names()
    assert list(models.names()) == sorted(set(models.names()))
    for name in models.names():
        assert isinstance(models.variant(name), models.Variant)


def test_a_variant_is_found_once() -> None:
    assert models.variant("detr") is models.variant("detr")
    assert models.variant("detr").Config is detr.Config


def test_presets_are_unique_over_variants() -> None:
    counted = [preset for name in models.names() for preset in models.variant(name).PRESETS]
    assert sorted(counted) == sorted(models.presets())


@pytest.mark.parametrize("preset", models.presets())
def test_presets_hold_a_config_of_their_variant(preset: str) -> None:
    module, config = models.configure(preset)
    assert isinstance(config, module.Config)
    assert config.backbone in backbone_names()
    assert config.image_size <= config.longest


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("suffix", ["", "-dc5"])
def test_the_papers_presets_are_the_paper(depth: int, suffix: str) -> None:
    """Section 4 and appendix A.4 of the paper, and the defaults of the official training script."""
    _, config = models.configure(f"detr-r{depth}{suffix}")
    expected: dict[str, Any] = {
        "backbone": f"resnet{depth}",
        "dilated": suffix == "-dc5",
        "stride": 32,
        "frozen_stages": 2,
        "num_queries": 100,
        "dim": 256,
        "heads": 8,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "feedforward": 2048,
        "dropout": 0.1,
        "pre_norm": False,
        "position": "sine",
        "temperature": 10000.0,
        "no_object_weight": 0.1,
        "class_weight": 1.0,
        "l1_weight": 5.0,
        "giou_weight": 2.0,
        "image_size": 800,
        "longest": 1333,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_model_of_the_paper_has_its_size() -> None:
    """Table 1 of the paper: 41 M parameters; frozen norms are not counted."""
    model = models.build("detr-r50")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(41.5, abs=0.1)


def test_fields_are_replaced_and_the_preset_stays() -> None:
    before = models.configure("detr-r50")[1]
    module, config = models.configure("detr-r50", num_classes=3, dropout=0, dilated=True, backbone="resnet18")
    assert module is detr
    assert config == dataclasses.replace(before, num_classes=3, dropout=0.0, dilated=True, backbone="resnet18")
    assert isinstance(config.dropout, float)
    assert models.configure("detr-r50")[1] == before


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("num_queries", "50", 50),
        ("dropout", "0.25", 0.25),
        ("dropout", "1e-1", 0.1),
        ("pre_norm", "true", True),
        ("pre_norm", "No", False),
        ("dilated", "1", True),
        ("backbone", "resnet18", "resnet18"),
    ],
)
def test_text_is_read_as_the_fields_type(field: str, text: str, value: object) -> None:
    found = getattr(models.configure("detr-r50", **{field: text})[1], field)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_queries", "many", "int"),
        ("num_queries", 2.5, "int"),
        ("num_queries", "2.5", "int"),
        ("num_queries", True, "int"),
        ("num_queries", None, "int"),
        ("pre_norm", "maybe", "bool"),
        ("pre_norm", 1, "bool"),
        ("dropout", "much", "float"),
        ("dropout", [0.1], "float"),
        ("dropout", "nan", "float"),
        ("backbone", 50, "str"),
    ],
)
def test_values_of_another_type_are_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError, match=rf"Bad value for {field}; got .*; expected {expected}"):
        models.configure("detr-r50", **{field: value})


def test_numbers_may_be_numpys() -> None:
    _, config = models.configure(
        "detr-r50", num_queries=np.int64(50), dropout=np.float32(0.25), pre_norm=np.bool_(True)
    )
    assert (config.num_queries, config.dropout, config.pre_norm) == (50, 0.25, True)
    assert [type(value) for value in (config.num_queries, config.dropout, config.pre_norm)] == [int, float, bool]


def test_another_size_keeps_the_proportion_and_stays_within_what_images_have() -> None:
    _, config = models.configure("detr-r50")
    seen = models.at_size(config, 400)
    assert (seen.image_size, seen.longest) == (400, round(1333 / 2))
    assert models.at_size(config, 400, 500).longest == 500
    assert models.at_size(config, 400, 10**6).longest == 10**6  # no limit
    with pytest.raises(UsageError, match="Bad value for image_size; got -3; expected at least 1"):
        models.at_size(config, -3)
    with pytest.raises(
        UsageError, match=r"No image has so many pixels; got 20000 × 20000; expected at most 178,000,000"
    ):
        models.at_size(config, 20_000)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no such preset; got 'detr-r5O'; expected one of .*Did you mean 'detr-r50"):
        models.build("detr-r5O")
    with pytest.raises(
        UsageError, match=r"preset detr-r50 has no such field; got 'num_class'.*Did you mean 'num_classes'"
    ):
        models.build("detr-r50", num_class=3)
    with pytest.raises(UsageError, match=r"no such variant; got 'dert'; expected one of .*Did you mean 'detr'"):
        models.variant("dert")
    with pytest.raises(UsageError, match=r"no such preset; got 'xyz'; expected one of [^.]*$"):
        models.configure("xyz")


def test_modules_that_are_private_are_no_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SimpleNamespace(name=name) for name in ("zebra", "_shared", "apple")]
    monkeypatch.setattr(models.pkgutil, "iter_modules", lambda path: found)
    assert models.names() == ("apple", "zebra")


def test_a_build_repeats_with_the_seed() -> None:
    import torch

    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        model = models.build("detr-r50", backbone="resnet-nano", dim=32, encoder_layers=1, decoder_layers=1)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(), weights())
