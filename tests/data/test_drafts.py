"""Found things as annotations: what is accepted, what the formats give back, which names they can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.data import formats
from detrkit.data.drafts import boxes_by_name, common_root, drafted
from detrkit.errors import DataError
from detrkit.structures import Category, Detections

CATEGORIES = (Category(1, "nut"), Category(2, "bolt"))
SIZE = (40, 60)


def found(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Detections of rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64), CATEGORIES, SIZE)


FOUND = (
    ("a/1.png", found((3.25, 4, 20.5, 30, 0.9, 0), (1, 1, 9, 9, 0.5, 1), (2, 2, 8, 8, 0.49, 1))),
    ("2.jpg", found()),
    ("b/1.png", found((0, 0, 60, 40, 0.7, 1))),
)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "photos"
    for name, _ in FOUND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(folder / name)
    return folder


def test_what_scores_enough_is_annotated_and_images_without_objects_stay(root):
    draft = drafted(root, FOUND, accept=0.5)
    assert list(draft.file_names) == ["a/1.png", "2.jpg", "b/1.png"]
    assert draft.offsets.tolist() == [0, 2, 2, 3]
    assert draft.boxes.tolist() == [[3.25, 4, 20.5, 30], [1, 1, 9, 9], [0, 0, 60, 40]]
    assert draft.labels.tolist() == [0, 1, 1]
    assert draft.areas.tolist() == [17.25 * 26, 64, 2400]
    assert (draft.image_ids.tolist(), draft.image_sizes.tolist()) == ([1, 2, 3], [[40, 60]] * 3)
    assert not draft.crowd.any()
    assert not draft.difficult.any()
    assert draft.categories == CATEGORIES
    assert boxes_by_name(draft) == {"nut": 1, "bolt": 2}
    assert draft.problems.counts == {}
    assert draft.path(0) == root / "a/1.png"


def test_boxes_are_cut_and_those_of_no_area_dropped_and_both_counted(root):
    odd = found((-5, 2, 10, 50, 1, 0), (7, 7, 7, 9, 1, 0), (70, 5, 80, 9, 1, 1), (np.nan, 0, 5, 5, 1, 1))
    draft = drafted(root, [("2.jpg", odd)], accept=0.0)
    assert draft.boxes.tolist() == [[0, 2, 10, 40]]
    assert draft.problems.counts == {"outside-box": 1, "degenerate-box": 2, "non-finite-box": 1}
    assert all("what was found in 2.jpg" in line for line in draft.problems.lines())


def test_nothing_found_anywhere(root):
    draft = drafted(root, [("2.jpg", found())], accept=0.0)
    assert (len(draft), draft.boxes.shape, boxes_by_name(draft)) == (1, (0, 4), {"nut": 0, "bolt": 0})


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_the_formats_give_the_same_back(root, tmp_path, format):
    out = tmp_path / "out"
    formats.write({"train": drafted(root, FOUND, accept=0.5)}, out, format)
    read = formats.read(out)
    assert list(read) == ["train"]
    again = read["train"]
    assert again.problems.counts == {}
    assert [category.name for category in again.categories] == ["nut", "bolt"]
    images = {again.path(index).stem + again.path(index).parent.name[-1:]: index for index in range(len(again))}
    assert len(images) == len(again) == 3
    boxes = {tuple(np.round(box, 2)): label for box, label in zip(again.boxes, again.labels, strict=True)}
    assert boxes == {(3.25, 4, 20.5, 30): 0, (1, 1, 9, 9): 1, (0, 0, 60, 40): 1}
    assert sorted(np.diff(again.offsets).tolist()) == [0, 1, 2]
    assert (again.image_sizes == SIZE).all()


def test_the_root_is_the_folder_that_all_images_share(root, monkeypatch):
    monkeypatch.chdir(root)
    assert common_root([Path("a/1.png"), root / "b" / ".." / "b" / "1.png"]) == (root, ["a/1.png", "b/1.png"])
    assert common_root([root / "a/1.png"]) == (root / "a", ["1.png"])


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_a_folder_that_is_called_images_hides_no_other(tmp_path, format):
    files = [tmp_path / "images" / name for name in ("images/1.png", "more/2.png")]
    for file in files:
        file.parent.mkdir(parents=True)
        Image.new("RGB", SIZE[::-1]).save(file)
    root, names = common_root(files)
    draft = drafted(root, [(name, found((1, 1, 9, 9, 1, 0))) for name in names], accept=0.0)
    formats.write({"train": draft}, tmp_path / "out", format)
    assert len(formats.read(tmp_path / "out")["train"].boxes) == 2


def test_no_folder_lies_above_the_root_of_the_file_system():
    with pytest.raises(DataError, match="no folder in common"):
        common_root([Path("/images/1.png"), Path("/photos/1.png")])
    assert common_root([Path("/photos/1.png"), Path("/more/1.png")])[1] == ["photos/1.png", "more/1.png"]


def test_links_are_not_followed(root, tmp_path):
    (tmp_path / "links").mkdir()
    for name in ("x.png", "y.png"):
        (tmp_path / "links" / name).symlink_to(root / "a/1.png")
    files = [tmp_path / "links" / name for name in ("x.png", "y.png")]
    assert common_root(files) == (tmp_path / "links", ["x.png", "y.png"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("photo", "no ending"),
        ("photo.gif", "no ending"),
        (".photo.png", "hidden"),
        (".cache/photo.png", "hidden"),
        ("a\nb.png", "cannot hold"),
        ("a .png", "cannot hold"),
        ("a\\b.png", "cannot hold"),
        ("a\udcff.png", "cannot hold"),
    ],
)
def test_names_that_would_not_be_found_again_are_refused(tmp_path, name, part):
    with pytest.raises(DataError, match=part) as caught:
        common_root([tmp_path / "1.png", tmp_path / name])
    assert ascii(str(tmp_path / name))[1:-1] in str(caught.value)
    assert "Rename it" in caught.value.remedy
    str(caught.value).encode()
