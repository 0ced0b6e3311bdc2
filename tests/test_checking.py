"""Types and shapes are checked as the tests run, in the library and by the decorator that does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beartype import beartype
from checking import checked
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from detrkit import boxes
from detrkit.data.transforms import resized_size
from detrkit.training.distributed import World

Row = Float[Tensor, " n"]


def test_the_library_is_checked() -> None:
    two, three = torch.rand(2, 4), torch.rand(3, 4)
    assert boxes.elementwise_iou(two, two)[0].shape == (2,)
    for wrong in ((two, three), (two[:, :3], two[:, :3]), (two.long(), two.long()), (two.tolist(), two.tolist())):
        with pytest.raises(TypeCheckError):
            boxes.elementwise_iou(*wrong)
    with pytest.raises(TypeCheckError):
        resized_size("64", 80, 64, 96)
    with pytest.raises(TypeCheckError):
        World(rank="0")


def rows(a: Row, b: Float[Tensor, " n"], length: int) -> Row:
    return a[:length]


def counted(number: int) -> str:
    return "x" * number if number else number  # type: ignore[return-value]


def each(number: int) -> Iterator[int]:
    yield from range(number)


@dataclass
class Pair:
    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]


def numbers(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.rand(count) for count in counts)


@pytest.mark.parametrize(
    ("item", "right", "wrong"),
    [
        (rows, (*numbers(3, 3), 3), [(*numbers(3, 2), 3), (*numbers(3, 3), "3"), (*numbers(3, 3), 2)]),
        (counted, (3,), [("3",), (0,)]),
        (each, (3,), [("3",)]),
        (Pair, numbers(3, 3), [numbers(3, 2), (*numbers(3), [0.5])]),
    ],
)
def test_what_is_decorated_is_checked(item: Any, right: tuple[Any, ...], wrong: list[tuple[Any, ...]]) -> None:
    decorated = checked(typechecker=beartype)(item)
    decorated(*right)
    for arguments in wrong:
        with pytest.raises(TypeCheckError):
            decorated(*arguments)


def test_axes_belong_to_one_call() -> None:
    decorated = checked(rows, typechecker=beartype)
    for length in (3, 5):
        assert len(decorated(torch.rand(length), torch.rand(length), length)) == length


def test_names_that_only_type_checkers_know_are_no_obstacle() -> None:
    def local(number: int, other: Unknown) -> int:  # type: ignore[name-defined]  # noqa: F821
        return number

    decorated = checked(local, typechecker=beartype)
    assert decorated(1, None) == 1
    with pytest.raises(TypeCheckError):
        decorated("1", None)
