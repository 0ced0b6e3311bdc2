"""From masks of queries, which overlap, to one image cut into segments.

Carion et al., "End-to-End Object Detection with Transformers" (ECCV 2020), section 4.3: each pixel goes to the query
whose mask is the most certain of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

THRESHOLD = 0.85
"""The score above which a query makes a segment (section 4.3 of the paper)."""

STRAY = 4
"""Pixels: a segment of no more is none (the published code)."""

AT_ONCE = 2**23
"""Mask logits at the original size that are held at once."""


class Merged(NamedTuple):
    """The segments of one image, the best scored first.

    `ids` are 0 where no query was certain enough, else 1 + the row of the segment; `queries` say which query each
    segment comes from. Where several queries found the same stuff it is the best scored of them.
    """

    ids: Int32[Tensor, "h w"]
    queries: Int64[Tensor, " k"]


def merge(
    logits: Float[Tensor, "q m n"],
    scores: Float[Tensor, " q"],
    labels: Int64[Tensor, " q"],
    is_thing: Bool[Tensor, " c"],
    size: tuple[int, int],
    *,
    threshold: float = THRESHOLD,
    stray: int = STRAY,
) -> Merged:
    """Cut one image into segments.

    The logits of the queries that are certain enough are resized to the original size, and each pixel goes to the
    greatest. (That is where their softmax is greatest, too.) Queries of one stuff class make one segment. Segments of a
    few pixels are dropped, and their pixels go to the greatest logit among the others.

    The published code drops what all but the first query of a stuff class found, since it takes them for empty after
    they were merged; here their pixels stay with the stuff. Where no class is stuff, not all pixels are something:
    those that no mask claims (logits below zero) belong to no segment.

    Args:
        logits: of each query's mask.
        scores: of each query's best class other than no-object.
        labels: that class.
        is_thing: for each class, whether it is a thing.
        size: height and width of the original image in pixels.
        threshold: a query makes a segment where its score is above this.
        stray: a segment of so many pixels at most is dropped.

    Returns:
        Segments that cover the whole image where some class is stuff, or none at all where no query is certain enough.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    nothing = Merged(torch.zeros(size, dtype=torch.int32, device=logits.device), order[:0])
    if not len(order):
        return nothing
    kept, owners = logits[order], _owners(labels[order], is_thing)
    if bool(is_thing.all()):
        kept = torch.cat([kept, torch.zeros_like(kept[:1])])
        owners = torch.cat([owners, torch.full_like(owners[:1], len(order))])
    resized = _Resized(kept, size)
    found = owners[resized.greatest(torch.arange(size[0], device=logits.device))]
    areas = torch.bincount(found.flatten(), minlength=len(kept))
    stays = areas > stray
    segments = stays[: len(order)].nonzero()[:, 0]
    if not len(segments):
        return nothing
    stays[len(order) :] = True  # the background, however small
    left = stays[owners].nonzero()[:, 0]
    strays = ~stays[found]
    rows = strays.any(1).nonzero()[:, 0]
    if len(rows):
        again = owners[left[resized.greatest(rows, left)]]
        found[rows] = torch.where(strays[rows], again, found[rows])
    numbers = torch.zeros(len(kept), dtype=torch.int32, device=logits.device)
    numbers[segments] = torch.arange(1, len(segments) + 1, dtype=torch.int32, device=logits.device)
    return Merged(numbers[found], order[segments])


def _owners(labels: Int64[Tensor, " k"], is_thing: Bool[Tensor, " c"]) -> Int64[Tensor, " k"]:
    """For each query the first one of its segment: itself, or the first of its class where that is stuff."""
    rows = torch.arange(len(labels), device=labels.device)
    segment = torch.where(is_thing[labels], len(is_thing) + rows, labels)
    return (segment[:, None] == segment).int().argmax(1)


class _Resized:
    """Logits of masks, resized bilinearly to the size of the image as far as they are asked for."""

    def __init__(self, logits: Tensor, size: tuple[int, int]):
        self.logits, self.size = logits, size

    def greatest(self, rows: Int64[Tensor, " r"], queries: Int64[Tensor, " k"] | None = None) -> Int64[Tensor, "r w"]:
        """Which query has the greatest logit at each pixel of some rows of the image, among all or some queries."""
        logits = self.logits if queries is None else self.logits[queries]
        width = self.size[1]
        columns = torch.arange(width, device=rows.device)
        left, right, across = _neighbours(columns, width, logits.shape[2])
        answers = []
        for chunk in torch.split(rows, max(1, AT_ONCE // (len(logits) * width))):
            top, bottom, down = _neighbours(chunk, self.size[0], logits.shape[1])
            cells, (above, below) = torch.unique(torch.stack([top, bottom]), return_inverse=True)
            band = logits[:, cells].float()
            band = torch.lerp(band[..., left], band[..., right], across)
            weights = torch.zeros(len(chunk), len(cells), device=rows.device)
            weights.scatter_add_(1, torch.stack([above, below], 1), torch.stack([1 - down, down], 1))
            answers.append((weights @ band).max(0).indices)  # much faster than argmax
        return torch.cat(answers)


def _neighbours(
    pixels: Int64[Tensor, " p"], count: int, cells: int
) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"], Float[Tensor, " p"]]:
    """The two cells between which each pixel's centre lies along an axis, and how far it is from the first to the
    second: `count` pixels lie on `cells`.
    """
    place = ((pixels + 0.5) * (cells / count) - 0.5).clamp(0, cells - 1)
    first = place.long()
    return first, (first + 1).clamp(max=cells - 1), place - first
