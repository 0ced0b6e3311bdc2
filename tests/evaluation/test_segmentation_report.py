"""The files and the page of an evaluation with masks and segments, and the same as text."""

from __future__ import annotations

import csv
import io
import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of
from PIL import Image

from detrkit.cli._figures import figures_document, figures_text
from detrkit.evaluation import evaluate, score_images, write_report
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Category

TABLE = (Category(0, "cat"), Category(1, "dog"), Category(2, "sky", is_thing=False))


@pytest.fixture
def case(tmp_path):
    """A cat and the sky; the cat is found with three quarters of its mask, a dog is seen in the sky."""
    annotations = annotations_of([[[20, 20, 60, 60], [0, 0, 100, 20]]], [[0, 2]], classes=3, root=tmp_path)
    ids = np.zeros((100, 100), np.int32)
    ids[20:60, 20:60], ids[:20] = 1, 2
    annotations = replace(annotations, categories=TABLE, masks=RunLengths.encode(np.stack([ids == 1, ids == 2])))
    Image.new("RGB", (100, 100), (200, 180, 170)).save(tmp_path / "0.png")
    rows = [[([20, 20, 60, 60], 0, 0.9), ([0, 0, 100, 20], 2, 0.8), ([70, 0, 90, 20], 1, 0.7)]]
    found = ids.copy()
    found[20:60, 50:60] = 0
    found[:20, 70:90] = 3
    segments = RunLengths.encode(np.stack([found == 1, ids == 2, found == 3]))
    (detections,) = detections_of(annotations, rows)
    maps = [PanopticMap(found, np.array([0, 2, 1]), np.ones(3, np.float32), TABLE, (100, 100))]
    return annotations, [replace(detections, segments=segments)], maps


def test_stuff_is_neither_right_nor_wrong_in_an_image(case):
    annotations, detections, _ = case
    (score,) = score_images(annotations, detections, 0.5)
    assert score.right == 1
    assert score.wrong.tolist() == [False, False, True]
    assert score.missed.tolist() == [False]


def test_the_page_shows_masks_and_segments(case, tmp_path):
    annotations, detections, maps = case
    metrics = evaluate(annotations, detections, panoptic=maps)
    files = {
        path.name: path for path in write_report(metrics, annotations, detections, tmp_path / "out", panoptic=maps)
    }
    html = files["report.html"].read_text(encoding="utf-8")
    for label, value in (
        ("AP of masks", "0.600"),
        ("PQ", "0.517"),
        ("PQ of things", "0.375"),
        ("PQ of stuff", "0.800"),
    ):
        assert f"<dt>{label}</dt><dd>{value}</dd>" in html
    assert '<th scope="row">cat</th><td>1</td><td>1.000</td>' in html
    assert '<th scope="row">sky</th><td>stuff</td><td>1</td>' in html
    assert html.count('<th scope="row">sky</th>') == 1  # not among the classes that are detected
    assert "of masks: found, with an overlap (IoU) of at least 0.50" in html
    assert "SQ of things alone" in html
    jpeg = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    with Image.open(io.BytesIO(b64decode(jpeg.group(1)))) as picture:
        assert picture.height > 0.9 * picture.width  # segments stand below the boxes
    with files["per_class.csv"].open(newline="") as file:
        cat, _, sky = csv.DictReader(file)
    assert float(cat["mask_AP"]) == pytest.approx(0.6)
    assert (sky["boxes"], sky["AP"], sky["segments"]) == ("0", "", "1")
    assert float(sky["PQ"]) == pytest.approx(0.8)


def test_nothing_of_it_where_there_is_nothing(case, tmp_path):
    annotations, detections, _ = case
    boxes = [replace(one, segments=None) for one in detections]
    metrics = evaluate(annotations, boxes)
    files = write_report(metrics, annotations, boxes, tmp_path / "out")
    html = files[-1].read_text(encoding="utf-8")
    assert "of masks" not in html
    assert ">PQ" not in html
    assert files[1].read_text().splitlines()[0] == "class,boxes,AP,AP50,threshold,F1,precision,recall"
    text = figures_text(metrics)
    assert "mask" not in text
    assert "PQ" not in text
    assert "panoptic" not in figures_document(metrics)


def test_the_same_as_text(case):
    annotations, detections, maps = case
    metrics = evaluate(annotations, detections, panoptic=maps, voc=True)
    lines = [line.split() for line in figures_text(metrics).splitlines()]
    assert ["figure", "boxes", "masks", "meaning"] in lines
    assert next(line for line in lines if line[:1] == ["AP"])[:3] == ["AP", "1.000", "0.600"]
    assert next(line for line in lines if line[:1] == ["VOC07"])[1:3] == ["1.000", "Pascal"]
    assert ["class", "boxes", "AP", "AP50", "mask", "AP", "mask", "AP50"] in [line[:8] for line in lines]
    assert ["cat", "1", "1.000", "1.000", "0.600", "1.000"] in [line[:6] for line in lines]
    assert ["segments", "PQ", "SQ", "RQ"] in lines
    assert ["things", "0.375", "0.375", "0.500"] in lines
    assert ["stuff", "0.800", "0.800", "1.000"] in lines
    assert [line for line in lines if line[:1] == ["sky"]] == [["sky", "stuff", "1", "0.800", "0.800", "1.000"]]
    assert figures_document(metrics)["panoptic"][2]["pq"] == pytest.approx(0.8)
