"""`detrkit evaluate` of a model that finds by example, and what such a model refuses to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import detrkit as package
from detrkit.errors import ModelError, UsageError
from detrkit.evaluation.calibration import reliability
from detrkit.one_shot.protocol import judge
from detrkit.training.run import evaluate_in_detail

SMALL: dict[str, Any] = {
    "model": "detr-nano",
    "architecture": {"stride": "16", "dim": "32", "heads": "2", "encoder_layers": "1", "decoder_layers": "1"}
    | {"feedforward": "32", "num_queries": "5", "backbone": "resnet-nano"},
    "image_size": 64,
    "longest": 96,
    "backbone_weights": "random",
    "epochs": 1,
    "batch_size": 2,
    "workers": 0,
    "samples": 0,
    "look_width": 8,
    "cells": 2,
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of images with a red, a green, or both squares each; a blue one is in a single image."""
    root, rng = tmp_path_factory.mktemp("squares") / "data", np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(("red", "green", "blue"), 1)]
    for split, classes in {"train": [[0], [1], [0, 1], [0], [1]], "val": [[0, 1], [0], [1], [2], []]}.items():
        (root / split).mkdir()
        images, boxes = [], []
        for index, labels in enumerate(classes, 1):
            pixels = rng.integers(90, 140, (64, 80, 3)).astype(np.uint8)
            for place, label in enumerate(labels):
                x, y = 4 + 38 * place, int(rng.integers(0, 34))
                pixels[y : y + 30, x : x + 30] = [230 * (label == channel) for channel in range(3)]
                box = {"id": len(boxes) + 1, "image_id": index, "category_id": label + 1, "area": 900, "iscrowd": 0}
                boxes.append({**box, "bbox": [x, y, 30, 30]})
            Image.fromarray(pixels).save(root / split / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 80})
        document = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def run(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that never saw blue; tests only read it."""
    out = tmp_path_factory.mktemp("one-shot") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detrkit.training.recipe.FOLDER", out.parent / "no recipes")
        patch.setattr("detrkit.training.log.plot_history", lambda lines, out: out)
        patch.setattr("detrkit.training.episodes.plot_reliability", lambda curves, file: file)
        package.train(squares, out=out, task="one-shot", unseen="blue", **SMALL)
    return out


def test_figures_of_seen_and_unseen_classes(detrkit, squares, run):
    said = detrkit("evaluate", run, squares, "--draws", "2")
    assert (said.code, said.err) == (0, "")
    assert f"{run} on 5 images, by example: 5 questions in 2 draws of 1 exemplar (val)" in said.out
    for part in ("AP50_seen", "AP50_unseen", "ratio", "ece", "threshold_spread", "±: standard deviation"):
        assert part in said.out
    lines = {line.split()[0]: line.split() for line in said.out.splitlines() if line.strip()}
    assert lines["red"][1:3] == ["seen", "2"]
    assert lines["blue"][1:3] == ["unseen", "1"]
    assert "not asked for want of an exemplar, all draws together, and counted as missed: blue 2" in said.out
    document = detrkit("evaluate", run, squares, "--draws", "2", "--json").document
    assert (document["draws"], document["shots"], document["questions"]) == (2, 1, 5)
    assert document["left_out"] == {"blue": 2}
    assert document["figures"]["AP50_unseen"] == 0
    figures = package.evaluate(run, squares, draws=2)
    for name, value in document["figures"].items():
        assert figures[name] == pytest.approx(np.nan if value is None else value, nan_ok=True)


def test_honesty_is_that_of_the_scores_as_they_are_given(squares, run):
    found = evaluate_in_detail(run, squares, split="val", draws=2, shots=2)
    judged = judge(found.evaluation)
    assert found.figures["ece"] == pytest.approx(reliability(judged.scores, judged.right).ece)
    detector = package.load(run, device="cpu")
    assert found.is_calibrated == ("calibration" in detector.about["one_shot"])
    assert found.shots == 2


def test_honesty_counts_what_is_found_of_absent_classes(squares, run):
    found = evaluate_in_detail(run, squares, split="val", draws=1).evaluation
    images, scores = found.absent
    assert set(images.tolist()) == {1, 2, 3, 4}  # the first image holds both classes that were seen
    judged = judge(found)
    assert np.array_equal(judged.scores[-len(scores) :], scores)
    assert not judged.right[-len(scores) :].any()


def test_classes_that_the_data_alone_know_are_unseen(squares, run):
    detector = package.load(run, device="cpu")
    detector.about["one_shot"]["seen"] = ["green", "elsewhere"]
    per_class = evaluate_in_detail(detector, squares, split="val", draws=1).evaluation.metrics.per_class
    assert {one.name: one.seen for one in per_class} == {"red": False, "green": True, "blue": False}
    del detector.about["one_shot"]["seen"]
    assert np.isnan(package.evaluate(detector, squares, draws=1)["AP50_seen"])


def test_a_report(detrkit, squares, run, tmp_path):
    out = tmp_path / "report"
    document = detrkit("evaluate", run, squares, "--draws", "2", "--report", out, "--json").document
    assert document["report"] == str(out / "report.html")
    assert {file.name for file in out.iterdir()} == {"metrics.json", "reliability.png", "samples.jpg", "report.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["figures"] == document["figures"]
    page = (out / "report.html").read_text()
    for part in ("<html", "unseen", "blue (2)", "AP50, seen classes", "data:image/png", "data:image/jpeg"):
        assert part in page
    with Image.open(out / "samples.jpg") as picture:
        assert picture.width > 100


def test_a_report_without_matplotlib_says_so(squares, run, tmp_path, monkeypatch):
    from detrkit.errors import MissingExtraError
    from detrkit.training.by_example import write_report

    def missing(curves, file):
        raise MissingExtraError("matplotlib", "plot", "A plot")

    monkeypatch.setattr("detrkit.training.by_example.plot_reliability", missing)
    found = evaluate_in_detail(run, squares, split="val", draws=1)
    files = write_report(found, tmp_path, title="<title>")
    assert [file.name for file in files] == ["metrics.json", "samples.jpg", "report.html"]
    page = (tmp_path / "report.html").read_text()
    assert "matplotlib is not installed" in page
    assert "&lt;title&gt;" in page
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="report cannot be written"):
        write_report(found, tmp_path / "taken" / "report", title="")


def test_a_model_that_was_never_calibrated_says_so(detrkit, squares, run, tmp_path):
    bare = tmp_path / "model"
    bare.mkdir()
    for file in (run / "model").iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "config.json").read_text())
    config["about"]["one_shot"].pop("calibration", None)
    (bare / "config.json").write_text(json.dumps(config))
    said = detrkit("evaluate", bare, squares, "--draws", "1", "--report", tmp_path / "report")
    assert "scores say how alike a place is, and are no probabilities" in said.out
    assert "no probabilities" in (tmp_path / "report" / "report.html").read_text()


def test_what_cannot_be_asked_of_it(detrkit, squares, run, tmp_path):
    cases = [
        (("evaluate", run, squares, "--results", tmp_path / "x.json"), 2, "no COCO results"),
        (("evaluate", run, squares, "--ensemble"), 2, "only the last decoder layer"),
        (("evaluate", run, squares, "--draws", "0"), 2, "Bad value for draws"),
        (("evaluate", run, squares, "--shots", "0"), 2, "Bad value for shots"),
        (("predict", run, squares / "val", "--out", tmp_path / "found"), 4, "detrkit find"),
        (("push", run, "somebody/model", "--dry-run", tmp_path / "card"), 4, "detrkit find"),
    ]
    for arguments, code, part in cases:
        said = detrkit(*arguments)
        assert (said.code, said.out) == (code, ""), arguments
        assert part in said.err
        assert str(run) in said.err or arguments[0] == "evaluate"
    assert not (tmp_path / "found").exists()
    with pytest.raises(ModelError, match=r"Detector\.find"):
        package.load(run, device="cpu").predict(squares / "val" / "1.png")


def test_a_detector_draws_no_exemplars(detrkit, data, trained, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    for model in (trained, tmp_path / "results.json"):
        for flags in (("--draws", "3"), ("--shots", "2")):
            said = detrkit("evaluate", model, data, *flags)
            assert (said.code, said.out) == (2, "")
            assert "trained to find by example" in said.err
            assert "--task one-shot" in said.err
    for field in ({"draws": 3}, {"shots": 2}):
        with pytest.raises(UsageError, match=f"^{next(iter(field))}: Exemplars are drawn only"):
            package.evaluate(trained, data, **field)


def test_the_flags_have_the_defaults_of_the_protocol():
    from detrkit.cli.evaluate import Options
    from detrkit.one_shot.protocol import DRAWS
    from detrkit.training.by_example import SHOTS

    options = Options(model="", data="")
    assert (options.draws, options.shots) == (DRAWS, SHOTS)
