"""Plots of training and evaluation, with matplotlib (the extra `plot`). No global figure is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from detrkit.errors import DataError, MissingExtraError, UsageError, brief
from detrkit.visualize.colours import colour_of
from detrkit.visualize.fonts import family_of, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = ("loss", "class", "l1", "giou", "feature", "invariance", "redundancy")
FIGURES = (
    ("Average precision", ("AP50", "AP")),
    ("Patches found on held-out images", ("recall50", "recall75", "consistency", "region_recall50")),
    ("Held-out images", ("retrieval", "feature_rank")),
)
"""What is drawn of an evaluation, under which heading: the first of these of which it has something."""

CURVES_IN_COLOUR = 7
COUNTS_UP_TO = 16
LONGEST_NAME = 24
FEW = 10


@runtime_checkable
class ReliabilityCurve(Protocol):
    """How often detections of similar score are right, in bins of the score; NaN where a bin is empty."""

    @property
    def edges(self) -> np.ndarray:
        """(bins + 1,) rising from 0 to 1."""

    @property
    def confidence(self) -> np.ndarray:
        """(bins,) mean score."""

    @property
    def accuracy(self) -> np.ndarray:
        """(bins,) share that is right."""

    @property
    def counts(self) -> np.ndarray:
        """(bins,) detections."""

    @property
    def ece(self) -> float:
        """Expected calibration error."""


def plot_history(lines: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Plot the losses and the main figures of a run, whether of detection or of a pre-training, over its steps.

    Args:
        lines: records of `metrics.jsonl`: {"event": "step", "step", "loss", "class", "l1", "giou", …} and
            {"event": "evaluated", "step", "epoch", "AP", "AP50", …}, or other figures of `FIGURES`; others are passed
            over.
        out: the picture to write.

    Returns:
        `out`.

    Raises:
        DataError: no record is a step or an evaluation.
        MissingExtraError: matplotlib is not installed.
    """
    steps = [line for line in lines if line.get("event") == "step"]
    evaluated = [line for line in lines if line.get("event") == "evaluated"]
    if not steps and not evaluated:
        raise DataError("There is nothing to plot", got=f"{len(lines)} records without a step or an evaluation")
    figure = _figure((5.6 * (bool(steps) + bool(evaluated)), 3.8))
    panels = list(np.atleast_1d(figure.subplots(1, bool(steps) + bool(evaluated))))
    if steps:
        _plot_losses(panels[0], steps)
    if evaluated:
        _plot_progress(panels[-1], evaluated)
    return _save(figure, out)


def _plot_losses(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    x = np.array([line["step"] for line in steps])
    for index, name in enumerate(LOSSES):
        values = np.array([_float(line.get(name)) for line in steps])
        if np.isnan(values).all():
            continue
        colour = _hex(index)
        window = max(1, len(values) // 50)
        if window > 1:
            axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(values, window), color=colour, linewidth=1.8, label="total" if name == "loss" else name)
    axes.set(title="Losses", xlabel="step")
    positive = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata(), float) if value > 0]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    _legend(axes, loc="best")  # said, it is no cause for a warning where drawing takes long


def _plot_progress(axes: Axes, evaluated: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    x = [line.get("epoch", line.get("step")) for line in evaluated]
    present = {name for line in evaluated for name, value in line.items() if value is not None}
    title, names = next((row for row in FIGURES if present.intersection(row[1])), FIGURES[0])
    for index, name in enumerate(names):
        values = np.array([_float(line.get(name)) for line in evaluated])
        if np.isnan(values).all():
            continue
        axes.plot(x, values, color=_hex(index), marker="o", markersize=3.5, linewidth=1.8, label=name)
        best = int(np.nanargmax(values))
        axes.annotate(
            f"{values[best]:.3f}", (x[best], values[best]), (0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set(title=title, xlabel="epoch" if "epoch" in evaluated[0] else "step", ylim=(0, 1.05))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, loc="best")


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    out: Path,
    *,
    x: str,
    y: str,
    level: float | None = None,
) -> Path:
    """Plot several methods' curves: a thin line for each repetition, a thick one for their mean.

    Args:
        curves: for each method the places on the x axis, and for each repetition as many values.
        out: the picture to write.
        x: label of the x axis.
        y: label of the y axis.
        level: a height to mark with a dashed line.

    Returns:
        `out`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((6.4, 4.0))
    axes = figure.subplots()
    for index, (name, (places, repetitions)) in enumerate(curves.items()):
        for values in repetitions:
            axes.plot(places, values, color=_hex(index), alpha=0.35, linewidth=0.9)
        mean = np.mean(np.asarray(repetitions, float), axis=0)
        count = f", {len(repetitions)} seeds" if len(repetitions) > 1 else ""
        axes.plot(places, mean, color=_hex(index), linewidth=2.2, label=name + count)
    if level is not None:
        axes.axhline(level, color="#808890", linestyle="--", linewidth=1.2)
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes, loc="best")
    return _save(figure, out)


def plot_pr(recall: np.ndarray, precision: np.ndarray, names: Sequence[str], out: Path) -> Path:
    """Plot precision over recall at IoU 0.5: each class in colour up to seven, else all in grey and their mean.

    Args:
        recall: (r,) in [0, 1].
        precision: (c, r); rows of NaN are classes without boxes and are left out.
        names: c of them.
        out: the picture to write.

    Raises:
        UsageError: shapes that do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    if precision.shape != (len(names), len(recall)):
        raise UsageError(
            "Curves, names and recalls do not fit together", got=precision.shape, expected=(len(names), len(recall))
        )
    figure = _figure((5.6, 5.0))
    axes = figure.subplots()
    defined = [row for row in range(len(names)) if not np.isnan(precision[row]).any()]
    few = len(defined) <= CURVES_IN_COLOUR
    for row in defined:
        label = f"{_name(names[row])} (AP50 {precision[row].mean():.3f})" if few else None
        style: dict[str, Any] = (
            {"color": _hex(row), "linewidth": 1.8} if few else {"color": "#9aa0a6", "linewidth": 0.7, "alpha": 0.6}
        )
        axes.plot(recall, precision[row], label=label, **style)
    if len(defined) > 1:
        mean = precision[defined].mean(0)
        axes.plot(
            recall,
            mean,
            color="#212529",
            linewidth=2,
            linestyle="--",
            label=f"mean of classes (AP50 {mean.mean():.3f})",
        )
    axes.set(title="Precision and recall at IoU 0.5", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    if axes.get_legend_handles_labels()[0]:  # below: curves of weak classes run where a legend would stand
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    return _save(figure, out)


def plot_confusion(counts: np.ndarray, names: Sequence[str], out: Path) -> Path:
    """Plot a confusion matrix: colour is the share of the row, the number is the count (up to 16 rows).

    Args:
        counts: (c + 1, c + 1), rows true, columns found, the last of each is background.
        names: c of them.
        out: the picture to write.

    Raises:
        UsageError: shapes that do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    size = len(names) + 1
    if counts.shape != (size, size):
        raise UsageError("Counts and names do not fit together", got=counts.shape, expected=(size, size))
    side = 2.2 + max(2.6, min(0.62 * size, 14))
    figure = _figure((side + 0.8, side))
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    fontsize = 10 if size <= COUNTS_UP_TO else 6
    classes = [_name(name) for name in names]
    axes.set_xticks(range(size), [*classes, "missed"], rotation=45, ha="right", fontsize=fontsize)
    axes.set_yticks(range(size), [*classes, "background"], fontsize=fontsize)
    axes.set(title="Confusion at IoU 0.5", xlabel="found as", ylabel="truly")
    axes.grid(False)
    if size <= COUNTS_UP_TO:
        for row, column in np.ndindex(size, size):
            if (row, column) != (size - 1, size - 1):
                ink = "white" if share[row, column] > 0.55 else "#212529"
                axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=ink, fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the row", fraction=0.046, pad=0.04)
    return _save(figure, out)


def plot_reliability(curves: Mapping[str, ReliabilityCurve], out: Path) -> Path:
    """Plot the share of detections that are right over their score, and below it how many there are.

    Honest scores lie on the dashed diagonal; scores below it promise too much. A small point is the mean of fewer than
    ten detections.

    Args:
        curves: for each name, for example "before" and "after" a calibration, its bins.
        out: the picture to write.

    Returns:
        `out`.

    Raises:
        UsageError: there is no curve, or its columns do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    if not curves:
        raise UsageError("There is nothing to plot", expected="at least one curve")
    for name, curve in curves.items():
        shapes = [column.shape for column in (curve.confidence, curve.accuracy, curve.counts, curve.edges[1:])]
        if len(set(shapes)) > 1:
            raise UsageError("The columns of a curve do not fit together", where=name, got=shapes)
    figure = _figure((5.2, 5.6))
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot((0, 1), (0, 1), color="#808890", linestyle="--", linewidth=1.2)
    for index, (name, curve) in enumerate(curves.items()):
        full = curve.counts > 0
        x, y = curve.confidence[full], curve.accuracy[full]
        axes.plot(x, y, color=_hex(index), linewidth=1.8, label=f"{name} (ECE {curve.ece:.3f})")
        axes.scatter(x, y, np.where(curve.counts[full] < FEW, 6, 26), color=_hex(index), zorder=3)
        width = np.diff(curve.edges) / len(curves)
        below.bar(curve.edges[:-1] + index * width, curve.counts, width, align="edge", color=_hex(index), alpha=0.45)
    axes.set(title="Reliability", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    # Nearly all detections of a detector have a low score.
    below.set_yscale("symlog", linthresh=1)
    below.set(xlabel="score", ylabel="detections")
    below.set_ylim(bottom=0)
    _legend(axes, loc="upper left", fontsize=9)
    return _save(figure, out)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "A plot") from error
    return Figure(figsize=size, layout="constrained")


def _name(name: str) -> str:
    """A name of a class as matplotlib takes it: short enough to leave room for the plot, and no formula."""
    return written(brief(name, LONGEST_NAME)).replace("$", r"\$")


def _save(figure: Figure, out: Path) -> Path:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if family := family_of(text.get_text()):
            text.set_fontfamily([*text.get_fontfamily(), family])
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            axes.spines[["top", "right"]].set_visible(False)
            if not axes.images:
                axes.grid(True, color="#e3e6ea", linewidth=0.8)
                axes.set_axisbelow(True)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    return out


def _legend(axes: Axes, **style: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **style)


def _hex(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour_of(label))


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the beginning."""
    total = np.cumsum(np.insert(np.nan_to_num(values), 0, 0.0))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    smoothed: np.ndarray = (total[stop] - total[start]) / (stop - start)
    return smoothed
