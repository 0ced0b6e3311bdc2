"""`detrkit push`: what would travel, and what is said when it cannot."""

from __future__ import annotations

import json
import shutil

from detrkit import card
from detrkit.checkpoint import load_model
from detrkit.errors import ModelError


def test_a_dry_run_writes_what_would_travel(detrkit, trained, tmp_path):
    said = detrkit("push", trained, "me/parts", "--dry-run", tmp_path / "out", "--license", "mit")
    assert said.code == 0, said.err
    assert said.out.startswith("Nothing was uploaded. README.md, config.json, ")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in text
    assert str(trained.parent) not in text
    assert "nut, bolt" in text
    assert load_model(tmp_path / "out").preset == load_model(trained).preset
    assert detrkit("predict", tmp_path / "out", tmp_path / "out" / "samples.jpg", "--out", tmp_path / "found").code == 0


def test_the_document(detrkit, trained, tmp_path):
    said = detrkit("push", trained, "me/parts", "--dry-run", tmp_path / "out", "--no-pictures", "--json")
    assert said.document == {
        "folder": (tmp_path / "out").as_posix(),
        "files": ["README.md", "config.json", "model.safetensors"],
        "uploaded": False,
    }


def test_an_upload(detrkit, trained, monkeypatch):
    asked = []

    def push(source, name, **options):
        asked.append((source, name, options))
        return f"https://huggingface.co/{name}"

    monkeypatch.setattr(card, "push", push)
    said = detrkit("push", trained, "me/parts", "--private")
    assert said.out.startswith("https://huggingface.co/me/parts\n")
    assert "detrkit predict me/parts IMAGES" in said.out
    assert asked == [(trained, "me/parts", {"private": True, "license": "", "pictures": True})]
    assert detrkit("push", trained, "me/parts", "--json").document["uploaded"] is True


def test_errors_have_their_codes(detrkit, trained, tmp_path, monkeypatch):
    assert detrkit("push", tmp_path, "me/parts", "--dry-run", tmp_path / "out").code == ModelError.exit_code
    said = detrkit("push", trained, "parts", "--dry-run", tmp_path / "out")
    assert said.code == 2
    assert "organisation/name" in said.err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = detrkit("push", trained, "me/parts")
    assert said.code == 2
    assert "hf auth login" in said.err


def test_a_hugging_face_folder_is_to_be_converted_first(detrkit, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "detr"}')
    said = detrkit("push", tmp_path / "theirs", "me/parts", "--dry-run", tmp_path / "out")
    assert (said.code, said.out) == (ModelError.exit_code, "")
    for part in ("This is a Hugging Face folder", f"detrkit convert {tmp_path / 'theirs'} MODEL", "--init"):
        assert part in said.err


def test_what_was_only_pretrained_is_to_be_trained_first(detrkit, trained, tmp_path):
    run = tmp_path / "a run"
    shutil.copytree(trained, run)
    config = json.loads((run / "model" / "config.json").read_text())
    config["about"]["pretext"] = {"task": "up-detr", "images": 9}
    (run / "model" / "config.json").write_text(json.dumps(config))
    for source in (run, run / "model"):
        said = detrkit("push", source, "me/parts", "--dry-run", tmp_path / "out")
        assert (said.code, said.out) == (ModelError.exit_code, "")
        assert f"{source}: The model was only pre-trained" in said.err
        assert f"detrkit train DATA --init '{source}' --out RUN" in said.err
    assert not (tmp_path / "out").exists()
