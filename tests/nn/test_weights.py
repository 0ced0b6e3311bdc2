"""Weight files: found, read safely, matched strictly."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import filled
from safetensors.torch import save_file
from torch import Tensor

from detrkit.errors import ModelError
from detrkit.nn.backbone import Backbone, build_backbone
from detrkit.nn.mobilenet import fold_batch_norms
from detrkit.nn.weights import (
    PUBLISHED,
    LoadReport,
    find_weight_file,
    load_backbone_weights,
    read_checkpoint,
    read_weight_file,
    weight_folders,
)

NAME = "resnet-nano"


def nano(**options: object) -> Backbone:
    return build_backbone(NAME, levels=(8,), **options)


def state() -> dict[str, Tensor]:
    return {key: value.clone() for key, value in filled(nano()).state_dict().items()}


def is_equal(backbone: Backbone, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in weights.items()})
    else:
        torch.save(weights, path)
    return path


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights of the machine that the tests run on."""
    home = tmp_path / "home"
    monkeypatch.delenv("DETRKIT_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    return home


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".pt", ".bin", ".PTH"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str):
    weights = state()
    path = write(tmp_path / f"weights{suffix}", weights)
    backbone = nano()
    report = load_backbone_weights(backbone, NAME, path)
    assert is_equal(backbone, weights)
    assert report == LoadReport(str(path), len(weights))


def test_half_precision_is_widened(tmp_path: Path):
    weights = {key: value.half() for key, value in state().items()}
    backbone = nano()
    load_backbone_weights(backbone, NAME, write(tmp_path / "w.npz", weights))
    assert backbone.conv1.weight.dtype == torch.float32
    assert is_equal(backbone, {key: value.float() for key, value in weights.items()})


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.0.body."])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str, prefix: str):
    weights = state()
    content = {
        wrapper: OrderedDict((prefix + key, value) for key, value in weights.items()),
        "args": argparse.Namespace(lr=1e-4, backbone="x"),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    backbone = nano()
    assert load_backbone_weights(backbone, NAME, str(tmp_path / "checkpoint.pth.tar")).ignored == ()
    assert is_equal(backbone, weights)


def test_the_arguments_of_a_training_come_along_as_plain_values(tmp_path: Path):
    arguments = argparse.Namespace(nheads=8, dilation=True, lr=1e-4, device="cuda")
    torch.save({"model": state(), "args": arguments}, tmp_path / "a.pth")
    torch.save({"model": state(), "args": {"nheads": 8}}, tmp_path / "b.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.arguments == vars(arguments)
    assert found.tensors.keys() == state().keys()
    assert read_checkpoint(tmp_path / "b.pth").arguments == {"nheads": 8}
    assert read_checkpoint(write(tmp_path / "c.safetensors", state())).arguments == {}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_of_swav_and_of_torchvision(tmp_path: Path, name: str):
    """SwAV's files hold a distributed wrapper's names, a projection head and prototypes; torchvision's a classifier."""
    network = filled(build_backbone(name))
    counters = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in network.state_dict()}
    tensors = {**counters, **network.state_dict()}
    heads = {"projection_head.0.weight": torch.zeros(2, 2), "prototypes.weight": torch.zeros(2, 2)}
    swav = {f"module.{key}": value for key, value in {**tensors, **heads}.items()}
    torchvision = {**tensors, "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
    for file, weights, left in (("swav.pth.tar", swav, heads), ("tv.pth", torchvision, {"fc.weight", "fc.bias"})):
        torch.save(weights, tmp_path / file)
        backbone = build_backbone(name)
        report = load_backbone_weights(backbone, name, tmp_path / file)
        assert {key.removeprefix("module.") for key in report.ignored} == set(left)
        assert is_equal(backbone, network.state_dict())


def test_other_parts_of_a_detector_are_named_and_left(tmp_path: Path):
    weights = {f"backbone.0.body.{key}": value for key, value in state().items()}
    weights["transformer.decoder.norm.weight"] = torch.ones(4)
    report = load_backbone_weights(nano(), NAME, write(tmp_path / "detr.pth", weights))
    assert report.ignored == ("transformer.decoder.norm.weight",)


def test_classifiers_and_stages_not_built_are_named_and_left(tmp_path: Path):
    weights = {key: value.clone() for key, value in build_backbone(NAME).state_dict().items()}
    weights |= {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2), "bn1.num_batches_tracked": torch.tensor(1)}
    report = load_backbone_weights(nano(), NAME, write(tmp_path / "w.pth", weights))
    assert {"fc.weight", "fc.bias", "layer3.0.conv1.weight"} <= set(report.ignored)
    assert all(name.startswith(("fc.", "layer3.", "layer4.")) for name in report.ignored)
    assert "of the file are of layers that the backbone does not have, such as " in str(report)


def test_mobilenet_of_torchvision_is_folded_on_reading(tmp_path: Path):
    name = "mobilenet_v2_torchvision"
    weights = {}
    for key, value in build_backbone(name, levels=(8,)).state_dict().items():
        if key.endswith(".weight"):
            stem, place = key.removesuffix(".weight").rsplit(".", 1)
            weights[key] = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
            for part in ("weight", "bias", "running_mean", "running_var"):
                weights[f"{stem}.{int(place) + 1}.{part}"] = torch.rand(len(value)) + 0.5
            weights[f"{stem}.{int(place) + 1}.num_batches_tracked"] = torch.tensor(1)
    backbone = build_backbone(name, levels=(8,))
    file = {f"module.{key}": value for key, value in weights.items()} | {"module.classifier.1.bias": torch.ones(3)}
    report = load_backbone_weights(backbone, name, write(tmp_path / "w.pth", file))
    assert report.ignored == ("module.classifier.1.bias",)
    assert is_equal(backbone, fold_batch_norms(weights))
    with pytest.raises(ModelError, match=r"w\.pth: .*Take the backbone 'mobilenet_v2_torchvision'"):
        load_backbone_weights(build_backbone("mobilenet_v2"), "mobilenet_v2", tmp_path / "w.pth")


def test_mobilenet_leaves_the_head_and_the_layers_not_built(tmp_path: Path):
    weights = {key: value.clone() for key, value in build_backbone("mobilenet_v2").state_dict().items()}
    weights |= {"features.18.0.weight": torch.ones(1280, 320, 1, 1), "features.18.0.bias": torch.ones(1280)}
    path = write(tmp_path / "w.npz", weights)
    assert load_backbone_weights(build_backbone("mobilenet_v2"), "mobilenet_v2", path).ignored == (
        "features.18.0.weight",
        "features.18.0.bias",
    )
    report = load_backbone_weights(build_backbone("mobilenet_v2", levels=(16,)), "mobilenet_v2", path)
    assert {int(name.split(".")[1]) for name in report.ignored} == {14, 15, 16, 17, 18}


def test_misfits_are_named_and_change_nothing(tmp_path: Path):
    weights = state()
    del weights["layer1.0.conv1.weight"]
    weights["bn1.bias"] = torch.ones(7)
    weights["bn1.weight"][3] = float("nan")
    weights["surprise.weight"] = torch.ones(1)
    backbone = nano()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(backbone, NAME, write(tmp_path / "w.safetensors", weights))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "w.safetensors"))
    assert "missing: layer1.0.conv1.weight" in message
    assert "unexpected: surprise.weight" in message
    assert "other shapes: bn1.bias (7,) for (32,)" in message
    assert "not finite: bn1.weight" in message
    assert is_equal(backbone, before)


def test_weights_of_another_backbone_are_refused_briefly(tmp_path: Path):
    path = write(tmp_path / "w.pth", dict(build_backbone("mobilenet_v2").state_dict()))
    with pytest.raises(ModelError, match=r"missing: conv1\.weight.* more; unexpected: features\.0\.0\.weight.* more"):
        load_backbone_weights(nano(), NAME, path)


def test_two_backbones_in_a_file_are_not_guessed_between(tmp_path: Path):
    weights = {f"{who}.{key}": value for who in ("teacher", "student") for key, value in state().items()}
    with pytest.raises(ModelError, match=r"more than once; got names under 'student\.' and 'teacher\.'"):
        load_backbone_weights(nano(), NAME, write(tmp_path / "w.pth", weights))


def test_random_start_is_asked_for_by_name_and_trains_everything():
    first, second = nano(), nano()
    for backbone in (first, second):
        report = load_backbone_weights(backbone, NAME, "random", generator=torch.Generator().manual_seed(5))
        assert report.source == "random"
        assert all(value.requires_grad for value in backbone.parameters())
    assert is_equal(first, second.state_dict())


def test_a_file_leaves_what_is_frozen_frozen(tmp_path: Path):
    backbone = nano(frozen_stages=2)
    load_backbone_weights(backbone, NAME, write(tmp_path / "w.pth", state()))
    assert not backbone.conv1.weight.requires_grad
    assert backbone.get_submodule("layer2.0.conv1").weight.requires_grad


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_weights_are_found_by_the_name_of_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    monkeypatch.setenv("DETRKIT_WEIGHTS", str(tmp_path))
    path = write(tmp_path / f"{NAME}{suffix}", state())
    assert find_weight_file(NAME) == path
    assert load_backbone_weights(nano(), NAME).source == str(path)


@pytest.mark.parametrize("place", [("cache", "detrkit", "weights"), ("torch", "hub", "checkpoints")])
def test_weights_are_found_in_the_caches_by_their_well_known_name(empty_home: Path, place: tuple[str, ...]):
    folder = empty_home.joinpath(*place)
    folder.mkdir(parents=True)
    path = folder / "resnet50-0676ba61.pth"
    path.touch()
    assert find_weight_file("resnet50") == path


def test_the_folder_of_the_environment_comes_first(tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETRKIT_WEIGHTS", str(tmp_path / "mine"))
    assert weight_folders()[0] == tmp_path / "mine"
    for folder in (tmp_path / "mine", empty_home / "cache" / "detrkit" / "weights"):
        folder.mkdir(parents=True)
        (folder / f"{NAME}.npz").touch()
    assert find_weight_file(NAME) == tmp_path / "mine" / f"{NAME}.npz"


def test_no_weights_says_where_it_looked_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETRKIT_WEIGHTS", str(tmp_path / "mine"))
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(build_backbone("resnet50"), "resnet50")
    message = str(caught.value)
    assert str(tmp_path / "mine") in message
    assert str(Path("cache", "detrkit", "weights")) in message
    assert "resnet50.safetensors, resnet50.npz, resnet50.pth" in message
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert "'random'" in message


def test_no_weights_of_a_backbone_that_nobody_publishes_still_says_what_to_do():
    with pytest.raises(ModelError, match=r"Give the path of a weight file, or ask for 'random'"):
        load_backbone_weights(nano(), NAME)


def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path):
    with pytest.raises(ModelError, match=r"none\.pth: There is no such weight file.*mobilenet_v2_imagenet_folded"):
        load_backbone_weights(build_backbone("mobilenet_v2"), "mobilenet_v2", tmp_path / "none.pth")
    with pytest.raises(ModelError, match="no such weight file"):
        read_weight_file(tmp_path)


def test_published_files_are_of_backbones_that_exist():
    for name in PUBLISHED:
        build_backbone(name, levels=(4,))


class Attack:
    """What a hostile file holds: a call that is made while it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("attacked"),)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(1), "extra": Attack()}, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(ModelError, match=rf"{name}: .*only code could rebuild.*Save its state dict alone"):
            read_weight_file(tmp_path / name)
    assert not Path("attacked").exists()


def test_an_archive_of_objects_is_refused(tmp_path: Path):
    np.savez(tmp_path / "bad.npz", weight=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ModelError, match=r"bad\.npz: The weight file cannot be read.*get it again"):
        read_weight_file(tmp_path / "bad.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "page"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str):
    path = write(tmp_path / f"weights{suffix}", state())
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello", "page": b"<html>" * 99}[damage])
    with pytest.raises(ModelError, match=rf"weights{suffix}: "):
        read_weight_file(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("rest", [b"ello world\n" * 3, bytes(range(256))], ids=["text", "binary"])
def test_whatever_a_file_begins_with_it_is_named(tmp_path: Path, suffix: str, rest: bytes):
    path = tmp_path / f"w{suffix}"
    for first in range(256):
        path.write_bytes(bytes([first]) + rest)
        with pytest.raises(ModelError, match=rf"w{suffix}: The (weight )?file "):
            read_weight_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_empty_files_and_texts_are_called_so(tmp_path: Path, suffix: str):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="The weight file is empty; got 0 bytes"):
        read_weight_file(path)
    for text in ("\n<!DOCTYPE html>\u00e9", "Not found\n", "hello", "(", "a" * 9999):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=r"holds text, not weights; got '.*perhaps an error page"):
            read_weight_file(path)


def test_archives_that_hold_no_numbers_are_refused(tmp_path: Path):
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ModelError, match="got one array without a name"):
        read_weight_file(tmp_path / "one.npz")
    for name, values in {"words": np.array(["a", "b"]), "complex": np.ones(2, complex)}.items():
        np.savez(tmp_path / "w.npz", **{name: values})
        with pytest.raises(ModelError, match=f"got {name} holds no real numbers but "):
            read_weight_file(tmp_path / "w.npz")


def test_a_pickle_of_a_newer_protocol_is_refused_without_a_warning(tmp_path: Path):
    torch.save(state(), tmp_path / "w.pth", pickle_protocol=4)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ModelError, match="Save its state dict alone"):
            read_weight_file(tmp_path / "w.pth")
    assert not heard


def test_a_pointer_in_place_of_the_file_is_recognised(tmp_path: Path):
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer.*git lfs pull"):
        read_weight_file(tmp_path / "w.safetensors")


def test_other_kinds_of_files_are_refused(tmp_path: Path):
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(ModelError, match=r"got \.h5; expected \.safetensors, \.npz, \.pth"):
        read_weight_file(tmp_path / "w.h5")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"model": {}}])
def test_a_file_without_tensors_is_refused(tmp_path: Path, content: dict[str, object]):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="holds no tensors"):
        read_weight_file(tmp_path / "w.pth")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    with pytest.raises(ModelError, match="a list, not a state dict"):
        read_weight_file(tmp_path / "w.pth")


def test_missing_mobilenet_weights_name_the_file_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DETRKIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = build_backbone("mobilenet_v2")
    with pytest.raises(
        ModelError, match=r"mobilenet_v2-b0353104\.pth.*--architecture backbone mobilenet_v2_torchvision"
    ):
        load_backbone_weights(backbone, "mobilenet_v2")
