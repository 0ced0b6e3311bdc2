"""Pictures of patches and where they are found, and the curves of a pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrkit import visualize
from detrkit.errors import UsageError
from detrkit.visualize import plots
from detrkit.visualize.colours import INK
from detrkit.visualize.patches import GAP, IMAGE_SIDE, THUMBNAIL_SIDE

GREY = (128, 128, 128)
BOXES = np.array([[20.0, 10, 60, 50], [80, 40, 130, 90]])
FOUND = np.array([[24.0, 14, 64, 54], [10, 60, 60, 110]])


def sheet(
    count: int = 2, size: tuple[int, int] = (140, 120), boxes: np.ndarray = BOXES, found: np.ndarray = FOUND
) -> np.ndarray:
    patches = [Image.new("RGB", (16, 16), (10 * number, 0, 99)) for number in range(count)]
    picture = visualize.patch_sheet(
        Image.new("RGB", size, GREY), patches, boxes, found, np.full(count, 0.5), np.full(count, 0.25)
    )
    return np.asarray(picture)


def painted(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(-1)


def at(box: np.ndarray, scale: float = IMAGE_SIDE / 140) -> list[int]:
    return [round(float(value)) + GAP for value in box * scale]


def test_true_places_are_thin_and_found_ones_thick():
    picture = sheet()
    for number in range(2):
        colour = painted(picture, visualize.colour_of(number))
        widths = []
        for box in (BOXES[number], FOUND[number]):
            x0, y0, x1, y1 = at(box)
            middle = (y0 + y1) // 2 + 30
            assert colour[middle, x0]
            assert colour[y1, (x0 + x1) // 2]
            widths.append(int(colour[middle, x0 - 6 : x0 + 7].sum()))
        assert widths == [2, 4]


def test_outlines_have_dark_rims_and_stay_inside():
    outside = np.array([[-50.0, -20, 500, 400]] * 2)
    picture = sheet(boxes=outside, found=outside)
    row = picture[GAP + 200, GAP : GAP + IMAGE_SIDE]
    for edge in (row[:3], row[-1:-4:-1]):
        assert tuple(edge[0]) == INK
        assert painted(edge[1:], visualize.colour_of(1)).all()
    assert (picture[:, :GAP] == 255).all()


@pytest.mark.parametrize(
    ("count", "size"), [(1, (140, 120)), (10, (200, 30)), (10, (30, 200)), (7, (3, 3)), (23, (64, 64))]
)
def test_any_number_of_patches_fits(count: int, size: tuple[int, int]):
    boxes = np.tile(np.array([0.0, 0, size[0], size[1]]), (count, 1))
    picture = sheet(count, size, boxes, np.zeros((count, 4)))
    for number in range(count):
        thumbnail = painted(picture, (10 * number, 0, 99))
        assert thumbnail.sum() > 0.7 * THUMBNAIL_SIDE**2
        top, bottom = np.flatnonzero(thumbnail.any(1))[[0, -1]]
        left, right = np.flatnonzero(thumbnail.any(0))[[0, -1]]
        assert bottom - top + 1 == right - left + 1 == THUMBNAIL_SIDE
        under = picture[bottom + 5 : bottom + 36, left:right]
        assert len(under) == 31
        assert (under < 100).all(-1).any()  # the letters
    assert picture.shape[1] < IMAGE_SIDE + 6 * (THUMBNAIL_SIDE + 20) or count > 20


def test_patches_and_boxes_that_differ_in_number_are_refused():
    with pytest.raises(UsageError, match=r"differ in number.*3 patches"):
        sheet(3)
    with pytest.raises(UsageError, match=r"differ in number.*0 patches"):
        sheet(0)


PATCHES = [
    {"event": "step", "step": step, "epoch": step / 10, "loss": 9.0 - step / 20, "class": 1.0, "l1": 0.4, "giou": 0.8}
    | {"feature": 1.5, "lr": 1e-4, "class_error": 0.3}
    for step in range(1, 50)
]
SEEN = [
    {"event": "evaluated", "step": step, "recall50": step / 50, "recall75": step / 99, "consistency": 0.3, "iou": 0.2}
    for step in (10, 30, 49)
]


def drawn(monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], out: Path) -> dict[str, list[str]]:
    """The titles of the panels, and the names of the curves in each."""
    panels = {}
    save = plots._save

    def spy(figure: Any, path: Path) -> Path:
        panels.update({axes.get_title(): axes.get_legend_handles_labels()[1] for axes in figure.axes})
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    with Image.open(visualize.plot_history(lines, out / "history.png")) as picture:
        assert picture.width > 500
    return panels


def test_a_pre_training_has_its_own_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert drawn(monkeypatch, PATCHES + SEEN, tmp_path) == {
        "Losses": ["total", "class", "l1", "giou", "feature"],
        "Patches found on held-out images": ["recall50", "recall75", "consistency"],
    }


def test_a_detection_has_the_curves_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = {"event": "step", "step": 1, "loss": 5.0, "class": 1.0, "l1": 0.4, "giou": 0.8, "lr": 1e-4}
    evaluated = {"event": "evaluated", "step": 1, "epoch": 1, "AP": 0.1, "AP50": 0.2, "AP75": 0.1, "AR100": 0.3}
    assert drawn(monkeypatch, [step, evaluated], tmp_path) == {
        "Losses": ["total", "class", "l1", "giou"],
        "Average precision": ["AP50", "AP"],
    }


def test_a_backbone_has_curves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = {"event": "step", "step": 1, "loss": 5.0, "invariance": 1.0, "redundancy": 0.4}
    evaluated = {"event": "evaluated", "step": 1, "retrieval": 0.1, "feature_rank": 0.2, "feature_spread": 0.9}
    assert drawn(monkeypatch, [step, evaluated], tmp_path) == {
        "Losses": ["total", "invariance", "redundancy"],
        "Held-out images": ["retrieval", "feature_rank"],
    }
