"""Masks and segments from the command line: train, predict, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import TINY, Detrkit
from PIL import Image

from detrkit.cli import main


@pytest.fixture(scope="module")
def segmented(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of masks of one epoch; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "masks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.recipe.FOLDER", out.parent)
        arguments = ["train", str(data), "--masks", "--out", str(out), "--epochs", "1", "--json", *TINY]
        assert main([*arguments, "--mask-attention", "peak"]) == 0
    return out


def test_the_recipe_is_that_of_masks(segmented: Path) -> None:
    text = (segmented / "recipe.toml").read_text()
    assert 'task = "segmentation"' in text
    assert 'mask_attention = "peak"' in text


def test_help_explains_the_choices_of_masks_where_masks_are_asked_for(detrkit: Detrkit) -> None:
    assert "Train the mask head alone" in detrkit("train", "--masks", "--help").out
    assert "Train the mask head alone" not in detrkit("train", "--help").out


def test_masks_and_another_task_are_refused(detrkit: Detrkit, data: Path, tmp_path: Path) -> None:
    said = detrkit("train", data, "--masks", "--task", "one-shot", "--out", tmp_path / "run")
    assert said.code == 2
    assert "task of their own" in said.err


def test_predictions_hold_masks(detrkit: Detrkit, segmented: Path, data: Path, tmp_path: Path) -> None:
    said = detrkit("predict", segmented, data / "val", "--out", tmp_path, "--threshold", "0", "--json")
    assert said.code == 0
    for image in said.document["images"]:
        assert len(image["masks"]) == len(image["boxes"]) > 0
        assert image["masks"][0]["size"] == [image["height"], image["width"]]
    coco = json.loads((tmp_path / "results.coco.json").read_text())
    from hotcoco import mask

    for one in coco["annotations"]:
        assert one["area"] == int(mask.area(one["segmentation"]))


def test_segments_are_written_as_cocos_tools_read_them(
    detrkit: Detrkit, segmented: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    said = detrkit("predict", segmented, data / "val", "--panoptic", "--out", out, "--threshold", "0", "--json")
    assert said.code == 0
    document = json.loads((out / "panoptic.json").read_text())
    assert [category["isthing"] for category in document["categories"]] == [1, 1]
    for image, annotation in zip(document["images"], document["annotations"], strict=True):
        assert Path(annotation["file_name"]) == Path(image["file_name"]).with_suffix(".png")
        pixels = np.asarray(Image.open(out / "panoptic" / annotation["file_name"])).astype(int)
        assert pixels.shape == (image["height"], image["width"], 3)
        ids = pixels @ (1, 256, 256**2)
        for segment in annotation["segments_info"]:
            assert (ids == segment["id"]).sum() == segment["area"]
        assert (out / image["file_name"]).is_file()
    assert said.document["segments"] == sum(len(one["segments_info"]) for one in document["annotations"])
    again = detrkit("predict", segmented, data / "val", "--panoptic", "--out", out)
    assert again.code == 0, "its own folder may be written again"
    assert "lay there before" not in again.err


def test_no_png_of_segments_takes_the_place_of_another_or_of_a_picture(
    detrkit: Detrkit, segmented: Path, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "cut"
    for name in ("panoptic/a.png", "a.jpg", "a.png", "b.jpg", "b.png/c.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (90, 20, 20)).save(photos / name)
    assert detrkit("predict", segmented, photos, "--panoptic", "--out", out, "--threshold", "0").code == 0
    document = json.loads((out / "panoptic.json").read_text())
    pairs = zip(document["images"], document["annotations"], strict=True)
    maps = {image["file_name"]: annotation["file_name"] for image, annotation in pairs}
    assert maps == {
        **{"a.jpg": "a.png.png", "a.png": "a.png.png.png", "panoptic/a.png": "panoptic/a.png"},
        **{"b.jpg": "b.png.png", "b.png/c.png": "b.png/c.png"},
    }
    for name in (*maps, *(f"panoptic/{name}" for name in maps.values())):
        assert (out / name).is_file()


def test_segments_need_a_mask_head_and_the_last_layer(
    detrkit: Detrkit, trained: Path, segmented: Path, data: Path, tmp_path: Path
) -> None:
    bare = detrkit("predict", trained, data / "val", "--panoptic", "--out", tmp_path / "a")
    assert bare.code == 4
    assert "no mask head" in bare.err
    assert "Traceback" not in bare.err
    for more in (["--panoptic"], []):
        both = detrkit("predict", segmented, data / "val", *more, "--ensemble", "--out", tmp_path / "b")
        assert both.code == 2
        assert "last decoder layer" in both.err


def test_evaluation_shows_masks(detrkit: Detrkit, segmented: Path, data: Path) -> None:
    said = detrkit("evaluate", segmented, data, "--json")
    assert said.code == 0
    assert "mask_AP" in said.document["figures"]
