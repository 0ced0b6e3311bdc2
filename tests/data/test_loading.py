import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit.data.dataset import DetectionDataset
from detrkit.data.images import open_image, open_pixels
from detrkit.data.loading import load_images, training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.packing import PackedImages
from detrkit.data.transforms import Evaluation, Training, scale, to_pixels, to_tensor, training_sizes
from detrkit.errors import DataError, UsageError
from detrkit.structures import Batch

EVALUATION = Evaluation(shortest=32, longest=100)


def run(dataset, workers, start=0, steps=6, **options):
    sampler = EpochBatches(len(dataset), 3, 5, start_step=start, total_steps=steps)
    return list(training_batches(dataset, sampler, workers=workers, **options))


def assert_same(a, b):
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert torch.equal(first.batch.images, second.batch.images)
        assert first.batch.packed.sizes == second.batch.packed.sizes
        assert first.replaced == second.replaced
        for left, right in zip(first.batch.targets, second.batch.targets, strict=True):
            assert torch.equal(left.boxes, right.boxes)
            assert torch.equal(left.labels, right.labels)
            assert left.name == right.name


def test_workers_and_restarts_change_nothing(make_annotations):
    annotations = make_annotations(7)
    annotations.path(4).write_bytes(b"broken")
    dataset = DetectionDataset(annotations, Training(**training_sizes(48)._asdict(), photometric=0.5), 5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = run(dataset, 0)
    assert_same(alone, run(dataset, 2))
    assert_same(alone[4:], run(dataset, 2, start=4))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    assert sum(len(loaded.replaced) for loaded in alone) >= 2
    assert all(str(annotations.path(4)) in text for loaded in alone for text in loaded.replaced)
    assert all(len(loaded.batch.targets) == 3 for loaded in alone)


def test_images_are_packed_as_a_batch_of_normalised_ones(rng):
    images = [torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8)) for size in ((5, 9), (12, 4), (1, 1))]
    images += [images[0].flip(2), images[1].permute(0, 2, 1)]
    expected = Batch.from_images([to_tensor(image) for image in images])
    packed = PackedImages.of(images)
    assert packed.pixels.dtype == torch.uint8
    elsewhere = packed.normalised("meta")  # as on any device but a processor
    found, padding = packed.normalised()
    assert [one.shape for one in elsewhere] == [found.shape, padding.shape]
    assert elsewhere[0].stride() == found.stride()
    assert torch.equal(found, expected.images)
    assert torch.equal(padding, expected.padding)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_folder_is_a_plain_data_error(make_annotations, workers):
    annotations = make_annotations()
    dataset = DetectionDataset(annotations, EVALUATION, 0)
    for index in range(5):
        annotations.path(index).unlink()
    with pytest.raises(DataError, match="11 images in a row cannot be read") as caught:
        run(dataset, workers)
    assert "Traceback" not in str(caught.value)


class Dies:
    """A transform that ends its process, as the kernel does where memory runs out."""

    def __call__(self, sample, rng):
        os._exit(1)


def test_a_dead_worker_is_explained(make_annotations):
    dataset = DetectionDataset(make_annotations(), Dies(), 0)
    with pytest.raises(UsageError, match=r"died or gave no answer; got .*fewer workers"):
        run(dataset, 1)


def test_negative_workers_are_refused(make_annotations):
    dataset = DetectionDataset(make_annotations(), EVALUATION, 0)
    with pytest.raises(UsageError, match=r"workers: .*negative; got -1"):
        run(dataset, -1)


def test_dataset_can_travel_to_a_process_that_was_not_forked(make_annotations):
    dataset = DetectionDataset(make_annotations(), Training(**training_sizes(48)._asdict()), 0)
    assert_same(run(pickle.loads(pickle.dumps(dataset)), 0), run(dataset, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_order_resized_and_normalised(make_annotations, workers):
    annotations = make_annotations(4)
    path = annotations.path(0)
    array = np.zeros((20, 10, 3), np.uint8)
    sources = [path, str(annotations.path(1)), open_image(annotations.path(2)), array]
    loaded = list(load_images(sources, shortest=32, longest=100, workers=workers))
    assert [image.index for image in loaded] == [0, 1, 2, 3]
    assert [image.original for image in loaded] == [(40, 60)] * 3 + [(20, 10)]
    assert [image.name for image in loaded] == [str(path), str(annotations.path(1)), "image 2", "image 3"]
    assert [tuple(image.tensor.shape) for image in loaded] == [(3, 32, 48)] * 3 + [(3, 64, 32)]
    assert torch.equal(loaded[0].tensor, to_tensor(EVALUATION(open_image(path))))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_is_decoded_no_larger_than_needed(tmp_path, rng, workers):
    noise = Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8))
    for kind in ("jpeg", "png"):
        noise.resize((480, 320)).save(tmp_path / f"photo.{kind}", exif=_turned() if kind == "jpeg" else None)
    paths = [tmp_path / "photo.jpeg", tmp_path / "photo.png"]
    photo, drawing = load_images(paths, shortest=40, longest=100, workers=workers)
    quarter, _ = open_pixels(paths[0], lambda height, width: (4, None))
    assert quarter.shape == (120, 80, 3)
    assert torch.equal(photo.pixels, scale(torch.from_numpy(quarter).permute(2, 0, 1), 60, 40))
    assert photo.original == (480, 320)
    whole = scale(to_pixels(open_image(paths[0])), 60, 40)
    assert 0 < (photo.pixels.float() - whole.float()).abs().mean() < 3
    assert torch.equal(drawing.pixels, scale(to_pixels(open_image(paths[1])), 40, 60))
    (unscaled,) = load_images(paths[:1], shortest=81, longest=300)
    assert torch.equal(unscaled.pixels, scale(to_pixels(open_image(paths[0])), 121, 81))


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter
    return exif


def test_no_images_at_all():
    assert list(load_images([], shortest=32, longest=100, workers=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_or_left_out(make_annotations, workers):
    annotations = make_annotations(4)
    annotations.path(1).write_text("<html>")
    paths = [annotations.path(index) for index in range(4)]
    images = load_images(paths, shortest=32, longest=100, workers=workers)
    assert next(images).index == 0
    with pytest.raises(DataError, match=r"001.png: The file holds a web page") as caught:
        next(images)
    assert caught.value.where == str(paths[1])
    assert caught.value.remedy == "Download the image again."
    failures = []
    images = load_images(
        paths,
        shortest=32,
        longest=100,
        workers=workers,
        unreadable=lambda index, error: failures.append((index, error)),
    )
    assert [image.index for image in images] == [0, 2, 3]
    assert [index for index, _ in failures] == [1]
