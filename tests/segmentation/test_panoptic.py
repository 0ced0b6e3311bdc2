"""Masks of queries become segments of an image; the oracle is the rule, written out with whole arrays and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from detrkit.segmentation import panoptic
from detrkit.segmentation.panoptic import merge

IS_THING = torch.tensor([True, True, False, False])


def random_queries(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    random = np.random.default_rng(seed)
    count, cells = int(random.integers(1, 12)), random.integers(2, 9, 2)
    logits = torch.tensor(
        random.normal(0, 3, (count, *cells)) + random.normal(0, 2, (count, 1, 1)), dtype=torch.float32
    )
    scores = torch.tensor(random.choice([0.3, 0.8, 0.9, 0.95, 0.99], count), dtype=torch.float32)
    labels = torch.tensor(random.integers(0, 4, count))
    return logits, scores, labels, (int(random.integers(3, 25)), int(random.integers(3, 25)))


def by_the_rule(logits, scores, labels, size, stray=4):
    """The set of segments, each as its label and its pixels."""
    queries = [query for query in range(len(scores)) if scores[query] > 0.85]
    # Where logits tie, which only happens in images without detail, the best scored wins.
    queries.sort(key=lambda query: -float(scores[query]))
    whole = functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    while queries:
        chances = np.exp(whole[queries]) / np.exp(whole[queries]).sum(0)
        winner = np.array(queries)[chances.argmax(0)]
        segments = {}
        for query in queries:
            label = int(labels[query])
            key = ("thing", query) if IS_THING[label] else ("stuff", label)
            segments.setdefault(key, (label, [], np.zeros(size, bool)))
            segments[key][1].append(query)
            segments[key][2][:] |= winner == query
        small = [query for _, members, pixels in segments.values() if pixels.sum() <= stray for query in members]
        if not small:
            return {(label, pixels.tobytes()) for label, _, pixels in segments.values()}
        queries = [query for query in queries if query not in small]
    return set()


def segments_of(merged, labels):
    return {
        (int(labels[query]), (merged.ids == 1 + row).numpy().tobytes())
        for row, query in enumerate(merged.queries.tolist())
    }


@pytest.mark.parametrize("budget", [1, 40, 2**23])
def test_follows_the_rule(budget, monkeypatch):
    monkeypatch.setattr(panoptic, "AT_ONCE", budget)
    strays = stuff = empty = 0
    for seed in range(80):
        logits, scores, labels, size = random_queries(seed)
        merged = merge(logits, scores, labels, IS_THING, size)
        expected = by_the_rule(logits, scores, labels, size)
        assert segments_of(merged, labels) == expected, f"set {seed}"
        assert int(merged.ids.max()) == len(expected)
        strays += len(expected) != len(by_the_rule(logits, scores, labels, size, stray=-1))
        kept = labels[scores > 0.85]
        stuff += len(kept[kept > 1]) > len(kept[kept > 1].unique())
        empty += not expected
    assert min(strays, stuff) > 20  # the sets hold what is to be tested
    assert empty


def test_segments_come_best_scored_first_and_name_their_query():
    logits = torch.full((4, 4, 4), -9.0)
    logits[0, :, 0], logits[1, :, 1], logits[2, :, 2], logits[3, :, 3] = 9, 9, 9, 9
    scores, labels = torch.tensor([0.9, 0.95, 0.99, 0.5]), torch.tensor([2, 2, 0, 1])
    merged = merge(logits, scores, labels, IS_THING, (4, 4), stray=0)
    assert merged.queries.tolist() == [2, 1]
    assert merged.ids[0].tolist()[:3] == [2, 2, 1]
    assert not (merged.ids == 0).any()  # the last query is not certain enough, and others take its place
    assert merge(logits, scores, labels, IS_THING, (4, 4), threshold=0.4, stray=0).queries.tolist() == [2, 1, 3]
    assert merge(logits, scores, labels, IS_THING, (4, 4), threshold=0.5, stray=0).queries.tolist() == [2, 1]


def test_nothing_certain_is_an_empty_map():
    logits, scores, labels, size = random_queries(0)
    merged = merge(logits, scores * 0.5, labels, IS_THING, size)
    assert merged.ids.shape == size
    assert not merged.ids.any()
    assert len(merged.queries) == 0


def test_only_strays_are_an_empty_map():
    merged = merge(torch.zeros(1, 2, 2), torch.tensor([0.9]), torch.tensor([0]), IS_THING, (2, 2))
    assert not merged.ids.any()


def test_halves_are_merged_like_floats(generator):
    logits = torch.randn(3, 6, 8, generator=generator).half()
    scores, labels = torch.full((3,), 0.9), torch.tensor([0, 1, 2])
    assert torch.equal(
        merge(logits, scores, labels, IS_THING, (30, 40)).ids,
        merge(logits.float(), scores, labels, IS_THING, (30, 40)).ids,
    )


def test_without_stuff_there_is_background():
    logits = torch.full((3, 6, 8), -2.0)
    logits[0, :3, :4], logits[1, :, 6:], logits[2, 5, 0] = 3.0, 1.0, 4.0
    scores, labels = torch.tensor([0.9, 0.95, 0.99]), torch.tensor([0, 1, 1])
    merged = merge(logits, scores, labels, torch.tensor([True, True]), (6, 8))
    assert merged.queries.tolist() == [1, 0], "a stray pixel is no segment"
    expected = torch.zeros(6, 8, dtype=torch.int32)
    expected[:3, :4], expected[:, 6:] = 2, 1
    assert torch.equal(merged.ids, expected)
    logits[0] = 3.0
    logits[0, 0, :2] = -2.0
    alone = merge(logits[:1], scores[:1], labels[:1], torch.tensor([True, True]), (6, 8))
    assert alone.ids[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1], "a background of stray pixels is still none of a thing's"
    with_stuff = merge(logits, scores, labels, torch.tensor([True, False]), (6, 8))
    assert bool((with_stuff.ids > 0).all()), "stuff leaves nothing over"
