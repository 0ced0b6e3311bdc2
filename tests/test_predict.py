"""Prediction: an image's answer is its own, whatever it is given as and whatever comes with it."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation import cases
from PIL import Image

from detrkit import models
from detrkit.arithmetic import choose_device, choose_dtype
from detrkit.boxes import xyxy_to_cxcywh
from detrkit.checkpoint import save_model
from detrkit.data.annotations import Annotations, Strings
from detrkit.data.loading import _Images
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.find import examples_of
from detrkit.predict import Detector, _check, load
from detrkit.segmentation.model import Segmenter
from detrkit.structures import Category, Detections, Predictions
from detrkit.training.validation import detect, judge, label_table

CATEGORIES = tuple(Category(number, name) for number, name in ((1, "bolt"), (5, "nut"), (6, "washer")))
SIZES = [(64, 64), (64, 80), (96, 64), (64, 64), (50, 200), (80, 64), (64, 80), (33, 47), (64, 64)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A tiny model with random weights that sees: its answers differ from image to image."""
    torch.manual_seed(0)
    model = models.build(
        "detr-nano", backbone="resnet-nano", dim=32, heads=4, encoder_layers=1, decoder_layers=2, feedforward=64,
        num_queries=8, num_classes=3, image_size=64, longest=96,
    )  # fmt: skip
    with torch.no_grad():
        model.class_head.weight *= 8
    return Detector(model.eval(), models.variant("detr"), CATEGORIES)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [
        Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        for h, w in SIZES
    ]


def same(one: Detections, other: Detections, tolerance: float = 0.0) -> None:
    assert np.array_equal(one.labels, other.labels)
    assert one.image_size == other.image_size
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=tolerance)
    np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=tolerance * max(one.image_size))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 20])
def test_an_answer_does_not_depend_on_its_batch(
    detector: Detector, pictures: list[Image.Image], batch_size: int
) -> None:
    alone = [detector.predict(picture, threshold=0.0) for picture in pictures]
    together = detector.predict(pictures, threshold=0.0, batch_size=batch_size)
    reverse = detector.predict(pictures[::-1], threshold=0.0, batch_size=batch_size)[::-1]
    assert not np.allclose(alone[0].scores, alone[3].scores, atol=1e-3)  # two images of one size, two answers
    for one, other, third in zip(alone, together, reverse, strict=True):
        same(one, other, 1e-4)
        same(one, third, 1e-4)


def test_workers_change_nothing(detector: Detector, pictures: list[Image.Image]) -> None:
    for one, other in zip(
        detector.predict(pictures, threshold=0.0), detector.predict(pictures, threshold=0.0, workers=2), strict=True
    ):
        same(one, other)


def test_what_only_training_needs_is_not_loaded() -> None:
    script = "import sys, detrkit; detrkit.load; sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_detector_says_in_a_line_what_it_is(detector: Detector) -> None:
    assert repr(detector) == "<Detector detr, images of 64 pixels on cpu: bolt, nut, washer>"
    many = replace(detector, preset="detr-nano", categories=tuple(Category(n, f"c{n}") for n in range(9)))
    assert repr(many) == "<Detector detr-nano, images of 64 pixels on cpu: c0, c1, c2, c3, c4 and 4 more>"


def test_one_gives_one_and_a_list_gives_a_list(detector: Detector, pictures: list[Image.Image]) -> None:
    assert isinstance(detector.predict(pictures[0]), Detections)
    found = detector.predict([pictures[0]])
    assert isinstance(found, list)
    assert len(found) == 1
    assert detector.predict([]) == []
    assert list(detector.stream([])) == []
    assert len(detector.predict(tuple(pictures[:2]))) == 2


def test_a_file_an_image_and_an_array_give_one_answer(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path
) -> None:
    file = tmp_path / "ü 1.png"
    pictures[1].save(file)
    expected = detector.predict(pictures[1], threshold=0.0)
    for source in (file, str(file), np.asarray(pictures[1]), Image.open(file)):
        same(detector.predict(source, threshold=0.0), expected)  # type: ignore[arg-type]
    assert detector.predict(file).source == str(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_in_the_upright_image(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path, orientation: int
) -> None:
    upright = pictures[1]
    stored = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "turned.png", exif=exif)
    same(detector.predict(tmp_path / "turned.png", threshold=0.0), detector.predict(upright, threshold=0.0))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_are_answered(detector: Detector, pictures: list[Image.Image], mode: str) -> None:
    picture = pictures[1].convert("L").convert("I").convert("I;16") if mode == "I;16" else pictures[1].convert(mode)
    found = detector.predict(picture, threshold=0.0)
    assert found.image_size == (64, 80)
    assert len(found) == 8


def test_boxes_are_inside_sorted_and_above_the_threshold(detector: Detector, pictures: list[Image.Image]) -> None:
    for found in detector.predict(pictures, threshold=0.0):
        height, width = found.image_size
        assert len(found) == 8
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert found.labels.dtype == np.int64
        assert (found.boxes >= 0).all()
        assert (found.boxes <= (width, height, width, height)).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (np.diff(found.scores) <= 0).all()
        assert set(found.names) <= {"bolt", "nut", "washer"}
    every = detector.predict(pictures[0], threshold=0.0)
    limit = float(every.scores[3])
    some = detector.predict(pictures[0], threshold=limit)
    assert len(some) == 4  # the threshold itself is in
    assert len(detector.predict(pictures[0], threshold=1.0)) == 0


def test_boxes_are_cut_at_the_border_of_the_image(detector: Detector, pictures: list[Image.Image]) -> None:
    wide = copy.deepcopy(detector.model)
    with torch.no_grad():
        wide.box_head.layers[2].bias[2:] += 90
    for found in replace(detector, model=wide).predict(pictures, threshold=0.0):
        height, width = found.image_size
        at = found.boxes == (0, 0, width, height)
        assert (at[:, :2] | at[:, 2:]).all()  # as wide and high as the image, and somewhere in it
        assert (found.boxes >= 0).all()
        assert (found.boxes <= (width, height, width, height)).all()


def test_the_ensemble_is_all_layers_without_their_overlaps(detector: Detector, pictures: list[Image.Image]) -> None:
    plain = detector.predict(pictures, threshold=0.0)
    both = detector.predict(pictures, threshold=0.0, ensemble=True)
    assert all(0 < len(found) <= 8 for found in both)
    assert any(not np.array_equal(one.scores, other.scores) for one, other in zip(plain, both, strict=True))
    assert all((np.diff(found.scores) <= 0).all() for found in both)
    assert [found.image_size for found in both] == [found.image_size for found in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold; got -0.1; expected between 0 and 1"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"batch_size": 0}, "batch_size; got 0; expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size; got 2.5"),
        ({"workers": -1}, "workers; got -1; expected an integer of at least 0"),
        ({"workers": 1.5}, "workers; got 1.5"),
        ({"workers": "1"}, "workers; got '1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    detector: Detector, pictures: list[Image.Image], options: dict[str, Any], message: str
) -> None:
    segmenter = replace(detector, segmenter=Segmenter(copy.deepcopy(detector.model)))
    for method, one in ((Detector.stream, detector), (Detector.segment_stream, segmenter)):
        with pytest.raises(UsageError, match=message):
            list(method.__wrapped__(one, pictures[0], **options))  # as users have it, without the types checked


def test_unreadable_images_are_named_or_left_out(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    pictures[0].save(tmp_path / "good.png")
    files = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "none.png", tmp_path / "good.png"]
    with pytest.raises(DataError, match=r"bad\.png"):
        detector.predict(files)
    left_out: list[int] = []
    found = list(detector.stream(files, unreadable=lambda index, error: left_out.append(index)))
    assert len(found) == 2
    assert left_out == [1, 2]


def test_prediction_leaves_gradients_on_for_the_caller(detector: Detector, pictures: list[Image.Image]) -> None:
    for _ in detector.stream(pictures[:2]):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_devices_are_checked(tmp_path: Path) -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:99", "meta:what"):
        with pytest.raises(UsageError, match="no such device"):
            choose_device(name)
    with pytest.raises(ModelError, match="no such file or folder"):
        load(tmp_path / "none")


@pytest.fixture
def saved(detector: Detector, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", detector.model, preset="detr-nano", categories=CATEGORIES)
    return tmp_path / "model"


def test_the_precision_is_chosen(saved: Path, pictures: list[Image.Image]) -> None:
    """bf16 gives other figures, about the same, and boxes that are finer than bf16 is."""
    exact = load(saved, device="cpu").predict(pictures[0], threshold=0.0)
    rough = load(saved, device="cpu", precision="bf16").predict(pictures[0], threshold=0.0)
    assert not np.array_equal(exact.scores, rough.scores)
    np.testing.assert_allclose(np.sort(exact.scores), np.sort(rough.scores), atol=0.03)
    relative = torch.from_numpy(rough.boxes / 64)
    assert bool((relative.bfloat16().float() != relative).any())
    with pytest.raises(UsageError, match="Bad value for precision"):
        choose_dtype("int8", torch.device("cpu"))


def test_masks_are_found_in_any_precision(detector: Detector, pictures: list[Image.Image]) -> None:
    torch.manual_seed(0)
    whole = replace(detector, segmenter=Segmenter(detector.model).eval())
    exact, rough = (replace(whole, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    plain, other = exact.predict(pictures[0], threshold=0.0), rough.predict(pictures[0], threshold=0.0)
    assert plain.masks is not None
    assert other.masks is not None
    assert len(other.masks) == len(other.scores) == len(plain.scores)
    agree = exact.segment(pictures[0], threshold=0.0).ids == rough.segment(pictures[0], threshold=0.0).ids
    assert agree.mean() > 0.8


def annotations_of(
    folder: Path, picture: Image.Image, size: tuple[int, int], names: tuple[str, ...] = ("bolt", "nut", "washer")
) -> Annotations:
    picture.save(folder / "a.png")
    return Annotations(
        root=folder,
        file_names=Strings(["a.png"]),
        image_ids=np.array([1]),
        image_sizes=np.array([size], np.int32),
        offsets=np.array([0, 1]),
        boxes=np.array([[1.0, 1, 9, 9]]),
        labels=np.array([0]),
        areas=np.array([64.0]),
        crowd=np.array([False]),
        difficult=np.array([False]),
        categories=tuple(Category(index, name) for index, name in enumerate(names)),
    )


def test_categories_are_joined_by_name() -> None:
    data = [Category(10, "washer"), Category(20, "screw"), Category(30, "bolt")]
    assert label_table(CATEGORIES, data).tolist() == [2, -1, 0]
    with pytest.raises(DataError, match=r"knows none.*model: bolt, nut, washer; data: screw"):
        label_table(CATEGORIES, data[1:2])


def test_categories_of_one_name_are_told_apart_by_their_ids() -> None:
    data = [Category(1, "cell"), Category(2, "cell"), Category(3, "x")]
    assert label_table(data, data).tolist() == [0, 1, 2]
    assert label_table(data[::-1], data).tolist() == [2, 1, 0]
    assert label_table([Category(7, "cell"), Category(8, "x")], data).tolist() == [-1, 2], "which of the two is unknown"


def test_detections_speak_the_data_sets_categories(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path
) -> None:
    plain = detector.predict(pictures[1], threshold=0.0)
    data = annotations_of(tmp_path, pictures[1], (64, 80), ("washer", "screw", "bolt"))
    (found,) = detect(detector, data)
    kept = [row for row, name in enumerate(plain.names) if name != "nut"]
    assert found.names == [plain.names[row] for row in kept]
    assert found.categories == data.categories
    assert np.array_equal(found.scores, plain.scores[kept])
    assert np.array_equal(found.boxes, plain.boxes[kept])


class Knowing(torch.nn.Module):
    """Answers every image with the same boxes, each of a class that it is sure of and of others that it is not."""

    def __init__(self, boxes: torch.Tensor, labels: torch.Tensor, sure: torch.Tensor):
        super().__init__()
        self.config, self.boxes = SimpleNamespace(image_size=64, longest=96), boxes
        self.logits = torch.full((len(boxes), 3), -6.0)
        self.logits[torch.arange(len(boxes)), labels] = sure

    def forward(self, images: torch.Tensor, padding: torch.Tensor | None) -> Predictions:
        count, (queries, classes) = len(images), self.logits.shape
        return Predictions(
            self.logits.expand(1, count, queries, classes),
            self.boxes.expand(1, count, queries, 4),
            torch.zeros(1, count, queries, 8),
        )


def test_a_crowded_image_is_judged_as_coco_judges_what_is_predicted(tmp_path: Path, rng: np.random.Generator) -> None:
    places = [[float(x), float(y), x + 8.0, y + 8.0] for y in range(0, 130, 10) for x in range(0, 120, 10)]
    labels = [number % 3 for number in range(len(places))]
    assert len(places) == 156
    data = cases.annotations_of([places], [labels], classes=3, size=(130, 120), root=tmp_path)
    Image.new("RGB", (120, 130)).save(tmp_path / "0.png")
    corners = torch.tensor(places) / torch.tensor([120.0, 130, 120, 130])
    moved = torch.from_numpy(rng.normal(0, 0.003, (len(places), 4))).float()
    sure = torch.from_numpy(rng.uniform(0, 4, len(places))).float()
    model = Knowing(xyxy_to_cxcywh(corners) + moved.clamp(-0.005, 0.005), torch.tensor(labels), sure)
    crowded = Detector(model, models.variant("conditional_detr"), data.categories)
    found = crowded.predict([tmp_path / "0.png"], threshold=0.0)
    ours, theirs = judge(crowded, data).metrics.figures, cases.pycocotools_figures(data, found)
    assert len(found[0]) == 156
    assert ours["AP50"] == pytest.approx(1)
    assert 0.3 < ours["AP"] < 0.99
    assert list(ours.values()) == pytest.approx([math.nan if value < 0 else value for value in theirs], nan_ok=True)


@pytest.mark.parametrize(
    ("annotated", "factor"),
    [
        ((128, 160), 2.0),  # the file was scaled down after it was annotated: boxes go back to the annotated size
        ((80, 64), 1.0),  # the size was noted before the picture was turned upright: boxes stay, as in training
        ((0, 0), 1.0),  # not known
    ],
)
def test_detections_lie_in_the_frame_that_boxes_were_annotated_in(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path, annotated: tuple[int, int], factor: float
) -> None:
    plain = detector.predict(pictures[1], threshold=0.0)
    calls: list[int] = []
    data = annotations_of(tmp_path, pictures[1], annotated)
    (found,) = detect(detector, data, on_image=lambda: calls.append(1))
    np.testing.assert_allclose(found.boxes, plain.boxes * factor, rtol=1e-6)
    assert calls == [1]


def test_the_threshold_is_the_one_of_the_validation_images(detector: Detector, pictures: list[Image.Image]) -> None:
    assert detector.threshold == 0.5
    every = detector.predict(pictures[0], threshold=0.0)
    score = float(every.scores[2])
    knowing = replace(detector, about={"threshold": score})
    assert knowing.threshold == score
    assert len(knowing.predict(pictures[0])) == 3
    assert knowing.panoptic_threshold == score
    assert [replace(detector, about=about).panoptic_threshold for about in (None, {}, {"threshold": "high"})] == [
        0.85
    ] * 3
    assert [replace(detector, about={"threshold": wrong}).threshold for wrong in ("high", -0.1, 1.5)] == [0.5] * 3


@pytest.mark.parametrize("part", ["class_head.bias", "box_head.layers.2.bias"])
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float32, r"not finite; got NaN or infinity, computed in float32\. The weights are damaged"),
        (torch.bfloat16, r"not finite; got .* bfloat16\. .*--precision fp32"),
    ],
)
def test_answers_that_are_not_finite_are_no_empty_answers(
    detector: Detector, pictures: list[Image.Image], tmp_path: Path, part: str, dtype: torch.dtype, message: str
) -> None:
    broken = replace(detector, model=copy.deepcopy(detector.model), dtype=dtype)
    with torch.no_grad():
        broken.model.get_parameter(part)[:1] = torch.nan
    pictures[0].save(tmp_path / "a.png")
    for ensemble in (False, True):
        with pytest.raises(ModelError, match=rf"a\.png: .*{message}"):
            broken.predict(tmp_path / "a.png", ensemble=ensemble)


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(3, 8, 8), b"bytes", (name for name in "ab")])
def test_what_is_no_picture_is_refused(detector: Detector, wrong: Any) -> None:
    segmenter = replace(detector, segmenter=Segmenter(copy.deepcopy(detector.model)))
    for method, one in (
        *((method, detector) for method in (Detector.predict, Detector.stream)),
        *((method, segmenter) for method in (Detector.segment, Detector.segment_stream)),
        (lambda one, images: Detector.find.__wrapped__(one, "a.png", (0, 0, 9, 9), images), detector),
    ):
        with pytest.raises(UsageError, match="no picture and no list of pictures; got"):
            list(getattr(method, "__wrapped__", method)(one, wrong))  # as users have it, without the types checked


@pytest.mark.parametrize("wrong", [None, ["a.png"], torch.zeros(3, 4, 4)])
def test_what_is_no_picture_in_a_list_is_named(detector: Detector, pictures: list[Image.Image], wrong: Any) -> None:
    said = rf"image 1: This is no picture; got {type(wrong).__name__}; expected a file, a PIL image or an RGB array"
    for search in (
        lambda images: Detector.predict.__wrapped__(detector, images),
        lambda images: Detector.find.__wrapped__(detector, pictures[0], (0, 0, 9, 9), images),
    ):
        with pytest.raises(UsageError, match=said):
            search([pictures[0], wrong])
    with pytest.raises(UsageError, match="example: This is no picture"):
        examples_of.__wrapped__("it", [wrong], [(0, 0, 9, 9)])


def test_pictures_that_are_opened_when_they_are_asked_for_are_not_opened_before(
    detector: Detector, pictures: list[Image.Image]
) -> None:
    opened: list[Any] = []

    class Column(Sequence[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: Any) -> Any:
            opened.append(index)
            return pictures[0]

    next(detector.stream(Column(), batch_size=1))
    assert len(opened) < 20  # checked types look at some
    with pytest.raises(UsageError, match="image 1: This is no picture; got NoneType"):
        _Images.__getitem__(SimpleNamespace(sources=[pictures[0], None]), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_detector_is_copied_and_pickled(detector: Detector, pictures: list[Image.Image], again: Any) -> None:
    whole = replace(detector, segmenter=Segmenter(copy.deepcopy(detector.model)), about={"threshold": 0.25})
    other = again(whole)
    assert repr(other) == repr(whole)
    assert (other.variant, other.threshold) == (models.variant("detr"), 0.25)
    assert other.model is not whole.model
    same(whole.predict(pictures[0], threshold=0.0), other.predict(pictures[0], threshold=0.0))


def test_a_detector_answers_as_it_is_evaluated_whatever_its_model_did_before(
    detector: Detector, pictures: list[Image.Image]
) -> None:
    model = copy.deepcopy(detector.model).train()
    made = Detector(model, models.variant("detr"), CATEGORIES, segmenter=Segmenter(copy.deepcopy(model)).train())
    assert made.segmenter is not None
    assert not model.training
    assert not made.segmenter.training
    same(
        replace(made, segmenter=None).predict(pictures[0], threshold=0.0), detector.predict(pictures[0], threshold=0.0)
    )


def test_one_picture_is_a_stream_of_one(detector: Detector, pictures: list[Image.Image]) -> None:
    (one,) = detector.stream(pictures[0], threshold=0.0)
    same(one, detector.predict(pictures[0], threshold=0.0))


def test_thresholds_are_numbers_of_any_kind() -> None:
    for threshold in (0, 1.0, np.float32(0.25), np.int64(1)):
        _check(threshold, 1, np.int64(0))
    for threshold in ("0.5", np.float32(1.5), math.nan):
        with pytest.raises(UsageError, match="Bad value for threshold"):
            _check(threshold, 1, np.int64(0))


def test_any_sequence_of_pictures_is_a_list_of_them(detector: Detector, pictures: list[Image.Image]) -> None:
    assert len(list(detector.stream(deque(pictures[:2])))) == 2
