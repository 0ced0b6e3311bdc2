"""Claim: the guard names what is wrong with trainings that are broken on purpose, and says nothing of healthy ones.

    python benchmarks/alarms.py DATA [MORE_DATA ...] --backbone-weights FILE [--only NAME ...]

Each case trains on one thread and evaluates once, at the end. The breaks are made where a user's mistake would arrive:
in the annotations that are opened, in the rates, in the weights, in the images. MORE_DATA are trained on as they are. A
healthy case holds where no alarm is raised, a broken one where the alarm that is due is among those that are. Without
DATA two small cases on drawn images run.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _report import machine, parser, show
from safety_overhead import write_data

import detrkit
import detrkit.training.setup as setup
from detrkit.boxes import cxcywh_to_xyxy
from detrkit.training.detection import DetectionSession
from detrkit.training.events import Evaluated, Event, Warned


class Case(NamedTuple):
    """A training, how it is broken, and the alarms that are due."""

    fields: Mapping[str, Any]
    broken: str = ""
    due: frozenset[str] = frozenset()


TEN = {"model": "conditional-detr-nano", "epochs": 10}
PAPER = {"query_start": "normal", "query_groups": "1", "position_in_content": "false", "dropout": "0.1"}
CASES = {
    "Conditional DETR": Case(TEN),
    "DETR": Case({**TEN, "model": "detr-nano"}),
    "as in DETR's paper": Case(
        {"model": "detr-nano", "epochs": 12, "architecture": PAPER, "batch_size": 2, "lr": 1e-4, "backbone_lr": 1e-5}
        | {"warmup": 0},
        "",
        frozenset({"slow"}),  # nothing is wrong, and nothing is learnt in this time: the two are told apart
    ),
    "crops, scales, batch 2": Case({**TEN, "crop": 0.5, "multi_scale": True, "batch_size": 2}),
    "backbone fixed": Case({**TEN, "backbone_lr": 0.0}),
    "labels shuffled": Case(TEN, "labels", frozenset({"classes"})),
    "rates x 100": Case({**TEN, "lr": 0.05, "backbone_lr": 0.01}, "", frozenset({"learning rate"})),
    "boxes as corners": Case({**TEN, "epochs": 1}, "corners", frozenset({"boxes"})),
    "class head frozen": Case(TEN, "head", frozenset({"classes"})),
    "images black": Case(TEN, "black", frozenset({"constant answers"})),
    # A box takes no label along, so this breaks the bond of labels and boxes as well.
    "boxes of other images": Case({**TEN, "epochs": 20}, "boxes", frozenset({"classes"})),
}
SMALL = {**TEN, "epochs": 13, "image_size": 64, "longest": 64}
SHORT = {
    "Conditional DETR": Case(SMALL),
    "boxes as corners": Case(SMALL, "corners", frozenset({"boxes"})),
}


def with_corners(batch: Any) -> Any:
    """The corners of boxes where centres and sizes are meant."""
    targets = tuple(target._replace(boxes=cxcywh_to_xyxy(target.boxes)) for target in batch.targets)
    return batch._replace(targets=targets)


def black(batch: Any) -> Any:
    return batch._replace(packed=batch.packed._replace(pixels=torch.zeros_like(batch.images)))


def shuffled(name: str) -> Callable[[Any], Any]:
    """Annotations with one column in random order."""

    def change(annotations: Any) -> Any:
        column = np.asarray(getattr(annotations, name))
        return dataclasses.replace(annotations, **{name: column[np.random.default_rng(0).permutation(len(column))]})

    return change


@contextmanager
def broken(how: str) -> Iterator[None]:
    """Break trainings in one way, until the block ends."""
    losses, opened = DetectionSession.losses, setup.open_splits

    def other_losses(self: DetectionSession, model: Any, batch: Any, counts: Any) -> Any:
        if how == "head":
            for parameter in self.model.class_head.requires_grad_(False).parameters():  # type: ignore[union-attr]
                parameter.zero_()
        change = {"corners": with_corners, "black": black}.get(how, lambda same: same)
        return losses(self, model, change(batch), counts)

    def other_splits(*arguments: Any, **named: Any) -> Any:
        train, *others = opened(*arguments, **named)
        return shuffled(how)(train), *others

    try:
        if how in ("head", "corners", "black"):
            DetectionSession.losses = other_losses  # type: ignore[method-assign]
        if how in ("labels", "boxes"):
            setup.open_splits = other_splits
        yield
    finally:
        DetectionSession.losses, setup.open_splits = losses, opened  # type: ignore[method-assign]


def run(case: Case, data: Path, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Train; what was said, and what came of it."""
    said, figures = list[Warned](), dict[str, Any]()

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            said.append(event)
        if isinstance(event, Evaluated):
            figures.update(event.figures)

    fields = {**usual, "evaluate_every": case.fields["epochs"], "save_every": case.fields["epochs"], **case.fields}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, broken(case.broken):
        detrkit.train(data, out=Path(folder) / "run", on_event=listen, **fields)
    return {
        "alarms": [{"step": one.step, "alarm": one.alarm, "cleared": one.cleared, "said": one.message} for one in said],
        "holds": case.due <= {one.alarm for one in said} if case.due else not said,
        "AP50": figures.get("AP50"),
        "seconds": time.perf_counter() - began,
    }


def line(result: Mapping[str, Any]) -> str:
    alarms = [
        f"{one['alarm']} {'over' if one['cleared'] else 'raised'} at step {one['step']}" for one in result["alarms"]
    ]
    verdict = "as expected" if result["holds"] else "NOT AS EXPECTED"
    return f"{'; '.join(alarms) or 'no alarm'} ({verdict}; AP50 {result['AP50']:.3f}, {result['seconds']:.0f} s)"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("data", nargs="*", type=Path)
    options.add_argument("--backbone-weights", default="random")
    options.add_argument("--image-size", type=int, default=128)
    options.add_argument("--only", nargs="+", metavar="NAME", help="these cases alone")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    usual = {"workers": 0, "threads": 1, "device": "cpu", "samples": 0, "backbone_weights": arguments.backbone_weights}
    usual |= {"image_size": arguments.image_size}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data and not arguments.short:
            first, *others = arguments.data
            plan = {name: (case, first) for name, case in CASES.items()}
            plan |= {f"Conditional DETR on {data.name}": (Case({**TEN, "epochs": 20}), data) for data in others}
        else:
            drawn = write_data(Path(folder) / "data")
            plan = {name: (case, drawn) for name, case in SHORT.items()}
        for name, (case, data) in plan.items():
            if not arguments.only or name in arguments.only:
                split = {} if (data / "val").exists() else {"val_fraction": 0.15}
                found[name] = run(case, data, {**usual, **split})
                print(f"{name}: {line(found[name])}", flush=True) if not arguments.json else None
    held = sum(one["holds"] for one in found.values())
    result = {"as expected": f"{held} of {len(found)}", "machine": machine(("detrkit", "torch"))}
    show(result | {"cases": found} if arguments.json else result, arguments.json)


if __name__ == "__main__":
    main()
