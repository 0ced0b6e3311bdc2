"""`detrkit evaluate`: tables, files, results files, refusals."""

from __future__ import annotations

import json
import shutil

import pytest

import detrkit as package


@pytest.fixture
def results(data, tmp_path):
    """A COCO results file that is right about everything."""
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{**{key: one[key] for key in keys}, "score": 0.9} for one in truth]))
    return file


def test_tables_of_a_results_file(detrkit, data, results):
    said = detrkit("evaluate", results, data)
    assert said.code == 0
    assert f"{results} on 2 images with 2 boxes (val)" in said.out
    assert "AP      1.000  mean over IoU" in said.out
    assert "nut        1  1.000" in said.out
    assert "VOC07" in said.out
    assert not said.err


def test_a_trained_run_and_its_files(detrkit, data, trained, tmp_path):
    results, report = tmp_path / "found.json", tmp_path / "report"
    options = ("--split", "train", "--results", results, "--report", report, "--batch-size", "2")
    said = detrkit("evaluate", trained, data, *options, "--json")
    assert said.code == 0
    document = said.document
    assert (document["split"], document["images"], document["boxes"]) == ("train", 4, 4)
    assert [one["name"] for one in document["per_class"]] == ["nut", "bolt"]
    assert len(document["figures"]) == 14
    assert document["report"] == str(report / "report.html")
    assert "<html" in (report / "report.html").read_text()
    assert len(json.loads(results.read_text())) == 20
    again = detrkit("evaluate", results, data, "--split", "train", "--json").document
    assert again["figures"] == pytest.approx(document["figures"], nan_ok=True)


def test_the_answer_of_all_layers(detrkit, data, trained, tmp_path):
    files = [tmp_path / "last.json", tmp_path / "all.json"]
    for file, flags in zip(files, ((), ("--ensemble",)), strict=True):
        assert detrkit("evaluate", trained, data, "--results", file, *flags).code == 0
    assert files[0].read_text() != files[1].read_text()


def test_spellings_of_a_split(detrkit, data, results, trained):
    assert detrkit("evaluate", results, data, "--split", "valid").code == 0
    figures = [package.evaluate(trained, data, split=name) for name in ("valid", "val")]
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)


def test_the_format_of_annotations_can_be_said(detrkit, data, results, trained):
    assert detrkit("evaluate", results, data, "--annotations", "coco").code == 0
    for name, code, part in (("yolo", 3, "No data set is recognised"), ("tar", 2, "no such format of annotations")):
        said = detrkit("evaluate", results, data, "--annotations", name)
        assert said.code == code
        assert part in said.err
    with pytest.raises(package.errors.DataError, match="No data set is recognised"):
        package.evaluate(trained, data, annotations="yolo")


def test_names_that_no_font_can_write_are_said_in_a_line(detrkit, data, results, tmp_path):
    shutil.copytree(data, tmp_path / "named")
    for file in (tmp_path / "named").rglob("*.json"):
        file.write_text(file.read_text().replace('"nut"', '"\ue123"'), encoding="utf-8")
    said = detrkit("evaluate", results, tmp_path / "named", "--report", tmp_path / "report")
    assert said.code == 0
    (line,) = said.err.splitlines()
    assert "question marks in names, since no font here has their characters" in line


def test_categories_that_the_model_does_not_know_are_named(detrkit, data, trained, tmp_path):
    shutil.copytree(data, tmp_path / "more")
    for file in (tmp_path / "more").rglob("*.json"):
        content = json.loads(file.read_text())
        if "categories" in content:
            content["categories"].append({"id": 77, "name": "yeti"})
            file.write_text(json.dumps(content))
    said = detrkit("evaluate", trained, tmp_path / "more")
    assert said.code == 0
    assert "The model does not know 1 of the 3 categories and finds none of their objects: yeti." in said.err
    assert "does not know" not in detrkit("evaluate", trained, data).err


def test_segments_of_things_alone_are_refused_before_anything_is_evaluated(
    detrkit, data, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("detrkit.cli.evaluate._judged", None)
    said = detrkit("evaluate", trained, data, "--segments", tmp_path / "segments.json")
    assert said.code == 2
    assert "no segments to write" in said.err
    assert "--annotations coco_panoptic" in said.err


def test_what_cannot_be_evaluated(detrkit, data, trained, tmp_path, results):
    file = tmp_path / "file"
    file.write_text("")
    foreign, truth = tmp_path / "foreign", data / "annotations" / "instances_val.json"
    foreign.mkdir()
    (foreign / "report.html").write_text("<html>of somebody else</html>")
    before = truth.read_bytes()
    cases = [
        ((trained, data, "--split", "test"), 3, "train, val"),
        ((tmp_path / "none", data), 4, "none"),
        ((trained, tmp_path / "none"), 3, "none"),
        ((trained, data, "--batch-size", "0"), 2, "batch_size"),
        ((trained, data, "--device", "abacus"), 2, "abacus"),
        ((tmp_path / "none.json", data), 3, "none.json"),
        ((results, data, "--ensemble", "--batch-size", "3"), 2, "got --batch-size, --ensemble"),
        ((results, data, "--workers", "1", "--precision", "bf16"), 2, "got --precision, --workers"),
        ((results, data, "--device", "cpu", "--pretrained"), 2, "got --device, --pretrained"),
        ((results, data, "--draws", "2"), 2, "draws"),
        ((results, data, "--split", "train", "--results", tmp_path / "no" / "x.json"), 2, "no folder"),
        ((results, data, "--results", truth), 2, "over something else"),
        ((results, data, "--segments", truth), 2, "over something else"),
        ((results, data, "--results", "/dev/full"), 1, "No space left on device"),
        ((results, data, "--results", tmp_path), 2, "over something else"),
        ((results, data, "--report", foreign), 2, "holds other things"),
        ((results, data, "--report", file), 2, "needs a folder"),
    ]
    for arguments, code, part in cases:
        said = detrkit("evaluate", *arguments)
        assert (said.code, said.out) == (code, ""), arguments
        assert part in said.err
        assert detrkit("evaluate", *arguments, "--json").document["error"]["exit_code"] == code
    assert truth.read_bytes() == before
    assert "somebody else" in (foreign / "report.html").read_text()


def test_earlier_results_and_reports_are_replaced(detrkit, data, results, tmp_path):
    given = ("evaluate", results, data, "--results", tmp_path / "found.json", "--report", tmp_path / "report")
    for _ in range(2):
        assert detrkit(*given).code == 0
