"""What every variant of the family offers and keeps, whoever writes it; run for all that are found by name."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training.drawing import write_coco

import detrkit
from detrkit import Batch, ModelError, Predictions, Queries, Target, checkpoint, models
from detrkit.structures import Category

SMALL: dict[str, Any] = {
    "num_classes": 3,
    "backbone": "resnet-nano",
    "num_queries": 7,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "feedforward": 64,
}


def small(config: Any) -> Any:
    """A config with all that costs time made small; what tells presets apart otherwise stays."""
    own = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in SMALL.items() if name in own})


def distinct_presets() -> list[Any]:
    """Presets that still differ when they are small, with the variant of each."""
    seen: dict[tuple[str, Any], str] = {}
    for preset, name in models.presets().items():
        config = models.variant(name).PRESETS[preset]
        sizes = {"image_size": 0, "longest": 0}
        seen.setdefault((name, dataclasses.replace(small(config), **sizes)), preset)
    return [pytest.param((name, preset), id=preset) for (name, _), preset in seen.items()]


@pytest.fixture(params=distinct_presets())
def named(request: pytest.FixtureRequest) -> tuple[models.Variant, Any]:
    name, preset = request.param
    variant = models.variant(name)
    return variant, small(variant.PRESETS[preset])


@pytest.fixture
def variant(named: tuple[models.Variant, Any]) -> models.Variant:
    return named[0]


@pytest.fixture
def model(named: tuple[models.Variant, Any]) -> Any:
    return named[0].Model(named[1]).eval()


@pytest.fixture
def batch() -> Batch:
    """Two images of unequal sizes, no multiples of a stride; the second is without objects."""
    targets = [
        Target(torch.tensor([2, 0]), torch.tensor([[0.4, 0.4, 0.3, 0.2], [0.7, 0.6, 0.2, 0.5]]), "a.png"),
        Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), "b.png"),
    ]
    return Batch.from_images([torch.randn(3, 70, 96), torch.randn(3, 64, 50)], targets)


@pytest.mark.parametrize("name", models.names())
def test_configs_are_frozen_and_plain(name: str) -> None:
    variant = models.variant(name)
    assert dataclasses.is_dataclass(variant.Config)
    config = next(iter(variant.PRESETS.values()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 5
    for field in dataclasses.fields(config):
        # They travel as JSON, TOML and text.
        assert type(getattr(config, field.name)) in (int, float, bool, str), field.name
        assert field.default is not dataclasses.MISSING, field.name
    for wanted in ("num_classes", "backbone", "frozen_stages", "num_queries", "image_size", "longest"):
        assert hasattr(config, wanted)


@pytest.mark.parametrize("name", models.names())
def test_every_field_is_explained(name: str) -> None:
    explained = models.variant(name).Config.__doc__ or ""
    for field in dataclasses.fields(models.variant(name).Config):
        assert re.search(rf"^\s+{field.name}: \S", explained, re.MULTILINE), field.name


def test_predictions_have_the_layer_axis(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        found = model(batch.images, batch.padding)
    assert isinstance(found, Predictions)
    assert found.boxes.shape == (2, 2, 7, 4)
    assert found.logits.shape[:3] == found.hidden.shape[:3] == (2, 2, 7)
    assert found.logits.shape[3] in (3, 4), "categories, with or without no-object"
    assert bool(((found.boxes >= 0) & (found.boxes <= 1)).all())


def test_forward_is_the_four_in_a_row(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        whole = model(batch.images, batch.padding)
        memory, queries = model.encode(batch.images, batch.padding), model.queries(2)
        steps = model.predict(model.decode(memory, queries))
        asked = model(batch.images, batch.padding, queries)
    for found in (steps, asked):
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    rows, columns = memory.grid
    assert memory.tokens.shape == memory.position.shape
    assert memory.features
    assert memory.tokens.shape[0] == 2
    if len(memory.features) == 1:
        assert memory.tokens.shape[1] == rows * columns


def test_answers_repeat(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        first, second = model(batch.images, batch.padding), model(batch.images, batch.padding)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_answers_in_its_type(model: Any, batch: Batch, dtype: torch.dtype) -> None:
    with torch.no_grad():
        plain = model(batch.images, batch.padding)
        found = model.to(dtype)(batch.images.to(dtype), batch.padding)
    assert found.logits.dtype == found.hidden.dtype == dtype
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.boxes.float(), plain.boxes, rtol=0, atol=tolerance)


def influence(model: Any, batch: Batch, blocked: Tensor | None, asking: Tensor) -> Tensor:
    """How much each query's position changes what the `asking` queries answer."""
    queries = model.queries(2)
    position = queries.position.detach().clone().requires_grad_()
    found = model(batch.images, batch.padding, Queries(queries.content.detach(), position, blocked))
    answers = torch.cat([found.logits, found.boxes], -1)[:, :, asking]
    (gradient,) = torch.autograd.grad((answers * torch.randn_like(answers)).sum(), position)
    return gradient.abs().sum((0, 2))


def test_blocked_groups_do_not_see_each_other(model: Any, batch: Batch) -> None:
    group = torch.arange(7) % 2
    apart = influence(model, batch, group[:, None] != group[None, :], group == 0)
    assert bool((apart[group == 0] > 0).all())
    assert not bool(apart[group == 1].any())
    assert bool((influence(model, batch, None, group == 0) > 0).all()), "queries that never see each other"


def test_blocking_is_directed(model: Any, batch: Batch) -> None:
    """`blocked[i, j]`: i may not see j, though j may see i."""
    late = torch.arange(7) >= 3
    blocked = ~late[:, None] & late[None, :]
    assert not bool(influence(model, batch, blocked, ~late)[late].any())
    assert bool((influence(model, batch, blocked, late)[~late] > 0).all())


def test_the_number_of_queries_is_the_callers(model: Any, batch: Batch) -> None:
    queries = model.queries(2)
    more = Queries(queries.content.repeat(1, 2, 1)[:, :9], queries.position.repeat(1, 2, 1)[:, :9])
    for mode in (False, True):
        with torch.no_grad():
            found = model.train(mode)(batch.images, batch.padding, more)
        assert found.boxes.shape == (2, 2, 9, 4)


def test_losses_are_finite_and_reach_every_parameter(variant: models.Variant, model: Any, batch: Batch) -> None:
    criterion = variant.criterion(model.config)
    losses = criterion(model.train()(batch.images, batch.padding), batch.targets)
    assert bool(losses.values.isfinite().all())
    assert len(losses.names) == len(losses.values) == len(losses.weights)
    losses.total.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_a_batch_without_objects_teaches_too(variant: models.Variant, model: Any, batch: Batch) -> None:
    """Every parameter has a gradient, or processes that train together would wait for each other."""
    criterion = variant.criterion(model.config)
    losses = criterion(model.train()(batch.images, batch.padding), [batch.targets[1]] * 2)
    assert bool(losses.total.isfinite())
    losses.total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("ensemble", [False, True])
def test_answers_are_scored_boxes_in_pixels(variant: models.Variant, model: Any, batch: Batch, ensemble: bool) -> None:
    with torch.no_grad():
        predictions = model(batch.images, batch.padding)
    found = variant.postprocess(predictions, torch.tensor([[700, 960], [64, 50]]), ensemble=ensemble)
    assert len(found) == 2
    for image, (height, width) in zip(found, ((700, 960), (64, 50)), strict=True):
        count = len(image.scores)
        assert 0 < count <= 7 * 3  # with a yes or no for each class, a query may answer for several
        assert image.boxes.shape == (count, 4)
        assert image.labels.shape == (count,)
        assert image.labels.dtype == torch.int64
        assert bool(((image.labels >= 0) & (image.labels < 3)).all())
        assert bool(((image.scores >= 0) & (image.scores <= 1)).all())
        assert bool((image.boxes[:, 2:] >= image.boxes[:, :2]).all())
        # A box's centre lies in the image.
        centre = (image.boxes[:, 2:] + image.boxes[:, :2]) / 2
        assert bool(((centre >= 0) & (centre <= torch.tensor([width, height]))).all())


def test_weights_go_round(variant: models.Variant, model: Any, batch: Batch, tmp_path: Path) -> None:
    categories = tuple(Category(index, f"kind {index}") for index in range(3))
    checkpoint.save_model(tmp_path / "model", model, preset="any", categories=categories)
    saved = checkpoint.load_model(tmp_path / "model")
    assert models.variant(saved.variant) is variant
    assert saved.model.config == model.config
    assert saved.categories == categories
    with torch.no_grad():
        before, after = model(batch.images, batch.padding), saved.model.eval()(batch.images, batch.padding)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_weights_of_another_size_are_refused(variant: models.Variant, model: Any, tmp_path: Path) -> None:
    other = variant.Model(dataclasses.replace(model.config, num_classes=4))
    with pytest.raises(ModelError, match="other shapes"):
        detrkit.convert.load_strictly(other, model.state_dict())


@pytest.mark.parametrize("name", models.names())
def test_official_keys_cover_the_papers_model(name: str) -> None:
    """Each parameter of the paper's model is the target of exactly one row of the key table."""
    variant = models.variant(name)
    targets = [
        target for _, row in getattr(variant, "OFFICIAL", ()) for target in ((row,) if isinstance(row, str) else row)
    ]
    if not targets:
        pytest.skip("no official weights")
    patterns = [re.sub(r"\\\\\d", ".+", re.escape(target)) for target in targets]
    for key in variant.Model(small(variant.Config())).state_dict():
        hits = [target for target, pattern in zip(targets, patterns, strict=True) if re.fullmatch(pattern, key)]
        assert len(hits) == 1, (key, hits)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A variant in a folder of its own, which is made a part of the package."""
    folder = tmp_path / "variants"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("toy.py"), folder / "toy.py")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    yield "toy"
    sys.modules.pop("detrkit.models.toy", None)
    if hasattr(models, "toy"):
        delattr(models, "toy")


@pytest.mark.usefixtures("plotless")
def test_a_new_variant_is_one_file(toy: str, tmp_path: Path) -> None:
    assert toy in models.names()
    assert models.presets()["toy-tiny"] == toy
    assert isinstance(models.build("toy-tiny", num_classes=2), nn.Module)

    data = write_coco(tmp_path / "data", {"train": [2, 1, 3, 2], "val": [1, 2]})
    steps = []
    run = detrkit.train(
        data,
        out=tmp_path / "run",
        model="toy-tiny",
        architecture={"num_queries": "9"},
        backbone_weights="random",
        epochs=1,
        batch_size=2,
        workers=0,
        device="cpu",
        samples=0,
        on_event=lambda event: steps.append(event) if type(event).__name__ == "Step" else None,
    )
    assert [step.step for step in steps] == [1, 2]
    assert all(np.isfinite(step.loss) for step in steps)

    for detector in (run.load(device="cpu"), detrkit.load(tmp_path / "run", device="cpu")):
        assert detector.variant is models.variant(toy)
        assert detector.model.config.num_queries == 9
        found = detector.predict(data / "val" / "000.png", threshold=0.0)
        assert len(found) == 9
        assert set(found.names) <= {"bolt", "nut", "washer"}
    assert 0 <= detrkit.evaluate(tmp_path / "run", data, split="val")["AP"] <= 1


def test_the_toy_leaves_nothing_behind() -> None:
    assert "toy" not in models.names()
    assert "toy-tiny" not in models.presets()
