import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit.data.dataset import MOST_FAILURES, Key
from detrkit.data.order import EpochBatches
from detrkit.data.pictures import open_pictures
from detrkit.data.problems import Problems
from detrkit.data.transforms import REDUCTION
from detrkit.data.views import LEAST, ViewAugmentation, ViewDataset, evaluation_views, view_batches
from detrkit.errors import DataError, UsageError

SIZE = 24
PLAIN = ViewAugmentation(size=SIZE, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
VIEWS = np.zeros((2, SIZE, SIZE, 3), np.uint8)
WHOLE = dataclasses.replace(PLAIN, smallest=1.0, most_elongated=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (10, 15, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 40)).save(tmp_path / f"{index}.png")
    return tmp_path


def dataset(folder: Path, augmentation: ViewAugmentation | None = None, seed: int = 0, **options) -> ViewDataset:
    return ViewDataset(open_pictures(folder), augmentation or ViewAugmentation(size=SIZE), seed, **options)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(a, b):
    return torch.equal(a.first, b.first) and torch.equal(a.second, b.second) and a[2:] == b[2:]


def corners() -> Image.Image:
    """A square image whose corners differ: red, green, blue, white from the upper left, row by row."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0, 0] = pixels[0, 1, 1] = pixels[1, 0, 2] = 255
    pixels[1, 1] = 255
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)


def orientations(augmentation: ViewAugmentation) -> set[bytes]:
    """The arrangements of the four corners that views of the whole image have."""
    rng = np.random.default_rng(0)
    views = np.concatenate([augmentation(corners(), rng) for _ in range(60)])
    return {(view[2::19, 2::19][:2, :2] > 127).tobytes() for view in views}


def test_item_holds_two_views_of_the_named_picture(folder):
    item = dataset(folder)[Key(0, 3)]
    assert item.first.shape == item.second.shape == (3, SIZE, SIZE)
    assert item.first.dtype == torch.float32
    assert not torch.equal(item.first, item.second)
    assert item.name == f"{folder}/3.png"
    assert item.replaced == ""


def test_views_depend_on_seed_epoch_and_index_alone(folder):
    views = dataset(folder)
    item = views[Key(3, 2)]
    torch.manual_seed(1)
    assert same(item, views[Key(3, 2)])
    assert same(item, dataset(folder)[Key(3, 2)])
    assert not same(item, views[Key(4, 2)])
    assert not same(item, views[Key(3, 1)])
    assert not same(item, dataset(folder, seed=1)[Key(3, 2)])


def test_views_of_evaluation_stay_the_same_and_differ_from_those_of_training(folder):
    held_out = dataset(folder, evaluation=True)
    assert same(held_out[Key(0, 2)], held_out[Key(5, 2)])
    assert not same(held_out[Key(0, 2)], dataset(folder)[Key(0, 2)])
    assert not same(held_out[Key(0, 2)], dataset(folder, seed=1, evaluation=True)[Key(0, 2)])


@pytest.mark.parametrize(("height", "width"), [(40, 60), (200, 20), (16, 16)])
def test_regions_lie_inside_and_have_the_wanted_shares_and_shapes(height, width):
    augmentation = ViewAugmentation(size=SIZE, smallest=0.2, largest=0.5, most_elongated=2.0)
    rng = np.random.default_rng(0)
    boxes = np.concatenate([augmentation._regions(height, width, rng) for _ in range(300)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 1).all()
    shares, shapes = sides.prod(1) / (height * width), sides[:, 0] / sides[:, 1]
    assert shares.max() < 0.6
    assert 0.4 < shapes.min() < shapes.max() < 2.5
    if (height, width) == (40, 60):
        inside = shares[(sides < (width, height)).all(1)]
        assert np.histogram(inside, 3, (0.2, 0.5))[0].min() > 0.2 * len(inside)
    assert {0, width} <= set(boxes[:, [0, 2]].flat)  # the borders belong to it


def test_a_large_photograph_is_decoded_smaller_and_every_view_keeps_its_pixels(tmp_path, monkeypatch):
    augmentation = dataclasses.replace(PLAIN, smallest=0.25, most_elongated=2.0)
    Image.new("RGB", (544, 544)).save(tmp_path / "large.jpg")
    opened = open_pictures(tmp_path).open(0, coarse=augmentation.coarse)
    assert opened.size == (136, 136)
    sides = [box[2:] - box[:2] for seed in range(200) for box in augmentation._regions(136, 136, random(seed))]
    assert REDUCTION * SIZE <= np.min(sides) <= 1.25 * REDUCTION * SIZE
    sizes = []
    monkeypatch.setattr(ViewAugmentation, "__call__", lambda self, image, rng: sizes.append(image.size) or VIEWS)
    assert dataset(tmp_path, augmentation)[Key(0, 0)].first.shape == (3, SIZE, SIZE)
    assert sizes == [(136, 136)]


def test_the_smallest_view_keeps_twice_its_pixels():
    """Of an image of 256 pixels a quarter of the area, four times as high as wide, is 64 pixels wide."""
    assert ViewAugmentation(size=32, smallest=0.25, most_elongated=4.0).coarse == 256 == REDUCTION * 32 * 4


def test_a_view_shows_what_lies_in_its_region():
    rows, columns = np.mgrid[:64, :96]
    image = Image.fromarray(np.stack([columns * 2, rows * 2, np.zeros_like(rows)], -1).astype(np.uint8))
    views = PLAIN(image, np.random.default_rng(3))
    regions = PLAIN._regions(64, 96, np.random.default_rng(3))
    for view, (left, top, right, bottom) in zip(views, regions, strict=True):
        mean = view.mean((0, 1))
        np.testing.assert_allclose(mean[:2], (left + right - 1, top + bottom - 1), atol=2)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"flip": 0.5}, 2),
        ({"vertical_flip": 0.5}, 2),
        ({"quarter_turn": 0.75}, 4),
        ({"quarter_turn": 0.75, "flip": 0.5}, 8),
    ],
)
def test_directions(options, count):
    assert len(orientations(dataclasses.replace(WHOLE, **options))) == count


def test_a_vertical_flip_turns_the_view_upside_down():
    views = dataclasses.replace(WHOLE, vertical_flip=1.0)(corners(), np.random.default_rng(0))
    plain = WHOLE(corners(), np.random.default_rng(0))
    np.testing.assert_array_equal(views, plain[:, ::-1])


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur"])
def test_colours_and_sharpness_change(name):
    changed = dataclasses.replace(WHOLE, **{name: 1.0})(corners(), np.random.default_rng(0))
    plain = WHOLE(corners(), np.random.default_rng(0))
    assert not np.array_equal(changed, plain)
    assert (np.ptp(changed, -1).max() == 0) == (name == "grayscale")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": 1.5}, "flip"),
        ({"quarter_turn": -0.1}, "quarter_turn"),
        ({"vertical_flip": 2.0}, "vertical_flip"),
        ({"size": 0}, "size"),
        ({"smallest": 0.0}, "smallest"),
        ({"smallest": 0.6, "largest": 0.5}, "smallest"),
        ({"most_elongated": 0.5}, "most_elongated"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        ViewAugmentation(**{"size": SIZE, **options})


def test_a_picture_that_cannot_be_used_is_replaced_and_named(folder):
    (folder / "1.png").write_bytes(b"no image")
    Image.new("RGB", (60, LEAST - 1)).save(folder / "2.png")
    views = dataset(folder)
    for index, reason in ((1, "1.png"), (2, "too small")):
        item = views[Key(0, index)]
        assert reason in item.replaced
        assert f"{folder}/{index}.png" in item.replaced
        assert item.name != f"{folder}/{index}.png"
        assert same(item, views[Key(0, index)])


def test_a_picture_that_is_just_large_enough_is_used(folder):
    Image.new("RGB", (LEAST, LEAST)).save(folder / "2.png")
    assert dataset(folder)[Key(0, 2)].replaced == ""


def test_too_many_failures_are_an_error(folder):
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{MOST_FAILURES + 1} images in a row") as caught:
        dataset(folder)[Key(0, 0)]
    assert str(folder) in str(caught.value)


def test_a_negative_seed_and_no_pictures_are_refused(folder):
    with pytest.raises(UsageError, match="seed"):
        dataset(folder, seed=-1)
    with pytest.raises(DataError, match="no images"):
        ViewDataset(open_pictures(folder).select([]), PLAIN, 0)


def test_batches_are_the_same_for_any_number_of_workers(folder):
    (folder / "1.png").write_bytes(b"no image")
    views = dataset(folder)
    sampler = EpochBatches(len(views), 3, 0, total_steps=4)
    alone, together = (list(view_batches(views, sampler, workers=workers)) for workers in (0, 2))
    assert len(alone) == len(together) == 4
    assert sum(len(loaded.replaced) for loaded in alone) == 2
    for a, b in zip(alone, together, strict=True):
        assert a.batch.images.shape == a.batch.second.shape == (3, 3, SIZE, SIZE)
        assert torch.equal(a.batch.images, b.batch.images)
        assert torch.equal(a.batch.second, b.batch.second)
        assert (a.batch.names, a.replaced) == (b.batch.names, b.replaced)
    moved = alone[0].batch.to("cpu")
    assert torch.equal(moved.second, alone[0].batch.second)
    assert moved.names == alone[0].batch.names


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_picture_once_and_counts_what_it_cannot_read(folder, workers):
    (folder / "1.png").write_bytes(b"no image")
    views, problems = dataset(folder, evaluation=True), Problems()
    batches = list(evaluation_views(views, 4, workers=workers, problems=problems))
    assert [len(batch.images) for batch in batches] == [3, 2]
    assert [Path(name).name for batch in batches for name in batch.names] == [f"{n}.png" for n in (0, 2, 3, 4, 5)]
    assert torch.equal(batches[1].second[1], views[Key(0, 5)].second)
    assert problems.counts == {"unusable-image": 1}
    assert "1.png" in problems.examples["unusable-image"][0]


def test_evaluation_refuses_what_makes_no_sense(folder):
    with pytest.raises(UsageError, match="evaluation"):
        evaluation_views(dataset(folder), 4, workers=0, problems=Problems())
    with pytest.raises(UsageError, match="batch_size"):
        evaluation_views(dataset(folder, evaluation=True), 0, workers=0, problems=Problems())
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="Not one"):
        list(evaluation_views(dataset(folder, evaluation=True), 4, workers=0, problems=Problems()))
