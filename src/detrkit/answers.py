"""What a model says of a batch of images of one size: detections with their masks, or segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detrkit.arithmetic import arithmetic
from detrkit.data.loading import LoadedImage
from detrkit.data.packing import PackedImages
from detrkit.errors import ModelError
from detrkit.masks import RunLengths
from detrkit.models import Variant
from detrkit.panoptic import PanopticMap
from detrkit.postprocess import Scored
from detrkit.segmentation.instances import instance_masks
from detrkit.segmentation.model import Segmented, Segmenter
from detrkit.segmentation.panoptic import merge
from detrkit.structures import Category, Detections

Answer = TypeVar("Answer", Detections, PanopticMap)

_WINDOW = 8  # batches' worth of images among which equal sizes are brought together


@dataclass(frozen=True, eq=False)
class Respondent:
    """A model in evaluation mode with what makes answers of its predictions.

    Attributes:
        model: the detector.
        segmenter: the detector with its mask head; None where it has none.
        variant: the module of its variant.
        categories: the table that labels point into.
        device: where it computes.
        dtype: in what it computes.
    """

    model: nn.Module
    segmenter: Segmenter | None
    variant: Variant | ModuleType
    categories: tuple[Category, ...]
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def detect(self, group: Sequence[LoadedImage], threshold: float, ensemble: bool) -> list[Detections]:
        """What is found in images of one size, each with its mask where the model makes any."""
        found, scored = self._score(group, ensemble)
        answers = []
        for row, (image, one) in enumerate(zip(group, scored, strict=True)):
            order = one.scores.argsort(descending=True, stable=True)
            order = order[one.scores[order] >= threshold]
            height, width = image.original
            limit = np.array([width, height, width, height], np.float32)
            answers.append(
                Detections(
                    np.clip(one.boxes[order].float().cpu().numpy(), 0, limit),
                    one.scores[order].float().cpu().numpy(),
                    one.labels[order].cpu().numpy(),
                    self.categories,
                    image.original,
                    image.name,
                    None if self.segmenter is None else self._masks(found, row, one, order, image.original),
                )
            )
        return answers

    @torch.inference_mode()
    def segment(self, group: Sequence[LoadedImage], threshold: float) -> list[PanopticMap]:
        """The segments of images of one size; there has to be a mask head."""
        found, scored = self._score(group, ensemble=False)
        is_thing = torch.tensor([category.is_thing for category in self.categories], device=self.device)
        answers = []
        for row, (image, one) in enumerate(zip(group, scored, strict=True)):
            order = _first_of_each(one, threshold)
            logits = self._logits(found, row, one, order)
            merged = merge(logits, one.scores[order], one.labels[order], is_thing, image.original, threshold=threshold)
            kept = order[merged.queries]
            answers.append(
                PanopticMap(
                    merged.ids.cpu().numpy(),
                    one.labels[kept].cpu().numpy(),
                    one.scores[kept].float().cpu().numpy(),
                    self.categories,
                    image.original,
                    image.name,
                )
            )
        return answers

    def _score(self, group: Sequence[LoadedImage], ensemble: bool) -> tuple[Segmented, list[Scored]]:
        """What the model says of images of one size, and its scored boxes.

        Raises:
            ModelError: they are not finite. No threshold would let them through, so nothing would seem to be there.
        """
        images, _ = PackedImages.of([image.pixels for image in group]).normalised(self.device)
        sizes = torch.tensor([image.original for image in group], device=self.device)
        with arithmetic(self.device, self.dtype):
            if self.segmenter is None:
                found = Segmented(self.model(images, None), None)
            else:
                found = self.segmenter(images, None)
        scored = self.variant.postprocess(found.predictions, sizes, ensemble=ensemble)
        # Asked at once: a GPU has to finish all before it.
        finite = torch.stack([one.scores.isfinite().all() & one.boxes.isfinite().all() for one in scored]).tolist()
        for image, is_finite in zip(group, finite, strict=True):
            if not is_finite:
                raise ModelError(
                    "The model's scores or boxes are not finite",
                    where=image.name,
                    got=f"NaN or infinity, computed in {str(self.dtype).removeprefix('torch.')}",
                    remedy="The weights are damaged: take another checkpoint."
                    if self.dtype == torch.float32
                    else "Answer in more precision: --precision fp32. If that does not help, the weights are damaged.",
                )
        return found, scored

    def _logits(self, found: Segmented, row: int, one: Scored, order: Tensor) -> Float[Tensor, "p _ _"]:
        """Logits of the masks of some detections of an image, at the backbone's finest level."""
        assert self.segmenter is not None
        assert one.queries is not None
        queries = one.queries[order]
        image = torch.full_like(queries, row)
        with arithmetic(self.device, self.dtype):
            return self.segmenter.masks(found, image, queries).float()

    def _masks(self, found: Segmented, row: int, one: Scored, order: Tensor, size: tuple[int, int]) -> RunLengths:
        """Masks of some detections; those of one query, which may stand for several classes, are made once."""
        assert one.queries is not None
        _, first, again = np.unique(one.queries[order].cpu().numpy(), return_index=True, return_inverse=True)
        chosen = order[torch.from_numpy(first).to(order.device)]
        return instance_masks(self._logits(found, row, one, chosen), size)[again]


def in_order(
    images: Iterator[LoadedImage], respond: Callable[[Sequence[LoadedImage]], Iterable[Answer]], batch_size: int
) -> Iterator[Answer]:
    """What is said of each image, in order; those of one size go through the model together.

    Args:
        images: opened and resized.
        respond: answers for images of one size.
        batch_size: at most so many go through the model together.
    """
    while window := list(islice(images, batch_size * _WINDOW)):
        groups: dict[tuple[int, ...], list[LoadedImage]] = {}
        for image in window:
            groups.setdefault(tuple(image.pixels.shape), []).append(image)
        answers: dict[int, Answer] = {}
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                answers.update(zip((image.index for image in part), respond(part), strict=True))
        for image in window:
            yield answers[image.index]


def _first_of_each(one: Scored, threshold: float) -> Int64[Tensor, " k"]:
    """The best detection of each query that is certain enough, best first: a pixel has one class."""
    assert one.queries is not None
    order = one.scores.argsort(descending=True, stable=True)
    order = order[one.scores[order] > threshold]
    _, first = np.unique(one.queries[order].cpu().numpy(), return_index=True)
    return order[torch.from_numpy(np.sort(first)).to(order.device)]
