"""Groups, rates, clipping and accumulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from training.drawing import tiny_recipe

from detrkit.errors import UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.structures import Batch, Target
from detrkit.training.detection import DetectionSession
from detrkit.training.distributed import World
from detrkit.training.loop import optimize
from detrkit.training.optimizer import make_optimizer, note_on_warmup, rate_factor, set_rates
from detrkit.training.recipe import OptimizationOptions
from detrkit.training.setup import prepare


def session_of(data: Path, **fields: Any) -> DetectionSession:
    return prepare(tiny_recipe(**fields), data, World())


def batch_of(counts: list[int], seed: int = 0, size: int = 64) -> Batch:
    rng = np.random.default_rng(seed)
    images = [torch.from_numpy(rng.standard_normal((3, size, size))).float() for _ in counts]
    targets = [
        Target(torch.from_numpy(rng.integers(0, 3, count)), torch.from_numpy(rng.uniform(0.2, 0.6, (count, 4))).float())
        for count in counts
    ]
    return Batch.from_images(images, targets)


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def weights(session: DetectionSession) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in session.model.state_dict().items()}


def test_backbone_and_rest_have_their_own_rates(drawn: Path) -> None:
    session = session_of(drawn, lr=3e-4, backbone_lr=2e-5, weight_decay=0.01)
    rest, backbone = session.optimizer.param_groups
    assert (rest["lr"], rest["base_lr"], backbone["lr"], backbone["base_lr"]) == (3e-4, 3e-4, 2e-5, 2e-5)
    assert rest["weight_decay"] == backbone["weight_decay"] == 0.01
    named = dict(session.model.named_parameters())
    of_backbone = {id(parameter) for name, parameter in named.items() if name.startswith("backbone.")}
    assert {id(parameter) for parameter in backbone["params"]} == of_backbone
    assert {id(parameter) for parameter in rest["params"]} == {id(p) for p in named.values()} - of_backbone
    set_rates(session.optimizer, 0.5)
    assert [group["lr"] for group in session.optimizer.param_groups] == [1.5e-4, 1e-5]


def test_a_backbone_rate_of_zero_freezes_it(drawn: Path) -> None:
    session = session_of(drawn, backbone_lr=0.0, weight_decay=0.5)
    assert any("starts at random and does not train" in note for note in session.notes)
    assert not any("does not train" in note for note in session_of(drawn, freeze="encoder").notes)
    before = weights(session)
    optimize(session, session.model, no_scaler(), [batch_of([2, 1])])
    assert len(session.optimizer.param_groups) == 1
    after = weights(session)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} <= same
    assert {"projection.weight", "class_head.weight", "query_position"}.isdisjoint(same)


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("backbone", ("backbone.",)),
        ("encoder", ("encoder.",)),
        ("decoder", ("decoder_layers.", "decoder_norm.")),
        (" backbone, decoder_norm,query_position", ("backbone.", "decoder_norm.", "query_position")),
    ],
)
def test_frozen_parts_do_not_train(drawn: Path, freeze: str, frozen: tuple[str, ...]) -> None:
    session = session_of(drawn, freeze=freeze, weight_decay=0.5)
    before = weights(session)
    optimize(session, session.model, no_scaler(), [batch_of([2, 1])])
    after = weights(session)
    parameters = dict(session.model.named_parameters())
    same = {name for name in parameters if torch.equal(before[name], after[name])}
    assert same == {name for name in parameters if name.startswith(frozen)} | _frozen_anyway(session)
    assert all(parameters[name].grad is None for name in same)
    said = next(note for note in session.notes if note.startswith("Model "))
    assert f"M of them trained ({', '.join(part.strip() for part in freeze.split(','))} frozen), images" in said


def _frozen_anyway(session: DetectionSession) -> set[str]:
    fresh = type(session.model)(session.model.config)
    return {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}


def test_a_frozen_backbone_keeps_no_activations(drawn: Path) -> None:
    session = session_of(drawn, freeze="backbone")
    features = session.model.backbone(torch.zeros(1, 3, 64, 64))
    assert not any(level.requires_grad for level in features)


def test_what_cannot_be_frozen_is_refused(drawn: Path) -> None:
    with pytest.raises(UsageError, match=r"freeze: .*no such part to freeze; got 'backbon'; expected .*") as caught:
        session_of(drawn, freeze="encoder,backbon")
    known = caught.value.expected.split(", ")
    assert {"backbone", "encoder", "decoder", "decoder_layers", "class_head", "query_position"} <= set(known)
    with pytest.raises(UsageError, match="Nothing is left to train"):
        session_of(drawn, freeze=",".join(known))


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({"schedule": "constant"}, 0, 1.0),
        ({"schedule": "constant"}, 29, 1.0),
        ({"schedule": "step"}, 19, 1.0),
        ({"schedule": "step"}, 20, 0.1),
        ({"schedule": "step", "drop_at": 0.5}, 15, 0.1),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 10, 0.75),
        ({"schedule": "cosine"}, 15, 0.5),
        ({"schedule": "cosine"}, 29, (1 + math.cos(math.pi * 29 / 30)) / 2),
        ({"schedule": "constant", "warmup": 4}, 0, 0.2),
        ({"schedule": "constant", "warmup": 4}, 3, 0.8),
        ({"schedule": "constant", "warmup": 4}, 4, 1.0),
        ({"schedule": "cosine", "warmup": 19}, 10, 0.75 * 11 / 20),
    ],
)
def test_the_rate_at_a_step_of_thirty(options: dict[str, Any], step: int, expected: float) -> None:
    assert rate_factor(step, 30, OptimizationOptions(**options)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total", "told"), [(0, 10, False), (4, 9, False), (5, 10, True), (200, 68, True)])
def test_a_training_that_is_mostly_warm_up_is_told_so(warmup: int, total: int, told: bool) -> None:
    said = note_on_warmup(total, OptimizationOptions(warmup=warmup))
    assert bool(said) == told
    if told:
        assert f"during {warmup} steps, and the training has {total}" in said[0]


def test_the_rate_is_what_the_weights_move_by(drawn: Path) -> None:
    """AdamW's first step is the rate itself, wherever the gradient is not tiny."""
    session = session_of(drawn, lr=1e-3, weight_decay=0.0, clip=0.0)
    before = session.model.class_head.weight.detach().clone()
    set_rates(session.optimizer, 0.25)
    optimize(session, session.model, no_scaler(), [batch_of([2, 3])])
    moved = (session.model.class_head.weight.detach() - before).abs()
    assert float(moved.median()) == pytest.approx(0.25e-3, rel=1e-3)


@pytest.mark.parametrize(("clip", "limit"), [(0.1, 0.1), (0.0, math.inf)])
def test_clipping(drawn: Path, clip: float, limit: float) -> None:
    session = session_of(drawn, clip=clip)
    figures = optimize(session, session.model, no_scaler(), [batch_of([2, 3])]).values
    gradients = torch.cat([p.grad.flatten() for p in session.model.parameters() if p.grad is not None])
    reported = float(figures[-1])
    assert reported > 1  # before clipping
    assert float(gradients.norm()) == pytest.approx(min(reported, limit), rel=1e-4)


def accumulated_and_whole(drawn: Path, counts: list[int], **fields: Any) -> tuple[float, float]:
    """Largest difference of gradients, and of figures, between one batch of four and two of two."""
    fields.setdefault("architecture", {})["dropout"] = "0.0"
    figures, gradients = [], []
    whole = batch_of(counts)
    for parts in (
        [whole],
        [Batch(whole.images[s], whole.padding[s], whole.targets[s]) for s in (slice(2), slice(2, 4))],
    ):
        session = session_of(drawn, clip=0.0, **fields)
        figures.append(optimize(session, session.model, no_scaler(), parts).values)
        gradients.append(torch.cat([p.grad.flatten() for p in session.model.parameters() if p.grad is not None]))
    return (
        float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()),
        float((figures[0] - figures[1]).abs().max()),
    )


def test_accumulated_batches_equal_one_large_batch_where_images_hold_equally_many_boxes(drawn: Path) -> None:
    gradient, figure = accumulated_and_whole(drawn, [2, 2, 2, 2])
    assert gradient < 1e-6
    assert figure < 1e-4  # norm and losses are of the order of ten


@pytest.mark.parametrize("counts", [[1, 0, 8, 5], [0, 0, 0, 1]])
@pytest.mark.parametrize("model", ["conditional-detr-nano", "detr-nano"])
def test_each_box_weighs_the_same_in_whichever_batch_of_a_step_it_is(
    drawn: Path, model: str, counts: list[int]
) -> None:
    """DETR's class term alone is a mean of its own in every batch, as it is in every process."""
    without_classes = {} if model.startswith("conditional") else {"class_weight": "0.0"}
    gradient, figure = accumulated_and_whole(drawn, counts, model=model, architecture=without_classes)
    assert gradient < 1e-5
    assert figure < 1e-3 or without_classes


class Crowd(World):
    """Processes of which the others hold three times as many boxes as this one."""

    def mean_of(self, numbers: Sequence[float], device: torch.device) -> Sequence[float]:
        return [number * 2 for number in numbers]


def test_box_terms_are_divided_by_the_mean_number_of_boxes_over_all_processes(drawn: Path) -> None:
    session = session_of(drawn, architecture={"dropout": "0.0"})
    crowded = dataclasses.replace(session, world=Crowd())
    batch = batch_of([2, 1])
    alone = session.losses(session.model, batch, session.shared([batch])).values
    among = crowded.losses(crowded.model, batch, crowded.shared([batch])).values
    torch.testing.assert_close(among[1:], alone[1:] / 2)
    torch.testing.assert_close(among[0], alone[0])


def test_gradients_travel_once_a_step(drawn: Path, tmp_path: Path) -> None:
    """A hook of torch's is called for each part of the gradients that travels."""
    session, travelled = session_of(drawn), list[int]()

    def travel(bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        travelled.append(bucket.index())
        done = torch.futures.Future[Tensor]()
        done.set_result(bucket.buffer())
        return done

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped: Any = World(size=2).wrap(session.model, session.device)
        wrapped.register_comm_hook(None, lambda state, bucket: travel(bucket))
        optimize(session, wrapped, no_scaler(), [batch_of([2, 1], seed) for seed in range(3)])
    finally:
        distributed.destroy_process_group()
    assert not wrapped.will_sync_module_buffers()
    assert travelled
    assert len(travelled) == len(set(travelled))


def test_fp16_scales_the_loss_and_skips_steps_that_overflow(drawn: Path) -> None:
    session = session_of(drawn, precision="fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(session)
    figures = optimize(session, session.model, scaler, [batch_of([2, 1])]).values
    assert not math.isfinite(float(figures[-1]))
    assert math.isfinite(float(figures[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
    assert scaler.get_scale() == 2.0**39
    scaler.update(2.0**4)
    figures = optimize(session, session.model, scaler, [batch_of([2, 1])]).values
    assert math.isfinite(float(figures[-1]))
    assert not torch.equal(session.model.class_head.weight, before["class_head.weight"])


def test_fp16_clips_and_reports_the_gradient_itself_and_not_the_scaled_one(drawn: Path) -> None:
    norms = []
    for precision, scaler in (("fp32", no_scaler()), ("fp16", torch.amp.GradScaler("cpu", init_scale=2.0**6))):
        session = session_of(drawn, precision=precision, clip=0.1, architecture={"dropout": "0.0"})
        figures = optimize(session, session.model, scaler, [batch_of([2, 1])]).values
        gradients = torch.cat([p.grad.flatten() for p in session.model.parameters() if p.grad is not None])
        assert float(gradients.norm()) == pytest.approx(0.1, rel=1e-3)
        norms.append(float(figures[-1]))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_images_without_boxes_give_a_finite_step(drawn: Path) -> None:
    session = session_of(drawn)
    figures = optimize(session, session.model, no_scaler(), [batch_of([0, 0])]).values
    assert bool(torch.isfinite(figures).all())
    assert float(figures[3]) == float(figures[4]) == 0  # no box, no box term


def test_more_boxes_than_queries_give_a_finite_step(drawn: Path) -> None:
    session = session_of(drawn)
    figures = optimize(session, session.model, no_scaler(), [batch_of([12, 1])]).values
    assert bool(torch.isfinite(figures).all())


def test_options_are_read_from_the_recipe() -> None:
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    optimizer = make_optimizer(model, dataclasses.replace(OptimizationOptions(), lr=1.0, backbone_lr=0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(drawn: Path) -> None:
    session = session_of(drawn)
    session.model.class_head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="gradient are NaN or infinite"):
        optimize(session, session.model, no_scaler(), [batch_of([2, 3])])
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
