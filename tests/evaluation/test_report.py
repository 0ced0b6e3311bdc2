import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of
from PIL import Image

from detrkit.errors import DataError, UsageError
from detrkit.evaluation import evaluate, read_results, write_report, write_results


@pytest.fixture
def case(tmp_path):
    boxes = [[[10, 10, 40, 40]], [[5, 5, 30, 60], [50, 50, 90, 90]], [[0, 0, 20, 20]]]
    annotations = annotations_of(boxes, [[0], [1, 0], [1]], root=tmp_path)
    for name in list(annotations.file_names)[:2]:
        Image.new("RGB", (100, 100), (200, 180, 170)).save(tmp_path / name)
    rows = [[([10, 10, 40, 40], 0, 0.9)], [([5, 5, 30, 60], 1, 0.8), ([60, 5, 90, 30], 0, 0.7)], []]
    return annotations, detections_of(annotations, rows)


class _Balance(HTMLParser):
    """Counts what is open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            assert dict(attributes)["alt"]
            assert dict(attributes)["src"].startswith("data:image/")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_writes_everything(case, tmp_path):
    annotations, detections = case
    metrics = evaluate(annotations, detections, voc=True)
    files = write_report(metrics, annotations, detections, tmp_path / "new" / "folder", title="Cells & <friends>")
    assert [path.name for path in files] == [
        "metrics.json",
        "per_class.csv",
        "pr_curves.png",
        "confusion.png",
        "report.html",
    ]
    assert json.loads(files[0].read_text())["figures"]["AP"] == pytest.approx(metrics.figures["AP"])
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["class 0", "class 1"]
    assert float(rows[0]["AP50"]) == pytest.approx(metrics.per_class[0].ap50, abs=1e-6)
    html = files[4].read_text(encoding="utf-8")
    parser = _Balance()
    parser.feed(html)
    assert parser.open == []
    assert "Cells &amp; &lt;friends&gt;" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "3 images with 4 objects of 2 classes" in html
    assert "2 of the 4 objects are found and rightly named" in html
    assert "There is no such image file" in html
    assert html.index("Worst images") < html.index("2.png") < html.index("Best images") < html.index("0.png")


def test_images_of_another_size_than_is_stated_are_shown(case, tmp_path):
    annotations, detections = case
    for name, size in zip(annotations.file_names, ((50, 50), (70, 90), (200, 200)), strict=True):
        Image.new("RGB", size, (200, 180, 170)).save(tmp_path / name)
    files = write_report(evaluate(annotations, detections), annotations, detections, tmp_path / "out")
    html = files[-1].read_text(encoding="utf-8")
    assert "cannot be shown" not in html
    assert html.count("data:image/jpeg") == 3


def test_report_without_matplotlib_says_so(case, tmp_path, monkeypatch):
    annotations, detections = case
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = write_report(evaluate(annotations, detections), annotations, detections, tmp_path / "out")
    assert [path.name for path in files] == ["metrics.json", "per_class.csv", "report.html"]
    html = files[-1].read_text(encoding="utf-8")
    assert "detrkit[plot]" in html
    assert "data:image/jpeg" in html


def test_report_of_other_annotations_is_refused(case, tmp_path):
    annotations, detections = case
    metrics = evaluate(annotations, detections)
    with pytest.raises(UsageError, match=r"3 images.*expected 2 images"):
        write_report(metrics, annotations.select([0, 1]), detections[:2], tmp_path)


def test_report_into_a_file_is_refused(case, tmp_path):
    annotations, detections = case
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(evaluate(annotations, detections), annotations, detections, tmp_path / "taken")


def test_results_are_not_written_over_annotations(case, tmp_path):
    annotations, detections = case
    for content in (
        '{"images": [], "annotations": []}',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]',
        "text",
    ):
        (tmp_path / "taken.json").write_text(content)
        with pytest.raises(UsageError, match=r"taken.json: The results would be written over something else"):
            write_results(tmp_path / "taken.json", annotations, detections)
        assert (tmp_path / "taken.json").read_text() == content


def test_results_files_come_back(case, tmp_path):
    annotations, detections = case
    write_results(tmp_path / "results.json", annotations, detections)
    again = read_results(tmp_path / "results.json", annotations)
    assert [len(one) for one in again] == [1, 2, 0]
    for one, other in zip(detections, again, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-5)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert again[1].image_size == (100, 100)
    expected = evaluate(annotations, detections).figures
    assert evaluate(annotations, again).figures == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "is no list.*got dict"),
        ('[{"image_id": 1}]', "entry 0: A detection lacks"),
        ('[{"image_id": 1, "category_id": 0, "bbox": [1, 2], "score": 1}]', "entry 0: A detection lacks"),
        ('[{"image_id": 77, "category_id": 0, "bbox": [1, 2, 3, 4], "score": 1}]', "no image of id 77"),
        ('[{"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 1}]', "no category of id 9"),
    ],
)
def test_broken_results_files_are_named(case, tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "results.json", case[0])


def test_a_missing_results_file_is_named(case, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_results(Path(tmp_path / "none.json"), case[0])
