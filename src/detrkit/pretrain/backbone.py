"""Self-supervised training of a backbone by redundancy reduction (Zbontar et al., Barlow Twins, ICML 2021).

The backbone sees two views of every image. Each number of its embedding is to agree between the views, and to say
something that the other numbers do not: the cross-correlation of the embeddings is drawn to the identity. There are no
negatives, no second network and no queue, and small batches suffice. When it is done the backbone is kept, and the
projector is not. The file reads as algorithm 1 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.errors import UsageError
from detrkit.losses.criterion import Losses, constants
from detrkit.losses.matching import NonFiniteError
from detrkit.nn.backbone import Backbone

EPSILON = 1e-5
"""Added to the variance of an embedding before the root."""

COLLAPSED_SPREAD = 0.002
"""A `feature_spread` below this is an alarm: of untrained ResNets it is 0.01 to 0.1 on photographs and microscopy."""

COLLAPSED_RANK = 0.03
"""A `feature_rank` below this is an alarm: images differ along few directions only."""

RECOGNISED_RANK = 0.25
"""Where the `mean_rank` is below this, images are recognised after all, however seldom they are the very nearest."""

_CHUNK = 1024  # rows of the table of similarities that are held at once
_ROUNDING = 1e-13  # what of the features' squares comes from single precision alone
_DEAD = 1e-3  # a feature that varies by less than this part of the usual is not stretched further


class Embeddings(NamedTuple):
    """What the projector makes of both views of each image; row by row the same images."""

    first: Float[Tensor, "b d"]
    second: Float[Tensor, "b d"]


class BarlowTwins(nn.Module):
    """A backbone and a projector, which is there for the loss alone.

    The projector's batch norms go by the batch, always, and keep no averages: the projector is never used outside
    training. Its input is what is kept: the last level of the backbone, averaged over its cells.

    Args:
        backbone: what is trained. Its own norms stay as they are.
        width: of the projector and of the embeddings.

    Raises:
        UsageError: a width below 2, or a backbone of which nothing trains.
    """

    def __init__(self, backbone: Backbone, *, width: int = 256):
        super().__init__()
        if width < 2:
            raise UsageError("The embedding is too small", where="width", got=width, expected="at least 2")
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise UsageError("Nothing of the backbone trains", remedy="Unfreeze it: backbone.freeze(0).")
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_hidden(backbone.channels[-1], width), *_hidden(width, width), nn.Linear(width, width, bias=False)
        )

    def describe(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b f"]:
        """What the backbone says of each image: its last level, averaged over the cells."""
        return self.backbone(images)[-1].mean((-2, -1))

    def forward(self, first: Float[Tensor, "b 3 s s"], second: Float[Tensor, "b 3 s s"]) -> Embeddings:
        """Embed two views of each image.

        Args:
            first: normalised.
            second: normalised, other views of the same images in the same order.

        Raises:
            UsageError: fewer than two images.
        """
        if len(first) < 2:
            raise UsageError(
                "Correlations need several images",
                where="batch_size",
                got=len(first),
                expected="at least 2",
                remedy="32 or more work well.",
            )
        features = self.describe(torch.cat([first, second]))
        one, other = features.chunk(2)
        return Embeddings(self.projector(one), self.projector(other))


def _hidden(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm1d(outputs, eps=EPSILON, track_running_stats=False)
    return nn.Linear(inputs, outputs, bias=False), norm, nn.ReLU(inplace=True)


@dataclass(frozen=True)
class RedundancyReduction:
    """The loss of Barlow Twins (equation 1 of the paper), divided by the width of the embeddings.

    Processes that train together correlate each their own images: their gradients are averaged as ever.

    Attributes:
        redundancy_weight: λ, weight of the numbers off the diagonal, of which there are width times as many. The paper
            has 0.005 at a width of 8192, where they are 32 times as many as at 256.
    """

    redundancy_weight: float = 0.02

    def __call__(self, found: Embeddings) -> Losses:
        """Both terms of a batch, `invariance` and `redundancy`, each at one layer."""
        first, second = (_standardised(embedding) for embedding in found)
        correlation = first.T @ second / len(first)
        diagonal = correlation.diagonal()
        width = len(diagonal)
        invariance = (1 - diagonal).square().sum() / width
        redundancy = (correlation.square().sum() - diagonal.square().sum()) / width
        return Losses(
            ("invariance", "redundancy"),
            torch.stack([invariance, redundancy])[:, None],
            constants(invariance, 1.0, self.redundancy_weight),
            invariance.new_zeros(()),
        )


def _standardised(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Mean 0 and variance 1 over the batch, in single precision whatever the arithmetic of the network."""
    values = embedding.float()
    variance, mean = torch.var_mean(values, 0, correction=0)
    return (values - mean) * (variance + EPSILON).rsqrt()


class ViewFigures:
    """Gathers features of held-out images in two views, and makes figures of them.

    A figure does not depend on how images were spread over batches and processes, apart from rounding. An object can be
    sent to another process, and be `merged` with others there. It holds two vectors of features for each image.
    """

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._second: list[Tensor] = []

    @property
    def images(self) -> int:
        """How many images were added."""
        return sum(map(len, self._first))

    @torch.no_grad()
    def add(self, first: Float[Tensor, "b f"], second: Float[Tensor, "b f"], names: Sequence[str]) -> None:
        """Add a batch.

        Args:
            first: features of the first views, as of `BarlowTwins.describe` in evaluation mode.
            second: features of the second views of the same images.
            names: the images' files, for messages.

        Raises:
            NonFiniteError: features are NaN or infinite; names the images.
        """
        finite = (first.isfinite() & second.isfinite()).all(-1).tolist()
        if not all(finite):
            raise NonFiniteError([name for name, good in zip(names, finite, strict=True) if not good])
        self._first.append(first.float().cpu())
        self._second.append(second.float().cpu())

    @staticmethod
    def merged(parts: Sequence[ViewFigures]) -> ViewFigures:
        """What several processes gathered, together."""
        whole = ViewFigures()
        for part in parts:
            whole._first += part._first
            whole._second += part._second
        return whole

    def result(self) -> dict[str, float]:
        """All figures; NaN where there are fewer than two images.

        `retrieval`: share of images whose second view is nearest to their own first view among those of all
        images (cosine of standardised features; of equally near ones each counts in part). `chance`: what that
        would be if features said nothing. `mean_rank`: the share of other images whose first view is nearer to a second
        view than its own is (equally near ones count half), on average: 0 where all are found, 0.5 by chance. It says
        more than retrieval where images are few or much alike. `feature_rank`: how many directions the features of the
        first views use, from 0, a single one, to 1, as many as there can be, all alike; the entropy of the singular
        values counts them (Roy and Vetterli, EUSIPCO 2007; Garrido et al., RankMe, ICML 2023). `feature_spread`: mean
        distance 1 − cosine between the first views of different images, not standardised. The last two show a collapse.
        """
        if self.images < 2:
            return dict.fromkeys(("retrieval", "chance", "mean_rank", "feature_rank", "feature_spread"), math.nan)
        first, second = torch.cat(self._first), torch.cat(self._second)
        retrieval, mean_rank = _retrieval(first, second)
        return {
            "retrieval": retrieval,
            "chance": 1 / self.images,
            "mean_rank": mean_rank,
            "feature_rank": _rank(first),
            "feature_spread": _spread(first),
        }


def _retrieval(first: Float[Tensor, "n f"], second: Float[Tensor, "n f"]) -> tuple[float, float]:
    """Retrieval and mean rank. Features are standardised, because the layer that follows a backbone can stretch each
    as it likes.
    """
    both = torch.cat([first, second]).double()
    deviation = both.std(0)
    floor = _DEAD * deviation.square().mean().sqrt()
    scale = torch.where(deviation > 0, 1 / deviation.clamp(min=floor), 0.0)
    gallery, asked = F.normalize(((both - both.mean(0)) * scale).float(), dim=-1).chunk(2)
    found = nearer = 0.0
    for start in range(0, len(asked), _CHUNK):
        similarity = asked[start : start + _CHUNK] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        ties = (similarity == own).sum(1)
        found += float(((similarity <= own).all(1) / ties).sum())
        nearer += float((similarity > own).sum() + (ties - 1).sum() / 2)
    return found / len(asked), nearer / (len(asked) * (len(asked) - 1))


def _rank(features: Float[Tensor, "n f"]) -> float:
    """Effective rank less 1, as a fraction of the highest rank less 1."""
    features = features.double()
    centred = features - features.mean(0)
    most = min(len(centred) - 1, centred.shape[1])
    squares = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(squares)
    values = torch.where(values > _ROUNDING * features.square().sum(), values, 0.0).sqrt()
    if most < 2 or float(values.sum()) == 0:
        return 0.0
    shares = values / values.sum()
    return (math.exp(float(torch.special.entr(shares).sum())) - 1) / (most - 1)


def _spread(features: Float[Tensor, "n f"]) -> float:
    """From the sum of unit vectors alone: its square is the sum of all products, those with themselves being 1."""
    unit = F.normalize(features.double(), dim=-1)
    # Features that are zero are all alike, and so point along an axis of their own.
    zero = float((unit == 0).all(-1).sum())
    count = len(unit)
    products = float(unit.sum(0).square().sum()) + zero**2 - count
    return max(0.0, 1 - products / (count * (count - 1)))


def alarms(figures: Mapping[str, float]) -> list[str]:
    """What is wrong with a training, each in plain sentences with cause and remedy; empty where nothing is.

    Args:
        figures: of `ViewFigures.result`; those that are missing or NaN raise no alarm.
    """
    raised = []
    spread, rank = figures.get("feature_spread", math.nan), figures.get("feature_rank", math.nan)
    if spread < COLLAPSED_SPREAD:
        raised.append(
            f"The features have collapsed: to the backbone all images look alike (mean distance {spread:.4f}). Lower "
            "the learning rate, take larger batches, and check that images are not all alike."
        )
    if rank < COLLAPSED_RANK:
        raised.append(
            f"The features have collapsed: they use {_percent(rank)} of the directions that they have. Raise the "
            "weight of redundancy, lower the learning rate, or take larger batches."
        )
    if _is_at_chance(figures):
        raised.append(
            f"Views are not recognised: for {_percent(figures['retrieval'])} of the images the two views are nearest "
            f"to each other, where chance is {_percent(figures['chance'])}{_ranked(figures)}. This is usual in the "
            "first steps. If it lasts, train longer, or take views that show more of the image and change its colours "
            "less."
        )
    return raised


def conclusion(
    first: Mapping[str, float],
    last: Mapping[str, float],
    images: int,
    *,
    before: Mapping[str, float] | None = None,
) -> str:
    """What a training has reached, in plain sentences.

    Args:
        first: figures of the run's first evaluation.
        last: figures of its last; the same object where there was only one.
        images: number of held-out images.
        before: figures of the evaluation before the last, from which one sees whether it was still rising.
    """
    seen = f"On {images:,} held-out image{'' if images == 1 else 's'}"
    now, start = last.get("retrieval", math.nan), first.get("retrieval", math.nan)
    if math.isnan(now):
        return f"{seen} nothing could be evaluated, so whether the backbone has learnt is not known."
    was = "" if first is last or math.isnan(start) else f"; it was {_percent(start)} at the first evaluation"
    finds = (
        f"{seen} the backbone recognises {_percent(now)} in another view (chance: {_percent(last['chance'])}){was}"
        f"{_ranked(last)}."
    )
    if collapsed := [alarm for alarm in alarms(last) if "collapsed" in alarm]:
        return f"It has failed. {finds} {collapsed[0]} Do not use these weights."
    if _is_at_chance(last):
        return f"It has not learnt to recognise images. {finds} A detector cannot be expected to gain from this start."
    sentences = [finds]
    gain = _gain(first, last, images)
    if was and gain < 0:
        sentences.append("It has become worse in training: lower the learning rate, or keep the weights of the start.")
    elif was and gain == 0:
        sentences.append("That is no clear gain over the first evaluation.")
    if before is not None and _gain(before, last, images) > 0:
        sentences.append("It was still rising: longer training may help.")
    sentences.append("Whether a detector gains from this start, only its own training can tell.")
    return " ".join(sentences)


def _gain(before: Mapping[str, float], after: Mapping[str, float], images: int) -> int:
    """Above 0 where retrieval or mean rank have become better by more than their standard error, below 0 where worse.

    Where one is better and the other worse, or one is unknown and the other as it was, it is 0.
    """
    gain = 0
    for name, better in (("retrieval", 1), ("mean_rank", -1)):
        was, now = before.get(name, math.nan), after.get(name, math.nan)
        doubt = math.sqrt(now * (1 - now) / max(images, 1))  # of a mean rank it is less
        gain += better * ((now > was + doubt) - (now < was - doubt))
    return gain


def _ranked(figures: Mapping[str, float]) -> str:
    rank = figures.get("mean_rank", math.nan)
    return "" if math.isnan(rank) else f"; another image is nearer in {_percent(rank)} of all cases (chance: 50 %)"


def _is_at_chance(figures: Mapping[str, float]) -> bool:
    """Up to three images are found by chance; where there are few images, half of them must be. But a mean rank that
    chance does not give, three standard errors from a half, shows that images are told apart.
    """
    chance, rank = figures.get("chance", math.nan), figures.get("mean_rank", math.nan)
    by_chance = 0.5 - 3 * math.sqrt(chance / 12)  # ranks are uniform then: a variance of 1/12 for each image
    found = figures.get("retrieval", math.nan) <= min(3 * chance, 0.5)
    return found and not rank < min(RECOGNISED_RANK, by_chance)


def _percent(share: float) -> str:
    """A share in whole percents, in tenths below one percent, so that little does not read as nothing."""
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"
