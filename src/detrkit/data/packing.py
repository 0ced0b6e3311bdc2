"""What a worker that loads images sends: the images as one block, and their masks made small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from detrkit.data.transforms import byte_scale


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


def pack_images(
    images: Sequence[UInt8[Tensor, "3 _ _"]], *, multiple_of: int = 1
) -> tuple[Float32[Tensor, "b 3 h w"], Bool[Tensor, "b h w"]]:
    """Images and padding of a `Batch`: what `Batch.from_images` makes of the normalised images, without a copy of any.

    The channels of a pixel lie side by side (channels last).

    Args:
        images: RGB, one at least; sizes may differ.
        multiple_of: the padded height and width are rounded up to a multiple of this, in pixels.
    """
    height, width = (-(-max(image.shape[axis] for image in images) // multiple_of) * multiple_of for axis in (1, 2))
    # NumPy asks the system for large pages and torch does not: of small ones it takes longer to get the memory than to
    # fill it.
    padded = torch.from_numpy(np.zeros((len(images), height, width * 3), np.float32))
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    means, factors = (values.repeat(width) for values in byte_scale())
    for image, place, outside in zip(images, padded, padding, strict=True):
        rows, columns = image.shape[1:]
        line = slice(columns * 3)  # pixels in a row are one run of numbers, which is several times as fast
        pixels = image.permute(1, 2, 0).reshape(rows, columns * 3)
        place[:rows, line].copy_(pixels).sub_(means[line]).mul_(factors[line])
        outside[:rows, :columns] = False
    return padded.view(len(images), height, width, 3).permute(0, 3, 1, 2), padding
