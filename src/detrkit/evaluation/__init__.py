"""Evaluation: COCO and Pascal VOC figures, tables, curves, confusions and a page to look at. Knows no model."""

from detrkit.evaluation.images import ImageScore, best_and_worst, score_images
from detrkit.evaluation.panoptic_quality import ClassQuality, PanopticQuality, panoptic_quality
from detrkit.evaluation.report import write_report
from detrkit.evaluation.results import check_results, read_results, write_panoptic, write_results
from detrkit.evaluation.run import ClassMetrics, Metrics, evaluate, figures

__all__ = [
    "ClassMetrics",
    "ClassQuality",
    "ImageScore",
    "Metrics",
    "PanopticQuality",
    "best_and_worst",
    "check_results",
    "evaluate",
    "figures",
    "panoptic_quality",
    "read_results",
    "score_images",
    "write_panoptic",
    "write_report",
    "write_results",
]
