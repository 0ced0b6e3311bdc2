"""The pre-training of a detector by random query patch detection: what the loop asks of its task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from torch import nn

from detrkit.arithmetic import choose_dtype
from detrkit.checkpoint import TrainingState, model_folder
from detrkit.data.crops import (
    Crops,
    ImageResizing,
    PatchAugmentation,
    StratifiedCrops,
    UniformCrops,
    pretraining_sizes,
)
from detrkit.data.dataset import Key
from detrkit.data.order import EpochBatches
from detrkit.data.patches import LoadedPatches, PatchDataset, evaluation_patches, patch_batches
from detrkit.data.pictures import Pictures
from detrkit.data.problems import Problems
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.losses.criterion import Losses, SetCriterion
from detrkit.nn.weights import RANDOM
from detrkit.pretrain import saved
from detrkit.pretrain.features import FeatureDataset, LoadedFeatures, evaluation_features, feature_batches
from detrkit.pretrain.figures import PatchFigures, alarms, conclusion
from detrkit.pretrain.page import patch_sheets, write_patch_page
from detrkit.pretrain.regions import RegionFigures
from detrkit.pretrain.up_detr import PatchCriterion, PatchPredictions, UpDetr, criterion, detection_criterion
from detrkit.sources import locate
from detrkit.structures import FeatureBatch, PatchBatch, Predictions, Target
from detrkit.training.conduct import check_data
from detrkit.training.distributed import World
from detrkit.training.kept import flags_of_crops, keep, note_left_out, refuse_contradictions, with_pixels
from detrkit.training.pretext import PatchOptions, PatchRecipe
from detrkit.training.session import Session, Validation
from detrkit.training.setup import build_model, choose_place, count_workers, equip
from detrkit.training.unlabelled import Sources, describe, figures_so_far, missing, open_images
from detrkit.training.validation import forgiving

HEADLINE = ("recall50", "recall75", "consistency")
REGIONS = "region_recall50"


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class PatchSession(Session[PatchBatch | FeatureBatch]):
    """Random query patch detection on unlabelled images.

    Attributes:
        recipe: the resolved recipe.
        model: the task, which holds the detector.
        criterion: its loss.
        unasked: the loss of what the detector finds without a patch, where it is asked for regions, too.
        train: images with patches to train on, or their features.
        val: the held-out ones.
        pictures: the images of both parts.
    """

    recipe: PatchRecipe
    model: UpDetr
    criterion: PatchCriterion
    unasked: SetCriterion | None
    train: PatchDataset | FeatureDataset
    val: PatchDataset | FeatureDataset
    pictures: Mapping[str, Pictures]

    @property
    def count(self) -> int:
        """Images of the training set."""
        return len(self.train)

    @property
    def size_of(self) -> Callable[[Key], tuple[int, int]] | None:
        """Those of the features, where the recipe asks for it."""
        if isinstance(self.train, FeatureDataset) and self.recipe.pretext.group_sizes:
            return self.train.size
        return None

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedPatches | LoadedFeatures]:
        """Images, and patches of them that are recoloured and blurred by chance; or the features of both."""
        pin = self.device.type == "cuda"
        if isinstance(self.train, FeatureDataset):
            return feature_batches(self.train, sampler, workers=self.workers, pin_memory=pin)
        return patch_batches(self.train, sampler, workers=self.workers, pin_memory=pin)

    def counts(self, batch: PatchBatch | FeatureBatch) -> tuple[int, int]:
        """Patches, and regions that stand out."""
        regions = batch.regions if isinstance(batch, FeatureBatch) else ()
        return batch.boxes.shape[:2].numel(), sum(len(region.labels) for region in regions)

    def losses(self, model: nn.Module, batch: PatchBatch | FeatureBatch, counts: Sequence[float]) -> Losses:
        """Predictions against the places of the patches.

        There is but one class, so how often it is mistaken says nothing: `class_error` is NaN.
        """
        batch = batch.to(self.device)
        with self.arithmetic():
            found, unasked = self._answer(model, batch)
        patches, regions = counts
        losses = self.criterion(found, batch.boxes, self.model.group, patches, names=batch.names)
        if self.unasked is not None and unasked is not None and isinstance(batch, FeatureBatch):
            others = self.unasked(unasked, self._targets(batch), regions)
            losses = losses.beside(others, "region_", self.recipe.pretext.regions_weight)
        return losses._replace(class_error=torch.full_like(losses.class_error, torch.nan))

    def _answer(
        self, model: nn.Module, batch: PatchBatch | FeatureBatch
    ) -> tuple[PatchPredictions, Predictions | None]:
        """What is said of the patches and, where that is asked, of the image without any."""
        known, also_unasked = isinstance(batch, FeatureBatch), self.unasked is not None
        found = model(self.laid_out(batch.images), batch.padding, batch.patches, known=known, also_unasked=also_unasked)
        return found if also_unasked else (found, None)

    def _targets(self, batch: FeatureBatch) -> list[Target]:
        """The regions of a batch, of the detector's last class."""
        return [region._replace(labels=region.labels + self._num_classes - 1) for region in batch.regions]

    def names(self, batch: PatchBatch | FeatureBatch) -> Sequence[str]:
        """The images' files."""
        return batch.names

    def evaluate(self, out: Path, epoch: int) -> Validation:
        """Figures on the held-out images, of which recall at IoU 0.5 chooses; a page of samples for each epoch."""
        task = cast(UpDetr, self.evaluated_model).eval()
        figures, problems = PatchFigures(self._num_classes), Problems()
        regions = RegionFigures(self._num_classes)
        for batch, found, unasked in self._answers(task, self.world.share_of(range(len(self.val))), problems):
            figures.add(found, batch, task.group)
            if unasked is not None and isinstance(batch, FeatureBatch):
                regions.add(unasked, batch.regions)
        parts = self.world.gather((figures, problems, regions))
        shared: Validation = self.world.share(self._validation(parts, out) if self.world.is_main else None)
        notes = list(shared.notes)
        if self.world.is_main and self.run.samples:
            with forgiving(notes):
                self._draw(task, out / "samples" / f"epoch-{epoch:04d}", f"{out.name}, epoch {epoch}", shared)
        return replace(shared, notes=tuple(notes))

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder of the detector that `detrkit.load` takes, with the task's heads beside it."""
        task = cast(UpDetr, self.evaluated_model)
        saved.save(folder, task, preset=self.recipe.model.model, about={**about, **self._about()})

    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write the same of the weights in training, with the state."""
        saved.save(folder, self.model, preset=self.recipe.model.model, about=self._about(), state=state)

    def fill(self, folder: Path) -> None:
        """Give the task the weights of such a folder."""
        saved.fill(self.model, folder)

    def describe(self) -> dict[str, Any]:
        """The images of both parts."""
        return {"splits": {name: describe(part) for name, part in self.pictures.items()}}

    @property
    def _num_classes(self) -> int:
        config: Any = self.model.detector.config
        return int(config.num_classes)

    def _about(self) -> dict[str, Any]:
        """What a model says of its pre-training; not where the images lay."""
        pictures = self.pictures["train"]
        return {saved.PRETEXT: {"images": len(pictures), "fingerprint": pictures.fingerprint()}}

    def _answers(
        self, task: UpDetr, indices: Sequence[int], problems: Problems
    ) -> Iterator[tuple[PatchBatch | FeatureBatch, PatchPredictions, Predictions | None]]:
        """The held-out images of the indices in batches, and what is found in them; counts those that are unusable."""
        size, batches = min(self.optimization.batch_size, 16), cast(Iterator[PatchBatch | FeatureBatch], iter(()))
        if isinstance(self.val, FeatureDataset):
            batches = evaluation_features(self.val, size, workers=self.workers, indices=indices)
        else:
            batches = evaluation_patches(
                self.val,
                size,
                workers=self.workers,
                problems=problems,
                indices=indices,
                pin_memory=self.device.type == "cuda",
            )
        for batch in batches:
            batch = batch.to(self.device)
            with torch.no_grad():
                yield batch, *self._answer(task, batch)

    def _validation(self, parts: Sequence[tuple[PatchFigures, Problems, RegionFigures]], out: Path) -> Validation:
        figures, problems = PatchFigures.merged([part for part, _, _ in parts]), Problems()
        for _, found, _ in parts:
            problems.merge(found)
        result, earlier = figures.result(), figures_so_far(out)
        first, before = (earlier[0], earlier[-1]) if earlier else (result, None)
        sentence = conclusion(first, result, figures.images, figures.patches, before=before)
        unasked = RegionFigures.merged([part for _, _, part in parts])
        regions = unasked.result() if self.unasked is not None else {}
        return Validation(
            figures={**result, **regions},
            chosen_by="recall50",
            headline=(*HEADLINE, *([REGIONS] if regions else [])),
            notes=(*alarms(result), *missing(problems, len(self.val))),
            conclusion=sentence + unasked.sentence(),
        )

    def _draw(self, task: UpDetr, folder: Path, title: str, found: Validation) -> None:
        """A page of some fixed images, spread over the held-out ones."""
        count = min(self.run.samples, len(self.val))
        chosen = np.unique(np.linspace(0, len(self.val) - 1, count).round().astype(int)).tolist()
        sheets = []
        for index in chosen:
            for batch, answers, _ in self._answers(task, [index], Problems()):
                # The features are there, but the file that they were made of may have gone: then there is no picture.
                with contextlib.suppress(DataError):
                    pixels = batch
                    if isinstance(batch, FeatureBatch):
                        pixels = with_pixels(batch, self.pictures["val"], self.recipe.pretext.patch_size)
                    sheets += patch_sheets(answers, cast(PatchBatch, pixels), task.group, self._num_classes)
        write_patch_page(folder, title, sheets, found.figures, found.conclusion)


def prepare_patches(
    recipe: PatchRecipe,
    images: Sources,
    world: World,
    out: Path,
    *,
    came_from: str = "",
    on_picture: Callable[[int, int], None] | None = None,
) -> PatchSession:
    """Open the images, build the detector and the task around it, load their weights.

    Args:
        recipe: the resolved recipe.
        images: folders, images and tar shards.
        world: the processes that train together.
        out: the run folder, where features are kept.
        came_from: what the run noted of its first weights, where a checkpoint follows: then they are not loaded again.
        on_picture: called with the number of images whose features are kept, and of all.

    Raises:
        DataError: no images there.
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown preset, field or device; more patches than queries; or a backbone that would see nothing.
    """
    notes: list[str] = []
    refuse_contradictions(recipe.pretext)
    train, val = open_images(images, recipe.images, recipe.run.seed, notes, out)
    check_data(out, {"train": describe(train), "val": describe(val)})  # before features of others replace the kept ones
    device = choose_place(recipe.run, world)
    task = _build(recipe, notes, came_from)
    equipment = equip(task, recipe, device, task.detector)
    _refuse_blindness(task, recipe)
    asked, resizing = recipe.pretext, _resizing(recipe.pretext, task.detector)
    notes.append(_summary(task, recipe, resizing, device))
    seed, workers = recipe.run.seed, count_workers(recipe.images.workers)
    parts: dict[str, PatchDataset] | dict[str, FeatureDataset]
    if asked.shown == "features":
        parts = keep(
            task.detector,
            {"train": train, "val": val},
            resizing,
            _crops(asked),
            asked,
            seed,
            notes,
            out=out,
            goes_on=bool(came_from),
            workers=workers,
            world=world,
            on_picture=on_picture,
        )
        notes.extend(note_left_out(parts["train"].store.lost + parts["val"].store.lost, out, world))
    else:
        parts = _cut(train, val, asked, resizing, seed)
    return PatchSession(
        recipe=recipe,
        world=world,
        workers=workers,
        notes=tuple(notes),
        criterion=_criterion(task, asked),
        unasked=detection_criterion(task.detector) if asked.regions_weight else None,
        train=parts["train"],
        val=parts["val"],
        pictures={"train": train, "val": val},
        **equipment,
    )


def _cut(
    train: Pictures, val: Pictures, asked: PatchOptions, resizing: ImageResizing, seed: int
) -> dict[str, PatchDataset]:
    """Images whose patches are cut anew each time."""
    augmentation = PatchAugmentation(
        size=asked.patch_size, jitter=asked.jitter, grayscale=asked.grayscale, blur=asked.blur
    )
    shared = (_crops(asked), augmentation, resizing, asked.patches, seed)
    return {"train": PatchDataset(train, *shared), "val": PatchDataset(val, *shared, evaluation=True)}


def _criterion(task: UpDetr, asked: PatchOptions) -> PatchCriterion:
    return criterion(
        task.detector,
        asked.patches,
        match=asked.match,
        tie_no_object=asked.tie_no_object,
        reconstruction_weight=asked.reconstruction_weight,
    )


def _build(recipe: PatchRecipe, notes: list[str], came_from: str) -> UpDetr:
    """The task around a detector of one class, in which the weights are that the recipe asks for."""
    asked = recipe.pretext
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        _, detector = build_model(recipe.model, 1, notes, ["patch"], came_from=came_from)
        task = UpDetr(
            detector,
            patches=asked.patches,
            mask_out=asked.mask_out,
            mask_out_of=asked.mask_out_of,
            shuffle=asked.shuffle,
            reconstruct=asked.reconstruction_weight > 0,
            place=asked.place,
            start=asked.start,
            frozen_backbone=not asked.train_backbone,
        )
    if recipe.model.init and not came_from:
        notes.extend(_start_heads(task, recipe.model.init))
    return task


def _start_heads(task: UpDetr, init: str) -> list[str]:
    """Take the heads over, too, where the run starts from another pre-training."""
    place = locate(init)
    folder = model_folder(place.path) if place.is_ours else place.path
    if not (folder / f"{saved.PRETEXT}.safetensors").is_file():
        return []
    try:
        saved.fill_heads(task, folder)
    except ModelError:
        return ["The heads of the pretext task are other ones than there, and begin anew"]
    return ["The heads of the pretext task are kept, too"]


def _refuse_blindness(task: UpDetr, recipe: PatchRecipe) -> None:
    """A backbone that starts at random and does not train says nothing of images, and nothing would show it."""
    backbone: Any = task.detector.backbone
    if recipe.model.backbone_weights != RANDOM or recipe.model.init or _trained(backbone):
        return
    raise UsageError(
        "The backbone starts at random and does not train, so that it sees nothing",
        where="backbone_weights",
        got=RANDOM,
        expected="weights of a backbone that was trained on images",
        remedy="Give it weights (--backbone-weights FILE), make them from the images themselves (detrkit pretrain "
        "IMAGES --task backbone), or let it train along "
        f"({flags_of_crops(recipe.pretext, '--train-backbone')}).",
    )


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _crops(asked: PatchOptions) -> Crops:
    if asked.crops == "uniform":
        return UniformCrops()
    return StratifiedCrops(asked.smallest, asked.largest, asked.most_elongated)


def _resizing(asked: PatchOptions, detector: nn.Module) -> ImageResizing:
    config: Any = detector.config
    shortest, longest = (asked.shortest, None) if asked.shortest else (config.image_size, config.longest)
    return ImageResizing(**pretraining_sizes(shortest, longest, asked.multi_scale)._asdict(), flip=asked.flip)


def _summary(task: UpDetr, recipe: PatchRecipe, resizing: ImageResizing, device: torch.device) -> str:
    backbone: Any = task.detector.backbone
    frozen = "" if _trained(backbone) else " (backbone frozen)"
    total = sum(parameter.numel() for parameter in task.parameters())
    least, most = min(resizing.sizes), max(resizing.sizes)
    shown = f"patches of {recipe.pretext.patch_size} pixels" if recipe.pretext.shown == "crops" else "places"
    return (
        f"Model {recipe.model.model}: {total / 1e6:.1f} M parameters, {_trained(task) / 1e6:.1f} M of them "
        f"trained{frozen}, {task.patches} {shown} an image, images "
        f"{least if least == most else f'{least} to {most}'} (at most {resizing.longest}) pixels, on {device} in "
        f"{str(choose_dtype(recipe.optimization.precision, device)).removeprefix('torch.')}"
    )
