"""Prompts: who may see whom, and what is added to which query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrkit.errors import UsageError
from detrkit.nn.groups import separated
from detrkit.prompts import apart, ask, group_of_queries
from detrkit.structures import Queries


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Queries of a set, groups, prompts for the first of them, and sets."""
    count = draw(st.integers(1, 40))
    groups = draw(st.integers(1, count))
    return count, groups, draw(st.integers(1, groups)), draw(st.integers(1, 3))


def learned(count: int, sets: int, images: int = 1) -> Queries:
    content, position = torch.randn(2, images, sets * count, 4)
    return Queries(content, position, separated(sets * count, sets), sets)


@given(layouts())
def test_every_group_sees_exactly_itself(layout: tuple[int, int, int, int]):
    count, groups, prompts, sets = layout
    group = group_of_queries(count, groups)
    asked = ask(learned(count, sets), torch.randn(1, prompts, 4), groups)
    owners = [(one, patch) for one in range(sets) for patch in group.tolist() if patch < prompts]
    expected = [[mine != other for other in owners] for mine in owners]
    assert asked.blocked is not None
    assert asked.blocked.tolist() == expected
    assert not asked.blocked.all(-1).any()
    assert asked.groups == sets
    assert asked.content.shape == asked.position.shape == (1, len(owners), 4)


@given(st.integers(1, 200), st.data())
def test_groups_are_neighbours_of_equal_size(count: int, data: st.DataObject):
    groups = data.draw(st.integers(1, count))
    group = group_of_queries(count, groups)
    sizes = torch.bincount(group, minlength=groups)
    assert (group.diff() >= 0).all()
    assert sizes.shape == (groups,)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 1


def test_groups_that_divide_are_those_of_the_paper():
    assert group_of_queries(100, 10).tolist() == [query // 10 for query in range(100)]
    assert apart(torch.tensor([0, 0, 1])).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


@pytest.mark.parametrize(("count", "groups"), [(5, 6), (5, 0), (0, 1)])
def test_groups_without_queries_are_refused(count: int, groups: int):
    with pytest.raises(UsageError, match=f"{groups} groups for {count} queries"):
        group_of_queries(count, groups)


@pytest.mark.parametrize("place", ["position", "content", "both"])
@pytest.mark.parametrize("sets", [1, 2])
def test_prompts_are_added_where_they_belong(place: str, sets: int):
    queries, prompts = learned(5, sets, images=2), torch.randn(2, 2, 4)
    group = [0, 0, 1, 1, 2]  # the last group has no prompt
    keep = torch.tensor([[1.0, 0, 1, 1, 1], [1, 1, 0, 0.5, 1]])
    asked = ask(queries, prompts, 3, keep, place)
    for image in range(2):
        for one in range(sets):
            for query in range(4):
                now, before = one * 4 + query, one * 5 + query
                added = prompts[image, group[query]] * keep[image, query]
                content = queries.content[image, before] + (added if place != "position" else 0)
                position = queries.position[image, before] + (added if place != "content" else 0)
                assert torch.equal(asked.content[image, now], content)
                assert torch.equal(asked.position[image, now], position)


def test_what_queries_may_not_see_stays_so():
    queries = Queries(
        torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0]]).bool()
    )
    asked = ask(queries, torch.zeros(1, 2, 4), 2)
    assert asked.blocked is not None
    assert asked.blocked.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
