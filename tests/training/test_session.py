"""The loop with a task that is no detection: its own recipe, batches, terms and figures, and less is better."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import pytest
import torch
from torch import Tensor, nn
from training.drawing import content, without_times

from detrkit.checkpoint import TrainingState, fill, save_model, save_training
from detrkit.data.loading import EpochBatches
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.criterion import Losses
from detrkit.losses.matching import NonFiniteError
from detrkit.training import recipe as recipes
from detrkit.training.conduct import conduct
from detrkit.training.distributed import World
from detrkit.training.ema import Average
from detrkit.training.events import Evaluated, Event, Saved, Started, Step
from detrkit.training.log import summarize
from detrkit.training.optimizer import make_optimizer
from detrkit.training.recipe import AnyRecipe, OptimizationOptions, RunOptions, revise
from detrkit.training.session import Session, Validation

pytestmark = pytest.mark.usefixtures("plotless")


@dataclass(frozen=True)
class ToyOptions:
    count: int = field(default=6, metadata=recipes.within(1))
    noise: float = field(default=0.1, metadata=recipes.within(0, 1))


@dataclass(frozen=True)
class ToyRecipe(AnyRecipe):
    task: ClassVar[str] = "toy"

    toy: ToyOptions = field(default_factory=ToyOptions)
    optimization: OptimizationOptions = field(default_factory=lambda: OptimizationOptions(epochs=3, lr=0.1, ema=0.5))
    run: RunOptions = field(default_factory=lambda: RunOptions(device="cpu", log_every=2))


class ToyBatch(NamedTuple):
    images: Tensor
    names: tuple[str, ...]


class LoadedToy(NamedTuple):
    batch: ToyBatch
    replaced: tuple[str, ...]


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = ToyOptions()
        self.layer = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.dropout(images.mean((2, 3))))


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ToySession(Session[ToyBatch]):
    """Pull two numbers of an image's mean colour to one."""

    pictures: Tensor

    @property
    def count(self) -> int:
        return len(self.pictures)

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedToy]:
        for keys in sampler:
            chosen = [key.index for key in keys]
            names = tuple(f"picture {index}" for index in chosen)
            yield LoadedToy(ToyBatch(self.pictures[chosen], names), ())

    def losses(self, model: nn.Module, batch: ToyBatch) -> Losses:
        with self.arithmetic():
            answers = model(self.laid_out(batch.images)).float()
        values = torch.stack([(answers - 1).square().mean(), answers.std()])[:, None]
        return Losses(("distance", "spread"), values, values.new_tensor([1.0, 0.1]), values.new_tensor(math.nan))

    def names(self, batch: ToyBatch) -> Sequence[str]:
        return batch.names

    def evaluate(self, out: Path, epoch: int) -> Validation:
        if (out / "broken").exists():
            raise DataError("The picture cannot be read", where=out / "broken")
        with torch.no_grad():
            answers = self.evaluated_model.eval()(self.pictures)
        figures = {"distance": float((answers - 1).square().mean()), "nothing": math.nan}
        return Validation(
            figures=figures, chosen_by="distance", higher_is_better=False, headline=("distance",), about={"seen": epoch}
        )

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_model(folder, self.evaluated_model, preset="toy", categories=(), about=about)

    def save_training(self, folder: Path, state: TrainingState) -> None:
        save_training(folder, self.model, state, preset="toy", categories=())

    def fill(self, folder: Path) -> None:
        fill(self.model, folder)

    def describe(self) -> dict[str, Any]:
        return {"splits": {"train": {"images": self.count, "fingerprint": str(float(self.pictures.sum()))}}}


def session_of(recipe: ToyRecipe, world: World | None = None, came_from: str = "") -> ToySession:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = ToyModel()
        pictures = torch.rand(recipe.toy.count, 3, 4, 4)
    return ToySession(
        recipe=recipe,
        world=world or World(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        model=model,
        optimizer=make_optimizer(model, recipe.optimization),
        average=Average(model, recipe.optimization.ema),
        workers=0,
        notes=(came_from or "Start from nothing",),
        pictures=pictures,
    )


def train(out: Path, recipe: ToyRecipe | None = None, resume: bool = False, on_event: Any = None) -> dict[str, float]:
    chosen = recipe or ToyRecipe()
    return conduct(
        chosen,
        lambda world, came_from: session_of(chosen, world, came_from),
        out,
        "toys",
        resume=resume,
        on_event=on_event,
    )


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


def everything(run: Path) -> dict[str, Any]:
    folders = ("checkpoints/last", "checkpoints/best", "model")
    return {"lines": without_times(run), **{name: content(run / name) for name in folders}}


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
