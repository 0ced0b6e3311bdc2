"""Claim: Conditional DETR reaches DETR's final AP in a third of the epochs, at the size of a few hundred images.

    python benchmarks/convergence.py DATA --out FOLDER --backbone-weights FILE [--seeds 0 1 2] [--epochs 40] \\
        [--set vertical_flip=0.5 …]

Trains both presets with the same backbone weights, data, order of images, steps and optimiser, once for each seed, and
follows the AP on images set aside from the training split. The test split is evaluated once, at the end, with the
checkpoint that those images chose. Finished runs are kept in FOLDER and not repeated, so that a stopped series goes on,
and several processes can share one (`--seeds 0` here, `--seeds 1` there). `--report` only counts what is there.

The first preset is the one whose final AP, the mean of its seeds, the others have to reach. Minutes are of processor
time in training steps, evaluation apart, so that other work on the machine counts little.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _report import machine, parser, show

import detrkit
from detrkit.data.digits import make_digits
from detrkit.training.events import Evaluated, Event
from detrkit.training.recipe import AnyRecipe, Recipe, fields
from detrkit.visualize.plots import plot_curves

PRESETS = ("detr-nano", "conditional-detr-nano")
RECIPE = "detr-nano"  # of both: what differs is the model alone


def main() -> None:
    options = parser(__doc__)
    options.add_argument("data", nargs="?", type=Path, help="annotated folder; its split `val` is the test split")
    options.add_argument("--out", type=Path, help="folder of the runs and of their figures")
    options.add_argument("--presets", nargs="+", default=list(PRESETS), help="the first is the one to catch up with")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--epochs", type=int, default=40)
    options.add_argument("--every", type=int, default=2, help="epochs between evaluations")
    options.add_argument("--backbone-weights", default="", help="as in `detrkit train`")
    options.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further fields of the recipe")
    options.add_argument("--report", action="store_true", help="train nothing, count what is there")
    options.add_argument("--plot", type=Path, help="where the picture goes; by default curves.png in the folder")
    arguments = options.parse_args()
    if arguments.short:
        with tempfile.TemporaryDirectory() as folder:
            show(short(Path(folder)), arguments.json)
        return
    if arguments.out is None or (arguments.data is None and not arguments.report):
        options.error("DATA and --out are needed")
    changes = {"epochs": arguments.epochs, "backbone_weights": arguments.backbone_weights, **chosen(arguments.set)}
    if not arguments.report:
        for seed in arguments.seeds:
            for preset in arguments.presets:
                follow(arguments.data, arguments.out, preset, seed, arguments.every, changes)
    result = report(arguments.out, arguments.presets)
    plot(result, arguments.plot or arguments.out / "curves.png")
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    show({**table(result), "machine": result["machine"]} if not arguments.json else result, arguments.json)


def short(folder: Path) -> dict[str, Any]:
    """Both presets for two epochs on a few drawn pictures, from nothing: that the script works, and no claim."""
    data = folder / "data"
    make_digits(data, train=24, val=8, test=0)
    changes: dict[str, Any] = {
        "epochs": 2, "backbone_weights": "random", "architecture": {"backbone": "resnet-nano"}, "image_size": 64,
        "val_fraction": 0.25,
    }  # fmt: skip
    for preset in PRESETS:
        follow(data, folder / "runs", preset, 0, 1, changes)
    return table(report(folder / "runs", PRESETS))


def chosen(texts: Sequence[str], kind: type[AnyRecipe] = Recipe) -> dict[str, Any]:
    """FIELD=VALUE pairs as fields of a kind of recipe, of the right type."""
    kinds = {name: type(default) for name, (_, _, default) in fields(kind).items()}
    read: Mapping[type, Callable[[str], Any]] = {bool: lambda text: text.lower() == "true", int: int, float: float}
    pairs = [text.partition("=")[::2] for text in texts]
    return {name: read.get(kinds[name], str)(value) for name, value in pairs}


def follow(data: Path, out: Path, preset: str, seed: int, every: int, changes: Mapping[str, Any]) -> None:
    """Train once and write the curve, unless it is there."""
    file = out / f"{preset}-seed{seed}.json"
    if file.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = []
    clock, spent, started = time.process_time(), 0.0, time.perf_counter()

    def note(event: Event) -> None:
        nonlocal clock, spent
        now = time.process_time()
        if isinstance(event, Evaluated):
            figures = event.figures
            curve.append({"epoch": event.epoch, "cpu": spent, "AP": figures["AP"], "AP50": figures["AP50"]})
            print(f"{preset} seed {seed}: {curve[-1]}", flush=True)
        else:
            spent += now - clock
        clock = now

    fixed = {"evaluate_every": every, "save_every": every, "samples": 0, "val_fraction": 0.15}
    resume = (out / file.stem / "recipe.toml").exists()
    settings: dict[str, Any] = {**fixed, **changes, "model": preset, "seed": seed}
    run = detrkit.train(data, out=out / file.stem, recipe=RECIPE, resume=resume, on_event=note, **settings)
    wall = time.perf_counter() - started
    test = detrkit.evaluate(run.folder, data, split="val")
    kept = {name: test[name] for name in ("AP", "AP50", "AP75")}
    said = {"settings": {**settings, "backbone_weights": Path(settings["backbone_weights"]).name}}
    result = {"preset": preset, "seed": seed, "curve": curve, "wall": wall, "test": kept, **said}
    file.write_text(json.dumps({**result, "machine": machine(("detrkit", "torch"))}, indent=1))


def report(out: Path, presets: Sequence[str]) -> dict[str, Any]:
    """For each preset: the mean curve, and when each seed reached the first preset's final AP."""
    runs = {
        preset: [json.loads(file.read_text()) for file in sorted(out.glob(f"{preset}-seed*.json"))]
        for preset in presets
    }
    if empty := [preset for preset, found in runs.items() if not found]:
        raise SystemExit(f"No finished run of {', '.join(empty)} in {out}")
    goal = statistics.mean(run["curve"][-1]["AP"] for run in runs[presets[0]])
    result: dict[str, Any] = {"goal": goal, "presets": {}, "machine": runs[presets[0]][0]["machine"]}
    for preset, found in runs.items():
        reached = [next((point for point in run["curve"] if point["AP"] >= goal), None) for run in found]
        epochs = [point["epoch"] for point in found[0]["curve"]]
        result["presets"][preset] = {
            "seeds": [run["seed"] for run in found],
            "final": spread([run["curve"][-1]["AP"] for run in found]),
            "final50": spread([run["curve"][-1]["AP50"] for run in found]),
            "test": {name: spread([run["test"][name] for run in found]) for name in ("AP", "AP50", "AP75")},
            "epochs_to_goal": [point["epoch"] if point else None for point in reached],
            "minutes_to_goal": [point["cpu"] / 60 if point else None for point in reached],
            "minutes": spread([run["curve"][-1]["cpu"] / 60 for run in found]),
            "epochs": epochs,
            "curves": [[point["AP"] for point in run["curve"]] for run in found],
        }
    return result


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The values, their mean and their standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.mean(values), "sd": deviation}


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {"AP to reach": f"{result['goal']:.3f}"}
    for preset, part in result["presets"].items():
        lines[preset] = {
            "seeds": ", ".join(map(str, part["seeds"])),
            "final AP, set aside": shown(part["final"]),
            "final AP50, set aside": shown(part["final50"]),
            "test AP": shown(part["test"]["AP"]),
            "test AP50": shown(part["test"]["AP50"]),
            "epochs to it, by seed": ", ".join(
                "never" if each is None else f"{each:g}" for each in part["epochs_to_goal"]
            ),
            "CPU minutes to it": ", ".join("–" if each is None else f"{each:.1f}" for each in part["minutes_to_goal"]),
            "CPU minutes in all": shown(part["minutes"], 1),
        }
    return lines


def shown(values: Mapping[str, Any], digits_after: int = 3) -> str:
    text = f"{values['mean']:.{digits_after}f}"
    return text if values["sd"] is None else f"{text} ± {values['sd']:.{digits_after}f}"


def plot(result: Mapping[str, Any], file: Path) -> None:
    """AP over epochs, a thin line a seed and the mean on top."""
    curves = {preset: (part["epochs"], part["curves"]) for preset, part in result["presets"].items()}
    plot_curves(curves, file, x="epoch", y="AP on images set aside", level=result["goal"])


if __name__ == "__main__":
    main()
