"""Conditional DETR here and in the `transformers` library: the same weights give the same answers, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers_parity import CASES, Case, check_ours_to_theirs, check_theirs_to_ours

pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_theirs_in_ours(case: Case, tmp_path: Path) -> None:
    found = check_theirs_to_ours(case, "ConditionalDetr", tmp_path / "folder")
    assert (found.origin, found.variant) == ("Hugging Face ConditionalDetrForObjectDetection", "conditional_detr")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.backbone)
def test_ours_in_theirs(case: Case, tmp_path: Path) -> None:
    check_ours_to_theirs(case, "ConditionalDetr", "conditional-detr-r50", tmp_path / "folder")
