"""The names and shapes of the published weights, whole: what is recognised, and where each tensor lands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from detrkit import convert


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "origin", "variant", "preset", "classes", "left_out"),
    [
        ("detr_r50", "official DETR", "detr", "detr-r50", 91, set()),
        ("conditional_detr_r50", "official Conditional DETR", "conditional_detr", "conditional-detr-r50", 91, set()),
        ("up_detr_pretrain_r50", "official UP-DETR pre-training", "detr", "", 2, {"patch2query", "feature_align"}),
        ("detr_r50_panoptic", "official DETR, with a mask head", "detr", "detr-r50", 250, set()),
    ],
)
def test_official_names_and_shapes(
    golden: Path, case: str, origin: str, variant: str, preset: str, classes: int, left_out: set[str]
) -> None:
    shapes = json.loads((golden / f"{case}.json").read_text())["state_dict"]
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    found = convert.read(state)
    assert (found.origin, found.variant, found.preset) == (origin, variant, preset)
    config: Any = found.model.config
    assert (config.num_classes, config.pre_norm) == (classes, case.startswith("up"))
    assert [fate.source for fate in found.report] == list(state)
    assert {name.partition(".")[0] for name in found.left_out} == left_out
    assert [fate.source for fate in found.report if fate.fate == "left out"] == list(found.left_out)
    landed = Counter(name for fate in found.report for name in fate.targets)
    whole = found.model if found.segmenter is None else found.segmenter
    assert (found.segmenter is not None) == ("mask head" in origin)
    assert landed == Counter(name.removeprefix("detector.") for name in whole.state_dict())
