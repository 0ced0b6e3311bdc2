"""Work in parts that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def blocks(images: int, parts: int, size: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Cut images with their parts, such as rows or heads, into what is worked on together.

    Args:
        images: how many there are.
        parts: how many each of them has.
        size: of a part, in any unit.
        at_once: how much a thread should have before it, in the same unit; at least one part is.

    Yields:
        Images and parts: some parts of one image, or all parts of some images.
    """
    some = max(1, at_once * torch.get_num_threads() // size)
    some_parts, some_images = min(some, parts), max(1, some // parts)
    for image in range(0, images, some_images):
        for part in range(0, parts, some_parts):
            yield slice(image, image + some_images), slice(part, part + some_parts)
