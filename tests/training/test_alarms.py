"""What the figures of some steps mean: each alarm, and what is like it and none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from detrkit.training.alarms import Block, judge

HEALTHY: dict[str, Any] = {
    "lr": 1e-3,
    "relative_rate": 0.005,
    "pairs": 500,
    "error": 0.1,
    "chance": 0.4,
    "box_spread": 0.02,
    "logit_spread": 0.5,
    "target_spread": 0.25,
    "following": 0.4,
    "outside": 0.0,
    "cut": 0.1,
    "begun": 0.1,
    "compared": 200,
    "changed": 0.6,
    "queries": 20,
    "answering": 18,
}


def judged(
    changes: dict[str, Any] | None = None,
    losses: tuple[float, ...] = (9.0, 8.0, 7.0, 6.0),
    total: int = 400,
    step: int = 400,
) -> dict[str, Any]:
    """The alarms after blocks that are healthy but for some figures; a list gives a figure block by block."""
    blocks = []
    for index, loss in enumerate(losses):
        own = {name: value[index] if isinstance(value, list) else value for name, value in (changes or {}).items()}
        blocks.append(Block(step=step - 50 * (len(losses) - 1 - index), loss=loss, **{**HEALTHY, **own}))
    return judge(blocks, losses[0], min(losses), total)


def test_nothing_is_said_of_a_healthy_training() -> None:
    assert judged() == {}
    assert judged({name: math.nan for name in HEALTHY if isinstance(HEALTHY[name], float)}) == {}
    unknown = {name: 0 if isinstance(value, int) else math.nan for name, value in HEALTHY.items()}
    assert judged(unknown) == {}  # as of a task without boxes


ALARMS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "boxes": (
        {"changes": {"outside": 0.3}, "losses": (9.0,)},
        {"changes": {"outside": 0.01}},
        "30% reach out of",
        "inspect",
    ),
    "classes": (
        {"changes": {"error": [0.39, 0.37, 0.38, 0.38]}},
        {"changes": {"error": [0.39, 0.37, 0.33, 0.31]}},  # it falls
        "38% of the objects get the wrong class, where always naming the most frequent one would give 40%",
        "labels belong to their boxes",
    ),
    "constant answers": (
        {"changes": {"box_spread": 1e-5, "logit_spread": 1e-3}},
        {"changes": {"box_spread": 1e-5}},  # classes differ
        "the same for every image",
        "--backbone-weights",
    ),
    "learning rate": (
        {"changes": {"relative_rate": 0.2, "lr": 0.04}, "losses": (9.0, 8.0, 8.5, 8.0)},
        {"changes": {"relative_rate": 0.2}},  # but it learns
        "far too high: a step may change weights by 20% of their size",
        "--lr 1e-03 or lower",
    ),
    "rising loss": (
        {"losses": (9.0, 6.0, 8.0, 8.5)},
        {"losses": (9.0, 6.0, 8.0, 6.5)},  # no more
        "The loss rises: it is 8.5 where it had been 6",
        "--clip 0.1",
    ),
    "unstable matching": (
        {"changes": {"changed": 0.97}},
        {"changes": {"changed": [1.0, 1.0, 0.9, 0.8]}},
        "97% of the objects are answered for by another query",
        "num_queries",
    ),
    "idle queries": (
        {"changes": {"answering": 3, "queries": 100}},
        {"changes": {"answering": [3, 3, 30, 3], "queries": 100}},
        "Of 100 queries only 3 answered for any of the last 2,000 objects",
        "num_queries",
    ),
    "slow": (
        {"changes": {"following": 0.01}, "step": 2000, "total": 4000},
        {"changes": {"following": 0.01}},  # after 400 steps that is usual
        "It is slow: after 2,000 steps boxes do not depend on the image yet",
        "--init",
    ),
}


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_says_what_is_wrong_and_what_to_do(name: str) -> None:
    broken, like_it, message, remedy = ALARMS[name]
    found = judged(**broken)
    assert list(found) == [name]
    assert message in found[name].message
    assert remedy in found[name].remedy
    assert found[name].message[0].isupper()
    assert not found[name].message.endswith(".")
    assert found[name].remedy.endswith(".")
    assert judged(**like_it) == {}


@pytest.mark.parametrize("name", sorted(set(ALARMS) - {"boxes"}))
def test_patience(name: str) -> None:
    """What may still come right is no alarm: before some blocks, and before a tenth of the training, are done."""
    broken = ALARMS[name][0]
    assert judged(**{**broken, "total": 20 * broken.get("step", 400)}) == {}
    losses = broken.get("losses", (9.0, 8.0, 7.0, 6.0))[1:]
    changes = {key: value[1:] if isinstance(value, list) else value for key, value in broken.get("changes", {}).items()}
    assert judged(**{**broken, "losses": losses, "changes": changes}) == {}


def test_boxes_that_end_at_two_of_four_borders() -> None:
    found = judged({"cut": 0.4, "begun": 0.02})
    assert "40% end at the right or lower border" in found["boxes"].message
    assert "Corners may have been read as widths" in found["boxes"].remedy
    assert judged({"cut": 0.4, "begun": 0.3}) == {}  # large objects, and crops


def test_what_has_a_cause_that_is_known_is_not_told_as_well() -> None:
    alike = {"box_spread": 1e-5, "logit_spread": 1e-3, "error": 0.4}
    assert list(judged(alike)) == ["constant answers"]
    assert list(judged({**alike, "relative_rate": 0.2}, losses=(9.0, 9.0, 9.0, 9.0))) == ["learning rate"]


def test_labels_are_not_blamed_while_nothing_is_found_yet() -> None:
    assert judged({"error": 0.4, "following": 0.01}) == {}
    assert judged({"error": 0.4, "following": [0.01, 0.3, 0.4, 0.5]}) == {}  # only just
    assert judged({"error": 0.02, "chance": 0.02}) == {}  # one class, or nearly
    assert judged({"error": 0.4, "pairs": 10}) == {}


def test_objects_that_are_all_in_one_place_may_have_one_answer() -> None:
    assert judged({"box_spread": 1e-5, "logit_spread": 1e-3, "target_spread": 0.005}) == {}


def test_a_loss_near_zero_may_double() -> None:
    assert judged(losses=(9.0, 0.01, 0.02, 0.03)) == {}
