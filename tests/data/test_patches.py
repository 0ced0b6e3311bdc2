import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.crops import ImageResizing, PatchAugmentation, StratifiedCrops, UniformCrops
from detrkit.data.dataset import Key
from detrkit.data.images import open_image
from detrkit.data.order import EpochBatches
from detrkit.data.patches import PatchDataset, evaluation_patches, patch_batches
from detrkit.data.pictures import open_pictures
from detrkit.data.problems import Problems
from detrkit.data.transforms import to_tensor
from detrkit.errors import DataError, UsageError

RESIZING = ImageResizing(sizes=(32, 48), longest=80, flip=0.5)
AUGMENTATION = PatchAugmentation(size=16)


@pytest.fixture
def folder(tmp_path):
    for index in range(7):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60) if index % 2 else (50, 70)).save(tmp_path / f"{index}.png")
    return tmp_path


def make(folder, **options):
    settings = {
        "crops": StratifiedCrops(),
        "augmentation": AUGMENTATION,
        "resizing": RESIZING,
        "count": 4,
        "seed": 5,
        **options,
    }
    return PatchDataset(open_pictures(folder), **settings)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differ(first, second):
    return not torch.equal(first.boxes, second.boxes)


def test_an_example_depends_on_seed_epoch_and_index_alone(folder):
    dataset = make(folder)
    first = dataset[Key(1, 2)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - to see that nothing reads it
    dataset[Key(0, 3)]
    assert_same(first, dataset[Key(1, 2)])
    assert_same(first, pickle.loads(pickle.dumps(dataset))[Key(1, 2)])
    assert all(differ(first, other) for other in (dataset[Key(2, 2)], make(folder, seed=6)[Key(1, 2)]))
    assert first.patches.shape == (4, 3, 16, 16)
    assert first.boxes.shape == (4, 4)
    assert first.name == str(folder / "2.png")
    assert first.replaced == ""


@pytest.mark.parametrize("crops", [UniformCrops(), StratifiedCrops()])
def test_patches_are_what_the_boxes_show_in_the_original(folder, crops):
    plain = PatchAugmentation.none(16)
    flips = set()
    for index in range(7):
        item = make(folder, crops=crops, augmentation=plain)[Key(3, index)]
        original = open_image(folder / f"{index}.png")
        width, height = original.size
        corners = cxcywh_to_xyxy(item.boxes).numpy() * (width, height, width, height)
        assert np.abs(corners - np.rint(corners)).max() < 1e-3, "boxes are whole pixels of the original"
        for mirrored in (False, True):
            shown = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else original
            expected = [
                to_tensor(shown.crop(np.rint(box).tolist()).resize((16, 16), Image.Resampling.BILINEAR))
                for box in corners
            ]
            if (torch.stack(expected) - item.patches).abs().mean() < 0.05:
                small = shown.resize(item.image.shape[:0:-1], Image.Resampling.BILINEAR)
                assert torch.equal(to_tensor(small), item.image), "image and patches look in one direction"
                flips.add(mirrored)
                break
        else:
            pytest.fail(f"the patches of image {index} are not at their boxes")
    assert flips == {False, True}


def test_a_marked_patch_is_found_in_the_resized_image(tmp_path):
    y, x = np.mgrid[:120, :160]
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "a.png")  # colour tells the place
    item = make(tmp_path, augmentation=PatchAugmentation.none(16), resizing=ImageResizing(sizes=(60,), longest=80))[
        Key(0, 0)
    ]
    height, width = item.image.shape[1:]
    corners = cxcywh_to_xyxy(item.boxes) * torch.tensor([width, height, width, height])
    for patch, (x0, y0, x1, y1) in zip(item.patches, corners.round().int().tolist(), strict=True):
        seen = item.image[:, y0:y1, x0:x1].mean((1, 2))
        assert torch.allclose(patch.mean((1, 2)), seen, atol=0.05)


def test_evaluation_is_the_same_in_every_epoch_and_plain(folder):
    dataset = make(folder, evaluation=True)
    for index in range(7):
        item = dataset[Key(0, index)]
        assert_same(item, dataset[Key(4, index)])
        assert min(item.image.shape[1:]) == 48
        image = open_image(folder / f"{index}.png")
        corners = cxcywh_to_xyxy(item.boxes).numpy() * (image.size * 2)
        expected = PatchAugmentation.none(16)(image, np.rint(corners).astype(np.int64), np.random.default_rng(0))
        assert torch.equal(item.patches[0], to_tensor(Image.fromarray(expected[0])))
    assert differ(dataset[Key(0, 1)], make(folder, evaluation=True, seed=6)[Key(0, 1)])
    assert all(differ(dataset[Key(0, a)], dataset[Key(0, b)]) for a, b in pairwise(range(7)))


def damage(folder):
    """Four pictures that cannot be used among seven."""
    (folder / "1.png").write_text("<html>")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    Image.new("RGB", (100, 16)).save(folder / "4.png")


def run(dataset, workers, start=0, steps=5, **options):
    sampler = EpochBatches(len(dataset), 3, 5, start_step=start, total_steps=steps)
    return list(patch_batches(dataset, sampler, workers=workers, **options))


def test_workers_and_restarts_change_nothing(folder):
    damage(folder)
    dataset = make(folder)
    alone = run(dataset, 0)
    for other, first in ((run(dataset, 2), 0), (run(dataset, 2, start=3), 3)):
        for one, same in zip(alone[first:], other, strict=True):
            assert_same(one.batch, same.batch)
            assert one.replaced == same.replaced
    told = " ".join(text for loaded in alone for text in loaded.replaced)
    for index, reason in (
        (1, "holds a web page"),
        (2, "truncated"),
        (4, "too small to cut patches from; got 100 × 16"),
    ):
        assert f"{index}.png" in told
        assert reason in told
    used = {name for loaded in alone for name in loaded.batch.names}
    assert used == {str(folder / f"{index}.png") for index in (0, 3, 5, 6)}


def test_a_batch_is_padded_and_can_move(folder):
    (loaded,) = run(make(folder), 0, steps=1)
    batch = loaded.batch
    assert batch.images.shape[0] == batch.padding.shape[0] == 3
    sizes = (~batch.padding).sum(1).amax(1), (~batch.padding).sum(2).amax(1)
    assert [int(side.max()) for side in sizes] == list(batch.images.shape[2:])
    assert len(set(zip(*(side.tolist() for side in sizes), strict=True))) > 1
    assert not batch.images.permute(0, 2, 3, 1)[batch.padding].any()
    assert batch.patches.shape == (3, 4, 3, 16, 16)
    assert batch.boxes.shape == (3, 4, 4)
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved[:4]} == {"meta"}
    assert moved.names == batch.names
    assert_same(batch.to("cpu"), batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_folder_is_a_plain_data_error(folder, workers):
    dataset = make(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="11 images in a row cannot be used") as caught:
        run(dataset, workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_usable_image_once_in_order(folder, workers):
    damage(folder)
    dataset, problems = make(folder, evaluation=True), Problems()
    batches = list(evaluation_patches(dataset, 2, workers=workers, problems=problems))
    assert [batch.names for batch in batches] == [
        tuple(str(folder / f"{index}.png") for index in indices) for indices in ([0], [3], [5], [6])
    ]
    assert problems.counts == {"unusable-image": 3}
    assert "1.png: The file holds a web page" in problems.examples["unusable-image"][0]
    for batch, index in zip(batches, (0, 3, 5, 6), strict=True):
        item = dataset[Key(0, index)]
        assert torch.equal(batch.images[0], item.image)
        assert torch.equal(batch.patches[0], item.patches)
        assert torch.equal(batch.boxes[0], item.boxes)


def test_evaluation_without_a_usable_image_and_its_other_errors(folder):
    dataset = make(folder, evaluation=True)
    with pytest.raises(UsageError, match="batch_size"):
        list(evaluation_patches(dataset, 0, workers=0, problems=Problems()))
    with pytest.raises(UsageError, match="made for evaluation"):
        list(evaluation_patches(make(folder), 2, workers=0, problems=Problems()))
    damage(folder)
    with pytest.raises(DataError, match=r"1\.png: The file holds a web page"):
        dataset[Key(0, 1)]
    for path in folder.iterdir():
        path.write_text("x")
    problems = Problems()
    with pytest.raises(DataError, match="Not one of the images can be used"):
        list(evaluation_patches(dataset, 2, workers=0, problems=problems))
    assert problems.counts == {"unusable-image": 7}


def test_numbers_out_of_range_and_no_images_are_refused(folder):
    with pytest.raises(UsageError, match="count: "):
        make(folder, count=0)
    with pytest.raises(UsageError, match="seed: "):
        make(folder, seed=-1)
    with pytest.raises(DataError, match="no images to cut patches from"):
        PatchDataset(open_pictures(folder).select([]), UniformCrops(), AUGMENTATION, RESIZING, 4, 0)


def test_too_many_pixels_count_as_unreadable(folder):
    dataset = make(folder, max_pixels=60 * 80 - 1)
    assert "too many pixels" in dataset[Key(0, 1)].replaced
    assert dataset[Key(0, 0)].replaced == ""
