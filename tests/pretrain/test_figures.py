"""The figures of a pre-training against counts by hand, its alarms and its last words, and its page."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from detrkit.errors import UsageError
from detrkit.losses.matching import NonFiniteError
from detrkit.models import conditional_detr, detr
from detrkit.pretrain.figures import PatchFigures, alarms, answers, conclusion, patch_scores
from detrkit.pretrain.page import Sheet, patch_sheets, write_patch_page
from detrkit.pretrain.up_detr import PatchPredictions, UpDetr
from detrkit.prompts import group_of_queries
from detrkit.structures import Batch, PatchBatch

SMALL, MEDIUM, LARGE = (0.2, 0.2, 0.1, 0.1), (0.6, 0.7, 0.3, 0.3), (0.45, 0.5, 0.6, 0.6)
PLACES = torch.tensor([[SMALL, MEDIUM, LARGE]])
GROUP = torch.tensor([0, 0, 1, 1, 2, 2])
FIRST_WINS = [3.0, -3.0] * 3


def batch_of(places: Tensor) -> PatchBatch:
    images, count = places.shape[:2]
    return PatchBatch(
        torch.zeros(images, 3, 8, 8),
        torch.zeros(images, 8, 8, dtype=torch.bool),
        torch.zeros(images, count, 3, 4, 4),
        places,
        tuple(f"{index}.jpg" for index in range(images)),
    )


def predicted(
    boxes: Tensor, scores: list[float] | Tensor, features: Tensor | None = None, told: Tensor | None = None
) -> PatchPredictions:
    """Predictions of two layers, of which the first is nonsense; logits are of one class without no-object."""
    logits = torch.as_tensor(scores, dtype=torch.float32).expand(len(boxes), -1)[..., None]
    features = torch.eye(5)[:3].expand(len(boxes), -1, -1) if features is None else features
    layers = torch.stack([torch.full_like(boxes, 0.5), boxes])
    told = None if told is None else torch.stack([torch.zeros_like(told), told])
    return PatchPredictions(torch.stack([-logits, logits]), layers, told, features)


def figures_of(found: PatchPredictions, places: Tensor = PLACES, group: Tensor = GROUP) -> dict[str, float]:
    figures = PatchFigures(1)
    figures.add(found, batch_of(places), group)
    return figures.result()


def each_twice(*places: tuple[float, ...]) -> Tensor:
    return torch.tensor([places]).repeat_interleave(2, 1)


def test_perfect_answers():
    figures = figures_of(predicted(PLACES.repeat_interleave(2, 1), FIRST_WINS))
    ones = ("recall50", "recall75", "recall50_small", "recall50_medium", "recall50_large", "iou", "consistency")
    assert {name: figures[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1.0))
    assert figures["box_spread"] == pytest.approx(1.0)
    assert figures["chance"] == pytest.approx(1 / 3)
    assert math.isnan(figures["feature_cosine"])
    assert math.isnan(figures["feature_cosine_other"])
    assert not alarms(figures)


def test_only_the_best_scored_query_of_the_own_group_answers():
    far = (0.9, 0.1, 0.05, 0.05)
    boxes = torch.tensor([[far, SMALL, MEDIUM, far, SMALL, far]])
    figures = figures_of(predicted(boxes, [2.0, 1.0, 0.0, -1.0, 3.0, -1.0]))
    # The small one is found by a query that is not its group's best, and by the best of another group.
    assert figures["recall50_small"] == 0
    assert figures["recall50_medium"] == 1
    assert figures["recall50_large"] == 0
    assert figures["recall50"] == pytest.approx(1 / 3)
    assert figures["iou"] == pytest.approx(1 / 3, abs=0.01)


def test_overlaps_are_counted_at_both_thresholds():
    x, y, width, height = MEDIUM
    shifted = (x + width / 5, y, width, height)  # IoU 0.8 / 1.2
    boxes = each_twice(SMALL, shifted, LARGE)
    figures = figures_of(predicted(boxes, FIRST_WINS))
    assert figures["recall50"] == 1
    assert figures["recall75"] == pytest.approx(2 / 3)
    assert figures["iou"] == pytest.approx((2 + 0.8 / 1.2) / 3)


def test_consistency_asks_all_queries():
    figures = figures_of(predicted(each_twice(MEDIUM, SMALL, LARGE), FIRST_WINS))
    assert figures["consistency"] == pytest.approx(1 / 3)
    near = (0.35, 0.3, 0.1, 0.1)  # touches no small one but lies nearest to it
    boxes = each_twice((0.9, 0.9, 0.1, 0.1), near, MEDIUM)
    figures = figures_of(predicted(boxes, FIRST_WINS), torch.tensor([[MEDIUM, SMALL, LARGE]]))
    assert figures["recall50_small"] == 0
    assert figures["consistency"] == pytest.approx(2 / 3)


def test_queries_that_do_not_look_are_consistent_by_chance():
    drawn = torch.Generator().manual_seed(1)
    places, boxes = (0.2 + 0.6 * torch.rand(200, count, 4, generator=drawn) for count in (10, 40))
    figures = figures_of(
        predicted(boxes, torch.zeros(40), torch.rand(200, 10, 5, generator=drawn)), places, group_of_queries(40, 10)
    )
    assert figures["consistency"] == pytest.approx(0.1, abs=0.02)
    assert ["do not look" in alarm for alarm in alarms(figures)] == [True]


@pytest.mark.parametrize("scores", [FIRST_WINS, [0.0] * 6])
def test_one_box_for_all_is_alarming(scores):
    figures = figures_of(predicted(torch.tensor([[MEDIUM] * 6]), scores))
    assert figures["box_spread"] == 0
    assert figures["consistency"] == pytest.approx(1 / 3)
    raised = alarms(figures)
    assert len(raised) == 2
    assert "boxes have collapsed" in raised[0]
    assert "learning rate" in raised[0]


def test_box_spread_is_that_of_a_standard_deviation():
    middle = PLACES.mean(1, keepdim=True)
    half = (middle + (PLACES - middle) / 2).repeat_interleave(2, 1)
    assert figures_of(predicted(half, FIRST_WINS))["box_spread"] == pytest.approx(0.5)


def test_what_is_told_is_compared_with_the_own_feature_and_the_others():
    features = torch.tensor([[[1.0, 0, 0], [0, 2, 0], [0, 1, 1]]])
    told = torch.tensor([[[3.0, 0, 0], [9, 9, 9], [0, 5, 0], [9, 9, 9], [0, 4, 0], [9, 9, 9]]])
    figures = figures_of(predicted(PLACES.repeat_interleave(2, 1), FIRST_WINS, features, told))
    root = math.sqrt(0.5)
    assert figures["feature_cosine"] == pytest.approx((1 + 1 + root) / 3)
    assert figures["feature_cosine_other"] == pytest.approx(((0 + 0) / 2 + (0 + root) / 2 + (0 + 1) / 2) / 3)


def test_feature_spread_is_the_mean_over_all_pairs():
    features = torch.rand(4, 3, 5)
    figures = figures_of(
        predicted(PLACES.repeat_interleave(2, 1).expand(4, -1, -1), FIRST_WINS, features), PLACES.expand(4, -1, -1)
    )
    flat = features.flatten(0, 1)
    distances = [
        1 - float(F.cosine_similarity(flat[i], flat[j], dim=0)) for i in range(12) for j in range(12) if i != j
    ]
    assert figures["feature_spread"] == pytest.approx(np.mean(distances), abs=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_features_that_are_all_alike_are_alarming(value):
    same = torch.full((1, 3, 5), value)
    figures = figures_of(predicted(PLACES.repeat_interleave(2, 1), FIRST_WINS, same))
    assert figures["feature_spread"] == pytest.approx(0, abs=1e-6)
    (alarm,) = alarms(figures)
    assert "features have collapsed" in alarm
    assert "backbone" in alarm


def test_batches_and_processes_make_no_difference():
    drawn = torch.Generator().manual_seed(2)
    places, boxes = (0.05 + 0.7 * torch.rand(6, count, 4, generator=drawn) for count in (3, 6))
    scores, features, told = (torch.randn(6, *size, generator=drawn) for size in ((6,), (3, 5), (6, 5)))
    whole, parts = PatchFigures(1), [PatchFigures(1), PatchFigures(1)]
    whole.add(predicted(boxes, scores, features, told), batch_of(places), GROUP)
    for part, rows in ((0, [0]), (1, [1, 2]), (0, [3, 4, 5])):
        found = predicted(boxes[rows], scores[rows], features[rows], told[rows])
        parts[part].add(found, batch_of(places[rows]), GROUP)
    merged = PatchFigures.merged([pickle.loads(pickle.dumps(part)) for part in parts])
    assert merged.result() == pytest.approx(whole.result(), abs=1e-6)
    assert (merged.images, merged.patches) == (whole.images, whole.patches) == (6, 18)
    with pytest.raises(UsageError, match="no figures to merge"):
        PatchFigures.merged([])


def test_nothing_added_is_undefined():
    figures = PatchFigures(1).result()
    assert all(math.isnan(value) for value in figures.values())
    assert not alarms(figures)


def test_one_patch_an_image():
    figures = figures_of(predicted(torch.tensor([[SMALL, LARGE]]), [1.0, 0.0]), PLACES[:, :1], GROUP)
    assert figures["recall50"] == figures["recall50_small"] == 1
    for name in ("recall50_medium", "recall50_large", "consistency", "chance"):
        assert math.isnan(figures[name])


def test_scores_of_variants_with_and_without_no_object():
    logits = torch.tensor([[0.3, 1.2, -0.7], [4.0, -2.0, 0.0]])
    assert patch_scores(logits, 2).tolist() == pytest.approx(logits.softmax(-1)[:, 1].tolist())
    assert patch_scores(logits, 3).tolist() == pytest.approx(logits.sigmoid()[:, 2].tolist())
    assert patch_scores(logits[:, :2].half(), 1).dtype == torch.float32


def test_predictions_that_are_not_finite_are_named():
    places = PLACES.expand(2, -1, -1)
    for field in ("logits", "boxes", "patch_features"):
        found = predicted(places.repeat_interleave(2, 1), FIRST_WINS, torch.rand(2, 3, 5))
        broken = getattr(found, field).clone()
        broken[(-1, 1) if field != "patch_features" else 1] = math.nan
        with pytest.raises(NonFiniteError, match=r"^1\.jpg"):
            PatchFigures(1).add(found._replace(**{field: broken}), batch_of(places), GROUP)


def test_groups_that_do_not_fit_are_refused():
    found = predicted(PLACES.repeat_interleave(2, 1), FIRST_WINS)
    with pytest.raises(UsageError, match=r"do not fit.*6 queries.*9"):
        PatchFigures(1).add(found, batch_of(PLACES), torch.arange(9) // 3)


GOOD = {
    "recall50": 0.61, "recall75": 0.22, "recall50_small": 0.35, "consistency": 0.92, "chance": 0.1, "box_spread": 0.9
}  # fmt: skip
START = {**GOOD, "recall50": 0.04, "consistency": 0.12, "box_spread": 0.05}


def test_the_conclusion_of_a_success():
    assert conclusion(START, GOOD, 100, 1000) == (
        "On 100 held-out images it finds 61 % of 1,000 patches (IoU 0.5), 22 % at IoU 0.75, small ones 35 %; it was "
        "4 % at the first evaluation. It looks where it is told: for 92 % of the patches the best box comes from the "
        "queries that were shown the patch (chance: 10 %)."
    )


def test_the_conclusion_says_whether_recall_still_rises():
    rising = "longer training may help"
    assert rising in conclusion(START, GOOD, 100, 1000, before={**GOOD, "recall50": 0.55})
    assert rising not in conclusion(START, GOOD, 100, 1000, before={**GOOD, "recall50": 0.605})
    assert rising not in conclusion(START, GOOD, 100, 1000, before={**GOOD, "recall50": 0.65})
    # The same difference says nothing on few patches.
    assert rising not in conclusion(START, GOOD, 2, 20, before={**GOOD, "recall50": 0.55})


def test_the_conclusion_of_a_failure():
    said = conclusion({**START, "recall50": 0.003}, START, 1, 10)
    assert said.startswith("It has not learnt to find patches: on 1 held-out image it finds 4 % of 10 patches")
    assert "it was 0.3 % at the first evaluation" in said
    assert "It does not look where it is told: for 12 % of the patches" in said
    assert "rising" not in said
    blind = conclusion(START, {**GOOD, "consistency": 0.1}, 100, 1000)
    assert blind.startswith("It answers without looking at what it is shown: ")


def test_the_conclusion_of_a_decline_and_of_one_evaluation():
    said = conclusion(GOOD, {**GOOD, "recall50": 0.3}, 100, 1000, before={**GOOD, "recall50": 0.2})
    assert "become worse in training" in said
    assert "rising" not in said
    said = conclusion(GOOD, GOOD, 100, 1000)
    assert "first evaluation" not in said
    assert "worse" not in said


def test_the_conclusion_without_some_or_all_figures():
    undefined = dict.fromkeys(GOOD, math.nan)
    assert "is not known" in conclusion(undefined, undefined, 0, 0)
    said = conclusion(START, {**GOOD, "recall50_small": math.nan, "consistency": math.nan}, 100, 1000)
    assert "small" not in said
    assert "looks" not in said
    assert "nan" not in said


TINY = {
    "num_classes": 2,
    "backbone": "resnet-nano",
    "num_queries": 6,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 32,
}


def pretraining_batch(images: int = 2, patches: int = 3) -> PatchBatch:
    drawn = [torch.rand(3, height, 64) for height in (48, 64)][:images]
    padded = Batch.from_images(drawn)
    places = PLACES[:, :patches].expand(images, -1, -1)
    return PatchBatch(
        padded.images, padded.padding, torch.rand(images, patches, 3, 32, 32), places, ("a.jpg", "b<.jpg")
    )


@pytest.mark.parametrize("variant", [detr, conditional_detr])
def test_figures_and_pictures_of_real_variants(variant):
    task = UpDetr(variant.Model(dataclasses.replace(variant.Config(), **TINY)), patches=3).eval()
    batch = pretraining_batch()
    with torch.no_grad():
        found = task(batch.images, batch.padding, batch.patches)
    figures = PatchFigures(2)
    figures.add(found, batch, task.group)
    result = figures.result()
    assert all(math.isfinite(value) for value in result.values())
    answered = answers(found, batch, task.group, 2)
    assert result["iou"] == pytest.approx(float(answered.iou.mean()), abs=1e-6)
    last = found.logits[-1].softmax(-1) if variant is detr else found.logits[-1].sigmoid()
    for image in range(2):
        for patch in range(3):
            own = last[image, 2 * patch : 2 * patch + 2, 1]
            assert answered.query[image, patch] == 2 * patch + int(own.argmax())
            assert answered.scores[image, patch] == pytest.approx(float(own.max()))
    sheets = patch_sheets(found, batch, task.group, 2)
    assert [sheet.name for sheet in sheets] == ["a.jpg", "b<.jpg"]
    assert sheets[0].picture.height < sheets[1].picture.height  # the padding is cut off
    assert "of 3 found" in sheets[0].caption


def test_the_page_holds_everything(tmp_path: Path):
    Image.new("RGB", (30, 20)).save(tmp_path / "history.png")
    sheet = Sheet("b<.jpg", Image.new("RGB", (40, 30)), "1 of 3 found")
    figures = {**START, "feature_cosine": math.nan}
    file = write_patch_page(tmp_path / "new", "A & B", [sheet], figures, "It <works>.", [tmp_path / "history.png"])
    text = file.read_text(encoding="utf-8")
    assert file == tmp_path / "new" / "report.html"
    for wanted in (
        "A &amp; B",
        "It &lt;works&gt;.",
        "b&lt;.jpg",
        "1 of 3 found",
        "boxes have collapsed",
        "data:image/png",
    ):
        assert wanted in text
    assert text.count("data:image/jpeg;base64,") == 1
    assert '<th scope="row">recall50</th><td>0.0400</td>' in text
    assert '<th scope="row">feature_cosine</th><td>–</td>' in text
    assert "http" not in text
    plain = write_patch_page(tmp_path, "Title", [], GOOD, "Fine.").read_text(encoding="utf-8")
    assert "<img" not in plain
    assert "collapsed" not in plain


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="page cannot be written"):
        write_patch_page(tmp_path / "file", "Title", [], GOOD, "")
    with pytest.raises(UsageError, match=r"gone\.png.*cannot be written"):
        write_patch_page(tmp_path, "Title", [], GOOD, "", [tmp_path / "gone.png"])
