"""The model card, and the folder that travels with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from training.drawing import tiny_recipe

from detrkit import card, hub, models
from detrkit.checkpoint import load_model, save_model
from detrkit.errors import ModelError, UsageError
from detrkit.holders import save_segmenter
from detrkit.predict import load
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.recipe import revise, to_toml

CATEGORIES = (Category(1, "red|blue <cell>"), Category(2, "plaque"))
METRICS = {"AP": 0.61234, "AP50": 0.9, "AP75": None, "APs": 0.5}
HERE = "/" + "home/jane/secret"
NOTES = [
    f"Training: 8 images, 20 boxes, 2 classes, 0 images without boxes, from coco {HERE}/plates/train.json",
    "Validation: 20% of the split 'train', chosen by seed 0, 2 images, 5 boxes, 2 classes, 0 images without boxes",
    "Start from ants/nest@v1 (official DETR, hub revision 01234567): 120 tensors kept",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves behind, without the training."""
    run = tmp_path_factory.mktemp("run") / "run"
    recipe = tiny_recipe(backbone_weights=f"{HERE}/resnet.pth", init="ants/nest@v1", epochs=7)
    model = models.build("detr-nano", **recipe.model.architecture, num_classes=2, image_size=64, longest=96)
    about = {"epoch": 3, "step": 12, "metrics": METRICS, "threshold": 0.37}
    save_model(run / "model", model, preset="detr-nano", categories=CATEGORIES, about=about)
    splits = {
        name: {"source": f"coco {HERE}/plates/{name}.json", "images": images, "boxes": boxes, "fingerprint": "c0ffee"}
        for name, images, boxes in (("train", 8, 20), ("val", 2, 5))
    }
    files: dict[str, Any] = {
        "data": {"path": f"{HERE}/plates", "categories": [], "splits": splits, "notes": NOTES},
        "environment": {"detrkit": "0.1.0", "torch": "2.13.0", "gpu": "", "device": "cpu", "platform": "Linux-jane"},
        "status": {"state": "finished", "step": 28, "total_steps": 28, "seconds": 9.0},
    }
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    (run / "recipe.toml").write_text(f'# data: "{HERE}/plates"\n{to_toml(recipe)}')
    for picture in ("plots/history.png", "samples/epoch-0003.jpg", "samples/epoch-0007.jpg"):
        (run / picture).parent.mkdir(exist_ok=True)
        (run / picture).write_text(picture)
    return run


def changed(run: Path, to: Path, name: str, **content: Any) -> Path:
    """A copy of a run with other content in a file of it."""
    shutil.copytree(run, to)
    file = to / f"{name}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    return to


def text_of(source: Path, **options: Any) -> str:
    return card.model_card(card.read(source), "jane/cells", **options)


def test_the_folder_is_all_that_is_needed(finished: Path, tmp_path: Path) -> None:
    files = card.assemble(finished, "jane/cells", tmp_path / "out")
    assert files == ("README.md", "config.json", "history.png", "model.safetensors", "samples.jpg")
    assert (tmp_path / "out" / "samples.jpg").read_text() == "samples/epoch-0003.jpg"  # those of the best epoch
    assert load_model(tmp_path / "out").categories == CATEGORIES
    assert card.assemble(finished, "jane/cells", tmp_path / "bare", pictures=False) == (
        ("README.md", "config.json", "model.safetensors")
    )
    assert "![" not in (tmp_path / "bare" / "README.md").read_text()


@pytest.fixture(scope="module")
def segmenting(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a training of masks."""
    run = tmp_path_factory.mktemp("run") / "masks"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    architecture = {**tiny_recipe().model.architecture, "num_classes": 2, "image_size": 64, "longest": 96}
    segmenter = Segmenter(models.build("detr-nano", **architecture), attention="peak")
    about = {"epoch": 3, "metrics": {**METRICS, "mask_AP": 0.5, "mask_AP50": 0.75}}
    save_segmenter(run / "model", segmenter, preset="detr-nano", categories=CATEGORIES, about=about)
    recipe = revise(SegmentationRecipe(), {"model": "detr-nano", "mask_attention": "peak"})
    (run / "recipe.toml").write_text(to_toml(recipe))
    return run


def test_a_mask_head_travels_with_its_detector(segmenting: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "mask_head.safetensors" in card.assemble(segmenting, "jane/cells", out)
    found = load(out).predict(Image.new("RGB", (64, 48)), threshold=0.0)
    assert found.masks is not None
    assert len(found.masks) == len(found) > 0
    text = (out / "README.md").read_text()
    head = ModelCard(text).data
    assert head.pipeline_tag == "image-segmentation"
    assert {"object-detection", "image-segmentation"} < set(head.tags)
    assert [(one.task_type, one.metric_name, one.metric_value) for one in head.eval_results] == [
        ("object-detection", "AP", 0.6123),
        ("object-detection", "AP50", 0.9),
        ("image-segmentation", "AP", 0.5),
        ("image-segmentation", "AP50", 0.75),
    ]
    assert "2 categories, each with its mask," in text
    assert 'mask_attention = "peak"' in text


def test_the_head_is_what_the_hub_reads(finished: Path) -> None:
    data = ModelCard(text_of(finished, license="apache-2.0")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("detrkit", "object-detection", "apache-2.0")
    assert data.base_model == "ants/nest"
    assert {(one.metric_name, one.metric_value) for one in data.eval_results} == {("AP", 0.6123), ("AP50", 0.9)}
    assert {one.dataset_name for one in data.eval_results} == {"plates"}
    assert "license" not in ModelCard(text_of(finished)).data.to_dict()


def test_the_card_tells_what_the_run_knows(finished: Path) -> None:
    text = text_of(finished)
    for told in (
        "variant `detr`, preset `detr-nano`",
        "up to 8 objects of 2 categories",
        "64 pixels on the shorter side and at most 96",
        "[ants/nest](https://huggingface.co/ants/nest)",
        'detrkit.load("jane/cells")',
        "detrkit predict jane/cells IMAGES",
        "from a score of 0.37",
        "red\\|blue &lt;cell>, plaque",
        "| val | 2 | 5 | `c0ffee` |",
        "Validation: 20% of the split 'train', chosen by seed 0",
        "On the validation images (2 images, 5 boxes), after epoch 3",
        "| AP | 0.612 |",
        "![Losses and AP during the training](history.png)",
        "| `epochs` | 7 | ",
        "| `backbone_weights` | resnet.pth | – |",
        'init = "ants/nest@v1"',
        "Trained with detrkit 0.1.0, torch 2.13.0, on cpu.",
        "a little too good",
    ):
        assert told in text, told
    assert "AP75" not in text  # undefined
    assert "The training stands" not in text


def test_no_folder_of_the_machine_is_told(finished: Path, tmp_path: Path) -> None:
    assert "jane/secret" not in text_of(finished)
    assert "Linux-jane" not in text_of(finished)
    notes = [*NOTES[:2], f"Start from {HERE}/first: 120 tensors kept"]
    run = changed(finished, tmp_path / "run", "data", notes=notes)
    file = run / "recipe.toml"
    file.write_text(file.read_text().replace("ants/nest@v1", f"{HERE}/first"))
    text = text_of(run)
    assert "secret" not in text
    assert "| `init` | first | – |" in text
    assert "base_model" not in text


def test_a_run_that_was_stopped_says_so(finished: Path, tmp_path: Path) -> None:
    run = changed(finished, tmp_path / "run", "status", state="interrupted", step=14)
    assert "The training stands at step 14 of 28." in text_of(run)


def test_validation_by_heart_is_said(finished: Path, tmp_path: Path) -> None:
    notes = ["Validation: the training images themselves, which shows whether they can be learnt by heart"]
    run = changed(finished, tmp_path / "run", "data", notes=notes)
    assert "The validation images are the training images" in text_of(run)


def test_a_bare_model_has_a_shorter_card(finished: Path) -> None:
    text = text_of(finished / "model")
    assert "| AP | 0.612 |" in text
    assert "from a score of 0.37" in text
    assert "after epoch 3" in text
    for absent in ("## Data", "## Training", "model-index", "!["):
        assert absent not in text


def test_a_model_that_was_never_evaluated(finished: Path, tmp_path: Path) -> None:
    saved = load_model(finished)
    save_model(tmp_path / "model", saved.model, preset="", categories=tuple(Category(i, str(i)) for i in range(2)))
    text = text_of(tmp_path / "model")
    assert "It was not evaluated." in text
    assert "from a score of 0.5" in text
    assert "preset `none`" in text
    assert "too good" not in text


def test_what_cannot_be_uploaded_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model here"):
        card.assemble(tmp_path, "jane/cells", tmp_path / "out")
    with pytest.raises(UsageError, match=r"no name for a model.*got 'cells'"):
        card.assemble(finished, "cells", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UsageError, match="not empty"):
        card.assemble(finished, "jane/cells", tmp_path / "full")
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "status.json").write_text("{")
    with pytest.raises(ModelError, match=r"status\.json: .*cannot be read"):
        card.assemble(run, "jane/cells", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_push_uploads_what_was_assembled(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def upload(folder: Path, name: str, *, private: bool) -> str:
        seen.extend([sorted(file.name for file in folder.iterdir()), name, private])
        return "address"

    monkeypatch.setattr(hub, "upload", upload)
    assert card.push(finished, "jane/cells", private=True, pictures=False) == "address"
    assert seen == [["README.md", "config.json", "model.safetensors"], "jane/cells", True]


def test_what_the_architecture_changes_of_its_preset_is_told(finished: Path, tmp_path: Path) -> None:
    text = text_of(finished)
    assert "preset `detr-nano` (changed: " in text
    config: Any = load_model(finished).model.config
    assert f"dim {config.dim}" in text.partition("(changed: ")[2].partition(")")[0]
    model = models.build("detr-nano", num_classes=2, image_size=64)
    save_model(tmp_path / "model", model, preset="detr-nano", categories=CATEGORIES)
    assert "preset `detr-nano`, " in text_of(tmp_path / "model")


def test_no_index_is_promised(finished: Path) -> None:
    text = text_of(finished)
    assert "pip install" not in text
    assert "detrkit with its extra `hub`" in text
