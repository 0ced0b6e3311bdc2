"""Average precision of masks: pycocotools is the oracle, and what is not known is neither found nor missed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of, pycocotools_figures, random_set, with_masks

from detrkit.errors import DataError
from detrkit.evaluation import evaluate, figures, read_results, write_results
from detrkit.masks import RunLengths

MASK_NAMES = [
    f"mask_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
]


def mask_of(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    pixels = np.zeros((100, 100), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def case():
    """Two objects of one image; the first is found with a perfect box and half of its mask, the second exactly."""
    annotations = annotations_of([[[0, 0, 40, 40], [50, 50, 90, 90]]], [[0, 1]])
    true = RunLengths.encode(np.stack([mask_of(0, 0, 40, 40), mask_of(50, 50, 90, 90)]))
    (found,) = detections_of(annotations, [[([0, 0, 40, 40], 0, 0.9), ([50, 50, 90, 90], 1, 0.8)]])
    segments = RunLengths.encode(np.stack([mask_of(0, 0, 22, 40), mask_of(50, 50, 90, 90)]))
    return replace(annotations, masks=true), [replace(found, segments=segments)]


@pytest.mark.parametrize("first", range(0, 36, 12))
def test_equals_pycocotools_on_random_sets(first):
    for seed in range(first, first + 12):
        annotations, detections = with_masks(*random_set(seed), seed)
        ours = dict(figures(annotations, detections))
        if not sum(map(len, detections)):
            detections = [replace(one, segments=None) for one in detections]
        theirs = pycocotools_figures(annotations, detections, "segm")
        np.testing.assert_allclose(
            [ours[name] for name in MASK_NAMES],
            np.where(theirs == -1, np.nan, theirs),
            rtol=0,
            atol=1e-9,
            err_msg=f"set {seed}",
        )


def test_masks_are_judged_apart_from_boxes():
    annotations, detections = case()
    metrics = evaluate(annotations, detections)
    assert metrics.figures["AP"] == pytest.approx(1)
    assert metrics.figures["mask_AP"] == pytest.approx((0.2 + 1) / 2)  # an IoU of 0.55 passes two of ten
    assert [one.mask_ap for one in metrics.per_class] == pytest.approx([0.2, 1])
    assert [one.mask_ap50 for one in metrics.per_class] == pytest.approx([1, 1])
    assert list(metrics.figures)[12:] == MASK_NAMES
    assert json.loads(json.dumps(metrics.to_json()))["per_class"][0]["mask_ap"] == pytest.approx(0.2)


def test_without_masks_on_one_side_there_are_no_mask_figures():
    annotations, detections = case()
    for truth, found in (
        (replace(annotations, masks=None), detections),
        (annotations, [replace(one, segments=None) for one in detections]),
    ):
        metrics = evaluate(truth, found)
        assert not [name for name in metrics.figures if name.startswith("mask")]
        assert math.isnan(metrics.per_class[0].mask_ap)
        assert metrics.to_json()["per_class"][0]["mask_ap"] is None


def test_an_object_whose_mask_is_not_known_is_neither_found_nor_missed():
    annotations, detections = case()
    true = RunLengths.joined([RunLengths.unknown(np.array([[100, 100]])), annotations.masks[1:]])
    half_known = replace(annotations, masks=true)
    # The first detection lies in the box of the object of its class, the second is right, a third is false.
    metrics = evaluate(half_known, detections)
    assert math.isnan(metrics.per_class[0].mask_ap)
    assert metrics.figures["mask_AP"] == pytest.approx(1)
    assert metrics.figures["AP"] == pytest.approx(1)
    missed = evaluate(half_known, [detections[0][1:]])
    assert missed.figures["mask_AP"] == pytest.approx(1)
    outside = replace(
        detections[0], segments=RunLengths.encode(np.stack([mask_of(60, 0, 90, 40), mask_of(50, 50, 90, 90)]))
    )
    both = replace(annotations.select([0, 0]), masks=RunLengths.joined([true, annotations.masks]))
    wrong = evaluate(both, [outside, detections[0]])
    assert wrong.per_class[0].mask_ap50 == pytest.approx(0.5)  # outside of the box it is a false alarm
    right = evaluate(both, detections * 2)
    assert right.per_class[0].mask_ap50 == pytest.approx(1)


def test_columns_of_masks_in_other_forms_are_asked_image_by_image():
    annotations, detections = with_masks(*random_set(3), 3)

    class Files:
        def __len__(self):
            return len(annotations.boxes)

        def __getitem__(self, rows):
            raise NotImplementedError

        @property
        def known(self):
            return annotations.masks.known

        def encoded(self, rows):
            return annotations.masks[rows]

    expected = dict(figures(annotations, detections))
    assert dict(figures(replace(annotations, masks=Files()), detections)) == pytest.approx(expected, nan_ok=True)


def test_masks_that_do_not_fit_are_named():
    annotations, detections = case()
    small = replace(detections[0], segments=RunLengths.encode(np.ones((2, 50, 60), bool)))
    with pytest.raises(DataError, match=r"image 0 \(0.png\).*another size.*50 × 60.*100 × 100"):
        evaluate(annotations, [small])
    part = RunLengths.joined([detections[0].segments[:1], RunLengths.unknown(np.array([[100, 100]]))])
    with pytest.raises(DataError, match=r"image 0 \(0.png\).*others have none.*1 masks of 2 detections"):
        evaluate(annotations, [replace(detections[0], segments=part)])


def test_results_files_hold_masks(tmp_path):
    annotations, detections = case()
    write_results(tmp_path / "results.json", annotations, detections)
    (again,) = read_results(tmp_path / "results.json", annotations)
    np.testing.assert_array_equal(again.masks, detections[0].masks)
    entries = json.loads((tmp_path / "results.json").read_text())
    for entry in entries:
        del entry["bbox"]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    (boxless,) = read_results(tmp_path / "results.json", annotations)
    assert boxless.boxes.tolist() == [[0, 0, 40, 22], [50, 50, 90, 90]]
    del entries[1]["segmentation"]
    entries[1]["bbox"] = [50, 50, 40, 40]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="others have none"):
        evaluate(annotations, read_results(tmp_path / "results.json", annotations))


@pytest.mark.parametrize("mask", ['{"size": [100, 100], "counts": "abc"}', '{"size": [100, 100]}', "[[1, 2, 3, 4]]"])
def test_masks_in_results_files_that_cannot_be_read_are_named(tmp_path, mask):
    (tmp_path / "results.json").write_text(
        f'[{{"image_id": 1, "category_id": 0, "score": 1, "bbox": [1, 2, 3, 4], "segmentation": {mask}}}]'
    )
    with pytest.raises(DataError, match=r"entry 0: The mask of a detection cannot be read.*compressed run lengths"):
        read_results(tmp_path / "results.json", case()[0])
