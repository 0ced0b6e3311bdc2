"""The data of a pre-training whose backbone does not train: features of all images, computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detrkit.checkpoint import fill
from detrkit.data.crops import Crops, ImageResizing
from detrkit.data.patches import normalised
from detrkit.data.pictures import Pictures
from detrkit.data.transforms import to_tensor
from detrkit.errors import UsageError
from detrkit.pretrain.features import FeatureDataset, FeatureStore, extract
from detrkit.structures import Batch, FeatureBatch, PatchBatch
from detrkit.training.distributed import World
from detrkit.training.pretext import PatchOptions
from detrkit.training.recovery import newest
from detrkit.training.unlabelled import left_out
from detrkit.whole import write_text_whole

FOLDER = "features"
"""Where in a run folder the features are kept. They can be deleted when the run is finished."""

_SHOWN = 640  # pixels of the longer side of an image on a page of samples


def refuse_contradictions(asked: PatchOptions) -> None:
    """Refuse options that kept features cannot follow, or that need them.

    Raises:
        UsageError: names the options.
    """
    if asked.shown == "features" and (asked.train_backbone or asked.multi_scale):
        raise UsageError(
            "Features are kept of a backbone that does not train and of images of one size",
            got=f"train_backbone {asked.train_backbone}, multi_scale {asked.multi_scale}",
            remedy=f"Show crops ({flags_of_crops(asked)}), or take these back (--no-train-backbone --no-multi-scale).",
        )
    if asked.shown == "crops" and asked.regions_weight:
        raise UsageError(
            "Regions that stand out are looked for once, with the features",
            where="regions_weight",
            got=asked.regions_weight,
            remedy="Keep features (--shown features), or leave regions out (--regions-weight 0).",
        )


def flags_of_crops(asked: PatchOptions, *others: str) -> str:
    """The other flags, and those with which crops are shown where features would be."""
    crops = ["--shown crops", *(["--regions-weight 0"] if asked.regions_weight else [])]
    return " ".join([*others, *(crops if asked.shown == "features" else [])])


def keep(
    detector: nn.Module,
    parts: dict[str, Pictures],
    resizing: ImageResizing,
    crops: Crops,
    asked: PatchOptions,
    seed: int,
    notes: list[str],
    *,
    out: Path,
    goes_on: bool,
    workers: int,
    world: World,
    on_picture: Callable[[int, int], None] | None = None,
) -> dict[str, FeatureDataset]:
    """Compute the features of all images, or open those that the run has kept.

    Args:
        detector: holds the backbone.
        parts: `train` and `val`.
        resizing: the size in which the model sees the images.
        crops: where patches are.
        asked: the pretext task's options.
        seed: of the run.
        notes: what the user should know is added here.
        out: the run folder.
        goes_on: the run goes on from its newest checkpoint; the backbone's weights are taken from there.
        workers: processes that load images.
        world: the processes that train together; the main one computes.
        on_picture: called with the number of images done and of all.

    Raises:
        DataError: not one image of a part can be used.
        ModelError: features that cannot be kept in 16 bits, or no checkpoint that is not damaged.
        Error: the disk is full.
    """
    backbone: Any = detector.backbone
    stride, regions = backbone.strides[-1], asked.regions if asked.regions_weight else 0
    total, before, done = sum(map(len, parts.values())), 0, 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_picture is not None:
            on_picture(done, total)

    if world.is_main:
        notes.extend(_fill_from_newest(detector, out) if goes_on else ())  # or all maps would be made anew
        settings = f"{resizing.sizes}-{resizing.longest}-{stride}-{regions}-{_digest(backbone)}"
        for name, pictures in parts.items():
            extract(
                backbone,
                pictures,
                resizing,
                crops,
                out / FOLDER / name,
                key=f"{pictures.fingerprint()}-{settings}",
                stride=stride,
                regions=regions,
                workers=workers,
                device=next(backbone.parameters()).device,
                on_picture=count,
            )
            before += len(pictures)
            done = before  # also where nothing was to be done
    world.share(None)  # the others wait for the main process
    kept = {name: FeatureStore(out / FOLDER / name) for name in parts}
    return {
        name: FeatureDataset(
            store,
            range(len(store)),
            crops,
            asked.patches,
            seed,
            stride=stride,
            flip=asked.flip,
            evaluation=name == "val",
        )
        for name, store in kept.items()
    }


def _fill_from_newest(detector: nn.Module, out: Path) -> tuple[str, ...]:
    """Give a detector, whose backbone knows nothing yet, the weights of a run's newest checkpoint.

    Returns:
        A note for each checkpoint that is damaged.
    """
    checkpoint, said = newest(out)
    if checkpoint is not None:
        fill(detector, checkpoint)
    return said


def note_left_out(lost: Sequence[str], out: Path, world: World) -> list[str]:
    """What to say of images that have no features; all of them are named in a file."""
    if world.is_main and (lost or left_out(out).exists()):
        write_text_whole(left_out(out), "".join(f"{one}\n" for one in lost))
    return [f"Images that could not be used and are left out: {len(lost):,}, such as {lost[0]}"] if lost else []


def _digest(backbone: nn.Module) -> str:
    """Stands for the backbone's weights."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def with_pixels(batch: FeatureBatch, pictures: Pictures, size: int) -> PatchBatch:
    """The images and patches that a batch of features stands for, to look at.

    Args:
        batch: of features.
        pictures: among which its images are.
        size: side of a patch, in pixels.
    """
    place = {pictures.name(index): index for index in range(len(pictures))}
    images, patches = [], []
    for name, boxes in zip(batch.names, batch.boxes.cpu().numpy(), strict=True):
        image = pictures.open(place[name])
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        corners = np.clip(corners, 0, 1) * (image.width, image.height, image.width, image.height)
        cut = np.stack(
            [np.asarray(image.resize((size, size), box=(x0, y0, x1, y1))) for x0, y0, x1, y1 in corners.tolist()]
        )
        patches.append(normalised(cut))
        image.thumbnail((_SHOWN, _SHOWN))
        images.append(to_tensor(image))
    pixels, padding, _ = Batch.from_images(images)
    return PatchBatch(pixels, padding, torch.stack(patches), batch.boxes, batch.names)
