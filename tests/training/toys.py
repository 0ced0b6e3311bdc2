"""A task that is no detection and takes a millisecond a step: for what the loop does, whatever is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from training.drawing import content, without_times

from detrkit.checkpoint import TrainingState, fill, save_model, save_training
from detrkit.data.order import EpochBatches
from detrkit.errors import DataError
from detrkit.losses.criterion import Losses
from detrkit.training import recipe as recipes
from detrkit.training.conduct import conduct
from detrkit.training.distributed import World
from detrkit.training.ema import Average
from detrkit.training.optimizer import make_optimizer
from detrkit.training.recipe import AnyRecipe, OptimizationOptions, RunOptions
from detrkit.training.session import Session, Validation


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
    on_losses: Callable[[ToySession, ToyBatch], None] = lambda session, batch: None
    on_evaluation: Callable[[Path, int], None] = lambda out, epoch: None

    @property
    def count(self) -> int:
        return len(self.pictures)

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedToy]:
        for keys in sampler:
            chosen = [key.index for key in keys]
            names = tuple(f"picture {index}" for index in chosen)
            yield LoadedToy(ToyBatch(self.pictures[chosen], names), ())

    def losses(self, model: nn.Module, batch: ToyBatch, counts: Sequence[float]) -> Losses:
        self.on_losses(self, batch)
        with self.arithmetic():
            answers = model(self.laid_out(batch.images)).float()
        values = torch.stack([(answers - 1).square().mean(), answers.std()])[:, None]
        return Losses(("distance", "spread"), values, values.new_tensor([1.0, 0.1]), values.new_tensor(math.nan))

    def names(self, batch: ToyBatch) -> Sequence[str]:
        return batch.names

    def evaluate(self, out: Path, epoch: int) -> Validation:
        self.on_evaluation(out, epoch)
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


def session_of(recipe: ToyRecipe, world: World | None = None, came_from: str = "", **changes: Any) -> ToySession:
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
        **changes,
    )


def train(
    out: Path, recipe: ToyRecipe | None = None, resume: bool = False, on_event: Any = None, **changes: Any
) -> dict[str, float]:
    chosen = recipe or ToyRecipe()
    return conduct(
        chosen,
        lambda world, came_from: session_of(chosen, world, came_from, **changes),
        out,
        "toys",
        resume=resume,
        on_event=on_event,
    )


def everything(run: Path) -> dict[str, Any]:
    folders = ("checkpoints/last", "checkpoints/best", "model")
    return {"lines": without_times(run), **{name: content(run / name) for name in folders}}
