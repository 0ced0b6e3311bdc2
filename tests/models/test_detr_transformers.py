"""DETR here and in the `transformers` library: the same weights give the same answers, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers_parity import CASES, Case, check_ours_to_theirs, check_theirs_to_ours, ours

from detrkit import convert

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_theirs_in_ours(case: Case, tmp_path: Path) -> None:
    found = check_theirs_to_ours(case, "Detr", tmp_path / "folder")
    assert (found.origin, found.variant) == ("Hugging Face DetrForObjectDetection", "detr")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_ours_in_theirs(case: Case, tmp_path: Path) -> None:
    check_ours_to_theirs(case, "Detr", "detr-r50", tmp_path / "folder")


def test_their_config_and_image_processor_understand_the_folder(tmp_path: Path) -> None:
    model = ours(CASES[0], "detr-r50-dc5")
    convert.to_huggingface(model, tmp_path / "folder", timm=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert isinstance(config, transformers.DetrConfig)
    assert (config.backbone_config.model_type, config.backbone_config.backbone) == ("timm_backbone", "resnet18")
    assert config.backbone_config.output_stride == 16
    assert (config.num_labels, config.num_queries, config.num_attention_heads) == (5, 7, 4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert type(processor).__name__.startswith("DetrImageProcessor")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (480, 640)
