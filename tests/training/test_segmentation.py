"""The training of a mask head: alone, with its detector, from other weights, resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.drawing import content, tiny, write_coco

import detrkit
from detrkit import DataError, ModelError, UsageError
from detrkit.checkpoint import load_model
from detrkit.data import formats
from detrkit.data.order import EpochBatches
from detrkit.masks import RunLengths
from detrkit.sources import open_model
from detrkit.training.distributed import World
from detrkit.training.events import Evaluated, Event, Started, Step
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.recipe import revise
from detrkit.training.run import Run, evaluate_in_detail
from detrkit.training.segmentation import prepare_segmentation
from detrkit.training.validation import detect, segment

pytestmark = pytest.mark.usefixtures("plotless")


def train(data: Path, out: Path, **fields: Any) -> tuple[Run, list[Event]]:
    events: list[Event] = []
    run = detrkit.train(data, out=out, on_event=events.append, **{"masks": True, **tiny(**fields)})
    return run, events


@pytest.fixture(scope="module")
def together(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A run in which boxes and masks are learnt together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        run, events = train(drawn, tmp_path_factory.mktemp("runs") / "together", ema=0.9)
    return run.folder, events


def test_a_run_learns_masks_and_says_so(together: tuple[Path, list[Event]]) -> None:
    folder, events = together
    steps = [event for event in events if isinstance(event, Step)]
    assert list(steps[0].terms) == ["class", "l1", "giou", "mask", "dice"]
    assert steps[-1].terms["dice"] < steps[0].terms["dice"]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert evaluated[-1].headline[0] == "mask_AP"
    assert {"mask_AP", "mask_AP50", "AP"} <= evaluated[-1].figures.keys()
    assert json.loads((folder / "model" / "config.json").read_text())["about"]["segmentation"] == {
        "attention": "joint",
        "box": False,
    }
    assert (folder / "samples" / "epoch-0002.jpg").is_file()


def test_a_model_answers_with_masks_of_the_images_size(together: tuple[Path, list[Event]], drawn: Path) -> None:
    detector = detrkit.load(together[0])
    images = sorted((drawn / "val").glob("*.png"))
    found = detector.predict(images, threshold=0.0)
    for one in found:
        assert one.masks is not None
        assert one.masks.shape == (len(one), *one.image_size)
        assert [len(entry["segmentation"]["counts"]) > 0 for entry in one.to_coco(1)] == [True] * len(one)
    alone = detector.predict(images[1], threshold=0.0)
    assert np.array_equal(alone.masks, found[1].masks), "an image does not depend on its companions"
    above = detector.predict(images[1], threshold=float(found[1].scores[2]))
    assert np.array_equal(above.masks, found[1].masks[: len(above)])
    with pytest.raises(UsageError, match="last decoder layer"):
        detector.predict(images[0], ensemble=True)


def test_images_are_cut_into_segments(together: tuple[Path, list[Event]], drawn: Path) -> None:
    detector = detrkit.load(together[0])
    image = next((drawn / "val").glob("*.png"))
    everything = detector.segment(image, threshold=0.0)
    assert everything.ids.shape == everything.image_size
    assert set(np.unique(everything.ids)) - {0} == set(range(1, len(everything) + 1))
    assert len(detector.segment(image, threshold=1.0)) == 0
    with pytest.raises(UsageError, match="threshold"):
        detector.segment(image, threshold=2.0)
    bare = dataclasses.replace(detector, segmenter=None)
    with pytest.raises(ModelError, match=r"no mask head.*--masks --init"):
        bare.segment(image)


def test_figures_are_those_of_the_training(together: tuple[Path, list[Event]], drawn: Path) -> None:
    folder, events = together
    found = evaluate_in_detail(folder, drawn, split="val")
    best = max(
        (event for event in events if isinstance(event, Evaluated) and not math.isnan(event.figures["mask_AP"])),
        key=lambda event: event.figures["mask_AP"],
    )
    assert found.figures["mask_AP"] == pytest.approx(best.figures["mask_AP"], abs=1e-6)
    assert found.figures["AP50"] == pytest.approx(best.figures["AP50"], abs=1e-6)


def test_a_run_goes_on_exactly(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train(drawn, tmp_path / "whole", evaluate_every=2)

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == 7:
            raise Killed

    fields = {"masks": True, **tiny(evaluate_every=2)}
    with pytest.raises(Killed):
        detrkit.train(drawn, out=tmp_path / "parts", on_event=kill, **fields)
    detrkit.train(drawn, out=tmp_path / "parts", resume=True)
    assert content(tmp_path / "parts" / "checkpoints" / "last") == content(whole.folder / "checkpoints" / "last")


def test_the_mask_head_alone_is_trained_on_a_finished_detector(
    together: tuple[Path, list[Event]], drawn: Path, tmp_path: Path
) -> None:
    boxes = detrkit.train(drawn, out=tmp_path / "boxes", **tiny(epochs=1))
    run, events = train(
        drawn,
        tmp_path / "masks",
        init=str(boxes.folder),
        model="",
        architecture={},
        backbone_weights="",
        frozen_detector=True,
        mask_attention="peak",
        mask_box=True,
        epochs=1,
    )
    started = next(event for event in events if isinstance(event, Started))
    assert any("mask head alone" in note for note in started.notes)
    assert any("begins anew: the model to start from has none" in note for note in started.notes)
    before, after = load_model(boxes.folder / "checkpoints" / "last").model, open_model(run.folder)
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert after.segmenter is not None
    assert (after.segmenter.mask_head.attention, after.segmenter.mask_head.box) == ("peak", True)


def test_a_mask_head_is_kept_or_said_to_begin_anew(
    together: tuple[Path, list[Event]], drawn: Path, tmp_path: Path
) -> None:
    start = {"init": str(together[0]), "model": "", "architecture": {}, "backbone_weights": "", "epochs": 1}
    _, events = train(drawn, tmp_path / "kept", **start, lr=0.0, backbone_lr=0.0)
    assert any("mask head there is kept" in note for note in events[0].notes)
    before, after = open_model(together[0]).segmenter, open_model(tmp_path / "kept").segmenter
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    _, events = train(drawn, tmp_path / "anew", **start, mask_attention="per-head")
    assert any("--mask-attention joint" in note for note in events[0].notes)


def test_what_cannot_be_trained_is_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"frozen detector has to be trained already.*--init RUN"):
        train(drawn, tmp_path / "a", frozen_detector=True)
    with pytest.raises(UsageError, match=r"task of their own.*'one-shot'"):
        detrkit.train(drawn, out=tmp_path / "b", masks=True, task="one-shot")
    plain = write_coco(tmp_path / "plain", {"train": [1, 2], "val": [1]})
    for file in (plain / "annotations").iterdir():
        document = json.loads(file.read_text())
        for one in document["annotations"]:
            del one["segmentation"]
        file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="mask"):
        train(plain, tmp_path / "c")


def test_masks_and_boxes_are_divided_by_the_boxes_of_a_step(drawn: Path) -> None:
    session = prepare_segmentation(revise(SegmentationRecipe(), tiny(architecture={"dropout": "0.0"})), drawn, World())
    (loaded,) = session.batches(EpochBatches(session.count, 2, 0, total_steps=1))
    session.model.train()
    boxes = session.counts(loaded.batch)
    assert boxes == (sum(len(target.boxes) for target in loaded.batch.targets),)
    plain = session.losses(session.model, loaded.batch, (float(boxes[0]),))
    spread = session.losses(session.model, loaded.batch, (2.0 * boxes[0],))
    assert plain.names == ("class", "l1", "giou", "mask", "dice")
    torch.testing.assert_close(spread.values[1:], plain.values[1:] / 2)


def test_a_damaged_mask_head_is_named(together: tuple[Path, list[Event]], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(together[0] / "model", broken)
    file = broken / "mask_head.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"mask_head\.safetensors"):
        detrkit.load(broken)
    shutil.copy(together[0] / "model" / "mask_head.safetensors", file)
    config = json.loads((broken / "config.json").read_text())
    config["about"]["segmentation"]["attention"] = "sideways"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mask head cannot be understood.*sideways"):
        detrkit.load(broken)


def test_true_masks_as_answers_are_perfect(drawn: Path) -> None:
    annotations = formats.read(drawn, "val", masks=True)["val"]
    detections = [
        detrkit.Detections(
            annotations.boxes[annotations.rows(index)].astype(np.float32),
            np.ones(annotations.offsets[index + 1] - annotations.offsets[index], np.float32),
            annotations.labels[annotations.rows(index)],
            annotations.categories,
            tuple(annotations.image_sizes[index].tolist()),
            segments=RunLengths.joined([annotations.masks.encoded(annotations.rows(index))]),
        )
        for index in range(len(annotations))
    ]
    figures = dict(detrkit.evaluation.figures(annotations, detections))
    assert figures["mask_AP"] == pytest.approx(1.0)


def test_answers_come_in_the_frame_of_the_annotations(
    together: tuple[Path, list[Event]], drawn: Path, tmp_path: Path
) -> None:
    halved = tmp_path / "halved"
    shutil.copytree(drawn, halved)
    for file in (halved / "val").glob("*.png"):
        with Image.open(file) as image:
            image.resize((image.width // 2, image.height // 2)).save(file)
    annotations = formats.read(halved, "val", masks=True)["val"]
    detector = detrkit.load(together[0])
    figures = dict(detrkit.evaluation.figures(annotations, (found := detect(detector, annotations))))
    assert "mask_AP" in figures
    for index, (one, cut) in enumerate(zip(found, segment(detector, annotations), strict=True)):
        size = tuple(annotations.image_sizes[index].tolist())
        assert one.image_size == cut.image_size == size
        assert one.segments is not None
        assert (one.segments.sizes == size).all()
