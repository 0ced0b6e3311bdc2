"""Backbones by name, what is frozen, and the door to those of transformers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from filling import filled, image
from torch import Tensor, nn

from detrkit.errors import MissingExtraError, ModelError, UsageError
from detrkit.nn.backbone import AutoBackbone, build_backbone, check_levels, freeze_batch_norms, names
from detrkit.nn.resnet import FrozenBatchNorm2d
from detrkit.nn.weights import load_backbone_weights


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", names())
def test_every_name_keeps_the_common_promises(name: str):
    backbone = build_backbone(name, levels=(8, 32))
    assert backbone.strides == (8, 32)
    features = backbone(image(64, 96))
    assert [tuple(map_.shape[1:]) for map_ in features] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    stages = backbone.stages()
    assert len(stages) == 5
    listed = [value for stage in stages for module in stage for value in module.parameters()]
    assert {id(value) for value in listed} == {id(value) for value in backbone.parameters()}
    assert not any(value.requires_grad for stage in stages[:2] for module in stage for value in module.parameters())
    assert all(value.requires_grad for stage in stages[2:] for module in stage for value in module.parameters())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_processor_sees_some_images_at_a_time_where_nothing_is_learnt(name: str, monkeypatch: pytest.MonkeyPatch):
    backbone = filled(build_backbone(name, levels=(8, 32)))
    images = image(64, 96, count=5)
    sizes: list[int] = []
    maps = type(backbone).maps
    monkeypatch.setattr(type(backbone), "maps", lambda self, part: sizes.append(len(part)) or maps(self, part))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    whole = backbone(images)
    assert sizes == [5]
    for at_once, parts in ((64 * 96, [2, 2, 1]), (1, [1] * 5), (10**6, [5])):
        sizes.clear()
        backbone.at_once = at_once
        with torch.no_grad():
            found = backbone(images)
        assert sizes == parts
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("detrkit.nn.backbone.MOST_AT_ONCE", 3 * 64 * 96)
    sizes.clear()
    with torch.inference_mode():
        backbone(images)
    assert sizes == [3, 2]
    sizes.clear()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            backbone(images)
        backbone.to("meta")(images.to("meta"))
    assert sizes == [5, 5]


def test_names_are_sorted_and_none_is_forgotten():
    assert list(names()) == sorted(names())
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet-nano", "mobilenet_v2"} <= set(names())


@pytest.mark.parametrize(("wrong", "near"), [("resnet51", "resnet50"), ("mobilenetv2", "mobilenet_v2")])
def test_unknown_name_says_the_nearest(wrong: str, near: str):
    with pytest.raises(UsageError, match=rf"got '{wrong}'.*expected one of .*Did you mean '{near}'\?"):
        build_backbone(wrong)


def test_unknown_name_near_to_nothing_only_lists():
    with pytest.raises(UsageError, match="expected one of") as caught:
        build_backbone("???")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("levels", [(), (64,), (2,), (16, 16)])
def test_impossible_levels_are_refused(levels: tuple[int, ...]):
    with pytest.raises(UsageError, match="named by its stride"):
        check_levels(levels)


@pytest.mark.parametrize("stages", [-1, 6])
def test_impossible_freezing_is_refused(stages: int):
    with pytest.raises(UsageError, match=rf"frozen_stages.*got {stages}.*expected 0 … 5"):
        build_backbone("resnet-nano", frozen_stages=stages)


def test_freezing_can_be_taken_back():
    backbone = build_backbone("resnet-nano", frozen_stages=5)
    assert not any(value.requires_grad for value in backbone.parameters())
    backbone.freeze(0)
    assert all(value.requires_grad for value in backbone.parameters())


def test_what_does_not_train_answers_as_it_is_evaluated():
    backbone = build_backbone("resnet-nano", frozen_stages=2).train()
    modes = [{part.training for module in modules for part in module.modules()} for modules in backbone.stages()]
    assert modes == [{False}, {False}, *[{True}] * (len(modes) - 2)]
    backbone.freeze(0)
    assert all(part.training for part in backbone.modules())
    backbone.freeze(5)
    assert not any(part.training for child in backbone.children() for part in child.modules())
    backbone.freeze(0)
    assert all(part.training for part in backbone.modules())


def test_batch_norms_inside_a_module_are_frozen_with_their_numbers():
    body = filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())))
    x = image(5, 5)
    expected = body.eval()(x)
    freeze_batch_norms(body)
    assert isinstance(body[1][0], FrozenBatchNorm2d)
    torch.testing.assert_close(body.train()(x), expected)


class Body(nn.Module):
    """What `transformers.AutoBackbone` gives, as far as it is used: a stem and three stages."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embedder = nn.Conv2d(3, 4, 4, 4)
        self.stages = nn.ModuleList([nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 2, 2), nn.Conv2d(6, 7, 1)])
        self.norm = nn.BatchNorm2d(7)

    def forward(self, images: Tensor) -> SimpleNamespace:
        x, maps = self.embedder(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.norm(maps[-1])
        return SimpleNamespace(feature_maps=tuple(maps))

    @classmethod
    def from_pretrained(cls, source: str, *, config: Any, output_loading_info: bool) -> tuple[Body, dict[str, Any]]:
        assert output_loading_info
        if source == "org/unreachable":
            raise OSError("no connection\nand more")
        missing = {"org/partial": ["stages.0.weight"], "org/new-norm": ["norm.weight"]}.get(source, [])
        return filled(cls(config)), {"missing_keys": missing}


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package."""

    def config(source: str) -> SimpleNamespace:
        if source == "org/none":
            raise OSError("no config.json\nin a long message")
        return SimpleNamespace(stage_names=["stem", "stage1", "stage2", "stage3"])

    module = ModuleType("transformers")
    module.AutoConfig = SimpleNamespace(from_pretrained=config)
    module.AutoBackbone = SimpleNamespace(from_config=Body)
    monkeypatch.setitem(sys.modules, "transformers", module)
    return module


@pytest.mark.usefixtures("transformers")
def test_backbone_of_transformers_gives_levels_by_stride():
    backbone = build_backbone("transformers:org/model", levels=(8, 4))
    assert isinstance(backbone, AutoBackbone)
    assert backbone.body.config.out_features == ["stage1", "stage2", "stage3"]
    # Two maps have the stride 8: the deeper one is taken.
    assert (backbone.strides, backbone.channels) == ((4, 8), (5, 7))
    assert [tuple(map_.shape) for map_ in backbone(image(32, 64))] == [(1, 5, 8, 16), (1, 7, 4, 8)]
    assert isinstance(backbone.body.norm, FrozenBatchNorm2d)
    assert backbone.body.training


@pytest.mark.usefixtures("transformers")
def test_backbone_of_transformers_is_frozen_by_its_names():
    backbone = build_backbone("transformers:org/model", levels=(8,), frozen_stages=2)
    frozen = {name.rsplit(".", 1)[0] for name, value in backbone.named_parameters() if not value.requires_grad}
    assert frozen == {"body.embedder", "body.stages.0"}


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("source", ["org/model", "org/new-norm"])
def test_backbone_of_transformers_starts_from_its_published_weights(source: str):
    backbone = build_backbone(f"transformers:{source}", levels=(8,))
    report = load_backbone_weights(backbone, f"transformers:{source}")
    assert report.source == f"transformers:{source}"
    assert not report.ignored
    expected = filled(Body(None)).eval()
    x = image(32, 32)
    torch.testing.assert_close(backbone(x)[0], expected(x).feature_maps[-1])


@pytest.mark.usefixtures("transformers")
def test_what_transformers_cannot_give_is_said():
    with pytest.raises(UsageError, match=r"transformers:org/none: .*got no config\.json\. Give a hub name"):
        build_backbone("transformers:org/none")
    with pytest.raises(UsageError, match=r"does not have these levels; got \(32,\); expected some of \(4, 8\)"):
        build_backbone("transformers:org/model")
    with pytest.raises(UsageError, match="cannot be dilated"):
        build_backbone("transformers:org/model", levels=(8,), dilated=True)
    for source, message in (
        ("org/unreachable", "got no connection. Give a folder"),
        ("org/partial", "stages.0.weight"),
    ):
        backbone = build_backbone(f"transformers:{source}", levels=(8,))
        with pytest.raises(ModelError, match=message):
            load_backbone_weights(backbone, f"transformers:{source}")


def test_transformers_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detrkit\[transformers\]'"):
        build_backbone("transformers:org/model")
