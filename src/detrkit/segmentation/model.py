"""A detector of any variant with a mask for each of its answers.

The mask head holds the detector, frozen or not. In training only the masks of matched queries are computed, some at a
time, and computed again for the gradient: memory depends on how many are computed together and not on how many there
are. `Segmenter.forward` is what the training loop calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detrkit.errors import UsageError
from detrkit.losses.functional import dice_loss, mask_focal_loss
from detrkit.losses.matching import Matches
from detrkit.nn.pooling import extents
from detrkit.segmentation.head import Canvas, MaskHead
from detrkit.structures import Predictions, Target

CHUNK = 8
"""Masks that are computed together."""


class Wanted(NamedTuple):
    """Masks that are to be learnt: pair p is query `query[p]` of image `image[p]`, and its true mask.

    `masks` have the size of the padded images.
    """

    image: Int64[Tensor, " p"]
    query: Int64[Tensor, " p"]
    masks: Bool[Tensor, "p h w"]


class MaskTerms(NamedTuple):
    """The two terms of the loss of masks, summed over all of them."""

    focal: Float[Tensor, ""]
    dice: Float[Tensor, ""]


class Segmented(NamedTuple):
    """Predictions, what masks are made of (None without a mask head), and the loss of masks that were asked for."""

    predictions: Predictions
    canvas: Canvas | None
    terms: MaskTerms | None = None


class Segmenter(nn.Module):
    """A detector with a mask head.

    Args:
        detector: a model of any variant. Its backbone returns its finer maps from now on.
        attention: how attention maps are normalised (`MaskHead`).
        box: tell the mask head the predicted boxes, too.
        chunk: masks that are computed together; less takes less memory and more time.
        frozen: the detector does not train, and keeps no activations.

    Raises:
        UsageError: a number that makes no sense, or a detector whose backbone has no finer map than its tokens.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        attention: str = "joint",
        box: bool = False,
        chunk: int = CHUNK,
        frozen: bool = False,
    ):
        super().__init__()
        if chunk < 1:
            raise UsageError("Bad value for chunk", got=chunk, expected="at least 1")
        config: Any = detector.config
        backbone: Any = detector.backbone
        backbone.return_finer_levels()
        if len(backbone.channels) < 2:
            raise UsageError(
                "The backbone has no finer map than the one that the encoder reads",
                where=config.backbone,
                got=f"strides {backbone.strides}",
                remedy="Take a backbone with several stages, or a coarser stride.",
            )
        self.detector, self.chunk, self.frozen = detector, chunk, frozen
        heads = getattr(config, "heads", 1)
        self.mask_head = MaskHead(config.dim, heads, backbone.channels[-2::-1], attention, box=box)
        if frozen:
            detector.requires_grad_(False)

    def train(self, mode: bool = True) -> Segmenter:
        """Training mode; a frozen detector stays as it is evaluated, without dropout."""
        super().train(mode)
        if self.frozen:
            self.detector.eval()
        return self

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        padding: Bool[Tensor, "b h w"] | None,
        wanted: Callable[[Predictions], Wanted] | None = None,
    ) -> Segmented:
        """Detect and, where a training asks for it, judge the masks of some of the queries.

        Args:
            images: normalised, zeros where padded.
            padding: True where padded; None: nowhere.
            wanted: given the predictions, says which masks are to be learnt.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            detector: Any = self.detector
            memory = detector.encode(images, padding)
            predictions = detector.predict(detector.decode(memory, detector.queries(len(images))))
        extent = extents(images, padding, memory.grid, detector.backbone.strides[-1])
        canvas = self.mask_head.prepare(memory, extent)
        terms = None if wanted is None else self._judge(canvas, predictions, wanted(predictions))
        return Segmented(predictions, canvas, terms)

    def masks(self, found: Segmented, image: Int64[Tensor, " p"], query: Int64[Tensor, " p"]) -> Float[Tensor, "p _ _"]:
        """The masks of some queries, as logits of the pixels at the backbone's finest level.

        Args:
            found: what `forward` said of the images.
            image: which image each mask is in.
            query: whose mask it is.
        """
        canvas = found.canvas
        assert canvas is not None
        if not len(image):
            return canvas.base.new_zeros(0, *canvas.skips[-1].shape[-2:])
        asked, boxes = found.predictions.hidden[-1][image, query], found.predictions.boxes[-1][image, query]
        return torch.cat(
            [self.mask_head(canvas, image[rows], asked[rows], boxes[rows]) for rows in _chunks(len(image), self.chunk)]
        )

    def _judge(self, canvas: Canvas, predictions: Predictions, wanted: Wanted) -> MaskTerms:
        asked = predictions.hidden[-1][wanted.image, wanted.query]
        boxes = predictions.boxes[-1][wanted.image, wanted.query].detach()
        # Without a single mask every parameter still gets a gradient, which other processes may be waiting for.
        nothing = torch.stack([parameter.sum() for parameter in self.mask_head.parameters()]).sum().float() * 0
        total = torch.stack([nothing, nothing])
        for rows in _chunks(len(asked), self.chunk):
            total = total + checkpoint(
                self._terms,
                canvas,
                wanted.image[rows],
                asked[rows],
                boxes[rows],
                wanted.masks[rows],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return MaskTerms(*total)

    def _terms(
        self,
        canvas: Canvas,
        image: Int64[Tensor, " p"],
        hidden: Float[Tensor, "p d"],
        boxes: Float[Tensor, "p 4"],
        masks: Bool[Tensor, "p h w"],
    ) -> Float[Tensor, " term"]:
        logits = self.mask_head(canvas, image, hidden, boxes).float()
        logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        true = masks.to(logits.dtype)
        return torch.stack([mask_focal_loss(logits, true).sum(), dice_loss(logits, true).sum()])


def wanted_masks(matches: Matches, targets: Sequence[Target], size: tuple[int, int]) -> Wanted:
    """The masks that the last layer's matches ask for; those that are not known, or have no pixel, are left out.

    Args:
        matches: who answers for which object.
        targets: of each image, with masks.
        size: height and width of the padded images.

    Raises:
        UsageError: targets without masks.
    """
    if any(target.masks is None for target in targets):
        raise UsageError("The targets have no masks", remedy="Read the data set with masks=True.")
    query, target = matches.query[-1], matches.target[-1]
    starts = [0, *accumulate(len(one.labels) for one in targets)]
    every = target.new_zeros(starts[-1], *size, dtype=torch.bool)
    for one, start in zip(targets, starts, strict=False):
        assert one.masks is not None
        count, height, width = one.masks.shape
        every[start : start + count, :height, :width] = one.masks
    rows = torch.tensor(starts).to(target.device, non_blocking=True)[matches.image] + target
    known = every.flatten(1).any(1)[rows].nonzero()[:, 0]  # a look at the device, just after that of matching
    return Wanted(matches.image[known], query[known], every[rows[known]])


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
