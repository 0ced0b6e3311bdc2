"""The reference cases: figures that the official implementations computed for weights and inputs made from seeds."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrkit.structures import Batch, Target


@dataclass
class Case:
    """One reference case: the official state dict, the batch with its targets, and what came out."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    state: dict[str, Tensor]
    batch: Batch

    @staticmethod
    def module(folder: Path) -> ModuleType:
        """What makes weights, images and targets of names, shapes and seeds."""
        return _module(folder / "fill.py")

    @staticmethod
    def load(folder: Path, name: str) -> Case:
        fill = _module(folder / "fill.py")
        facts = json.loads((folder / f"{name}.json").read_text())
        state = {key: torch.from_numpy(fill.fill(key, tuple(shape))) for key, shape in facts["state_dict"].items()}
        images, targets = [], []
        for index, (height, width) in enumerate(facts["sizes"]):
            images.append(torch.from_numpy(fill.image(100 + index + facts["seed"], height, width)))
            labels, boxes = fill.targets(
                200 + index + facts["seed"], facts["num_targets"][index], facts["num_target_classes"]
            )
            targets.append(Target(torch.from_numpy(labels), torch.from_numpy(boxes), f"image {index}"))
        arrays = dict(np.load(folder / f"{name}.npz"))
        return Case(facts, arrays, state, Batch.from_images(images, targets))


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
