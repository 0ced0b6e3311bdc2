"""Barlow Twins against a loop over its equation, its figures against counts by hand, and that it learns."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from detrkit.data.dataset import Key
from detrkit.data.pictures import open_pictures
from detrkit.data.views import ViewAugmentation, ViewDataset
from detrkit.errors import UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.nn.backbone import Backbone, build_backbone
from detrkit.nn.weights import load_backbone_weights
from detrkit.pretrain.backbone import (
    EPSILON,
    BarlowTwins,
    Embeddings,
    RedundancyReduction,
    ViewFigures,
    alarms,
    conclusion,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nano(name: str = "resnet-nano", seed: int = 0) -> Backbone:
    backbone = build_backbone(name, levels=(8, 32) if name == "resnet-nano" else (32,), frozen_stages=0)
    load_backbone_weights(backbone, name, "random", generator=torch.Generator().manual_seed(seed))
    return backbone


def figures_of(first: Tensor, second: Tensor) -> dict[str, float]:
    figures = ViewFigures()
    figures.add(first, second, tuple(map(str, range(len(first)))))
    return figures.result()


def test_loss_is_that_of_equation_1():
    first, second, weight = random(6, 4), random(6, 4, seed=1) * 3 + 2, 0.3
    columns = []
    for embedding in (first, second):
        mean = embedding.mean(0)
        deviation = ((embedding - mean) ** 2).mean(0).add(EPSILON).sqrt()
        columns.append(((embedding - mean) / deviation).tolist())
    invariance = redundancy = 0.0
    for i in range(4):
        for j in range(4):
            c = sum(columns[0][b][i] * columns[1][b][j] for b in range(6)) / 6
            if i == j:
                invariance += (1 - c) ** 2 / 4
            else:
                redundancy += c**2 / 4
    losses = RedundancyReduction(weight)(Embeddings(first, second))
    assert losses.names == ("invariance", "redundancy")
    assert losses.values.shape == (2, 1)
    assert losses.values[:, 0].tolist() == pytest.approx([invariance, redundancy], rel=1e-5)
    assert float(losses.total) == pytest.approx(invariance + weight * redundancy, rel=1e-5)


def test_loss_knows_no_scale_and_is_zero_for_the_identity():
    views = Embeddings(random(8, 3), random(8, 3, seed=1))
    scaled = Embeddings(views.first * 100 + 5, views.second * 50)
    criterion = RedundancyReduction(0.1)
    assert float(criterion(views).total) == pytest.approx(float(criterion(scaled).total), abs=1e-3)
    hadamard = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert float(criterion(Embeddings(hadamard, hadamard)).total) == pytest.approx(0, abs=1e-6)


def test_an_embedding_that_is_constant_costs_all_and_has_finite_gradients():
    first = torch.ones(4, 3, requires_grad=True)
    losses = RedundancyReduction(0.1)(Embeddings(first, torch.ones(4, 3)))
    losses.total.backward()
    assert losses.values[:, 0].tolist() == [1, 0]
    assert first.grad is not None
    assert bool(first.grad.isfinite().all())


def test_loss_is_computed_in_single_precision():
    views = Embeddings(random(8, 3).bfloat16(), random(8, 3, seed=1).bfloat16())
    assert RedundancyReduction(0.1)(views).values.dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet-nano", "resnet18", "mobilenet_v2"])
def test_gradients_reach_every_weight_of_the_backbone(name):
    torch.manual_seed(0)
    task = BarlowTwins(nano(name), width=32)
    found = task(random(4, 3, 64, 64), random(4, 3, 64, 64, seed=1))
    assert found.first.shape == found.second.shape == (4, 32)
    RedundancyReduction(0.1)(found).total.backward()
    for key, parameter in task.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert float(parameter.grad.abs().max()) > 0, key


def test_views_are_embedded_apart_and_images_of_a_view_together():
    torch.manual_seed(0)
    task, first, second = BarlowTwins(nano(), width=16), random(4, 3, 64, 64), random(4, 3, 64, 64, seed=1)
    found, other = task(first, second), task(first, second.flip(0) * 2)
    torch.testing.assert_close(found.first, other.first)
    assert not torch.allclose(found.second, other.second.flip(0))
    torch.testing.assert_close(task(second, first).second, found.first, atol=1e-5, rtol=1e-4)


def test_the_task_keeps_no_averages_and_describes_images_one_by_one():
    task, images = BarlowTwins(nano(), width=16), random(4, 3, 64, 64)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    task(images, images)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert set(before) == {key for key, _ in task.named_parameters()}
    described = task.describe(images)
    torch.testing.assert_close(described, task.backbone(images)[-1].mean((2, 3)))
    torch.testing.assert_close(task.describe(images[2:3]), described[2:3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet-nano", "resnet18", "mobilenet_v2"])
def test_trained_weights_serve_as_weights_of_a_backbone(name, tmp_path):
    task = BarlowTwins(nano(name), width=16)
    file = tmp_path / "weights.safetensors"
    save_file(task.backbone.state_dict(), file)
    again = build_backbone(name)
    load_backbone_weights(again, name, file)
    images = random(1, 3, 64, 64)
    torch.testing.assert_close(again(images)[-1], task.backbone(images)[-1])


def test_what_cannot_train_is_refused():
    with pytest.raises(UsageError, match="Nothing of the backbone trains"):
        BarlowTwins(build_backbone("resnet-nano", frozen_stages=5))
    with pytest.raises(UsageError, match="width"):
        BarlowTwins(nano(), width=1)
    with pytest.raises(UsageError, match="batch_size"):
        BarlowTwins(nano(), width=16)(random(1, 3, 64, 64), random(1, 3, 64, 64))


def test_retrieval_counts_images_whose_views_are_nearest():
    first = torch.eye(4) * 5
    assert figures_of(first, first)["retrieval"] == 1
    assert figures_of(first, first[[0, 1, 3, 2]])["retrieval"] == 0.5
    assert figures_of(first, first.roll(1, 0))["retrieval"] == 0
    assert figures_of(first, first)["chance"] == 0.25


def test_mean_rank_is_the_share_of_others_that_are_nearer():
    angles = torch.tensor([0.0, 0.3, 0.7, 1.2, 2.0])
    first = torch.stack([angles.cos(), angles.sin()], 1)
    first = torch.cat([first, -first])  # mean 0, and both features vary alike after all
    assert figures_of(first, first)["mean_rank"] == 0
    assert figures_of(first, -first)["mean_rank"] == 1, "what is opposite is the farthest of all"
    second = first.roll(1, 0)
    both = torch.cat([first, second]).double()
    gallery, asked = ((both - both.mean(0)) / both.std(0)).chunk(2)
    ranks = []
    for own, view in enumerate(asked):
        near = [float(view @ other / other.norm()) for other in gallery]
        ranks.append(sum(one > near[own] for one in near) / (len(near) - 1))
    assert figures_of(first, second)["mean_rank"] == pytest.approx(np.mean(ranks))
    assert 0.1 < np.mean(ranks) < 0.9
    unrelated = figures_of(random(400, 16), random(400, 16, seed=1))
    assert unrelated["mean_rank"] == pytest.approx(0.5, abs=0.05)


def test_retrieval_does_not_hang_on_the_scale_of_a_feature():
    code = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    noise = 1000 * random(8, 1).sign()  # large, and other in each view
    first, second = (torch.cat([view, code * 10, code * 10], 1) for view in noise.chunk(2))
    assert figures_of(first, second)["retrieval"] == 1


def test_features_that_say_nothing_are_right_by_chance():
    for constant in (torch.full((8, 5), 3.3), torch.zeros(8, 5)):
        figures = figures_of(constant, constant)
        nothing = {"retrieval": 1 / 8, "chance": 1 / 8, "mean_rank": 0.5, "feature_rank": 0, "feature_spread": 0}
        assert figures == pytest.approx(nothing)
    pair = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert figures_of(pair, pair)["retrieval"] == 0.5
    assert figures_of(pair, pair)["mean_rank"] == pytest.approx(1 / 6), "one of three others is as near"


def test_retrieval_among_many_images_is_that_of_the_whole_table():
    first = random(1500, 6)
    second = first + 0.3 * random(1500, 6, seed=1)
    both = torch.cat([first, second]).double()
    gallery, asked = ((both - both.mean(0)) / both.std(0)).chunk(2)
    cosine = (asked @ gallery.T) / asked.norm(dim=1)[:, None] / gallery.norm(dim=1)
    expected = (cosine.argmax(1) == torch.arange(1500)).double().mean()
    figures, nearer = figures_of(first, second), (cosine > cosine.diagonal()[:, None]).double().sum(1).mean()
    assert figures["retrieval"] == pytest.approx(float(expected), abs=2e-3)
    assert figures["mean_rank"] == pytest.approx(float(nearer) / 1499, abs=1e-4)
    assert 0.1 < expected < 0.9


def test_rank_goes_from_one_direction_to_all():
    line = random(50, 1) * random(1, 8, seed=1) + 2
    assert figures_of(line, line)["feature_rank"] == pytest.approx(0, abs=1e-3)
    basis = torch.linalg.qr(random(50, 9))[0]
    alike = basis[:, 1:] - basis[:, 1:].mean(0)
    assert figures_of(alike, alike)["feature_rank"] == pytest.approx(1, abs=0.02)
    plane = alike.clone()
    plane[:, 3:] = 0
    assert figures_of(plane, plane)["feature_rank"] == pytest.approx(2 / 7, abs=0.02)
    wide = figures_of(random(5, 300), random(5, 300))["feature_rank"]
    assert wide == pytest.approx(1, abs=0.05)


def test_spread_is_the_mean_distance_of_different_images():
    first = random(6, 4) + 1
    cosines = torch.nn.functional.cosine_similarity(first[:, None], first[None], dim=-1)
    expected = float(1 - cosines[~torch.eye(6, dtype=torch.bool)].mean())
    assert figures_of(first, first)["feature_spread"] == pytest.approx(expected, abs=1e-6)


def test_figures_do_not_depend_on_batches_and_processes():
    first, second = random(9, 5), random(9, 5) + 1.5 * random(9, 5, seed=1)
    whole, parts = figures_of(first, second), [ViewFigures(), ViewFigures(), ViewFigures()]
    for number, part in enumerate(parts[:2]):
        for row in range(number, 9, 2):
            part.add(first[row : row + 1], second[row : row + 1], ("x",))
    merged = ViewFigures.merged([pickle.loads(pickle.dumps(part)) for part in parts])
    assert merged.images == 9
    assert merged.result() == pytest.approx(whole, abs=1e-6)
    assert 0 < whole["retrieval"] < 1


def test_too_few_images_give_no_figures_and_bad_ones_are_named():
    for count in (0, 1):
        figures = figures_of(random(count, 5), random(count, 5))
        assert all(map(math.isnan, figures.values()))
        assert alarms(figures) == []
        assert "not known" in conclusion(figures, figures, count)
    features = random(3, 5)
    features[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^b\.jpg: "):
        ViewFigures().add(random(3, 5), features, ("a.jpg", "b.jpg", "c.jpg"))


def test_alarms_are_raised_for_a_collapse_and_for_nothing_else():
    healthy = random(64, 32)
    assert alarms(figures_of(healthy, healthy + 0.1 * random(64, 32, seed=1))) == []
    constant = torch.ones(64, 32) + 1e-4 * healthy
    assert any("all images look alike" in alarm for alarm in alarms(figures_of(constant, constant)))
    line = random(64, 1, seed=2) * random(1, 32, seed=3)
    assert any("of the directions" in alarm for alarm in alarms(figures_of(line, line)))
    [unrelated] = alarms(figures_of(healthy, random(64, 32, seed=1)))
    assert "Views are not recognised" in unrelated
    assert "chance is 2 %; another image is nearer in " in unrelated
    assert alarms({}) == []


@pytest.mark.parametrize(
    ("images", "retrieval", "mean_rank", "recognised"),
    [
        (10, 0.3, 0.1, True),  # three of ten at once, the others nearly
        (10, 0.3, 0.24, False),  # that can be chance: a standard error is 0.09
        (10, 0.3, 0.45, False),
        (4, 0.25, 0.05, True),
        (4, 0.25, 0.15, False),
        (2, 0.5, 0.5, False),
        (200, 0.01, 0.12, True),
        (200, 0.01, 0.3, False),  # no chance, but too little
        (200, 0.3, 0.5, True),
        (200, 0.01, math.nan, False),
    ],
)
def test_few_images_are_judged_by_their_ranks_too(images, retrieval, mean_rank, recognised):
    figures = {"retrieval": retrieval, "chance": 1 / images, "mean_rank": mean_rank, "feature_spread": 0.1}
    assert (not alarms(figures)) == recognised
    said = conclusion(figures, figures, images)
    assert ("It has not learnt" not in said) == recognised
    assert ("is nearer in" in said) == (not math.isnan(mean_rank))


def test_ranks_tell_whether_it_has_become_better():
    start = {"retrieval": 0.2, "chance": 0.05, "mean_rank": 0.3, "feature_rank": 0.3, "feature_spread": 0.1}
    better, worse = {**start, "mean_rank": 0.05}, {**start, "mean_rank": 0.7}
    said = conclusion(start, better, 20, before=start)
    assert "it was 20 % at the first evaluation; another image is nearer in 5 % of all cases (chance: 50 %)." in said
    assert "no clear gain" not in said
    assert "still rising" in said
    assert "has become worse" in conclusion(start, worse, 20)
    assert "no clear gain" in conclusion(start, {**start, "mean_rank": 0.28}, 20)
    assert "no clear gain" in conclusion(start, {**worse, "retrieval": 0.9}, 20), "one better, the other worse"


def test_conclusion_says_what_was_reached():
    start = {"retrieval": 0.2, "chance": 0.01, "feature_rank": 0.3, "feature_spread": 0.1}
    good = {**start, "retrieval": 0.7}
    said = conclusion(start, good, 100, before={**start, "retrieval": 0.5})
    assert said.startswith(
        "On 100 held-out images the backbone recognises 70 % in another view (chance: 1 %); it was 20 %"
    )
    assert "still rising" in said
    assert "only its own training can tell" in said
    assert "still rising" not in conclusion(start, good, 100, before=good)
    assert "first evaluation" not in conclusion(good, good, 100)
    assert "no clear gain" in conclusion(start, {**start, "retrieval": 0.22}, 100)
    assert "no clear gain" not in conclusion(start, {**start, "retrieval": 0.22}, 100_000)
    assert "worse" in conclusion(good, start, 100)
    chance = conclusion(start, {**start, "retrieval": 0.02}, 100)
    assert chance.startswith("It has not learnt to recognise images.")
    collapsed = conclusion(start, {**good, "feature_spread": 1e-5}, 100)
    assert collapsed.startswith("It has failed.")
    assert "Do not use these weights" in collapsed


def textures(folder: Path, count: int) -> None:
    """Pictures of gratings and blobs, each with a period, an angle and a pattern of its own."""
    rows, columns = np.mgrid[:48, :48]
    for index in range(count):
        angle, period = math.pi * (index % 4) / 4, (4, 7, 11, 16)[index // 4 % 4]
        across = rows * math.cos(angle) + columns * math.sin(angle)
        along = rows * -math.sin(angle) + columns * math.cos(angle)
        wave = np.sin(2 * math.pi * across / period) * (np.cos(2 * math.pi * along / 9) if index % 2 else 1)
        grey = (127 + 100 * wave).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / f"{index:02d}.png")


def test_a_few_steps_teach_to_tell_textures_apart(tmp_path):
    textures(tmp_path, 16)
    pictures = open_pictures(tmp_path)
    augmentation = ViewAugmentation(size=32, smallest=0.5, flip=0.0, blur=0.0, grayscale=0.0)
    torch.manual_seed(0)
    task, criterion = BarlowTwins(nano(), width=64), RedundancyReduction(0.02)

    def load(seed: int, epoch: int, *, evaluation: bool = False) -> tuple[Tensor, Tensor]:
        views = ViewDataset(pictures, augmentation, seed, evaluation=evaluation)
        items = [views[Key(epoch, index)] for index in range(16)]
        return torch.stack([item.first for item in items]), torch.stack([item.second for item in items])

    @torch.no_grad()
    def retrieval() -> float:
        trials = [load(seed, 0, evaluation=True) for seed in range(6)]
        return float(np.mean([figures_of(*map(task.describe, views))["retrieval"] for views in trials]))

    before, optimizer = retrieval(), torch.optim.AdamW(task.parameters(), lr=1e-3)
    totals = []
    for epoch in range(24):
        losses = criterion(task(*load(0, epoch)))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total.detach()))
    assert np.mean(totals[-5:]) < 0.7 * np.mean(totals[:5])
    assert retrieval() > before + 0.1
