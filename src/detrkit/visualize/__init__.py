"""Pictures of detections, and plots of training and evaluation."""

from detrkit.visualize.diagnosis import write_diagnosis
from detrkit.visualize.patches import patch_sheet
from detrkit.visualize.pictures import colour_of, draw, mosaic, open_image, side_by_side, truth_of
from detrkit.visualize.plots import plot_confusion, plot_curves, plot_history, plot_pr

__all__ = [
    "colour_of",
    "draw",
    "mosaic",
    "open_image",
    "patch_sheet",
    "plot_confusion",
    "plot_curves",
    "plot_history",
    "plot_pr",
    "side_by_side",
    "truth_of",
    "write_diagnosis",
]
