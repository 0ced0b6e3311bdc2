"""Regions that stand out: what is drawn on a ground is found, whatever its colour, and the ground is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detrkit.data.regions import LONGEST, SAME, _to_lab, find_regions

GROUND = (128, 128, 128)
COLOURS = {
    "red": (210, 40, 40), "green": (30, 180, 60), "blue": (40, 60, 220), "dark": (20, 20, 20),
    "bright": (250, 250, 250), "yellow": (230, 220, 30),
}  # fmt: skip
Box = tuple[int, int, int, int]


def draw(*shapes: tuple[str, Box, str], size: tuple[int, int] = (200, 160), ground=GROUND) -> Image.Image:
    """An image of a plain ground with squares and discs: a kind, a box in pixels and a colour each."""
    image = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(image)
    for kind, (left, top, right, bottom), colour in shapes:
        shape = pen.ellipse if kind == "disc" else pen.rectangle
        shape((left, top, right - 1, bottom - 1), fill=COLOURS[colour])
    return image


def overlaps(found: np.ndarray, image: Image.Image, *boxes: Box) -> list[float]:
    """The best IoU that any of the regions has with each box, which is in pixels."""
    return [max((iou(region, np.array(box) / (image.size * 2)) for region in found), default=0.0) for box in boxes]


def iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.clip(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0, None)
    union = np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - np.prod(sides)
    return float(np.prod(sides) / union)


def noise(seed: int = 0, size: tuple[int, int] = (160, 120)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("kind", ["square", "disc"])
@pytest.mark.parametrize("colour", COLOURS)
def test_what_stands_out_is_found_whatever_its_colour(kind: str, colour: str) -> None:
    for box in ((40, 30, 90, 80), (120, 60, 190, 140), (20, 100, 44, 124)):
        image = draw((kind, box, colour))
        found = find_regions(image)
        assert overlaps(found[:1], image, box)[0] > 0.7, "nothing stands out more"


def test_things_of_several_colours_are_found_together() -> None:
    boxes = ((15, 15, 55, 55), (80, 20, 130, 60), (140, 90, 185, 140), (30, 90, 75, 130))
    image = draw(*zip(("square", "disc", "disc", "square"), boxes, ("red", "bright", "dark", "blue"), strict=True))
    assert min(overlaps(find_regions(image), image, *boxes)) > 0.7


def test_a_thing_at_the_border_is_found_and_the_ground_in_the_corners_is_not() -> None:
    box = (0, 50, 60, 110)
    image = draw(("square", box, "green"))
    found = find_regions(image)
    assert overlaps(found, image, box)[0] > 0.7
    for left, top, right, bottom in (found * np.array([*image.size, *image.size])).round().astype(int).tolist():
        borders = (left == 0) + (top == 0) + (right == image.width) + (bottom == image.height)
        assert borders <= 1
    corner = draw(("square", (0, 0, 60, 60), "green"))
    assert overlaps(find_regions(corner), corner, (0, 0, 60, 60))[0] < 0.5


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (12, 200, 90)])
def test_a_plain_image_has_none(ground: tuple[int, int, int]) -> None:
    for size in ((200, 160), (1, 1), (3, 2)):
        found = find_regions(Image.new("RGB", size, ground))
        assert found.shape == (0, 4)
        assert found.dtype == np.float64


def test_what_is_too_small_or_nearly_everything_is_none() -> None:
    assert not len(find_regions(draw(("square", (50, 50, 54, 54), "red"))))
    most = (10, 10, 190, 150)
    image = draw(("square", most, "red"))
    assert overlaps(find_regions(image), image, most)[0] < 0.7


@pytest.mark.parametrize("seed", range(4))
def test_boxes_lie_in_the_image_apart_and_are_no_more_than_asked(seed: int) -> None:
    image = noise(seed)
    found = find_regions(image)
    assert 1 < len(found) <= 20
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found[:, 2:] > found[:, :2]).all()
    assert max(iou(found[i], found[j]) for i in range(len(found)) for j in range(i)) <= SAME
    for limit in (0, 1, len(found) - 1):
        assert np.array_equal(find_regions(image, limit), found[:limit]), "the best ones"


def test_nothing_is_random() -> None:
    first = find_regions(noise(5))
    np.random.seed(3)  # noqa: NPY002 - to see that nothing reads it
    assert np.array_equal(first, find_regions(noise(5)))
    assert not np.array_equal(first, find_regions(noise(6)))


def test_size_changes_little() -> None:
    box, sizes = (0.2, 0.25, 0.45, 0.6), ((100, 80), (400, 320), (1000, 800))
    for width, height in sizes:
        scaled = tuple(round(part * side) for part, side in zip(box, (width, height) * 2, strict=True))
        image = draw(("disc", scaled, "yellow"), size=(width, height))
        assert iou(find_regions(image)[0], np.array(box)) > 0.8


def test_images_without_colours() -> None:
    box = (40, 30, 90, 80)
    image = draw(("disc", box, "bright")).convert("L").convert("RGB")
    assert overlaps(find_regions(image), image, box)[0] > 0.7


@pytest.mark.parametrize("size", [(9, 7), (600, 8), (8, 600), (20_000, 1)])
def test_tiny_and_elongated_images_are_looked_at_in_a_moderate_size(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def to_lab(rgb: np.ndarray) -> np.ndarray:
        seen.append(rgb.shape[:2])
        assert max(rgb.shape) <= LONGEST, "else a strip of an image would take gigabytes"
        return _to_lab(rgb)

    monkeypatch.setattr("detrkit.data.regions._to_lab", to_lab)
    found = find_regions(noise(1, size))
    assert found.shape[1] == 4
    assert np.isfinite(found).all()
    ((height, width),) = seen
    assert width / height == pytest.approx(size[0] / size[1], rel=0.1) or min(height, width) == 1
