"""What the training loop asks of a task. `detection` trains a detector; other tasks bring a session of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from detrkit.arithmetic import arithmetic
from detrkit.checkpoint import TrainingState
from detrkit.data.dataset import Key
from detrkit.data.order import EpochBatches
from detrkit.evaluation.run import Metrics
from detrkit.losses.criterion import Losses
from detrkit.training.distributed import World
from detrkit.training.ema import Average
from detrkit.training.recipe import AnyRecipe, OptimizationOptions, RunOptions


@runtime_checkable
class ImageBatch(Protocol):
    """What all batches have in common."""

    @property
    def images(self) -> Shaped[Tensor, "b 3 h w"]:
        """Zeros to the right and below; normalised, or bytes that will be on the device."""
        ...


SomeBatch = TypeVar("SomeBatch", bound=ImageBatch)
LoadedKind = TypeVar("LoadedKind", bound=ImageBatch, covariant=True)


@runtime_checkable
class Loaded(Protocol[LoadedKind]):
    """A batch from the disk."""

    @property
    def batch(self) -> LoadedKind:
        """The batch."""
        ...

    @property
    def replaced(self) -> tuple[str, ...]:
        """For each unreadable image that another stands in for, its path and what was wrong with it."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Validation:
    """What an evaluation during a training found.

    Attributes:
        figures: all of them by name; NaN where undefined.
        chosen_by: the name of the figure that chooses the best checkpoint; an undefined one is never the best.
        higher_is_better: whether it should be large.
        headline: the names that are worth showing while the training runs.
        about: what else is kept with the best checkpoint; anything JSON can hold.
        metrics: all tables, of a task that detects.
        notes: what the user should know at once, such as that something has collapsed.
        conclusion: what it comes to so far, in plain sentences.
    """

    figures: dict[str, float]
    chosen_by: str
    headline: tuple[str, ...]
    higher_is_better: bool = True
    about: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    notes: tuple[str, ...] = ()
    conclusion: str = ""

    @property
    def score(self) -> float:
        """The figure that chooses, turned so that more is better."""
        return self.figures[self.chosen_by] if self.higher_is_better else -self.figures[self.chosen_by]


@dataclass(frozen=True, eq=False, kw_only=True)
class Session(ABC, Generic[SomeBatch]):
    """All that a training works with, made from a recipe.

    Attributes:
        recipe: the resolved recipe.
        world: the processes that train together.
        device: where this one computes.
        dtype: arithmetic of the forward pass.
        model: in training: the whole module, with heads that only the task needs.
        optimizer: its groups, of which the first is the one whose rate is told.
        average: the moving average, where the recipe has one.
        workers: processes that load images.
        notes: what the user should know.
    """

    recipe: AnyRecipe
    world: World
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    optimizer: torch.optim.AdamW
    average: Average | None
    workers: int
    notes: tuple[str, ...]

    @property
    def optimization(self) -> OptimizationOptions:
        """How it is trained."""
        return self.recipe.optimization

    @property
    def run(self) -> RunOptions:
        """How the run is kept."""
        return self.recipe.run

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.model

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Within it, forward passes compute in the recipe's arithmetic."""
        return arithmetic(self.device, self.dtype)

    def counts(self, batch: SomeBatch) -> tuple[int, ...]:
        """What a batch holds of all that its sums of losses run over, such as boxes; nothing where losses are means."""
        return ()

    def shared(self, batches: Sequence[SomeBatch]) -> tuple[float, ...]:
        """What sums of losses are divided by in a step: as if its batches, in all processes, were one.

        Each of the counts is summed over the batches and averaged over the processes, is at least 1, and falls to all
        batches alike, whatever each of them holds.
        """
        sums = [float(sum(each)) for each in zip(*map(self.counts, batches), strict=True)]
        return tuple(max(mean, 1.0) / len(batches) for mean in self.world.mean_of(sums, self.device))

    def laid_out(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Images, or maps of them, in the memory layout that the recipe asks for."""
        wanted = torch.channels_last if self.optimization.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=wanted)

    @property
    @abstractmethod
    def count(self) -> int:
        """Images of the training set, which an epoch sees once."""

    @property
    def size_of(self) -> Callable[[Key], tuple[int, int]] | None:
        """Height and width that an example is going to have, to make up batches by; None: left to chance."""
        return None

    @abstractmethod
    def batches(self, sampler: EpochBatches) -> Iterator[Loaded[SomeBatch]]:
        """The batches of the keys that the sampler gives, loaded by `workers` processes.

        Raises:
            DataError: too many images in a row cannot be read.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: SomeBatch, counts: Sequence[float]) -> Losses:
        """The losses of a batch, with gradients.

        Args:
            model: `self.model`, wrapped where several processes train; its forward pass is called once, within
                `arithmetic`.
            batch: as it was loaded; it is not on the device yet.
            counts: what its sums are divided by: the batch's share of `shared`.

        Returns:
            The terms under their names. `class_error` is NaN where the task has no classes.

        Raises:
            NonFiniteError: predictions are NaN or infinite; names the images. It is raised when this process needs
                nothing more of the others.
        """

    @abstractmethod
    def names(self, batch: SomeBatch) -> Sequence[str]:
        """The names of a batch's images, for messages."""

    @abstractmethod
    def evaluate(self, out: Path, epoch: int) -> Validation:
        """Evaluate `evaluated_model` on the validation split, and draw whatever is drawn.

        All processes call it; they share the work as they like and return the same.

        Args:
            out: the run folder, in which only the main process writes.
            epoch: passes through the training set so far.

        Raises:
            DataError: an image cannot be read.
        """

    @abstractmethod
    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder of `evaluated_model` that holds `about`, replacing what stood there."""

    @abstractmethod
    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write a checkpoint of `model` and `state` to go on from, replacing what stood there."""

    @abstractmethod
    def fill(self, folder: Path) -> None:
        """Give `model` the weights of a checkpoint that `save_training` wrote.

        Raises:
            ModelError: a file is missing or damaged, or its weights do not fit.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is trained on, as JSON: under `splits`, for each its `images`, its `fingerprint` and other counts.

        The same fingerprint means the same images and annotations, wherever they lie. With other fingerprints than
        before, a run does not go on.
        """
