"""`detrkit inspect` and `detrkit rewrite`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from official_keys import official_segmentation_state, official_state

from detrkit import convert, models
from detrkit.data import formats
from detrkit.masks import RunLengths
from detrkit.segmentation.model import Segmenter


def test_a_run(detrkit, trained):
    said = detrkit("inspect", trained)
    assert said.code == 0
    for part in (f"{trained}: a run", "finished, step 2 of 2", "detr-nano, variant detr", "2: nut, bolt", "AP "):
        assert part in said.out
    assert "resnet-nano" in said.out
    document = detrkit("inspect", trained, "--json").document
    assert document["kind"] == "run"
    assert document["data"]["splits"]["train"]["images"] == 4
    parameters = document["model"]["parameters"]
    assert parameters.pop("all") == sum(parameters.values())
    assert document["model"]["config"]["dim"] == 32
    assert document["model"]["categories"] == [[1, "nut"], [2, "bolt"]]


def test_a_model_and_a_checkpoint(detrkit, trained):
    for folder in (trained / "model", trained / "checkpoints" / "last"):
        document = detrkit("inspect", folder, "--json").document
        assert (document["kind"], document["model"]["variant"]) == ("model", "detr")


def test_a_model_has_no_annotations(detrkit, trained, foreign):
    for path in (trained, trained / "model", foreign / "official.pth"):
        said = detrkit("inspect", path, "--annotations", "coco_panoptic")
        assert (said.code, said.out) == (2, "")
        assert "--annotations: A model has no annotations; got coco_panoptic" in said.err


def test_a_run_without_a_checkpoint(detrkit, trained, tmp_path):
    for name in ("recipe.toml", "status.json", "data.json"):
        shutil.copy(trained / name, tmp_path)
    said = detrkit("inspect", tmp_path)
    assert said.code == 0
    assert "none yet" in said.out


@pytest.fixture
def foreign(narrow, tmp_path):
    """An official checkpoint with a mask head, and a Hugging Face folder."""
    sizes = {"dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 8, "num_queries": 5}
    segmenter = Segmenter(models.build("detr-r18", num_classes=2, **sizes))
    state = {**official_segmentation_state(segmenter), "detr.backbone.0.body.bn1.num_batches_tracked": torch.tensor(1)}
    torch.save({"model": state}, tmp_path / "official.pth")
    model = models.build("conditional-detr-r50", backbone="resnet18", num_classes=2, **sizes)
    categories = convert.read(official_state(model), heads=2).categories
    assert categories == ()
    convert.to_huggingface(model, tmp_path / "folder")
    return tmp_path


def test_weights_of_others(detrkit, foreign):
    said = detrkit("inspect", foreign / "official.pth")
    assert said.code == 0
    for part in (
        "official.pth: weights of others",
        "Origin        official DETR, with a mask head",
        "resnet18, 1 encoder and 1 decoder layers, width 16, 2 heads, 5 queries, 2 classes",
        "Masks         a mask head, its attention maps normalised joint",
        "convert with --dilated or --mask-attention if it is otherwise",
        "1 left out",
        "  left out: detr.backbone.0.body.bn1.num_batches_tracked: a counter",
    ):
        assert part in said.out
    document = detrkit("inspect", foreign / "folder", "--json").document
    assert (document["kind"], document["variant"]) == ("weights", "conditional_detr")
    assert document["origin"] == "Hugging Face ConditionalDetrForObjectDetection"
    assert (document["config"]["heads"], document["tensors"]["left out"]) == (2, 0)
    assert {path.name for path in foreign.iterdir()} == {"official.pth", "folder"}


def test_weights_that_are_no_detectors(detrkit, tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    for name in ("other.pt", "damaged.pth"):
        said = detrkit("inspect", tmp_path / name)
        assert (said.code, said.out) == (4, "")
        assert name in said.err


def test_a_data_set(detrkit, data):
    said = detrkit("inspect", data)
    assert said.code == 0
    assert "train: 4 images, 4 boxes, 2 classes, 0 images without boxes" in said.out
    assert "heights 64 to 64, widths 80 to 80 pixels" in said.out
    assert said.out.index("train:") < said.out.index("val:")
    document = detrkit("inspect", data, "--json").document
    assert document["splits"]["val"]["boxes_of"] == {"nut": 1, "bolt": 1}
    assert document["splits"]["train"]["format"] == "coco"


def test_the_problems_of_a_data_set(detrkit, data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "val" / "1.png").unlink()
    said = detrkit("inspect", root)
    assert "1 × missing-image (dropped)" in said.out
    assert detrkit("inspect", root, "--json").document["splits"]["val"]["problems"] == {"missing-image": 1}


@pytest.mark.parametrize(("name", "code"), [("none", 3), ("empty", 3), ("damaged", 4)])
def test_what_cannot_be_inspected(detrkit, tmp_path, name, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    said = detrkit("inspect", tmp_path / name)
    assert (said.code, said.out) == (code, "")
    assert name in said.err


def test_a_damaged_file_of_a_run(detrkit, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "status.json").write_text("{")
    said = detrkit("inspect", run)
    assert said.code == 3
    assert "status.json" in said.err


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_rewriting_keeps_images_and_boxes(detrkit, data, tmp_path, format):
    out = tmp_path / "out"
    said = detrkit("rewrite", data, out, "--format", format)
    assert said.code == 0
    assert f"Written as {format} to {out}" in said.out
    before, after = formats.read(data), formats.read(out)
    assert {source.format for source in formats.recognise(out).values()} == {format}
    for split in ("train", "val"):
        assert len(after[split]) == len(before[split])
        assert after[split].boxes.shape == before[split].boxes.shape
        assert abs(after[split].boxes - before[split].boxes).max() < 1e-6


def test_rewriting_as_a_document_and_without_images(detrkit, data, tmp_path):
    out = tmp_path / "out"
    document = detrkit("rewrite", data, out, "--format", "coco", "--images", "none", "--json").document
    assert document["splits"] == {"train": {"images": 4, "boxes": 4}, "val": {"images": 2, "boxes": 2}}
    assert not list(out.rglob("*.png"))
    assert json.dumps(document)


@pytest.fixture
def masked(data, tmp_path):
    """The data set with masks, of which one is not known, once as objects and once as segments of things and stuff."""
    splits = {}
    for name, part in formats.read(data).items():
        sizes = np.repeat(part.image_sizes, np.diff(part.offsets), 0).astype(np.int64)
        masks = np.zeros((len(part.boxes), 64, 80), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, part.boxes.astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        runs = RunLengths.joined([RunLengths.unknown(sizes[:1]), RunLengths.encode(masks[1:])])
        table = (part.categories[0]._replace(is_thing=False), part.categories[1])
        splits[name] = replace(part, masks=runs, categories=table)
    formats.write(splits, tmp_path / "masked", "coco")
    formats.write(splits, tmp_path / "panoptic", "coco_panoptic", copy_images=False)
    for file in (tmp_path / "panoptic" / "annotations").iterdir():
        file.rename(tmp_path / "masked" / "annotations" / file.name)
    return tmp_path / "masked"


def test_masks_things_and_stuff(detrkit, data, masked):
    said = detrkit("inspect", masked)
    assert "format coco\n" in said.out
    assert "  masks of 3 of 4 boxes\n  things: 2 boxes of 1 class\n  stuff: 2 boxes of 1 class\n" in said.out
    assert "1 × missing-mask (noted)" in said.out
    said = detrkit("inspect", masked, "--annotations", "coco_panoptic")
    assert "format coco_panoptic\n" in said.out
    assert "  masks of 3 of 3 boxes\n" in said.out
    told = detrkit("inspect", masked, "--json").document["splits"]["val"]
    assert (told["masks"], told["things"], told["stuff"]) == (
        1,
        {"classes": 1, "boxes": 1},
        {"classes": 1, "boxes": 1},
    )
    plain = detrkit("inspect", data).out
    assert "  masks of 4 of 4 boxes\n" in plain
    assert "stuff" not in plain
    assert detrkit("inspect", masked, "--annotations", "yolo").code == 3


@pytest.mark.parametrize("format", ["coco", "coco_panoptic"])
def test_rewriting_keeps_masks(detrkit, masked, tmp_path, format):
    said = detrkit("rewrite", masked, tmp_path / "out", "--format", format, "--annotations", "coco_panoptic")
    assert said.code == 0
    before = formats.read(masked, annotations="coco_panoptic", masks=True)
    after = formats.read(tmp_path / "out", masks=True)
    assert {source.format for source in formats.recognise(tmp_path / "out").values()} == {format}
    for split, part in before.items():
        assert after[split].categories == part.categories
        for index in range(len(part)):
            runs = [each.masks.encoded(each.rows(index)).to_coco() for each in (part, after[split])]
            assert runs[0] == runs[1]


def test_what_cannot_be_rewritten(detrkit, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    cases = [
        ((data, tmp_path / "out", "--format", "yollo"), 2, "coco, coco_panoptic, folder, instance_masks, voc, yolo"),
        ((data, tmp_path / "full", "--format", "coco"), 2, "full"),
        ((tmp_path / "none", tmp_path / "out", "--format", "coco"), 3, "none"),
        ((data, data / "out", "--format", "coco"), 2, "inside the data set"),
    ]
    for arguments, code, part in cases:
        said = detrkit("rewrite", *arguments)
        assert (said.code, said.out) == (code, "")
        assert part in said.err
    assert not (tmp_path / "out").exists()
    assert not (data / "out").exists()


def test_the_parts_of_a_model_folder(detrkit, trained, tmp_path):
    for name in ("model.safetensors", "config.json"):
        said = detrkit("inspect", trained / "model" / name)
        assert (said.code, said.err) == (0, "")
        assert f"{trained / 'model'}: a model" in said.out


def test_what_was_assumed(detrkit, foreign):
    said = detrkit("inspect", foreign / "official.pth")
    assert "Assumed       dilated False, mask_attention joint: the tensors do not show them; convert with" in said.out
    document = detrkit("inspect", foreign / "official.pth", "--json").document
    assert (document["assumed"], document["mask_attention"]) == (["dilated", "mask_attention"], "joint")
    assert "Assumed" not in detrkit("inspect", foreign / "folder").out
    (foreign / "official.pth").rename(foreign / "official-dc5.pth")
    assert "Assumed       dilated False" in detrkit("inspect", foreign / "official-dc5.pth").out


def test_a_folder_with_one_weights_file(detrkit, foreign, data, tmp_path):
    lone = tmp_path / "lone"
    lone.mkdir()
    (foreign / "official.pth").rename(lone / "weights.pth")
    said = detrkit("inspect", lone)
    assert (said.code, said.err) == (0, "")
    assert f"{lone}: weights of others" in said.out
    both = tmp_path / "both"
    shutil.copytree(data, both)
    shutil.copy(lone / "weights.pth", both)
    assert "a data set, format coco" in detrkit("inspect", both).out


def test_names_on_the_hub(detrkit, foreign, trained, monkeypatch):
    places = {"me/ours": trained / "model", "me/theirs@main": foreign / "folder"}
    monkeypatch.setattr("detrkit.hub.fetch", places.__getitem__)
    monkeypatch.chdir(foreign)
    said = detrkit("inspect", "me/ours")
    assert (said.code, said.err) == (0, "")
    assert "me/ours: a model\n" in said.out
    said = detrkit("inspect", "me/theirs@main")
    assert (said.code, said.err) == (0, "")
    assert "me/theirs@main: weights of others" in said.out
    assert "Hugging Face ConditionalDetrForObjectDetection, hub revision folder" in said.out
    said = detrkit("inspect", "./me/ours")  # a path, whatever the hub has
    assert said.code == 3
    assert "no such file or folder" in said.err
