"""The loop with a task that is no detection: its own recipe, batches, terms and figures, and less is better."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from training.toys import ToyBatch, ToyModel, ToyRecipe, ToySession, everything, session_of, train

from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.training.conduct import conduct
from detrkit.training.distributed import World
from detrkit.training.events import Evaluated, Event, Saved, Started, Step
from detrkit.training.log import summarize
from detrkit.training.recipe import revise
from detrkit.training.session import Session, Validation

pytestmark = pytest.mark.usefixtures("plotless")


def test_the_events_are_of_the_tasks_own_terms_and_figures(tmp_path: Path) -> None:
    events: list[Event] = []
    best = train(tmp_path / "run", on_event=events.append)
    steps = [event for event in events if isinstance(event, Step)]
    assert [tuple(step.terms) for step in steps] == [("distance", "spread")] * 9
    assert all(step.images == 2 and math.isnan(step.class_error) for step in steps)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [event.headline for event in evaluated] == [("distance",)] * 3
    assert all(event.metrics is None for event in evaluated)
    assert best["distance"] == min(event.figures["distance"] for event in evaluated)
    assert "class_error" not in summarize(steps)


def test_less_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    seen: list[Evaluated] = []

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated):
            seen.append(event)

    train(tmp_path / "run", revise(ToyRecipe(), {"epochs": 6}), on_event=listen)
    lowest = math.inf
    for event in seen:
        assert event.is_best == (event.figures["distance"] < lowest)
        lowest = min(lowest, event.figures["distance"])
    assert [event.is_best for event in seen].count(True) > 1
    about = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["about"]
    best = [event for event in seen if event.is_best][-1]
    assert about == {
        "epoch": int(best.epoch),
        "step": best.step,
        "metrics": {"distance": lowest, "nothing": None},
        "seen": int(best.epoch),
    }


def test_a_figure_that_is_undefined_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "score", property(lambda self: math.nan))
    assert train(tmp_path / "run") == {}
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_an_epoch_of_accumulated_batches_shows_no_image_twice(tmp_path: Path) -> None:
    """Five batches of two images, of which two make a step: one is left out, and comes when the next epoch draws it."""
    shown: list[str] = []
    recipe = revise(ToyRecipe(), {"count": 10, "batch_size": 2, "accumulate": 2, "epochs": 4})
    train(tmp_path / "run", recipe, on_losses=lambda session, batch: shown.extend(batch.names))
    epochs = [shown[start : start + 8] for start in range(0, len(shown), 8)]
    assert [len(set(epoch)) for epoch in epochs] == [8, 8, 8, 8]


@pytest.mark.parametrize("where", ["in mid-epoch", "after a checkpoint", "at an evaluation"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, where: str) -> None:
    def stop(event: Event) -> None:
        here = {
            "in mid-epoch": isinstance(event, Step) and event.step == 5,
            "after a checkpoint": isinstance(event, Saved),
            "at an evaluation": isinstance(event, Evaluated) and event.step == 6,
        }
        if here[where]:
            raise KeyboardInterrupt

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", on_event=stop)
    train(tmp_path / "run", resume=True)
    assert everything(tmp_path / "run") == everything(tmp_path / "whole")


def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    out, steps, starts = tmp_path / "run", [], []

    def spoil(event: Event) -> None:
        if isinstance(event, Step) and event.step == 6:
            (out / "broken").write_text("")

    with pytest.raises(DataError, match="picture cannot be read"):
        train(out, on_event=spoil)
    assert json.loads((out / "checkpoints" / "last" / "training.json").read_text())["position"]["step"] == 6
    with pytest.raises(DataError, match="picture cannot be read"):  # still broken: nothing is trained and nothing lost
        train(out, resume=True)
    (out / "broken").unlink()

    def listen(event: Event) -> None:
        if isinstance(event, Step):
            steps.append(event.step)
        elif isinstance(event, Started):
            starts.append((event.step, event.pending))

    train(out, resume=True, on_event=listen)
    assert starts == [(6, True)]
    assert steps == [7, 8, 9]
    assert everything(out) == everything(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_names_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(self: ToyModel, images: Tensor) -> Tensor:
        return self.layer(images.mean((2, 3))) * math.nan

    monkeypatch.setattr(ToyModel, "forward", spoiled)
    with pytest.raises(NonFiniteError, match=r"picture \d, picture \d: "):
        train(tmp_path / "run")


def test_other_data_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    other = session_of(revise(ToyRecipe(), {"seed": 5}))
    with pytest.raises(DataError, match=r"other data: its train images.*got 6 images; expected 6 images as"):
        conduct(ToyRecipe(), lambda world, came_from: other, tmp_path / "run", "toys", resume=True)


def test_another_recipe_is_refused_by_its_fields(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(UsageError, match=r"another recipe; got noise \(0.1 before\), lr \(0.1 before\)\. "):
        train(tmp_path / "run", revise(ToyRecipe(), {"noise": 0.5, "lr": 0.2, "log_every": 7}), resume=True)


def test_what_a_run_noted_of_its_first_weights_reaches_the_session(tmp_path: Path) -> None:
    train(tmp_path / "run")
    given: list[str] = []

    def prepare(world: World, came_from: str) -> ToySession:
        given.append(came_from)
        return session_of(ToyRecipe(), world, came_from)

    conduct(ToyRecipe(), prepare, tmp_path / "new", "toys")
    conduct(ToyRecipe(), prepare, tmp_path / "run", "toys", resume=True)
    assert given == ["", "Start from nothing"]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        *(
            ("data.json", text, DataError)
            for text in ("{", "[]", "{}", '{"splits": {"train": 3}, "notes": []}', "\xff")
        ),
        *(("checkpoints/best/config.json", text, ModelError) for text in ("", "[]", "{}", '{"about": {"metrics": 3}}')),
        ("checkpoints/best/config.json", '{"about": {"metrics": {"distance": "far"}}}', ModelError),
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path: Path, name: str, text: str, kind: type[Exception]) -> None:
    train(tmp_path / "run", revise(ToyRecipe(), {"epochs": 1}))
    file = tmp_path / "run" / name
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(kind) as caught:
        train(tmp_path / "run", revise(ToyRecipe(), {"epochs": 1}), resume=True)
    assert str(file) in str(caught.value)
    assert "Restore the file" in str(caught.value)


def test_a_session_that_leaves_something_out_cannot_be_made() -> None:
    @dataclass(frozen=True, eq=False, kw_only=True)
    class Half(Session[ToyBatch]):
        pass

    fields = {one.name: None for one in dataclasses.fields(Half)}
    with pytest.raises(TypeError, match="abstract"):
        Half(**fields)  # type: ignore[abstract, arg-type]
