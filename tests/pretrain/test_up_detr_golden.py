"""UP-DETR's pre-training against the official implementation: same weights, same inputs, same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import Case
from torch import Tensor

from detrkit.convert import rename
from detrkit.losses.criterion import pad_targets
from detrkit.models import detr
from detrkit.pretrain.up_detr import OFFICIAL, PatchPredictions, UpDetr, criterion

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case.load(golden, "up_detr_pretrain_r50")


@pytest.fixture(scope="module")
def task(case: Case) -> UpDetr:
    task = UpDetr.from_official(case.state, mask_out=0.0)
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return task


@pytest.fixture(scope="module")
def patches(case: Case, golden: Path) -> Tensor:
    fill = case.module(golden)
    seed, count = case.facts["seed"], case.facts["options"]["patches"]
    drawn = [
        [torch.from_numpy(fill.image(1000 + 100 * image + patch + seed, 128, 128)) for patch in range(count)]
        for image in range(len(case.batch.images))
    ]
    return torch.stack([torch.stack(row) for row in drawn])


@pytest.fixture(scope="module")
def found(case: Case, task: UpDetr, patches: Tensor) -> PatchPredictions:
    with torch.no_grad():
        return task.eval()(case.batch.images, case.batch.padding, patches)


def test_predictions_and_features(case: Case, found: PatchPredictions) -> None:
    for ours, theirs in ((found.logits, "eval_pred_logits"), (found.boxes, "eval_pred_boxes")):
        torch.testing.assert_close(ours[-1], torch.from_numpy(case.arrays[theirs]), atol=1e-4, rtol=0)
    assert found.reconstructed is not None
    for figure, name in (
        (found.reconstructed[-1].mean(-1), "eval_pred_feature_mean"),
        (found.reconstructed[-1].std(-1), "eval_pred_feature_std"),
        (found.patch_features.mean(-1).flatten(), "gt_feature_mean"),
    ):
        torch.testing.assert_close(figure, torch.from_numpy(case.arrays[name]), atol=1e-4, rtol=0)


def test_matches(case: Case, task: UpDetr, found: PatchPredictions) -> None:
    targets = [target._replace(labels=torch.ones_like(target.labels)) for target in case.batch.targets]
    matches = criterion(task.detector, 10).detection.match(found, pad_targets(targets))
    for image in range(2):
        mine = matches.image == image
        assert matches.query[-1][mine].tolist() == case.arrays[f"match_{image}_query"].tolist()
        assert matches.target[-1][mine].tolist() == case.arrays[f"match_{image}_target"].tolist()


def test_losses_and_gradients(case: Case, task: UpDetr, patches: Tensor) -> None:
    task.train().zero_grad()
    boxes = torch.stack([target.boxes for target in case.batch.targets])
    losses = criterion(task.detector, 10)(task(case.batch.images, case.batch.padding, patches), boxes, task.group)
    official = case.facts["losses"]
    for name, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou"), ("feature", "loss_feature")):
        ours = losses.values[losses.names.index(name)].tolist()
        for layer, value in enumerate(ours):
            suffix = "" if layer == len(ours) - 1 else f"_{layer}"
            assert value == pytest.approx(official[theirs + suffix], rel=1e-4), (name, layer)
    assert losses.total.item() == pytest.approx(case.facts["total_loss"], rel=1e-4)

    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    shapes = {key: torch.zeros(()).expand(shape) for key, shape in case.facts["state_dict"].items()}
    checked = set()
    for key, norm in case.facts["grad_norms"].items():
        heads = [key.replace(theirs, ours) for theirs, ours in OFFICIAL if key.startswith(theirs)]
        names = heads or [f"detector.{name}" for name in rename({key: shapes[key]}, detr.OFFICIAL)]
        total = sum(float(gradients[name].square().sum()) for name in names) ** 0.5
        # Where the true gradient is zero (a key's bias), both sides are rounding noise.
        assert total == pytest.approx(norm, rel=1e-3, abs=1e-5 * case.facts["total_loss"]), key
        checked.update(names)
    assert checked == set(gradients)
