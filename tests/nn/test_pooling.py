"""The mean of a map over a place and over its parts, against plain loops."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.nn.pooling import extents, pool_boxes, pool_grids, pool_lattice

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


def by_parts(features: Tensor, corners: tuple[float, float, float, float], cells: int) -> Tensor:
    """Each part of a box by itself, row by row."""
    x0, y0, x1, y1 = corners
    width, height = (x1 - x0) / cells, (y1 - y0) / cells
    parts = [
        (x0 + column * width, y0 + row * height, x0 + (column + 1) * width, y0 + (row + 1) * height)
        for row in range(cells)
        for column in range(cells)
    ]
    return pool_boxes(features, xyxy_to_cxcywh(torch.tensor(parts)))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.lists(places(), min_size=1, max_size=3))
def test_parts_are_places_of_their_own(cells: int, rows: int, columns: int, corners: list[tuple[int, int, int, int]]):
    features = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(rows * 7 + columns))
    shares = torch.tensor(corners, dtype=torch.float32) / GRID
    found = pool_grids(features, xyxy_to_cxcywh(shares).expand(2, -1, -1), cells)
    assert found.shape == (2, len(corners), cells**2, 3)
    for image in range(2):
        expected = torch.stack([by_parts(features[image], tuple(one), cells) for one in shares.tolist()])
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)


def test_one_part_is_the_whole_and_each_image_has_its_own_boxes():
    features = torch.randn(2, 3, 5, 4)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.6]], [[0.3, 0.6, 0.2, 0.2]]])
    found = pool_grids(features, boxes, 1)
    for image in range(2):
        torch.testing.assert_close(found[image, :, 0], pool_boxes(features[image], boxes[image]), atol=1e-5, rtol=1e-5)


def test_what_lies_outside_is_cut():
    features = torch.randn(1, 3, 4, 4)
    over, inside = torch.tensor([[0.9, 0.1, 0.6, 0.5]]), torch.tensor([[0.6, 0.0, 1.0, 0.35]])
    torch.testing.assert_close(
        pool_grids(features, over[None], 3), pool_grids(features, xyxy_to_cxcywh(inside)[None], 3), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("box", [(0.55, 0.3, 0.0, 0.0), (0.55, 0.3, 0.0, 0.02), (0.55, 0.3, -0.1, -0.1)])
def test_a_box_without_area_is_taken_for_its_place(box: tuple[float, float, float, float]):
    features = torch.randn(1, 3, 4, 4)
    found = pool_grids(features, torch.tensor([[box]]), 2)
    torch.testing.assert_close(found[0, 0, 0], features[0, :, 1, 2], atol=1e-3, rtol=1e-3)


def test_a_box_beyond_the_border_is_no_trouble():
    found = pool_grids(torch.randn(1, 3, 4, 4), torch.tensor([[[1.7, 1.7, 0.2, 0.2], [-1.0, 0.5, 0.3, 0.3]]]), 2)
    assert torch.isfinite(found).all()


@given(
    st.integers(1, 3),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(2, 12),
    st.integers(2, 12),
)
def test_a_lattice_is_the_boxes_at_its_crossings(cells: int, x: list[int], y: list[int], width: int, height: int):
    features = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(cells))
    left, top = torch.tensor(x) / GRID, torch.tensor(y) / GRID
    size = (width / GRID, height / GRID)
    found = pool_lattice(features, left, top, size, cells)
    assert found.shape == (len(y), len(x), cells**2, 3)
    corner = torch.cartesian_prod(top, left).flip(-1)
    boxes = torch.cat([corner + torch.tensor(size) / 2, torch.tensor(size).expand(len(corner), 2)], 1)
    torch.testing.assert_close(
        found.flatten(0, 1), pool_grids(features[None], boxes[None], cells)[0], atol=1e-4, rtol=1e-4
    )


def test_parts_teach_maps_and_no_boxes_beyond_them():
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    pool_grids(features, torch.tensor([[[1 / 6, 0.5, 1 / 3, 1.0]]]), 2).sum().backward()
    assert features.grad is not None
    assert features.grad[..., 0].min() > 0
    assert features.grad[..., 1:].abs().max() <= 1e-6


def test_an_image_ends_within_a_cell_where_the_stride_does_not_divide_its_side():
    images, padding = torch.zeros(2, 3, 37, 64), torch.zeros(2, 37, 64, dtype=torch.bool)
    padding[1, 20:] = padding[1, :, 49:] = True
    torch.testing.assert_close(extents(images, None, (3, 4), 16), torch.tensor([[37 / 48, 1.0]] * 2))
    torch.testing.assert_close(extents(images, padding, (3, 4), 16), torch.tensor([[37 / 48, 1], [20 / 48, 49 / 64]]))
