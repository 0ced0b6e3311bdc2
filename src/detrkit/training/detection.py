"""The training of a detector: what the loop asks of its task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import nn

from detrkit.checkpoint import TrainingState, fill, save_model, save_training
from detrkit.data.annotations import Annotations
from detrkit.data.dataset import DetectionDataset, Key
from detrkit.data.loading import LoadedBatch, training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedBatch
from detrkit.evaluation.run import Metrics, evaluate
from detrkit.losses.criterion import Losses, SetCriterion
from detrkit.models import Variant
from detrkit.predict import Detector
from detrkit.structures import Batch
from detrkit.training.recipe import Recipe
from detrkit.training.session import Session, Validation
from detrkit.training.validation import detect, draw_samples, forgiving

HEADLINE = ("AP", "AP50", "AP75")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionSession(Session[PackedBatch | Batch]):
    """The training of a detector on annotated images.

    Attributes:
        recipe: the resolved recipe.
        variant: the module of the model's variant.
        criterion: its loss.
        dataset: training examples.
        train: annotations of the training split.
        val: annotations of the validation split.
    """

    recipe: Recipe
    variant: Variant
    criterion: SetCriterion
    dataset: DetectionDataset
    train: Annotations
    val: Annotations

    @property
    def count(self) -> int:
        """Images of the training split."""
        return len(self.dataset)

    @property
    def size_of(self) -> Callable[[Key], tuple[int, int]] | None:
        """Those of the augmented images, where the recipe asks for it."""
        return self.dataset.size if self.recipe.data.group_sizes else None

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedBatch]:
        """Augmented images with their targets."""
        return training_batches(self.dataset, sampler, workers=self.workers, pin_memory=self.device.type == "cuda")

    def counts(self, batch: PackedBatch | Batch) -> tuple[int]:
        """Boxes."""
        return (sum(len(target.labels) for target in batch.targets),)

    def losses(self, model: nn.Module, batch: PackedBatch | Batch, counts: Sequence[float]) -> Losses:
        """Predictions against targets."""
        ready = batch.to(self.device)
        with self.arithmetic():
            predictions = model(self.laid_out(ready.images), ready.padding)
        return self.criterion(predictions, ready.targets, *counts)

    def names(self, batch: PackedBatch | Batch) -> Sequence[str]:
        """The images' files."""
        return [target.name for target in batch.targets]

    def evaluate(self, out: Path, epoch: int) -> Validation:
        """COCO's figures on the validation split, of which AP chooses; samples are drawn into `samples/`."""
        model = self.evaluated_model.eval()
        detector = Detector(model, self.variant, self.train.categories, self.recipe.model.model, self.device)
        batch_size = max(self.optimization.batch_size, 4)
        detections = detect(detector, self.val, batch_size=batch_size, workers=self.workers, world=self.world)
        found: Metrics | None = evaluate(self.val, detections) if self.world.is_main else None
        metrics = self.world.share(found)
        notes: list[str] = []
        if self.world.is_main and self.run.samples:
            with forgiving(notes):
                file = out / "samples" / f"epoch-{epoch:04d}.jpg"
                draw_samples(self.val, detections, self.run.samples, file, metrics.threshold)
        return Validation(
            figures=metrics.figures,
            chosen_by="AP",
            headline=HEADLINE,
            about={"threshold": metrics.threshold},
            metrics=metrics,
            notes=tuple(notes),
        )

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder that `detrkit.load` takes."""
        preset, categories = self.recipe.model.model, self.train.categories
        save_model(folder, self.evaluated_model, preset=preset, categories=categories, about=about)

    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write a model folder with the state beside it."""
        preset, categories = self.recipe.model.model, self.train.categories
        save_training(folder, self.model, state, preset=preset, categories=categories)

    def fill(self, folder: Path) -> None:
        """Give the model the weights of a model folder."""
        fill(self.model, folder)

    def describe(self) -> dict[str, Any]:
        """The category table, and both splits."""
        return {
            "categories": [category.to_json() for category in self.train.categories],
            "splits": {"train": describe(self.train), "val": describe(self.val)},
        }


def describe(annotations: Annotations) -> dict[str, Any]:
    """Counts and a fingerprint of a split: the same fingerprint, the same images, boxes and labels."""
    digest = hashlib.sha256()
    for column in (annotations.file_names.bytes, annotations.offsets, annotations.boxes, annotations.labels):
        digest.update(np.ascontiguousarray(column).tobytes())
    return {
        "source": annotations.source,
        "images": len(annotations),
        "boxes": len(annotations.boxes),
        "problems": annotations.problems.counts,
        "fingerprint": digest.hexdigest()[:16],
    }
