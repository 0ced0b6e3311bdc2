import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detrkit.data.crops import (
    PAPER_SIZES,
    ImageResizing,
    PatchAugmentation,
    StratifiedCrops,
    UniformCrops,
    jitter_colours,
    pretraining_sizes,
    turn_hue,
)
from detrkit.errors import UsageError

SIDES = st.integers(17, 700)


def noise(height=60, width=80, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def sides(boxes):
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


@pytest.mark.parametrize("crops", [UniformCrops(), StratifiedCrops(), StratifiedCrops(0.01, 1.0, 50.0)])
@given(height=SIDES, width=SIDES, count=st.integers(1, 30), seed=st.integers(0, 99))
def test_crops_lie_inside_and_are_not_too_small(crops, height, width, count, seed):
    boxes = crops(height, width, count, np.random.default_rng(seed))
    assert boxes.dtype == np.int64
    assert boxes.shape == (count, 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
    assert np.array_equal(boxes, crops(height, width, count, np.random.default_rng(seed)))


@pytest.mark.parametrize("crops", [UniformCrops(), StratifiedCrops()])
def test_small_images_are_refused(crops, rng):
    assert not crops.is_large_enough(16, 500)
    assert not crops.is_large_enough(500, 16)
    assert crops.is_large_enough(17, 17)
    with pytest.raises(UsageError, match=r"too small to cut patches from; got 500 × 16 pixels; expected more than 16"):
        crops(16, 500, 10, rng)


def test_the_uniform_rule_is_the_official_one(rng):
    boxes = UniformCrops()(30, 26, 100_000, rng)
    widths, heights = sides(boxes)
    for values, low, high in ((widths, 8, 18), (heights, 8, 22)):
        counts = np.bincount(values, minlength=high + 1)
        assert counts[:low].sum() == 0
        assert len(counts) == high + 1
        assert counts[low:] / 100_000 == pytest.approx(1 / (high - low + 1), rel=0.05)
    assert abs(np.corrcoef(widths, heights)[0, 1]) < 0.02
    assert boxes[:, 2].max() == 25, "a crop touches the right border"
    assert boxes[:, 3].max() == 29, "a crop touches the bottom border"
    left = boxes[widths == 18, 0]
    assert np.bincount(left) / len(left) == pytest.approx(1 / 8, rel=0.1)


def test_the_uniform_rule_gives_the_boxes_of_the_published_statistics(rng):
    widths, heights = sides(UniformCrops()(375, 500, 50_000, rng))
    share = widths * heights / (375 * 500)
    assert share.mean() == pytest.approx(0.25, abs=0.01)
    assert np.median(share) == pytest.approx(0.19, abs=0.01)
    assert (np.maximum(widths / heights, heights / widths) > 3).mean() == pytest.approx(0.32, abs=0.01)


def test_every_stratum_is_hit_once(rng):
    crops = StratifiedCrops(0.1, 0.5, 3.0)
    orders = set()
    for _ in range(20):
        widths, heights = sides(crops(300_000, 400_000, 10, rng))
        size = np.log(np.sqrt(widths * heights / 12e10) / 0.1) / math.log(5)
        shape = (np.log(widths / heights) / math.log(3) + 1) / 2
        order = tuple(np.floor(size * 10).astype(int))
        orders.add(order)
        assert sorted(order) == list(range(10))
        assert sorted(np.floor(shape * 10)) == list(range(10))
    assert len(orders) == 20


def test_sizes_and_shapes_are_log_uniform_and_independent(rng):
    widths, heights = sides(StratifiedCrops(0.1, 0.5, 3.0)(3000, 4000, 20_000, rng))
    size = np.log(np.sqrt(widths * heights / 12e6))
    shape = np.log(widths / heights)
    assert np.histogram(size, 10, (math.log(0.1), math.log(0.5)))[0] / 2000 == pytest.approx(1, rel=0.02)
    assert np.histogram(shape, 10, (-math.log(3), math.log(3)))[0] / 2000 == pytest.approx(1, rel=0.02)
    assert abs(np.corrcoef(size, shape)[0, 1]) < 0.03


def test_stratified_crops_reach_every_border_and_keep_their_shape_where_they_are_shrunk(rng):
    low, high = np.split(StratifiedCrops(0.5, 0.5, 1.0)(40, 40, 4200, rng), 2, 1)
    assert (high - low == 20).all()
    for axis in (0, 1):
        assert np.bincount(low[:, axis], minlength=21) / 200 == pytest.approx(1, abs=0.3)
    widths, heights = sides(StratifiedCrops(0.9, 0.9, 3.0)(40, 40, 3000, rng))
    assert (np.maximum(widths, heights) >= 36).all()
    assert np.abs(np.log(widths / heights)).max() == pytest.approx(math.log(3), abs=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformCrops(0),
        lambda: StratifiedCrops(0.0),
        lambda: StratifiedCrops(0.5, 0.4),
        lambda: StratifiedCrops(0.5, 1.1),
        lambda: StratifiedCrops(float("nan")),
        lambda: StratifiedCrops(most_elongated=0.5),
        lambda: StratifiedCrops(least=0),
        lambda: PatchAugmentation(size=0),
        lambda: PatchAugmentation(jitter=1.1),
        lambda: PatchAugmentation(blur=-0.1),
        lambda: ImageResizing(sizes=(), longest=9),
        lambda: ImageResizing(sizes=(0,), longest=9),
        lambda: ImageResizing(sizes=(9,), longest=0),
        lambda: ImageResizing(sizes=(9,), longest=9, flip=2.0),
        lambda: pretraining_sizes(0),
        lambda: pretraining_sizes(9, 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_patches_hold_the_pixels_of_their_box(rng):
    image = noise()
    boxes = np.array([[0, 0, 80, 60], [3, 5, 35, 37], [60, 50, 80, 60]])
    patches = PatchAugmentation.none(32)(image, boxes, rng)
    assert patches.shape == (3, 32, 32, 3)
    assert np.array_equal(patches[1], np.asarray(image)[5:37, 3:35])
    for patch, box in zip(patches, boxes, strict=True):
        expected = image.crop(box.tolist()).resize((32, 32), Image.Resampling.BILINEAR)
        error = np.abs(patch.astype(int) - np.asarray(expected))
        assert error[3:-3, 3:-3].max() <= 2  # at the border the filter sees a little more than the box


def test_large_crops_are_antialiased(rng):
    y, x = np.mgrid[:1024, :1024]
    board = Image.fromarray(np.where((x + y) % 2, 255, 0).astype(np.uint8)).convert("RGB")
    (patch,) = PatchAugmentation.none(32)(board, np.array([[0, 0, 1024, 1024]]), rng)
    assert np.abs(patch.astype(int) - 127).max() <= 2


def test_nothing_is_changed_without_augmentation_and_the_generator_decides(rng):
    image, boxes = noise(), np.array([[0, 0, 32, 32]] * 6)
    plain = PatchAugmentation.none(32)(image, boxes, rng)
    assert (plain == plain[0]).all()
    full = PatchAugmentation(size=32, flip=0.5)
    first, again, other = (full(image, boxes, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({patch.tobytes() for patch in first}) > 3


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "flip"])
def test_each_augmentation_does_what_it_says_as_often_as_it_says(name, rng):
    image, boxes = noise(), np.array([[0, 0, 32, 32]] * 400)
    chances = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "flip": 0.0, name: 0.3}
    patches = PatchAugmentation(size=32, **chances)(image, boxes, rng).astype(int)
    plain = np.asarray(image).astype(int)[:32, :32]
    changed = [patch for patch in patches if not np.array_equal(patch, plain)]
    assert 0.22 < len(changed) / 400 < 0.38
    for patch in changed:
        if name == "flip":
            assert np.array_equal(patch, plain[:, ::-1])
        elif name == "grayscale":
            assert np.ptp(patch, axis=2).max() == 0
        elif name == "blur":
            assert patch.std() < plain.std()
            assert patch.mean() == pytest.approx(plain.mean(), abs=2)
    if name == "blur":
        assert len({round(patch.std()) for patch in changed}) > 10, "the width of the blur varies"


def test_colours_change_within_the_stated_bounds():
    grey, red = Image.new("RGB", (4, 4), (100, 100, 100)), Image.new("RGB", (4, 4), (200, 80, 80))
    greys, hues, ratios = [], [], []
    for seed in range(200):
        pixel = jitter_colours(grey, np.random.default_rng(seed)).getpixel((0, 0))
        assert len(set(pixel)) == 1
        greys.append(pixel[0])
        jittered = jitter_colours(red, np.random.default_rng(seed))
        hue, saturation, _ = jittered.convert("HSV").getpixel((0, 0))
        hues.append((hue + 128) % 256 - 128)
        ratios.append(saturation / red.convert("HSV").getpixel((0, 0))[1])
    assert 58 <= min(greys) <= 64
    assert 136 <= max(greys) <= 141
    assert -32 <= min(hues) <= -22  # 25.6, and the rounding of dark colours
    assert 22 <= max(hues) <= 32
    assert min(ratios) < 0.7
    assert max(ratios) > 1.3


def test_a_hue_goes_around_the_circle():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert turn_hue(red, 1 / 3).getpixel((0, 0))[1] > 250
    assert turn_hue(red, -1 / 3).getpixel((0, 0))[2] > 250
    assert turn_hue(red, 1.0).getpixel((0, 0)) == (255, 0, 0)


def test_contrast_moves_colours_to_and_from_the_mean():
    image = Image.fromarray(np.repeat(np.array([[[60]], [[120]]], np.uint8), 3, 2))
    spreads = set()
    for seed in range(60):
        low, high = (jitter_colours(image, np.random.default_rng(seed)).getpixel((0, row))[0] for row in (0, 1))
        spreads.add(round((high - low) / (high + low), 2))
    assert min(spreads) < 0.25 < 0.4 < max(spreads)  # 0.33 before


def test_sizes_of_the_paper_and_scaled_ones():
    assert pretraining_sizes() == (PAPER_SIZES, 600)
    assert 384 not in pretraining_sizes().sizes
    assert pretraining_sizes(240) == (tuple(size // 2 for size in PAPER_SIZES), 300)
    assert pretraining_sizes(480, 700, multi_scale=False) == ((480,), 700)
    assert pretraining_sizes(1).sizes == (1,)


def test_images_get_one_of_the_sizes(rng):
    resizing = ImageResizing(sizes=(30, 40), longest=50)
    found = set()
    for _ in range(30):
        original, resized = resizing(noise(), rng)
        assert original == noise()
        found.add(resized.size)
    assert found == {(40, 30), (50, 38)}
    _, resized = resizing.fixed()(noise(), rng)
    assert resized.size == (50, 38)


def test_a_marked_box_is_found_after_resizing_and_flipping(rng):
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[12:30, 8:24] = 255
    directions = set()
    for _ in range(20):
        original, resized = ImageResizing(sizes=(30, 120), longest=200, flip=0.5)(Image.fromarray(pixels), rng)
        fractions = []
        for image in (original, resized):
            rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
            edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            fractions.append(edges / (image.size * 2))
        assert fractions[1] == pytest.approx(fractions[0], abs=0.02)
        directions.add(round(float(fractions[0][0]), 2))
    assert directions == {0.1, 0.7}
    assert ImageResizing(sizes=(30,), longest=50, flip=1.0).fixed().flip == 0
