"""Images of like sizes share a batch where the recipe asks for it, whatever is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training.drawing import tiny, write_coco

from detrkit.nn.backbone import build_backbone
from detrkit.training.distributed import World
from detrkit.training.loop import _batches, steps_per_epoch
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.patches import prepare_patches
from detrkit.training.pretext import PatchRecipe
from detrkit.training.recipe import Recipe, revise
from detrkit.training.segmentation import prepare_segmentation
from detrkit.training.session import Session
from detrkit.training.setup import prepare

SIZES = ((64, 128), (128, 64), (96, 96))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide, upright and square images in turn."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    return write_coco(root, {"train": [1] * 24, "val": [1, 1]}, sizes=SIZES)


def unlabelled(folder: Path, count: int) -> Path:
    """A folder of plain images of the same shapes."""
    folder.mkdir()
    for number in range(count):
        height, width = SIZES[number % 3]
        Image.new("RGB", (width, height), (number * 8, 90, 30)).save(folder / f"{number:02}.png")
    return folder


def epoch(session: Session[Any], number: int = 0) -> list[Any]:
    """The batches of an epoch, as the loop has them."""
    steps, loader = steps_per_epoch(session), _batches(session, number * steps_per_epoch(session))
    return [next(loader).batch for _ in range(steps)]


def padded(batches: Sequence[Any]) -> float:
    """The share of all cells that is padding."""
    return torch.cat([batch.to("cpu").padding.flatten() for batch in batches]).float().mean().item()


def check(session: Session[Any], chance: Session[Any]) -> None:
    """That the first has the images of the second, and far less padding, in every epoch."""
    for number in range(2):
        grouped, plain = epoch(session, number), epoch(chance, number)
        names = [sorted(name for batch in one for name in session.names(batch)) for one in (grouped, plain)]
        assert names[0] == names[1]
        assert padded(grouped) < padded(plain) / 3
        assert padded(plain) > 0.15


@pytest.mark.parametrize("several", [False, True])
def test_detection(data: Path, several: bool) -> None:
    fields = tiny(multi_scale=several, crop=0.0, batch_size=3)
    grouped, chance = (prepare(revise(Recipe(), {**fields, "group_sizes": on}), data, World()) for on in (True, False))
    if several:
        assert padded(epoch(grouped)) < padded(epoch(chance)) * 0.7
    else:
        check(grouped, chance)


def test_segmentation(data: Path) -> None:
    fields = tiny(multi_scale=False, crop=0.0, batch_size=3)
    grouped, chance = (
        prepare_segmentation(revise(SegmentationRecipe(), {**fields, "group_sizes": on}), data, World())
        for on in (True, False)
    )
    check(grouped, chance)


def test_kept_features(tmp_path: Path) -> None:
    images = unlabelled(tmp_path / "images", 30)
    backbone = build_backbone("resnet-nano")
    backbone.initialise(torch.Generator().manual_seed(1))
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    fields = tiny(shown="features", patches=2, patch_size=32, shortest=0, multi_scale=False, val_fraction=0.2)
    fields |= {"backbone_weights": str(tmp_path / "backbone.safetensors"), "batch_size": 3}
    grouped, chance = (
        prepare_patches(revise(PatchRecipe(), {**fields, "group_sizes": on}), images, World(), tmp_path / "run")
        for on in (True, False)
    )
    check(grouped, chance)


def test_crops_meet_by_chance(tmp_path: Path) -> None:
    fields = tiny(patches=2, patch_size=32, shortest=0, val_fraction=0.3, train_backbone=True)
    images = unlabelled(tmp_path / "images", 6)
    assert prepare_patches(revise(PatchRecipe(), fields), images, World(), tmp_path / "run").size_of is None
