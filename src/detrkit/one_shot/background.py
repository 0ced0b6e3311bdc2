"""What is usual in images: features of no interest, from which those of an example are told.

A feature that half of an image shows says little. So features are centred and whitened over the images that are
searched, as exemplar detectors do it (Hariharan, Malik and Ramanan, "Discriminative Decorrelation for Clustering and
Classification", ECCV 2012). No label is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SHRINKAGE = 0.3
"""How far the covariance is drawn towards one of independent features of equal variance; in units of its mean."""


class Usual(NamedTuple):
    """The mean of features, and the matrix that makes them uncorrelated and equally strong."""

    mean: Float[Tensor, " f"]
    whitening: Float[Tensor, "f f"]

    def taken_from(self, maps: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
        """What is unusual in maps. To whiten them is to whiten every mean over them."""
        centred = maps.float() - self.mean[:, None, None]
        return torch.einsum("bfhw,fg->bghw", centred, self.whitening)


def usual_in(maps: Iterable[Float[Tensor, "f _ _"]]) -> Usual:
    """What is usual in maps.

    Args:
        maps: the backbone's, one an image, without padding; at least one.
    """
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for one in maps:
        tokens = one.flatten(1).cpu().double()  # which some devices do not have
        count, total, products = count + tokens.shape[1], total + tokens.sum(1), products + tokens @ tokens.T
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    values = values.clamp(min=0)
    matrix = vectors / (values + SHRINKAGE * values.mean()).clamp(min=1e-12).sqrt()
    return Usual(mean.float().to(one.device), matrix.float().to(one.device))
