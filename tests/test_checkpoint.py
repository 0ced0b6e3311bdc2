"""Checkpoints: whole or not at all, and refusals that name the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from detrkit import models
from detrkit.checkpoint import (
    TrainingState,
    load_model,
    load_training,
    model_folder,
    save_model,
    save_training,
)
from detrkit.errors import Error, ModelError
from detrkit.structures import Category
from detrkit.whole import write_whole

CATEGORIES = (Category(3, "bolt"), Category(9, "Schraubenmutter, groß", is_thing=False))
SMALL = {
    "backbone": "resnet-nano",
    "stride": 16,
    "dim": 16,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward": 16,
    "num_queries": 4,
    "num_classes": 2,
}


def small_model() -> nn.Module:
    return models.build("detr-nano", **SMALL)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = small_model()
    folder = tmp_path_factory.mktemp("kept") / "model"
    save_model(folder, model, preset="detr-nano", categories=CATEGORIES, about={"AP": 0.5, "none": None})
    return model, folder


@pytest.fixture
def folder(kept: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A model folder that may be spoilt."""
    return Path(shutil.copytree(kept[1], tmp_path / "model"))


def test_a_model_comes_back_bit_for_bit(kept: tuple[nn.Module, Path]) -> None:
    model, folder = kept
    before = torch.get_rng_state()
    saved = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert saved.variant == "detr"
    assert saved.preset == "detr-nano"
    assert saved.categories == CATEGORIES
    assert saved.about == {"AP": 0.5, "none": None}
    assert saved.model.config == model.config
    weights = saved.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_half_precision_halves_the_file_and_gives_floats_again(kept: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = kept
    save_model(tmp_path / "half", model, preset="", categories=CATEGORIES, half=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert sizes[0] < 0.55 * sizes[1]
    for name, tensor in load_model(tmp_path / "half").model.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_a_training_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small_model().to(memory_format=torch.channels_last)
    tensors = {"0.exp_avg": torch.randn(3, 2), "0.step": torch.tensor(3.0)}
    state = TrainingState({"optimizer": tensors, "average": dict(model.state_dict())}, {"step": 3, "best": 0.25})
    save_training(tmp_path / "last", model, state, preset="detr-nano", categories=CATEGORIES)
    again = load_training(tmp_path / "last")
    assert again.position == state.position
    for part, expected in state.tensors.items():
        assert again.tensors[part].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.tensors[part].items())
    assert load_model(tmp_path / "last").categories == CATEGORIES


def test_a_part_of_a_training_lies_in_its_folder(tmp_path: Path) -> None:
    state = TrainingState({"optimizer": {"0.step": torch.tensor(1.0)}}, {"step": 1})
    for name in ("other", "last"):
        save_training(tmp_path / name, small_model(), state, preset="", categories=CATEGORIES)
    assert not (tmp_path / "previous").exists(), "nothing was replaced"
    (tmp_path / "last" / "checksums.json").unlink()
    for part in ("../other/optimizer", str(tmp_path / "other" / "optimizer")):
        (tmp_path / "last" / "training.json").write_text(json.dumps({"parts": [part], "position": {}}))
        with pytest.raises(ModelError, match="not the position of a training"):
            load_training(tmp_path / "last")


def test_the_checkpoint_before_is_kept_of_the_last_alone(tmp_path: Path) -> None:
    state = TrainingState({}, {"step": 1})
    for name, kept in (("within", False), ("last", True)):
        for _ in range(2):
            save_training(tmp_path / name, small_model(), state, preset="", categories=CATEGORIES)
        assert (tmp_path / "previous").exists() is kept


def test_nothing_is_a_pickle(tmp_path: Path) -> None:
    state = TrainingState({"optimizer": {"0.step": torch.tensor(1.0)}}, {"step": 1})
    save_training(tmp_path / "last", small_model(), state, preset="", categories=CATEGORIES)
    files = sorted((tmp_path / "last").iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        if file.suffix == ".safetensors":  # a length, and as many bytes of JSON: no opcode of a pickle
            length = int.from_bytes(file.read_bytes()[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + length])
        else:
            json.loads(file.read_text())


@pytest.mark.parametrize("place", ["", "model", "checkpoints/best", "checkpoints/last"])
def test_a_run_a_checkpoint_and_a_model_folder_are_models(folder: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    (run / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, run / place, dirs_exist_ok=True)
    assert model_folder(run) == run / place


def test_the_best_is_preferred_to_the_newest(folder: Path, tmp_path: Path) -> None:
    """What was saved within an epoch goes when its end is saved, so where it stands it is the newest."""
    places = ("model", "checkpoints/best", "checkpoints/within", "checkpoints/last")
    for place in places:
        shutil.copytree(folder, tmp_path / "run" / place)
    for place in places:
        assert model_folder(tmp_path / "run") == tmp_path / "run" / place
        shutil.rmtree(tmp_path / "run" / place)


def described(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def configured(folder: Path, **changes: Any) -> None:
    described(folder, config={**json.loads((folder / "config.json").read_text())["config"], **changes})


def without(folder: Path, key: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key}))


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (
        lambda f: cut(f, "model.safetensors", 0.6),
        r"model\.safetensors: The weights cannot be read",
    ),
    "empty weights": (lambda f: cut(f, "model.safetensors", 0), r"model\.safetensors: The weights cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: The weights cannot be read"),
    "huge header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        r"model\.safetensors: The weights cannot be read",
    ),
    "a pickle": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
        r"model\.safetensors: The weights cannot be read",
    ),
    "missing tensor": (
        lambda f: reweighted(f, lambda t: t.pop("class_head.weight")),
        r"model\.safetensors: The weights do not fit the model; got missing: class_head\.weight",
    ),
    "left over tensor": (
        lambda f: reweighted(f, lambda t: t.update(extra=torch.zeros(1))),
        r"model\.safetensors: .*left over: extra",
    ),
    "other shape": (
        lambda f: reweighted(f, lambda t: t.update({"class_head.bias": torch.zeros(7)})),
        r"model\.safetensors: .*other shapes: class_head\.bias \(7,\) for \(3,\)",
    ),
    "truncated config": (lambda f: cut(f, "config.json", 0.5), r"config\.json: The file cannot be read"),
    "config of bytes": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json: The file cannot be read",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: .* JSON object"),
    "newer format": (lambda f: described(f, format=2), r"config\.json: .*another format; got 2; expected 1"),
    "no format": (lambda f: without(f, "format"), r"config\.json: .*another format; got None"),
    "unknown variant": (lambda f: described(f, variant="yolo"), r"config\.json: .*no such variant; got 'yolo'"),
    "variant elsewhere": (lambda f: described(f, variant="../os"), r"config\.json: .*no such variant"),
    "variant is a list": (lambda f: described(f, variant=[1]), r"config\.json: The config cannot be understood"),
    "no variant": (lambda f: without(f, "variant"), r"config\.json: .*no 'variant'"),
    "no config": (lambda f: without(f, "config"), r"config\.json: .*no 'config'"),
    "config of config is a list": (lambda f: described(f, config=[]), r"config\.json: The config cannot be understood"),
    "no categories": (lambda f: without(f, "categories"), r"config\.json: .*no 'categories'"),
    "odd categories": (lambda f: described(f, categories=[3, 4]), r"config\.json: The config cannot be understood"),
    "too few categories": (
        lambda f: described(f, categories=[[1, "a"]]),
        r"config\.json: .*1 categories for num_classes 2",
    ),
    "unknown field": (lambda f: configured(f, depth=3), r"config\.json: .*unknown field 'depth'"),
    "text for a number": (lambda f: configured(f, dim="16"), r"config\.json: .*dim = '16'.*type int"),
    "negative width": (lambda f: configured(f, dim=-16), r"config\.json: The config cannot be understood"),
    "no heads": (lambda f: configured(f, heads=0), r"config\.json: The config cannot be understood"),
    "odd heads": (lambda f: configured(f, heads=3), r"config\.json: .*dim a multiple of 4 and of heads"),
    "unknown backbone": (lambda f: configured(f, backbone="vgg"), r"config\.json: .*vgg"),
    "other width": (lambda f: configured(f, dim=32), r"model\.safetensors: .*other shapes"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_with_a_model_is_said_and_where(folder: Path, case: str) -> None:
    spoil, message = SPOILT[case]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model here") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ModelError, match="no such file or folder"):
        load_model(tmp_path / "nothing")


def test_a_run_killed_between_the_renames_is_still_loaded(folder: Path) -> None:
    folder.rename(folder.with_name(".model.new"))
    shutil.copytree(folder.with_name(".model.new"), folder.with_name(".model.old"))
    assert load_model(folder).categories == CATEGORIES
    assert model_folder(folder.parent).name == ".model.new"


def test_a_full_disk_is_said_and_the_old_folder_stays(folder: Path) -> None:
    def full(to: Path) -> None:
        (to / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Error, match=r"cannot be written; got .*No space left.*Make room") as caught:
        write_whole(folder, full)
    assert str(folder) in str(caught.value)
    assert load_model(folder).categories == CATEGORIES
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
