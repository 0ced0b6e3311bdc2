"""What can be seen to be wrong with a training, judged by figures of its last steps: pure functions, without a model.

Thresholds were chosen by healthy runs and by runs that were broken on purpose (docs/lab-notes.md). Each alarm asks for
more than a bad figure: what a slow training shows for a while and then leaves behind is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 50
"""Steps that are judged together."""

PATIENCE = 4
"""Blocks after which a figure that does not move says something, or as many as make up a tenth of the training."""

OUTSIDE = 0.02
"""The most boxes that may reach out of their image; augmentation clips them, so there should be none."""

CUT = 0.25
"""The most boxes that may end at the right or lower border if hardly any begin at the left or upper one."""

CHANCE = 0.85
"""Part of the error of always naming the most frequent class below which classes are being learnt. Matching prefers
queries that name the right class, so that even labels drawn at random give less than that error."""

LEAST_CHANCE = 0.05
"""An error of always naming the most frequent class below this says nothing."""

ALIKE_BOXES = 2e-4
"""Spread of a query's boxes over images below which its answer does not depend on the image; in image sizes."""

ALIKE_LOGITS = 0.01
"""The same for its logits."""

RISE = 1.3
"""How far above the lowest loss so far the loss may be, two blocks long."""

HIGH_RATE = 0.03
"""Learning rate over the size of the weights from which it is suspected: in a step AdamW moves a weight by about the
rate at most. Where trainings go well it is 0.001 to 0.01."""

LITTLE = 0.75
"""Part of its first value above which the loss has hardly fallen."""

GOOD_RATE = 0.005
"""The same for a rate to propose."""

JUMP = 5.0
"""How far above the median of the block before a single loss is told."""

UNSTABLE = 0.95
"""Share of objects that another query answers for each time, two blocks long, above which nothing is settled."""

LEAST_COMPARED = 100
"""Objects of a block that were seen before, without which that share says nothing."""

ANSWERING = 0.1
"""Least share of the queries that should answer for some object."""


FOLLOWING = 0.08
"""A `following` from which boxes are being learnt; chance alone gives half of it at most."""

SLOW_STEPS = 1000
"""Steps after which it is told if boxes do not follow the images."""


class Block(NamedTuple):
    """Figures of some steps. What is not known is NaN, and counts are 0 then.

    Attributes:
        step: the last of them.
        loss: median.
        lr: learning rate of the last one.
        relative_rate: learning rate over the root mean square of the weights.
        pairs: matched pairs of a query and an object.
        error: share of them in which another class than the object's is the best, no-object left aside: a query that is
            not sure yet that there is something may know already what it would be.
        chance: what that would be if the block's most frequent class were always named.
        box_spread: standard deviation of a query's boxes over the images of a batch, in image sizes.
        logit_spread: the same of its logits.
        target_spread: standard deviation of the objects' centres, in image sizes.
        following: correlation of how a query's box differs from image to image with where the objects are: around 0
            where boxes do not depend on the image, whatever dropout does to them.
        outside: share of the objects whose boxes reach out of the image.
        cut: share that ends at the right or the lower border.
        begun: share that begins at the left or the upper border.
        compared: objects whose image was seen before with the object in the same place.
        changed: share of these for which another query answered then.
        queries: how many there are.
        answering: how many of them answered for an object.
    """

    step: int
    loss: float
    lr: float = math.nan
    relative_rate: float = math.nan
    pairs: int = 0
    error: float = math.nan
    chance: float = math.nan
    box_spread: float = math.nan
    logit_spread: float = math.nan
    target_spread: float = math.nan
    following: float = math.nan
    outside: float = math.nan
    cut: float = math.nan
    begun: float = math.nan
    compared: int = 0
    changed: float = math.nan
    queries: int = 0
    answering: int = 0


class Alarm(NamedTuple):
    """What is wrong, and what to do, each in plain words."""

    message: str
    remedy: str


def judge(blocks: Sequence[Block], first: float, lowest: float, total_steps: int) -> dict[str, Alarm]:
    """What is wrong at present, by name; empty where nothing is.

    Args:
        blocks: the last ones, in order; at least one.
        first: loss of the run's first block.
        lowest: lowest loss of any block.
        total_steps: of the whole training.
    """
    now, found = blocks[-1], dict[str, Alarm]()
    if alarm := _boxes(now):
        found["boxes"] = alarm
    if len(blocks) < PATIENCE or now.step < total_steps / 10:
        return found
    if alarm := _rate(blocks, first, lowest):
        found["learning rate"] = alarm
        return found  # whatever else is wrong may come of it
    if alarm := _rising(blocks, first, lowest):
        found["rising loss"] = alarm
    if alarm := _constant(blocks):
        found["constant answers"] = alarm
        return found
    for name, alarm in (
        ("classes", _classes(blocks)),
        ("slow", _slow(blocks, total_steps)),
        ("unstable matching", _unstable(blocks, total_steps)),
        ("idle queries", _idle(blocks, total_steps)),
    ):
        if alarm:
            found[name] = alarm
    return found


def _boxes(now: Block) -> Alarm | None:
    if now.outside > OUTSIDE:
        return Alarm(
            f"Of the annotated boxes {now.outside:.0%} reach out of their image or have no size",
            "They are in another format than was said: boxes are centre, width and height as shares of the image. "
            "Look at some: detrkit inspect DATA.",
        )
    if now.cut > CUT and now.begun < CUT / 4:
        return Alarm(
            f"Of the annotated boxes {now.cut:.0%} end at the right or lower border of their image, but only "
            f"{now.begun:.0%} begin at the left or upper one",
            "Corners may have been read as widths and heights, or pixels are of a larger image. Look at some: detrkit "
            "inspect DATA.",
        )
    return None


def _rate(blocks: Sequence[Block], first: float, lowest: float) -> Alarm | None:
    now = blocks[-1]
    highest = max(blocks, key=lambda block: _known(block.relative_rate))
    if not highest.relative_rate > HIGH_RATE:
        return None
    if now.loss < LITTLE * first and not _has_risen(blocks, first, lowest):
        return None
    proposed = highest.lr * GOOD_RATE / highest.relative_rate
    return Alarm(
        f"The learning rate is far too high: a step may change weights by {highest.relative_rate:.0%} of their size, "
        f"and the loss is {now.loss:.3g} where it began with {first:.3g}",
        f"Begin again with --lr {proposed:.0e} or lower, and with --warmup.",
    )


def _rising(blocks: Sequence[Block], first: float, lowest: float) -> Alarm | None:
    if not _has_risen(blocks, first, lowest):
        return None
    return Alarm(
        f"The loss rises: it is {blocks[-1].loss:.3g} where it had been {lowest:.3g}",
        "Lower the learning rate, keep gradient clipping on (--clip 0.1), and look for images unlike the rest.",
    )


def _constant(blocks: Sequence[Block]) -> Alarm | None:
    if not _answers_are_alike(blocks):
        return None
    return Alarm(
        "The answers are the same for every image: nothing of the images reaches them",
        "Lower the learning rate (--lr), give the backbone weights (--backbone-weights) or let it train, and see that "
        "the images are not all alike.",
    )


def _classes(blocks: Sequence[Block]) -> Alarm | None:
    """Boxes are found, classes are not: labels that do not belong to their boxes, or a head that does not train."""
    last = blocks[-PATIENCE:]
    are_found = all(block.following > FOLLOWING for block in last)
    if not are_found or sum(block.pairs for block in last) < PATIENCE * LEAST_COMPARED:
        return None
    chance = _mean(last, "chance")
    errors = [_known(block.error) for block in last]
    falls = sum(errors[PATIENCE // 2 :]) < 0.95 * sum(errors[: PATIENCE // 2])
    if not chance > LEAST_CHANCE or sum(errors) < CHANCE * chance * PATIENCE or falls:
        return None
    return Alarm(
        f"Boxes are learnt but classes are not: {_mean(last, 'error'):.0%} of the objects get the wrong class, where "
        f"always naming the most frequent one would give {chance:.0%}",
        "See whether labels belong to their boxes (detrkit inspect DATA), whether classes can be told apart at this "
        "image size (--image-size), and whether the class head trains (--freeze).",
    )


def _slow(blocks: Sequence[Block], total_steps: int) -> Alarm | None:
    last, step = blocks[-PATIENCE:], blocks[-1].step
    if step < max(SLOW_STEPS, total_steps / 5) or not _mean(last, "following") < FOLLOWING / 2:
        return None
    return Alarm(
        f"It is slow: after {step:,} steps boxes do not depend on the image yet, but only on what is usual; nothing "
        "else seems wrong, and on few images DETR may take hundreds of epochs",
        "Go on if the loss still falls. Else see whether boxes belong to their images (detrkit inspect DATA), start "
        "from trained weights (--init, detrkit pretrain), or take a preset for few images: conditional-detr-nano.",
    )


def _unstable(blocks: Sequence[Block], total_steps: int) -> Alarm | None:
    last = blocks[-PATIENCE:]
    compared = sum(block.compared for block in last)
    if blocks[-1].step < total_steps / 2 or compared < LEAST_COMPARED * PATIENCE:
        return None
    changed = sum(block.compared * _known(block.changed) for block in last) / compared
    if changed < UNSTABLE:
        return None
    return Alarm(
        f"The matching does not settle: {changed:.0%} of the objects are answered for by another query than when their "
        "image was seen before",
        "Lower the learning rate or train longer; where there are many more queries than objects, fewer settle sooner "
        "(--architecture num_queries).",
    )


def _idle(blocks: Sequence[Block], total_steps: int) -> Alarm | None:
    last = blocks[-PATIENCE:]
    queries, answering = blocks[-1].queries, max(block.answering for block in last)
    pairs = sum(block.pairs for block in last)
    if blocks[-1].step < total_steps / 5 or not queries or pairs < 20 * queries or answering >= ANSWERING * queries:
        return None
    return Alarm(
        f"Of {queries} queries only {answering} answered for any of the last {pairs:,} objects",
        "The others cost time and learn nothing: fewer would do (--architecture num_queries), unless images with many "
        "more objects are to come.",
    )


def _answers_are_alike(blocks: Sequence[Block]) -> bool:
    last = blocks[-PATIENCE:]
    return all(
        block.box_spread < ALIKE_BOXES and block.logit_spread < ALIKE_LOGITS and block.target_spread > 0.02
        for block in last
    )


def _has_risen(blocks: Sequence[Block], first: float, lowest: float) -> bool:
    """Whether the last two blocks are so much above the lowest, and have lost part of what had been gained."""
    least = min(block.loss for block in blocks[-2:])
    return least > RISE * lowest and least - lowest > 0.2 * (first - lowest)


def _mean(blocks: Sequence[Block], name: str) -> float:
    return sum(getattr(block, name) for block in blocks) / len(blocks)


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value
