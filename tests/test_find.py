"""Finding by example, as people call it: boxes in pixels, pictures from everywhere, several things at once."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from one_shot.squares import SMALL, draw, preset_of, small
from PIL import Image

from detrkit import models
from detrkit.data.images import open_image
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.find import LARGEST, Search, Thing, examples_of, find, search_of
from detrkit.one_shot.finder import Finder, Shown, Sought
from detrkit.one_shot.model import OneShot
from detrkit.predict import Detector
from detrkit.structures import Category, Detections

MODULE = importlib.import_module("detrkit.find")
SIDE = 24
EXAMPLE = [("red", 8, 12), ("blue", 80, 50)]
SCENES = [
    [("red", 10, 8), ("blue", 92, 10), ("red", 60, 62)],
    [("blue", 14, 60), ("red", 90, 60)],
    [("blue", 50, 30)],
]


def box_at(x: int, y: int, side: int = SIDE) -> tuple[float, float, float, float]:
    return float(x), float(y), float(x + side), float(y + side)


RED, BLUE = box_at(8, 12), box_at(80, 50)


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A detector that learnt nothing."""
    torch.manual_seed(3)
    config = {**SMALL, "stride": 8, "num_classes": 2, "image_size": 96, "longest": 128}
    model = models.build("detr-nano", **config).eval()
    return Detector(model, models.variant("detr"), (Category(1, "a"), Category(2, "b")), "detr-nano")


@pytest.fixture(scope="module")
def learnt() -> Detector:
    """One that says that it was trained to find by example."""
    model = small(config={"image_size": 96, "longest": 128})
    return Detector(model.detector, models.variant("detr"), (Category(1, "alike"),), preset_of("detr"), one_shot=model)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The scenes, and behind them the example."""
    names = [tmp_path / f"{index}.png" for index in range(len(SCENES))]
    for index, name in enumerate(names):
        draw(SCENES[index], seed=index).save(name)
    draw(EXAMPLE, seed=9).save(tmp_path / "example.png")
    return [*names, tmp_path / "example.png"]


def iou(box: np.ndarray, other: tuple[float, ...]) -> float:
    width, height = (max(0.0, min(box[side + 2], other[side + 2]) - max(box[side], other[side])) for side in (0, 1))
    areas = ((one[2] - one[0]) * (one[3] - one[1]) for one in (box, other))
    return width * height / (sum(areas) - width * height)


def finds(answer: Detections, colour: str, squares: list[tuple[str, int, int]]) -> list[bool]:
    """Of each square of a colour, whether a box overlaps it by half."""
    return [any(iou(box, box_at(x, y)) > 0.5 for box in answer.boxes) for name, x, y in squares if name == colour]


def test_a_box_around_one_finds_the_others(detector: Detector, files: list[Path]):
    *scenes, example = files
    answers = detector.find(example, RED, scenes, name="red square", threshold=0.4)
    for answer, squares, file in zip(answers, SCENES, scenes, strict=True):
        assert all(finds(answer, "red", squares))
        assert not any(finds(answer, "blue", squares))
        assert answer.source == str(file)
        assert answer.image_size == (96, 128)
        assert answer.categories == (Category(1, "red square"),)
        assert (np.diff(answer.scores) <= 0).all()
        assert (answer.scores >= 0.4).all()
    single = detector.find(example, RED, scenes[0], candidates="windows", threshold=0.0)
    assert isinstance(single, Detections)
    assert len(single) > len(answers[0])


def test_pictures_come_as_files_text_images_and_arrays(detector: Detector, files: list[Path]):
    picture = draw(EXAMPLE, seed=9)
    scene = draw(SCENES[0], seed=0)
    for example, image in (
        (str(files[-1]), str(files[0])),
        (picture, scene),
        (np.asarray(picture), np.asarray(scene)),
    ):
        here = detector.find(example, np.array(RED), [image], threshold=0.2)[0]
        there = detector.find(files[-1], RED, [files[0]], threshold=0.2)[0]
        np.testing.assert_allclose(here.boxes, there.boxes, atol=1e-3)
        np.testing.assert_allclose(here.scores, there.scores, atol=1e-4)


def test_a_turned_example_is_boxed_as_people_see_it(detector: Detector, files: list[Path], tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side; viewers turn it upright
    draw(EXAMPLE, seed=9).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    plain = detector.find(files[-1], RED, files[0], threshold=0.2)
    turned = detector.find(tmp_path / "turned.png", RED, files[0], threshold=0.2)
    np.testing.assert_allclose(turned.boxes, plain.boxes, atol=1e-3)
    with pytest.raises(UsageError, match="lies outside"):  # where the box would be in the stored frame
        detector.find(tmp_path / "turned.png", (10.0, 100.0, 34.0, 124.0), files[0])


def test_an_example_is_read_as_what_is_searched(
    detector: Detector, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    photograph = draw(EXAMPLE, seed=9)
    photograph.resize((photograph.width * 8, photograph.height * 8)).save(tmp_path / "large.jpg")
    seen: list[torch.Tensor] = []
    for name in ("show", "search"):
        plain = getattr(Finder, name)
        monkeypatch.setattr(
            Finder, name, lambda self, image, *others, plain=plain: seen.append(image) or plain(self, image, *others)
        )
    detector.find(tmp_path / "large.jpg", tuple(8 * side for side in RED), tmp_path / "large.jpg")
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_a_grey_example_is_an_example(detector: Detector, files: list[Path], tmp_path: Path):
    grey = draw(EXAMPLE, seed=9).convert("L")
    grey.save(tmp_path / "grey.png")
    plain = detector.find(np.asarray(grey.convert("RGB")), RED, files[0], threshold=0.0)
    for example in (tmp_path / "grey.png", np.asarray(grey)):
        np.testing.assert_allclose(detector.find(example, RED, files[0], threshold=0.0).scores, plain.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((100.0, 10.0, 140.0, 30.0), r"lies outside its image.*got \(100.0, 10.0, 140.0, 30.0\).*128 × 96 pixels"),
        ((-9.0, 10.0, 20.0, 30.0), "lies outside"),
        ((10.0, 10.0, 20.0, 99.0), "lies outside"),
        ((-0.8, 10.0, 0.5, 30.0), r"lies outside its image.*got \(-0.8, 10.0, 0.5, 30.0\).*128 × 96 pixels"),
        ((10.0, 95.5, 30.0, 96.7), "lies outside"),
        ((10.0, 10.0, 10.5, 30.0), "no area"),
        ((30.0, 10.0, 10.0, 40.0), "no area.*left < right"),
        ((10.0, 40.0, 30.0, 10.0), "no area"),
        ((math.nan, 10.0, 20.0, 30.0), "not finite"),
        ((10.0, 10.0, math.inf, 30.0), "not finite"),
        ((10.0, 10.0, 20.0), "no box.*left, top, right, bottom"),
    ],
)
def test_boxes_that_make_no_sense_are_named_with_their_image(
    detector: Detector, files: list[Path], box: tuple[float, ...], said: str
):
    with pytest.raises(UsageError, match=rf"example\.png: .*{said}"):
        detector.find(files[-1], box, files[0])
    with pytest.raises(UsageError, match=rf"^the image of (an )?example.*: .*{said}"):
        detector.find(np.asarray(draw(EXAMPLE, seed=9)), box, files[0])


def test_a_box_that_rounding_put_over_the_border_is_cut(detector: Detector, files: list[Path]):
    over = detector.find(files[-1], (-0.7, 12.0, 32.0, 36.0), files[0], threshold=0.0)
    cut = detector.find(files[-1], (0.0, 12.0, 32.0, 36.0), files[0], threshold=0.0)
    assert np.array_equal(over.scores, cut.scores)


def test_images_that_cannot_be_read_are_named(detector: Detector, files: list[Path], tmp_path: Path):
    for missing in (tmp_path / "nowhere.png", str(tmp_path / "nowhere.png")):
        with pytest.raises(DataError, match=r"nowhere\.png: There is no such image file"):
            detector.find(missing, RED, files[0])
    with pytest.raises(DataError, match=r"nowhere\.png"):
        detector.find(files[-1], RED, [files[0], tmp_path / "nowhere.png"])
    files[1].write_bytes(b"broken" * 9)
    left_out: list[tuple[int, str]] = []
    answers = list(
        find(
            detector,
            [Thing("red", ((files[-1], RED),))],
            [str(file) for file in files[:3]],
            unreadable=lambda index, error: left_out.append((index, str(error))),
        )
    )
    assert [Path(answer.source).name for answer in answers] == ["0.png", "2.png"]
    ((index, error),) = left_out
    assert index == 1
    assert "1.png" in error


def test_nothing_to_search_is_no_trouble(detector: Detector, files: list[Path]):
    thing = Thing("red", ((files[-1], RED),))
    assert list(find(detector, [thing], [])) == []
    files[0].write_bytes(b"broken" * 9)
    assert list(find(detector, [thing], [files[0]], unreadable=lambda index, error: None)) == []


def test_of_several_things_a_place_is_one(detector: Detector, files: list[Path]):
    things = [Thing("red", ((files[-1], RED),)), Thing("blue", ((files[-1], BLUE),))]
    search = Search(threshold=0.0)
    for answer, squares in zip(find(detector, things, files[:2], search), SCENES, strict=False):
        assert [category.name for category in answer.categories] == ["red", "blue"]
        assert set(answer.labels.tolist()) == {0, 1}
        for name, x, y in squares:
            best = max(
                (row for row in range(len(answer)) if iou(answer.boxes[row], box_at(x, y)) > 0.5),
                key=lambda row: answer.scores[row],
            )
            assert answer.names[best] == name
        among = [iou(a, tuple(b)) for row, a in enumerate(answer.boxes) for b in answer.boxes[:row]]
        assert max(among) <= 0.5 + 1e-4
    both = next(find(detector, things, files[:1], Search(threshold=0.0, exclusive=False)))
    assert len(both) > len(next(find(detector, things, files[:1], search)))
    assert (np.diff(both.scores) <= 0).all()


def test_what_it_is_not_is_told_by_examples(detector: Detector, files: list[Path]):
    squares = [("red", 10, 8), ("orange", 70, 50)]
    scene = draw(squares, seed=4)
    plain = Thing("red", ((files[-1], RED),))
    told = Thing("red", ((files[-1], RED),), unlike=((scene, box_at(70, 50)),))
    scores = []
    for thing in (plain, told):
        (answer,) = find(detector, [thing], [scene], Search(threshold=0.0))
        assert any(finds(answer, "red", squares))
        at = [answer.scores[row] for row in range(len(answer)) if iou(answer.boxes[row], box_at(70, 50)) > 0.5]
        scores.append(max(at, default=0.0))
    assert scores[1] < 0.5
    assert scores[1] <= scores[0]


def test_several_examples_are_taken_together(detector: Detector, files: list[Path]):
    answers = [
        detector.find([files[-1], files[0]], [RED, box_at(10, 8)], files[1], combine=combine, threshold=0.0)
        for combine in ("mean", "max")
    ]
    assert all(len(one) for one in answers)
    assert not np.array_equal(answers[0].scores, answers[1].scores)


def test_learnt_likeness_asks_queries_and_the_rest_looks_at_windows(
    detector: Detector, learnt: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    for way in ("answer", "look_everywhere"):
        original = getattr(OneShot, way)

        def told(*arguments, _way=way, _original=original, **named):
            asked.append(_way)
            return _original(*arguments, **named)

        monkeypatch.setattr(OneShot, way, told)
    learnt.find(files[-1], RED, files[0])
    assert set(asked) == {"answer"}
    asked.clear()
    detector.find(files[-1], RED, files[0])
    assert set(asked) == {"look_everywhere"}
    asked.clear()
    learnt.find(files[-1], RED, files[0], candidates="queries")
    assert set(asked) == {"answer"}
    asked.clear()
    detector.find(files[-1], RED, files[0], candidates="both")
    assert set(asked) == {"answer", "look_everywhere"}
    asked.clear()
    for candidates in ("windows", "both"):
        with pytest.raises(UsageError, match=rf"^candidates: .*proposes places itself; got '{candidates}'"):
            learnt.find(files[-1], RED, files[0], candidates=candidates)
    assert not asked


def test_the_image_of_examples_is_looked_at_once_for_all_its_boxes(
    detector: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    things = [
        Thing("red", ((files[-1], RED), (files[0], box_at(10, 8))), unlike=((str(files[-1]), BLUE),)),
        Thing("blue", ((files[-1], BLUE), (files[0], box_at(92, 10)), (files[-1], box_at(82, 52)))),
    ]
    opened: list[str] = []
    shown: list[tuple[int, Shown]] = []
    show = Finder.show

    def opens(source, **named):
        opened.append(str(source))
        return open_image(source, **named)

    def shows(self, image, boxes):
        shown.append((len(boxes), show(self, image, boxes)))
        return shown[-1][1]

    monkeypatch.setattr(MODULE, "open_image", opens)
    monkeypatch.setattr(Finder, "show", shows)
    seen: list[list[Sought]] = []
    search = Finder.search
    monkeypatch.setattr(
        Finder, "search", lambda self, image, sought: seen.append(sought) or search(self, image, sought)
    )
    list(find(detector, things, [files[1]], Search(combine="max")))
    assert sorted(count for count, _ in shown) == [2, 4]
    assert len(opened) == 2  # two images, to measure their boxes; to be looked at they are read as others are
    # Each thing has its own boxes, in order.
    (_, there), (_, here) = shown
    ((red, blue),) = seen
    torch.testing.assert_close(red.looks, torch.stack([there.looks[0], here.looks[0]]))
    torch.testing.assert_close(red.unlike, there.looks[1:2])
    torch.testing.assert_close(blue.looks, torch.stack([there.looks[2], here.looks[1], there.looks[3]]))


def test_what_is_usual_is_told_by_images_from_the_first_to_the_last(
    detector: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    read: list[list[str]] = []
    load = MODULE.load_images

    def loads(images, **named):
        read.append([Path(image).name for image in images])
        return load(images, **named)

    levelled: list[int] = []
    level = Finder.level
    monkeypatch.setattr(
        Finder, "level", lambda self, images, sought: levelled.append(len(images)) or level(self, images, sought)
    )
    monkeypatch.setattr(MODULE, "load_images", loads)
    monkeypatch.setattr(MODULE, "SEEN", 3)
    monkeypatch.setattr(MODULE, "LEVELLED", 2)
    thing = Thing("red", ((files[-1], RED),))
    for images, expected in (
        ([*files, files[0]], ["0.png", "2.png", "0.png"]),
        (files, ["0.png", "1.png", "example.png"]),
        (files[:2], ["0.png", "1.png"]),
        (files[:1], ["0.png"]),
    ):
        read.clear()
        list(find(detector, [thing], images))
        assert read == [expected, ["example.png"], [file.name for file in images]]
    assert levelled == [2, 2, 2, 1]


def test_a_place_is_one_thing_however_much_places_may_overlap(detector: Detector, files: list[Path]):
    things = [Thing("red", ((files[-1], RED),)), Thing("blue", ((files[-1], BLUE),))]

    def most(**search) -> float:
        (answer,) = find(detector, things, files[:1], Search(threshold=0.0, overlap=1.0, **search))
        assert set(answer.labels.tolist()) == {0, 1}
        boxes = list(zip(answer.boxes, answer.labels, strict=True))
        return max(iou(a, tuple(b)) for a, ours in boxes for b, theirs in boxes if ours != theirs)

    assert most() <= 0.5 + 1e-4
    assert most(exclusive=False) > 0.9


def test_images_are_searched_at_the_size_that_is_asked_for(
    detector: Detector, learnt: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    sizes: list[tuple[int, int]] = []
    see, encode = OneShot.see, OneShot.encode
    monkeypatch.setattr(OneShot, "see", lambda self, images: sizes.append(images.shape[2:]) or see(self, images))
    monkeypatch.setattr(
        OneShot, "encode", lambda self, images, padding: sizes.append(images.shape[2:]) or encode(self, images, padding)
    )

    def seen(which: Detector, box: tuple[float, ...], **search) -> tuple[int, int]:
        sizes.clear()
        which.find(files[-1], box, files[0], **search)
        assert len(set(sizes)) == 1  # examples and images alike
        return tuple(sizes[0])

    assert seen(learnt, RED) == (96, 128)
    assert seen(learnt, RED, image_size=72) == (72, 96)
    assert seen(detector, (0.0, 0.0, 96.0, 96.0)) == (96, 128)
    smallest = 6
    # 4 parts along a side of one cell of 8 pixels each
    assert seen(detector, (8.0, 12.0, 30.0, 12.0 + smallest))[0] == min(4 * 8 * 96 // smallest, LARGEST)


def test_options_and_examples_that_make_no_sense_are_refused(detector: Detector, files: list[Path]):
    with pytest.raises(UsageError, match=r"no such option of a search; got 'treshold'.*Did you mean 'threshold'"):
        detector.find(files[-1], RED, files[0], treshold=0.2)
    for name, value, said in (
        ("threshold", 1.5, "expected a number between 0 and 1"),
        ("threshold", -0.1, "expected a number between 0 and 1"),
        ("threshold", math.nan, "expected a number between 0 and 1"),
        ("threshold", "0.5", "expected a number between 0 and 1"),
        ("overlap", 2.0, "expected a number between 0 and 1"),
        ("image_size", -1, "expected a number of pixels"),
        ("image_size", 100.5, "expected a number of pixels"),
        ("candidates", "window", "Did you mean 'windows'?"),
        ("candidates", None, "expected one of"),
        ("combine", "median", "expected one of ('mean', 'max')"),
    ):
        with pytest.raises(
            UsageError, match=re.escape(f"Bad value for {name}; got {value!r}") + f".*{re.escape(said)}"
        ):
            Search.__init__.__wrapped__(object.__new__(Search), **{name: value})  # types unchecked, as users have it
    with pytest.raises(UsageError, match=r"image_size.*No image has so many pixels; got 9999999 ×"):
        detector.find(files[-1], RED, files[0], image_size=9_999_999)
    numpys = {"overlap": np.float32(0.5), "image_size": np.int64(64)}
    assert Search.__init__.__wrapped__(object.__new__(Search), **numpys) is None  # types unchecked
    assert search_of({"overlap": 0.3}) == Search(overlap=0.3)
    with pytest.raises(UsageError, match="2 pictures and 1 boxes"):
        examples_of("red", [files[-1], files[0]], [RED])
    for pictures in (str(files[0]), files[0], (file for file in files)):
        with pytest.raises(UsageError, match=r"no list of pictures; got .*; expected a list of files or images"):
            next(find.__wrapped__(detector, [Thing("red", ((files[-1], RED),))], pictures))  # types unchecked
    for things in ([], [Thing("red", ())], [Thing("red", ((files[-1], RED),)), Thing("blue", ())]):
        with pytest.raises(UsageError, match="no example"):
            next(find(detector, things, files))


def test_what_finds_by_example_does_not_predict(learnt: Detector, files: list[Path]):
    for ask in (lambda: learnt.predict(files[0]), lambda: next(learnt.stream(files))):
        with pytest.raises(ModelError, match=r"knows no classes.*Detector\.find.*detrkit find"):
            ask()
