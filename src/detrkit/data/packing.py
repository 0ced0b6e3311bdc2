"""What travels from a worker that loads images, made small."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor


class PackedMasks(NamedTuple):
    """Masks with eight pixels in a byte, and their shape."""

    bits: np.ndarray
    shape: tuple[int, ...]

    @staticmethod
    def of(masks: Bool[Tensor, "t h w"] | None) -> PackedMasks | None:
        """Masks as they travel; None where there are none to be sent."""
        return None if masks is None else PackedMasks(np.packbits(masks.numpy()), tuple(masks.shape))

    def unpacked(self) -> Bool[Tensor, "t h w"]:
        """The masks as they were."""
        pixels = np.unpackbits(self.bits, count=math.prod(self.shape)).reshape(self.shape)
        return torch.from_numpy(pixels.view(bool))
