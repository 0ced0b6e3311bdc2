"""DETR against the official implementation: same weights, same inputs, same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import Case

from detrkit import convert
from detrkit.losses.criterion import pad_targets
from detrkit.models import detr

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case.load(golden, "detr_r50")


@pytest.fixture(scope="module")
def model(case: Case) -> detr.Model:
    model = convert.from_official(case.state, dropout=0.0)
    assert isinstance(model, detr.Model)
    return model


def test_num_classes_is_the_highest_id_plus_one(model: detr.Model) -> None:
    assert model.config.num_classes == 91
    assert model.class_head.out_features == 92


def test_predictions_matches_and_detections(case: Case, model: detr.Model) -> None:
    with torch.no_grad():
        predictions = model.eval()(case.batch.images, case.batch.padding)
    torch.testing.assert_close(
        predictions.logits[-1], torch.from_numpy(case.arrays["eval_pred_logits"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        predictions.boxes[-1], torch.from_numpy(case.arrays["eval_pred_boxes"]), atol=1e-4, rtol=0
    )
    matches = detr.criterion(model.config).match(predictions, pad_targets(case.batch.targets))
    for image in range(2):
        mine = matches.image == image
        assert matches.query[-1][mine].tolist() == case.arrays[f"match_{image}_query"].tolist()
        assert matches.target[-1][mine].tolist() == case.arrays[f"match_{image}_target"].tolist()
    sizes = torch.tensor(case.facts["sizes"]) * 2
    for image, found in enumerate(detr.postprocess(predictions, sizes)):
        assert found.labels.tolist() == case.arrays["post_labels"][image].tolist()
        torch.testing.assert_close(found.scores, torch.from_numpy(case.arrays["post_scores"][image]), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.boxes, torch.from_numpy(case.arrays["post_boxes"][image]), atol=0.05, rtol=0)


def test_losses_and_gradients(case: Case, model: detr.Model) -> None:
    model.train().zero_grad()
    predictions = model(case.batch.images, case.batch.padding)
    losses = detr.criterion(model.config)(predictions, case.batch.targets)
    official = case.facts["losses"]
    for name, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        ours = losses.values[losses.names.index(name)].tolist()
        for layer, value in enumerate(ours):
            suffix = "" if layer == len(ours) - 1 else f"_{layer}"
            assert value == pytest.approx(official[theirs + suffix], rel=1e-4), (name, layer)
    assert losses.total.item() == pytest.approx(case.facts["total_loss"], rel=1e-4)
    assert 100 * losses.class_error.item() == pytest.approx(official["class_error"], abs=1e-3)

    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {key: torch.zeros(()).expand(shape) for key, shape in case.facts["state_dict"].items()}
    checked = set()
    for key, norm in case.facts["grad_norms"].items():
        ours = convert.rename({key: shapes[key]}, detr.OFFICIAL)
        total = sum(float(gradients[name].square().sum()) for name in ours) ** 0.5
        # Where the true gradient is zero (a key's bias), both sides are rounding noise.
        assert total == pytest.approx(norm, rel=1e-3, abs=1e-5), key
        checked.update(ours)
    assert checked == set(gradients)
