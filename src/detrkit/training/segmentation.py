"""The training of a mask head, alone or with its detector: what the loop asks of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import nn

from detrkit.checkpoint import TrainingState
from detrkit.convert import load_strictly
from detrkit.data.annotations import Annotations
from detrkit.data.dataset import DetectionDataset, Key
from detrkit.data.loading import LoadedBatch, training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedBatch
from detrkit.errors import ModelError, UsageError
from detrkit.holders import fill_segmenter, save_segmenter
from detrkit.losses.criterion import Losses, SetCriterion, pad_targets
from detrkit.losses.matching import Matches
from detrkit.models import Variant
from detrkit.predict import Detector
from detrkit.segmentation.model import Segmenter, Wanted, wanted_masks
from detrkit.sources import open_model
from detrkit.structures import Batch, Predictions
from detrkit.training.detection import describe
from detrkit.training.distributed import World
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.session import Session, Validation
from detrkit.training.setup import (
    build_model,
    choose_place,
    count_workers,
    equip,
    make_transform,
)
from detrkit.training.splits import open_splits
from detrkit.training.validation import draw_panoptic_samples, draw_samples, forgiving, judge


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentationSession(Session[PackedBatch | Batch]):
    """A detector with a mask head on images whose objects have masks.

    Attributes:
        recipe: the resolved recipe.
        model: the detector with its mask head.
        variant: the module of the detector's variant.
        criterion: the detector's loss.
        dataset: training examples, with masks.
        train: annotations of the training split.
        val: annotations of the validation split.
    """

    recipe: SegmentationRecipe
    model: Segmenter
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
        """Augmented images with their targets and masks."""
        return training_batches(self.dataset, sampler, workers=self.workers, pin_memory=self.device.type == "cuda")

    def counts(self, batch: PackedBatch | Batch) -> tuple[int]:
        """Boxes."""
        return (sum(len(target.labels) for target in batch.targets),)

    def losses(self, model: nn.Module, batch: PackedBatch | Batch, counts: Sequence[float]) -> Losses:
        """Predictions against targets, and the masks of the last layer's matches."""
        ready = batch.to(self.device)
        (num_boxes,) = counts
        padded, matches = pad_targets(ready.targets), list[Matches]()

        def wanted(predictions: Predictions) -> Wanted:
            matches.append(self.criterion.match(predictions, padded))
            return wanted_masks(matches[0], ready.targets, (ready.images.shape[-2], ready.images.shape[-1]))

        with self.arithmetic():
            found = model(self.laid_out(ready.images), ready.padding, wanted)
        options = self.recipe.masks
        losses = self.criterion.terms(found.predictions, padded, matches[0], num_boxes)
        losses = losses.of_last_layer("mask", found.terms.focal / num_boxes, options.mask_weight)
        return losses.of_last_layer("dice", found.terms.dice / num_boxes, options.dice_weight)

    def names(self, batch: PackedBatch | Batch) -> Sequence[str]:
        """The images' files."""
        return [target.name for target in batch.targets]

    def evaluate(self, out: Path, epoch: int) -> Validation:
        """COCO's figures of boxes and masks on the validation split; of panoptic data panoptic quality, too.

        Mask AP chooses the best checkpoint, of panoptic data PQ. Samples are drawn into `samples/`.
        """
        model = cast(Segmenter, self.evaluated_model).eval()
        detector = Detector(
            model.detector, self.variant, self.train.categories, self.recipe.model.model, self.device, segmenter=model
        )
        metrics, detections, maps = judge(
            detector,
            self.val,
            batch_size=max(self.optimization.batch_size, 4),
            workers=self.workers,
            world=self.world,
        )
        is_panoptic = "PQ" in metrics.figures
        notes: list[str] = []
        if self.world.is_main and self.run.samples:
            file = out / "samples" / f"epoch-{epoch:04d}.jpg"
            with forgiving(notes):
                if is_panoptic:
                    draw_panoptic_samples(self.val, maps, self.run.samples, file)
                else:
                    draw_samples(self.val, detections, self.run.samples, file, metrics.threshold)
        return Validation(
            figures=metrics.figures,
            chosen_by="PQ" if is_panoptic else "mask_AP",
            headline=("PQ", "mask_AP", "AP") if is_panoptic else ("mask_AP", "mask_AP50", "AP"),
            about={"threshold": metrics.threshold},
            metrics=metrics,
            notes=tuple(notes),
        )

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder that `detrkit.load` takes."""
        self._save(folder, cast(Segmenter, self.evaluated_model), about)

    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write a model folder with the state beside it."""
        self._save(folder, self.model, {}, state)

    def _save(
        self, folder: Path, model: Segmenter, about: Mapping[str, Any], state: TrainingState | None = None
    ) -> None:
        preset, categories = self.recipe.model.model, self.train.categories
        save_segmenter(folder, model, preset=preset, categories=categories, about=about, state=state)

    def fill(self, folder: Path) -> None:
        """Give the model the weights of a model folder."""
        fill_segmenter(self.model, folder)

    def describe(self) -> dict[str, Any]:
        """The category table, and both splits."""
        return {
            "categories": [category.to_json() for category in self.train.categories],
            "splits": {"train": describe(self.train), "val": describe(self.val)},
        }


def prepare_segmentation(
    recipe: SegmentationRecipe, data: str | Path, world: World, *, came_from: str = ""
) -> SegmentationSession:
    """Open the data with their masks, build the detector and its mask head, load their weights.

    Args:
        recipe: the resolved recipe.
        data: the data set.
        world: the processes that train together.
        came_from: what the run noted of its first weights, where a checkpoint follows: then they are not loaded again.

    Raises:
        DataError: no data set there, a split without images, boxes or masks.
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown preset, field or device, or a frozen detector that would start from nothing.
    """
    notes: list[str] = []
    if recipe.masks.frozen_detector and not recipe.model.init:
        raise UsageError(
            "A frozen detector has to be trained already",
            where="frozen_detector",
            got="no model to start from",
            remedy="Name it: --init RUN; or learn boxes and masks together: --no-frozen-detector.",
        )
    train, val = open_splits(data, recipe.data, recipe.run.seed, notes, masks=True)
    device = choose_place(recipe.run, world)
    variant, model = _build(recipe, train, notes, came_from)
    equipment = equip(model, recipe, device, model.detector)
    config: Any = model.detector.config
    transform = make_transform(recipe.augmentation, config.image_size, config.longest)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    which = "of the mask head alone" if recipe.masks.frozen_detector else "trained"
    notes.append(
        f"Model {recipe.model.model} with a mask head: {trained / 1e6:.1f} M parameters {which}, images "
        f"{config.image_size} (at most {config.longest}) pixels, on {device} in "
        f"{str(equipment['dtype']).removeprefix('torch.')}"
    )
    return SegmentationSession(
        recipe=recipe,
        world=world,
        variant=variant,
        criterion=variant.criterion(config),
        dataset=DetectionDataset(train, transform, recipe.run.seed),
        train=train,
        val=val,
        workers=count_workers(recipe.data.workers),
        notes=tuple(notes),
        **equipment,
    )


def _build(
    recipe: SegmentationRecipe, train: Annotations, notes: list[str], came_from: str
) -> tuple[Variant, Segmenter]:
    names = [category.name for category in train.categories]
    options = recipe.masks
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        variant, detector = build_model(recipe.model, len(names), notes, names, came_from=came_from)
        model = Segmenter(
            detector,
            attention=options.mask_attention,
            box=options.mask_box,
            chunk=options.mask_chunk,
            frozen=options.frozen_detector,
        )
    if recipe.model.init and not came_from:
        notes.append(_start_mask_head(model, recipe.model.init))
    return variant, model


def _start_mask_head(model: Segmenter, init: str) -> str:
    """Take over the mask head of the model to start from, where it has one."""
    other = open_model(init).segmenter
    if other is None:
        return "The mask head begins anew: the model to start from has none"
    own, theirs = model.mask_head, other.mask_head
    if own.attention != theirs.attention:
        return (
            "The mask head begins anew, as the one to start from normalises its attention maps in another way "
            f"(to keep it: --mask-attention {theirs.attention})"
        )
    try:
        load_strictly(own, theirs.state_dict())
    except ModelError:
        return "The mask head there is of another make, and begins anew"
    return "The mask head there is kept, too"
