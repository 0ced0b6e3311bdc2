"""The training of a one-shot detector on episodes: what the loop asks of its task."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from torch import nn

from detrkit.checkpoint import TrainingState, model_folder, read_tensors
from detrkit.convert.keys import shortened
from detrkit.data.annotations import Annotations
from detrkit.data.dataset import DetectionDataset
from detrkit.data.episodes import LoadedEpisodes, PackedEpisodes, PairDataset, episode_batches
from detrkit.data.order import EpochBatches
from detrkit.errors import DataError, MissingExtraError, ModelError, UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.evaluation.one_shot import draw_questions
from detrkit.losses.criterion import Losses, SetCriterion
from detrkit.one_shot import saved
from detrkit.one_shot.finder import Finder
from detrkit.one_shot.model import OneShot
from detrkit.one_shot.protocol import Calibrated, OneShotEvaluation, calibrate, evaluate_one_shot
from detrkit.pretrain.saved import is_pretrained
from detrkit.pretrain.saved import load as load_pretext
from detrkit.pretrain.up_detr import detection_criterion
from detrkit.sources import locate, open_model
from detrkit.training.detection import describe
from detrkit.training.distributed import World
from detrkit.training.episode_recipe import EpisodeRecipe
from detrkit.training.session import Session, Validation
from detrkit.training.setup import (
    build_model,
    choose_place,
    count_workers,
    equip,
    make_transform,
)
from detrkit.training.splits import open_splits
from detrkit.training.validation import draw_samples, forgiving
from detrkit.visualize.plots import plot_reliability

SEEN, UNSEEN = "AP50_seen", "AP50_unseen"


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class EpisodeSession(Session[PackedEpisodes]):
    """Episodes on annotated images.

    Attributes:
        recipe: the resolved recipe.
        model: the one-shot detector.
        criterion: the detector's loss, which here knows one class.
        pairs: training images, each with a mate.
        train: annotations of the training split, without images of unseen classes.
        val: annotations of the validation split.
        seen: labels of the classes that training shows.
    """

    recipe: EpisodeRecipe
    model: OneShot
    criterion: SetCriterion
    pairs: PairDataset
    train: Annotations
    val: Annotations
    seen: tuple[int, ...]

    @property
    def count(self) -> int:
        """Images of the training split."""
        return len(self.pairs)

    def batches(self, sampler: EpochBatches) -> Iterator[LoadedEpisodes]:
        """Augmented images, and what is looked for in them."""
        asked = self.recipe.episodes
        return episode_batches(
            self.pairs,
            sampler,
            labels=self.seen,
            questions=asked.questions,
            turned=asked.turned,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )

    def counts(self, batch: PackedEpisodes) -> tuple[int]:
        """Instances of what is looked for."""
        return (sum(len(target.labels) for target in batch.targets),)

    def losses(self, model: nn.Module, batch: PackedEpisodes, counts: Sequence[float]) -> Losses:
        """Predictions against all instances of what is looked for; matching is binary, as there is but one class."""
        ready = batch.to(self.device)
        with self.arithmetic():
            found = model(self.laid_out(ready.images), ready.padding, ready.asked, ready.source, ready.exemplars)
        targets = [target._replace(labels=target.labels + self.model.matched) for target in ready.targets]
        losses = self.criterion(found, targets, *counts)
        return losses._replace(class_error=torch.full_like(losses.class_error, torch.nan))

    def names(self, batch: PackedEpisodes) -> Sequence[str]:
        """The images' files."""
        return batch.names

    def evaluate(self, out: Path, epoch: int) -> Validation:
        """AP50 of what is found by example on the validation split; that of the seen classes chooses.

        Scores are calibrated on the same questions; how honest they are is drawn of half of the images, with the
        calibration of the other half.
        """
        validation = self._validated(out, epoch) if self.world.is_main else None
        shared: Validation = self.world.share(validation)
        return shared

    def save_best(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder that `detrkit.load` takes."""
        model = cast(OneShot, self.evaluated_model)
        told = {**self._about(), **about.get(saved.ONE_SHOT, {})}
        saved.save(folder, model, preset=self.recipe.model.model, about={**about, saved.ONE_SHOT: told})

    def save_training(self, folder: Path, state: TrainingState) -> None:
        """Write the weights in training with the state."""
        about = {saved.ONE_SHOT: self._about()}
        saved.save(folder, self.model, preset=self.recipe.model.model, about=about, state=state)

    def fill(self, folder: Path) -> None:
        """Give the model the weights of such a folder."""
        saved.fill(self.model, folder)

    def describe(self) -> dict[str, Any]:
        """The category table, and both splits."""
        return {
            "categories": [category.to_json() for category in self.train.categories],
            "splits": {"train": describe(self.train), "val": describe(self.val)},
        }

    def _about(self) -> dict[str, Any]:
        """What a model says of how it learnt to find by example."""
        return {"seen": [self.train.categories[label].name for label in self.seen]}

    def _asked(self) -> OneShotEvaluation:
        model = cast(OneShot, self.evaluated_model).eval()
        config: Any = model.detector.config
        return evaluate_one_shot(
            Finder(model),
            self.val,
            sizes=(config.image_size, config.longest),
            seen=_labels(self.val, [self.train.categories[label].name for label in self.seen]),
            seed=self.run.seed,
            draws=self.recipe.episodes.draws,
            ask_absent=True,
            workers=self.workers,
        )

    def _validated(self, out: Path, epoch: int) -> Validation:
        found = self._asked()
        calibrated, note = _calibrated(found)
        notes = [note] if note else []
        with forgiving(notes):
            if calibrated is not None:
                _plot(calibrated, out / "plots" / "reliability.png")
            if self.run.samples:
                threshold = 0.5 if calibrated is None else _raw(0.5, calibrated.calibration)
                file = out / "samples" / f"epoch-{epoch:04d}.jpg"
                draw_samples(self.val, found.draws[0], self.run.samples, file, threshold)
        return self._validation(found, calibrated, notes)

    def _validation(self, found: OneShotEvaluation, calibrated: Calibrated | None, notes: Sequence[str]) -> Validation:
        figures = dict(found.metrics.figures)
        told: dict[str, Any] = self._about()
        if calibrated is not None:
            figures |= {"ece": calibrated.after.ece, "ece_before": calibrated.before.ece}
            told["calibration"] = calibrated.calibration._asdict()
        return Validation(
            figures=figures,
            chosen_by=SEEN,
            headline=(SEEN, *([UNSEEN] if self.recipe.episodes.unseen else []), "ece"),
            about={saved.ONE_SHOT: told},
            notes=tuple(notes),
        )


def prepare_episodes(recipe: EpisodeRecipe, data: str | Path, world: World, *, came_from: str = "") -> EpisodeSession:
    """Open the data, build the one-shot detector, load its weights.

    Args:
        recipe: the resolved recipe.
        data: the data set.
        world: the processes that train together.
        came_from: what the run noted of its first weights, where a checkpoint follows: then they are not loaded again.

    Raises:
        DataError: no data set there, or no class in two images.
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown class, preset, field or device.
    """
    notes: list[str] = []
    train, val = open_splits(data, recipe.data, recipe.run.seed, notes)
    train, seen = _without(train, recipe.episodes.unseen, notes)
    if recipe.episodes.val_limit:
        val = val.select(range(min(len(val), recipe.episodes.val_limit)))
    _check_val(val, train, seen)
    device = choose_place(recipe.run, world)
    model = _build(recipe, notes, came_from)
    equipment = equip(model, recipe, device, model.detector)
    config: Any = model.detector.config
    transform = make_transform(recipe.augmentation, config.image_size, config.longest)
    dtype = equipment["dtype"]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    notes.append(
        f"Model {recipe.model.model}, to find by example: {trained / 1e6:.1f} M parameters trained, images "
        f"{config.image_size} (at most {config.longest}) pixels, on {device} in {str(dtype).removeprefix('torch.')}"
    )
    return EpisodeSession(
        recipe=recipe,
        world=world,
        workers=count_workers(recipe.data.workers),
        notes=tuple(notes),
        criterion=detection_criterion(model.detector),
        pairs=PairDataset(DetectionDataset(train, transform, recipe.run.seed), seen),
        train=train,
        val=val,
        seen=seen,
        **equipment,
    )


def _without(train: Annotations, unseen: str, notes: list[str]) -> tuple[Annotations, tuple[int, ...]]:
    """The training images that hold none of the unseen classes, and the labels of the others.

    An image with an object that nobody may ask for would teach that it is background.

    Raises:
        DataError: every image holds such a class.
        UsageError: there is no such class, or no other.
    """
    names = [category.name for category in train.categories]
    wanted = [name.strip() for name in unseen.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in names]:
        close = difflib.get_close_matches(unknown[0], names, 1)
        raise UsageError(
            "There is no such class to leave unseen",
            where="unseen",
            got=repr(unknown[0]),
            expected=", ".join(names[:20]),
            remedy=f"Did you mean {close[0]!r}?" if close else "",
        )
    hidden = [names.index(name) for name in wanted]
    seen = tuple(label for label in range(len(names)) if label not in hidden)
    if not seen:
        raise UsageError("Every class is to be unseen, so there is nothing to learn from", where="unseen", got=unseen)
    if not hidden:
        return train, _shown(train, seen, notes)
    owner = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    kept = np.setdiff1d(np.arange(len(train)), owner[np.isin(train.labels, hidden)])
    if not len(kept):
        raise DataError("Every training image holds a class that is to be unseen", where=train.source, got=unseen)
    notes.append(
        f"Unseen: {', '.join(wanted)}; {len(train) - len(kept):,} training images that hold such are left out, "
        f"{len(kept):,} remain"
    )
    train = train.select(kept)
    return train, _shown(train, seen, notes)


def _shown(train: Annotations, labels: Sequence[int], notes: list[str]) -> tuple[int, ...]:
    """The labels of which there is a box; the others are unseen as well."""
    held = set(train.labels[~train.crowd].tolist())
    if without := [train.categories[label].name for label in labels if label not in held]:
        notes.append(f"Without a box in the training images, and so unseen, too: {shortened(without)}")
    return tuple(label for label in labels if label in held)


def _labels(annotations: Annotations, names: Sequence[str]) -> list[int]:
    """The labels of classes by name."""
    return [label for label, category in enumerate(annotations.categories) if category.name in names]


def _check_val(val: Annotations, train: Annotations, seen: Sequence[int]) -> None:
    """Refuse before the training a validation split that can ask nothing of a class that was seen.

    Raises:
        DataError: no seen class is in two of its images.
    """
    known = _labels(val, [train.categories[label].name for label in seen])
    if not known or not draw_questions(val, draw=0, seed=0, labels=known).asked:
        raise DataError(
            "Nothing can be asked of the validation images: no class that training sees is in two of them",
            where=val.source or val.root,
            got=f"{len(val)} images, {len(val.boxes)} boxes",
            remedy="Validate on more images (--val-limit 0, --val-fraction 0.2), or leave fewer classes unseen.",
        )


def _build(recipe: EpisodeRecipe, notes: list[str], came_from: str) -> OneShot:
    """The one-shot detector, in which the weights are that the recipe asks for."""
    asked = recipe.episodes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        _, detector = build_model(recipe.model, 1, notes, came_from=came_from)
        model = OneShot(detector, place=asked.place, prompted=asked.prompted, cells=asked.cells, width=asked.look_width)
        model.start_from_nothing() if asked.start == "nothing" else model.start_as_tokens()
    if recipe.model.init and not came_from:
        notes.extend(_start_heads(model, recipe.model.init, asked.start))
    return model


def _start_heads(model: OneShot, init: str, start: str) -> list[str]:
    """Take over what else is known there of finding by example, or of finding patches."""
    opened = open_model(init)
    if saved.is_one_shot(opened.about):
        folder = model_folder(locate(init).path)
        read_tensors(folder / f"{saved.ONE_SHOT}.safetensors")  # a damaged file is an error, another make is not
        try:
            saved.fill_heads(model, folder)
        except ModelError:
            return ["What was learnt there of finding by example is of another make, and begins anew"]
        return ["What was learnt there of finding by example is kept, too"]
    if not is_pretrained(opened.about) or model.exemplar_projection is None or start != "pretrained":
        return []
    task = load_pretext(locate(init).path)
    model.exemplar_projection.load_state_dict(task.patch_projection.state_dict())
    differs = f" (there they are added to the {task.place})" if task.place != model.place else ""
    return [f"Exemplars are shown to the queries as patches were in the pre-training{differs}"]


def _calibrated(found: OneShotEvaluation) -> tuple[Calibrated | None, str]:
    """A calibration, or why there is none."""
    try:
        return calibrate(found), ""
    except UsageError as error:
        return None, f"Scores are not calibrated: {error.what[0].lower()}{error.what[1:]}"


def _raw(probability: float, calibration: Calibration) -> float:
    """The score, before calibration, that means a probability."""
    logit = (math.log(probability / (1 - probability)) - calibration.shift) * calibration.temperature
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def _plot(calibrated: Calibrated, file: Path) -> None:
    with contextlib.suppress(MissingExtraError):  # `plots/README.txt` says what is missing
        plot_reliability({"before": calibrated.before, "after": calibrated.after}, file)
