"""Kept features: the backbone's own, computed once, and a training on them that equals the one on pixels."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.crops import Crops, ImageResizing, StratifiedCrops, UniformCrops
from detrkit.data.dataset import Key
from detrkit.data.images import open_image
from detrkit.data.order import EpochBatches
from detrkit.data.pictures import Pictures, open_pictures
from detrkit.data.transforms import resized_size, to_tensor
from detrkit.errors import DataError, Error, UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.models import conditional_detr, detr
from detrkit.nn.backbone import Backbone, build_backbone
from detrkit.nn.pooling import pool_boxes
from detrkit.pretrain.features import (
    FeatureDataset,
    FeatureItem,
    FeatureStore,
    evaluation_features,
    extract,
    feature_batches,
)
from detrkit.pretrain.up_detr import UpDetr, criterion
from detrkit.prompts import DISTINCT
from detrkit.structures import FeatureBatch

MODULE = sys.modules[extract.__module__]
STRIDE, PLACES, SEED = 16, 4, 5
RESIZING = ImageResizing(sizes=(48, 64), longest=96, flip=0.5)
SIZES = ((80, 60), (50, 70), (64, 64), (90, 60), (60, 80))  # width, height; most are no whole number of cells


def picture(folder: Path, index: int) -> None:
    pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(SIZES[index]).save(folder / f"{index}.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(len(SIZES)):
        picture(folder, index)
    return folder


@pytest.fixture
def backbone() -> Backbone:
    made = build_backbone("resnet-nano", levels=(STRIDE,), frozen_stages=5)
    made.initialise(torch.Generator().manual_seed(1))
    return made


def keep(
    backbone: nn.Module, pictures: Pictures, folder: Path, key: str = "a", crops: Crops | None = None, **options: Any
) -> FeatureStore:
    settings = {"stride": STRIDE, "workers": 0, "device": torch.device("cpu"), **options}
    return extract(backbone, pictures, RESIZING, crops or StratifiedCrops(), folder, key=key, **settings)


@pytest.fixture
def store(backbone: Backbone, pictures: Path, tmp_path: Path) -> FeatureStore:
    return keep(backbone, open_pictures(pictures), tmp_path / "kept")


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def whole(side: int) -> int:
    """A side of so many pixels, rounded to whole cells."""
    return round(side / STRIDE) * STRIDE


class TestExtraction:
    def test_maps_are_the_backbones_own_in_16_bits(self, store: FeatureStore, backbone: Backbone, pictures: Path):
        assert len(store) == len(SIZES)
        assert store.names == tuple(str(pictures / f"{index}.png") for index in range(len(SIZES)))
        assert store.lost == ()
        assert [tuple(shape[1:]) for shape in store.shapes] == [(4, 5), (6, 4), (4, 4), (4, 6), (5, 4)]
        assert not any(map(len, store.regions)), "they were not asked for"
        for index, (width, height) in enumerate(SIZES):
            size = tuple(whole(side) for side in resized_size(height, width, 64, 96)[::-1])
            pixels = to_tensor(open_image(pictures / f"{index}.png").resize(size, Image.Resampling.BILINEAR))[None]
            with torch.no_grad():
                plain, mirrored = backbone(pixels)[-1][0], backbone(pixels.flip(-1))[-1][0]
            searched, other = store.maps(index, mirrored=False)
            close = {"atol": 1e-3, "rtol": 2e-3}
            torch.testing.assert_close(searched, plain, **close)
            torch.testing.assert_close(other, mirrored.flip(-1), **close)
            assert searched.dtype == torch.float32
            assert torch.equal(searched, searched.half().float()), "kept in 16 bits"

    def test_the_mirrored_picture_has_the_other_turned_into_its_frame(self, store: FeatureStore):
        for index in range(len(store)):
            (plain, turned), (mirrored, back) = store.maps(index, mirrored=False), store.maps(index, mirrored=True)
            assert torch.equal(mirrored, turned.flip(-1))
            assert torch.equal(back, plain.flip(-1))
            assert not torch.equal(plain, turned), "else a cell could be told by being the very same"

    def test_a_large_photograph_is_opened_no_larger_than_is_looked_at(
        self, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "photographs").mkdir()
        Image.new("RGB", (1280, 1024)).save(tmp_path / "photographs" / "large.jpg")
        sizes: list[tuple[int, int]] = []
        plain = MODULE.find_regions
        monkeypatch.setattr(
            MODULE, "find_regions", lambda image, limit: sizes.append(image.size) or plain(image, limit)
        )
        keep(backbone, open_pictures(tmp_path / "photographs"), tmp_path / "kept", regions=3)
        assert sizes == [(320, 256)], "regions are looked for at a short side of 128"

    def test_what_is_kept_does_not_depend_on_workers(
        self, store: FeatureStore, backbone: Backbone, pictures: Path, tmp_path: Path
    ):
        other = keep(backbone, open_pictures(pictures), tmp_path / "two", workers=2)
        assert other.names == store.names
        for file in ("maps.f16", "maps.json"):
            assert (store.folder / file).read_bytes() == (other.folder / file).read_bytes()

    def test_kept_maps_serve_the_same_key_alone(self, backbone: Backbone, pictures: Path, tmp_path: Path):
        calls, seen = [], []
        backbone.register_forward_hook(lambda *_: calls.append(1))
        listed = open_pictures(pictures)
        keep(backbone, listed, tmp_path / "kept", "a", on_picture=lambda: seen.append(1))
        assert len(calls) == len(seen) == len(SIZES), "a picture and its mirror image go through at once"
        again = keep(backbone, listed, tmp_path / "kept", "a", on_picture=lambda: seen.append(1))
        assert len(calls) == len(seen) == len(SIZES)
        with torch.no_grad():
            next(backbone.parameters()).mul_(2)
        anew = keep(backbone, listed, tmp_path / "kept", "b")
        assert len(calls) == 2 * len(SIZES)
        assert (again.key, anew.key, FeatureStore(tmp_path / "kept").key) == ("a", "b", "b")
        assert not torch.equal(anew.maps(0, mirrored=False)[0], FeatureStore(tmp_path / "kept").maps(1, False)[0])

    def test_whoever_is_stopped_leaves_nothing_that_counts_as_kept(
        self, backbone: Backbone, pictures: Path, tmp_path: Path
    ):
        listed, folder = open_pictures(pictures), tmp_path / "kept"
        before = keep(backbone, listed, folder, "a")
        first = before.maps(0, mirrored=False)[0]

        def stop() -> None:
            raise KeyboardInterrupt

        with torch.no_grad():
            next(backbone.parameters()).mul_(2)
        with pytest.raises(KeyboardInterrupt):
            keep(backbone, listed, folder, "b", on_picture=stop)
        assert torch.equal(before.maps(0, mirrored=False)[0], first), "what somebody still reads is left to him"
        with torch.no_grad():
            next(backbone.parameters()).div_(2)
        calls: list[int] = []
        backbone.register_forward_hook(lambda *_: calls.append(1))
        after = keep(backbone, listed, folder, "a")
        assert len(calls) == len(SIZES)
        assert torch.equal(after.maps(0, mirrored=False)[0], first)

    def test_pictures_that_lie_elsewhere_now_are_looked_at_anew(
        self, backbone: Backbone, pictures: Path, tmp_path: Path
    ):
        before = keep(backbone, open_pictures(pictures), tmp_path / "kept")
        moved = pictures.rename(tmp_path / "moved")
        after = keep(backbone, open_pictures(moved), tmp_path / "kept")
        assert [Path(name).parent for name in (before.names[0], after.names[0])] == [pictures, moved]
        assert torch.equal(before.maps(2, mirrored=False)[1], after.maps(2, mirrored=False)[1])

    def test_regions_are_found_in_each_picture(self, backbone: Backbone, pictures: Path, tmp_path: Path):
        ground = Image.new("RGB", (80, 64), (120, 120, 120))
        ground.paste((250, 40, 40), (8, 16, 28, 40))
        ground.save(pictures / "2.png")
        store = keep(backbone, open_pictures(pictures), tmp_path / "kept", regions=3)
        (box,) = store.regions[2]
        assert box == pytest.approx([0.1, 0.25, 0.35, 0.625], abs=0.03)
        assert all(len(regions) <= 3 for regions in store.regions)
        assert all(
            np.array_equal(*pair) for pair in zip(store.regions, FeatureStore(store.folder).regions, strict=True)
        )
        plain, mirrored = (examples(store, flip=flip)[Key(0, 2)].regions for flip in (0.0, 1.0))
        assert plain[0].tolist() == pytest.approx([0.225, 0.4375, 0.25, 0.375], abs=0.04)
        assert mirrored[0, 0] == pytest.approx(1 - plain[0, 0])
        assert torch.equal(mirrored[:, 1:], plain[:, 1:])
        (batch,) = evaluation_features(examples(store, evaluation=True), len(SIZES), workers=0)
        assert torch.equal(batch.regions[2].boxes, plain)
        assert batch.regions[2].labels.tolist() == [0]
        assert tuple(target.name for target in batch.regions) == batch.names

    def test_pictures_that_cannot_be_used_are_left_out_and_named(
        self, backbone: Backbone, pictures: Path, tmp_path: Path
    ):
        seen: list[int] = []
        (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:60])
        (pictures / "3.png").unlink()
        Image.new("RGB", (8000, 512)).save(pictures / "3.jpg")
        store = keep(backbone, open_pictures(pictures), tmp_path / "kept", on_picture=lambda: seen.append(1))
        assert [Path(name).name for name in store.names] == ["0.png", "2.png", "4.png"]
        assert len(seen) == len(SIZES), "those that are left out are done, too"
        assert len(store.lost) == 2
        unreadable, narrow = store.lost
        assert unreadable.startswith(str(pictures / "1.png"))
        assert narrow.startswith(str(pictures / "3.jpg"))
        assert "8000 × 512 pixels" in narrow
        assert FeatureStore(tmp_path / "kept").lost == store.lost
        assert store.maps(2, mirrored=False)[0].shape[1:] == (5, 4), "the map of picture 4, which is now the third"

    def test_a_folder_of_nothing_but_unusable_pictures_is_an_error(
        self, backbone: Backbone, pictures: Path, tmp_path: Path
    ):
        for index in range(len(SIZES)):
            (pictures / f"{index}.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"pictures: Not one of the pictures can be used.*4\.png"):
            keep(backbone, open_pictures(pictures), tmp_path / "kept")
        assert not (tmp_path / "kept" / "maps.json").exists()

    def test_a_place_that_cannot_be_written_to_is_named(self, backbone: Backbone, pictures: Path, tmp_path: Path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(Error, match=r"file.*cannot be kept"):
            keep(backbone, open_pictures(pictures), tmp_path / "file" / "kept")


def _cut(folder: Path) -> None:
    file = folder / "maps.f16"
    file.write_bytes(file.read_bytes()[:-64])


def _cut_in_a_number(folder: Path) -> None:
    file = folder / "maps.f16"
    file.write_bytes(file.read_bytes()[:-1])


def _rewrite(**fields: Any) -> Any:
    def damage(folder: Path) -> None:
        about = {**json.loads((folder / "maps.json").read_text()), **fields}
        (folder / "maps.json").write_text(json.dumps({name: part for name, part in about.items() if part is not None}))

    return damage


DAMAGE = {
    "cut": _cut,
    "cut inside a number": _cut_in_a_number,
    "no maps": lambda folder: (folder / "maps.f16").unlink(),
    "empty maps": lambda folder: (folder / "maps.f16").write_bytes(b""),
    "half an index": lambda folder: (folder / "maps.json").write_text('{"key": "a", "na'),
    "an index that is no text": lambda folder: (folder / "maps.json").write_bytes(b"\xff\xfe"),
    "an index of something else": lambda folder: (folder / "maps.json").write_text("[1, 2]"),
    "no names": _rewrite(names=None),
    "a name less": _rewrite(names=["0.png"]),
    "shapes that are none": _rewrite(shapes=[["a", "b", "c"]]),
    "no regions": _rewrite(regions=None),
    "regions of one picture only": _rewrite(regions=[[]]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_name_their_folder(damage: Any, store: FeatureStore, backbone: Backbone, pictures: Path):
    damage(store.folder)
    with pytest.raises(DataError, match=r"kept: The kept features.*cannot be read.*Delete the folder"):
        FeatureStore(store.folder)
    with pytest.raises(DataError, match="kept: The kept features"):
        keep(backbone, open_pictures(pictures), store.folder)


def examples(store: FeatureStore, **options: Any) -> FeatureDataset:
    settings: dict[str, Any] = {
        "indices": range(len(store)), "crops": StratifiedCrops(), "count": PLACES, "seed": SEED, "stride": STRIDE,
    }  # fmt: skip
    return FeatureDataset(store, **{**settings, **options})


class TestExamples:
    def test_an_example_depends_on_seed_epoch_and_index_alone(self, store: FeatureStore):
        dataset = examples(store, flip=0.5)
        first = dataset[Key(1, 2)]
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - to see that nothing reads it
        dataset[Key(0, 3)]
        assert same(first, dataset[Key(1, 2)])
        assert same(first, pickle.loads(pickle.dumps(dataset))[Key(1, 2)])
        for other in (dataset[Key(2, 2)], dataset[Key(1, 3)], examples(store, seed=6)[Key(1, 2)]):
            assert not torch.equal(first.boxes, other.boxes)
        twice = examples(store, indices=[2, 2])
        assert not torch.equal(twice[Key(1, 0)].boxes, twice[Key(1, 1)].boxes)

    @pytest.mark.parametrize("crops", [UniformCrops(), StratifiedCrops()])
    def test_places_lie_in_the_picture_and_say_what_the_other_map_does(self, store: FeatureStore, crops: Crops):
        searched_mirrored = []
        for index in range(len(store)):
            for epoch in range(8):
                item = examples(store, crops=crops, flip=0.5)[Key(epoch, index)]
                corners = cxcywh_to_xyxy(item.boxes)
                assert item.boxes.shape == (PLACES, 4)
                assert corners.min() >= -1e-6
                assert corners.max() <= 1 + 1e-6
                assert item.boxes[:, 2:].min() > 0
                assert item.name == store.names[index]
                mirrored = torch.equal(item.features, store.maps(index, mirrored=True)[0])
                searched, other = store.maps(index, mirrored)
                assert torch.equal(item.features, searched)
                assert torch.equal(item.patches, pool_boxes(other, item.boxes))
                searched_mirrored.append(mirrored)
        assert 0.25 < np.mean(searched_mirrored) < 0.75

    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_the_flip_is_as_probable_as_told(self, store: FeatureStore, flip: float):
        for epoch in range(5):
            assert torch.equal(examples(store, flip=flip)[Key(epoch, 1)].features, store.maps(1, bool(flip))[0])

    def test_a_mirrored_example_finds_the_same_things_at_mirrored_places(self, store: FeatureStore):
        item = examples(store, flip=1.0)[Key(0, 3)]
        turned = item.boxes * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
        torch.testing.assert_close(item.patches, pool_boxes(store.maps(3, mirrored=False)[0], turned))

    def test_evaluation_is_the_same_in_every_epoch_and_not_mirrored(self, store: FeatureStore):
        dataset = examples(store, flip=1.0, evaluation=True)
        for index in range(len(store)):
            item = dataset[Key(0, index)]
            assert same(item, dataset[Key(7, index)])
            assert torch.equal(item.features, store.maps(index, mirrored=False)[0])
        assert not torch.equal(dataset[Key(0, 2)].boxes, examples(store)[Key(0, 2)].boxes)

    def test_chosen_pictures_are_the_only_ones(self, store: FeatureStore):
        dataset = examples(store, indices=[3, 1], evaluation=True)
        assert len(dataset) == 2
        names = [name for batch in evaluation_features(dataset, 1, workers=0) for name in batch.names]
        assert names == [store.names[3], store.names[1]]
        with pytest.raises(DataError, match="kept: There are no pictures"):
            examples(store, indices=[])


class TestBatches:
    def sampler(self, steps: int = 6) -> EpochBatches:
        return EpochBatches(len(SIZES), 2, SEED, total_steps=steps)

    def batches(self, store: FeatureStore, workers: int) -> Iterator[FeatureBatch]:
        dataset = examples(store, flip=0.5)
        return (loaded.batch for loaded in feature_batches(dataset, self.sampler(), workers=workers))

    def test_workers_change_nothing(self, store: FeatureStore):
        here, there = list(self.batches(store, 0)), list(self.batches(store, 2))
        assert len(here) == len(there) == 6
        for one, other in zip(here, there, strict=True):
            assert same(one, other)
        evaluated = examples(store, evaluation=True)
        for pair in zip(*(evaluation_features(evaluated, 2, workers=workers) for workers in (0, 2)), strict=True):
            assert same(*pair)

    def test_a_batch_holds_its_examples_and_says_where_it_is_padded(self, store: FeatureStore):
        dataset = examples(store, evaluation=True)
        (batch,) = evaluation_features(dataset, len(SIZES), workers=0)
        assert batch.images.shape[2:] == batch.padding.shape[1:] == (6, 6)
        assert batch.names == store.names
        assert batch.padding.any()
        for row, padding in enumerate(batch.padding):
            item: FeatureItem = dataset[Key(0, row)]
            height, width = item.features.shape[1:]
            assert torch.equal(batch.images[row, :, :height, :width], item.features)
            assert torch.equal(batch.patches[row], item.patches)
            assert torch.equal(batch.boxes[row], item.boxes)
            assert (~padding).nonzero().amax(0).tolist() == [height - 1, width - 1]
            assert int((~padding).sum()) == height * width
            assert not batch.images[row, :, padding].any()
        assert same(batch, batch.to("cpu"))

    def test_evaluations_that_make_no_sense_are_refused(self, store: FeatureStore):
        with pytest.raises(UsageError, match="made for it"):
            evaluation_features(examples(store), 2, workers=0)
        with pytest.raises(UsageError, match="at least one picture"):
            evaluation_features(examples(store, evaluation=True), 0, workers=0)


def task_of(variant: ModuleType = detr, **options: Any) -> UpDetr:
    config = variant.Config(
        num_classes=1, backbone="resnet-nano", stride=STRIDE, num_queries=6, dim=32, heads=4, encoder_layers=2,
        decoder_layers=2, feedforward=32, dropout=0.0,
    )  # fmt: skip
    task = UpDetr(variant.Model(config), **{"patches": 3, "mask_out": 0.0, **options})
    with torch.no_grad():
        task.detector.box_head.layers[-1].weight.normal_(std=0.5)
    return task


@pytest.mark.parametrize("variant", [detr, conditional_detr])
class TestTask:
    def test_the_second_question_does_not_disturb_the_first(self, variant: ModuleType):
        task = task_of(variant).eval()
        images, padding, patches = (
            torch.randn(2, 3, 64, 80),
            torch.zeros(2, 64, 80, dtype=torch.bool),
            torch.randn(2, 3, 3, 32, 32),
        )
        padding[1, :, 64:] = True
        with torch.no_grad():
            alone, own = task(images, padding, patches), task.detector(images, padding)
            asked, unasked = task(images, padding, patches, also_unasked=True)
        assert same(asked, alone)
        assert same(unasked, own)
        assert (unasked.boxes - asked.boxes).abs().max() > 1e-3, "else patches would not be seen"

    def test_known_features_give_the_answers_of_pixels(self, variant: ModuleType):
        task = task_of(variant).eval()
        images, patches = torch.randn(2, 3, 64, 80), torch.randn(2, 3, 3, 32, 32)
        with torch.no_grad():
            maps, padding = task.detector.backbone(images)[-1], torch.zeros(2, 64, 80, dtype=torch.bool)
            expected = task(images, padding, patches)
            known = task(maps, torch.zeros(2, 4, 5, dtype=torch.bool), task.describe(patches), known=True)
            other = task(maps, torch.zeros(2, 4, 5, dtype=torch.bool), task.describe(patches.flip(1)), known=True)
        for ours, theirs in zip(known, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (other.boxes - known.boxes).abs().max() > 1e-3

    def test_padded_cells_are_not_looked_at(self, variant: ModuleType):
        task = task_of(variant).eval()
        channels = task.detector.backbone.channels[-1]
        maps, patches = torch.randn(1, channels, 4, 5), torch.randn(1, 3, channels)
        padding = torch.zeros(1, 4, 5, dtype=torch.bool)
        padding[..., 3:] = True
        changed = maps + 3.0 * padding[:, None]
        with torch.no_grad():
            first, second = (task(each, padding, patches, known=True) for each in (maps, changed))
        torch.testing.assert_close(first.boxes, second.boxes, atol=1e-5, rtol=0)

    def test_a_projection_can_start_as_that_of_tokens(self, variant: ModuleType):
        task = task_of(variant, start="tokens")
        cell = torch.randn(2, task.detector.backbone.channels[-1])
        with torch.no_grad():
            token = task.detector.projection(cell[:, :, None, None])[:, :, 0, 0]
            torch.testing.assert_close(task.patch_projection(cell), DISTINCT * token, atol=1e-4, rtol=1e-5)
            task.patch_projection.weight.zero_()
        assert task.detector.projection.weight.any(), "the two only start alike"
        torch.manual_seed(0)
        drawn = task_of(variant)
        assert not torch.allclose(drawn.patch_projection.weight, DISTINCT * drawn.detector.projection.weight[..., 0, 0])

    def test_pictures_whose_maps_are_not_finite_are_named(self, variant: ModuleType):
        task = task_of(variant)
        channels = task.detector.backbone.channels[-1]
        maps, padding = torch.randn(3, channels, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
        maps[1, 0, 2, 2] = torch.nan
        found = task(maps, padding, torch.randn(3, 3, channels), known=True)
        boxes = torch.full((3, 3, 4), 0.5)
        for match in ("all", "group"):
            loss = criterion(task.detector, 3, match=match)
            with pytest.raises(NonFiniteError, match=r"^b\.jpg: ") as caught:
                loss(found, boxes, task.group, names=("a.jpg", "b.jpg", "c.jpg"))
            assert caught.value.images == ("b.jpg",)
            with pytest.raises(NonFiniteError, match=r"^image 1 of the batch: "):
                loss(found, boxes, task.group)


def test_a_variant_without_a_projection_cannot_start_as_its_tokens():
    detector = task_of().detector
    detector.projection = nn.Identity()
    detector.projection.weight = torch.zeros(1)
    with pytest.raises(UsageError, match=r"does not make tokens by a projection.*random"):
        UpDetr(detector, patches=3, start="tokens")
    del detector.projection
    with pytest.raises(UsageError, match="does not make tokens by a projection"):
        UpDetr(detector, patches=3, start="tokens")
