"""Claim: a batch for training is read at least twice as fast as by Pillow, step by step.

    python benchmarks/reading.py [--rounds 30] [--images FOLDER]

From JPEG files to an augmented, normalised, padded batch with its boxes, in one process on one thread:

    pillow  decode, flip, resize, crop, resize again, tensor, normalise, pad: the steps of the DETR paper, one after
            another, with Pillow and the operations that torchvision and the official code do
    without `DetectionDataset` and the collation of `training_batches`, as they are without the extra `fast`
    ours    the same with it

Both draw the same random numbers, and have to agree before anything is timed. The size of the batch and its padding are
the same; so are boxes without a crop, and pixels to within `SAME` of 255 levels where the whole JPEG is decoded and not
cropped. With a crop, whose region ours cuts at whole pixels and resamples once instead of twice, boxes differ by half a
pixel of what is decoded at most. The mean difference of a picture is at most `ALIKE` levels, those included that ours
decodes at half their size because they are shown no larger (a bound for the pictures that are made here).

Pictures of smooth colours and texture are made here, 640 × 480 pixels at quality 90; or `--images` are read. Seconds
are of processor time, sides in turning order, and a ratio is the median of the rounds' ratios, each of them one batch.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from _report import machine, parser, show
from PIL import Image
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrkit.data import images
from detrkit.data.annotations import Annotations, Strings
from detrkit.data.dataset import DetectionDataset, Key, random_stream
from detrkit.data.loading import training_batches
from detrkit.data.order import EpochBatches
from detrkit.data.transforms import Training, TrainingSizes, resized_size, training_sizes
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD, Batch, Category

SIDES = ("pillow", "without", "ours")
SAME = 1.01  # levels of 255: one of rounding
ALIKE = 6.0
BOXES = 8  # an image
BATCH = 8
CASES = {"the paper's sizes, 480 … 800": 800, "256-pixel training": 256}


class Drawn(NamedTuple):
    """What is random of an example; `size` and `region` of the crop, None without one."""

    mirrored: bool
    crop: tuple[tuple[int, int], tuple[int, int, int, int]] | None
    final: tuple[int, int]


def draw(height: int, width: int, rng: np.random.Generator, sizes: TrainingSizes) -> Drawn:
    """The random numbers of `Training`, in its order."""
    mirrored = rng.random() < 0.5
    rng.random(2)  # upside down, turned: never
    crop = None
    if rng.random() < 0.5:
        shortest = sizes.pre_crop_sizes[rng.integers(len(sizes.pre_crop_sizes))]
        whole = resized_size(height, width, shortest, None)
        low, high = sizes.crop_sizes
        height, width = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in whole)
        top, left = int(rng.integers(whole[0] - height + 1)), int(rng.integers(whole[1] - width + 1))
        crop = whole, (top, left, height, width)
    shortest = sizes.sizes[rng.integers(len(sizes.sizes))]
    return Drawn(mirrored, crop, resized_size(height, width, shortest, sizes.longest))


def augment(image: Image.Image, boxes: np.ndarray, drawn: Drawn) -> tuple[Image.Image, np.ndarray]:
    """The paper's steps on an image and its boxes in pixels."""
    width, height = image.size
    if drawn.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    if drawn.crop is not None:
        (new_height, new_width), (top, left, rows, columns) = drawn.crop
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        boxes = boxes * ((new_width / width, new_height / height) * 2)
        image = image.crop((left, top, left + columns, top + rows))
        boxes = np.clip(boxes - (left, top, left, top), 0, (columns, rows, columns, rows))
        boxes = boxes[np.all(boxes[:, 2:] > boxes[:, :2], 1)]
        width, height = columns, rows
    new_height, new_width = drawn.final
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return image, boxes * ((new_width / width, new_height / height) * 2)


class Pillow:
    """The peer."""

    def __init__(self, annotations: Annotations, sizes: TrainingSizes):
        self.annotations, self.sizes = annotations, sizes
        self.mean = torch.tensor(NORMALIZATION_MEAN)[:, None, None]
        self.std = torch.tensor(NORMALIZATION_STD)[:, None, None]

    def example(self, key: Key) -> tuple[Tensor, Tensor]:
        """An image and its boxes, cxcywh in [0, 1]."""
        image = Image.open(self.annotations.path(key.index)).convert("RGB")
        boxes = self.annotations.boxes[self.annotations.rows(key.index)]
        drawn = draw(image.height, image.width, random_stream(2, 0, *key), self.sizes)
        image, boxes = augment(image, boxes, drawn)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        tensor.sub_(self.mean).div_(self.std)
        fractions = torch.from_numpy(boxes / (image.width, image.height, image.width, image.height))
        return tensor, xyxy_to_cxcywh(fractions).float()

    def __call__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images, padding and boxes of a batch."""
        tensors, boxes = zip(*[self.example(key) for key in keys], strict=True)
        height, width = (max(image.shape[axis] for image in tensors) for axis in (1, 2))
        padded = torch.zeros(len(tensors), 3, height, width)
        padding = torch.ones(len(tensors), height, width, dtype=torch.bool)
        for image, place, outside in zip(tensors, padded, padding, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
            outside[: image.shape[1], : image.shape[2]] = False
        return padded, padding, list(boxes)


class Ours:
    """The library: its data set and its loader, without workers; `fast`: with the extra of that name."""

    def __init__(self, annotations: Annotations, sizes: TrainingSizes, steps: int, *, fast: bool = True):
        self.decoder = images._fast_decoder if fast else lambda: None
        dataset = DetectionDataset(annotations, Training(**sizes._asdict()), 0)
        self.batches = training_batches(dataset, EpochBatches(len(dataset), BATCH, 0, total_steps=steps), workers=0)

    def __call__(self, keys: Sequence[Key]) -> Batch:
        """The next batch, which is that of the keys."""
        with mock.patch.object(images, "_fast_decoder", self.decoder):
            return next(self.batches).batch.to("cpu")


def make_pictures(folder: Path, count: int) -> None:
    """JPEG files of smooth colours with texture."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((480, 640, 3))
        for cell, weight in ((80, 0.7), (16, 0.2), (4, 0.1)):
            noise = Image.fromarray(rng.integers(0, 256, (480 // cell, 640 // cell, 3), np.uint8))
            pixels += weight * np.asarray(noise.resize((640, 480), Image.Resampling.BICUBIC), float)
        pixels += rng.normal(0, 3, (480, 640, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)


def annotate(folder: Path, count: int) -> Annotations:
    """The pictures of a folder, with random boxes."""
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in folder.glob("*.jpg"))[:count]
    sizes = []
    for name in names:
        with Image.open(folder / name) as image:
            sizes.append((image.height, image.width))
    corners = np.sort(rng.random((len(names), BOXES, 2, 2)), 2) * np.array(sizes)[:, None, None, ::-1]
    number = len(names) * BOXES
    return Annotations(
        root=folder,
        file_names=Strings(names),
        image_ids=np.arange(len(names)),
        image_sizes=np.array(sizes, np.int32),
        offsets=np.arange(len(names) + 1) * BOXES,
        boxes=corners.reshape(-1, 4),
        labels=np.zeros(number, np.int64),
        areas=np.ones(number),
        crowd=np.zeros(number, bool),
        difficult=np.zeros(number, bool),
        categories=(Category(1, "thing"),),
    )


def compare(annotations: Annotations, sizes: TrainingSizes, keys: Sequence[Key], made: bool) -> dict[str, float]:
    """How far the sides differ on a batch, image by image; ends the benchmark where it is too far."""
    theirs, ours = Pillow(annotations, sizes)(keys), Ours(annotations, sizes, 1)(keys)
    assert torch.equal(Ours(annotations, sizes, 1, fast=False)(keys).images, ours.images), "the decoders differ"
    assert torch.equal(theirs[1], ours.padding), "the sides pad differently"
    std = torch.tensor(NORMALIZATION_STD)[:, None, None] * 255
    found = {"most_levels_as_it_is": 0.0, "mean_levels": 0.0, "box_pixels": 0.0}
    for row, key in enumerate(keys):
        height, width = (int(side) for side in annotations.image_sizes[key.index])
        rng = random_stream(2, 0, *key)
        view = Training(**sizes._asdict()).draw(height, width, rng)
        spare = math.gcd(view.spare(height, width), height, width)
        cropped = view.region[2:] != (height, width)
        levels = ((theirs[0][row] - ours.images[row]) * std).abs()[:, ~ours.padding[row]]
        corners = [cxcywh_to_xyxy(one) for one in (theirs[2][row], ours.targets[row].boxes)]
        grown = min(side / scaled for side, scaled in zip((height, width), view.whole, strict=True)) / spare
        boxes = (corners[0] - corners[1]).abs() * torch.tensor(view.region[:1:-1] * 2) * grown
        found["mean_levels"] = max(found["mean_levels"], float(levels.mean()))
        found["box_pixels"] = max([found["box_pixels"], *boxes.flatten().tolist()])
        if not cropped:
            assert boxes.max() < 1e-2, "boxes differ"
        if not cropped and spare == 1:
            found["most_levels_as_it_is"] = max(found["most_levels_as_it_is"], float(levels.max()))
    assert found["most_levels_as_it_is"] <= SAME, found
    assert found["box_pixels"] <= 0.51, found
    assert not made or found["mean_levels"] <= ALIKE, found
    return found


def measure(annotations: Annotations, shortest: int, rounds: int, made: bool) -> dict[str, Any]:
    """Agreement and speed of both sides."""
    sizes = training_sizes(shortest)
    steps = list(EpochBatches(len(annotations), BATCH, 0, total_steps=rounds + 1))
    agreement = compare(annotations, sizes, steps[0], made)
    sides = {
        "pillow": Pillow(annotations, sizes),
        "without": Ours(annotations, sizes, rounds + 1, fast=False),
        "ours": Ours(annotations, sizes, rounds + 1),
    }
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number, keys in enumerate(steps):
        turn = number % len(SIDES)
        for side in SIDES[turn:] + SIDES[:turn]:
            start = time.process_time()
            sides[side](keys)
            if number:  # the first round does not count
                times[side].append(time.process_time() - start)
    return {
        **{f"{side}_images_per_second": BATCH / statistics.median(times[side]) for side in SIDES},
        **{
            f"{side}_times_faster": statistics.median(a / b for a, b in zip(times["pillow"], times[side], strict=True))
            for side in SIDES[1:]
        },
        "agreement": agreement,
        "seconds": times,
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for people."""
    lines: dict[str, Any] = {}
    for name, of in result["cases"].items():
        lines[name] = {
            "pillow": f"{of['pillow_images_per_second']:7.1f} images/s",
            **{
                side: f"{of[f'{side}_images_per_second']:7.1f} images/s ({of[f'{side}_times_faster']:.2f} × pillow)"
                for side in SIDES[1:]
            },
            "agreement": ", ".join(f"{key} {value:.2f}" for key, value in of["agreement"].items()),
        }
    return {**lines, "rounds": result["rounds"], "images": result["images"], "machine": result["machine"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--images", type=Path, help="a folder of JPEG files, instead of those that are made")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rounds, count = (10, 16) if arguments.short else (arguments.rounds, 64)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.images or Path(made)
        if arguments.images is None:
            make_pictures(folder, count)
        annotations = annotate(folder, count)
        result = {
            "cases": {
                name: measure(annotations, shortest, rounds, arguments.images is None)
                for name, shortest in CASES.items()
            },
            "rounds": rounds,
            "images": len(annotations),
            "machine": machine(("detrkit", "torch", "pillow", "simplejpeg")),
        }
    show(result if arguments.json else table(result), arguments.json)


if __name__ == "__main__":
    main()
