"""The structures at the borders: padding of batches, and what detections can be turned into."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from detrkit import Batch, Category, Detections, MissingExtraError, Target, UsageError
from detrkit.masks import RunLengths


def image(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width) + 1  # nowhere zero


def target(count: int, name: str = "") -> Target:
    return Target(torch.zeros(count, dtype=torch.int64), torch.full((count, 4), 0.5), name)


def test_images_are_padded_to_the_right_and_below() -> None:
    images = [image(5, 9), image(7, 4)]
    batch = Batch.from_images(images)
    assert batch.images.shape == (2, 3, 7, 9)
    assert batch.padding.shape == (2, 7, 9)
    assert batch.targets == ()
    for row, original in enumerate(images):
        height, width = original.shape[1:]
        assert torch.equal(batch.images[row, :, :height, :width], original)
        assert bool((batch.images[row].abs().sum(0) == 0).eq(batch.padding[row]).all())
        assert int((~batch.padding[row]).sum()) == height * width


def test_padded_sizes_are_rounded_up() -> None:
    batch = Batch.from_images([image(5, 32), image(33, 4)], multiple_of=32)
    assert batch.images.shape == (2, 3, 64, 32)


def test_batches_keep_type_and_targets_and_move() -> None:
    batch = Batch.from_images([image(4, 4).double()], [target(2, "a.png")]).to("cpu")
    assert batch.images.dtype == torch.float64
    assert batch.targets[0].name == "a.png"
    assert batch.to("meta").targets[0].boxes.device.type == "meta"


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one image; got an empty list"):
        Batch.from_images([])
    with pytest.raises(UsageError, match="differ in number; got 1 targets, 2 images"):
        Batch.from_images([image(4, 4), image(4, 4)], [target(1)])


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 3)])
def test_images_of_other_shapes_are_named(shape: tuple[int, ...]) -> None:
    # Without the tests' own shape checks, which would be the first to refuse.
    plain = getattr(Batch.from_images, "__wrapped__", Batch.from_images)
    with pytest.raises(UsageError, match=r"Image 1 of the batch.*got \(.*expected \(3, height, width\)"):
        plain([image(4, 4), torch.zeros(shape)])


@pytest.fixture
def found() -> Detections:
    return Detections(
        boxes=np.array([[1, 2, 11, 22], [0, 0, 5, 5], [3, 3, 4, 4]], np.float32),
        scores=np.array([0.9, 0.5, 0.1], np.float32),
        labels=np.array([1, 0, 1]),
        categories=(Category(7, "cat"), Category(3, "dog")),
        image_size=(30, 40),
        source="a.png",
        segments=RunLengths.encode(np.zeros((3, 30, 40), bool)),
    )


def test_detections_can_be_chosen(found: Detections) -> None:
    assert len(found) == 3
    assert found.names == ["dog", "cat", "dog"]
    for chosen in (found[found.labels == 1], found[[0, 2]], found[::2]):
        assert chosen.scores.tolist() == found.scores[[0, 2]].tolist()
        assert chosen.names == ["dog", "dog"]
        assert chosen.masks is not None
        assert chosen.masks.shape == (2, 30, 40)
        assert (chosen.source, chosen.image_size) == ("a.png", (30, 40))
    assert len(found.above(0.5)) == 2
    assert len(found.above(1.0)) == 0
    assert found.above(1.0).names == []


def test_a_number_chooses_one_and_they_come_one_by_one(found: Detections) -> None:
    ones = [found[0], found[np.int64(1)], found[-1]]
    assert [one.boxes.shape for one in ones] == [(1, 4)] * 3
    assert [one.names for one in found] == [one.names for one in ones] == [["dog"], ["cat"], ["dog"]]
    assert ones[0].masks is not None
    assert ones[0].masks.shape == (1, 30, 40)
    with pytest.raises(IndexError):
        found[3]


def test_coco_results_have_the_files_ids_and_widths(found: Detections) -> None:
    results = replace(found, segments=None).to_coco(42)
    assert results[0] == {
        "image_id": 42,
        "category_id": 3,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": pytest.approx(0.9),
    }
    assert [type(value) for value in results[0].values()] == [int, int, list, float]
    assert found[:0].to_coco(1) == []


@pytest.mark.parametrize("count", [3, 0])
def test_supervision_has_the_same_figures(found: Detections, count: int) -> None:
    pytest.importorskip("supervision")
    theirs = found[:count].to_supervision()
    assert len(theirs) == count
    assert theirs.xyxy.tolist() == found.boxes[:count].tolist()
    assert list(theirs.data["class_name"]) == found.names[:count]


def test_supervision_that_is_missing_is_named(found: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detrkit\[supervision\]'"):
        found.to_supervision()
