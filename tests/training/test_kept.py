"""Pre-training on kept features, with regions that stand out: what is kept and when, and that a run learns from it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from training.drawing import content, tiny, without_times

import detrkit
from detrkit.data.pictures import open_pictures
from detrkit.errors import DataError, UsageError
from detrkit.nn.backbone import build_backbone
from detrkit.structures import FeatureBatch
from detrkit.training.distributed import World
from detrkit.training.events import Evaluated, Event, Preparing, Saved, Started, Step
from detrkit.training.kept import FOLDER, refuse_contradictions, with_pixels
from detrkit.training.patches import PatchSession, prepare_patches
from detrkit.training.pretext import PatchOptions, PatchRecipe
from detrkit.training.recipe import revise

pytestmark = pytest.mark.usefixtures("plotless")

IMAGES = 12
COLOURS = ("crimson", "gold", "seagreen", "royalblue", "white", "black")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two sizes, each with two coloured shapes on a grey ground."""
    folder, rng = tmp_path_factory.mktemp("drawn") / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(IMAGES):
        width, height = ((80, 64), (64, 72))[number % 2]
        image = Image.new("RGB", (width, height), (110, 115, 120))
        pen, colours = ImageDraw.Draw(image), rng.permutation(COLOURS)
        for half, shape in enumerate((pen.ellipse, pen.rectangle)):
            wide, high = rng.integers(16, 26, 2).tolist()
            x, y = half * width // 2 + int(rng.integers(2, 6)), int(rng.integers(2, height - high - 2))
            shape((x, y, x + wide, y + high), fill=str(colours[half]))
        image.save(folder / f"{number:02d}.png")
    return folder


def write_weights(file: Path, seed: int) -> Path:
    backbone = build_backbone("resnet-nano")
    backbone.initialise(torch.Generator().manual_seed(seed))
    save_file(backbone.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for the backbone, which is frozen."""
    return write_weights(tmp_path_factory.mktemp("weights") / "resnet-nano.safetensors", 1)


@pytest.fixture(scope="module")
def usual(weights: Path) -> dict[str, Any]:
    """Recipe fields of a pre-training on features that takes a second."""
    asked = {"shown": "features", "patches": 3, "patch_size": 32, "shortest": 0, "multi_scale": False, "flip": 0.5}
    return tiny(**asked, regions_weight=1.0, regions=5, val_fraction=0.5, backbone_weights=str(weights))


@pytest.fixture
def fields(usual: dict[str, Any]) -> dict[str, Any]:
    """The same, to be changed."""
    return dict(usual)


Progress = list[tuple[int, int]]


def opened(images: Path, out: Path, fields: dict[str, Any]) -> tuple[PatchSession, Progress]:
    """The session of a run, and what was told on the way."""
    told: Progress = []
    session = prepare_patches(
        revise(PatchRecipe(), fields), images, World(), out, on_picture=lambda done, total: told.append((done, total))
    )
    return session, told


def up_to(total: int, first: int = 1) -> Progress:
    return [(done, total) for done in range(first, total + 1)]


def lines_of(out: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in without_times(out) if line["event"] == event]


@pytest.mark.parametrize("field", ["train_backbone", "multi_scale"])
def test_what_changes_features_is_refused_with_them(field: str, images: Path, tmp_path: Path) -> None:
    asked = {"train_backbone": False, "multi_scale": False, field: True}
    with pytest.raises(UsageError, match=rf"does not train.*{field} True.*--shown crops.*--no-multi-scale"):
        refuse_contradictions(PatchOptions(shown="features", **asked))
    refuse_contradictions(PatchOptions(shown="features", train_backbone=False, multi_scale=False, regions_weight=1.0))
    with pytest.raises(UsageError, match=rf"{field} True.*--shown crops --regions-weight 0\)"):
        detrkit.pretrain(images, out=tmp_path / "run", **tiny(shown="features", regions_weight=1.0, **asked))
    assert not (tmp_path / "run").exists()


def test_the_way_to_a_backbone_that_trains_along_is_told_whole(
    images: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    fields["backbone_weights"] = "random"
    with pytest.raises(UsageError, match=r"\(--train-backbone --shown crops --regions-weight 0\)"):
        opened(images, tmp_path / "run", fields)
    with pytest.raises(UsageError, match=r"\(--train-backbone\)"):
        opened(images, tmp_path / "run", {**fields, "shown": "crops", "regions_weight": 0.0})


def test_regions_without_features_are_refused() -> None:
    with pytest.raises(UsageError, match=r"regions_weight: .*got 0\.5.*--shown features.*--regions-weight 0"):
        refuse_contradictions(PatchOptions(regions_weight=0.5))
    refuse_contradictions(PatchOptions())


@pytest.mark.parametrize("model", ["detr-nano", "conditional-detr-nano"])
def test_both_questions_are_learnt(model: str, images: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Event] = []
    out = tmp_path / "run"
    more = {"model": model, "epochs": 12, "evaluate_every": 12, "log_every": 1, "lr": 2e-3, "samples": 2}
    run = detrkit.pretrain(images, out=out, on_event=seen.append, **{**fields, **more})
    preparing = [event for event in seen if isinstance(event, Preparing)]
    assert [(event.done, event.total) for event in preparing] == up_to(IMAGES)
    assert isinstance(seen[IMAGES], Started)
    steps, (evaluated,) = lines_of(out, "step"), lines_of(out, "evaluated")
    terms = {"class", "l1", "giou", "feature", "region_class", "region_l1", "region_giou"}
    assert terms <= steps[0].keys()
    for name in ("loss", "region_l1", "region_giou"):
        assert mean(steps[-8:], name) < 0.9 * mean(steps[:8], name), name
    assert 0 <= evaluated["region_recall50"] <= 1
    assert 0 < evaluated["region_iou"] < 1
    told = next(event for event in seen if isinstance(event, Evaluated))
    assert told.headline == ("recall50", "recall75", "consistency", "region_recall50")
    assert run.figures["region_recall50"] == evaluated["region_recall50"]
    assert run.page is not None
    assert run.page.read_text().count("data:image/") == 2
    detector = detrkit.load(out, device="cpu")
    assert [category.name for category in detector.categories] == ["patch"]


def mean(lines: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))


def test_regions_cost_what_their_weight_says(images: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    totals, parts = {}, {}
    for weight in (0.0, 1.0, 3.0):
        session, _ = opened(images, tmp_path / "run", {**fields, "regions_weight": weight, "mask_out": 0.0})
        (batch, _), *_ = session.batches(sampler_of(session))
        session.model.eval()  # no dropout
        losses = session.losses(session.model, batch, session.shared([batch]))
        totals[weight], parts[weight] = float(losses.total.detach()), losses.names
        assert losses.class_error.isnan()
    assert parts[0.0] == ("class", "l1", "giou", "feature")
    assert parts[1.0] == (*parts[0.0], "region_class", "region_l1", "region_giou")
    assert totals[1.0] - totals[0.0] > 0.1
    assert totals[3.0] - totals[0.0] == pytest.approx(3 * (totals[1.0] - totals[0.0]), rel=1e-4)


def test_sums_are_divided_by_the_patches_and_the_regions_of_a_step(
    images: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    session, _ = opened(images, tmp_path / "run", {**fields, "mask_out": 0.0})
    (batch, _), *_ = session.batches(sampler_of(session))
    session.model.eval()
    patches, regions = session.counts(batch)
    assert (patches, regions) == (6, sum(len(one.boxes) for one in batch.regions))
    assert session.shared([batch, batch]) == (patches, regions)
    plain = session.losses(session.model, batch, (float(patches), float(regions)))
    spread = session.losses(session.model, batch, (2.0 * patches, 4.0 * regions))
    share = (plain.values / spread.values).mean(1).tolist()
    assert dict(zip(plain.names, share, strict=True)) == pytest.approx(
        {"class": 1, "l1": 2, "giou": 2, "feature": 2, "region_class": 1, "region_l1": 4, "region_giou": 4}, rel=1e-4
    )


def sampler_of(session: PatchSession) -> Any:
    from detrkit.data.order import EpochBatches

    return EpochBatches(session.count, 2, 0, total_steps=1)


class Whole(NamedTuple):
    """A run that was not interrupted, and the fields that it was called with."""

    folder: Path
    fields: dict[str, Any]


@pytest.fixture(scope="module")
def whole(
    plotless: None, images: Path, weights: Path, usual: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """A whole run of two epochs, whose first weights lie in a file of its own."""
    folder = tmp_path_factory.mktemp("runs")
    own = shutil.copyfile(weights, folder / "own.safetensors")
    fields = {**usual, "ema": 0.9, "mask_out": 0.4, "samples": 0, "backbone_weights": str(own)}
    detrkit.pretrain(images, out=folder / "whole", **fields)
    return Whole(folder / "whole", fields)


@pytest.mark.parametrize("kind", [Evaluated, Saved])  # the checkpoint of before the evaluation, and of after it
def test_a_run_goes_on_exactly_and_with_what_it_kept(
    kind: type[Event], images: Path, whole: Whole, weights: Path, tmp_path: Path
) -> None:
    own, stopped = Path(whole.fields["backbone_weights"]), tmp_path / "stopped"
    shutil.copyfile(weights, own)

    def stop(event: Event) -> None:
        if isinstance(event, kind):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detrkit.pretrain(images, out=stopped, on_event=stop, **whole.fields)
    own.unlink()  # a run needs its first weights no more
    seen: list[Event] = []
    detrkit.pretrain(images, out=stopped, resume=True, on_event=seen.append)
    assert isinstance(seen[0], Started), "nothing is prepared again"
    assert seen[0].step == seen[0].total_steps // 2
    for checkpoint in ("checkpoints/last", "checkpoints/best", "model"):
        assert content(stopped / checkpoint) == content(whole.folder / checkpoint)
    assert without_times(stopped) == without_times(whole.folder)


def test_a_run_goes_on_that_was_stopped_before_the_recipe_asked_for_a_checkpoint(
    images: Path, usual: dict[str, Any], tmp_path: Path
) -> None:
    out, seen, fields = tmp_path / "run", [], {**usual, "save_every": 2}

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        detrkit.pretrain(images, out=out, on_event=stop, **fields)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["within"]
    detrkit.pretrain(images, out=out, resume=True, on_event=seen.append, **fields)
    assert isinstance(seen[0], Started), "nothing is prepared again"
    assert seen[0].step == 1


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole: Whole, images: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", []
    shutil.copytree(whole.folder, out)
    file = out / "checkpoints" / "last" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    detrkit.pretrain(images, out=out, resume=True, on_event=seen.append)
    assert isinstance(seen[0], Started), "nothing is prepared again"
    (note,) = [note for note in seen[0].notes if "damaged" in note]
    assert note.startswith(f"The checkpoint {file.parent} is damaged and not used: model.safetensors")
    assert content(out / "checkpoints" / "last") == content(whole.folder / "checkpoints" / "last")


def test_features_are_kept_as_long_as_they_hold(images: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    out, folder = tmp_path / "run", tmp_path / "images"
    shutil.copytree(images, folder)
    assert opened(folder, out, fields)[1] == up_to(IMAGES)
    maps = (out / FOLDER / "train" / "maps.f16").read_bytes()
    unlike = {"epochs": 9, "batch_size": 3, "patches": 2, "lr": 1.0, "crops": "stratified", "flip": 0.0}
    assert opened(folder, out, {**fields, **unlike})[1] == []
    others: dict[str, dict[str, Any]] = {
        "other weights": {"backbone_weights": str(write_weights(tmp_path / "other.safetensors", 2))},
        "another size": {"shortest": 48},
        "more regions": {"regions": 6},
        "no regions": {"regions_weight": 0.0},
    }
    for change in others.values():
        assert opened(folder, out, {**fields, **change})[1] == up_to(IMAGES)
    opened(folder, out, fields)
    assert (out / FOLDER / "train" / "maps.f16").read_bytes() == maps
    session, told = opened(folder.rename(tmp_path / "moved"), out, fields)
    assert told == up_to(IMAGES), "else samples would be looked for where they lay"
    assert all(name.startswith(str(tmp_path / "moved")) for name in session.val.store.names)
    Path(session.train.store.names[0]).unlink()
    told = opened(tmp_path / "moved", out, fields)[1]
    assert told == [(done, IMAGES - 1) for done in range(1, session.count)], "and of the held-out ones they still hold"


def test_what_was_done_before_an_interruption_counts(images: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    count = opened(images, tmp_path / "other", fields)[0].count

    def stop(done: int, total: int) -> None:
        if done > count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_patches(revise(PatchRecipe(), fields), images, World(), tmp_path / "run", on_picture=stop)
    assert opened(images, tmp_path / "run", fields)[1] == up_to(IMAGES, count + 1)


def test_images_that_cannot_be_used_are_left_out_and_told(images: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    before, _ = opened(folder, tmp_path / "before", fields)
    assert not any("left out" in note for note in before.notes)
    lost, narrow = (Path(part.store.names[0]) for part in (before.train, before.val))
    lost.write_bytes(b"broken" * 20)
    Image.new("RGB", (300, 5)).save(narrow)
    session, told = opened(folder, tmp_path / "run", fields)
    assert told == up_to(IMAGES)
    assert (session.count, len(session.val)) == (before.count - 1, len(before.val) - 1)
    (note,) = [note for note in session.notes if "left out" in note]
    assert "left out: 2, such as " in note
    assert str(lost) in note
    run = detrkit.pretrain(folder, out=tmp_path / "run", **fields)
    assert note in json.loads((tmp_path / "run" / "data.json").read_text())["notes"]
    assert f"n {len(session.val)} held-out image" in run.sentence
    for name in before.val.store.names:
        Path(name).write_bytes(b"broken")
    with pytest.raises(DataError, match="Not one of the pictures can be used"):
        opened(folder, tmp_path / "none", fields)


def test_samples_are_shown_as_they_are(images: Path, tmp_path: Path) -> None:
    big = Image.new("RGB", (1600, 400), (10, 20, 30))
    big.paste((250, 0, 0), (400, 100, 800, 300))
    shutil.copytree(images, tmp_path / "images")
    big.save(tmp_path / "images" / "big.png")
    pictures = open_pictures(tmp_path / "images")
    names = tuple(str(tmp_path / "images" / name) for name in ("00.png", "big.png"))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]], [[0.375, 0.5, 0.25, 0.5]]])
    maps = torch.zeros(2, 8, 4, 5)
    batch = FeatureBatch(maps, torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 1, 8), boxes, names)
    shown = with_pixels(batch, pictures, 16)
    assert shown.names == names
    assert torch.equal(shown.boxes, boxes)
    assert shown.images.shape == (2, 3, 160, 640), "large ones in a moderate size, small ones in their own"
    assert [(~padding).sum().item() for padding in shown.padding] == [64 * 80, 160 * 640]
    assert shown.patches.shape == (2, 1, 3, 16, 16)
    red = shown.images[1, :, 80, 240]  # in the middle of the box
    assert torch.allclose(shown.patches[1, 0, :, 4:-4, 4:-4], red[:, None, None].expand(3, 8, 8), atol=0.02)
    assert not torch.allclose(shown.images[1, :, 10, 10], red)
