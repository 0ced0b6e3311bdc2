"""Random query patch detection: who sees what, what is matched with what, and what trains."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from official_keys import official_state
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detrkit import models
from detrkit.boxes import cxcywh_to_xyxy, pairwise_giou
from detrkit.errors import ModelError, UsageError
from detrkit.losses.criterion import FocalClassification, SoftmaxClassification
from detrkit.losses.matching import NonFiniteError, PaddedTargets
from detrkit.models import conditional_detr, detr
from detrkit.nn.groups import separated
from detrkit.pretrain.up_detr import PatchPredictions, UpDetr, criterion, match_in_groups
from detrkit.prompts import group_of_queries
from detrkit.structures import Batch, PatchBatch, Queries

QUERIES, PATCHES = 7, 3
VARIANTS = [detr, conditional_detr]


def make(variant: ModuleType = detr, **changes: Any) -> Any:
    tiny = {"backbone": "resnet-nano", "dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2}
    fields = {"num_classes": 2, "num_queries": QUERIES, "feedforward": 32, "dropout": 0.0, **tiny, **changes}
    return variant.Model(dataclasses.replace(variant.Config(), **fields))


def task_of(variant: ModuleType = detr, *, architecture: dict[str, Any] | None = None, **options: Any) -> UpDetr:
    """A task whose heads say something from the start, so that a difference in what is seen shows in the boxes."""
    task = UpDetr(make(variant, **(architecture or {})), **{"patches": PATCHES, "mask_out": 0.0, **options})
    with torch.no_grad():
        last = task.detector.box_head.layers[-1]
        last.weight.normal_(std=0.5)
    return task


def batch_of(images: int = 2, patches: int = PATCHES) -> PatchBatch:
    batch = Batch.from_images([torch.randn(3, 64, width) for width in (48, 64, 56, 64)[:images]])
    places = 0.25 + 0.4 * torch.rand(images, patches, 4)
    names = tuple(f"{index}.jpg" for index in range(images))
    return PatchBatch(batch.images, batch.padding, torch.randn(images, patches, 3, 32, 32), places, names)


@pytest.mark.parametrize("start", [lambda task: task, UpDetr.train], ids=["new", "training"])
def test_a_frozen_backbone_says_the_same_of_a_patch_each_time(start: Any) -> None:
    detector = make()
    detector.backbone.layer1.append(nn.Dropout(0.5))  # as the dropped paths of some networks of transformers
    task, patches = start(UpDetr(detector, patches=PATCHES)), torch.randn(1, PATCHES, 3, 32, 32)
    assert task.training
    assert torch.equal(task.describe(patches), task.describe(patches))


def run(task: UpDetr, batch: PatchBatch) -> PatchPredictions:
    return task(batch.images, batch.padding, batch.patches)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_sees_its_own_patch_only(variant: ModuleType, sets: int, training: bool):
    task = task_of(variant, architecture={"query_groups": sets}).train(training)
    batch = batch_of()
    other = batch.patches.clone()
    other[0, 1] = torch.randn_like(other[0, 1])
    with torch.no_grad():
        before, after = run(task, batch), run(task, batch._replace(patches=other))
    assert len(before.boxes) == (2 * sets if training else 2)
    hit = torch.zeros(2, QUERIES, dtype=torch.bool)
    hit[0] = task.group == 1
    for field in ("logits", "boxes", "reconstructed"):
        change = (getattr(before, field) - getattr(after, field)).abs().amax(-1)
        assert change[:, ~hit].max() <= 1e-6, field
        assert change[:, hit].min() > 1e-5, field


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_patches_have_the_same_answers(variant: ModuleType):
    task, batch = task_of(variant).eval(), batch_of()
    with torch.no_grad():
        every, few = run(task, batch), task(batch.images, batch.padding, batch.patches[:, :2])
    asked = task.group < 2
    assert few.boxes.shape[2] == int(asked.sum()) < QUERIES
    for ours, theirs in zip(few[:3], every[:3], strict=True):
        torch.testing.assert_close(ours, theirs[:, :, asked], atol=1e-5, rtol=0)
    torch.testing.assert_close(few.patch_features, every.patch_features[:, :2], atol=1e-5, rtol=0)


class Listener(nn.Module):
    """A detector that only takes down what its decoder was asked."""

    def __init__(self, queries: int, sets: int = 1):
        super().__init__()
        self.config = SimpleNamespace(num_queries=queries, dim=4)
        self.backbone = nn.Identity()
        self.backbone.channels = (4,)
        self.sets = sets
        self.heard: list[Queries] = []
        # Whole numbers: the rows stay recognisable under prompts that are smaller than one.
        self.rows = 10.0 * torch.arange(1, sets * queries + 1)[:, None].expand(-1, 4)

    def queries(self, batch_size: int) -> Queries:
        position = self.rows.expand(batch_size, -1, -1)
        blocked = separated(len(self.rows), self.sets)
        return Queries(torch.zeros_like(position), position, blocked, self.sets)

    def decode(self, memory: None, queries: Queries) -> Queries:
        self.heard.append(queries)
        return queries

    def predict(self, queries: Queries) -> tuple[Tensor, Tensor, Tensor]:
        return queries.position[None], queries.position[None], queries.position[None]


def listen(images: int, *, sets: int = 1, training: bool = True, **options: Any) -> tuple[UpDetr, Listener]:
    listener = Listener(QUERIES, sets)
    task = UpDetr(listener, patches=PATCHES, reconstruct=False, **options).train(training)
    with torch.no_grad():
        nn.init.zeros_(task.patch_projection.weight)
        nn.init.constant_(task.patch_projection.bias, 0.5)
        task.find(None, torch.zeros(images, PATCHES, 4))
    return task, listener


def shown(listener: Listener) -> Tensor:
    """Which queries were shown their patch: (images, queries)."""
    added = listener.heard[-1].position - listener.rows
    assert ((added == 0) | (added == 0.5)).all()
    return (added != 0).all(-1)


def test_single_queries_are_masked_out():
    task, listener = listen(3000, mask_out=0.3)
    kept = shown(listener)
    assert 1 - kept.float().mean() == pytest.approx(0.3, abs=0.02)
    pairs = kept[:, task.group == 0].float()
    torch.testing.assert_close((pairs[:, 0] * pairs[:, 1]).mean(), torch.tensor(0.49), atol=0.03, rtol=0)
    task.find(None, torch.zeros(3000, PATCHES, 4))
    assert not torch.equal(shown(listener), kept)


def test_whole_patches_are_masked_out():
    task, listener = listen(3000, mask_out=0.3, mask_out_of="patches")
    kept = shown(listener)
    for patch in range(PATCHES):
        own = kept[:, task.group == patch]
        assert torch.equal(own.all(-1), own.any(-1))
        assert 1 - own[:, 0].float().mean() == pytest.approx(0.3, abs=0.03)


def test_sets_of_queries_are_masked_out_alike():
    _, listener = listen(50, sets=2, mask_out=0.5)
    kept = shown(listener)
    assert torch.equal(kept[:, :QUERIES], kept[:, QUERIES:])
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("options", [{"mask_out": 0.9, "training": False}, {"mask_out": 0.0}])
def test_nothing_is_masked_out_in_evaluation_or_where_it_is_off(options: dict[str, Any]):
    assert shown(listen(50, **options)[1]).all()


@pytest.mark.parametrize("sets", [1, 2])
def test_queries_are_exchanged_among_groups_in_training(sets: int):
    task, listener = listen(2, sets=sets, mask_out=0.0, shuffle=True)
    task.find(None, torch.zeros(2, PATCHES, 4))
    orders = [(asked.position[0, :, 0] - 0.5) / 10 for asked in listener.heard]
    for order in orders:
        for one in range(sets):
            part = order[one * QUERIES : (one + 1) * QUERIES]
            assert sorted(part.tolist()) == [one * QUERIES + query + 1 for query in range(QUERIES)]
    assert not torch.equal(*orders)
    task.eval().find(None, torch.zeros(2, PATCHES, 4))
    assert ((listener.heard[-1].position[0, :, 0] - 0.5) / 10).tolist() == list(range(1, sets * QUERIES + 1))


def test_a_frozen_backbone_keeps_nothing():
    task, batch = task_of(), batch_of()
    task.train()
    features = task.describe(batch.patches)
    assert features.grad_fn is None
    assert not features.requires_grad
    memory = task.detector.encode(batch.images, batch.padding)
    assert all(level.grad_fn is None for level in memory.features)
    criterion(task.detector, PATCHES)(run(task, batch), batch.boxes, task.group).total.backward()
    assert all(parameter.grad is None for parameter in task.detector.backbone.parameters())
    for name, parameter in task.named_parameters():
        if not name.startswith("detector.backbone."):
            assert parameter.grad is not None, name


def test_a_trained_backbone_gets_no_gradient_from_the_features_that_are_to_be_told():
    task, batch = task_of(architecture={"frozen_stages": 0}, frozen_backbone=False).train(), batch_of()
    backbone = list(task.detector.backbone.parameters())
    with torch.no_grad():
        memory = task.detector.encode(batch.images, batch.padding)
    features = task.describe(batch.patches)
    assert features.requires_grad
    found = task.find(memory, features.detach())._replace(patch_features=features)
    losses = criterion(task.detector, PATCHES)(found, batch.boxes, task.group)
    losses.values[losses.names.index("feature")].sum().backward()
    assert all(parameter.grad is None for parameter in backbone)
    assert task.reconstruction_head is not None
    assert any(parameter.grad is not None for parameter in task.reconstruction_head.parameters())
    # Through what is shown and where it is looked for, all of it does train.
    criterion(task.detector, PATCHES)(run(task, batch), batch.boxes, task.group).total.backward()
    assert all(parameter.grad is not None for parameter in backbone)


def predicted(boxes: Tensor, logits: Tensor | None = None, told: Tensor | None = None) -> PatchPredictions:
    """Predictions of one layer; without more, all queries are as sure of being a patch."""
    images, queries = boxes.shape[:2]
    logits = torch.zeros(images, queries, 3) if logits is None else logits
    return PatchPredictions(logits[None], boxes[None], None if told is None else told[None], torch.eye(5)[None, :2])


PLACES = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]])


def test_matching_among_all_crosses_groups_and_matching_in_groups_does_not():
    found, group = predicted(PLACES.flip(1)), torch.tensor([0, 1])
    detector = make(num_queries=2)
    crossed = criterion(detector, 2, match="all")(found, PLACES, group)
    stayed = criterion(detector, 2, match="group")(found, PLACES, group)
    l1 = crossed.names.index("l1")
    assert crossed.values[l1].item() == pytest.approx(0.0)
    assert stayed.values[l1].item() == pytest.approx(0.8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matching_in_groups_is_the_best_assignment_that_keeps_to_groups(variant: ModuleType):
    layers, images, queries, patches = 3, 4, 11, 4
    detection = criterion(make(variant), patches).detection
    logits, boxes = torch.randn(layers, images, queries, 3), 0.2 + 0.5 * torch.rand(layers, images, queries, 4)
    places, group = 0.2 + 0.5 * torch.rand(images, patches, 4), group_of_queries(queries, patches)
    targets = PaddedTargets(torch.ones(images, patches, dtype=torch.int64), places, (patches,) * images, tuple("abcd"))
    found = PatchPredictions(logits, boxes, None, torch.zeros(images, patches, 5))
    matches = match_in_groups(detection, found, targets, group)
    overlap = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(places))
    distance = (boxes[..., :, None, :] - places[:, None]).abs().sum(-1)
    cost = detection.cost.classification * detection.classification.cost(logits, targets.labels)
    cost = cost + detection.cost.l1 * distance - detection.cost.giou * overlap
    cost[:, :, group[:, None] != torch.arange(patches)] = 1e6
    for layer in range(layers):
        ours = set(
            zip(matches.image.tolist(), matches.query[layer].tolist(), matches.target[layer].tolist(), strict=True)
        )
        assert ours == {
            (image, int(query), int(target))
            for image in range(images)
            for query, target in zip(*linear_sum_assignment(cost[layer, image].numpy()), strict=True)
        }


@pytest.mark.parametrize("match", ["all", "group"])
def test_fewer_patches_are_matched_with_the_queries_that_were_asked(match: Any):
    task, batch = task_of().eval(), batch_of(patches=2)
    losses = criterion(task.detector, PATCHES, match=match)(run(task, batch), batch.boxes, task.group)
    assert losses.values.shape == (4, 2)
    assert torch.isfinite(losses.values).all()


@pytest.mark.parametrize("match", ["all", "group"])
@pytest.mark.parametrize("field", ["logits", "boxes"])
def test_predictions_that_are_not_finite_are_named(field: str, match: Any):
    task, batch = task_of().eval(), batch_of()
    with torch.no_grad():
        found = run(task, batch)
    getattr(found, field)[0, 1, 2] = math.nan
    with pytest.raises(NonFiniteError, match=r"^image 1 of the batch: "):
        criterion(task.detector, PATCHES, match=match)(found, batch.boxes, task.group)


def test_the_weight_of_no_object_is_tied_to_the_share_of_queries_that_find():
    detector = make(no_object_weight=0.25)
    tied, own = (criterion(detector, PATCHES, tie_no_object=tie).detection.classification for tie in (True, False))
    assert tied == SoftmaxClassification(no_object_weight=PATCHES / QUERIES)
    assert own == SoftmaxClassification(no_object_weight=0.25)
    focal = criterion(make(conditional_detr, focal_alpha=0.4), PATCHES).detection.classification
    assert focal == FocalClassification(alpha=0.4)


@pytest.mark.parametrize(("variant", "classes"), [(detr, 3), (conditional_detr, 2)])
def test_a_patch_is_of_the_last_class(variant: ModuleType, classes: int):
    terms = []
    for label in range(2):
        logits = torch.full((1, 2, classes), -5.0)
        logits[..., label] = 5.0
        losses = criterion(make(variant, num_queries=2), 2)(predicted(PLACES, logits), PLACES, torch.tensor([0, 1]))
        terms.append(losses.values[losses.names.index("class")].item())
    wrong, right = terms
    assert right < 0.01
    assert wrong > 1


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-0.5, 4.0)])
def test_the_reconstruction_is_the_distance_of_directions(factor: float, expected: float):
    told = factor * torch.eye(5)[None, :2]
    loss = criterion(make(num_queries=2), 2, reconstruction_weight=0.5)
    losses = loss(predicted(PLACES, told=told), PLACES, torch.tensor([0, 1]))
    assert losses.names == ("class", "l1", "giou", "feature")
    assert losses.values[3].item() == pytest.approx(expected, abs=1e-6)
    assert losses.weights[3].item() == pytest.approx(0.5 * losses.share)
    without = loss(predicted(PLACES), PLACES, torch.tensor([0, 1]))
    assert without.names == ("class", "l1", "giou")
    assert (losses.total - without.total).item() == pytest.approx(losses.weights[3].item() * expected, abs=1e-5)


def test_sums_are_divided_by_the_patches_of_the_batch_or_as_told():
    found, group = predicted(PLACES + 0.1), torch.tensor([0, 1])
    loss = criterion(make(num_queries=2), 2)
    l1 = [loss(found, PLACES, group, count).values[1].item() for count in (None, 2.0, 8.0)]
    assert l1 == pytest.approx([0.4, 0.4, 0.1])


def test_sets_of_queries_share_the_weights():
    task, batch = task_of(architecture={"query_groups": 2}).train(), batch_of()
    losses = criterion(task.detector, PATCHES, match="group")(run(task, batch), batch.boxes, task.group)
    assert losses.values.shape == (4, 4)  # terms, layers of both sets
    assert losses.weights[3].item() == pytest.approx(0.5)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The smallest variant that there can be, made a part of the package."""
    folder = tmp_path / "variants"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[1] / "contracts" / "toy.py", folder / "toy.py")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    yield models.variant("toy")
    sys.modules.pop("detrkit.models.toy", None)
    delattr(models, "toy")


def test_any_variant_with_queries_and_a_decoder_trains(toy: ModuleType):
    detector = toy.Model(toy.Config(num_classes=2))
    task, batch = UpDetr(detector, patches=2, mask_out=0.0).train(), batch_of(patches=2)
    loss = criterion(detector, 2, match="group")
    optimizer = torch.optim.AdamW([x for x in task.parameters() if x.requires_grad], lr=1e-2)
    totals = []
    for _ in range(8):
        optimizer.zero_grad()
        total = loss(run(task, batch), batch.boxes, task.group).total
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def official_checkpoint(task: UpDetr) -> dict[str, Tensor]:
    state = official_state(task.detector)
    for name, value in task.state_dict().items():
        for ours, theirs in (("patch_projection.", "patch2query."), ("reconstruction_head.", "feature_align.")):
            if name.startswith(ours):
                state[name.replace(ours, theirs)] = value.clone()
    return state


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("reconstruct", [True, False])
def test_official_checkpoints_are_read(reconstruct: bool):
    task = task_of(architecture={"backbone": "resnet18", "heads": 8}, reconstruct=reconstruct)
    state = official_checkpoint(task)
    assert ("feature_align.layers.0.weight" in state) == reconstruct
    read = UpDetr.from_official({"model": state, "epoch": 60}, patches=2, mask_out=0.2)
    assert (read.patches, read.mask_out) == (2, 0.2)
    assert (read.reconstruction_head is not None) == reconstruct
    own, theirs = read.state_dict(), task.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.usefixtures("narrow")
def test_official_checkpoints_that_are_no_pre_training_are_refused():
    task = task_of(architecture={"backbone": "resnet18", "heads": 8})
    state = official_checkpoint(task)
    with pytest.raises(ModelError, match=r"no pre-training.*patch2query.*--init"):
        UpDetr.from_official({name: x for name, x in state.items() if not name.startswith(("patch2", "feature_"))})
    torn = {name: x for name, x in state.items() if name != "patch2query.bias"}
    with pytest.raises(ModelError, match=r"missing: patch_projection\.bias"):
        UpDetr.from_official(torn, patches=PATCHES)


def test_impossible_tasks_are_refused():
    with pytest.raises(UsageError, match=r"mask_out.*got 1\.0"):
        UpDetr(make(), patches=PATCHES, mask_out=1.0)
    with pytest.raises(UsageError, match="8 groups for 7 queries"):
        UpDetr(make(), patches=8)
    task, batch = task_of(), batch_of(patches=4)
    with pytest.raises(UsageError, match=r"More patches than groups of queries.*got 4.*≤ 3"):
        run(task, batch)
