"""The pre-training of a backbone alone, by two views of each image: what the loop asks of its task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import nn

from detrkit.checkpoint import TrainingState, read_tensors, save_backbone
from detrkit.convert import load_strictly
from detrkit.data.order import EpochBatches
from detrkit.data.problems import Problems
from detrkit.data.views import LoadedViews, ViewAugmentation, ViewBatch, ViewDataset, evaluation_views, view_batches
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.criterion import Losses
from detrkit.pretrain.backbone import BarlowTwins, RedundancyReduction, ViewFigures, alarms, conclusion
from detrkit.training.distributed import World
from detrkit.training.pretext import BackboneRecipe, ViewOptions
from detrkit.training.session import Session, Validation
from detrkit.training.setup import build_model, choose_place, count_workers, equip
from detrkit.training.unlabelled import Sources, describe, figures_so_far, missing, open_images

HEADLINE = ("retrieval", "chance", "mean_rank", "feature_rank")

_WHOLE = "task"  # the file of a checkpoint that holds backbone and projector


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class BackboneSession(Session[ViewBatch]):
    """Barlow Twins on unlabelled images.

    Attributes:
        recipe: the resolved recipe.
        model: the task, which holds the backbone.
        backbone: its name.
        criterion: its loss.
        train: images in two views to train on.
        val: the held-out ones.
    """

    recipe: BackboneRecipe
    model: BarlowTwins
    backbone: str
    criterion: RedundancyReduction
    train: ViewDataset
    val: ViewDataset

    @property
    def count(self) -> int:
        """Images of the training set."""
        return len(self.train)

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedViews]:
        """Two views of each image."""
        return view_batches(self.train, sampler, workers=self.workers, pin_memory=self.device.type == "cuda")

    def losses(self, model: nn.Module, batch: ViewBatch, counts: Sequence[float]) -> Losses:
        """How the embeddings of both views correlate, in each process for itself; there are no classes to mistake."""
        batch = batch.to(self.device)
        with self.arithmetic():
            found = model(self.laid_out(batch.images), self.laid_out(batch.second))
        losses = self.criterion(found)
        return losses._replace(class_error=torch.full_like(losses.class_error, torch.nan))

    def names(self, batch: ViewBatch) -> Sequence[str]:
        """The images' files."""
        return batch.names

    def evaluate(self, out: Path, epoch: int) -> Validation:
        """Figures on the held-out images, of which retrieval chooses."""
        task = cast(BarlowTwins, self.evaluated_model).eval()
        figures, problems = ViewFigures(), Problems()
        batches = evaluation_views(
            self.val,
            min(self.optimization.batch_size, 64),
            workers=self.workers,
            problems=problems,
            indices=self.world.share_of(range(len(self.val))),
            pin_memory=self.device.type == "cuda",
        )
        for batch in batches:
            batch = batch.to(self.device)
            with torch.no_grad():
                first, second = (task.describe(self.laid_out(views)) for views in (batch.images, batch.second))
            figures.add(first, second, batch.names)
        parts = self.world.gather((figures, problems))
        shared: Validation = self.world.share(self._validation(parts, out) if self.world.is_main else None)
        return shared

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a folder that holds the backbone, which `--backbone-weights` takes."""
        task = cast(BarlowTwins, self.evaluated_model)
        save_backbone(
            folder, task.backbone, self.backbone, preset=self.recipe.model.model, about={**about, **self._about()}
        )

    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write the same of the weights in training, with the projector and the state."""
        whole = state._replace(tensors={**state.tensors, _WHOLE: self.model.state_dict()})
        save_backbone(
            folder,
            self.model.backbone,
            self.backbone,
            preset=self.recipe.model.model,
            about=self._about(),
            state=whole,
        )

    def fill(self, folder: Path) -> None:
        """Give backbone and projector the weights of such a checkpoint."""
        file = folder / f"{_WHOLE}.safetensors"
        try:
            load_strictly(self.model, read_tensors(file))
        except ModelError as error:
            raise ModelError(error.what, where=file, got=error.got) from error

    def describe(self) -> dict[str, Any]:
        """The images of both parts."""
        return {"splits": {"train": describe(self.train.pictures), "val": describe(self.val.pictures)}}

    def _about(self) -> dict[str, Any]:
        pictures = self.train.pictures
        told = {"task": self.recipe.task, "images": len(pictures), "fingerprint": pictures.fingerprint()}
        return {"pretext": told}

    def _validation(self, parts: Sequence[tuple[ViewFigures, Problems]], out: Path) -> Validation:
        figures, problems = ViewFigures.merged([part for part, _ in parts]), Problems()
        for _, found in parts:
            problems.merge(found)
        result, earlier = figures.result(), figures_so_far(out)
        first, before = (earlier[0], earlier[-1]) if earlier else (result, None)
        return Validation(
            figures=result,
            chosen_by="retrieval",
            headline=HEADLINE,
            notes=(*alarms(result), *missing(problems, len(self.val))),
            conclusion=conclusion(first, result, figures.images, before=before),
        )


def prepare_backbone(
    recipe: BackboneRecipe, images: Sources, world: World, out: Path, *, came_from: str = ""
) -> BackboneSession:
    """Open the images, build the backbone of a preset and the task around it, load its weights.

    Args:
        recipe: the resolved recipe.
        images: folders, images and tar shards.
        world: the processes that train together.
        out: the run folder.
        came_from: what the run noted of its first weights, where a checkpoint follows: then they are not loaded again.

    Raises:
        DataError: no images there.
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown preset, field or device, or a batch of one image.
    """
    if recipe.optimization.batch_size < 2:
        raise UsageError("Views are compared between images", where="batch_size", got=1, expected="at least 2")
    notes: list[str] = []
    train, val = open_images(images, recipe.images, recipe.run.seed, notes, out)
    if len(val) < 2:
        raise DataError(
            "Views are compared between images",
            where=val.source,
            got="1 held-out image",
            expected="at least 2 held-out images",
            remedy="Raise val_fraction.",
        )
    device = choose_place(recipe.run, world)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        _, model = build_model(recipe.model, 1, notes, came_from=came_from)
        detector: Any = model
        detector.backbone.freeze(0)
        task = BarlowTwins(detector.backbone, width=recipe.pretext.width)
    equipment = equip(task, recipe, device)
    augmentation, seed = _augmentation(recipe.pretext), recipe.run.seed
    trained = sum(parameter.numel() for parameter in task.backbone.parameters() if parameter.requires_grad)
    notes.append(
        f"Backbone {detector.config.backbone} of {recipe.model.model}: {trained / 1e6:.1f} M parameters, all trained, "
        f"views of {augmentation.size} pixels, on {device} in {str(equipment['dtype']).removeprefix('torch.')}"
    )
    return BackboneSession(
        recipe=recipe,
        world=world,
        workers=count_workers(recipe.images.workers),
        notes=tuple(notes),
        backbone=detector.config.backbone,
        criterion=RedundancyReduction(recipe.pretext.redundancy_weight),
        train=ViewDataset(train, augmentation, seed),
        val=ViewDataset(val, augmentation, seed, evaluation=True),
        **equipment,
    )


def _augmentation(asked: ViewOptions) -> ViewAugmentation:
    return ViewAugmentation(
        size=asked.view_size,
        smallest=asked.smallest,
        largest=asked.largest,
        most_elongated=asked.most_elongated,
        flip=asked.flip,
        vertical_flip=asked.vertical_flip,
        quarter_turn=asked.rotate90,
        jitter=asked.jitter,
        grayscale=asked.grayscale,
        blur=asked.blur,
    )
