"""The recipe that suits a data set and a machine, where the user has named none: each choice with its reason.

A pure function of facts. It starts from the packaged recipe and departs from it only where the data or the machine give
a reason: on a few hundred images of things of middling size it *is* that recipe.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from detrkit import models
from detrkit.arithmetic import choose_device
from detrkit.data.annotations import Annotations
from detrkit.data.doctor.findings import root_areas
from detrkit.errors import Error, ModelError
from detrkit.nn.weights import find_weight_file
from detrkit.training import recipe as recipes
from detrkit.training.checkup import resolution_of
from detrkit.training.distributed import processors
from detrkit.training.recipe import DEFAULT_MODEL, Recipe
from detrkit.training.setup import most_objects
from detrkit.training.splits import open_splits

LARGE_MODEL = "conditional-detr-r50"
MANY_IMAGES = 10_000
"""Below, a published model that starts from its backbone alone learns little; above, the small one leaves much."""

LARGE_MEMORY = 12.0
"""Gigabytes of a GPU that the large model asks for."""

LARGE_BATCH = 16
"""Images in a step of the published schedules."""

FEW, ENOUGH, ENOUGH_ON_GPU = 250, 500, 2000
"""The packaged recipe was measured on 250 images. With fewer, more epochs make as many steps; with more than the second
number fewer epochs will do, since time is short, and on a GPU with more than the third."""

FEWEST_EPOCHS, MOST_EPOCHS = 30, 500

SMALL_SHARE = 0.1
"""So many objects may be smaller than a token."""

NOTICEABLE = 0.1
"""The share of the objects that a larger size has to bring above a token, to be worth its time."""

SIZES = (320, 384, 448, 512, 640)
"""Shorter sides that are tried, in pixels."""

LARGEST_ON_CPU = 384

MOST_QUERIES = 900

GIGABYTES_PER_MEGAPIXEL = {DEFAULT_MODEL: 0.9, LARGE_MODEL: 2.2}
"""Memory that a training step takes for each image, in fp32, above that of the model: measured."""

KEPT_SIDES = 100_000

_HINT = (
    "Any of this can be said otherwise. For pictures without an up, as from a microscope, also say: vertical_flip 0.5, "
    "rotate90 0.5"
)


@dataclass(frozen=True)
class Facts:
    """What a training split is like.

    Attributes:
        images: how many.
        most_boxes: the most objects in an image.
        size: median height and width of the images in pixels; zeros where not known.
        sides: (k,) of a sample of the objects, the root of the area in pixels.
        frames: (k, 2) height and width of the image of each of them.
    """

    images: int
    most_boxes: int = 0
    size: tuple[int, int] = (0, 0)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(0))
    frames: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @staticmethod
    def of(train: Annotations) -> Facts:
        """The facts of a training split."""
        owners = np.repeat(np.arange(len(train)), np.diff(train.offsets))
        rows = np.flatnonzero(~train.crowd & (train.image_sizes[owners] > 0).all(1))
        rows = rows[:: max(1, len(rows) // KEPT_SIDES)]
        sizes = train.image_sizes[(train.image_sizes > 0).all(1)]
        height, width = np.median(sizes, 0).astype(int).tolist() if len(sizes) else (0, 0)
        sides, frames = root_areas(train.boxes[rows]), train.image_sizes[owners[rows]]
        return Facts(len(train), most_objects(train), (height, width), sides, frames)


@dataclass(frozen=True)
class Machine:
    """What a training may use.

    Attributes:
        processors: how many.
        memory: of the machine, or of its GPU, in gigabytes; 0 where not known.
        gpu: the name of the GPU that is trained on; empty: none.
        backbones: those whose weights lie here.
    """

    processors: int = 1
    memory: float = 0.0
    gpu: str = ""
    backbones: frozenset[str] = frozenset()

    @staticmethod
    def here(device: str = "auto") -> Machine:
        """The machine that runs this, where a training takes place on `device`."""
        gpu, memory = "", _memory()
        if (place := choose_device(device)).type == "cuda":
            properties = torch.cuda.get_device_properties(place)
            gpu, memory = properties.name, properties.total_memory / 1e9
        elif place.type == "mps":
            gpu = "mps"
        found = frozenset(name for name in ("mobilenet_v2", "mobilenet_v2_torchvision", "resnet50") if _is_here(name))
        return Machine(processors(), memory, gpu, found)


def _memory() -> float:
    """Gigabytes that this process may use; 0 where that is not to be known."""
    limit = Path("/sys/fs/cgroup/memory.max")
    known = []
    try:
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        known.append(int(limit.read_text()))
    except (AttributeError, OSError, ValueError):  # no such question on this system; no limit is "max"
        pass
    return min(known, default=0) / 1e9


def _is_here(backbone: str) -> bool:
    try:
        find_weight_file(backbone)
    except ModelError:
        return False
    return True


class Choice(NamedTuple):
    """Why something is as it is: `about` names the fields of the recipe, or of the architecture, that the reason speaks
    of, and `fields` are those that it changes in the packaged recipe.
    """

    about: tuple[str, ...]
    reason: str
    fields: Mapping[str, Any] = MappingProxyType({})


def advise(
    facts: Facts,
    machine: Machine,
    recipe_of: Callable[[str], Recipe] = recipes.of_preset,
    *,
    preset: str = "",
    image_size: int = 0,
    longest: int = 0,
) -> tuple[Choice, ...]:
    """What to train, and how.

    Args:
        facts: of the training split.
        machine: where it is trained.
        recipe_of: gives the packaged recipe of a preset, which holds for all that is not chosen.
        preset: the only one to be considered, where something else that was said belongs to it.
        image_size: the shorter side in pixels, where it was said.
        longest: the limit of the longer side in pixels, where it was said.

    Returns:
        The choices in the order in which they are told. The first one is the preset.
    """
    choices = [_preset(facts, machine, preset)]
    base = recipe_of(choices[0].fields["model"])
    if base.model.model == DEFAULT_MODEL and not preset and "mobilenet_v2" not in machine.backbones:
        choices += _other_backbone(machine)
    if not image_size:
        choices.append(_size(facts, machine, base, longest))
        image_size = choices[-1].fields.get("image_size", 0)
    choices += [
        _queries(facts, base),
        _schedule(facts, machine, base),
        _batch(facts, machine, base, image_size, longest),
    ]
    return (*choices, Choice((), _HINT))


def _preset(facts: Facts, machine: Machine, preset: str) -> Choice:
    where = machine.gpu or _count(machine.processors, "processor")
    if preset:
        return Choice(("model",), f"Preset {preset}: what else was said belongs to it", {"model": preset})
    enough = facts.images >= MANY_IMAGES and bool(machine.gpu) and machine.memory >= LARGE_MEMORY
    if enough and "resnet50" in machine.backbones:
        reason = f"Preset {LARGE_MODEL}: {facts.images:,} images are enough for a published model, on {where}"
        return Choice(("model",), reason, {"model": LARGE_MODEL})
    reason = f"Preset {DEFAULT_MODEL}: {_count(facts.images, 'training image')}, on {where}"
    if enough:
        reason += f"; {LARGE_MODEL} would suit these, too, but the weights of resnet50 are not on this machine"
    return Choice(("model",), reason, {"model": DEFAULT_MODEL})


def _other_backbone(machine: Machine) -> list[Choice]:
    """The same architecture in torchvision's conventions, where weights of that are at hand and no others."""
    other = "mobilenet_v2_torchvision"
    if other not in machine.backbones:
        return []
    reason = f"Backbone {other}: its weights are on this machine"
    return [Choice(("backbone",), reason, {"architecture": {"backbone": other}})]


def _size(facts: Facts, machine: Machine, base: Recipe, longest: int) -> Choice:
    """The least size at which few objects are smaller than a token; no larger than the images are, and none that brings
    few of them above it.
    """
    config = models.configure(base.model.model)[1]
    resolution = resolution_of(base.model.model, config, 0, longest)
    usual = resolution.image_size

    def scales(size: int, frames: np.ndarray) -> np.ndarray:
        return resolution_of(base.model.model, config, size, longest).scales(frames)

    def small(size: int) -> float:
        sides = scales(size, facts.frames) * facts.sides
        return float((sides < resolution.token).mean()) if len(sides) else 0.0

    about = ("image_size",)
    said = f"{small(usual):.0%} of the objects are smaller than one token ({resolution.token} pixels) at {usual}"
    if small(usual) <= SMALL_SHARE:
        return Choice(about, f"Images at {usual} pixels, the preset's own: {said}")
    most = SIZES[-1] if machine.gpu else LARGEST_ON_CPU
    allowed = [size for size in SIZES if usual < size <= min(most, longest or most)]
    able = [size for size in allowed if scales(size, np.array([facts.size]))[0] <= 1]
    if not able:
        why = "the images are no larger" if allowed else f"no side may be longer than {longest}"
        return Choice(about, f"Images at {usual} pixels: {said}, but {why}")
    chosen = next((size for size in able if small(size) <= SMALL_SHARE), able[-1])
    if small(chosen) > max(SMALL_SHARE, small(usual) - NOTICEABLE):
        reason = f"Images at {usual} pixels, the preset's own: {said}, and {small(chosen):.0%} at {chosen} still"
        return Choice(about, reason)
    cost = f"a step takes about {(chosen / usual) ** 2:.1f} times as long"
    reason = f"Images at {chosen} pixels instead of {usual}: {said}, {small(chosen):.0%} at {chosen}; {cost}"
    return Choice(about, reason, {"image_size": chosen})


def _queries(facts: Facts, base: Recipe) -> Choice:
    usual = int(models.configure(base.model.model)[1].num_queries)
    most = _count(facts.most_boxes, "object")
    if facts.most_boxes <= usual:
        return Choice(("num_queries",), f"{usual} queries, the preset's own: an image holds at most {most}")
    wanted = min(MOST_QUERIES, 50 * math.ceil(1.25 * facts.most_boxes / 50))
    lost = "" if facts.most_boxes <= wanted else ", of which it can find so many"
    reason = f"{wanted} queries instead of {usual}: an image holds up to {most}{lost}"
    return Choice(("num_queries",), reason, {"architecture": {"num_queries": str(wanted)}})


def _schedule(facts: Facts, machine: Machine, base: Recipe) -> Choice:
    """Epochs by steps; evaluations and checkpoints as many as in the packaged recipe."""
    usual = base.optimization.epochs
    if base.model.model != DEFAULT_MODEL:
        return Choice(("epochs",), f"{usual} epochs, the published schedule")
    enough = ENOUGH_ON_GPU if machine.gpu else ENOUGH
    fewer = max(FEWEST_EPOCHS, round(usual * enough / max(facts.images, 1)))
    more = min(MOST_EPOCHS, round(usual * FEW / max(facts.images, 1)))
    epochs = more if facts.images < FEW else min(usual, fewer) if facts.images > enough else usual
    steps = epochs * max(1, facts.images // base.optimization.batch_size)
    if epochs == usual:
        return Choice(("epochs",), f"{usual} epochs, the preset's own: about {steps:,} steps")
    share = epochs / usual
    fields = {
        "epochs": epochs,
        "evaluate_every": max(1, round(base.run.evaluate_every * share)),
        "save_every": max(1, round(base.run.save_every * share)),
    }
    reason = f"{epochs} epochs instead of {usual}: {_count(facts.images, 'image')}, about {steps:,} steps"
    return Choice(("epochs",), reason, fields)


def _batch(facts: Facts, machine: Machine, base: Recipe, image_size: int, longest: int) -> Choice:
    """Images of a step as in the recipe, in as many batches as the memory asks for."""
    model = base.model.model
    resolution = resolution_of(model, models.configure(model)[1], image_size, longest)
    height, width = facts.size if min(facts.size) else (resolution.image_size, resolution.longest)
    scale = float(resolution.scales(np.array([[height, width]]))[0])
    of_one = GIGABYTES_PER_MEGAPIXEL[model] * height * width * scale**2 / 1e6
    step = LARGE_BATCH if model == LARGE_MODEL else base.optimization.batch_size * base.optimization.accumulate
    batch = step
    while batch > 1 and machine.memory and batch * of_one > machine.memory / 2:
        batch //= 2
    usual, about = base.optimization, ("batch_size", "accumulate")
    if (batch, step // batch) == (usual.batch_size, usual.accumulate):
        return Choice(about, f"Batches of {batch}, the preset's own")
    fields = {"batch_size": batch, "accumulate": step // batch}
    if batch == step:
        return Choice(about, f"Batches of {batch}, as published", fields)
    reason = f"Batches of {batch}, of which {step // batch} make a step"
    return Choice(about, f"{reason}: an image takes about {of_one:.1f} GB of {machine.memory:.0f}", fields)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def without(choices: tuple[Choice, ...], given: Collection[str]) -> tuple[Choice, ...]:
    """What is left of the choices where some fields were said: not those that are about such a field, nor such a field
    of another.

    The architecture is no such field: what was said of it is joined with what is chosen.
    """
    said = set(given) - {"architecture"}
    return tuple(
        choice._replace(fields={name: value for name, value in choice.fields.items() if name not in said})
        for choice in choices
        if not said & set(choice.about)
    )


def revised(choices: tuple[Choice, ...], recipe_of: Callable[[str], Recipe] = recipes.of_preset) -> Recipe:
    """The packaged recipe of the preset with all that is chosen."""
    fields: dict[str, Any] = {}
    for choice in choices:
        architecture = {**fields.get("architecture", {}), **choice.fields.get("architecture", {})}
        fields |= {**choice.fields, "architecture": architecture}
    base = recipe_of(fields["model"])
    return recipes.revise(base, {**fields, "architecture": {**base.model.architecture, **fields["architecture"]}})


def reasons(
    choices: tuple[Choice, ...], recipe: Recipe, recipe_of: Callable[[str], Recipe] = recipes.of_preset
) -> tuple[str, ...]:
    """Why a recipe is what it is: the reasons of the choices, less those that something else was said about.

    Args:
        choices: what was advised; nothing gives no reason.
        recipe: what became of it.
        recipe_of: gives the packaged recipe of a preset.
    """
    if not choices:
        return ()
    advised, actual = (_values(one) for one in (revised(choices, recipe_of), recipe))
    return tuple(
        choice.reason for choice in choices if all(advised.get(name) == actual.get(name) for name in choice.about)
    )


def _values(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe by their names, those of the architecture among them."""
    table = recipes.fields(type(recipe))
    values = {name: getattr(getattr(recipe, section), name) for name, (section, _, _) in table.items()}
    return {**values, **recipe.model.architecture}


def advice_for(data: str | Path, given: Recipe) -> tuple[Choice, ...]:
    """What to advise for a data set on this machine; nothing where the data cannot be read, which training will say.

    Args:
        data: the data set.
        given: a recipe with what was said, which decides which images train and on which device.
    """
    try:
        train, _ = open_splits(data, given.data, given.run.seed, [])
        machine = Machine.here(given.run.device)
    except Error:
        return ()
    is_bound = bool(given.model.backbone_weights or given.model.architecture)
    preset = DEFAULT_MODEL if is_bound else ""
    size, longest = given.model.image_size, given.model.longest
    return advise(Facts.of(train), machine, preset=preset, image_size=size, longest=longest)
