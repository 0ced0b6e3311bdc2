"""A data set that is drawn when it is needed, and the smallest model that can be trained on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from detrkit.training.recipe import Recipe, revise

CATEGORIES = [{"id": 3, "name": "bolt"}, {"id": 7, "name": "nut"}, {"id": 12, "name": "washer"}]
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))

ARCHITECTURE = {
    "backbone": "resnet-nano",
    "stride": "16",
    "dim": "32",
    "heads": "4",
    "encoder_layers": "1",
    "decoder_layers": "2",
    "feedforward": "64",
    "num_queries": "8",
    "dropout": "0.1",
}
"""Overrides of `detr-nano` with which a step takes some milliseconds."""


def tiny(**fields: Any) -> dict[str, Any]:
    """Recipe fields of a training that takes a second: the smallest model on 64 pixels."""
    small: dict[str, Any] = {
        "model": "detr-nano",
        "architecture": {**ARCHITECTURE, **fields.pop("architecture", {})},
        "image_size": 64,
        "longest": 96,
        "backbone_weights": "random",
        "epochs": 2,
        "batch_size": 2,
        "workers": 0,
        "device": "cpu",
        "samples": 1,
        "log_every": 2,
        "lr": 1e-3,
        "backbone_lr": 1e-3,
    }
    return {**small, **fields}


def tiny_recipe(**fields: Any) -> Recipe:
    """The same as a recipe; all that is not said is the default."""
    return revise(Recipe(), tiny(**fields))


def write_coco(
    root: Path,
    splits: dict[str, Sequence[int]],
    *,
    seed: int = 0,
    classes: int = 3,
    sizes: Sequence[tuple[int, int]] = ((64, 80), (72, 64), (64, 64)),
) -> Path:
    """Draw rectangles on images, a colour for each class, and write them as COCO, with their outlines.

    Args:
        root: the folder to make.
        splits: for each split the number of boxes of each of its images.
        seed: of everything that is drawn.
        classes: how many of the three categories are drawn; all three are in the table.
        sizes: height and width of the images, in turn.
    """
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, counts in splits.items():
        (root / split).mkdir()
        images, annotations = [], []
        for index, count in enumerate(counts):
            height, width = sizes[index % len(sizes)]
            picture = Image.fromarray(rng.integers(90, 140, (height, width, 3), np.uint8))
            pen, name = ImageDraw.Draw(picture), f"{index:03d}.png"
            for _ in range(count):
                label, w, h = int(rng.integers(classes)), int(rng.integers(12, 30)), int(rng.integers(12, 30))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                pen.rectangle((x, y, x + w - 1, y + h - 1), fill=COLOURS[label])
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": CATEGORIES[label]["id"],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            picture.save(root / split / name)
            images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def without_times(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics, less what depends on the clock."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "waited")} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
