import itertools

import numpy as np
import pytest

from detrkit.data.dataset import DetectionDataset, Key
from detrkit.data.order import STRETCH, EpochBatches, alike
from detrkit.data.transforms import Evaluation, Training, training_sizes
from detrkit.errors import UsageError

SHAPES = ((480, 640), (640, 480), (500, 500), (333, 500))


def size_of(key):
    """Sizes of pictures as a phone takes them, each at one of eleven scales."""
    height, width = SHAPES[key.index % len(SHAPES)]
    scale = 480 + 32 * ((key.index * 7 + key.epoch * 3) % 11)
    return scale * height // 480, scale * width // 480


def useful(sampler):
    """The share of all batches that is no padding."""
    shown = [np.array([size_of(key) for key in batch]) for batch in sampler]
    return sum(sides.prod(1).sum() for sides in shown) / sum(len(sides) * sides.max(0).prod() for sides in shown)


def test_every_epoch_is_a_permutation():
    sampler = EpochBatches(12, 4, 0, total_steps=9)
    assert sampler.steps_per_epoch == 3
    batches = list(sampler)
    assert len(batches) == len(sampler) == 9
    orders = []
    for epoch in range(3):
        keys = list(itertools.chain(*batches[3 * epoch : 3 * epoch + 3]))
        assert {key.epoch for key in keys} == {epoch}
        orders.append([key.index for key in keys])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_incomplete_batch_is_dropped_but_not_always_the_same_images():
    sampler = EpochBatches(10, 4, 0, total_steps=40)
    assert sampler.steps_per_epoch == 2
    missing = [
        frozenset(range(10)) - {key.index for batch in epoch for key in batch}
        for epoch in zip(*[iter(sampler)] * 2, strict=True)
    ]
    assert all(len(indices) == 2 for indices in missing)
    assert len(set(missing)) > 5


@pytest.mark.parametrize("count", [3, 10, 16])
def test_any_start_gives_the_rest_of_the_same_run(count):
    whole = list(EpochBatches(count, 4, 7, total_steps=13))
    for start in (0, 1, 5, 12, 13):
        assert list(EpochBatches(count, 4, 7, start_step=start, total_steps=13)) == whole[start:]
    assert list(EpochBatches(count, 4, 8, total_steps=13)) != whole


def test_processes_share_a_global_batch():
    whole = list(EpochBatches(20, 8, 0, total_steps=5))
    parts = [list(EpochBatches(20, 4, 0, total_steps=5, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("count", "accumulate"), [(40, 8), (48, 8), (16, 8), (37, 3), (40, 1)])
def test_batches_of_a_step_are_the_parts_of_one_large_batch(count, accumulate):
    """So that an epoch consists of whole steps, and no permutation reaches into the next one."""
    whole = EpochBatches(count, 4 * accumulate, 7, total_steps=5)
    parts = EpochBatches(count, 4, 7, accumulate=accumulate, total_steps=5)
    assert parts.steps_per_epoch == whole.steps_per_epoch
    batches = list(parts)
    assert len(parts) == len(batches) == 5 * accumulate
    steps = [list(itertools.chain(*step)) for step in zip(*[iter(batches)] * accumulate, strict=True)]
    assert steps == list(whole)
    for start in (1, 4):
        later = EpochBatches(count, 4, 7, accumulate=accumulate, start_step=start, total_steps=5)
        assert list(later) == batches[start * accumulate :]


def test_few_images_are_repeated():
    sampler = EpochBatches(3, 8, 0, total_steps=2)
    assert sampler.steps_per_epoch == 1
    for epoch, batch in enumerate(sampler):
        assert len(batch) == 8
        assert {key.index for key in batch} == {0, 1, 2}
        assert {key.epoch for key in batch} == {epoch}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"seed": -1}, "seed: "),
        ({"start_step": -1}, "start_step: "),
        ({"world": 0}, "world: "),
        ({"accumulate": 0}, "accumulate: "),
        ({"rank": 2, "world": 2}, "rank: .*got 2; expected 0 … 1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        EpochBatches(**{"count": 4, "batch_size": 2, "seed": 0, "total_steps": 1, **arguments})


@pytest.mark.parametrize(("batch_size", "least"), [(2, 0.95), (8, 0.85), (16, 0.8)])
def test_batches_of_like_sizes_are_hardly_padded(batch_size, least):
    steps = 1200 // batch_size
    chance = useful(EpochBatches(1200, batch_size, 0, total_steps=steps))
    grouped = useful(EpochBatches(1200, batch_size, 0, total_steps=steps, size_of=size_of))
    assert grouped > least > chance + 0.1


@pytest.mark.parametrize("count", [3, 50, 300])
def test_grouping_leaves_epochs_whole_and_depends_on_the_step_alone(count):
    steps = 2 * max(1, count // 4) + 3
    plain = list(EpochBatches(count, 4, 7, total_steps=steps))
    whole = list(EpochBatches(count, 4, 7, total_steps=steps, size_of=size_of))
    per_epoch = max(1, count // 4)
    for start in range(0, per_epoch, STRETCH):  # a stretch has the images that it had
        stretch = slice(start, min(start + STRETCH, per_epoch))
        assert sorted(itertools.chain(*whole[stretch])) == sorted(itertools.chain(*plain[stretch]))
    for start in (0, 1, STRETCH - 1, STRETCH, steps - 1):
        assert list(EpochBatches(count, 4, 7, start_step=start, total_steps=steps, size_of=size_of)) == whole[start:]
    if count > 4:
        assert whole != plain


def test_processes_share_a_grouped_batch():
    whole = list(EpochBatches(200, 8, 0, total_steps=25, size_of=size_of))
    parts = [list(EpochBatches(200, 4, 0, total_steps=25, rank=rank, world=2, size_of=size_of)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_images_of_one_size_stay_where_they_are():
    plain = EpochBatches(500, 4, 3, total_steps=200)
    assert list(EpochBatches(500, 4, 3, total_steps=200, size_of=lambda key: (480, 640))) == list(plain)


def test_companions_change_from_epoch_to_epoch():
    """Though no two images have the same size."""

    def pairs(batches):
        return {
            frozenset(pair) for batch in batches for pair in itertools.combinations([key.index for key in batch], 2)
        }

    batches = list(EpochBatches(96, 4, 0, total_steps=48, size_of=lambda key: (192, 193 + 2 * key.index % 63)))
    first, second = pairs(batches[:24]), pairs(batches[24:])
    assert len(first & second) < 0.15 * len(first)


def test_an_epoch_does_not_go_from_small_to_large():
    areas = [
        np.prod([size_of(key) for key in batch], 1).mean()
        for batch in EpochBatches(4 * STRETCH, 4, 0, total_steps=STRETCH, size_of=size_of)
    ]
    assert abs(np.corrcoef(areas, np.arange(STRETCH))[0, 1]) < 0.3
    assert np.std(areas) > 3e4


def test_order_of_a_few():
    sizes = [(10, 20), (40, 20), (11, 20), (40, 21)]
    assert alike(sizes, 2).tolist() == [0, 2, 1, 3]
    assert alike(sizes, 1).tolist() == [0, 1, 2, 3]
    assert sorted(alike(sizes[:3], 3).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "transform",
    [
        Evaluation(shortest=32, longest=100),
        Training(**training_sizes(48)._asdict()),
        Training(**training_sizes(48)._asdict() | {"crop_sizes": (20, 30)}, crop=1.0, quarter_turn=0.7),
        lambda sample, rng: sample,
    ],
)
def test_sizes_are_those_that_examples_have(transform, make_annotations):
    dataset = DetectionDataset(make_annotations(), transform, 3)
    keys = [Key(epoch, index) for epoch in range(4) for index in range(len(dataset))]
    assert [dataset.size(key) for key in keys] == [tuple(dataset[key].image.shape[1:]) for key in keys]


def test_an_image_whose_size_nobody_stated(make_annotations):
    annotations = make_annotations()
    annotations.image_sizes[1] = 0
    dataset = DetectionDataset(annotations, Training(**training_sizes(48)._asdict()), 3)
    assert dataset.size(Key(0, 1)) == (1, 1)
    assert dataset[Key(0, 1)].image.shape[1:] != (1, 1)
    sampler = EpochBatches(len(dataset), 2, 0, total_steps=len(dataset) // 2, size_of=dataset.size)
    assert len({key.index for batch in sampler for key in batch}) == len(dataset) // 2 * 2
