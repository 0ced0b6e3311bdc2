"""Episodes: what is looked for in which image, and that nothing but (seed, epoch, index) decides it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.annotations import Annotations, Strings
from detrkit.data.dataset import DetectionDataset, Key, TrainingItem
from detrkit.data.episodes import NOTHING, LoadedEpisodes, PairDataset, draw_episodes, episode_batches, turned
from detrkit.data.order import EpochBatches
from detrkit.data.transforms import Evaluation, to_tensor
from detrkit.errors import DataError, UsageError
from detrkit.structures import Category, Target

SIDE = 16
LABELS = (0, 1, 2)


def annotated(root: Path, classes: Sequence[Sequence[int]], *, size=(64, 80)) -> Annotations:
    """Images with a square of each class that is named, each class in a colour of its own."""
    rng = np.random.default_rng(0)
    boxes = []
    for index, labels in enumerate(classes):
        pixels = np.full((*size, 3), 100, np.uint8)
        for place, label in enumerate(labels):
            x, y = place * 26 + int(rng.integers(0, 8)), int(rng.integers(0, size[0] - SIDE))
            pixels[y : y + SIDE, x : x + SIDE] = [255 * (label == channel) for channel in range(3)]
            boxes.append((x, y, x + SIDE, y + SIDE))
        Image.fromarray(pixels).save(root / f"{index:03d}.png")
    count = len(boxes)
    return Annotations(
        root=root,
        file_names=Strings(f"{index:03d}.png" for index in range(len(classes))),
        image_ids=np.arange(1, len(classes) + 1),
        image_sizes=np.full((len(classes), 2), size, np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(labels) for labels in classes])]).astype(np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.array([label for labels in classes for label in labels], np.int64),
        areas=np.full(count, SIDE**2, np.float64),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        categories=tuple(Category(number + 1, f"class {number}") for number in range(4)),
    )


def pairs_of(annotations: Annotations, labels: Sequence[int] = LABELS, seed: int = 3) -> PairDataset:
    return PairDataset(DetectionDataset(annotations, Evaluation(shortest=64, longest=96), seed), labels)


CLASSES = [[0, 1], [0], [1, 2], [2, 2], [], [0, 1, 1], [3, 0], [2]]
"""The classes of eight images; class 3 is in one of them alone."""


@pytest.fixture
def data(tmp_path: Path) -> Annotations:
    return annotated(tmp_path, CLASSES)


def run(
    dataset: PairDataset, *, workers: int = 0, start: int = 0, steps: int = 6, batch: int = 3, **options
) -> list[LoadedEpisodes]:
    sampler = EpochBatches(len(dataset), batch, dataset.seed, start_step=start, total_steps=steps)
    settings = {"labels": LABELS, "questions": 3, "turned": 0.5, **options}
    return list(episode_batches(dataset, sampler, workers=workers, **settings))


def assert_same(first: LoadedEpisodes, second: LoadedEpisodes) -> None:
    assert first.replaced == second.replaced
    assert first.batch.names == second.batch.names
    for ours, theirs in zip(first.batch.to("cpu")[:5], second.batch.to("cpu")[:5], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(first.batch.targets, second.batch.targets, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.name == theirs.name


def truth(data: Annotations, name: str) -> dict[int, np.ndarray]:
    """The boxes of each class of an image, xyxy in [0, 1]."""
    index = list(data.file_names).index(Path(name).name)
    rows = data.rows(index)
    height, width = data.image_sizes[index]
    boxes = data.boxes[rows] / [width, height, width, height]
    return {label: boxes[data.labels[rows] == label] for label in set(data.labels[rows].tolist())}


def rows_of(boxes: np.ndarray | torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(round(float(value), 4) for value in row) for row in boxes}


def class_of(data: Annotations, name: str, box: torch.Tensor) -> int:
    """The class of a box of an image, by where it is."""
    corners = rows_of(cxcywh_to_xyxy(box[None]))
    return next(label for label, boxes in truth(data, name).items() if corners <= rows_of(boxes))


def test_a_pair_depends_on_seed_epoch_and_index_alone(data: Annotations):
    dataset = pairs_of(data)
    first = dataset[Key(1, 2)]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - to see that nothing reads it
    dataset[Key(0, 3)]
    for again in (dataset[Key(1, 2)], pickle.loads(pickle.dumps(dataset))[Key(1, 2)]):
        assert again.mate.target.name == first.mate.target.name
        assert torch.equal(again.image.image, first.image.image)
        assert again.key == Key(1, 2)
    mates = {dataset[Key(epoch, 2)].mate.target.name for epoch in range(12)}
    others = {pairs_of(data, seed=4)[Key(epoch, 2)].mate.target.name for epoch in range(12)}
    assert len(mates) > 2
    assert mates | others <= {str(data.path(index)) for index in (0, 3, 5, 7)}  # they share class 1 or 2 with it


def test_a_mate_is_another_image_that_shares_a_class(data: Annotations):
    dataset = pairs_of(data)
    for epoch in range(5):
        for index, classes in enumerate(CLASSES):
            mate = Path(dataset[Key(epoch, index)].mate.target.name)
            others = set(CLASSES[int(mate.stem)])
            if set(classes) & set(LABELS):
                assert others & set(classes) & set(LABELS)
                assert int(mate.stem) != index
    assert 3 not in dataset.holders  # a class that only one image holds is never shared


@pytest.mark.parametrize("workers", [2])
def test_workers_and_restarts_change_nothing(data: Annotations, workers: int):
    dataset = pairs_of(data)
    alone = run(dataset)
    for other, first in ((run(dataset, workers=workers), 0), (run(dataset, start=4), 4)):
        assert len(other) == len(alone) - first
        for ours, theirs in zip(alone[first:], other, strict=True):
            assert_same(ours, theirs)
    assert not torch.equal(alone[0].batch.exemplars, run(pairs_of(data, seed=4))[0].batch.exemplars)


@pytest.mark.parametrize("questions", [1, 3])
def test_what_is_asked_can_be_answered(data: Annotations, questions: int):
    negatives = asked = 0
    for loaded in run(pairs_of(data), steps=12, turned=0.0, questions=questions):
        batch = loaded.batch
        assert len(batch.names) == len(batch.images) == 6  # each image brings its mate along
        assert len(batch.asked) == len(batch.source) == len(batch.exemplars) == len(batch.targets)
        seen: set[tuple[int, int]] = set()
        for image, source, box, target in zip(
            batch.asked.tolist(), batch.source.tolist(), batch.exemplars, batch.targets, strict=True
        ):
            assert image != source
            label = class_of(data, batch.names[source], box)
            assert label in LABELS, "class 3 is never shown"
            assert (image, label) not in seen, "nothing is asked twice"
            seen.add((image, label))
            expected = truth(data, batch.names[image]).get(label, np.zeros((0, 4)))
            assert rows_of(cxcywh_to_xyxy(target.boxes)) == rows_of(expected)
            assert target.labels.tolist() == [0] * len(expected)
            assert target.name == batch.names[image]
            negatives += not len(expected)
            asked += 1
        assert max(sum(number == image for number, _ in seen) for image in range(6)) <= questions
    assert asked > 20
    assert 0 < negatives < asked / 2 if questions > 1 else negatives < asked / 4


def items_of(classes: Sequence[Sequence[int]], sides: Sequence[Sequence[float]] | None = None) -> list[TrainingItem]:
    """Blank images of 64 × 64 pixels with boxes whose horizontal place tells the image, and vertical the box."""
    items = []
    for index, labels in enumerate(classes):
        boxes = torch.zeros(len(labels), 4)
        for row in range(len(labels)):
            side = 20.0 if sides is None else sides[index][row]
            boxes[row] = torch.tensor([0.1 + index / 50, 0.1 + row / 50, side / 64, side / 64])
        target = Target(torch.tensor(labels, dtype=torch.int64), boxes, f"image {index}")
        items.append(TrainingItem(torch.zeros(3, 64, 64, dtype=torch.uint8), target))
    return items


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=2, max_size=6),
    st.sets(st.integers(0, 4), min_size=1),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_episodes_of_any_images(classes: list[list[int]], labels: set[int], questions: int, seed: int):
    items = items_of(classes)
    episodes, exemplars = draw_episodes(items, sorted(labels), questions, np.random.default_rng(seed))
    assert episodes.shape == (len(exemplars), 3)
    assert exemplars.shape == (len(episodes), 4)
    again = draw_episodes(items, sorted(labels), questions, np.random.default_rng(seed))
    assert np.array_equal(again[0], episodes)
    assert np.array_equal(again[1], exemplars)
    if not labels.intersection(*[[label for held in classes for label in held]]):
        assert episodes.tolist() == [[0, NOTHING, len(items) - 1]]
        assert exemplars.tolist() == [[0.5, 0.5, 1, 1]]
        return
    for (image, label, source), box in zip(episodes.tolist(), exemplars, strict=True):
        assert image != source
        assert label in labels
        rows = items[source].target.boxes[items[source].target.labels == label]
        assert any(np.array_equal(row.numpy(), box) for row in rows)
    for image, own in enumerate(classes):
        offered = {label for other, held in enumerate(classes) if other != image for label in held} & labels
        asked = episodes[episodes[:, 0] == image, 1].tolist()
        assert len(asked) == len(set(asked)) == min(questions, len(offered))
        present, absent = offered & set(own), offered - set(own)
        if present:
            assert set(asked) & present
        if absent and questions > 1:
            assert set(asked) & absent


def test_a_class_that_is_in_one_image_alone_is_asked_of_all_others_and_not_of_it():
    episodes, _ = draw_episodes(items_of([[0], [1], [1]]), [0], 3, np.random.default_rng(0))
    assert episodes.tolist() == [[1, 0, 0], [2, 0, 0]]


def test_an_image_that_comes_twice_is_not_shown_to_itself():
    first, second = items_of([[0], [0]])
    twice = second._replace(target=second.target._replace(name=first.target.name))
    episodes, _ = draw_episodes([first, twice, second], [0], 1, np.random.default_rng(0))
    assert {(image, source) for image, _, source in episodes.tolist()} <= {(0, 2), (1, 2), (2, 0), (2, 1)}


def test_exemplars_that_are_too_small_to_see_are_not_shown():
    items = items_of([[0, 0], [0, 1]], sides=[[5.0, 9.0], [30.0, 7.9]])
    for seed in range(5):
        episodes, exemplars = draw_episodes(items, [0, 1], 3, np.random.default_rng(seed))
        assert episodes.tolist() == [[0, 0, 1], [1, 0, 0]]
        assert np.array_equal(exemplars[1], items[0].target.boxes[1].numpy())


def test_unseen_classes_are_neither_asked_nor_shown(data: Annotations):
    dataset = pairs_of(data, labels=(0, 2))
    assert set(dataset.holders) == {0, 2}
    for loaded in run(dataset, steps=8, turned=0.0, labels=(0, 2)):
        for source, box in zip(loaded.batch.source.tolist(), loaded.batch.exemplars, strict=True):
            assert class_of(data, loaded.batch.names[source], box) in (0, 2)


def marked(height: int = 40, width: int = 60) -> TrainingItem:
    """An image with one bright place, and its box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 4:12, 9:30] = 1
    box = torch.tensor([[(9 + 30) / 2 / width, (4 + 12) / 2 / height, 21 / width, 8 / height]])
    return TrainingItem(image, Target(torch.tensor([0]), box, "marked"), "replaced")


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_go_where_the_pixels_go(quarters: int, mirrored: bool):
    item = marked()
    moved = turned(item, quarters, mirrored)
    height, width = moved.image.shape[1:]
    assert (height, width) == ((40, 60) if quarters % 2 == 0 else (60, 40))
    rows, columns = moved.image[0].nonzero().T
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    scale = torch.tensor([width, height, width, height])
    torch.testing.assert_close(cxcywh_to_xyxy(moved.target.boxes)[0] * scale, seen, atol=1e-3, rtol=0)
    assert (moved.target.name, moved.replaced) == ("marked", "replaced")
    assert torch.equal(moved.target.labels, item.target.labels)


def test_eight_ways_to_turn_an_image_are_eight():
    item = marked(48, 48)
    places = {tuple(turned(item, q, m).target.boxes[0].tolist()) for q in range(4) for m in (False, True)}
    assert len(places) == 8
    assert torch.equal(turned(item, 4, False).image, item.image)


def test_all_images_of_a_batch_are_turned_alike(data: Annotations):
    upright = {str(data.path(index)): index for index in range(len(data))}
    plain = pairs_of(data)
    ways = set()
    for loaded in run(plain, steps=12, batch=2, turned=1.0):
        batch = loaded.batch.to("cpu")
        items = [plain.images[Key(0, upright[name])] for name in batch.names]
        same = [
            (quarters, mirrored)
            for quarters in range(4)
            for mirrored in (False, True)
            if all(
                torch.equal(to_tensor(moved.image), image[:, : moved.image.shape[1], : moved.image.shape[2]])
                for moved, image in zip((turned(one, quarters, mirrored) for one in items), batch.images, strict=True)
            )
        ]
        assert same
        ways.add(same[0])
    assert len(ways) > 3
    for loaded in run(plain, steps=3, turned=0.0):
        for name, image in zip(loaded.batch.names, loaded.batch.to("cpu").images, strict=True):
            still = to_tensor(plain.images[Key(0, upright[name])].image)
            assert torch.equal(still, image[:, : still.shape[1], : still.shape[2]])


def test_crowds_are_no_exemplars_no_targets_and_make_no_mates(data: Annotations):
    crowd = data.crowd.copy()
    crowd[data.rows(3)] = True  # both boxes of class 2 there
    crowded = replace(data, crowd=crowd)
    dataset = pairs_of(crowded)
    assert dataset.holders[2].tolist() == [2, 7]
    assert dataset.classes[3] == []
    for loaded in run(dataset, steps=8, turned=0.0):
        for image, source, target in zip(
            loaded.batch.asked.tolist(), loaded.batch.source.tolist(), loaded.batch.targets, strict=True
        ):
            assert Path(loaded.batch.names[source]).stem != "003"
            if Path(loaded.batch.names[image]).stem == "003":
                assert not len(target.boxes)


def test_an_image_that_holds_a_crowd_of_a_class_is_not_asked_for_it(data: Annotations):
    crowd = data.crowd.copy()
    crowd[data.rows(3).start] = True  # one of the two boxes of class 2 there
    crowd[data.rows(7)] = True  # the only one
    dataset = pairs_of(replace(data, crowd=crowd))
    assert dataset.crowds == {str(data.path(index)): frozenset({2}) for index in (3, 7)}
    asked: set[tuple[str, int]] = set()
    shown: set[str] = set()
    for loaded in run(dataset, steps=20, turned=0.0):
        batch = loaded.batch
        for image, source, box in zip(batch.asked.tolist(), batch.source.tolist(), batch.exemplars, strict=True):
            label = class_of(data, batch.names[source], box)
            asked.add((Path(batch.names[image]).stem, label))
            shown |= {Path(batch.names[source]).stem} if label == 2 else set()
    assert not asked & {("003", 2), ("007", 2)}
    assert {("003", 0), ("007", 1), ("002", 2), ("001", 2)} <= asked
    assert shown == {"002", "003"}  # what is no crowd can be shown


def test_of_which_classes_there_is_a_crowd_is_told_by_name():
    items, draws = items_of([[0], [0, 1]]), np.random.default_rng
    episodes, _ = draw_episodes(items, [0, 1], 3, draws(0), {"image 0": frozenset({0})})
    assert {tuple(row) for row in episodes.tolist()} == {(0, 1, 1), (1, 0, 0)}
    episodes, exemplars = draw_episodes(
        items, [0], 3, draws(0), {name: frozenset({0}) for name in ("image 0", "image 1")}
    )
    assert episodes.tolist() == [[0, NOTHING, 1]]
    assert exemplars.tolist() == [[0.5, 0.5, 1, 1]]


def test_images_that_cannot_be_read_are_replaced_and_told(data: Annotations):
    data.path(0).write_text("<html>")
    loaded = run(pairs_of(data), steps=4)
    told = " ".join(text for one in loaded for text in one.replaced)
    assert "000.png" in told
    assert not any(Path(name).stem == "000" for one in loaded for name in one.batch.names)
    for one, same in zip(loaded, run(pairs_of(data), steps=4, workers=1), strict=True):
        assert_same(one, same)
    for path in data.root.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="11 images in a row cannot be read"):
        run(pairs_of(data), steps=1)


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path, data: Annotations):
    (tmp_path / "single").mkdir()
    single = annotated(tmp_path / "single", [[0], [1], [2]])
    with pytest.raises(DataError, match=r"No class is in two images.*got 3 images, 3 classes"):
        pairs_of(single)
    with pytest.raises(DataError, match="No class is in two images"):
        pairs_of(data, labels=[3])
    with pytest.raises(UsageError, match="questions; got 0; expected at least 1"):
        run(pairs_of(data), questions=0)


def test_a_batch_moves_as_bytes_and_becomes_numbers(data: Annotations):
    packed = run(pairs_of(data), steps=1)[0].batch
    assert packed.images.dtype == torch.uint8
    batch, moved = packed.to("cpu"), packed.to("meta")
    assert {tensor.device.type for tensor in moved[:5]} == {"meta"}
    assert {target.boxes.device.type for target in moved.targets} == {"meta"}
    assert moved.names == batch.names
    assert not batch.images.permute(0, 2, 3, 1)[batch.padding].any()
