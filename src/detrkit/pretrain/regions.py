"""Whether a detector finds, unasked, what stands out in an image: figures of the second question of a pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from detrkit.boxes import cxcywh_to_xyxy, pairwise_iou
from detrkit.pretrain.figures import patch_scores
from detrkit.structures import Predictions, Target


class RegionFigures:
    """Gathers, image by image, how well regions are found. Parts of several processes can be merged.

    Args:
        num_classes: of the detector; the last one is what is looked for.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.overlaps: list[float] = []

    def add(self, found: Predictions, regions: Sequence[Target]) -> None:
        """Take a batch into account: of every image the best scored boxes, as many as it has regions.

        Args:
            found: by the detector's own queries, of all layers; the last is the answer.
            regions: of each image.
        """
        scores = patch_scores(found.logits[-1].float(), self.num_classes)
        for score, boxes, target in zip(scores, cxcywh_to_xyxy(found.boxes[-1].float()), regions, strict=True):
            if count := min(len(target.boxes), len(score)):
                overlap = pairwise_iou(boxes[score.topk(count).indices], cxcywh_to_xyxy(target.boxes))
                self.overlaps += torch.amax(overlap, 0).tolist()

    @staticmethod
    def merged(parts: Sequence[RegionFigures]) -> RegionFigures:
        """One for all."""
        whole = RegionFigures(parts[0].num_classes)
        for part in parts:
            whole.overlaps += part.overlaps
        return whole

    def result(self) -> dict[str, float]:
        """`region_recall50`: the share of regions that one of these boxes overlaps by at least a half (IoU).
        `region_iou`: the mean of the best overlaps. NaN where there are no regions.
        """
        if not self.overlaps:
            return {"region_recall50": float("nan"), "region_iou": float("nan")}
        overlaps = np.array(self.overlaps)
        return {"region_recall50": float((overlaps >= 0.5).mean()), "region_iou": float(overlaps.mean())}

    def sentence(self) -> str:
        """What this comes to, to be said after what was found of patches; empty where there are no regions."""
        if not self.overlaps:
            return ""
        return f" Without any patch it finds {self.result()['region_recall50']:.0%} of the regions that stand out."
