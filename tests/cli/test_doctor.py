"""`detrkit doctor`: what it says, what it writes, and what its exit code means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detrkit as package
from detrkit.data import formats


@pytest.fixture
def ill(data: Path, tmp_path: Path) -> Path:
    """The data set with a box that reaches out, a damaged image and a training image in val."""
    root = tmp_path / "ill"
    shutil.copytree(data, root)
    file = root / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"] = [70, 20, 30, 30]
    file.write_text(json.dumps(document))
    (root / "train" / "2.png").write_bytes((root / "train" / "2.png").read_bytes()[:300])
    shutil.copyfile(root / "train" / "3.png", root / "val" / "1.png")
    return root


def test_a_clean_data_set(detrkit, data):
    said = detrkit("doctor", data)
    assert (said.code, said.err) == (0, "")
    assert "Clean: nothing is wrong with it." in said.out
    assert "train: 4 images, 4 boxes, 2 classes" in said.out


def test_notes_are_left_to_people(detrkit, data, tmp_path):
    shutil.copytree(data, tmp_path / "alike")
    pixels = np.asarray(Image.open(tmp_path / "alike" / "train" / "1.png").convert("RGB"))
    Image.fromarray(np.clip(pixels, 0, 254) + 1).save(tmp_path / "alike" / "val" / "1.png")
    said = detrkit("doctor", tmp_path / "alike")
    assert said.code == 0
    assert "similar-image-in-two-splits (note)" in said.out
    assert "Clean: nothing is wrong with it. The notes are for you to judge." in said.out


def test_what_is_repairable(detrkit, ill):
    said = detrkit("doctor", ill)
    assert said.code == 5
    for kind in ("outside-box", "unreadable-image", "image-in-two-splits"):
        assert f"{kind} (repairable)" in said.out
    assert "[70, 20, 100, 50]" in said.out
    assert "→ Take it out of the training split." in said.out
    assert said.out.rstrip().endswith(f"A clean copy: detrkit doctor {ill} --fix OUT")
    quick = detrkit("doctor", ill, "--quick")
    assert quick.code == 5
    assert "unreadable-image" not in quick.out
    assert "No image was decoded" in quick.out


def test_one_document(detrkit, ill, tmp_path):
    said = detrkit("doctor", ill, "--json", "--report", tmp_path / "page", "--fix", tmp_path / "mended")
    assert said.code == 0
    document = said.document
    assert (document["verdict"], document["format"], document["images_decoded"]) == ("repairable", "coco", True)
    kinds = {one["kind"]: one for one in document["findings"]}
    assert kinds["outside-box"]["places"] == [
        {"where": str(ill / "train" / "1.png"), "said": "[70, 20, 100, 50]"},
    ]
    assert set(kinds["outside-box"]) >= {"severity", "split", "count", "meaning", "remedy"}
    assert document["splits"]["train"]["most_boxes"] == 1
    changes = {"unreadable-image": 1, "image-in-two-splits": 1, "outside-box": 1}
    assert document["fixed"] == {"out": str(tmp_path / "mended"), "format": "coco", "changes": changes}
    assert {name: len(part) for name, part in formats.read(tmp_path / "mended").items()} == {"train": 2, "val": 2}
    page = Path(document["report"]).read_text()
    assert page.count("data:image/jpeg") == 2  # the box that reaches out, and the pair
    assert "This image cannot be shown" in page


def test_results_say_in_a_line_what_they_are(ill):
    told = package.doctor(ill, decode=False)
    assert repr(told) == f"<Diagnosis of {ill}: repairable, {len(told.findings)} findings>"
    train = told.splits["train"]
    assert repr(train) == f"<Annotations {train.summary()}, from {train.source}>"


def test_what_is_broken_stays_so(detrkit, ill, tmp_path):
    (ill / "annotations" / "instances_val.json").write_text('{"images": [], "annotations": [')
    said = detrkit("doctor", ill, "--fix", tmp_path / "mended")
    assert said.code == 6
    assert "malformed-file (broken), val" in said.out
    assert "Broken: 1 kind of finding for a person to mend, 2 that can be repaired." in said.out
    assert set(formats.read(tmp_path / "mended")) == {"train"}


def test_which_annotations_are_meant_can_be_said(detrkit, ambiguous):
    said = detrkit("doctor", ambiguous)
    assert said.code == 3
    assert "--annotations coco" in said.err
    assert "val: 2 images" in detrkit("doctor", ambiguous, "--annotations", "coco").out
    document = json.loads((ambiguous / "annotations" / "instances_val.json").read_text())
    document["annotations"][0]["bbox"] = [70, 20, 30, 30]
    (ambiguous / "annotations" / "instances_val.json").write_text(json.dumps(document))
    out = detrkit("doctor", ambiguous, "--annotations", "coco", "--quick").out
    assert out.rstrip().endswith(f"A clean copy: detrkit doctor {ambiguous} --annotations coco --fix OUT")
    assert package.doctor(ambiguous, annotations="yolo", decode=False).format == "yolo"
    assert detrkit("doctor", ambiguous, "--annotations", "tar").code == 2


def test_nothing_is_written_into_the_data_set(detrkit, ill, tmp_path):
    (tmp_path / "link").symlink_to(ill)
    before = sorted(ill.rglob("*"))
    for data, out in ((ill, ill / "x"), (ill, tmp_path / "link" / "x"), (tmp_path / "link", ill / "train" / "x")):
        said = detrkit("doctor", data, "--quick", "--fix", out)
        assert (said.code, said.out) == (2, "")
        assert f"{out}: The output folder lies inside the data set" in said.err
    with pytest.raises(package.UsageError, match="inside the data set"):
        package.doctor(ill, decode=False).fix(ill / "x")
    assert sorted(ill.rglob("*")) == before
    file = ill / "annotations" / "instances_train.json"
    assert detrkit("doctor", file, "--quick", "--fix", tmp_path / "clean").code == 0


def test_what_cannot_be_examined(detrkit, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for given, code in [
        ([tmp_path / "nothing"], 3),
        ([tmp_path / "full"], 3),
        ([data, "--fix", tmp_path / "full"], 2),
        ([data, "--report", tmp_path / "full" / "file"], 2),
        ([data, "--report", tmp_path / "full"], 2),
        ([data, "--model", "detr-r5"], 2),
        ([data, "--image-size", "-3"], 2),
        ([data, "--image-size", "9999999"], 2),
    ]:
        said = detrkit("doctor", *given)
        assert said.code == code, said.err
        assert said.out == ""
