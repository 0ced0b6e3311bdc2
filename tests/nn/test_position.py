"""Position encodings against formulas written out, and on grids that the official code cannot take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detrkit.nn.position import LearnedPosition, SinePosition, sine_embedding, spread_points


def padding_of(sizes: list[tuple[int, int]], height: int, width: int) -> Tensor:
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for row, (inside_height, inside_width) in enumerate(sizes):
        padding[row, :inside_height, :inside_width] = False
    return padding


def naive(count: int, of: int, channels: int, temperature: float) -> list[float]:
    """One coordinate's channels: the cell's number, counted from 1, as a share of the image, on a circle."""
    angle = count / (of + 1e-6) * 2 * math.pi
    values = []
    for channel in range(channels):
        wavelength = temperature ** (2 * (channel // 2) / channels)
        values.append(math.sin(angle / wavelength) if channel % 2 == 0 else math.cos(angle / wavelength))
    return values


@pytest.mark.parametrize("temperature", [10000.0, 20.0])
def test_sine_is_the_formula_with_padding(temperature: float) -> None:
    sizes = [(3, 5), (4, 2), (1, 1)]
    found = SinePosition(16, temperature)(padding_of(sizes, 4, 5)).view(3, 4, 5, 16)
    for image, (height, width) in enumerate(sizes):
        for y in range(height):
            for x in range(width):
                expected = naive(y + 1, height, 8, temperature) + naive(x + 1, width, 8, temperature)
                assert found[image, y, x].tolist() == pytest.approx(expected, abs=2e-6)


def test_sine_of_an_image_does_not_depend_on_its_padding() -> None:
    encode = SinePosition(32)
    alone = encode(padding_of([(3, 4)], 3, 4)).view(3, 4, 32)
    padded = encode(padding_of([(3, 4), (9, 7)], 9, 7))[0].view(9, 7, 32)
    assert torch.equal(padded[:3, :4], alone)
    assert bool(padded.isfinite().all())


def test_sine_embedding_interleaves() -> None:
    found = sine_embedding(torch.tensor([0.0, 1.0]), 4, 100.0)
    expected = [[0, 1, 0, 1], [math.sin(1), math.cos(1), math.sin(0.1), math.cos(0.1)]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 13), (50, 50)])
def test_learned_reads_its_tables_as_they_are(height: int, width: int) -> None:
    encode = LearnedPosition(8)
    found = encode(padding_of([(height, width), (1, 1)], height, width)).view(2, height, width, 8)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0, :, :, :4], encode.column[:width].expand(height, -1, -1))
    assert torch.equal(found[0, :, :, 4:], encode.row[:height, None].expand(-1, width, -1))


@pytest.mark.parametrize(("height", "width"), [(60, 70), (20, 99), (51, 50)])
def test_learned_stretches_beyond_its_cells(height: int, width: int) -> None:
    encode = LearnedPosition(8)
    found = encode(padding_of([(height, width)], height, width)).view(height, width, 8)
    assert torch.equal(found, encode(padding_of([(height, width)], height, width)).view(height, width, 8))
    for table, part, length in ((encode.column, found[0, :, :4], width), (encode.row, found[:, 0, 4:], height)):
        if length <= 50:
            assert torch.equal(part, table[:length])
            continue
        torch.testing.assert_close(part[0], table[0])
        torch.testing.assert_close(part[-1], table[-1])
        for cell in range(length):
            at = cell * 49 / (length - 1)
            low = min(int(at), 48)
            torch.testing.assert_close(
                part[cell], table[low] + (at - low) * (table[low + 1] - table[low]), atol=1e-5, rtol=0
            )


def test_learned_trains_on_grids_of_any_size() -> None:
    encode = LearnedPosition(8)
    encode(padding_of([(60, 3)], 60, 3)).sum().backward()
    assert encode.row.grad is not None
    assert encode.column.grad is not None
    assert bool((encode.row.grad != 0).all())
    assert bool((encode.column.grad[:3] != 0).all())
    assert not bool(encode.column.grad[3:].any())


def test_spread_points_cover_the_square_however_many() -> None:
    for count in (1, 7, 60, 300):
        points = spread_points(count)
        assert points.shape == (count, 2)
        assert bool(((points >= 0) & (points < 1)).all())
        assert torch.equal(points, spread_points(300)[:count])
    root = 1.32471795724474602596
    torch.testing.assert_close(
        spread_points(2), torch.tensor([[(0.5 + n / root) % 1, (0.5 + n / root**2) % 1] for n in (1, 2)])
    )
    points = spread_points(64)
    quarters = (points * 4).long()
    taken = {(int(y), int(x)) for y, x in quarters}
    assert len(taken) == 16, "a sixteenth of the image without a point"
    distances = torch.cdist(points, points) + torch.eye(64)
    assert float(distances.min()) > 0.5 / 8
