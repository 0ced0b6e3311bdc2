"""The training loop: one seed is one run, whatever loads the images and whatever the caller does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.drawing import content, tiny, without_times, write_coco

import detrkit
from detrkit.errors import DataError
from detrkit.training.events import Evaluated, Event, Saved, Started, Step, Stopped

pytestmark = pytest.mark.usefixtures("plotless")


def checkpoint_of(data: Path, out: Path, **fields: Any) -> dict[str, bytes]:
    detrkit.train(data, out=out, **tiny(**fields))
    return content(out / "checkpoints" / "last")


def test_one_seed_is_one_run_with_any_number_of_workers(drawn: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"photometric": 0.5, "rotate90": 0.5, "ema": 0.9, "limit": 6}
    first = checkpoint_of(drawn, tmp_path / "first", **fields)
    torch.manual_seed(123)
    random.seed(5)
    again = checkpoint_of(drawn, tmp_path / "again", workers=2, **fields)
    other = checkpoint_of(drawn, tmp_path / "other", seed=1, **fields)
    assert first == again
    assert without_times(tmp_path / "first") == without_times(tmp_path / "again")
    assert first["model.safetensors"] != other["model.safetensors"]


def test_large_seeds_are_seeds(drawn: Path, tmp_path: Path) -> None:
    runs = [
        checkpoint_of(drawn, tmp_path / str(seed), seed=seed, epochs=1, limit=2)["model.safetensors"]
        for seed in (2**24, 2**31, 2**62)
    ]
    assert len(set(runs)) == 3


def test_the_callers_random_states_stay(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []  # GPUs, which this training does not use, have states of their own
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    # Python's own state is looked at in `test_distributed`: here the checks of types draw from it.
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    run = detrkit.train(drawn, out=tmp_path / "run", **tiny(epochs=1, workers=1, samples=2, limit=4))
    run.load().predict(sorted((drawn / "val").iterdir())[0])
    detrkit.train(drawn, out=tmp_path / "next", **tiny(epochs=1, init=str(run.folder), limit=4))
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), torch_before)
    for one, other in zip(np.random.get_state(), numpy_before, strict=True):  # noqa: NPY002
        assert np.array_equal(one, other)


@pytest.fixture(scope="module")
def start(plotless: None, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder to start from."""
    out = tmp_path_factory.mktemp("runs") / "start"
    detrkit.train(drawn, out=out, **tiny(epochs=1, limit=1, batch_size=1))
    return out


@pytest.mark.parametrize("dropout", ["0.0", "0.5"])
def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(
    drawn: Path, start: Path, tmp_path: Path, dropout: str
) -> None:
    """One image, nothing at random but dropout, and rates of zero: the loss changes by dropout alone."""
    losses: dict[int, list[float]] = {0: [], 1: []}
    for seed, seen in losses.items():
        detrkit.train(
            drawn,
            out=tmp_path / str(seed),
            on_event=lambda event, seen=seen: seen.append(event.loss) if isinstance(event, Step) else None,
            **tiny(
                **{"epochs": 3, "limit": 1, "batch_size": 1, "lr": 0.0, "backbone_lr": 0.0, "seed": seed},
                **{"init": str(start), "flip": 0.0, "crop": 0.0, "multi_scale": False},
                architecture={"dropout": dropout},
            ),
        )
    assert len({*losses[0], *losses[1]}) == (6 if dropout == "0.5" else 1)


def test_threads_are_given_back(drawn: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []
    try:
        detrkit.train(
            drawn,
            out=tmp_path / "run",
            on_event=lambda event: seen.append(torch.get_num_threads()),
            **tiny(epochs=1, threads=1, limit=2),
        )
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_events_come_in_order_and_say_what_happened(drawn: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run = detrkit.train(
        drawn,
        out=tmp_path / "run",
        on_event=events.append,
        **tiny(epochs=3, evaluate_every=2, save_every=3, accumulate=2),
    )
    kinds = [type(event) for event in events]
    assert kinds == [Started, Step, Step, Step, Step, Evaluated, Step, Step, Evaluated, Saved, Stopped]
    started, steps = events[0], [event for event in events if isinstance(event, Step)]
    assert isinstance(started, Started)
    assert (started.step, started.total_steps, started.steps_per_epoch) == (0, 6, 2)
    assert any("10 images" in note for note in started.notes)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in steps] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert all(step.images == 4 and step.replaced == () for step in steps)
    assert all(set(step.terms) == {"class", "l1", "giou"} for step in steps)
    best = [event for event in events if isinstance(event, Evaluated) and event.is_best]
    assert run.figures == best[-1].figures
    assert events[-1] == Stopped(6, "finished")


def test_an_overfit_model_finds_what_it_was_shown(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 1], "val": [1, 1]}, sizes=[(64, 64)], classes=2)
    for name in ("000.png", "001.png"):  # the split for validation is the training images themselves
        (data / "val" / name).write_bytes((data / "train" / name).read_bytes())
    (data / "annotations" / "instances_val.json").write_bytes(
        (data / "annotations" / "instances_train.json").read_bytes()
    )
    still = {"flip": 0.0, "crop": 0.0, "multi_scale": False, "schedule": "cosine", "evaluate_every": 120}
    run = detrkit.train(
        data,
        out=tmp_path / "run",
        **tiny(epochs=120, save_every=120, lr=2e-3, architecture={"dropout": "0.0"}, **still),
    )
    assert run.figures["AP50"] > 0.95


def test_a_replaced_image_is_counted_and_listed(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2, 1, 2], "val": [1]})
    broken = data / "train" / "002.png"
    seen: list[str] = []

    def spoil(event: Event) -> None:
        """The file breaks in the middle of the training, after all checks."""
        if isinstance(event, Step) and event.step == 2:
            broken.write_bytes(broken.read_bytes()[:200])
        if isinstance(event, Step):
            seen.extend(event.replaced)

    detrkit.train(data, out=tmp_path / "run", on_event=spoil, **tiny(epochs=3))
    assert len(seen) == 2  # once in each of the two epochs that remain
    assert all(str(broken) in place for place in seen)
    listed = without_times(tmp_path / "run", "replaced.jsonl")
    assert [line["image"] for line in listed] == seen
    assert all(line["step"] > 2 for line in listed)


def test_unreadable_validation_images_are_named(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1, 2], "val": [1, 1]})
    (data / "val" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"001\.png"):
        detrkit.train(data, out=tmp_path / "run", **tiny(epochs=1))


def test_more_boxes_than_queries_is_said(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [9, 2], "val": [1]})
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            notes.extend(event.notes)

    run = detrkit.train(data, out=tmp_path / "run", on_event=listen, **tiny(epochs=1))
    assert any("9 boxes but the model has 8 queries" in note for note in notes)
    assert 0 <= run.figures["AP"] <= 1


def test_a_split_without_boxes_is_refused_before_the_training(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "val", {"train": [1, 2], "val": [0, 0]})
    with pytest.raises(DataError, match=r"nothing to validate on.*2 images and no box"):
        detrkit.train(data, out=tmp_path / "run", **tiny())
    data = write_coco(tmp_path / "train", {"train": [0, 0], "val": [1]})
    with pytest.raises(DataError, match="nothing to learn from"):
        detrkit.train(data, out=tmp_path / "run", **tiny())
    assert not (tmp_path / "run").exists()


def test_a_class_without_boxes_has_no_figure_and_does_no_harm(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [2, 2], "val": [2, 1]}, classes=2)
    found: list[Evaluated] = []
    detrkit.train(
        data,
        out=tmp_path / "run",
        on_event=lambda event: found.append(event) if isinstance(event, Evaluated) else None,
        **tiny(epochs=1),
    )
    assert found[0].metrics is not None
    washer = found[0].metrics.per_class[2]
    assert (washer.name, washer.boxes) == ("washer", 0)
    assert np.isnan(washer.ap)
    assert np.isfinite(found[0].figures["AP"])


def test_a_validation_split_is_made_where_the_data_has_none(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": [1] * 8})
    sizes = {}
    for seed in (0, 1):
        names: list[str] = []

        def listen(event: Event, names: list[str] = names) -> None:
            if isinstance(event, Started):
                names.extend(event.notes)

        detrkit.train(
            data, out=tmp_path / f"run{seed}", on_event=listen, **tiny(epochs=1, seed=seed, val_fraction=0.25)
        )
        assert any(f"25% of the split 'train', chosen by seed {seed}" in note for note in names)
        about = without_times(tmp_path / f"run{seed}")
        assert about
        sizes[seed] = (tmp_path / f"run{seed}" / "data.json").read_text()
    assert sizes[0] != sizes[1]
