"""Panoptic quality. The oracles are the definition, written out pixel by pixel, and hotcoco's reading of files that
`write_panoptic` writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detrkit.data.annotations import Annotations, Strings
from detrkit.errors import DataError, UsageError
from detrkit.evaluation import evaluate, figures, panoptic_quality, write_panoptic
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Category, Detections

HEIGHT, WIDTH = 12, 15
TABLE = (
    Category(4, "cat"),
    Category(9, "dog"),
    Category(2, "sky", is_thing=False),
    Category(30, "sea", is_thing=False),
)
NAMES = [name + ending for ending in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")]


def truth_of(images: list[tuple[np.ndarray, list[int], list[bool]]]) -> Annotations:
    """Annotations from (ids, labels, crowd), an image an entry; id k + 1 is segment k."""
    masks = RunLengths.joined(
        [RunLengths.encode((ids == row + 1)[None]) for ids, labels, _ in images for row in range(len(labels))]
    )
    counts = [len(labels) for _, labels, _ in images]
    return Annotations(
        root=Path(),
        file_names=Strings(f"{index}.png" for index in range(len(images))),
        image_ids=np.arange(len(images), dtype=np.int64)[::-1] * 5,
        image_sizes=np.tile(np.array([HEIGHT, WIDTH], np.int32), (len(images), 1)),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=masks.boxes(),
        labels=np.array([label for _, labels, _ in images for label in labels], np.int64),
        areas=masks.areas().astype(np.float64),
        crowd=np.array([flag for _, _, crowd in images for flag in crowd], bool),
        difficult=np.zeros(len(masks), bool),
        categories=TABLE,
        masks=masks,
    )


def map_of(ids: np.ndarray, labels: list[int]) -> PanopticMap:
    return PanopticMap(
        ids.astype(np.int32), np.array(labels, np.int64), np.ones(len(labels), np.float32), TABLE, ids.shape
    )


def random_set(seed: int, crowds: int = 9) -> tuple[Annotations, list[PanopticMap]]:
    """Coarse random maps with void, at most `crowds` crowds of a class in an image, cut segments, wrong labels."""
    random = np.random.default_rng(seed)
    images, maps = [], []
    for _ in range(int(random.integers(1, 4))):
        count = int(random.integers(0, 7))
        ids = random.integers(0, count + 1, (HEIGHT // 3, WIDTH // 3)).repeat(3, 0).repeat(3, 1)
        ids = np.unique(ids, return_inverse=True)[1].reshape(ids.shape) + (ids.min() > 0)
        labels = random.integers(0, len(TABLE), int(ids.max()))
        crowd = random.random(len(labels)) < 0.3
        for label in range(len(TABLE)):
            crowd[np.flatnonzero(crowd & (labels == label))[crowds:]] = False
        images.append((ids, labels.tolist(), crowd.tolist()))
        found = np.where(random.random(ids.shape) < random.choice([0.2, 0.05, 0]), 0, ids)
        found[:, 8:] += (found[:, 8:] > 0) * len(labels) * (random.random() < 0.4)
        doubled = np.concatenate([labels, labels])
        guessed = np.where(random.random(len(doubled)) < 0.8, doubled, random.integers(0, len(TABLE), len(doubled)))
        if len(labels):  # something is said of pixels that truly belong to no segment
            found = np.where((ids == 0) & (random.random(ids.shape) < 0.7), random.integers(1, len(doubled) + 1), found)
        maps.append(map_of(found, guessed.tolist()))
    return truth_of(images), maps


def by_definition(annotations: Annotations, maps: list[PanopticMap]) -> dict[str, float]:
    """PQ, SQ and RQ from sets of pixels."""
    ious = [[] for _ in TABLE]
    false, missed = np.zeros(len(TABLE)), np.zeros(len(TABLE))
    for index, one in enumerate(maps):
        rows = annotations.rows(index)
        true = [set(np.flatnonzero(mask)) for mask in annotations.masks[rows].decode()]
        said = [set(np.flatnonzero(one.ids == row + 1)) for row in range(len(one))]
        void = set(range(HEIGHT * WIDTH)).difference(*true)
        labels, crowd = annotations.labels[rows], annotations.crowd[rows]
        hit = set()
        for label, mask, is_crowd in zip(labels, true, crowd, strict=True):
            if is_crowd:
                continue
            overlaps = {
                row: len(mask & other) / len((mask | other) - (void - mask))
                for row, other in enumerate(said)
                if one.labels[row] == label
            }
            best = max(overlaps, key=overlaps.get, default=None)
            if best is None or overlaps[best] <= 0.5:
                missed[label] += 1
            else:
                ious[label].append(overlaps[best])
                hit.add(best)
        for row, mask in enumerate(said):
            if row in hit or not mask:
                continue
            excused = void.union(*(true[k] for k in range(len(true)) if crowd[k] and labels[k] == one.labels[row]))
            false[one.labels[row]] += len(mask & excused) * 2 <= len(mask)
    figures = {}
    for ending, wanted in (("", (True, False)), ("_things", (True,)), ("_stuff", (False,))):
        chosen = [
            (sum(ious[label]), len(ious[label]), false[label], missed[label])
            for label, category in enumerate(TABLE)
            if category.is_thing in wanted and len(ious[label]) + false[label] + missed[label]
        ]
        parts = {
            "PQ": [total / (hits + (wrong + lost) / 2) for total, hits, wrong, lost in chosen],
            "SQ": [total / hits if hits else 0 for total, hits, _, _ in chosen],
            "RQ": [hits / (hits + (wrong + lost) / 2) for _, hits, wrong, lost in chosen],
        }
        figures |= {name + ending: float(np.mean(values)) if values else math.nan for name, values in parts.items()}
    return figures


def test_equals_the_definition_on_random_sets():
    seen = dict.fromkeys(("crowd", "void", "undefined", "found", "several crowds"), 0)
    for seed in range(80):
        annotations, maps = random_set(seed)
        quality = panoptic_quality(annotations, maps)
        assert list(quality.figures) == NAMES
        expected = by_definition(annotations, maps)
        assert quality.figures == pytest.approx(expected, abs=1e-9, nan_ok=True), f"set {seed}"
        seen["crowd"] += annotations.crowd.any()
        seen["void"] += annotations.areas.sum() < len(maps) * HEIGHT * WIDTH
        seen["undefined"] += any(map(math.isnan, expected.values()))
        seen["found"] += expected["RQ"] > 0.3
        pairs = np.stack([np.repeat(np.arange(len(maps)), np.diff(annotations.offsets)), annotations.labels], 1)
        seen["several crowds"] += len(np.unique(pairs[annotations.crowd], axis=0)) < annotations.crowd.sum()
    assert min(seen.values()) > 5, seen


def test_equals_the_files_that_cocos_tools_read(tmp_path):
    from hotcoco.panoptic import PanopticEval

    for seed in range(12):
        annotations, maps = random_set(seed, crowds=1)
        folder = tmp_path / str(seed)
        write_panoptic(tmp_path / "found.json", folder / "found", annotations, maps)
        # The truth through the same writer, whose segments are then told which are crowds.
        true = [
            map_of(
                (masks := annotations.masks[annotations.rows(index)].decode())
                .reshape(-1, HEIGHT, WIDTH)
                .T.dot(np.arange(1, len(masks) + 1))
                .T,
                annotations.labels[annotations.rows(index)].tolist(),
            )
            for index in range(len(maps))
        ]
        write_panoptic(tmp_path / "true.json", folder / "true", annotations, true)
        truth = json.loads((tmp_path / "true.json").read_text())
        for index, entry in enumerate(truth["annotations"]):
            for segment in entry["segments_info"]:
                segment["iscrowd"] = int(annotations.crowd[annotations.offsets[index] + segment["id"] - 1])
        (tmp_path / "true.json").write_text(json.dumps(truth))
        judge = PanopticEval(
            str(tmp_path / "true.json"),
            str(tmp_path / "found.json"),
            gt_folder=str(folder / "true"),
            pred_folder=str(folder / "found"),
        )
        judge.evaluate()
        theirs, ours = judge.results(), panoptic_quality(annotations, maps)
        for group, ending in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
            if theirs[group]["n"]:
                for name in ("pq", "sq", "rq"):
                    assert ours.figures[name.upper() + ending] == pytest.approx(theirs[group][name], abs=1e-9)
        for category, one in zip(TABLE, ours.per_class, strict=True):
            counts = theirs["per_class"][category.id]
            assert (one.found, one.false, one.missed) == (counts["tp"], counts["fp"], counts["fn"])


def half_found() -> tuple[Annotations, list[PanopticMap]]:
    """A cat that is found with an IoU of 2/3, a sky that is found as the sea, and nothing else."""
    ids = np.ones((HEIGHT, WIDTH), np.int32)
    ids[6:] = 2
    found = ids.copy()
    found[6:8] = 1
    found[8:] = 2
    return truth_of([(ids, [0, 2], [False, False])]), [map_of(found, [0, 3])]


def test_classes_have_figures_of_their_own():
    annotations, maps = half_found()
    quality = panoptic_quality(annotations, maps)
    cat, dog, sky, sea = quality.per_class
    assert (cat.segments, cat.found, cat.false, cat.missed) == (1, 1, 0, 0)
    assert (cat.pq, cat.sq, cat.rq) == pytest.approx((6 / 8, 6 / 8, 1))
    assert math.isnan(dog.pq)
    assert dog.to_json()["pq"] is None
    assert (sky.missed, sky.pq, sky.is_thing) == (1, 0, False)
    assert (sea.false, sea.pq) == (1, 0)
    assert quality.figures["PQ"] == pytest.approx(0.25)
    assert quality.figures["PQ_things"] == pytest.approx(0.75)
    assert quality.figures["PQ_stuff"] == 0


def test_pixels_of_a_segment_that_is_not_known_belong_to_none():
    annotations, maps = half_found()
    unknown = RunLengths.unknown(np.array([[HEIGHT, WIDTH]]))
    quality = panoptic_quality(replace(annotations, masks=RunLengths.joined([annotations.masks[:1], unknown])), maps)
    assert [one.segments for one in quality.per_class] == [1, 0, 0, 0]
    assert quality.figures["PQ"] == pytest.approx(1)  # the sea lies where nothing is known


def test_stands_beside_the_figures_of_detection_which_are_of_things_alone():
    annotations, maps = half_found()
    detections = Detections(
        np.array([[0, 0, WIDTH, 6], [0, 6, WIDTH, HEIGHT]], np.float32),
        np.array([0.9, 0.95], np.float32),
        np.array([0, 2]),
        TABLE,
        (HEIGHT, WIDTH),
        segments=annotations.masks,
    )
    metrics = evaluate(annotations, [detections], panoptic=maps)
    assert metrics.figures["PQ"] == pytest.approx(0.25)
    assert list(metrics.figures)[-9:] == NAMES
    assert metrics.figures["AP"] == metrics.figures["mask_AP"] == pytest.approx(1)
    assert metrics.boxes == 1
    assert math.isnan(metrics.per_class[2].ap)
    assert metrics.confusion.sum() == 1
    assert metrics.to_json()["panoptic"][2] == metrics.panoptic[2].to_json()
    assert [one.name for one in metrics.things] == ["cat", "dog"]
    assert dict(figures(annotations, [detections]))["AP"] == pytest.approx(1)
    assert "panoptic" not in evaluate(annotations, [detections]).to_json()


def test_a_table_without_categories_is_undefined():
    annotations = replace(truth_of([(np.zeros((HEIGHT, WIDTH), int), [], [])]), categories=())
    empty = PanopticMap(
        np.zeros((HEIGHT, WIDTH), np.int32), np.zeros(0, int), np.zeros(0, np.float32), (), (HEIGHT, WIDTH)
    )
    assert all(math.isnan(value) for value in panoptic_quality(annotations, [empty]).figures.values())


def test_what_cannot_be_compared_is_named():
    annotations, maps = half_found()
    with pytest.raises(DataError, match=r"needs the true segments; got annotations without masks.*panoptic data set"):
        panoptic_quality(replace(annotations, masks=None), maps)
    with pytest.raises(DataError, match=r"Panoptic maps and images differ in number; got 2 entries.*expected 1"):
        panoptic_quality(annotations, maps * 2)
    with pytest.raises(DataError, match=r"image 0 \(0.png\): The answers have another category table"):
        panoptic_quality(annotations, [replace(maps[0], categories=TABLE[::-1])])
    with pytest.raises(DataError, match=r"image 0 \(0.png\).*another size.*got 2 × 3; expected 12 × 15"):
        panoptic_quality(annotations, [map_of(np.ones((2, 3), int), [0])])
    twice = replace(annotations, masks=annotations.masks[[0, 0]])
    with pytest.raises(DataError, match=r"image 0 \(0.png\): True segments overlap.*not on masks of instances"):
        panoptic_quality(twice, maps)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    annotations, maps = half_found()
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"taken.*: The segments cannot be written"):
        write_panoptic(tmp_path / "a.json", tmp_path / "taken", annotations, maps)
    (tmp_path / "b.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UsageError, match=r"b.json: The results would be written over something else"):
        write_panoptic(tmp_path / "b.json", tmp_path / "b", annotations, maps)
