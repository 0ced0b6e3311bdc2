"""COCO average precision and average recall of boxes and of masks, computed by hotcoco behind one adapter.

Protocol: Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), with the constants of the reference
implementation: IoU .50:.05:.95, 101 recall points, 1, 10 or 100 detections an image and class, areas below 32² (small)
and from 96² (large). Objects marked crowd are neither found nor missed. Undefined figures are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError
from detrkit.evaluation.columns import Found, image_name, true_masks
from detrkit.masks import RunLengths

RECALL_GRID = np.linspace(0.0, 1.0, 101)
"""The recalls at which COCO reads the precision."""


class CocoTables(NamedTuple):
    """What COCO's figures are means of; −1 where there is nothing to be found.

    `precision` is (10 IoUs, 101 recalls, c classes, 4 areas, 3 limits); `recall` lacks the axis of recalls. Areas are
    all, small, medium, large; limits are 1, 10 and 100 detections.
    """

    precision: np.ndarray
    recall: np.ndarray


def coco_tables(annotations: Annotations, found: Found) -> CocoTables:
    """Match the boxes of detections with those of the ground truth at every IoU, area and limit.

    Args:
        annotations: n images.
        found: their detections.
    """
    return _tables(annotations, found, None)


def mask_tables(annotations: Annotations, found: Found) -> CocoTables | None:
    """Match the masks of detections with those of the ground truth; None where either side has no masks at all.

    The size of an object is its `areas`, that of a detection the pixels of its mask. An object whose mask is not known
    is treated as a crowd that fills its box: it is not missed, and detections of its class are not counted as false
    as far as they lie in the box.

    Raises:
        DataError: a mask has another size than the image's true masks, or a file of masks cannot be read.
    """
    if annotations.masks is None or found.segments is None:
        return None
    true = true_masks(annotations)
    _check_sizes(annotations, found, true)
    return _tables(annotations, found, true)


def _tables(annotations: Annotations, found: Found, true: RunLengths | None) -> CocoTables:
    """The tables of boxes, or of masks where the true ones are given.

    Ids never reach the evaluator: images are numbered by the order of their ids (it decides ties between images, as in
    pycocotools), categories and annotations from 1 (an annotation of id 0 would count as not found).
    """
    import hotcoco

    shape = (10, 101, len(annotations.categories), 4, 3)
    if not annotations.categories:
        return CocoTables(np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0))
    number = np.empty(len(annotations), np.int64)
    number[np.argsort(annotations.image_ids, kind="stable")] = np.arange(1, len(annotations) + 1)
    truth = hotcoco.COCO.from_arrays(
        [{"id": index} for index in range(1, len(annotations) + 1)],
        [{"id": label + 1, "name": category.name} for label, category in enumerate(annotations.categories)],
        np.repeat(number, np.diff(annotations.offsets)),
        annotations.labels + 1,
        _xyxy_to_xywh(annotations.boxes),
        area=annotations.areas,
        iscrowd=annotations.crowd if true is None else annotations.crowd | ~true.known,
        segmentation=None if true is None else _filled(true, annotations.boxes),
    )
    rows = np.column_stack([number[found.images], _xyxy_to_xywh(found.boxes), found.scores, found.labels + 1])
    if true is None:
        answers = truth.load_res(rows)
    else:
        assert found.segments is not None, "masks are compared where detections have them"
        masks: list[Any] = found.segments.to_coco()
        answers = truth.load_res(rows, segmentation=masks)
        # Results that hold boxes are sized by them, unless they are told better.
        answers.update_anns(ids=np.arange(1, len(rows) + 1), area=found.segments.areas().astype(np.float64))
    evaluator = hotcoco.COCOeval(truth, answers, "bbox" if true is None else "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    tables = evaluator.eval
    assert tables is not None, "accumulate() fills the tables"
    return CocoTables(np.asarray(tables["precision"]), np.asarray(tables["recall"]))


def _filled(true: RunLengths, boxes: np.ndarray) -> list[Any]:
    """The true masks for the evaluator, the whole box where a mask is not known."""
    from hotcoco import mask

    masks: list[Any] = true.to_coco()
    for row in np.flatnonzero(~true.known).tolist():
        masks[row] = mask.fr_bbox(_xyxy_to_xywh(boxes[[row]])[0].tolist(), *masks[row]["size"])
    return masks


def _check_sizes(annotations: Annotations, found: Found, true: RunLengths) -> None:
    assert found.segments is not None, "masks are compared where detections have them"
    expected = annotations.image_sizes.copy()
    expected[np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))] = true.sizes
    wanted = expected[found.images]
    other = (wanted > 0).all(1) & (found.segments.sizes != wanted).any(1)
    if other.any():
        row = int(np.flatnonzero(other)[0])
        raise DataError(
            "The mask of a detection has another size than the true masks of its image",
            where=image_name(annotations, int(found.images[row])),
            got=" × ".join(str(side) for side in found.segments.sizes[row]),
            expected=" × ".join(str(side) for side in wanted[row]),
            remedy="Make masks of the size that the annotations state, height and width.",
        )


def coco_figures(tables: CocoTables) -> Iterator[tuple[str, float]]:
    """Yield COCO's twelve figures by name: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl."""
    precision, recall = tables
    yield "AP", mean_defined(precision[..., 0, 2])
    yield "AP50", mean_defined(precision[0, ..., 0, 2])
    yield "AP75", mean_defined(precision[5, ..., 0, 2])
    for area, letter in enumerate("sml", start=1):
        yield f"AP{letter}", mean_defined(precision[..., area, 2])
    for limit, count in enumerate((1, 10, 100)):
        yield f"AR{count}", mean_defined(recall[..., 0, limit])
    for area, letter in enumerate("sml", start=1):
        yield f"AR{letter}", mean_defined(recall[..., area, 2])


def mean_defined(values: np.ndarray) -> float:
    """Mean of the entries that are defined (not −1); NaN where there is none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def _xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
