"""A tiny data set, a tiny trained run, and a way to call the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from detrkit.cli import main
from detrkit.data import formats

TINY = (
    *("--backbone-weights", "random", "--image-size", "64", "--longest", "96", "--batch-size", "2", "--workers", "0"),
    *("--samples", "1", "--model", "detr-nano", "--architecture", "backbone", "resnet-nano", "stride", "32"),
    *("dim", "32", "heads", "2", "encoder_layers", "1", "decoder_layers", "2", "feedforward", "32"),
    *("num_queries", "5"),
)
"""Flags of a model that trains in a second."""


class Said(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which holds one JSON document and nothing else."""
        return json.loads(self.out)


Detrkit = Callable[..., Said]


@pytest.fixture(autouse=True)
def _no_packaged_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Defaults are the dataclasses' own, whatever recipes come with the package."""
    monkeypatch.setattr("detrkit.training.recipe.FOLDER", tmp_path / "no recipes")


@pytest.fixture(autouse=True, scope="module")
def _flushless(flushless: None) -> None:
    """What is written here need not outlast the machine."""


@pytest.fixture(autouse=True)
def _plotless(plotless: None) -> None:
    """What a run draws is looked at in the tests of training."""


@pytest.fixture
def detrkit(capsys: pytest.CaptureFixture[str]) -> Detrkit:
    """Run a command line in this process."""

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


def write_coco(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Images of noise with a bright square each, and its box."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, boxes = [], []
    for number in range(1, count + 1):
        pixels = rng.integers(0, 120, (64, 80, 3), dtype=np.uint8)
        x, y = int(rng.integers(0, 50)), int(rng.integers(0, 34))
        pixels[y : y + 30, x : x + 30] = 255
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 80})
        outline = [x, y, x + 30, y, x + 30, y + 30, x, y + 30]
        boxes.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "bbox": [x, y, 30, 30],
                "segmentation": [outline],
            }
        )
    entries = [{**box, "area": 900, "iscrowd": 0} for box in boxes]
    categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}]
    document = {"images": images, "annotations": entries, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO data set of four training and two validation images."""
    root = tmp_path_factory.mktemp("data") / "parts"
    rng = np.random.default_rng(0)
    write_coco(root, "train", 4, rng)
    write_coco(root, "val", 2, rng)
    return root


@pytest.fixture
def ambiguous(data: Path, tmp_path: Path) -> Path:
    """The same data set in two formats in one folder: COCO, and YOLO with the training images alone."""
    root = tmp_path / "ambiguous"
    shutil.copytree(data, root)
    formats.write(formats.read(data, "train"), tmp_path / "yolo", "yolo")
    for part in (tmp_path / "yolo").iterdir():
        part.rename(root / part.name)
    return root


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of one epoch; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.recipe.FOLDER", out.parent)
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        assert main(["train", str(data), "--out", str(out), "--epochs", "1", "--json", *TINY]) == 0
    return out
