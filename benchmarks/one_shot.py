"""Claims: finding by example gets better by episodes and by pre-training, labels data, and asks much for little.

    detrkit pretrain DATA/train --out PRETRAINED --backbone-weights FILE …
    python benchmarks/one_shot.py classes DATA --unseen 8,9 --pretrained PRETRAINED --backbone-weights FILE --out FOLDER
    python benchmarks/one_shot.py annotate DATA --finder PRETRAINED --backbone-weights FILE --out FOLDER
    python benchmarks/one_shot.py prompts [RUN] [--preset detr-r50]

`classes` trains a one-shot detector with and without the pre-training, with the same recipe, steps, images and backbone
weights, three seeds each, and asks about the split `test` by the protocol of CoAE (every image and class present, five
draws of exemplars, AP50 of classes seen and unseen in training). Beside it stands what takes no training: windows of
the exemplar's size at several scales, compared by the cosine of backbone features. `annotate` draws ten examples from
the training split of DATA (a seed chooses which), lets everything like them be found, and trains one detector on what
was found and one on the human labels, alike. `prompts` times one thing and ten things in one image, in turns.

Finished runs are kept in FOLDER and not repeated; processes can share it. `--report` only counts what is there.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import machine, parser, show
from convergence import chosen, shown, spread

import detrkit
from detrkit.boxes import xyxy_to_cxcywh
from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.drafts import drafted
from detrkit.data.loading import load_images
from detrkit.find import Search, Thing, find
from detrkit.nn.weights import load_backbone_weights
from detrkit.one_shot.finder import Finder, seek
from detrkit.one_shot.model import OneShot
from detrkit.one_shot.protocol import evaluate_one_shot
from detrkit.training.episode_recipe import EpisodeRecipe

ARMS = ("pretrained", "scratch")
NAMES = {
    "pretrained": "episodes after pre-training",
    "scratch": "episodes alone",
    "windows": "windows, no training",
    "whitened": "windows, features whitened over the test images",
}
WINDOWS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Scales of windows where things come in all sizes."""

KEPT = ("AP50_seen", "AP50_unseen", "ratio", "ece", "ece_before")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("claim", nargs="?", choices=("classes", "annotate", "prompts"), default="prompts")
    options.add_argument("data", nargs="?", type=Path)
    options.add_argument("--out", type=Path, help="folder of the runs and of their figures")
    options.add_argument("--pretrained", help="run of detrkit pretrain")
    options.add_argument("--finder", help="model that finds the examples' like")
    options.add_argument("--backbone-weights", default="")
    options.add_argument("--unseen", default="", help="classes that training does not see, separated by commas")
    options.add_argument("--arms", nargs="+", default=None)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--examples", nargs="+", type=int, default=[5, 3, 2], help="how many of each class are drawn")
    options.add_argument("--preset", default="conditional-detr-nano")
    options.add_argument("--accept", type=float, default=0.5)
    options.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further fields of the recipe")
    options.add_argument("--report", action="store_true", help="run nothing, count what is there")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    if arguments.claim == "prompts" or arguments.short:
        show(prompts(arguments.preset, 3 if arguments.short else 15), arguments.json)
        return
    if arguments.data is None or arguments.out is None:
        options.error("DATA and --out are needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report and arguments.claim == "classes":
        classes(arguments, chosen(arguments.set, EpisodeRecipe))
    elif not arguments.report:
        annotate(arguments, chosen(arguments.set))
    show(report(arguments.out), arguments.json)


def classes(arguments: Any, changes: Mapping[str, Any]) -> None:
    """Train and evaluate what is asked for and not there yet."""
    for seed in arguments.seeds:
        for arm in arguments.arms or (*ARMS, "windows", "whitened"):
            file = arguments.out / f"{arm}-seed{seed}.json"
            if file.exists():
                continue
            clock = time.process_time()
            if arm in ARMS:
                figures = episodes(arguments, arm, seed, changes)
            else:
                figures = windows(arguments, seed, changes, whitened=arm == "whitened")
            keep(file, {"arm": NAMES[arm], "seed": seed, "minutes": (time.process_time() - clock) / 60}, figures)


def episodes(arguments: Any, arm: str, seed: int, changes: Mapping[str, Any]) -> dict[str, float]:
    """A one-shot detector, with and without what was learnt from images alone."""
    start = {"backbone_weights": arguments.backbone_weights, "model": arguments.preset}
    if arm == "pretrained":
        start = {"init": arguments.pretrained}
    folder = arguments.out / f"{arm}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    run = detrkit.train(
        arguments.data, task="one-shot", out=folder, seed=seed, unseen=arguments.unseen, samples=2, **start, **changes
    )
    return detrkit.evaluate(run.folder, arguments.data, split="test")


def windows(arguments: Any, seed: int, changes: Mapping[str, Any], *, whitened: bool) -> dict[str, float]:
    """Cosine similarity of backbone features at windows of many sizes, overlaps suppressed."""
    size = int(changes.get("image_size", 0))
    model = untrained(arguments.preset, arguments.backbone_weights)
    config: Any = model.detector.config
    sizes = (size or config.image_size, round(config.longest * (size or config.image_size) / config.image_size))
    (annotations,) = formats.read(arguments.data, "test").values()
    hidden = [name.strip() for name in arguments.unseen.split(",")]
    seen = [label for label, category in enumerate(annotations.categories) if category.name not in hidden]
    finder = Finder(model, "windows", scales=WINDOWS, overlap=0.3)
    if whitened:
        paths = [annotations.path(index) for index in range(min(len(annotations), 32))]
        finder = finder.adapted(image.tensor for image in load_images(paths, shortest=sizes[0], longest=sizes[1]))
    return evaluate_one_shot(finder, annotations, sizes=sizes, seen=seen, seed=seed).metrics.figures


def untrained(preset: str, weights: str) -> OneShot:
    """A detector of which only the backbone knows anything."""
    model = detrkit.models.build(preset, num_classes=1)
    config, backbone = model.config, model.backbone
    if weights:
        load_backbone_weights(backbone, config.backbone, weights)
    return OneShot(model, prompted=False, width=0).eval()


def annotate(arguments: Any, changes: Mapping[str, Any]) -> None:
    """Ten examples, what is found of them, and a detector on each kind of labels."""
    train = formats.read(arguments.data, "train")["train"]
    for seed in arguments.seeds:
        for arm in arguments.arms or ("found", "human"):
            file = arguments.out / f"{arm}-seed{seed}.json"
            if file.exists():
                continue
            data, said = arguments.data, {"arm": arm, "seed": seed}
            if arm == "found":
                data, quality = arguments.out / f"data-seed{seed}", {}
                quality = drafts(arguments, train, seed, data)
                said |= quality
            clock = time.process_time()
            run = detrkit.train(
                data,
                out=fresh(arguments.out / f"{arm}-seed{seed}"),
                seed=seed,
                model=arguments.preset,
                backbone_weights=arguments.backbone_weights,
                val_fraction=0.1,
                samples=0,
                **changes,
            )
            said["minutes"] = (time.process_time() - clock) / 60
            test = detrkit.evaluate(run.folder, arguments.data, split="val")
            keep(file, said, {name: test[name] for name in ("AP", "AP50")})


def drafts(arguments: Any, train: Annotations, seed: int, out: Path) -> dict[str, Any]:
    """Write what is found as annotations; says how right they are, by the labels that were not used."""
    things = draw(train, arguments.examples, seed)
    detector = detrkit.load(arguments.finder)
    started = time.perf_counter()
    paths = [train.path(index) for index in range(len(train))]
    found = list(find(detector, things, paths, Search(threshold=arguments.accept)))
    seconds = time.perf_counter() - started
    named = [(train.file_names[index], one) for index, one in enumerate(found)]
    shutil.rmtree(out, ignore_errors=True)
    formats.write({"train": drafted(train.root, named, accept=arguments.accept)}, out, "coco")
    metrics = detrkit.evaluation.run.evaluate(train, [one_table(one, train) for one in found])
    right = {
        one.name: {"precision": one.precision, "recall": one.recall, "AP50": one.ap50} for one in metrics.per_class
    }
    return {"boxes": sum(map(len, found)), "seconds": seconds, "train": right, "examples": arguments.examples}


def draw(train: Annotations, counts: list[int], seed: int) -> list[Thing]:
    """So many boxes of each class, each from another image, none at the border."""
    rng, wanted = np.random.default_rng(seed), dict(enumerate(counts))
    drawn: dict[int, list[Any]] = {label: [] for label in wanted}
    for index in rng.permutation(len(train)).tolist():
        rows = train.rows(index)
        boxes, labels = train.boxes[rows], train.labels[rows]
        height, width = train.image_sizes[index]
        inside = (boxes[:, :2] > 8).all(1) & (boxes[:, 2:] < (width - 8, height - 8)).all(1)
        for label, count in wanted.items():
            fitting = np.flatnonzero(inside & (labels == label))
            if len(fitting) and len(drawn[label]) < count:
                drawn[label].append((train.path(index), boxes[rng.choice(fitting)].tolist()))
    return [Thing(train.categories[label].name, tuple(examples)) for label, examples in drawn.items()]


def prompts(preset: str, rounds: int) -> dict[str, Any]:
    """Seconds of one thing and of ten in one image, in turns; the image is encoded once for all."""
    torch.manual_seed(0)
    model = OneShot(detrkit.models.build(preset, num_classes=1)).eval()
    config: Any = model.detector.config
    image = torch.rand(3, config.image_size, round(config.image_size * 4 / 3))
    finder = Finder(model)
    boxes = xyxy_to_cxcywh(torch.tensor([[0.1 * k, 0.2, 0.1 * k + 0.1, 0.4] for k in range(10)]))
    things = [seek(finder.show(image, boxes[k : k + 1])) for k in range(10)]
    times: dict[int, list[float]] = {1: [], 10: []}
    for _ in range(rounds + 1):
        for count in times:
            started = time.process_time()
            finder.search(image, things[:count])
            times[count].append(time.process_time() - started)
    ratios = [ten / one for one, ten in zip(times[1][1:], times[10][1:], strict=True)]
    return {
        "preset": preset,
        "image": tuple(image.shape[1:]),
        "one thing, CPU seconds": round(statistics.median(times[1][1:]), 4),
        "ten things, CPU seconds": round(statistics.median(times[10][1:]), 4),
        "ratio (median of paired rounds)": round(statistics.median(ratios), 2),
        "rounds": rounds,
        "machine": machine(("detrkit", "torch")),
    }


def report(out: Path) -> dict[str, Any]:
    """Mean and spread over the seeds of each arm."""
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*-seed*.json"))]
    result: dict[str, Any] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        names = [name for name in mine[0]["figures"] if name in (*KEPT, "AP", "AP50")]
        line = {name: shown(spread([run["figures"][name] for run in mine])) for name in names}
        result[arm] = {**line, "seeds": [run["seed"] for run in mine]}
    return {**result, "machine": runs[0]["machine"] if runs else None}


def keep(file: Path, said: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Write the outcome of a run."""
    file.write_text(json.dumps({**said, "figures": dict(figures), "machine": machine(("detrkit", "torch"))}, indent=1))
    print(f"{file.stem}: {dict(figures)}", flush=True)


def fresh(folder: Path) -> Path:
    """The folder, empty: a run that was stopped begins anew."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def one_table(found: Any, train: Annotations) -> Any:
    """Detections with the categories of the data."""
    from dataclasses import replace

    return replace(found, categories=train.categories)


if __name__ == "__main__":
    main()
