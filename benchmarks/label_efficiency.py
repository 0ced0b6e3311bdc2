"""Claim: pre-training without labels saves labels, at the size of a few dozen labelled images.

    detrkit pretrain IMAGES … --out PRETRAINED --backbone-weights FILE
    python benchmarks/label_efficiency.py DATA --pretrained PRETRAINED --out FOLDER --backbone-weights FILE \\
        [--sizes 10 20 50 0] [--seeds 0 1 2] [--steps 300] [--set image_size=128 vertical_flip=0.5 …]

Trains the same preset twice for every size and seed, with the same images, steps, recipe and backbone weights: from the
pre-trained detector, and without it. Some training images are set aside for all runs and choose each run's checkpoint;
a seed draws the labelled images from the others (a smaller size is a part of a larger one), the order and the start.
The test split (`val` of DATA) is evaluated once a run, at its end. Size 0 is all images. Finished runs are kept in
FOLDER and not repeated, so that a stopped series goes on and several processes can share one (`--arms scratch` here,
`--arms pretrained` there). `--report` only counts what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import machine, parser, show
from convergence import chosen, shown, spread

import detrkit
from detrkit.data import formats
from detrkit.data.digits import make_digits
from detrkit.training.events import Evaluated, Event
from detrkit.visualize.plots import plot_curves

ARMS = ("scratch", "pretrained")
NAMES = {"scratch": "without pre-training", "pretrained": "pre-trained"}
SET_ASIDE_SEED = 123


def main() -> None:
    options = parser(__doc__)
    options.add_argument("data", nargs="?", type=Path, help="annotated folder; its split `val` is the test split")
    options.add_argument("--pretrained", type=Path, help="run of detrkit pretrain")
    options.add_argument("--out", type=Path, help="folder of the runs and of their figures")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--sizes", nargs="+", type=int, default=[10, 20, 50, 0], help="labelled images; 0: all")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=300, help="about so many steps, in whole epochs")
    options.add_argument("--set-aside", type=int, default=30, help="training images that choose the checkpoint")
    options.add_argument(
        "--backbone-weights", default="", help="as in `detrkit train`, of the runs without pre-training"
    )
    options.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further fields of the recipe")
    options.add_argument("--report", action="store_true", help="train nothing, count what is there")
    options.add_argument("--plot", type=Path, help="where the picture goes; by default labels.png in the folder")
    arguments = options.parse_args()
    if arguments.short:
        with tempfile.TemporaryDirectory() as folder:
            show(short(Path(folder)), arguments.json)
        return
    if arguments.out is None or (not arguments.report and (arguments.data is None or arguments.pretrained is None)):
        options.error("DATA, --pretrained and --out are needed")
    if not arguments.report:
        changes = {"backbone_weights": arguments.backbone_weights, **chosen(arguments.set)}
        series(arguments.data, arguments.out, arguments, changes)
    result = report(arguments.out)
    plot(result, arguments.plot or arguments.out / "labels.png")
    show(result if arguments.json else table(result), arguments.json)


def series(data: Path, out: Path, arguments: Any, changes: Mapping[str, Any]) -> None:
    """All runs that are asked for and not there yet."""
    for seed in arguments.seeds:
        for size in arguments.sizes:
            part = divide(data, out / "data", size, seed, arguments.set_aside)
            for arm in arguments.arms:
                init = str(arguments.pretrained) if arm == "pretrained" else ""
                follow(part, data, out, arm, size, seed, arguments.steps, {**changes, "init": init})


def divide(data: Path, out: Path, size: int, seed: int, set_aside: int) -> Path:
    """A data set with so many training images of a split, and those set aside as its `val`."""
    folder = out / f"{size or 'all'}-{seed}"
    if folder.exists():
        return folder
    train = formats.read(data, "train")["train"]
    by_name = sorted(range(len(train)), key=lambda index: train.file_names[index])
    order = np.random.default_rng(SET_ASIDE_SEED).permutation(len(train))
    held, pool = [by_name[place] for place in order[:set_aside]], [by_name[place] for place in order[set_aside:]]
    drawn = [pool[place] for place in np.random.default_rng(seed).permutation(len(pool))[: size or None]]
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    formats.write({"train": train.select(drawn), "val": train.select(held)}, fresh, "coco")
    try:
        fresh.rename(folder)
    except OSError:  # another process of the series was quicker
        shutil.rmtree(fresh)
    return folder


def follow(
    part: Path, data: Path, out: Path, arm: str, size: int, seed: int, steps: int, changes: Mapping[str, Any]
) -> None:
    """Train once and write the curve and the test figures, unless they are there."""
    file = out / f"{arm}-{size or 'all'}-seed{seed}.json"
    asked = {"steps": steps, **{name: str(value) for name, value in changes.items() if name != "init"}}
    if file.exists():
        if (kept := json.loads(file.read_text())).get("asked", asked) != asked:
            raise SystemExit(f"{file} was run with other settings ({kept['asked']}); choose another --out")
        return
    shutil.rmtree(out / file.stem, ignore_errors=True)  # a run that was stopped begins anew, for the sake of its curve
    curve: list[dict[str, float]] = []

    def note(event: Event) -> None:
        if isinstance(event, Evaluated):
            curve.append({"step": event.step, "AP": event.figures["AP"], "AP50": event.figures["AP50"]})

    settings = {name: value for name, value in changes.items() if value != ""}
    if "init" in settings:
        settings.pop("backbone_weights", None)
    count = len(formats.read(part, "train")["train"])
    per_epoch = max(1, count // int(settings.get("batch_size", 4)))
    epochs = max(1, round(steps / per_epoch))
    fixed = {"model": "conditional-detr-nano", "samples": 0, "batch_size": 4, "seed": seed, "epochs": epochs}
    often = {"evaluate_every": max(1, epochs // 5), "save_every": epochs}
    clock = time.process_time()
    run = detrkit.train(part, out=out / file.stem, on_event=note, **{**fixed, **often, **settings})
    minutes = (time.process_time() - clock) / 60
    test = detrkit.evaluate(run.folder, data, split="val")
    kept = {name: test[name] for name in ("AP", "AP50", "AP75")}
    said = {
        "arm": arm,
        "size": size,
        "images": count,
        "seed": seed,
        "curve": curve,
        "test": kept,
        "minutes": minutes,
        "asked": asked,
    }
    file.write_text(json.dumps({**said, "machine": machine(("detrkit", "torch"))}, indent=1))
    print(f"{file.stem}: {kept}", flush=True)


def report(out: Path) -> dict[str, Any]:
    """For each size: the figures of both arms, and when the pre-trained one reached the other's final AP."""
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*-seed*.json"))]
    if not runs:
        raise SystemExit(f"No finished run in {out}")
    result: dict[str, Any] = {"sizes": {}, "machine": runs[0].get("machine")}
    for images in sorted({run["images"] for run in runs}):
        arms = {
            arm: sorted(
                (run for run in runs if (run["images"], run["arm"]) == (images, arm)), key=lambda run: run["seed"]
            )
            for arm in ARMS
        }
        result["sizes"][images] = {arm: figures(found) for arm, found in arms.items() if found}
        if all(arms.values()):
            goal = statistics.mean(run["curve"][-1]["AP"] for run in arms["scratch"])
            result["sizes"][images]["goal"] = goal
            result["sizes"][images]["reached"] = [
                next((point["step"] / run["curve"][-1]["step"] for point in run["curve"] if point["AP"] >= goal), None)
                for run in arms["pretrained"]
            ]
    return result


def figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test figures of one arm and size, and the curves on the images set aside."""
    test = {name: spread([run["test"][name] for run in runs]) for name in ("AP", "AP50", "AP75")}
    curves = [[(point["step"], point["AP"]) for point in run["curve"]] for run in runs]
    return {"seeds": [run["seed"] for run in runs], "test": test, "curves": curves}


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for images, arms in result["sizes"].items():
        line = {}
        for arm in ARMS:
            if arm in arms:
                line[f"{NAMES[arm]}: test AP"] = shown(arms[arm]["test"]["AP"])
                line[f"{NAMES[arm]}: test AP50"] = shown(arms[arm]["test"]["AP50"])
        if "reached" in arms:
            shares = ", ".join("never" if share is None else f"{share:.0%}" for share in arms["reached"])
            line["share of the steps to the other's AP"] = shares
        lines[f"{images} images"] = line
    return {**lines, "machine": result["machine"]}


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Test AP over the number of labelled images, a thin line a seed and the mean on top."""
    curves = {}
    for arm in ARMS:
        sizes = [images for images, arms in result["sizes"].items() if arm in arms]
        values = [result["sizes"][images][arm]["test"]["AP"]["values"] for images in sizes]
        if sizes:
            curves[NAMES[arm]] = (sizes, list(zip(*values, strict=False)))
    plot_curves(curves, file, x="labelled images", y="AP on the test split")


def short(folder: Path) -> dict[str, Any]:
    """Both arms for a few steps on drawn pictures, from nothing: that the script works, and no claim."""
    data, pretrained = folder / "data", folder / "pretrained"
    make_digits(data, train=16, val=6, test=0)
    tiny: dict[str, Any] = {"backbone_weights": "random", "architecture": {"backbone": "resnet-nano"}, "image_size": 64}
    detrkit.pretrain(
        data / "train", out=pretrained, model="conditional-detr-nano", **tiny, epochs=1, shown="crops",
        regions_weight=0.0, train_backbone=True, val_fraction=0.2, patches=4, patch_size=32, workers=0,
    )  # fmt: skip
    for arm in ARMS:
        init = str(pretrained) if arm == "pretrained" else ""
        part = divide(data, folder / "runs" / "data", 8, 0, 4)
        follow(part, data, folder / "runs", arm, 8, 0, 4, {**tiny, "init": init, "workers": 0})
    return table(report(folder / "runs"))


if __name__ == "__main__":
    main()
