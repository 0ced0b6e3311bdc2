"""Masks and segments in pictures: who is tinted how, where the lines run, and what is true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.cases import annotations_of
from PIL import Image

from detrkit import visualize
from detrkit.errors import UsageError
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Category, Detections
from detrkit.visualize.colours import PALETTE, PAPER, colours_apart
from detrkit.visualize.tint import VEIL, outline, tint

TABLE = (Category(1, "cat"), Category(2, "dog"), Category(3, "sky", is_thing=False))
GREY = (128, 128, 128)
SIZE = (120, 160)


def box_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    pixels = np.zeros(SIZE, bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def found(masks: list[np.ndarray], labels: list[int], scores: list[float]) -> Detections:
    segments = RunLengths.encode(np.stack(masks))
    return Detections(
        segments.boxes().astype(np.float32), np.array(scores, np.float32), np.array(labels), TABLE, SIZE, "", segments
    )


def grey() -> Image.Image:
    return Image.new("RGB", SIZE[::-1], GREY)


def at(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(picture)[y, x].tolist())


def veil(colour: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(pytest.approx(128 + (value - 128) * VEIL, abs=1) for value in colour)


def test_each_instance_has_its_colour_and_its_edge():
    cats = found([box_mask(20, 40, 60, 90), box_mask(100, 40, 140, 90)], [0, 0], [0.9, 0.8])
    picture = visualize.draw(grey(), cats)
    assert at(picture, 40, 65) == veil(PALETTE[0])
    assert at(picture, 120, 65) == veil(PALETTE[1])
    assert at(picture, 20, 65) == PALETTE[0]
    assert at(picture, 139, 65) == PALETTE[1]
    assert at(picture, 80, 65) == GREY


def test_an_edge_follows_the_mask_and_not_the_box():
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    disc = (rows - 60) ** 2 + (columns - 80) ** 2 < 40**2
    picture = visualize.draw(grey(), found([disc], [1], [0.9]))
    assert at(picture, 80, 98) == veil(PALETTE[1])
    assert at(picture, 80, 99) == PALETTE[1]
    assert at(picture, 45, 30) == GREY  # inside the box, outside the disc


def test_the_best_scored_lies_on_top():
    below, above = box_mask(20, 20, 100, 100), box_mask(60, 40, 140, 80)
    picture = visualize.draw(grey(), found([below, above], [0, 1], [0.5, 0.9]))
    assert at(picture, 80, 60) == veil(PALETTE[1])
    assert at(picture, 40, 60) == veil(PALETTE[0])
    turned = visualize.draw(grey(), found([below, above], [0, 1], [0.9, 0.5]))
    assert at(turned, 80, 60) == veil(PALETTE[0])


@pytest.mark.parametrize("side", [80, 480])
def test_masks_scale_with_the_picture(side):
    picture = visualize.draw(grey(), found([box_mask(40, 20, 120, 100)], [0], [0.9]), longest_side=side, scores=False)
    scale = side / 160
    assert at(picture, round(80 * scale), round(60 * scale)) == veil(PALETTE[0])
    assert at(picture, round(40 * scale), round(60 * scale)) == PALETTE[0]
    assert at(picture, round(40 * scale) - 2, round(60 * scale)) == GREY
    assert at(picture, round(120 * scale) + 1, round(60 * scale)) == GREY


def test_only_the_place_of_the_masks_is_touched_and_all_of_it(rng: np.random.Generator):
    picture = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    before = np.array(picture)
    for masks in (
        [box_mask(0, 0, 20, 30), box_mask(10, 20, 60, 50)],
        [box_mask(100, 90, 160, 120)],
        [box_mask(0, 119, 160, 120), box_mask(0, 0, 0, 0)],
        [box_mask(0, 0, 0, 0)],
    ):
        colours = [(250, 10, 20), (30, 200, 40)][: len(masks)]
        tinted = np.asarray(tint(picture, RunLengths.encode(np.stack(masks)), colours, 2))
        assert np.array_equal(picture, before)
        wanted = before.astype(np.float64)
        for mask, colour in [*zip(masks, colours, strict=True)][::-1]:
            wanted[mask] = before[mask] * (1 - VEIL) + np.array(colour) * VEIL
            wanted[mask & outline(mask, 2)] = colour
        assert np.abs(tinted - wanted).max() <= 1


def test_a_mask_that_is_not_known_leaves_its_box():
    one = found([box_mask(20, 40, 60, 90)], [0], [0.9])
    unknown = replace(one, segments=RunLengths.unknown(np.array([SIZE])))
    assert visualize.draw(grey(), unknown).tobytes() == visualize.draw(grey(), replace(one, segments=None)).tobytes()


def test_an_outline_is_as_wide_as_it_is_said():
    pixels = np.ones((9, 11), bool)
    for line in (1, 2, 3):
        assert (~outline(pixels, line)).sum() == (9 - 2 * line) * (11 - 2 * line)
    assert outline(np.ones((2, 5), bool), 3).all()


def test_colours_stay_with_their_class_where_they_can():
    boxes = np.array([[0, 0, 1, 1], [5, 5, 6, 6], [5.5, 5.5, 7, 7], [20, 20, 21, 21]])
    colours = colours_apart(np.array([3, 1, 1, 3]), boxes)
    assert colours[:2] == [PALETTE[3], PALETTE[1]]
    assert len(set(colours)) == 4
    crowded = colours_apart(np.zeros(50, int), np.tile([0, 0, 1, 1], (50, 1)))
    assert len(set(crowded)) == 21
    far = np.arange(44)[:, None] * 10 + np.array([0, 0, 1, 1])
    far[43] = far[0]  # as many have each colour, but its own is a neighbour's
    assert colours_apart(np.zeros(44, int), far)[43] != colours_apart(np.zeros(44, int), far)[0]


def cut() -> PanopticMap:
    """A cat and a dog before the sky, nothing said on the left."""
    ids = np.full(SIZE, 2, np.int32)
    ids[:, :30] = 0
    ids[40:100, 50:90] = 1
    ids[40:100, 90:140] = 3
    return PanopticMap(ids, np.array([0, 2, 0]), np.array([0.9, 0.8, 0.7], np.float32), TABLE, SIZE)


def test_segments_are_coloured_and_parted_by_lines():
    picture = visualize.draw_panoptic(grey(), cut())
    first, sky, second = at(picture, 70, 90), at(picture, 100, 10), at(picture, 115, 90)
    assert len({first, sky, second, GREY}) == 4
    assert at(picture, 15, 60) == GREY
    assert at(picture, 90, 90) == at(picture, 50, 90) == at(picture, 70, 40) == at(picture, 30, 60) == PAPER
    large = visualize.draw_panoptic(grey(), cut(), longest_side=640)
    assert large.size == (640, 480)
    assert [at(large, x * 4, y * 4) for x, y in ((70, 90), (100, 10), (115, 90), (15, 60))] == [
        first,
        sky,
        second,
        GREY,
    ]


def test_segments_are_named_in_their_middle():
    plain, named = (
        np.asarray(visualize.draw_panoptic(grey(), replace(cut(), categories=table)), int)
        for table in (tuple(category._replace(name="") for category in TABLE), TABLE)
    )
    changed = np.argwhere((plain != named).any(-1))
    for (y0, x0), (y1, x1) in (((40, 50), (100, 90)), ((40, 90), (100, 140))):
        inside = changed[((changed >= (y0, x0)) & (changed < (y1, x1))).all(1)]
        assert np.abs(inside.mean(0) - ((y0 + y1) / 2, (x0 + x1) / 2)).max() < 5
    scored = visualize.draw_panoptic(grey(), cut(), scores=True)
    assert scored.tobytes() != visualize.draw_panoptic(grey(), cut()).tobytes()


def test_an_image_without_segments_stays_as_it_is():
    empty = PanopticMap(np.zeros(SIZE, np.int32), np.zeros(0, int), np.zeros(0, np.float32), TABLE, SIZE)
    assert visualize.draw_panoptic(grey(), empty).tobytes() == grey().tobytes()


def test_segments_of_another_image_are_refused():
    with pytest.raises(UsageError, match=r"another size; got an image of 160 × 100; expected 160 × 120"):
        visualize.draw_panoptic(Image.new("RGB", (160, 100)), cut())


def test_truth_has_its_masks():
    annotations = annotations_of(
        [[], [[20, 40, 60, 90], [0, 0, 160, 40], [100, 40, 140, 90], [0, 90, 160, 120]]],
        [[], [0, 2, 1, 1]],
        classes=3,
        crowd=[[], [False, False, False, True]],
        size=SIZE,
    )
    masks = [box_mask(20, 40, 60, 90), box_mask(0, 0, 160, 40), box_mask(100, 40, 140, 90), box_mask(0, 90, 160, 120)]
    annotations = replace(annotations, masks=RunLengths.encode(np.stack(masks)), categories=TABLE)
    truth = visualize.truth_of(annotations, 1)
    assert truth.names == ["cat", "dog"]  # neither the crowd nor the sky
    np.testing.assert_array_equal(truth.masks, np.stack([masks[0], masks[2]]))
    assert visualize.truth_of(replace(annotations, masks=None), 1).segments is None

    segments = visualize.panoptic_truth_of(annotations, 1)
    assert segments.names == ["cat", "sky", "dog", "dog"]
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(segments.ids == row + 1, mask)
    assert len(visualize.panoptic_truth_of(annotations, 0)) == 0
    both = visualize.panoptic_side_by_side(grey(), segments, cut())
    assert both.width > 2 * SIZE[1]
    unknown = RunLengths.joined([RunLengths.unknown(np.array([SIZE])), annotations.masks[1:]])
    partly = visualize.panoptic_truth_of(replace(annotations, masks=unknown), 1)
    assert partly.names == ["sky", "dog", "dog"]
    assert partly.ids[60, 40] == 0


def split_of(folder, size, box):
    """One image of 120 × 160 pixels, of which the annotations state another size, with a box and its mask."""
    grey().save(folder / "0.png")
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    annotations = annotations_of([[box]], [[0]], size=size, root=folder)
    return replace(annotations, masks=RunLengths.encode(mask[None]))


@pytest.mark.parametrize(
    ("size", "box"),
    [((240, 320), [80, 40, 160, 120]), ((160, 120), [40, 20, 80, 60])],
    ids=["scaled", "turned"],
)
def test_truth_and_answer_are_drawn_in_the_frame_of_the_file(tmp_path, size, box):
    plain, other = split_of(tmp_path, SIZE, [40, 20, 80, 60]), split_of(tmp_path, size, box)
    wanted, shown = (visualize.compare(one, 0, visualize.truth_of(one, 0)) for one in (plain, other))
    assert shown.tobytes() == wanted.tobytes()
    assert (np.asarray(wanted) == PALETTE[0]).all(-1).any()
    wanted, shown = (visualize.compare_panoptic(one, 0, visualize.panoptic_truth_of(one, 0)) for one in (plain, other))
    assert shown.tobytes() == wanted.tobytes()
