"""Several sets of queries side by side, which do not see each other (Group DETR, Chen et al., ICCV 2023).

Each set is matched with the objects on its own, so that every image teaches so many times.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def separated(count: int, groups: int, device: torch.device | str = "cpu") -> Bool[Tensor, "{count} {count}"] | None:
    """Who may not attend to whom: True between queries of different groups. None where there is one group.

    Args:
        count: all queries; the first `count / groups` are the first group, and so on.
        groups: number of groups; divides `count`.
        device: where the relation lies.
    """
    if groups == 1:
        return None
    group = torch.arange(count, device=device) // (count // groups)
    return group[:, None] != group[None, :]


def fold_groups(x: Float[Tensor, "layer b q *d"], groups: int) -> Float[Tensor, "_ b _ *d"]:
    """Groups of queries as further layers: (layer, b, groups · q, …) to (layer · groups, b, q, …).

    Of each layer the first group, which alone answers in the end, comes last.
    """
    if groups == 1:
        return x
    layers, batch, count = x.shape[:3]
    apart = x.reshape(layers, batch, groups, count // groups, *x.shape[3:])
    return apart.flip(2).transpose(1, 2).flatten(0, 1)
