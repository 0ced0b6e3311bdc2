"""The guard: its figures are what they say, it remembers what it must, and real runs that are broken are told apart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.drawing import tiny, write_coco

import detrkit
from detrkit.boxes import cxcywh_to_xyxy
from detrkit.losses.criterion import Evidence, Losses
from detrkit.losses.matching import Matches, PaddedTargets
from detrkit.training import guard as guarding
from detrkit.training.alarms import BLOCK
from detrkit.training.detection import DetectionSession
from detrkit.training.events import Event, Step, Warned
from detrkit.training.guard import Guard

pytestmark = pytest.mark.usefixtures("plotless", "flushless")


def optimizer(scale: float = 0.5) -> torch.optim.Optimizer:
    weight, bias = torch.nn.Parameter(torch.full((4, 4), scale)), torch.nn.Parameter(torch.zeros(4))
    return torch.optim.SGD([{"params": [weight, bias]}, {"params": [torch.nn.Parameter(torch.ones(2, 2))]}], lr=0.1)


def step(number: int, loss: float = 5.0, **changes: Any) -> Step:
    values = {"step": number, "epoch": 1.0, "terms": {}, "class_error": 0.25, "lr": 0.01, "grad_norm": 1.0}
    return Step(**{**values, "loss": loss, "seconds": 0.1, "waited": 0.0, "images": 2, "replaced": (), **changes})


def evidence(
    rng: np.random.Generator,
    names: tuple[str, ...] = ("a.jpg", "b.jpg"),
    *,
    query: tuple[int, int] = (2, 0),
    boxes: Any = None,
    labels: tuple[int, int] = (0, 1),
) -> Evidence:
    """Two objects in each image, for which two of five queries answer; another pair does in the first layer."""
    count = len(names)
    objects = torch.from_numpy(rng.uniform(0.3, 0.5, (count, 2, 4))).float() if boxes is None else torch.tensor(boxes)
    matches = Matches(
        torch.arange(count).repeat_interleave(2),
        torch.tensor([[1, 4] * count, [*query] * count]),
        torch.tensor([[0, 1] * count, [0, 1] * count]),
    )
    targets = PaddedTargets(torch.tensor([[*labels]] * count), objects, (2,) * count, names)
    answers = torch.from_numpy(rng.uniform(0.2, 0.4, (count, 5, 4))).float()
    return Evidence(torch.from_numpy(rng.normal(size=(count, 5, 3))).float(), answers, targets, matches)


def test_figures_of_a_batch(rng: np.random.Generator) -> None:
    given = evidence(rng, ("a.jpg", "b.jpg", "c.jpg"))
    found = guarding.watched(given)
    boxes, objects = given.boxes.double().numpy(), given.targets.boxes.double().numpy()
    assert (found.names, found.queries) == (("a.jpg", "b.jpg", "c.jpg"), 5)
    assert found.pairs[:, :3].tolist() == [[0, 2, 0], [0, 0, 1], [1, 2, 0], [1, 0, 1], [2, 2, 0], [2, 0, 1]]
    best = given.logits.argmax(-1)[:, [2, 0]]
    assert found.pairs[:, 3].tolist() == (best == torch.tensor([0, 1])).flatten().tolist()
    torch.testing.assert_close(found.pairs[:, 4:], given.targets.boxes.flatten(0, 1))
    usual, sums = boxes.mean(0), np.zeros(3)
    for image in range(3):
        for box in objects[image]:
            nearest = int(np.abs(usual - box).sum(1).argmin())
            moved, due = boxes[image, nearest] - usual[nearest], box - usual[nearest]
            sums += [moved @ due, moved @ moved, due @ due]
    wanted = [boxes.std(0, ddof=1).mean(), given.logits.numpy().std(0, ddof=1).mean(), *sums]
    assert found.figures.tolist() == pytest.approx(wanted, rel=1e-4)
    assert all(math.isnan(figure) for figure in guarding.watched(evidence(rng, ("a.jpg",))).figures)


def looked(
    guard: Guard, count: int, given: Callable[[int], Evidence | None], first: int = 1, **changes: Any
) -> list[Warned]:
    said: list[Warned] = []
    for number in range(first, first + count):
        guard.watch(given(number))
        said += guard.look(step(number, **changes))
    return said


def test_figures_of_a_block(rng: np.random.Generator) -> None:
    """Labels, queries, borders, rates; and who answered when an image was seen before, which is the last time."""
    guard, seen = Guard(optimizer(), 1000), list[Evidence]()
    boxes = [[[0.25, 0.5, 0.5, 0.2], [0.6, 0.5, 0.8, 0.2]], [[0.5, 0.5, 1.2, 0.1], [0.5, 0.5, 0.1, 0.1]]]

    def give(number: int) -> Evidence:
        query = (2, 0) if number <= 40 else (2, 3)  # from the step 41 on another one answers for the second objects
        labels = (0, 1) if number % 5 else (0, 0)
        seen.append(evidence(rng, query=query, boxes=boxes, labels=labels))
        return seen[-1]

    looked(guard, BLOCK, give)
    (block,) = guard._blocks
    assert (block.step, block.loss, block.lr) == (50, 5.0, 0.01)
    assert block.error == pytest.approx(np.mean([(guarding.watched(one).pairs[:, 3] == 0).numpy() for one in seen]))
    assert block.relative_rate == pytest.approx(0.02)  # of 0.5; neither biases nor the other group count
    assert (block.pairs, block.queries, block.answering) == (200, 5, 3)
    assert block.chance == pytest.approx(0.4)
    assert (block.outside, block.cut, block.begun) == (0.25, 0.5, 0.5)
    assert block.compared == 2 * 2 * 49
    assert block.changed == pytest.approx(2 / (2 * 2 * 49))
    centres = np.array(boxes)[..., :2].reshape(-1, 2)
    assert block.target_spread == pytest.approx(math.sqrt(centres.var(0).mean()), rel=1e-5)
    figures = np.array([guarding.watched(one).figures.tolist() for one in seen])
    assert (block.box_spread, block.logit_spread) == pytest.approx(tuple(figures[:, :2].mean(0)))
    sums = figures[:, 2:].sum(0)
    assert block.following == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]))


def test_objects_elsewhere_are_not_compared(rng: np.random.Generator) -> None:
    """As where an image was mirrored: another query has to answer then."""
    guard, left = Guard(optimizer(), 1000), [[[0.2, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]] * 2
    mirrored = [[[0.8, 0.5, 0.2, 0.2], [0.2, 0.22, 0.2, 0.2]]] * 2  # the second one is nearly where it was
    looked(guard, 1, lambda number: evidence(rng, boxes=left))
    looked(guard, 1, lambda number: evidence(rng, boxes=mirrored, query=(4, 1)), first=2)
    assert (guard._tally.compared, guard._tally.changed) == (2, 2)


def test_only_some_images_are_remembered(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "REMEMBERED_IMAGES", 3)
    guard = Guard(optimizer(), 1000)
    looked(guard, 4, lambda number: evidence(rng, (f"{number}.jpg", "a.jpg")))
    assert set(guard._memory) == {"1.jpg", "2.jpg", "a.jpg"}


def test_what_it_remembers_can_be_written_down(rng: np.random.Generator) -> None:
    """Wherever a training is interrupted, the guard goes on as if it had not been."""
    # Only in the first step of a block do the queries 4 and 0 answer, which is to be known at its end.
    given = [evidence(rng, query=(2, 3) if number % BLOCK else (4, 0)) for number in range(3 * BLOCK)]
    whole = Guard(optimizer(), 1000)
    said = looked(whole, 3 * BLOCK, lambda number: given[number - 1])
    for stop in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 7):
        first, second = Guard(optimizer(), 1000), Guard(optimizer(), 1000)
        before = looked(first, stop, lambda number: given[number - 1])
        first.watch(given[0])  # of a step that was not finished
        first.forget()
        second.restore(json.loads(json.dumps(first.state())))
        after = looked(second, 3 * BLOCK - stop, lambda number: given[number - 1], first=stop + 1)
        assert before + after == said
        assert second.state() == whole.state()


def test_a_task_without_boxes_is_watched_by_its_loss(rng: np.random.Generator) -> None:
    guard = Guard(optimizer(scale=100.0), 200)
    for count, loss in ((50, 9.0), (50, 3.0), (100, 8.0), (100, 3.0)):
        said = looked(guard, count, lambda number: None, first=1, loss=loss, class_error=math.nan)
        if loss == 8.0:
            assert [(one.alarm, one.cleared) for one in said] == [("rising loss", False)]  # once
    assert [(one.alarm, one.cleared) for one in said] == [("rising loss", True)]
    assert said[0].message == "No longer so: rising loss"


def test_a_jump_names_images_and_boxes(rng: np.random.Generator) -> None:
    guard = Guard(optimizer(), 1000)
    looked(guard, BLOCK, lambda number: evidence(rng))
    boxes = [[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.0]], [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]
    assert looked(guard, 1, lambda number: evidence(rng, boxes=boxes), first=51, loss=24.0) == []
    (told,) = looked(guard, 1, lambda number: evidence(rng, boxes=boxes), first=52, loss=88.0)
    assert told.message == (
        "The loss jumped from 5 to 88 in a step on a.jpg, b.jpg; boxes that cannot be right: "
        "a.jpg (cx, cy, w, h = 0.5, 0.5, 0.2, 0)"
    )
    assert told.remedy.startswith("Look at these images")
    assert looked(guard, 1, lambda number: evidence(rng), first=53, loss=90.0) == []
    (over,) = looked(guard, BLOCK, lambda number: evidence(rng), first=54)
    assert (over.alarm, over.cleared) == ("loss jumped", True)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = [1, 2, 4, 3, 1, 2, 1, 4, 3, 2, 1, 1, 4, 2, 3, 1, 2, 4, 1, 3, 2, 2, 1, 4]
    return write_coco(tmp_path_factory.mktemp("squares") / "data", {"train": counts, "val": [2]}, sizes=[(64, 64)])


def alarms(data: Path, out: Path, **fields: Any) -> list[Warned]:
    """What is said of a run, evaluated but once."""
    said: list[Warned] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            said.append(event)

    usual = {"epochs": 25, "crop": 0.0, "multi_scale": False, "evaluate_every": 99, "save_every": 99, "samples": 0}
    detrkit.train(data, out=out, on_event=listen, **tiny(**{**usual, **fields}))
    return said


def break_losses(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let the losses see another batch than the one that there is."""
    real = DetectionSession.losses

    def losses(self: DetectionSession, model: Any, batch: Any, counts: Any) -> Losses:
        return real(self, model, change(batch), counts)

    monkeypatch.setattr(DetectionSession, "losses", losses)


def test_a_learning_rate_that_is_far_too_high_is_told(squares: Path, tmp_path: Path) -> None:
    """The file of metrics, the status and whoever listens are told, after as few steps as can be."""
    (told,) = alarms(squares, tmp_path / "run", lr=0.1, backbone_lr=0.1, epochs=17)
    assert (told.alarm, told.step, told.cleared) == ("learning rate", 200, False)
    assert "far too high" in told.message
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["event"] == "warned"] == [{"event": "warned", **dataclasses.asdict(told)}]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["alarms"] == [{"alarm": "learning rate", "message": told.message}]


def in_corners(batch: Any) -> Any:
    targets = tuple(target._replace(boxes=cxcywh_to_xyxy(target.boxes)) for target in batch.targets)
    return batch._replace(targets=targets)


def test_boxes_in_the_wrong_format_are_told(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_losses(monkeypatch, in_corners)
    (told,) = alarms(squares, tmp_path / "run", epochs=5)
    assert (told.alarm, told.step) == ("boxes", BLOCK)
    assert "reach out of their image" in told.message


HEALTHY: dict[str, dict[str, Any]] = {
    "DETR": {},
    "Conditional DETR": {"model": "conditional-detr-nano"},
    "without dropout, averaged": {"architecture": {"dropout": "0.0"}, "ema": 0.99, "schedule": "cosine", "warmup": 20},
    "one image a batch, augmented": {"batch_size": 1, "epochs": 13, "crop": 0.5, "multi_scale": True},
    "accumulated, many queries": {"accumulate": 2, "epochs": 50, "architecture": {"num_queries": "30"}},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm_on_healthy_runs(squares: Path, tmp_path: Path, name: str) -> None:
    assert alarms(squares, tmp_path / "run", **HEALTHY[name]) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_labels_that_do_not_belong_to_their_boxes_are_told(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = torch.Generator().manual_seed(0)

    def relabelled(batch: Any) -> Any:
        targets = (
            target._replace(labels=torch.randint(3, target.labels.shape, generator=order)) for target in batch.targets
        )
        return batch._replace(targets=tuple(targets))

    break_losses(monkeypatch, relabelled)
    told = alarms(squares, tmp_path / "run", epochs=40)
    assert [one.alarm for one in told] == ["classes"]
    assert "Boxes are learnt but classes are not" in told[0].message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_class_head_that_does_not_train_is_told(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen at nothing. At random it would do no harm: the layers before it learn to aim at it."""
    real = DetectionSession.losses

    def losses(self: DetectionSession, model: Any, batch: Any, counts: Any) -> Losses:
        head: Any = self.model.class_head
        for parameter in head.requires_grad_(False).parameters():
            parameter.zero_()
        return real(self, model, batch, counts)

    monkeypatch.setattr(DetectionSession, "losses", losses)
    told = alarms(squares, tmp_path / "run", epochs=40)
    assert [one.alarm for one in told] == ["classes"]


def blackened(batch: Any) -> Any:
    return batch._replace(packed=batch.packed._replace(pixels=torch.zeros_like(batch.images)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_that_are_all_the_same_are_told(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that arrive black, as after a broken augmentation, say nothing of what they show."""
    break_losses(monkeypatch, blackened)
    told = alarms(squares, tmp_path / "run", architecture={"dropout": "0.0"})
    assert [one.alarm for one in told] == ["constant answers"]
