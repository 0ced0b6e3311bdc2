from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.data import distortion
from detrkit.data.distortion import distort
from detrkit.data.transforms import (
    Evaluation,
    Sample,
    Training,
    View,
    cut,
    flip_horizontally,
    flip_vertically,
    resize,
    resized_size,
    scale,
    to_pixels,
    to_tensor,
    training_sizes,
    turn,
    whole_pixels,
)
from detrkit.errors import UsageError

COLOURS = ((255, 0, 0), (0, 255, 0))


def drawn(height, width, boxes):
    """A black picture with one filled rectangle of pure colour for each box, whose label is its colour."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=False):
        pixels[y0:y1, x0:x1] = colour
    return Sample(to_pixels(Image.fromarray(pixels)), np.array(boxes, float).reshape(-1, 4), np.arange(len(boxes)))


def found(image, label):
    """The box of all pixels that are mostly of a label's colour, or None."""
    rows, columns = np.nonzero(image[label].numpy() > 127)
    if len(rows) == 0:
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def agree(sample, tolerance):
    for box, label in zip(sample.boxes, sample.labels, strict=True):
        seen = found(sample.image, label)
        if seen is None:
            assert min(box[2:] - box[:2]) < 1 + tolerance
        else:
            assert np.abs(seen - box).max() <= tolerance, (seen, box)
    for label in set(range(len(COLOURS))) - set(sample.labels.tolist()):
        seen = found(sample.image, label)
        assert seen is None or min(seen[2:] - seen[:2]) <= tolerance


SCENE = drawn(50, 80, [(5, 8, 30, 40), (40, 20, 75, 30)])


@pytest.mark.parametrize(
    "sample",
    [
        flip_horizontally(SCENE),
        flip_vertically(SCENE),
        *(turn(SCENE, quarters) for quarters in range(4)),
        resize(SCENE, 100, 160),
        cut(SCENE, (10, 20, 30, 40)),
        resize(cut(SCENE, (10, 20, 30, 40)), 60, 120),
    ],
)
def test_boxes_follow_pixels_exactly(sample):
    for box, label in zip(sample.boxes, sample.labels, strict=True):
        assert np.array_equal(found(sample.image, label), box)
    assert len(sample.boxes) == 2


def test_flips_and_turns_are_what_they_are_called():
    assert flip_horizontally(SCENE).boxes[0].tolist() == [50, 8, 75, 40]
    assert flip_vertically(SCENE).boxes[0].tolist() == [5, 10, 30, 42]
    assert turn(SCENE, 1).boxes[0].tolist() == [8, 50, 40, 75]
    assert turn(SCENE, 1).image.shape == (3, 80, 50)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_augmented_boxes_follow_pixels(data):
    height, width = data.draw(st.integers(40, 120)), data.draw(st.integers(40, 120))
    middle = width // 2
    boxes = []
    for left, right in ((0, middle), (middle, width)):
        x0 = data.draw(st.integers(left, right - 12))
        y0 = data.draw(st.integers(0, height - 12))
        x1, y1 = data.draw(st.integers(x0 + 10, right)), data.draw(st.integers(y0 + 10, height))
        boxes.append((x0, y0, x1, y1))
    transform = Training(
        sizes=(60, 90, 130),
        longest=200,
        pre_crop_sizes=(50, 70),
        crop_sizes=(30, 60),
        vertical_flip=0.5,
        quarter_turn=0.5,
    )
    sample = transform(drawn(height, width, boxes), np.random.default_rng(data.draw(st.integers(0, 2**32))))
    assert sample.boxes.dtype == np.float64
    assert sample.labels.dtype == np.int64
    assert (sample.boxes >= 0).all()
    assert (sample.boxes <= np.array([*sample.image.shape[:0:-1]] * 2) + 1e-9).all()
    agree(sample, 1)


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_squares_stay_squares_whichever_way_an_image_is_turned(crop):
    transform = Training(
        sizes=(50,),
        longest=100,
        pre_crop_sizes=(50,),
        crop_sizes=(50, 50),
        crop=crop,
        quarter_turn=1.0,
        min_visible=1.0,
    )
    squares = np.array([[left, 40, left + 20, 60] for left in range(0, 200, 20)], float)
    sample = Sample(torch.zeros(3, 100, 200, dtype=torch.uint8), squares, np.arange(10))
    shapes = set()
    for seed in range(30):
        shown = transform(sample, np.random.default_rng(seed))
        shapes.add(tuple(shown.image.shape[1:]))
        assert len(shown.boxes) >= (4 if crop else 10)
        assert (shown.boxes[:, 2:] - shown.boxes[:, :2] == 10).all()
    assert shapes == ({(50, 50)} if crop else {(50, 100), (100, 50)})


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_no_side_exceeds_the_limit(crop):
    """By the official rule the long side follows the rounded short one."""
    transform = Training(sizes=(100,), longest=120, pre_crop_sizes=(50,), crop_sizes=(20, 100), crop=crop)
    for seed in range(30):
        height, width = transform.draw(100, 200, np.random.default_rng(seed)).size
        assert max(height, width) <= 120 + max(height, width) / min(height, width)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200), st.data())
def test_scaling_is_the_bilinear_filter_of_pillow(height, width, new_height, new_width, data):
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    part = np.ascontiguousarray(pixels[top:, left:])
    expected = np.asarray(Image.fromarray(part).resize((new_width, new_height), Image.Resampling.BILINEAR)).astype(int)
    for image in (to_pixels(Image.fromarray(pixels))[:, top:, left:], to_pixels(Image.fromarray(part)).contiguous()):
        found = scale(image, new_height, new_width).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 1


def photo_like(height, width, rng):
    """Smooth colours, with some texture."""
    noise = (Image.fromarray(rng.integers(0, 256, (height // n, width // n, 3), np.uint8)) for n in (16, 4))
    smooth, texture = (np.asarray(one.resize((width, height), Image.Resampling.BICUBIC), float) for one in noise)
    return Image.fromarray((0.75 * smooth + 0.25 * texture).astype(np.uint8))


def one_after_another(image, boxes, rng, sizes):
    """The paper's steps, each done by Pillow on what the one before made: the image, its boxes, and the scale of
    the second resizing (None without a crop).
    """
    width, height = image.size
    if rng.random() < 0.5:
        image, boxes = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), boxes[:, [2, 1, 0, 3]]
        boxes = boxes * (-1, 1, -1, 1) + (width, 0, width, 0)
    rng.random(2)  # nothing is turned or upside down
    cropped = rng.random() < 0.5
    if cropped:
        new_height, new_width = resized_size(height, width, int(rng.choice(sizes.pre_crop_sizes)), None)
        boxes = boxes * ((new_width / width, new_height / height) * 2)
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        low, high = sizes.crop_sizes
        height, width = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in (new_height, new_width))
        top, left = int(rng.integers(new_height - height + 1)), int(rng.integers(new_width - width + 1))
        image = image.crop((left, top, left + width, top + height))
        boxes = np.clip(boxes - (left, top, left, top), 0, (width, height, width, height))
        boxes = boxes[np.all(boxes[:, 2:] > boxes[:, :2], 1)]
    new_height, new_width = resized_size(height, width, int(rng.choice(sizes.sizes)), sizes.longest)
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return image, boxes * ((new_width / width, new_height / height) * 2), cropped


def test_one_resampling_does_what_the_papers_steps_do_one_after_another(rng):
    sizes = training_sizes(160)
    image = photo_like(180, 250, rng)
    boxes = np.array([[0, 0, 250, 180], [20.5, 30, 140, 120]])
    crops = 0
    for seed in range(60):
        sample = Sample(to_pixels(image), boxes, np.arange(2))
        found = Training(**sizes._asdict())(sample, np.random.default_rng(seed))
        plain, expected, cropped = one_after_another(image, boxes, np.random.default_rng(seed), sizes)
        assert found.image.shape[:0:-1] == plain.size
        assert found.boxes.shape == expected.shape
        difference = np.abs(found.image.permute(1, 2, 0).numpy().astype(int) - np.asarray(plain))
        if not cropped:
            assert difference.max() <= 1
            np.testing.assert_allclose(found.boxes, expected, atol=1e-9)
        else:
            # An edge is at most half a pixel of the original off, magnified by 160 / 77 × 120 / 180 at most; and what
            # was resampled twice is a little more blurred.
            crops += 1
            assert np.abs(found.boxes - expected).max() <= 1.5
            assert difference.mean() < 4
    assert crops > 20


def test_a_view_spares_what_is_shown_at_a_fraction_of_its_size():
    def spare(height, width, region, size, quarters=0):
        return View(False, False, quarters, (100, 200), region, size, 0.0, False).spare(height, width)

    whole = (0, 0, 100, 200)
    assert [spare(100, 200, whole, (100 // n, 200 // n)) for n in (1, 2, 3, 4, 8, 16)] == [1, 1, 1, 2, 4, 8]
    assert spare(100, 200, whole, (300, 600)) == 1
    assert spare(100, 200, whole, (26, 50)) == 1
    assert spare(400, 800, (0, 0, 50, 100), (50, 100)) == 2
    assert spare(800, 400, (0, 0, 50, 100), (50, 100), quarters=1) == 2
    assert spare(400, 800, (0, 0, 50, 100), (50, 101)) == 1


def test_evaluation_spares_by_the_side_that_is_shown_largest():
    sized = Evaluation(shortest=100, longest=1000)
    assert [sized.spare(side, 2 * side) for side in (399, 400, 800, 9000)] == [1, 2, 4, 8]
    assert sized.size(399, 400) == (100, 100)
    assert sized.spare(399, 400) == sized.spare(400, 399) == 1  # one side by 3.99, the other by 4
    assert Evaluation(shortest=100, longest=100).spare(400, 800) == 4
    assert sized.size(400, 800) == (100, 200)


@given(st.integers(8, 400), st.integers(8, 400), st.integers(0, 10**6))
def test_what_is_drawn_for_an_image_shows_a_smaller_one_alike(height, width, seed):
    transform = Training(**training_sizes(48)._asdict(), vertical_flip=0.5, quarter_turn=0.5, photometric=0.5)
    view = transform.draw(height, width, np.random.default_rng(seed))
    boxes = np.array([[0, 0, width, height], [width / 4, height / 4, width / 2, height * 0.75]])
    shown = []
    for factor in (1, 2):
        image = torch.zeros(3, height * factor, width * factor, dtype=torch.uint8)
        shown.append(view.show(Sample(image, boxes * factor, np.arange(2)), np.random.default_rng(0)))
    assert shown[0].image.shape[1:] == shown[1].image.shape[1:] == view.size
    if len(shown[0].labels) == len(shown[1].labels):
        # Edges of the region are rounded to pixels of either image.
        grown = max(view.size[axis] * view.whole[axis] / view.region[2 + axis] for axis in (0, 1))
        assert np.abs(shown[0].boxes - shown[1].boxes).max(initial=0) <= 2 * grown / min(height, width) + 1e-9


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_a_stretch_in_whole_pixels_is_within_the_side_and_near_the_truth(scaled, old, data):
    start = data.draw(st.integers(0, scaled - 1))
    length = data.draw(st.integers(1, scaled - start))
    first, count = whole_pixels(start, length, scaled, old)
    assert first >= 0
    assert count >= 1
    assert first + count <= old
    tolerance = 1 if length * old < scaled else 0.5
    assert abs(first - start * old / scaled) <= tolerance
    assert abs(first + count - (start + length) * old / scaled) <= tolerance


def test_crop_drops_what_it_leaves_out():
    sample = drawn(100, 100, [(0, 0, 20, 20), (30, 30, 70, 70)])
    kept = cut(sample, (20, 20, 30, 80))
    assert kept.labels.tolist() == [1]
    assert kept.boxes.tolist() == [[10, 10, 50, 30]]
    assert cut(sample, (0, 25, 100, 75)).labels.tolist() == [1], "left of the region"
    assert cut(sample, (20, 20, 30, 80), min_visible=0.5).labels.tolist() == [1]
    assert cut(sample, (20, 20, 30, 80), min_visible=0.51).labels.tolist() == []


@pytest.mark.parametrize(
    ("height", "width", "shortest", "longest", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),
        (640, 480, 800, 1333, (1066, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (375, 500, 800, 1333, (800, 1066)),
        (800, 1000, 800, 1333, (800, 1000)),
        (300, 1000, 800, 1333, (400, 1333)),  # 399.9 rounds to 400
        (1000, 300, 800, 1333, (1333, 400)),
        (11, 1000, 800, 1333, (15, 1363)),  # 14.66 rounds to 15: the official rule passes the limit
        (500, 500, 256, 426, (256, 256)),
        (1, 10_000, 800, 1333, (1, 10_000)),  # a short side is never below 1
        (480, 3000, 600, None, (600, 3750)),
    ],
)
def test_resized_size_is_the_official_rule(height, width, shortest, longest, expected):
    assert resized_size(height, width, shortest, longest) == expected


def test_training_sizes_scale():
    paper = training_sizes()
    assert paper.sizes == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert paper[1:] == (1333, (400, 500, 600), (384, 600))
    small = training_sizes(256)
    assert small == ((154, 164, 174, 184, 195, 205, 215, 225, 236, 246, 256), 427, (128, 160, 192), (123, 192))
    assert training_sizes(256, 600).longest == 600
    assert training_sizes(1).sizes == (1,)
    with pytest.raises(UsageError, match="must be positive; got shortest 0"):
        training_sizes(0)


def paper(**changes):
    return Training(**{**training_sizes(64)._asdict(), **changes})


def test_training_repeats_with_the_generator_and_varies_with_it():
    transform = paper(photometric=1.0, vertical_flip=0.5, quarter_turn=0.5)
    results = [transform(SCENE, np.random.default_rng(seed)) for seed in (0, 0, *range(1, 20))]
    assert torch.equal(results[0].image, results[1].image)
    assert np.array_equal(results[0].boxes, results[1].boxes)
    assert any(a.image.shape != b.image.shape or not torch.equal(a.image, b.image) for a, b in pairwise(results[2:]))


def test_training_draws_every_size_and_flip():
    flipped, sizes = 0, set()
    for seed in range(200):
        sample = paper(crop=0.0)(SCENE, np.random.default_rng(seed))
        sizes.add(min(sample.image.shape[1:]))
        flipped += sample.boxes[0, 0] > sample.image.shape[2] / 2
    assert sizes == set(training_sizes(64).sizes)
    assert 70 < flipped < 130
    crops = {
        paper(crop=1.0, sizes=(50,), longest=1000, flip=0.0)(SCENE, np.random.default_rng(seed)).image.shape
        for seed in range(40)
    }
    assert len(crops) > 10


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (31, 31)])
def test_training_takes_images_below_the_crop_size(size):
    sample = drawn(*size, [(0, 0, size[1], size[0])])
    for seed in range(20):
        result = paper(crop=1.0, crop_sizes=(50, 70))(sample, np.random.default_rng(seed))
        assert min(result.image.shape[1:]) >= 1
        assert result.labels.tolist() == [0]


def test_training_keeps_images_without_boxes():
    sample = drawn(50, 60, [])
    for seed in range(20):
        assert paper(quarter_turn=1.0, vertical_flip=1.0)(sample, np.random.default_rng(seed)).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, "flip: .*out of range; got 1.5"),
        ({"photometric": -0.1}, "photometric: "),
        ({"min_visible": float("nan")}, "min_visible: "),
        ({"sizes": ()}, "sizes: .*must be positive"),
        ({"pre_crop_sizes": (0,)}, "pre_crop_sizes: "),
        ({"crop_sizes": (9, 8)}, "make no sense"),
        ({"longest": 0}, "longest 0"),
    ],
)
def test_senseless_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        paper(**changes)


def test_evaluation_resizes_image_and_boxes():
    image = Image.fromarray(SCENE.image.permute(1, 2, 0).numpy())
    assert Evaluation(shortest=100, longest=500)(image).shape == (3, 100, 160)
    assert Evaluation(shortest=100, longest=500).resized(SCENE).boxes[0].tolist() == [10, 16, 60, 80]
    with pytest.raises(UsageError, match="must be positive"):
        Evaluation(shortest=0)


def test_to_tensor_normalises_as_imagenet_models_expect():
    image = Image.fromarray(np.array([[[0, 128, 255], [124, 116, 104]]], np.uint8))
    tensor = to_tensor(image)
    expected = torch.tensor(
        [
            [-0.485 / 0.229, (124 / 255 - 0.485) / 0.229],
            [(128 / 255 - 0.456) / 0.224, (116 / 255 - 0.456) / 0.224],
            [(1 - 0.406) / 0.225, (104 / 255 - 0.406) / 0.225],
        ]
    )
    assert tensor.shape == (3, 1, 2)
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor[:, 0], expected, atol=1e-6, rtol=0)


def test_distortion_changes_colours_within_its_strength_and_nothing_else(monkeypatch):
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = {np.asarray(distort(grey, np.random.default_rng(seed)))[0, 0, 0] for seed in range(300)}
    assert 100 in values
    assert min(values) >= round((100 - 32) * 0.5) - 1
    assert max(values) <= round((100 + 32) * 1.5) + 1
    assert len(values) > 50
    with monkeypatch.context() as patch:  # what is left changes the saturation alone; nothing is as bright as 255
        patch.setattr(distortion, "_BRIGHTNESS", 0)
        patch.setattr(distortion, "_HUE_DEGREES", 0)
        brown = Image.new("RGB", (4, 4), (120, 60, 60))
        seen = [np.asarray(distort(brown, np.random.default_rng(seed)).convert("HSV"))[0, 0, 1] for seed in range(300)]
        factors = np.array(seen) / 127.5
        assert 0.47 < factors.min() < 0.55 < 1.45 < factors.max() < 1.53
    red = Image.new("RGB", (4, 4), (200, 40, 40))
    hues = [np.asarray(distort(red, np.random.default_rng(seed)).convert("HSV"))[0, 0] for seed in range(300)]
    turned = (np.array([hue[0] for hue in hues]).astype(int) + 128) % 256 - 128
    assert turned.min() < -8
    assert turned.max() > 8
    assert np.abs(turned).max() <= 18 * 256 / 360 + 2
