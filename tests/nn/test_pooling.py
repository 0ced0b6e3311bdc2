"""The mean of a map over a place, against a plain loop over cells."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.nn.pooling import pool_boxes

GRID = 32  # corners lie on this grid of the image, so that shares of cells are exact fractions


def by_loop(features: Tensor, corners: tuple[int, int, int, int]) -> Tensor:
    """Every cell times the area that it has in common with the box, over the area of the box."""
    _, rows, columns = features.shape
    x0, y0, x1, y1 = (Fraction(corner, GRID) for corner in corners)
    total = torch.zeros(len(features), dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            height = min(y1, Fraction(row + 1, rows)) - max(y0, Fraction(row, rows))
            width = min(x1, Fraction(column + 1, columns)) - max(x0, Fraction(column, columns))
            if height > 0 and width > 0:
                total += features[:, row, column].double() * float(height * width / ((y1 - y0) * (x1 - x0)))
    return total.float()


def pooled(features: Tensor, *corners: tuple[int, int, int, int]) -> Tensor:
    return pool_boxes(features, xyxy_to_cxcywh(torch.tensor(corners, dtype=torch.float32) / GRID))


@st.composite
def places(draw: st.DrawFn) -> tuple[int, int, int, int]:
    (x0, x1), (y0, y1) = (
        sorted(draw(st.lists(st.integers(0, GRID), min_size=2, max_size=2, unique=True))) for _ in range(2)
    )
    return x0, y0, x1, y1


@given(st.integers(1, 6), st.integers(1, 6), st.lists(places(), min_size=1, max_size=4))
def test_a_place_is_the_mean_of_its_cells(rows: int, columns: int, corners: list[tuple[int, int, int, int]]):
    features = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows * 7 + columns))
    expected = torch.stack([by_loop(features, one) for one in corners])
    torch.testing.assert_close(pooled(features, *corners), expected, atol=1e-5, rtol=1e-5)


def test_a_place_inside_one_cell_has_its_feature():
    features = torch.arange(24.0).view(2, 3, 4)
    small = pooled(features, (17, 12, 18, 13))
    torch.testing.assert_close(small, features[:, 1, 2][None], atol=1e-5, rtol=0)


def test_a_place_across_two_cells_mixes_them_by_area():
    features = torch.tensor([[[0.0, 10.0]]])
    assert pooled(features, (15, 0, 19, 32)).item() == pytest.approx(7.5)


def test_the_whole_image_is_the_mean_of_the_map_and_the_corners_are_corners():
    features = torch.randn(5, 4, 8)
    torch.testing.assert_close(pooled(features, (0, 0, GRID, GRID))[0], features.mean((1, 2)), atol=1e-5, rtol=0)
    first, last = pooled(features, (0, 0, 1, 1), (GRID - 1, GRID - 1, GRID, GRID))
    torch.testing.assert_close(first, features[:, 0, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(last, features[:, -1, -1], atol=1e-5, rtol=0)


def test_a_box_that_rounding_put_over_the_border_counts_what_is_inside():
    features = torch.tensor([[[1.0, 3.0]]])
    box = torch.tensor([[0.75 + 1e-6, 0.5, 0.5 + 1e-6, 1.0 + 1e-6]])
    torch.testing.assert_close(pool_boxes(features, box), torch.tensor([[3.0]]), atol=1e-4, rtol=0)


def test_places_teach_the_map():
    features = torch.randn(2, 3, 3, requires_grad=True)
    pooled(features, (0, 0, GRID // 3, GRID)).sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert features.grad[:, :, 0].min() > 0
    assert features.grad[:, :, 1:].abs().max() <= 1e-6
