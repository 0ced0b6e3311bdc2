import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of, random_set

from detrkit.evaluation import evaluate, figures


def plain_voc(annotations, detections, label, eleven):
    """Pascal VOC's evaluation of one class, written out as in its development kit, slowly."""
    skipped = annotations.difficult | annotations.crowd
    positives = int((~skipped & (annotations.labels == label)).sum())
    if not positives:
        return None
    rows = [
        (-float(one.scores[k]), index, k)
        for index, one in enumerate(detections)
        for k in range(len(one))
        if one.labels[k] == label
    ]
    rows.sort(key=lambda row: row[0])
    taken, points, right, wrong = set(), [], 0, 0
    for _, index, k in rows:
        best, which = (False, -1.0), None
        box = detections[index].boxes[k].astype(float)
        for truth in range(annotations.offsets[index], annotations.offsets[index + 1]):
            if annotations.labels[truth] != label:
                continue
            other = annotations.boxes[truth]
            side = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
            inside = side[0] * side[1]
            mine, its = np.prod(box[2:] - box[:2]), np.prod(other[2:] - other[:2])
            overlap = inside / max(mine if annotations.crowd[truth] else mine + its - inside, 1e-300)
            # A crowd is asked last: whatever lies in it overlaps it most.
            if overlap >= 0.5 and (not annotations.crowd[truth], overlap) > best:
                best, which = (not annotations.crowd[truth], overlap), truth
        if which is not None and skipped[which]:
            continue
        if which is not None and which not in taken:
            taken.add(which)
            right += 1
        else:
            wrong += 1
        points.append((right, right / (right + wrong)))
    if eleven:
        return sum(max([p for r, p in points if 10 * r >= t * positives], default=0) for t in range(11)) / 11
    return sum(max([p for r, p in points if r >= k], default=0) for k in range(1, positives + 1)) / positives


def test_equals_the_plain_algorithm_on_random_sets():
    for seed in range(60):
        annotations, detections = random_set(seed)
        ours = dict(figures(annotations, detections, voc=True))
        for name, eleven in (("VOC07", True), ("VOC12", False)):
            values = [plain_voc(annotations, detections, label, eleven) for label in range(len(annotations.categories))]
            defined = [value for value in values if value is not None]
            expected = sum(defined) / len(defined) if defined else float("nan")
            assert ours[name] == pytest.approx(expected, abs=1e-12, nan_ok=True), seed


def test_values_worked_out_by_hand():
    # By score: right, wrong, right; two boxes. Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    annotations = annotations_of([[[0, 0, 10, 10], [50, 50, 60, 60]]], [[0, 0]])
    rows = [([0, 0, 10, 10], 0, 0.9), ([80, 80, 90, 90], 0, 0.8), ([50, 50, 60, 60], 0, 0.7)]
    found = evaluate(annotations, detections_of(annotations, [rows]), voc=True).figures
    assert found["VOC12"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["VOC07"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_recall_three_tenths_is_reached_by_three_of_ten():
    boxes = [[10.0 * k, 0, 10.0 * k + 9, 9] for k in range(10)]
    annotations = annotations_of([boxes], [[0] * 10])
    found = detections_of(annotations, [[(box, 0, 0.9) for box in boxes[:3]]])
    assert evaluate(annotations, found, voc=True).figures["VOC07"] == pytest.approx(4 / 11)


def test_difficult_boxes_are_neither_found_nor_missed():
    annotations = annotations_of([[[0, 0, 10, 10], [50, 50, 60, 60]]], [[0, 0]], difficult=[[True, False]])
    both = [([0, 0, 10, 10], 0, 0.9), ([50, 50, 60, 60], 0, 0.8)]
    for rows in (both, both[1:]):
        assert evaluate(annotations, detections_of(annotations, [rows]), voc=True).figures["VOC12"] == 1


def test_a_box_in_a_crowd_is_found_and_what_else_lies_there_does_not_count():
    person, crowd = [10, 10, 30, 50], [0, 0, 100, 60]
    annotations = annotations_of([[crowd, person]], [[0, 0]], crowd=[[True, False]])
    near = [10, 10, 30, 50.8]  # IoU 0.98
    for rows in ([(near, 0, 0.9)], [([60, 5, 80, 45], 0, 0.95), (near, 0, 0.9)]):
        figures_of = evaluate(annotations, detections_of(annotations, [rows]), voc=True).figures
        assert (figures_of["VOC07"], figures_of["VOC12"], figures_of["AP"]) == pytest.approx((1, 1, 1))
    for bottom, expected in ((90, 1.0), (92, 0.5)):  # in the crowd by half, and by less
        rows = [([60, 30, 80, bottom], 0, 0.95), (near, 0, 0.9)]
        found = evaluate(annotations, detections_of(annotations, [rows]), voc=True).figures
        assert found["VOC12"] == pytest.approx(expected)
    two = annotations_of([[crowd, person, [50, 10, 70, 50]]], [[0, 0, 0]], crowd=[[True, False, False]])
    again = [(near, 0, 0.9), (person, 0, 0.8), ([50, 10, 70, 50], 0, 0.7)]
    assert evaluate(two, detections_of(two, [again]), voc=True).figures["VOC12"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_second_detection_of_a_box_is_wrong_even_with_a_free_neighbour():
    # Both detections overlap the first box most; COCO would give the second one the neighbour.
    annotations = annotations_of([[[0, 0, 100, 100], [0, 20, 100, 120]]], [[0, 0]])
    rows = [([0, 0, 100, 100], 0, 0.9), ([0, 4, 100, 104], 0, 0.8)]
    metrics = evaluate(annotations, detections_of(annotations, [rows]), voc=True)
    assert metrics.figures["VOC12"] == pytest.approx(0.5)
    assert metrics.figures["AP50"] == pytest.approx(1)
