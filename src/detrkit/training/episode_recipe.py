"""The recipe of one-shot detection: every choice of an episode training, declared once, with its meaning and unit.

Importing this module is cheap, for the sake of `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from detrkit.training.recipe import (
    AnyRecipe,
    AugmentationOptions,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    RunOptions,
    within,
)


@dataclass(frozen=True)
class EpisodeOptions:
    """What is asked for: all that is like an exemplar (UP-DETR, CVPR 2021, section 4.3; CoAE, NeurIPS 2019)."""

    unseen: str = ""
    """Names of classes that training never sees, separated by commas: images that hold one are left out of it. On the
    validation split they are asked for, too, which shows what is found of things that are new."""
    questions: int = field(default=3, metadata=within(1))
    """Classes that each image of a batch is asked for, at most: as many that it holds as there are but one, and others
    that it does not."""
    turned: float = field(default=0.0, metadata=within(0, 1))
    """Probability with which all images of a batch are mirrored and turned by quarters alike: a class is another one
    then, so that few classes teach as many. Not where things have a right way up and you look for nothing else."""
    prompted: bool = True
    """Tell the queries what is looked for: the exemplar's feature is added to all of them, as in the paper."""
    place: Literal["position", "content", "both"] = "position"
    """What of a query the exemplar's feature is added to; best as in the pre-training that the run starts from."""
    start: Literal["pretrained", "tokens", "nothing"] = "pretrained"
    """How the projection of exemplars starts: as that of patches in the pre-training (without one, as `tokens`); as the
    projection of the image's tokens; or so that queries are told nothing at first, and learn to listen."""
    cells: int = field(default=3, metadata=within(1))
    """A place that was found is compared with the exemplar in so many parts along each side."""
    look_width: int = field(default=128, metadata=within(1))
    """Numbers that the look of a place is projected to, to be compared."""
    draws: int = field(default=1, metadata=within(1))
    """Draws of exemplars at each evaluation of the training; the protocol has five."""
    val_limit: int = field(default=100, metadata=within(0))
    """Evaluate on so many of the validation images, the first ones; 0: on all."""


def _usual() -> OptimizationOptions:
    return OptimizationOptions(epochs=300)


@dataclass(frozen=True)
class EpisodeRecipe(AnyRecipe):
    """A training of a one-shot detector. `batch_size` counts images without the mate that each of them brings along."""

    task: ClassVar[str] = "one-shot"

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    episodes: EpisodeOptions = field(default_factory=EpisodeOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    optimization: OptimizationOptions = field(default_factory=_usual)
    run: RunOptions = field(default_factory=RunOptions)
