"""A watch over a training: what goes wrong is said while it can be helped, in a sentence and with its remedy.

It consumes what a step tells anyway and changes nothing. Its figures are made on the device and come over with the
others, so that nobody waits for the device once more; the rest is counting. `alarms` judges the figures of some steps.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from detrkit.losses.criterion import Evidence
from detrkit.training.alarms import BLOCK, JUMP, PATIENCE, Block, judge
from detrkit.training.events import Step, Warned

REMEMBERED_IMAGES, REMEMBERED_BOXES = 64, 16
"""Images, and boxes of each, of which it is remembered which query answered: enough to estimate a share."""

SAME_PLACE = 0.8
"""IoU from which an object counts as being where it was: augmentation may show it elsewhere."""

TOLERANCE = 1e-3
"""How far a box may reach out of its image, in image sizes, for rounding."""

_SHOWN = 8  # images that a message names


class Watched(NamedTuple):
    """What a batch tells, on its way from the device.

    `pairs` are the matched pairs of the last layer: image, query, label, whether that is the query's best class, and
    the object's cx, cy, w, h. `figures` are the spreads of boxes and logits over images, and how boxes follow objects:
    a sum of products and two of squares.
    """

    names: tuple[str, ...]
    queries: int
    pairs: Float[Tensor, "p 8"]
    figures: Float[Tensor, " 5"]


class Guard:
    """Watches the steps of a training, some at a time.

    Args:
        optimizer: its first group is the one whose rate is judged.
        total_steps: of the whole training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int):
        self._optimizer, self._total = optimizer, total_steps
        self._watched: list[Watched] = []
        self._size: Tensor | None = None
        self._tally = Tally()
        self._memory: dict[str, list[list[float]]] = {}
        self._blocks: list[Block] = []
        self._first = self._lowest = math.nan
        self._raised: dict[str, str] = {}

    def watch(self, evidence: Evidence | None) -> None:
        """Take what the losses of a batch were made from; nothing here waits for the device."""
        if not self._tally.losses and self._size is None:
            self._size = _size(self._optimizer).to("cpu", non_blocking=True)
        if evidence is not None:
            self._watched.append(watched(evidence))

    def forget(self) -> None:
        """The step was skipped."""
        self._watched.clear()

    def look(self, event: Step) -> list[Warned]:
        """What is to be said after a step; the device has finished it."""
        batches, self._watched = self._watched, []
        tally = self._tally
        tally.losses.append(event.loss)
        for batch in batches:
            tally.add(batch)
            self._compare(batch)
        said = self._jump(event, batches)
        if len(tally.losses) >= BLOCK:
            said += self._end_block(event)
        return said

    def state(self) -> str:
        """All that it remembers, as text."""
        content = {
            "tally": self._tally.state(),
            "size": None if self._size is None else float(self._size),
            "memory": self._memory,
            "blocks": [list(block) for block in self._blocks],
            "levels": [self._first, self._lowest],
            "raised": self._raised,
        }
        return json.dumps(content, separators=(",", ":"))

    def restore(self, told: str) -> None:
        """Go on from what `state` gave.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        content = json.loads(told)
        self._watched.clear()
        self._tally = Tally.of(content["tally"])
        self._size = None if content["size"] is None else torch.tensor(float(content["size"]))
        self._memory = dict(content["memory"])
        self._blocks = [Block(*values) for values in content["blocks"]]
        self._first, self._lowest = map(float, content["levels"])
        self._raised = dict(content["raised"])

    def _end_block(self, event: Step) -> list[Warned]:
        rate = math.nan if self._size is None else event.lr / max(float(self._size), 1e-12)
        block = self._tally.block(event, rate)
        self._tally, self._size = Tally(), None
        self._blocks = [*self._blocks, block][-2 * PATIENCE :]
        self._first = block.loss if math.isnan(self._first) else self._first
        self._lowest = min(block.loss, self._lowest) if self._lowest == self._lowest else block.loss
        found = judge(self._blocks, self._first, self._lowest, self._total)
        over = [name for name in self._raised if name not in found]
        new = {name: alarm for name, alarm in found.items() if name not in self._raised}
        for name in over:
            del self._raised[name]
        self._raised |= {name: alarm.message for name, alarm in new.items()}
        return [
            *(Warned(event.step, name, f"No longer so: {name}", cleared=True) for name in over),
            *(Warned(event.step, name, alarm.message, alarm.remedy) for name, alarm in new.items()),
        ]

    def _jump(self, event: Step, batches: Sequence[Watched]) -> list[Warned]:
        """A single loss far above those before; over with the next block that is as it was."""
        name = "loss jumped"
        if not self._blocks or name in self._raised or event.loss <= JUMP * abs(self._blocks[-1].loss):
            return []
        self._raised[name] = message = _jumped(event, batches, self._blocks[-1].loss)
        return [
            Warned(event.step, name, message, "Look at these images. Where it happens often, lower the learning rate.")
        ]

    def _compare(self, batch: Watched) -> None:
        """Which objects are answered for by another query than when their image was seen before."""
        pairs = batch.pairs.numpy()
        for index, name in enumerate(batch.names):
            before = self._memory.get(name)
            if before is None and len(self._memory) >= REMEMBERED_IMAGES:
                continue
            here = pairs[pairs[:, 0] == index][:REMEMBERED_BOXES]
            if before and len(here):
                known = np.array(before)
                overlap = _ious(here[:, 4:], known[:, 1:])
                nearest = overlap.argmax(1)
                same = overlap.max(1) > SAME_PLACE
                self._tally.compared += int(same.sum())
                self._tally.changed += int((same & (known[nearest, 0] != here[:, 1])).sum())
            self._memory[name] = [[int(row[1]), *(round(float(value), 4) for value in row[4:])] for row in here]


@dataclass
class Tally:
    """What the steps of a block come to, as far as they are done."""

    losses: list[float] = field(default_factory=list)
    spreads: list[list[float]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    answering: set[int] = field(default_factory=set)
    moments: list[float] = field(default_factory=lambda: [0.0] * 5)
    follows: list[float] = field(default_factory=lambda: [0.0] * 3)
    wrong: int = 0
    outside: int = 0
    cut: int = 0
    begun: int = 0
    compared: int = 0
    changed: int = 0
    queries: int = 0

    def add(self, batch: Watched) -> None:
        """Count a batch."""
        pairs, figures = batch.pairs.numpy().astype(np.float64), batch.figures.tolist()
        self.queries = max(self.queries, batch.queries)
        self.labels.update(pairs[:, 2].astype(int).tolist())
        self.answering.update(pairs[:, 1].astype(int).tolist())
        self.wrong += int((pairs[:, 3] == 0).sum())
        centres, sizes = pairs[:, 4:6], pairs[:, 6:8]
        first, last = centres - sizes / 2, centres + sizes / 2
        odd = (sizes <= 0).any(1) | (first < -TOLERANCE).any(1) | (last > 1 + TOLERANCE).any(1)
        self.outside += int(odd.sum())
        self.cut += int((last > 1 - TOLERANCE).any(1).sum())
        self.begun += int((first < TOLERANCE).any(1).sum())
        sums = (len(pairs), *centres.sum(0), *np.square(centres).sum(0))
        self.moments = [before + float(now) for before, now in zip(self.moments, sums, strict=True)]
        if not math.isnan(figures[0]):
            self.spreads.append(figures[:2])
            self.follows = [before + now for before, now in zip(self.follows, figures[2:], strict=True)]

    def block(self, event: Step, relative_rate: float) -> Block:
        """The figures, after the last of the steps."""
        count, *sums = self.moments
        pairs = sum(self.labels.values())
        variance = (
            [square / count - (mean / count) ** 2 for mean, square in zip(sums[:2], sums[2:], strict=True)]
            if count
            else []
        )
        spreads = np.mean(self.spreads, 0).tolist() if self.spreads else [math.nan] * 2
        return Block(
            step=event.step,
            loss=statistics.median(self.losses),
            lr=event.lr,
            relative_rate=relative_rate,
            pairs=pairs,
            error=self.wrong / pairs if pairs else math.nan,
            chance=1 - max(self.labels.values()) / pairs if pairs else math.nan,
            box_spread=spreads[0],
            logit_spread=spreads[1],
            target_spread=math.sqrt(max(sum(variance), 0.0) / 2) if variance else math.nan,
            following=self.follows[0] / root if (root := math.sqrt(self.follows[1] * self.follows[2])) else math.nan,
            outside=self.outside / pairs if pairs else math.nan,
            cut=self.cut / pairs if pairs else math.nan,
            begun=self.begun / pairs if pairs else math.nan,
            compared=self.compared,
            changed=self.changed / self.compared if self.compared else math.nan,
            queries=self.queries,
            answering=len(self.answering),
        )

    def state(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**vars(self), "labels": sorted(self.labels.items()), "answering": sorted(self.answering)}

    @staticmethod
    def of(told: dict[str, Any]) -> Tally:
        """What `state` gave."""
        return Tally(
            **{**told, "labels": Counter(dict(map(tuple, told["labels"]))), "answering": set(told["answering"])}
        )


def watched(evidence: Evidence) -> Watched:
    """The figures of a batch, on their way from the device. Spreads of a batch of one image are NaN."""
    image, query, target = evidence.matches.image, evidence.matches.query[-1], evidence.matches.target[-1]
    boxes, objects = evidence.boxes, evidence.targets.boxes[image, target].float()
    labels = evidence.targets.labels[image, target]
    right = evidence.logits[image, query].argmax(-1) == labels
    numbers = torch.stack([image, query, labels, right], 1).float()
    if len(boxes) > 1:
        # The query that usually answers nearby, not the matched one: matching would choose what moved there by chance.
        usual = boxes.mean(0)
        nearest = torch.cdist(objects, usual, p=1).argmin(1)
        moved, due = boxes[image, nearest] - usual[nearest], objects - usual[nearest]
        products = ((moved * due).sum(), moved.square().sum(), due.square().sum())
        figures = torch.stack([boxes.std(0).mean(), evidence.logits.std(0).mean(), *products])
    else:
        figures = boxes.new_full((5,), math.nan)
    pairs = torch.cat([numbers, objects], 1)
    return Watched(
        evidence.targets.names,
        boxes.shape[1],
        pairs.to("cpu", non_blocking=True),
        figures.to("cpu", non_blocking=True),
    )


def _size(optimizer: torch.optim.Optimizer) -> Float[Tensor, ""]:
    """The root mean square of the weights that the first group moves, without what starts as zeros or ones."""
    weights = [one.detach() for one in optimizer.param_groups[0]["params"] if one.ndim > 1]
    if not weights:
        return torch.tensor(math.nan)
    norms = torch.stack(torch._foreach_norm(weights))
    return norms.square().sum().div(sum(one.numel() for one in weights)).sqrt()


def _jumped(event: Step, batches: Sequence[Watched], before: float) -> str:
    """The sentence, with the images, and boxes that cannot be right."""
    names = [name for batch in batches for name in batch.names]
    where = f" on {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}" if names else ""
    odd = []
    for batch in batches:
        for image, _, _, _, cx, cy, w, h in batch.pairs.tolist():
            reach = max(cx + w / 2 - 1, cy + h / 2 - 1, w / 2 - cx, h / 2 - cy)
            if min(w, h) <= 0 or reach > TOLERANCE:
                odd.append(f"{batch.names[int(image)]} (cx, cy, w, h = {cx:.4g}, {cy:.4g}, {w:.4g}, {h:.4g})")
    boxes = f"; boxes that cannot be right: {', '.join(odd[:_SHOWN])}" if odd else ""
    return f"The loss jumped from {before:.3g} to {event.loss:.3g} in a step{where}{boxes}"


def _ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of cxcywh boxes, (n, 4) with (m, 4)."""
    low = np.maximum((boxes[:, :2] - boxes[:, 2:] / 2)[:, None], (others[:, :2] - others[:, 2:] / 2)[None])
    high = np.minimum((boxes[:, :2] + boxes[:, 2:] / 2)[:, None], (others[:, :2] + others[:, 2:] / 2)[None])
    shared = np.clip(high - low, 0, None).prod(2)
    return shared / np.maximum(boxes[:, 2:].prod(1)[:, None] + others[:, 2:].prod(1)[None] - shared, 1e-12)
