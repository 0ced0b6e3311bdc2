"""The recipe of segmentation: every choice of the training of a mask head, declared once, with its meaning and unit.

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
class MaskOptions:
    """How objects get their masks (DETR, ECCV 2020, section 5)."""

    frozen_detector: bool = False
    """Train the mask head alone, on a detector that is finished (`init`): the paper's second stage. Otherwise boxes and
    masks are learnt together."""
    mask_attention: Literal["joint", "per-head", "peak"] = "joint"
    """How attention maps are normalised: to a sum of one over all heads and positions at once (DETR), over the
    positions of each head (UP-DETR), or to a greatest value of one in each head (ours)."""
    mask_box: bool = False
    """Tell the mask head the predicted box as well, as a map beside those of attention; the paper's does not."""
    mask_weight: float = field(default=1.0, metadata=within(0))
    """Weight of the focal loss of masks."""
    dice_weight: float = field(default=1.0, metadata=within(0))
    """Weight of the Dice loss of masks."""
    mask_chunk: int = field(default=8, metadata=within(1))
    """Masks that are computed together: less takes less memory and more time, and changes nothing else."""


@dataclass(frozen=True)
class SegmentationRecipe(AnyRecipe):
    """A training of a detector with a mask head."""

    task: ClassVar[str] = "segmentation"

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)
