"""From a recipe to the objects that a training needs. Here the recipe ends: everything below takes numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detrkit import models
from detrkit.arithmetic import choose_device, choose_dtype
from detrkit.checkpoint import SavedModel
from detrkit.convert.keys import shortened
from detrkit.data.annotations import Annotations
from detrkit.data.dataset import DetectionDataset
from detrkit.data.transforms import Training, TrainingSizes, training_sizes
from detrkit.errors import ModelError, UsageError
from detrkit.models import Variant
from detrkit.nn.recomputing import recompute
from detrkit.nn.weights import RANDOM, load_backbone_weights
from detrkit.sources import architecture_of, differences, open_model
from detrkit.training.checkup import notes_before, resolution_of
from detrkit.training.detection import DetectionSession
from detrkit.training.distributed import World, processors
from detrkit.training.ema import Average
from detrkit.training.optimizer import make_optimizer
from detrkit.training.recipe import (
    AnyRecipe,
    AugmentationOptions,
    ModelOptions,
    OptimizationOptions,
    Recipe,
    RunOptions,
)
from detrkit.training.splits import open_splits


def prepare(recipe: Recipe, data: str | Path, world: World, *, came_from: str = "") -> DetectionSession:
    """Open the data, build the model, load its weights.

    Args:
        recipe: the resolved recipe.
        data: the data set.
        world: the processes that train together.
        came_from: what the run noted of its first weights, where a checkpoint follows: then they are not loaded again.

    Raises:
        DataError: no data set there, a split without images, or no boxes to train on.
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown preset, field or device.
    """
    notes: list[str] = []
    train, val = open_splits(data, recipe.data, recipe.run.seed, notes)
    device = choose_place(recipe.run, world)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        variant, model = build_model(
            recipe.model,
            len(train.categories),
            notes,
            [category.name for category in train.categories],
            came_from=came_from,
        )
    config: Any = model.config
    resolution = resolution_of(recipe.model.model, config)
    notes.extend(notes_before(train, val, resolution, data, recipe.data.annotations))
    transform = make_transform(recipe.augmentation, config.image_size, config.longest)
    equipment = equip(model, recipe, device)
    dtype = equipment["dtype"]
    if recipe.model.backbone_weights == RANDOM and not recipe.model.init:
        notes.extend(_random_and_frozen(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    notes.append(
        f"Model {recipe.model.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{trained / 1e6:.1f} M of them trained{_frozen(recipe.optimization)}, "
        f"images {config.image_size} (at most {config.longest}) pixels, "
        f"on {device} in {str(dtype).removeprefix('torch.')}"
    )
    if (most := most_objects(train)) > config.num_queries:
        notes.append(
            f"An image holds {most} boxes but the model has {config.num_queries} queries and cannot find them all: "
            f"raise num_queries"
        )
    return DetectionSession(
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


def equip(
    model: nn.Module, recipe: AnyRecipe, device: torch.device, detector: nn.Module | None = None
) -> dict[str, Any]:
    """What every session needs to train a model, by the names of its fields: the model laid out on its device, the
    arithmetic, the optimiser, and the average where the recipe has one.

    Args:
        model: what trains.
        recipe: the resolved recipe.
        device: where to.
        detector: the module inside `model` whose parts the recipe can freeze; by default `model` itself.

    Raises:
        UsageError: a part to freeze that there is not, or nothing is left to train.
    """
    options = recipe.optimization
    model.to(device)
    if options.recompute != "none":
        recompute(model, backbone=options.recompute == "all")
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        "device": device,
        "dtype": choose_dtype(options.precision, device),
        "model": model,
        "optimizer": make_optimizer(model, options, detector),
        "average": Average(model, options.ema) if options.ema else None,
    }


def choose_place(options: RunOptions, world: World) -> torch.device:
    """The device of this process: of several, each has the GPU of its number; one alone has what the recipe says.

    Raises:
        UsageError: there is no such device.
    """
    return choose_device(f"cuda:{world.local_rank}" if world.size > 1 and torch.cuda.is_available() else options.device)


def count_workers(wanted: int) -> int:
    """How many processes load images: as wanted, or, of -1, as many as there are processors, up to 8."""
    return wanted if wanted >= 0 else min(8, processors())


def build_model(
    options: ModelOptions, num_classes: int, notes: list[str], names: Sequence[str] = (), *, came_from: str = ""
) -> tuple[Variant, nn.Module]:
    """The model of a preset with the weights that the recipe asks for.

    Args:
        options: the recipe's.
        num_classes: count of categories.
        notes: what the user should know is added here.
        names: the categories' names; where given, a class head for other names is not taken over.
        came_from: leave the model as it is initialised, for a checkpoint that follows, and note this.

    Raises:
        ModelError: weights that are missing or do not fit.
        UsageError: an unknown preset or field, or two sources of weights.
    """
    if refused := sorted({"num_classes", "preset"} & options.architecture.keys()):
        raise UsageError(
            f"The architecture does not take {refused[0]}",
            remedy="The number of classes comes from the data, the preset from --model.",
        )
    variant, config = models.configure(options.model, **options.architecture, num_classes=num_classes)
    if options.image_size:
        config = models.at_size(config, options.image_size, options.longest)
    elif options.longest:
        config = dataclasses.replace(config, longest=options.longest)
    if config.longest < config.image_size:
        raise UsageError(
            "The limit of the longer side is below the shorter side",
            got=f"longest {config.longest}, image_size {config.image_size}",
            remedy="Say both: --image-size and --longest.",
        )
    if options.init and options.backbone_weights not in ("", RANDOM):
        raise UsageError(
            "The weights to start from hold a backbone already",
            got=f"--init {options.init} and --backbone-weights {options.backbone_weights}",
            remedy="Leave one of them out.",
        )
    if options.backbone_weights == RANDOM and not options.init:
        config = dataclasses.replace(config, frozen_stages=0)  # what starts from nothing must train
    model = variant.Model(config)
    if came_from:
        notes.append(came_from)
    elif options.init:
        notes.append(start_from(model, options.init, names))
    else:
        backbone: Any = model.backbone
        report = load_backbone_weights(backbone, config.backbone, options.backbone_weights)
        notes.append(f"Backbone {config.backbone}: {report}")
    return variant, model


def start_from(model: nn.Module, name: str, names: Sequence[str] = ()) -> str:
    """Take over the weights of another model. Says what was taken.

    Args:
        model: keeps its own fresh class head where that of the other has another size, or is for other categories.
        name: what `detrkit.sources.open_model` takes.
        names: the categories' names, in order; without them only the class head's size counts.

    Raises:
        ModelError: nothing there, or another architecture: names what differs.
    """
    saved, own = open_model(name), model.state_dict()
    source = saved.model.state_dict()
    other_classes = bool(names) and [category.name for category in saved.categories] != list(names)
    differing = [key for key in own if key not in source or source[key].shape != own[key].shape]
    heads = models.class_heads(model)
    others = [key for key in [*differing, *sorted(source.keys() - own.keys())] if key not in heads]
    if others:
        raise _other_architecture(model, saved, name, others)
    anew = [key for key in heads if other_classes or key in differing]
    model.load_state_dict({**{key: source[key] for key in own if key not in anew}, **{key: own[key] for key in anew}})
    said = f"Start from {name}{f' ({saved.origin})' if saved.origin else ''}: {len(own) - len(anew)} tensors kept"
    said += ", its mask head's not among them" if saved.segmenter is not None else ""
    if anew:
        count, before = len(names) or _classes(model), len(saved.categories)
        change = f"{count} classes for {before}" if count != before else "for other categories"
        said += f", class head re-initialised ({change}: {', '.join(anew)})"
    left_out = [fate.source for fate in saved.report if fate.fate == "left out"]
    said += f"; left out: {shortened(left_out)}" if left_out else ""
    unseen = differences(saved.model.config, model.config).items()  # what no tensor shows, such as heads or dropout
    fields = ", ".join(f"{field} {there} there and {here} here" for field, (there, here) in unseen)
    return said + (f"; {fields}" if fields else "")


def _classes(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.num_classes)


def _other_architecture(model: nn.Module, saved: SavedModel, name: str, tensors: Sequence[str]) -> ModelError:
    """The error that says in which fields two architectures differ, and what to type."""
    theirs = type(saved.model).__module__.rpartition(".")[2]
    ours = type(model).__module__.rpartition(".")[2]
    preset, architecture = architecture_of(saved)
    fields = "".join(f" {field} {value}" for field, value in architecture.items())
    remedy = f"To take its architecture over, leave out --model and --architecture, or say: --model {preset}"
    if fields:
        remedy += f" --architecture{fields}"
    if ours != theirs:
        return ModelError(
            "The model to start from is of another variant", where=name, got=theirs, expected=ours, remedy=f"{remedy}."
        )
    config: Any = model.config
    differing = differences(saved.model.config, config)
    return ModelError(
        "The model to start from has another architecture",
        where=name,
        got="; ".join(
            [", ".join(f"{field} {value}" for field, (value, _) in differing.items()), shortened(list(tensors), 6)]
        ),
        expected=", ".join(f"{field} {value}" for field, (_, value) in differing.items()),
        remedy=f"{remedy}.",
    )


def make_transform(options: AugmentationOptions, shortest: int, longest: int) -> Training:
    """The training augmentation at a model's resolution."""
    sizes: TrainingSizes = training_sizes(shortest, longest)
    if not options.multi_scale:
        sizes = sizes._replace(sizes=(shortest,))
    shared: Mapping[str, Any] = sizes._asdict()
    return Training(
        **shared,
        flip=options.flip,
        crop=options.crop,
        min_visible=options.min_visible,
        photometric=options.photometric,
        vertical_flip=options.vertical_flip,
        quarter_turn=options.rotate90,
    )


def _random_and_frozen(model: nn.Module) -> list[str]:
    """What to say of a backbone that starts from nothing and stays so."""
    backbone: Any = model.backbone
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        return []
    return [
        "The backbone starts at random and does not train, so that it sees nothing: give it weights, or let it train"
    ]


def _frozen(options: OptimizationOptions) -> str:
    parts = [part.strip() for part in options.freeze.split(",") if part.strip()]
    if options.backbone_lr == 0 and "backbone" not in parts:
        parts.append("backbone")
    return f" ({', '.join(parts)} frozen)" if parts else ""


def most_objects(annotations: Annotations) -> int:
    """The most boxes in an image, without those of crowds, which are never targets; 0 where there are none."""
    owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    return int(np.bincount(owners[~annotations.crowd], minlength=1).max())
