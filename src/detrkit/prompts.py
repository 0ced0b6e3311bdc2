"""Features in, queries out: the one way in which a model of any variant is asked for something that it is shown.

A prompt is a feature: of a patch that was cut from the image (UP-DETR), or of an example. It is added to the queries of
its group, and groups do not see each other.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrkit.errors import UsageError
from detrkit.structures import Queries

Place = Literal["position", "content", "both"]
"""What of a query a prompt is added to; UP-DETR adds it to the position."""


DISTINCT = 4.0
"""How much larger than a token a prompt may start."""


@torch.no_grad()
def start_as_tokens(prompting: nn.Linear, detector: nn.Module) -> bool:
    """Let prompts begin as what a detector makes of the same features in an image, `DISTINCT` times as strong.

    A query and the tokens of what it is told are then alike from the first step.

    Args:
        prompting: from features to prompts; changed in place.
        detector: of any variant.

    Returns:
        Whether the variant makes tokens by a projection, as it takes; else nothing is changed.
    """
    tokens: Any = getattr(detector, "projection", None)
    if tokens is None or tokens.weight.shape != (*prompting.weight.shape, 1, 1):
        return False
    prompting.weight.copy_(DISTINCT * tokens.weight[:, :, 0, 0])
    prompting.bias.copy_(DISTINCT * tokens.bias)
    return True


def group_of_queries(count: int, groups: int, device: torch.device | str = "cpu") -> Int64[Tensor, " {count}"]:
    """The group of each query: neighbours share one, and no group has more than one query more than another.

    Args:
        count: number of queries.
        groups: number of groups; it need not divide `count`.
        device: where the answer lies.

    Raises:
        UsageError: there are more groups than queries, or none.
    """
    if not 1 <= groups <= count:
        raise UsageError(
            "Every group needs a query", got=f"{groups} groups for {count} queries", expected=f"1 … {count} groups"
        )
    return torch.arange(count, device=device) * groups // count


def apart(group: Int64[Tensor, " q"]) -> Bool[Tensor, "q q"]:
    """Who may not attend to whom: True between queries of different groups."""
    return group[:, None] != group[None, :]


def ask(
    queries: Queries,
    prompts: Float[Tensor, "b p d"],
    groups: int = 1,
    keep: Float[Tensor, "b n"] | None = None,
    place: Place = "position",
) -> Queries:
    """The queries that ask for what is shown: prompt j is added to all queries of group j.

    UP-DETR (Dai et al., CVPR 2021), section 3.2.

    Args:
        queries: a model's own; where they are several sets (`Queries.groups`), every set is asked for everything.
        prompts: one feature for each group, as wide as a query. Queries of groups that have none are left out.
        groups: that the queries of a set are divided into (`group_of_queries`).
        keep: factor of a query's prompt: 0 where the query is to do without.
        place: what of a query the prompt is added to.

    Returns:
        The queries that have a prompt, in their order. Those of different groups or sets may not attend to each other.
    """
    sets = queries.groups
    count = queries.content.shape[1] // sets
    asked = -(-prompts.shape[1] * count // groups)  # the first ones, so that nobody waits for a device to say which
    group = group_of_queries(count, groups, prompts.device)[:asked]
    added = prompts[:, group]
    if keep is not None:
        added = added * keep[:, :asked, None]
    added = added.repeat(1, sets, 1)
    blocked = apart(group).repeat(sets, sets)
    if queries.blocked is not None:
        own = queries.blocked.view(sets, count, sets, count)[:, :asked, :, :asked]
        blocked = blocked | own.reshape(blocked.shape)
    content, position = (
        one.view(len(one), sets, count, one.shape[-1])[:, :, :asked].flatten(1, 2)
        for one in (queries.content, queries.position)
    )
    return Queries(
        content + added if place != "position" else content,
        position + added if place != "content" else position,
        blocked,
        sets,
    )
