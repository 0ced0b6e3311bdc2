"""Evaluation: COCO and Pascal VOC figures, tables, curves, confusions and a page to look at. Knows no model."""

from detrkit.evaluation.results import read_results, write_results
from detrkit.evaluation.run import ClassMetrics, Metrics, evaluate, figures

__all__ = ["ClassMetrics", "Metrics", "evaluate", "figures", "read_results", "write_results"]
