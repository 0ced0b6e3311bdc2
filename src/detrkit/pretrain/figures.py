"""Whether random query patch detection works: figures on held-out images, alarms, and a sentence for people.

A falling loss does not say that a detector looks for what it is shown: it may have learnt only where patches tend to
lie. These figures tell the two apart. They are ours; the paper (UP-DETR, Dai et al., CVPR 2021) has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from detrkit.boxes import cxcywh_to_xyxy, elementwise_iou, pairwise_giou
from detrkit.errors import UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.pretrain.up_detr import PatchPredictions
from detrkit.structures import FeatureBatch, PatchBatch

SMALL, LARGE = 0.2, 0.4
"""Patches are small below and large from these; in between they are medium. Root of their share of the image's area."""

COLLAPSED_BOXES = 0.15
"""A `box_spread` below this is an alarm: places vary less than a seventh as much as they should."""

COLLAPSED_FEATURES = 0.005
"""A `feature_spread` below this is an alarm: of untrained ResNets it is 0.01 to 0.1 on photographs and microscopy."""

NO_SKILL = 0.1
"""A consistency that is less than this part of the way from chance to 1 is an alarm."""

_COLUMNS = ("size", "iou", "consistency", "chance", "feature_cosine", "feature_cosine_other")


class Found(NamedTuple):
    """What is found for each patch: the box of the best-scored query of its own group.

    Attributes:
        query: which query that is.
        boxes: cxcywh in [0, 1] of the unpadded image.
        scores: probability of being a patch.
        iou: overlap with where the patch was cut.
    """

    query: Int64[Tensor, "b p"]
    boxes: Float[Tensor, "b p 4"]
    scores: Float[Tensor, "b p"]
    iou: Float[Tensor, "b p"]


def patch_scores(logits: Float[Tensor, "*n c"], num_classes: int) -> Float[Tensor, "*n"]:
    """The probability that a query shows a patch, which is of the last class.

    Args:
        logits: of any variant. Those with one class more than the config has are softmax logits, of which the last is
            no-object; else each class has a yes or no of its own.
        num_classes: of the detector's config.
    """
    logits = logits.float()
    is_softmax = logits.shape[-1] > num_classes
    return (logits.softmax(-1) if is_softmax else logits.sigmoid())[..., num_classes - 1]


@torch.no_grad()
def answers(
    found: PatchPredictions, batch: PatchBatch | FeatureBatch, group: Int64[Tensor, " n"], num_classes: int
) -> Found:
    """What the last layer finds for each patch.

    Args:
        found: predictions for the batch.
        batch: says where patches were cut.
        group: the group of each query, as of `UpDetr.group`.
        num_classes: of the detector's config.

    Raises:
        UsageError: predictions of so many queries as the groups do not have.
        NonFiniteError: predictions are NaN or infinite; names the images.
    """
    boxes, count = found.boxes[-1].float(), batch.boxes.shape[1]
    asked = _asked(found, batch, group)
    _check_finite(found, batch)
    other = asked != torch.arange(count, device=asked.device)[:, None]
    scores = patch_scores(found.logits[-1], num_classes)
    query = scores[:, None].masked_fill(other, -torch.inf).argmax(-1)
    chosen = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    iou = elementwise_iou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(batch.boxes))[0]
    return Found(query, chosen, scores.gather(1, query), iou)


class PatchFigures:
    """Gathers batches of held-out images, and makes figures of them.

    A figure does not depend on how images were spread over batches and processes. An object can be sent to another
    process, and be `merged` with others there.

    Args:
        num_classes: of the detector's config.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self._patches: list[np.ndarray] = []  # for each batch (patches, len(_COLUMNS))
        self._variances: list[np.ndarray] = []  # for each batch (images, 2): of the found and of the true boxes
        self._features: np.ndarray | float = 0.0  # (f + 1,) sum of all features of unit length

    @property
    def images(self) -> int:
        """How many images were added."""
        return sum(map(len, self._variances))

    @property
    def patches(self) -> int:
        """How many patches were added."""
        return sum(map(len, self._patches))

    @torch.no_grad()
    def add(self, found: PatchPredictions, batch: PatchBatch | FeatureBatch, group: Int64[Tensor, " n"]) -> None:
        """Add a batch.

        Args:
            found: predictions of a task in evaluation mode.
            batch: what was asked, on the same device.
            group: the group of each query, as of `UpDetr.group`.

        Raises:
            UsageError, NonFiniteError: as of `answers`.
        """
        answered = answers(found, batch, group, self.num_classes)
        size = batch.boxes[..., 2:].prod(-1).clamp(min=0).sqrt()
        chance = torch.full_like(size, 1 / size.shape[1] if size.shape[1] > 1 else torch.nan)
        is_own = _best_is_own(found, batch, _asked(found, batch, group))
        columns = (size, answered.iou, is_own, chance, *_cosines(found, answered.query))
        self._patches.append(torch.stack(columns, -1).flatten(0, 1).cpu().double().numpy())
        variances = [boxes.var(1, correction=0).sum(-1) for boxes in (answered.boxes, batch.boxes)]
        self._variances.append(torch.stack(variances, -1).cpu().double().numpy())
        self._features = self._features + _unit(found.patch_features).cpu().double().sum((0, 1)).numpy()

    @staticmethod
    def merged(parts: Sequence[PatchFigures]) -> PatchFigures:
        """What several processes gathered, together.

        Raises:
            UsageError: there is no part.
        """
        if not parts:
            raise UsageError("There are no figures to merge", got="an empty list")
        whole = PatchFigures(parts[0].num_classes)
        for part in parts:
            whole._patches += part._patches
            whole._variances += part._variances
            whole._features = whole._features + part._features
        return whole

    def result(self) -> dict[str, float]:
        """All figures; NaN where there is nothing to make one of.

        `recall50`, `recall75`: share of patches that are found with an IoU of at least 0.5 and 0.75, that is by the
        best-scored query of the patch's own group; `recall50_small`, `_medium`, `_large`: of those of a size; `iou`:
        the mean. `consistency`: share of patches for which the best-fitting of all queries is one that was shown the
        patch; `chance`: what that would be if queries did not look at what they are shown. `feature_cosine`: of the
        feature that the answering query tells with the patch's own; `feature_cosine_other`: with those of the image's
        other patches. `box_spread`: how much found boxes of an image vary, as a fraction of how much the true ones do.
        `feature_spread`: mean distance 1 − cosine between the features of different patches, of all images together.
        """
        table = np.concatenate([np.empty((0, len(_COLUMNS))), *self._patches])
        column = dict(zip(_COLUMNS, table.T, strict=True))
        size, iou = column["size"], column["iou"]
        sizes = {"small": size < SMALL, "medium": (size >= SMALL) & (size < LARGE), "large": size >= LARGE}
        return {
            "recall50": _mean(iou >= 0.5),
            "recall75": _mean(iou >= 0.75),
            **{f"recall50_{name}": _mean(iou[chosen] >= 0.5) for name, chosen in sizes.items()},
            "iou": _mean(iou),
            **{name: _mean(column[name]) for name in _COLUMNS[2:]},
            "box_spread": self._box_spread(),
            "feature_spread": self._feature_spread(),
        }

    def _box_spread(self) -> float:
        found, true = np.concatenate([np.empty((0, 2)), *self._variances]).sum(0)
        return math.sqrt(found / true) if true > 0 else math.nan

    def _feature_spread(self) -> float:
        """From the sum alone: its square is the sum of all products, those of patches with themselves being 1."""
        count = self.patches
        if count < 2:
            return math.nan
        products = float(np.square(self._features).sum()) - count
        return max(0.0, 1 - products / (count * (count - 1)))


def _asked(
    found: PatchPredictions, batch: PatchBatch | FeatureBatch, group: Int64[Tensor, " n"]
) -> Int64[Tensor, " q"]:
    asked = group[group < batch.boxes.shape[1]]
    if len(asked) != found.boxes.shape[2]:
        raise UsageError(
            "Predictions and groups of queries do not fit together",
            got=f"predictions of {found.boxes.shape[2]} queries",
            expected=f"{len(asked)}, of the groups of {batch.boxes.shape[1]} patches",
        )
    return asked


def _check_finite(found: PatchPredictions, batch: PatchBatch | FeatureBatch) -> None:
    finite = torch.isfinite(found.boxes[-1]).all(-1).all(-1) & torch.isfinite(found.logits[-1]).all(-1).all(-1)
    finite = finite & torch.isfinite(found.patch_features).all(-1).all(-1)
    if not bool(finite.all()):
        raise NonFiniteError([name for name, good in zip(batch.names, finite.tolist(), strict=True) if not good])


def _best_is_own(
    found: PatchPredictions, batch: PatchBatch | FeatureBatch, asked: Int64[Tensor, " q"]
) -> Float[Tensor, "b p"]:
    """Whether of all queries one of the patch's own group fits its place best; NaN where there is only one group.

    What fits is said by generalised IoU alone: it also orders boxes that do not touch the place, and the class part of
    a match's cost says nothing of places. If boxes are all alike, the first query is taken, which is right by chance.
    """
    count = batch.boxes.shape[1]
    fit = pairwise_giou(cxcywh_to_xyxy(batch.boxes), cxcywh_to_xyxy(found.boxes[-1].float()))
    is_own = (asked[fit.argmax(-1)] == torch.arange(count, device=asked.device)).float()
    return is_own if count > 1 else torch.full_like(is_own, torch.nan)


def _cosines(found: PatchPredictions, query: Int64[Tensor, "b p"]) -> tuple[Tensor, Tensor]:
    """Cosine of what each patch's query tells with the patch's own feature, and its mean with the others'; (b, p)."""
    undefined = torch.full(query.shape, torch.nan, device=query.device)
    if found.reconstructed is None:
        return undefined, undefined
    last = found.reconstructed[-1].float()
    told = F.normalize(last.gather(1, query[..., None].expand(-1, -1, last.shape[-1])), dim=-1)
    cosines = told @ F.normalize(found.patch_features.float(), dim=-1).transpose(1, 2)
    own, others = cosines.diagonal(dim1=1, dim2=2), query.shape[1] - 1
    return own, (cosines.sum(-1) - own) / others if others else undefined


def _unit(features: Float[Tensor, "b p f"]) -> Float[Tensor, "b p f+1"]:
    """Features of length 1. Those that are zero, and so all alike, point along an axis of their own."""
    features = F.normalize(features.float(), dim=-1)
    return torch.cat([features, (features == 0).all(-1, keepdim=True).float()], -1)


def _mean(values: np.ndarray) -> float:
    """The mean of those that are defined."""
    defined = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(defined.mean()) if len(defined) else math.nan


def alarms(figures: Mapping[str, float]) -> list[str]:
    """What is wrong with a pre-training, each in plain sentences with cause and remedy; empty where nothing is.

    Args:
        figures: of `PatchFigures.result`; those that are missing or NaN raise no alarm.
    """
    raised = []
    if figures.get("box_spread", math.nan) < COLLAPSED_BOXES:
        raised.append(
            f"The boxes have collapsed: whatever patch is shown, the same place is answered (the places vary "
            f"{_percent(figures['box_spread'])} as much as the true ones). This is usual in the first steps. If it "
            "lasts, lower the learning rate, keep gradient clipping on, and check that images are not all alike."
        )
    if figures.get("feature_spread", math.nan) < COLLAPSED_FEATURES:
        raised.append(
            f"The features have collapsed: to the backbone all patches look alike (mean distance "
            f"{figures['feature_spread']:.4f}), so no query can know what it is shown. Start from a backbone that was "
            "trained on images, give it images in its own normalisation, and keep it frozen."
        )
    if _skill(figures) < NO_SKILL:
        raised.append(
            f"The queries do not look for what they are shown: for {_percent(figures['consistency'])} of the patches "
            f"the best box comes from the patch's own queries, where chance is {_percent(figures['chance'])}. This is "
            "usual in the first steps. If it lasts, train longer, match within groups, or take a better backbone."
        )
    return raised


def conclusion(
    first: Mapping[str, float],
    last: Mapping[str, float],
    images: int,
    patches: int,
    *,
    before: Mapping[str, float] | None = None,
) -> str:
    """What a pre-training has reached, in plain sentences.

    Args:
        first: figures of the run's first evaluation.
        last: figures of its last; the same object where there was only one.
        images: number of held-out images.
        patches: number of patches in them.
        before: figures of the evaluation before the last, from which one sees whether recall was still rising.
    """
    seen = f"On {_count(images, 'held-out image')}"
    now = last.get("recall50", math.nan)
    if math.isnan(now):
        return f"{seen} nothing was evaluated, so whether it has learnt to find patches is not known."
    small = last.get("recall50_small", math.nan)
    parts = [f"{_percent(now)} of {_count(patches, 'patch', 'patches')} (IoU 0.5)"]
    parts.append(f"{_percent(last['recall75'])} at IoU 0.75")
    if not math.isnan(small):
        parts.append(f"small ones {_percent(small)}")
    finds = f"finds {', '.join(parts)}{_since(first, last)}"
    skill = _skill(last)
    if skill < NO_SKILL:
        failed = "It has not learnt to find patches" if now < 0.5 else "It answers without looking at what it is shown"
        return (
            f"{failed}: {seen[0].lower()}{seen[1:]} it {finds}. It does not look where it is told: "
            f"{_consistency(last)} A detector cannot be expected to gain from this start."
        )
    sentences = [f"{seen} it {finds}."]
    if not math.isnan(skill):
        sentences.append(f"It looks where it is told: {_consistency(last)}")
    if first is not last and now < first.get("recall50", math.nan) - _doubt(now, patches):
        sentences.append("It has become worse in training: lower the learning rate, or start from other weights.")
    elif before is not None and now > before.get("recall50", math.nan) + _doubt(now, patches):
        sentences.append("Recall was still rising: longer training may help.")
    return " ".join(sentences)


def _skill(figures: Mapping[str, float]) -> float:
    """How far consistency has come from chance, 0, to 1; NaN where it is not defined."""
    consistency, chance = (figures.get(name, math.nan) for name in ("consistency", "chance"))
    return (consistency - chance) / (1 - chance)


def _since(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    start = first.get("recall50", math.nan)
    if first is last or math.isnan(start):
        return ""
    return f"; it was {_percent(start)} at the first evaluation"


def _consistency(figures: Mapping[str, float]) -> str:
    return (
        f"for {_percent(figures['consistency'])} of the patches the best box comes from the queries that were shown "
        f"the patch (chance: {_percent(figures['chance'])})."
    )


def _doubt(recall: float, patches: int) -> float:
    """By how much a recall on so many patches is uncertain: its standard error."""
    return math.sqrt(recall * (1 - recall) / max(patches, 1))


def _percent(share: float) -> str:
    """A share in whole percents, in tenths below one percent, so that little does not read as nothing."""
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
