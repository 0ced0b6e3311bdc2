"""Draws `docs/images/speed.png` from the results that are kept: how many times as fast, with the aim of each line.

python benchmarks/_chart.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "speed.png"
WIDTH, HEIGHT, DPI = 8.0, 0.5, 150
"""Inches of the picture and of each bar, and pixels an inch."""
COLOUR, DARK = "#2a6f97", "#333333"


class Bar(NamedTuple):
    """What is measured, in which result its ratio stands and where (a number counts cases), and the aim."""

    what: str
    against: str
    file: str
    path: tuple[str | int, ...]
    aim: float | None = None


BARS = (
    Bar("COCO's twelve figures", "pycocotools", "coco_metrics", ("ratio",), 10),
    Bar("matching", "transformers", "matching", ("times",), 5),
    Bar("pre-training step", "patches one by one", "pretraining_step", ("cases", 1, "features", "times_faster"), 2.5),
    Bar("opening COCO-sized annotations", "pycocotools", "open_annotations", ("ratios", "seconds"), 5),
    Bar("JPEG files to training batches", "Pillow", "reading", ("cases", 0, "ours_times_faster"), 2),
    Bar(
        "JPEG files to detections",
        "transformers",
        "prediction",
        ("cases", 0, "ratios", "library against transformers"),
    ),
    Bar(
        "inference",
        "transformers",
        "inference",
        ("processes", "as the system has it", "ratios", "ours against transformers"),
        1.5,
    ),
    Bar("epoch of mixed shapes", "batches left to chance", "grouping", ("cases", 0, "ratio")),
    Bar("training step", "a plain step", "training_step", ("cases", 0, "ratios", "ours"), 1.5),
)


def ratio(bar: Bar) -> float:
    """The ratio that a result holds."""
    found: Any = json.loads((HERE / "results" / f"{bar.file}.json").read_text())
    for key in bar.path:
        found = list(found.values())[key] if isinstance(key, int) else found[key]
    return float(found)


def draw() -> Figure:
    """All bars, the longest on top, on a logarithmic axis; a short line stands where an aim is."""
    bars = sorted(BARS, key=ratio)
    figure = Figure(figsize=(WIDTH, HEIGHT * len(bars) + 1), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(bars)), [ratio(bar) - 1 for bar in bars], left=1, color=COLOUR, height=0.6)
    for place, bar in enumerate(bars):
        axes.text(max(ratio(bar), bar.aim or 1) * 1.05, place, f"{ratio(bar):.3g}", va="center", color=DARK)
        if bar.aim:
            axes.plot([bar.aim, bar.aim], [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(bars)), [f"{bar.what}\nagainst {bar.against}" for bar in bars], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(1, 160)
    ticks = (1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times as fast; a black line is the aim")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE)
    print(PICTURE)
