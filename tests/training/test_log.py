"""What a run leaves behind."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.drawing import content, tiny, tiny_recipe, write_coco

import detrkit
from detrkit.errors import DataError, MissingExtraError, UsageError
from detrkit.training.detection import describe
from detrkit.training.events import Event, Started, Step
from detrkit.training.log import finite, summarize
from detrkit.training.recipe import read
from detrkit.training.validation import forgiving


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("log") / "deep" / "run"
    detrkit.train(drawn, out=out, **tiny(samples=2, tensorboard=True))
    return out


def read_json(file: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{file} holds {name}, which is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_folder_holds_what_it_should_and_no_leftovers(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith("tensorboard/")}
    model = {"config.json", "model.safetensors"}
    assert names == {
        *("recipe.toml", "environment.json", "data.json", "metrics.jsonl", "status.json", "plots/history.png"),
        *("samples/epoch-0001.jpg", "samples/epoch-0002.jpg"),
        *(f"model/{name}" for name in model),
        *(f"checkpoints/best/{name}" for name in model),
        *(
            f"checkpoints/{place}/{name}"
            for place in ("last", "previous")
            for name in {*model, "optimizer.safetensors", "training.json", "checksums.json"}
        ),
    }


def test_the_recipe_is_the_resolved_one(run: Path) -> None:
    assert read(run / "recipe.toml") == tiny_recipe(samples=2, tensorboard=True)


def test_the_recipe_is_written_before_the_first_step(drawn: Path, tmp_path: Path) -> None:
    seen: list[bool] = []

    def look(event: Event) -> None:
        if isinstance(event, Started | Step):
            seen.append((tmp_path / "run" / "recipe.toml").exists() and (tmp_path / "run" / "data.json").exists())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=tmp_path / "run", on_event=look, **tiny())
    assert seen == [True]


def test_the_environment_names_the_versions(run: Path) -> None:
    environment = read_json(run / "environment.json")
    assert environment["torch"] == torch.__version__
    assert environment["detrkit"] == detrkit.__version__
    assert environment["device"] == "cpu"
    assert environment["processes"] == 1


def test_the_data_is_described_with_its_table_and_fingerprint(run: Path, drawn: Path) -> None:
    about = read_json(run / "data.json")
    assert about["path"] == str(drawn)
    assert about["categories"] == [[3, "bolt"], [7, "nut"], [12, "washer"]]
    assert about["splits"]["train"]["images"] == 10
    assert about["splits"]["train"]["boxes"] == 18
    assert about["splits"]["val"]["images"] == 3
    assert about["splits"]["train"]["fingerprint"] != about["splits"]["val"]["fingerprint"]
    assert any("Training: 10 images" in note for note in about["notes"])


def test_a_fingerprint_is_of_names_boxes_and_labels_and_not_of_the_place(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data = write_coco(tmp_path / name, {"train": [2, 1]}, seed=seed)
        prints.append(describe(detrkit.data.formats.read(data)["train"])["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_metrics_have_a_line_for_steps_and_one_for_evaluations(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        *(("step", 2), ("step", 4), ("step", 5), ("evaluated", 5)),
        *(("step", 6), ("step", 8), ("step", 10), ("evaluated", 10)),
    ]
    assert {"loss", "class", "l1", "giou", "class_error", "lr", "grad_norm", "epoch"} <= lines[0].keys()
    assert {"AP", "AP50", "best", "epoch"} <= lines[3].keys()
    assert lines[3]["best"] is True
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_the_status_is_the_last_one(run: Path) -> None:
    status = read_json(run / "status.json")
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 10, 10)


def test_a_run_that_goes_on_counts_the_time_that_it_took_before(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detrkit.train(drawn, out=run, on_event=stop, **tiny())
    status = read_json(run / "status.json")
    (run / "status.json").write_text(json.dumps({**status, "seconds": 5000.0}))
    detrkit.train(drawn, out=run, resume=True, **tiny())
    assert 5000 < read_json(run / "status.json")["seconds"] < 5600


def test_the_model_is_the_best_checkpoint_and_says_its_figures(run: Path) -> None:
    assert content(run / "model") == content(run / "checkpoints" / "best")
    detector = detrkit.load(run)
    assert detector.preset == "detr-nano"
    assert detector.about is not None
    evaluated = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"evaluated"' in line]
    assert detector.about["metrics"]["AP"] == max(json.loads(line)["AP"] for line in evaluated)


def test_pictures_are_pictures(run: Path) -> None:
    for name in ("plots/history.png", "samples/epoch-0001.jpg"):
        with Image.open(run / name) as picture:
            assert np.asarray(picture).std() > 1
    assert (run / "samples" / "epoch-0001.jpg").read_bytes() != (run / "samples" / "epoch-0002.jpg").read_bytes()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.usefixtures("plotless")
def test_images_of_another_size_than_is_stated_are_drawn_and_end_no_run(tmp_path: Path, task: str) -> None:
    data = write_coco(tmp_path / "data", {"train": [2, 1], "val": [2, 2, 2]}, sizes=((64, 80),))
    turned, small = (Image.open(data / "val" / f"00{index}.png") for index in (0, 1))
    turned.transpose(Image.Transpose.ROTATE_90).save(data / "val" / "000.png")
    small.resize((40, 32)).save(data / "val" / "001.png")
    events: list[Event] = []
    fields = tiny(task=task, epochs=1, samples=3)
    run = detrkit.train(data, out=tmp_path / "run", on_event=events.append, **fields)
    assert (run.folder / "samples" / "epoch-0001.jpg").is_file()
    assert not [note for event in events for note in getattr(event, "notes", ()) if "Pictures" in note]


@pytest.mark.parametrize("error", [UsageError("No such picture"), DataError("No such picture"), OSError("No such")])
def test_a_picture_that_cannot_be_drawn_becomes_a_note(error: Exception) -> None:
    notes: list[str] = []
    with forgiving(notes):
        raise error
    assert notes == [f"Pictures cannot be written: {error}"]


def test_tensorboard_events_hold_the_same_figures(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"loss", "class", "l1", "giou", "lr", "grad_norm", "AP"} <= set(events.Tags()["scalars"])
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, 11))


def test_a_missing_tensorboard_is_said_before_the_first_step(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"detrkit\[tensorboard\]"):
        detrkit.train(drawn, out=tmp_path / "run", **tiny(tensorboard=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_missing_matplotlib_costs_the_plots_alone(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(lines: Any, out: Path) -> Path:
        raise MissingExtraError("matplotlib", "plot", "plot_history")

    monkeypatch.setattr("detrkit.training.log.plot_history", missing)
    detrkit.train(drawn, out=tmp_path / "run", **tiny(epochs=1, limit=2))
    assert "detrkit[plot]" in (tmp_path / "run" / "plots" / "README.txt").read_text()


def test_a_training_that_fails_says_so(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise RuntimeError("the listener broke")

    with pytest.raises(RuntimeError, match="the listener broke"):
        detrkit.train(drawn, out=tmp_path / "run", on_event=fail, **tiny())
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["step"]) == ("failed", 3)


def step_event(number: int, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "step": number, "epoch": number / 4, "loss": float(number), "terms": {"class": 2.0 * number},
        "class_error": 0.5, "lr": 0.1 / number, "grad_norm": 1.0, "seconds": 0.5, "waited": 0.25,
        "images": 3, "replaced": (),
    }  # fmt: skip
    return Step(**{**values, **changes})


def test_a_line_is_the_mean_of_its_steps_and_the_state_after_the_last() -> None:
    line = summarize([step_event(1), step_event(2, grad_norm=math.inf), step_event(3, grad_norm=2.0)])
    assert (line["step"], line["epoch"], line["lr"]) == (3, 0.75, 0.1 / 3)
    assert (line["loss"], line["class"], line["grad_norm"]) == (2.0, 4.0, 1.5)
    assert (line["images_per_second"], line["waited"]) == (6.0, 0.5)


def test_undefined_figures_are_left_out() -> None:
    assert finite({"AP": 0.5, "APl": math.nan, "x": math.inf}) == {"AP": 0.5}
