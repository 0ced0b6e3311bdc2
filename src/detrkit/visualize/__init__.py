"""Pictures of detections, and plots of training and evaluation."""

from detrkit.data.images import open_image
from detrkit.visualize.colours import colour_of
from detrkit.visualize.diagnosis import write_diagnosis
from detrkit.visualize.patches import patch_sheet
from detrkit.visualize.pictures import draw, mosaic, side_by_side
from detrkit.visualize.plots import plot_confusion, plot_curves, plot_history, plot_pr
from detrkit.visualize.segments import draw_panoptic, panoptic_side_by_side
from detrkit.visualize.truth import compare, compare_panoptic, panoptic_truth_of, truth_of

__all__ = [
    "colour_of",
    "compare",
    "compare_panoptic",
    "draw",
    "draw_panoptic",
    "mosaic",
    "open_image",
    "panoptic_side_by_side",
    "panoptic_truth_of",
    "patch_sheet",
    "plot_confusion",
    "plot_curves",
    "plot_history",
    "plot_pr",
    "side_by_side",
    "truth_of",
    "write_diagnosis",
]
