"""What a worker that loads images sends: the images as one block of bytes, and their masks made small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from detrkit.data.transforms import byte_scale
from detrkit.structures import Batch, Target


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


class PackedImages(NamedTuple):
    """Images of unequal sizes in one block of bytes: a quarter of what they take as numbers.

    Attributes:
        pixels: (b, 3, h, w), RGB, with zeros to the right and below; the channels of a pixel lie side by side.
        sizes: height and width of each.
    """

    pixels: UInt8[Tensor, "b 3 h w"]
    sizes: Sequence[Sequence[int]]

    @staticmethod
    def of(images: Sequence[UInt8[Tensor, "3 _ _"]]) -> PackedImages:
        """Images, one at least, RGB and of sizes that may differ, side by side."""
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = map(max, zip(*sizes, strict=True))
        pixels = _zeros((len(images), height, width, 3), np.uint8)
        for image, place, (rows, columns) in zip(images, pixels, sizes, strict=True):
            place[:rows, :columns] = image.permute(1, 2, 0)
        return PackedImages(pixels.permute(0, 3, 1, 2), sizes)

    def normalised(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Float32[Tensor, "b 3 h w"], Bool[Tensor, "b h w"]]:
        """Images and padding of a `Batch` on a device: what `Batch.from_images` makes of the normalised images.

        Bytes go to the device, and become numbers there.
        """
        lines = self.pixels.permute(0, 2, 3, 1).flatten(2).to(device, non_blocking=True)
        count, _, height, width = self.pixels.shape
        on_cpu = lines.device.type == "cpu"
        shape = (count, height, width * 3)
        padded = _zeros(shape, np.float32) if on_cpu else torch.zeros(shape, device=device)
        padding = torch.ones(count, height, width, dtype=torch.bool, device=device)
        means, factors = (values.repeat(width).to(device, non_blocking=True) for values in byte_scale())
        for image, place, outside, (rows, columns) in zip(lines, padded, padding, self.sizes, strict=True):
            line = slice(columns * 3)  # pixels in a row are one run of numbers, which is several times as fast
            place[:rows, line].copy_(image[:rows, line]).sub_(means[line]).mul_(factors[line])
            outside[:rows, :columns] = False
        return padded.view(count, height, width, 3).permute(0, 3, 1, 2), padding


class PackedBatch(NamedTuple):
    """A `Batch` on its way to a device.

    Attributes:
        packed: its images.
        targets: one for each image.
    """

    packed: PackedImages
    targets: tuple[Target, ...]

    @property
    def images(self) -> UInt8[Tensor, "b 3 h w"]:
        """The bytes of the images."""
        return self.packed.pixels

    def to(self, device: torch.device | str) -> Batch:
        """The batch, normalised, on a device."""
        return Batch(*self.packed.normalised(device), tuple(target.to(device) for target in self.targets))


def _zeros(shape: tuple[int, ...], kind: type[np.generic]) -> Tensor:
    """NumPy asks the system for large pages and torch does not: of small ones it takes longer to get the memory than to
    fill it.
    """
    return torch.from_numpy(np.zeros(shape, kind))
