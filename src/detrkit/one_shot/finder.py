"""Finding by example: from examples that somebody drew to scored places in images.

Two kinds of places are looked at: those that the detector's queries propose, and windows of the examples' sizes at all
positions. A model that was trained on episodes proposes well and has learnt what is alike. Before that, windows and the
backbone's features are what there is, and they find things of steady size surprisingly often.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from detrkit.boxes import cxcywh_to_xyxy, nms
from detrkit.errors import UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.one_shot.background import Usual, usual_in
from detrkit.one_shot.model import Encoded, OneShot
from detrkit.postprocess import Scored

Box = Sequence[float] | np.ndarray
"""Left, top, right and bottom, in pixels of the upright image."""

Boxes = Box | Sequence[Box]
"""A box, or as many as there are pictures of examples."""

Candidates = Literal["queries", "windows", "both"]
"""Which places are looked at."""

Combine = Literal["mean", "max"]
"""How several examples of one thing are taken together: as their mean; or the prompt by maximum, and each compared on
its own, the most alike counting."""

SCALES = (0.8, 1.0, 1.25)
"""Sizes of windows, as multiples of the examples' mean size."""

STEP = 0.15
"""How far windows are apart, as a share of their size."""

LEAST_STEP = 8.0
"""How far windows are apart at least, in pixels: features that are 16 pixels apart change little in less."""

AT_ONCE = 1 << 24
"""Numbers of looks that are computed in one go; bounds the memory, changes no result."""

PEAKS = 300
"""The most windows of one size that are kept of an image. An object takes a few of them, so that among some hundred
objects the faintest may be missed."""

APART = 0.3
"""Windows that overlap a better one by more than this (IoU) are dropped: they are the same peak."""

CERTAIN = 4.0
"""The logit of what is two deviations more alike than at even odds, where nothing was learnt."""

KINSHIP = (0.2, 0.1)
"""How alike things of a kind are expected to be before any example says so: mean and deviation of the cosine."""

NONE = Calibration(1.0, 0.0)
"""Logits as they are."""

CLEAR = 0.85
"""How alike others of a kind are expected to be, as a share of how alike the examples are: people draw clear cases."""


class Sought(NamedTuple):
    """One thing that is looked for.

    Attributes:
        prompts: what queries are told, of all examples together.
        looks: what places are compared with; one row where examples were averaged, else one for each.
        unlike: the looks of what it is not.
        size: mean width and height of the examples, in pixels of the resized image.
        kinship: how alike the examples are to each other: mean and deviation.
        even: the likeness at which it is as likely the thing as not, where nothing was learnt.
    """

    prompts: Float[Tensor, "1 d"]
    looks: Float[Tensor, "n w"]
    unlike: Float[Tensor, "m w"]
    size: tuple[float, float]
    kinship: tuple[float, float]
    even: float

    @property
    def slope(self) -> float:
        """How fast the logit rises with likeness, where nothing was learnt."""
        return CERTAIN / (2 * self.kinship[1])


class Shown(NamedTuple):
    """Examples as a model keeps them: what queries are told, what places are compared with, width and height in pixels
    of the resized image."""

    prompts: Float[Tensor, "e d"]
    looks: Float[Tensor, "e w"]
    sizes: Float[Tensor, "e 2"]

    def select(self, rows: Sequence[int]) -> Shown:
        """Some of them."""
        rows = list(rows)
        return Shown(self.prompts[rows], self.looks[rows], self.sizes[rows])

    @staticmethod
    def joined(parts: Sequence[Shown]) -> Shown:
        """The examples of several images; at least one."""
        return Shown(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Finder:
    """A model with how it is used.

    Attributes:
        model: in evaluation mode.
        candidates: which places are looked at.
        calibration: makes probabilities of logits.
        overlap: places that overlap a better one by more than this (IoU) are dropped; 1: none.
        usual: features of no interest; of use where the model has not learnt what looks are.
        scales: sizes of windows, as multiples of the examples' mean size.
    """

    model: OneShot
    candidates: Candidates = "queries"
    calibration: Calibration = NONE
    overlap: float = 0.5
    usual: Usual | None = None
    scales: tuple[float, ...] = SCALES

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.sharpness.device

    @torch.inference_mode()
    def adapted(self, images: Iterable[Float[Tensor, "3 _ _"]]) -> Finder:
        """The same, knowing what is usual in the images that are searched, where looks are not learnt."""
        if self.model.width:
            return self
        return replace(self, usual=usual_in(self.model.see(image[None]).memory.features[-1][0] for image in images))

    @torch.inference_mode()
    def show(self, image: Float[Tensor, "3 h w"], boxes: Float[Tensor, "e 4"]) -> Shown:
        """Look at examples.

        Args:
            image: normalised and resized.
            boxes: cxcywh in [0, 1].
        """
        boxes = boxes.to(image)
        first = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        prompts, looks = self.model.show(self._encode(image), first, boxes)
        return Shown(prompts, looks, boxes[:, 2:] * boxes.new_tensor([image.shape[2], image.shape[1]]))

    @torch.inference_mode()
    def level(self, images: Iterable[Float[Tensor, "3 _ _"]], sought: Sequence[Sought]) -> list[Sought]:
        """The same things, with the likeness at which each is as likely there as not, told from images without labels.

        One threshold then means about the same for all of them. Where likeness was learnt, there is nothing to do.
        """
        if self.model.width:
            return list(sought)
        peaks: list[list[np.ndarray]] = [[] for _ in sought]
        for image in images:
            encoded = self.model.see(image[None]).without(self.usual)
            for number, one in enumerate(sought):
                (_, logits), *_ = self._windows(encoded, one, (image.shape[1], image.shape[2]))
                peaks[number].append((logits / one.slope + one.even).cpu().numpy())
        return [
            one._replace(even=_even(np.concatenate(likeness), one.kinship)) if likeness else one
            for one, likeness in zip(sought, peaks, strict=True)
        ]

    @torch.inference_mode()
    def search(self, image: Float[Tensor, "3 h w"], sought: Sequence[Sought]) -> list[Scored]:
        """Where something is in an image, for each thing that is looked for.

        Args:
            image: normalised and resized.
            sought: things, in any number; the image is encoded once.

        Returns:
            For each thing boxes xyxy in [0, 1] of the image with their scores, best first, and labels: its number.
        """
        encoded = self._encode(image)
        asked = self._asked(encoded, sought) if self.candidates != "windows" else [()] * len(sought)
        found = []
        for number, (one, proposed) in enumerate(zip(sought, asked, strict=True)):
            places = [proposed] if proposed else []
            if self.candidates != "queries":
                places += self._windows(encoded, one, (image.shape[1], image.shape[2]))
            boxes, logits = (torch.cat(column) for column in zip(*places, strict=True))
            chosen = nms(boxes, logits, torch.zeros_like(logits), self.overlap)
            scores = torch.from_numpy(self.calibration.apply(logits[chosen].cpu().double().numpy())).float()
            found.append(Scored(boxes[chosen], scores.to(boxes), torch.full_like(chosen, number)))
        return found

    def _encode(self, image: Float[Tensor, "3 h w"]) -> Encoded:
        if self.candidates == "windows":
            return self.model.see(image[None]).without(self.usual)
        padding = torch.zeros(1, *image.shape[1:], dtype=torch.bool, device=image.device)
        return self.model.encode(image[None], padding).without(self.usual)

    def _asked(self, encoded: Encoded, sought: Sequence[Sought]) -> list[tuple[Tensor, Tensor]]:
        """The places that queries propose for each thing, xyxy, with their logits."""
        model, first = self.model, torch.zeros(len(sought), dtype=torch.int64, device=encoded.extent.device)
        found = model.answer(encoded, first, torch.cat([one.prompts for one in sought]), only_last=True)
        boxes = found.boxes[-1].float()
        looks = model.look(encoded, first, boxes)
        proposed = []
        for number, one in enumerate(sought):
            evidence = self._evidence(looks[number], one)
            if model.width:
                evidence = evidence + found.logits[-1, number, :, model.matched].float()
            proposed.append((cxcywh_to_xyxy(boxes[number]).clamp(0, 1), self._bounded(evidence, looks[number], one)))
        return proposed

    def _windows(self, encoded: Encoded, one: Sought, image: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """The peaks among windows of the examples' sizes, xyxy, with their logits."""
        boxes, logits = [], []
        for scale in self.scales:
            width, height = (min(side * scale, float(limit)) for side, limit in zip(one.size, image[::-1], strict=True))
            x, y = _starts(width, image[1], encoded.extent), _starts(height, image[0], encoded.extent)
            size = (width / image[1], height / image[0])
            rows = max(1, AT_ONCE // (len(x) * one.looks.shape[1]))
            looked = (self.model.look_everywhere(encoded, x, part, size).flatten(0, 1) for part in torch.split(y, rows))
            evidence = torch.cat([self._bounded(self._evidence(looks, one), looks, one) for looks in looked])
            corner = torch.cartesian_prod(y, x).flip(-1)
            best = evidence.topk(min(PEAKS, len(evidence))).indices
            boxes.append(torch.cat([corner[best], corner[best] + corner.new_tensor(size)], 1))
            logits.append(evidence[best])
        places, evidence = torch.cat(boxes), torch.cat(logits)
        peaks = nms(places, evidence, torch.zeros_like(evidence), APART)
        return [(places[peaks], evidence[peaks])]

    def _evidence(self, looks: Float[Tensor, "n w"], one: Sought) -> Float[Tensor, " n"]:
        """What likeness says: as learnt, or else more the more alike than at even odds."""
        likeness = (looks @ one.looks.T).amax(-1)
        if self.model.width:
            return self.model.evidence(likeness)
        return one.slope * (likeness - one.even)

    def _bounded(self, logits: Float[Tensor, " n"], looks: Float[Tensor, "n w"], one: Sought) -> Float[Tensor, " n"]:
        """A place scores no higher than the odds that it is rather what is sought than what it is not."""
        if not len(one.unlike):
            return logits
        rather = (looks @ one.looks.T).amax(-1) - (looks @ one.unlike.T).amax(-1)
        sharpness = float(self.model.sharpness.exp()) if self.model.width else one.slope
        return torch.minimum(logits, sharpness * rather)


def seek(shown: Shown, *, unlike: Shown | None = None, combine: Combine = "mean") -> Sought:
    """What is looked for.

    Args:
        shown: examples of it.
        unlike: examples of what it is not.
        combine: how several examples are taken together.

    Raises:
        UsageError: there is no example.
    """
    if not len(shown.looks):
        raise UsageError("There is no example of what is to be found", expected="at least one box")
    prompts, looks, sizes = shown
    width, height = sizes.mean(0).tolist()
    return Sought(
        prompts.mean(0, keepdim=True) if combine == "mean" else prompts.amax(0, keepdim=True),
        F.normalize(looks.mean(0, keepdim=True), dim=-1) if combine == "mean" else looks,
        looks[:0] if unlike is None else unlike.looks,
        (width, height),
        kinship := _kinship(looks),
        kinship[0] / 2,
    )


def _kinship(looks: Float[Tensor, "n w"]) -> tuple[float, float]:
    """How alike examples are, as cosines of each with the mean of the others: mean and deviation.

    A few examples say little of the deviation, so what is expected counts as much as two of them.
    """
    if len(looks) < 2:
        return KINSHIP
    others = F.normalize(looks.sum(0) - looks, dim=-1)
    cosines = (looks * others).sum(-1)
    squares = float((cosines - cosines.mean()).square().sum()) + 2 * KINSHIP[1] ** 2
    return max(float(cosines.mean()), 0.1), math.sqrt(squares / (len(looks) + 1))


def _even(likeness: np.ndarray, kinship: tuple[float, float]) -> float:
    """The likeness from which places are taken for the thing: where recall² over the number taken is largest.

    The criterion of Lee and Liu ("Learning with Positive and Unlabeled Examples Using Weighted Logistic Regression",
    ICML 2003) is proportional to precision times recall and needs no negatives. Recall is told by the examples.

    Args:
        likeness: of all peaks in some images.
        kinship: mean and deviation of how alike things of the kind are.
    """
    mean, deviation = kinship
    falling = -np.sort(-likeness)
    recall = 1 - torch.special.ndtr(torch.from_numpy((falling - CLEAR * mean) / deviation)).numpy()
    return float(falling[np.argmax(recall**2 / np.arange(1, len(falling) + 1))])


def _starts(window: float, side: int, like: Tensor) -> Float[Tensor, " x"]:
    """Where windows of a width begin along a side, in [0, 1]."""
    count = math.floor(max(side - window, 0.0) / max(window * STEP, LEAST_STEP)) + 1
    return torch.linspace(0, max(side - window, 0.0) / side, count, device=like.device)
