"""From examples to scored places: squares of one colour are found among squares of others."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from one_shot.squares import draw, shown, small
from torch import Tensor
from torch.nn import functional as F

from detrkit.boxes import pairwise_iou
from detrkit.data.transforms import to_tensor
from detrkit.errors import UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.one_shot.finder import KINSHIP, Finder, Shown, Sought, _even, seek

EXAMPLE = draw([("red", 8, 12), ("blue", 80, 50)], seed=1)
SCENE_SQUARES = [("red", 10, 8), ("blue", 92, 10), ("red", 60, 62), ("blue", 12, 66)]
SCENE = draw(SCENE_SQUARES, seed=2)


@pytest.fixture
def raw() -> Finder:
    """Features of a random backbone, compared at windows."""
    torch.manual_seed(3)
    return Finder(small(config={"stride": 8}, width=0, prompted=False, cells=2), "windows")


def truth(picture, squares, colour: str, side: int = 24) -> Tensor:
    """The boxes of the squares of a colour, xyxy in [0, 1]."""
    width, height = picture.size
    corners = [(x, y, x + side, y + side) for name, x, y in squares if name == colour]
    return torch.tensor(corners) / torch.tensor([width, height, width, height])


def adapted(finder: Finder) -> Finder:
    return finder.adapted([to_tensor(SCENE), to_tensor(EXAMPLE)])


def found(finder: Finder, sought: Sought, picture=SCENE):
    (scored,) = finder.search(to_tensor(picture), [sought])
    return scored


def best_at(scored, boxes: Tensor, iou: float = 0.5) -> list[float]:
    """The best score of what overlaps each box by so much; 0 where nothing does."""
    overlaps = pairwise_iou(scored.boxes, boxes) > iou
    return [float(scored.scores[column].max()) if column.any() else 0.0 for column in overlaps.T]


def test_one_example_finds_all_of_its_colour_and_no_other(raw: Finder):
    finder = adapted(raw)
    scored = found(finder, seek(finder.show(*shown(EXAMPLE, 8, 12))))
    right = best_at(scored, truth(SCENE, SCENE_SQUARES, "red"))
    wrong = best_at(scored, truth(SCENE, SCENE_SQUARES, "blue"))
    assert min(right) > 0.5 > max(wrong)
    assert pairwise_iou(scored.boxes[:2], truth(SCENE, SCENE_SQUARES, "red")).amax(0).min() > 0.6
    assert (scored.scores.diff() <= 0).all()
    assert scored.boxes.min() >= 0
    assert scored.boxes.max() <= 1 + 1e-6
    assert not scored.labels.any()


def test_many_things_are_looked_for_in_an_image_that_is_encoded_once(raw: Finder, monkeypatch: pytest.MonkeyPatch):
    model = small()
    calls: list[tuple[int, ...]] = []
    encode = model.detector.encode
    monkeypatch.setattr(model.detector, "encode", lambda images, padding: calls.append(1) or encode(images, padding))
    finder = Finder(model, "both")
    example = finder.show(*shown(EXAMPLE, 8, 12))
    calls.clear()
    things = [seek(Shown(example.prompts + shift, example.looks, example.sizes)) for shift in torch.randn(10, 1, 32)]
    answers = finder.search(to_tensor(SCENE), things)
    assert len(calls) == 1
    assert [set(one.labels.tolist()) for one in answers] == [{number} for number in range(10)]
    for number, one in list(enumerate(answers))[::4]:  # each thing's answer is its own, whatever else is asked
        (alone,) = finder.search(to_tensor(SCENE), [things[number]])
        torch.testing.assert_close(one.boxes, alone.boxes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.scores, alone.scores, atol=1e-4, rtol=1e-4)


def test_windows_need_no_decoder(raw: Finder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw.model.detector, "encode", None)
    assert len(found(raw, seek(raw.show(*shown(EXAMPLE, 8, 12)))).boxes)


@pytest.mark.parametrize("candidates", ["queries", "windows", "both"])
def test_scores_say_what_model_and_likeness_say(candidates: str):
    model = small()
    finder = Finder(model, candidates, overlap=1.0)
    image, box = shown(EXAMPLE, 8, 12)
    sought = seek(finder.show(image, box))
    scored = found(finder, sought)
    if candidates != "windows":
        picture = to_tensor(SCENE)[None]
        inputs = torch.cat([picture, image[None]])
        with torch.inference_mode():
            told = model(
                inputs, torch.zeros(2, *image.shape[1:], dtype=torch.bool), torch.tensor([0]), torch.tensor([1]), box
            )
        expected = told.logits[-1, 0, :, model.matched].sigmoid()
        for score in expected:
            assert (scored.scores - score).abs().min() < 1e-4
    with torch.inference_mode():
        ((windows, _),) = finder._windows(finder._encode(to_tensor(SCENE)), sought, (96, 128))
    count = len(windows) * (candidates != "queries") + model.detector.config.num_queries * (candidates != "windows")
    assert len(scored.scores) == count


def test_more_than_a_hundred_are_found(raw: Finder):
    squares = [("red", x, y) for y in range(4, 340, 40) for x in range(4, 600, 40)]
    scene = draw(squares, seed=1, size=(360, 640))
    finder = raw.adapted([to_tensor(scene)])
    (sought,) = finder.level([to_tensor(scene)], [seek(finder.show(*shown(scene, 4, 4)))])
    boxes = truth(scene, squares, "red")
    assert len(boxes) == 135
    assert (torch.tensor(best_at(found(finder, sought, scene), boxes)) > 0.5).sum() > 120


def test_each_of_many_queries_answers():
    finder = Finder(small(config={"num_queries": 130}), overlap=1.0)
    assert len(found(finder, seek(finder.show(*shown(EXAMPLE, 8, 12)))).scores) == 130


def test_windows_are_the_same_in_small_portions(raw: Finder, monkeypatch: pytest.MonkeyPatch):
    finder = adapted(raw)
    sought = seek(finder.show(*shown(EXAMPLE, 8, 12)))
    whole, calls = found(finder, sought), []
    look = finder.model.look_everywhere
    monkeypatch.setattr(finder.model, "look_everywhere", lambda *given: calls.append(len(given[2])) or look(*given))
    monkeypatch.setattr("detrkit.one_shot.finder.AT_ONCE", 1)
    portions = found(finder, sought)
    assert set(calls) == {1}  # row by row
    torch.testing.assert_close(portions.boxes, whole.boxes)
    torch.testing.assert_close(portions.scores, whole.scores, atol=1e-5, rtol=1e-5)


def test_what_it_is_not_lies_below_even_odds(raw: Finder):
    finder = adapted(raw)
    squares = [("red", 10, 8), ("orange", 70, 50)]
    scene = draw(squares, seed=4)
    example, lookalike = finder.show(*shown(EXAMPLE, 8, 12)), finder.show(*shown(scene, 70, 50))
    orange, red = truth(scene, squares, "orange"), truth(scene, squares, "red")
    plain = found(finder, seek(example), scene)
    told = found(finder, seek(example, unlike=lookalike), scene)
    assert best_at(plain, orange, 0.3)[0] > best_at(told, orange, 0.3)[0]
    assert best_at(told, orange, 0.3)[0] < 0.5 < best_at(told, red, 0.3)[0]
    same = found(finder, seek(example, unlike=example), scene)
    assert same.scores.max() <= 0.5 + 1e-6  # as like as unlike: even odds at most


def test_looks_that_differ_are_each_found_where_the_most_alike_counts(raw: Finder):
    finder = adapted(raw)
    two = Shown.joined([finder.show(*shown(EXAMPLE, 8, 12)), finder.show(*shown(EXAMPLE, 80, 50))])
    mean, most = seek(two), seek(two, combine="max")
    assert (mean.looks.shape[0], most.looks.shape[0]) == (1, 2)
    torch.testing.assert_close(mean.looks[0], F.normalize(two.looks.mean(0), dim=0))
    torch.testing.assert_close(mean.prompts[0], two.prompts.mean(0))
    assert mean.size == most.size == pytest.approx((24, 24))
    assert mean.kinship == most.kinship
    assert mean.kinship[0] == 0.1  # looks that have nothing in common are still taken for kin
    with torch.inference_mode():
        scene = finder.model.see(to_tensor(SCENE)[None])
        looks = finder.model.look(scene, torch.tensor([0]), torch.rand(1, 9, 4) / 2 + 0.2)
    for one in (mean, most):
        expected = torch.stack([looks[0] @ look for look in one.looks]).amax(0)
        logits = one.slope * (expected - one.even)
        torch.testing.assert_close(finder._evidence(looks[0], one), logits, atol=1e-4, rtol=1e-4)


def test_a_lone_example_has_no_kin_and_three_have_their_mean_cosine(generator: torch.Generator):
    looks = F.normalize(torch.randn(3, 5, generator=generator) + 1, dim=-1)
    three = Shown(torch.zeros(3, 0), looks, torch.tensor([[4.0, 8], [8, 8], [12, 2]]))
    cosines = [float(looks[index] @ F.normalize(looks.sum(0) - looks[index], dim=0)) for index in range(3)]
    mean, deviation = seek(three).kinship
    assert mean == pytest.approx(sum(cosines) / 3, abs=1e-5)
    squares = sum((one - mean) ** 2 for one in cosines)
    assert deviation == pytest.approx(math.sqrt((squares + 2 * 0.1**2) / (3 + 1)), abs=1e-5)
    assert seek(three).size == pytest.approx((8, 6))
    assert seek(three.select([1])).kinship == KINSHIP
    assert seek(three, unlike=three.select([0])).unlike.shape == (1, 5)


def test_even_odds_are_told_from_images_without_labels(raw: Finder):
    finder = adapted(raw)
    sought = seek(finder.show(*shown(EXAMPLE, 8, 12)))
    scenes = [draw(SCENE_SQUARES, seed=seed) for seed in (7, 8)]
    (levelled,) = finder.level([to_tensor(one) for one in scenes], [sought])
    assert levelled._replace(even=sought.even) == sought
    for scene in scenes:
        scored = found(finder, levelled, scene)
        right, wrong = (best_at(scored, truth(scene, SCENE_SQUARES, colour)) for colour in ("red", "blue"))
        assert max(right) >= 0.5 > max(wrong)
    # A threshold that is off by a constant for the one thing comes out the same.
    (again,) = finder.level([to_tensor(one) for one in scenes], [sought._replace(even=0.9)])
    assert again.even == pytest.approx(levelled.even, abs=1e-4)


def test_where_likeness_was_learnt_nothing_is_levelled(raw: Finder):
    learnt = Finder(small(), "windows")
    sought = seek(learnt.show(*shown(EXAMPLE, 8, 12)))
    assert learnt.level([to_tensor(SCENE)], [sought]) == [sought]
    plain = seek(raw.show(*shown(EXAMPLE, 8, 12)))
    assert raw.level([], [plain]) == [plain]


def test_overlaps_are_dropped_as_far_as_asked(raw: Finder):
    adapted(raw)
    sought = seek(raw.show(*shown(EXAMPLE, 8, 12)))
    counts = []
    for overlap in (0.0, 0.2, 1.0):
        scored = found(Finder(raw.model, "windows", overlap=overlap), sought)
        among = pairwise_iou(scored.boxes, scored.boxes).triu(1)
        assert among.max() <= overlap + 1e-6
        counts.append(len(scored.boxes))
    assert counts[0] < counts[2]


def test_a_calibration_makes_other_scores_and_no_other_order(raw: Finder):
    sought = seek(raw.show(*shown(EXAMPLE, 8, 12)))
    plain = found(raw, sought)
    calibrated = found(Finder(raw.model, "windows", Calibration(2.0, -1.0)), sought)
    assert torch.equal(plain.boxes, calibrated.boxes)
    torch.testing.assert_close(calibrated.scores, (plain.scores.logit() / 2 - 1).sigmoid(), atol=1e-4, rtol=1e-3)


def test_what_is_usual_changes_raw_looks_and_no_learnt_ones(raw: Finder):
    before = raw.show(*shown(EXAMPLE, 8, 12)).looks
    knowing = adapted(raw)
    assert (knowing.show(*shown(EXAMPLE, 8, 12)).looks - before).abs().max() > 1e-3
    torch.testing.assert_close(raw.show(*shown(EXAMPLE, 8, 12)).looks, before, atol=0, rtol=0)
    maps = [raw.model.see(to_tensor(one)[None]).memory.features[-1][0] for one in (SCENE, EXAMPLE)]
    mean = torch.cat([one.flatten(1) for one in maps], 1).mean(1)
    assert knowing.usual is not None
    torch.testing.assert_close(knowing.usual.mean, mean, atol=1e-4, rtol=1e-4)
    learnt = Finder(small(), "windows")
    assert adapted(learnt) is learnt


def test_windows_are_of_the_examples_size_and_stay_inside(raw: Finder):
    example = raw.show(*shown(EXAMPLE, 8, 12))
    huge = Shown(example.prompts, example.looks, torch.tensor([[500.0, 90.0]]))
    for sizes, widths in ((example, {0.8 * 24 / 128, 24 / 128, 1.25 * 24 / 128}), (huge, {1.0})):
        boxes = found(Finder(raw.model, "windows", overlap=1.0), seek(sizes)).boxes
        assert {round(float(side), 3) for side in boxes[:, 2] - boxes[:, 0]} <= {round(width, 3) for width in widths}
        assert boxes.min() >= 0
        assert boxes.max() <= 1 + 1e-6


def test_no_example_is_refused(raw: Finder):
    with pytest.raises(UsageError, match="no example"):
        seek(raw.show(*shown(EXAMPLE, 8, 12)).select([]))


@pytest.mark.parametrize("mean", [0.8, 0.4])
def test_even_odds_are_where_recall_squared_over_the_number_taken_is_largest(mean: float):
    """Others of a kind are expected to be 0.85 times as alike as its examples, give or take their deviation."""
    likeness = np.linspace(1.3 * mean, 0.0, 90) ** 1.1
    expected = statistics.NormalDist(0.85 * mean, 0.05)
    gains = [(1 - expected.cdf(value)) ** 2 / taken for taken, value in enumerate(likeness, 1)]
    best = max(range(90), key=gains.__getitem__)
    assert 0 < best < 89
    assert _even(np.random.default_rng(1).permutation(likeness), (mean, 0.05)) == likeness[best]
