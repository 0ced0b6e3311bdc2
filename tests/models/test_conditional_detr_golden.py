"""Conditional DETR against the official implementation: same weights, same inputs, same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import Case

from detrkit import convert
from detrkit.losses.criterion import pad_targets
from detrkit.models import conditional_detr
from detrkit.postprocess import Scored, to_pixels
from detrkit.structures import Predictions

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case.load(golden, "conditional_detr_r50")


@pytest.fixture(scope="module")
def model(case: Case) -> conditional_detr.Model:
    config = conditional_detr.Config(dropout=0.0)
    model = conditional_detr.Model(config)
    convert.load_strictly(model, convert.rename(case.state, conditional_detr.OFFICIAL))
    return model


@pytest.fixture(scope="module")
def predictions(case: Case, model: conditional_detr.Model) -> Predictions:
    with torch.no_grad():
        return model.eval()(case.batch.images, case.batch.padding)


def test_predictions_and_matches(case: Case, model: conditional_detr.Model, predictions: Predictions) -> None:
    torch.testing.assert_close(
        predictions.logits[-1], torch.from_numpy(case.arrays["eval_pred_logits"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        predictions.boxes[-1], torch.from_numpy(case.arrays["eval_pred_boxes"]), atol=1e-4, rtol=0
    )
    matches = conditional_detr.criterion(model.config).match(predictions, pad_targets(case.batch.targets))
    for image in range(2):
        mine = matches.image == image
        assert matches.query[-1][mine].tolist() == case.arrays[f"match_{image}_query"].tolist()
        assert matches.target[-1][mine].tolist() == case.arrays[f"match_{image}_target"].tolist()


def test_detections(case: Case, predictions: Predictions) -> None:
    sizes = torch.tensor(case.facts["sizes"]) * 2
    boxes = to_pixels(predictions.boxes[-1], sizes)
    for image, every in enumerate(conditional_detr.postprocess(predictions, sizes)):
        assert len(every.scores) == 300
        found = Scored(*(column[:100] for column in every[:3]))  # so many are the official ones
        assert found.labels.tolist() == case.arrays["post_labels"][image].tolist()
        torch.testing.assert_close(found.scores, torch.from_numpy(case.arrays["post_scores"][image]), atol=1e-4, rtol=0)
        # The case's scores lie as near as 1e-7 to each other, so that rounding decides their order: each official
        # detection must be the box of a query that scores the same.
        theirs = torch.from_numpy(case.arrays["post_boxes"][image])
        apart = (theirs[:, None] - boxes[image][None]).abs().amax(-1)
        distance, query = apart.min(1)
        assert distance.max() < 0.2  # of 1,000 pixels
        scores = predictions.logits[-1, image, query, found.labels].sigmoid()
        torch.testing.assert_close(scores, found.scores, atol=1e-4, rtol=0)


def test_losses_and_gradients(case: Case, model: conditional_detr.Model) -> None:
    model.train().zero_grad()
    predictions = model(case.batch.images, case.batch.padding)
    losses = conditional_detr.criterion(model.config)(predictions, case.batch.targets)
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
        ours = convert.rename({key: shapes[key]}, conditional_detr.OFFICIAL)
        total = sum(float(gradients[name].square().sum()) for name in ours) ** 0.5
        # Where the true gradient is zero (a key's bias), both sides are rounding noise.
        assert total == pytest.approx(norm, rel=1e-3, abs=1e-5 * case.facts["total_loss"]), key
        checked.update(ours)
    assert checked == set(gradients)
