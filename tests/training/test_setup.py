"""Which images train, which validate, and in which arithmetic."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training.drawing import tiny_recipe, write_coco

from detrkit.arithmetic import choose_dtype
from detrkit.data import formats
from detrkit.errors import DataError
from detrkit.masks import RunLengths
from detrkit.training.distributed import World, processors
from detrkit.training.recipe import DataOptions
from detrkit.training.setup import count_workers, prepare
from detrkit.training.splits import open_splits


def names(options: DataOptions, data: Path, seed: int = 0) -> tuple[set[str], set[str], list[str]]:
    notes: list[str] = []
    train, val = open_splits(data, options, seed, notes)
    return {str(train.path(i)) for i in range(len(train))}, {str(val.path(i)) for i in range(len(val))}, notes


@pytest.mark.parametrize("spelling", ["val", "valid", "validation"])
def test_the_split_of_the_data_validates(drawn: Path, spelling: str) -> None:
    train, val, notes = names(DataOptions(val_split=spelling), drawn)
    assert (len(train), len(val)) == (10, 3)
    assert any("the data's split 'val'" in note for note in notes)


def test_a_share_of_the_training_split_leaves_the_other_alone(drawn: Path) -> None:
    train, val, notes = names(DataOptions(val_fraction=0.3), drawn)
    assert not train & val
    assert len(train | val) == 10
    assert all("/train/" in name for name in val)
    assert any("30% of the split 'train', chosen by seed 0" in note for note in notes)
    assert names(DataOptions(val_fraction=0.3), drawn)[:2] == (train, val)
    assert any(names(DataOptions(val_fraction=0.3), drawn, seed)[1] != val for seed in range(1, 5))


def test_a_limit_is_said(drawn: Path) -> None:
    train, val, notes = names(DataOptions(limit=4), drawn)
    assert (len(train), len(val)) == (4, 3)
    assert "Limited to the first 4 training and 3 validation images" in notes


def test_the_training_split_can_validate_itself(drawn: Path) -> None:
    train, val, notes = names(DataOptions(val_split="train"), drawn)
    assert train == val
    assert any("learnt by heart" in note for note in notes)


def test_masks_and_another_format_are_read_where_they_are_asked_for(drawn: Path, tmp_path: Path) -> None:
    formats.write(formats.read(drawn), tmp_path / "boxes", "coco")
    with pytest.raises(DataError, match="No object has a mask"):
        open_splits(tmp_path / "boxes", DataOptions(), 0, [], masks=True)
    masked = {}
    for name, part in formats.read(drawn).items():
        runs = RunLengths.unknown(np.zeros((len(part.boxes), 2), np.int64))
        box = RunLengths.encode(np.ones((1, *part.image_sizes[0]), bool))
        masked[name] = replace(part, masks=RunLengths.joined([box, runs[1:]]))
    formats.write(masked, tmp_path / "data", "coco")
    train, val = open_splits(tmp_path / "data", DataOptions(), 0, [], masks=True)
    for part in (train, val):
        assert part.masks is not None
        assert part.masks.known.sum() == 1
    assert open_splits(tmp_path / "data", DataOptions(), 0, [])[0].masks is None
    formats.write(masked, tmp_path / "panoptic", "coco_panoptic", copy_images=False)
    for file in (tmp_path / "panoptic" / "annotations").iterdir():
        file.rename(tmp_path / "data" / "annotations" / file.name)
    train, val = open_splits(tmp_path / "data", DataOptions(annotations="coco_panoptic"), 0, [], masks=True)
    assert (len(train.boxes), len(val.boxes)) == (1, 1)
    assert "coco_panoptic" in train.source


def test_more_objects_than_queries_are_noted_and_crowds_are_no_objects(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [9, 2], "val": [1]})
    file = data / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    told = {}
    for crowds in (0, 1):  # of an image's nine boxes, for which the model has eight queries
        document["annotations"][0]["iscrowd"] = crowds
        file.write_text(json.dumps(document))
        told[crowds] = [
            note for note in prepare(tiny_recipe(), data, World()).notes if note.startswith("An image holds")
        ]
    assert told == {
        0: ["An image holds 9 boxes but the model has 8 queries and cannot find them all: raise num_queries"],
        1: [],
    }


def test_a_mistyped_split_is_an_error(drawn: Path) -> None:
    with pytest.raises(DataError, match="no such split to validate on; got 'vla'; expected train, val"):
        names(DataOptions(val_split="vla"), drawn)
    with pytest.raises(DataError, match="trian"):
        names(DataOptions(train_split="trian"), drawn)


def test_a_split_beside_a_share_to_validate_on_is_said_to_be_passed_over(drawn: Path) -> None:
    said = "The split 'vla' is not looked at: a share to validate on is set (val_fraction)"
    assert said in names(DataOptions(val_split="vla", val_fraction=0.3), drawn)[2]
    assert not any("looked at" in note for note in names(DataOptions(val_fraction=0.3), drawn)[2])


def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("fp16", cpu) == torch.float16


def test_workers_are_as_many_as_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6}, raising=False)
    assert processors() == count_workers(-1) == 3
    assert count_workers(0) == 0
    assert count_workers(12) == 12
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors() == 64
    assert count_workers(-1) == 8


def test_validation_images_that_cannot_be_read_are_refused_before_the_first_step(drawn: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    files = sorted((data / "val").glob("*.png"))[:2]
    files[0].write_bytes(b"")
    Image.new("RGB", (8, 8)).save(files[1], "GIF")
    with pytest.raises(DataError, match="2 of the 3 validation images cannot be read") as caught:
        prepare(tiny_recipe(), data, World())
    assert f"{files[0]}: The image file is empty (0 bytes). Copy or download it again.; " in str(caught.value)
    assert f"{files[1]}: GIF images are not read. Convert it to JPEG or PNG." in str(caught.value)
    assert "detrkit doctor DATA --fix COPY" in str(caught.value)


def test_a_few_validation_images_are_told_to_say_little(drawn: Path) -> None:
    notes = prepare(tiny_recipe(), drawn, World()).notes
    assert sum(note.startswith("Only 3 validation images: figures") for note in notes) == 1


def test_annotations_that_were_not_read_are_named_where_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.2")
    with pytest.raises(DataError, match=r"nothing to learn from.*0\.txt was not read: export.* COCO.*, or arrange"):
        prepare(tiny_recipe(), tmp_path, World())


def test_what_became_of_the_boxes_is_said_where_none_is_left(drawn: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    for file in (data / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for one in content["annotations"]:
            one["bbox"][2] = 0
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"nothing to learn from.*of 1 images and no box.*emptied-image"):
        prepare(tiny_recipe(), data, World())
