"""The categories of COCO, which official checkpoints do not hold."""

from __future__ import annotations

from detrkit.data.coco_names import NAMES

__all__ = ["NAMES"]
