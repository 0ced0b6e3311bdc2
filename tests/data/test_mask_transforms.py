"""Masks move with their image and their boxes: the picture itself, in which each object has a colour, is the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.annotations import Annotations, Strings
from detrkit.data.dataset import DetectionDataset, Key, masks_in_file
from detrkit.data.loading import training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.transforms import Evaluation, Sample, Training, cut, resize, sample_masks, to_pixels
from detrkit.masks import RunLengths
from detrkit.structures import Category


def scene(rng: np.random.Generator, height: int, width: int) -> Sample:
    """A red and a green ellipse on black, the green one before the red one, with their masks."""
    yy, xx = np.mgrid[:height, :width]
    masks = []
    for _ in range(2):
        cy, cx = rng.uniform(0.2, 0.8, 2) * (height, width)
        ry, rx = rng.uniform(0.15, 0.45, 2) * (height, width)
        masks.append(((yy - cy) / ry) ** 2 + ((xx - cx) / rx) ** 2 <= 1)
    masks[0] &= ~masks[1]
    pixels = np.zeros((height, width, 3), np.uint8)
    for colour, mask in enumerate(masks):
        pixels[mask, colour] = 255
    kept = np.array([mask.any() for mask in masks])
    runs = RunLengths.encode(np.array(masks)[kept])
    return Sample(to_pixels(Image.fromarray(pixels)), runs.boxes(), np.flatnonzero(kept), runs.decode())


def check(sample: Sample, near: int = 2) -> None:
    """Each mask is where its colour is, and inside its box, but for `near` pixels at its border."""
    around = np.ones((2 * near + 1, 2 * near + 1), bool)
    height, width = sample.image.shape[1:]
    assert sample.masks is not None
    assert sample.masks.shape == (len(sample.boxes), height, width)
    for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
        seen = sample.image[label].numpy() > 127
        assert not (seen & ~binary_dilation(mask, around)).any()
        assert not (binary_erosion(mask, around) & ~seen).any()
        if mask.any():
            rows, columns = np.nonzero(mask)
            tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (tight[:2] >= box[:2] - near).all()
            assert (tight[2:] <= box[2:] + near).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(20, 70), st.integers(20, 70))
def test_all_augmentations_move_image_boxes_and_masks_together(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    transform = Training(
        sizes=(24, 33, 48),
        longest=90,
        pre_crop_sizes=(26, 40),
        crop_sizes=(18, 36),
        crop=0.6,
        vertical_flip=0.5,
        quarter_turn=0.7,
    )
    check(transform(scene(rng, height, width), rng))
    check(Evaluation(shortest=31, longest=80).resized(scene(rng, height, width)))


def test_a_scaled_mask_is_the_pixel_under_each_centre() -> None:
    masks = np.array([[[1, 0, 0, 1], [0, 0, 1, 1]]], bool)
    assert sample_masks(masks, (4, 8))[0].tolist() == np.kron(masks[0], np.ones((2, 2), bool)).tolist()
    assert sample_masks(masks, (1, 2))[0].tolist() == [[False, True]]
    part = cut(
        Sample(torch.zeros(3, 2, 4, dtype=torch.uint8), np.array([[0.0, 0, 4, 2]]), np.zeros(1), masks), (0, 2, 2, 2)
    )
    assert part.masks[0].tolist() == [[False, True], [True, True]]
    assert resize(part, 4, 2).masks[0].tolist() == [[False, True]] * 2 + [[True, True]] * 2


def test_masks_follow_an_image_that_was_scaled_or_cut_after_it_was_annotated() -> None:
    masks = np.zeros((1, 10, 20), bool)
    masks[0, 2:6, 4:12] = True
    scaled = masks_in_file(masks, (20, 40))
    assert scaled.shape == (1, 20, 40)
    assert scaled[0, 4:12, 8:24].all()
    assert scaled.sum() == 4 * masks.sum()
    cut = masks_in_file(masks, (5, 30))
    assert cut.shape == (1, 5, 30)
    assert cut.sum() == 3 * 8
    assert masks_in_file(masks[:0], (5, 30)).shape == (0, 5, 30)


@pytest.fixture
def annotations(tmp_path: Path, rng: np.random.Generator) -> Annotations:
    """Three images; the mask of the first object of the first is not known, and that of a crowd is."""
    scenes = [scene(rng, 40, 52) for _ in range(3)]
    masks = [RunLengths.encode(one.masks) for one in scenes]
    masks[0] = RunLengths.joined([RunLengths.unknown(np.array([[40, 52]])), masks[0][1:]])
    for number, one in enumerate(scenes):
        Image.fromarray(one.image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    counts = [len(one.boxes) for one in scenes]
    boxes = np.concatenate([one.boxes for one in scenes])
    crowd = np.zeros(len(boxes), bool)
    crowd[-1] = True
    return Annotations(
        root=tmp_path,
        file_names=Strings(f"{number}.png" for number in range(3)),
        image_ids=np.arange(1, 4),
        image_sizes=np.array([(40, 52)] * 3, np.int32),
        offsets=np.cumsum([0, *counts]),
        boxes=boxes,
        labels=np.concatenate([one.labels for one in scenes]),
        areas=np.ones(len(boxes)),
        crowd=crowd,
        difficult=np.zeros(len(boxes), bool),
        categories=(Category(1, "red"), Category(2, "green")),
        masks=RunLengths.joined(masks),
    )


def test_examples_have_the_masks_of_their_targets(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, Evaluation(shortest=40, longest=80), 0)
    for index in range(3):
        rows = annotations.rows(index)
        kept = ~annotations.crowd[rows]
        target = dataset[Key(0, index)].target
        assert target.masks is not None
        assert np.array_equal(target.masks.numpy(), annotations.masks.encoded(rows)[kept].decode())
    assert not dataset[Key(0, 0)].target.masks[0].any(), "what is not known is empty"
    chosen = DetectionDataset(annotations.select([2, 0]), Evaluation(shortest=20, longest=80), 0)
    target = chosen[Key(0, 1)].target
    assert target.masks.shape == (len(target.labels), 20, 26)
    assert not target.masks[0].any()


def test_masks_follow_a_jpeg_that_is_shown_small(annotations: Annotations) -> None:
    names = [f"{number}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        with Image.open(annotations.path(number)) as image:
            image.save(annotations.root / name, quality=95, subsampling=0)
    small = Training(sizes=(10,), longest=30, pre_crop_sizes=(40,), crop_sizes=(25, 40), crop=0.7)
    dataset = DetectionDataset(dataclasses.replace(annotations, file_names=Strings(names)), small, 0)
    for epoch in range(8):
        for index in range(3):
            image, target, _ = dataset[Key(epoch, index)]
            known = target.masks.any(-1).any(-1)
            boxes = cxcywh_to_xyxy(target.boxes.double()) * torch.tensor(image.shape[:0:-1] * 2)
            labels, masks = target.labels[known].numpy(), target.masks[known].numpy()
            check(Sample(image, boxes[known].numpy(), labels, masks), near=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_travel_from_workers(annotations: Annotations, workers: int) -> None:
    dataset = DetectionDataset(annotations, Evaluation(shortest=21, longest=80), 0)
    batches = list(training_batches(dataset, EpochBatches(3, 3, 0, total_steps=1), workers=workers))
    names = [Path(target.name).stem for target in batches[0].batch.targets]
    for name, target in zip(names, batches[0].batch.targets, strict=True):
        assert target.masks.dtype == torch.bool
        assert torch.equal(target.masks, dataset[Key(0, int(name))].target.masks)
