import numpy as np
import pytest
import torch
from PIL import Image

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.dataset import DetectionDataset, Key, boxes_in_file, random_stream
from detrkit.data.transforms import Evaluation, Training, View, training_sizes
from detrkit.errors import DataError, UsageError

EVALUATION = Evaluation(shortest=32, longest=100)


def training(**options):
    return Training(**training_sizes(48)._asdict(), **options)


def same(a, b):
    return (
        torch.equal(a.image, b.image)
        and torch.equal(a.target.boxes, b.target.boxes)
        and torch.equal(a.target.labels, b.target.labels)
        and a.target.name == b.target.name
        and a.replaced == b.replaced
    )


def test_item_has_normalised_boxes_and_the_path(make_annotations):
    annotations = make_annotations()
    item = DetectionDataset(annotations, EVALUATION, 0)[Key(0, 3)]
    assert item.image.shape == (3, 32, 48)
    assert item.target.boxes.dtype == torch.float32
    expected = annotations.boxes[6:8] / (60, 40, 60, 40)
    np.testing.assert_allclose(cxcywh_to_xyxy(item.target.boxes).numpy(), expected, atol=1e-6)
    assert item.target.labels.tolist() == annotations.labels[6:8].tolist()
    assert item.target.name == str(annotations.root / "003.png")
    assert item.replaced == ""


def test_crowd_boxes_are_no_targets_and_difficult_ones_are(make_annotations):
    annotations = make_annotations()
    annotations.crowd[0] = True
    annotations.difficult[1] = True
    item = DetectionDataset(annotations, EVALUATION, 0)[Key(0, 0)]
    assert item.target.labels.tolist() == [annotations.labels[1]]


def test_image_without_boxes(make_annotations):
    item = DetectionDataset(make_annotations(each=0), training(), 0)[Key(0, 0)]
    assert item.target.boxes.shape == (0, 4)
    assert item.target.labels.shape == (0,)
    assert item.target.labels.dtype == torch.int64


def test_example_depends_on_seed_epoch_and_index_alone(make_annotations):
    annotations = make_annotations()
    dataset = DetectionDataset(annotations, training(photometric=0.5), 1)
    item = dataset[Key(3, 2)]
    torch.manual_seed(0)
    np.random.default_rng(0)
    assert same(item, dataset[Key(3, 2)])
    assert same(item, DetectionDataset(annotations, training(photometric=0.5), 1)[Key(3, 2)])
    assert any(not same(item, dataset[Key(epoch, 2)]) for epoch in range(4, 8))
    assert any(not same(dataset[Key(e, 2)], DetectionDataset(annotations, training(), 2)[Key(e, 2)]) for e in range(4))


def test_streams_differ_where_numbers_trail_off_in_zeros():
    draws = {
        random_stream(*numbers).integers(2**62) for numbers in [(1, 0, 0), (2, 0, 0, 0), (2, 0, 0, 1), (2, 0, 1, 0)]
    }
    assert len(draws) == 4


def test_a_jpeg_is_decoded_no_larger_than_it_is_shown(make_annotations, monkeypatch):
    """And then shows what the whole of it shows, with the same boxes."""
    annotations = make_annotations(count=3, size=(480, 640), suffix="jpg")
    annotations.image_sizes[1] = (240, 320)  # scaled after it was annotated
    annotations.boxes[2:4] /= 2
    dataset = DetectionDataset(annotations, training(), 0)
    keys = [Key(epoch, index) for epoch in range(6) for index in range(3)]
    reduced = [dataset[key] for key in keys]
    spares, crops = [], []
    plain = View.spare

    def nothing(view, height, width):
        spares.append(plain(view, height, width))
        crops.append(view.region[2:] != (height, width))
        return 1

    monkeypatch.setattr(View, "spare", nothing)
    for key, item in zip(keys, reduced, strict=True):
        expected = dataset[key]
        assert item.image.shape == expected.image.shape
        assert torch.equal(item.target.labels, expected.target.labels)
        # The edges of a crop are moved by half a pixel at most, of the 23 or more that a crop has.
        assert (item.target.boxes - expected.target.boxes).abs().max() < (0.5 / 23 if crops[-1] else 1e-6)
        assert (item.image.float() - expected.image.float()).abs().mean() < (6 if crops[-1] else 2)
    assert {2, 4} <= set(spares)
    assert set(crops) == {True, False}


def test_unreadable_image_is_replaced_and_named(make_annotations):
    annotations = make_annotations()
    broken = annotations.path(1)
    broken.write_bytes(b"")
    dataset = DetectionDataset(annotations, EVALUATION, 0)
    item = dataset[Key(0, 1)]
    assert item.replaced.startswith(f"{broken}: ")
    assert "empty" in item.replaced
    assert item.target.name != str(broken)
    index = next(index for index in range(5) if item.target.name == str(annotations.path(index)))
    np.testing.assert_allclose(
        cxcywh_to_xyxy(item.target.boxes).numpy(),
        annotations.boxes[annotations.rows(index)] / (60, 40, 60, 40),
        atol=1e-6,
    )
    assert same(item, dataset[Key(0, 1)])
    assert len({dataset[Key(epoch, 1)].target.name for epoch in range(20)}) > 1


def test_ten_failures_in_a_row_are_an_error(make_annotations):
    annotations = make_annotations()
    for index in range(5):
        annotations.path(index).unlink()
    with pytest.raises(DataError, match=r"11 images in a row cannot be read; got .*no such image file.*Check that"):
        DetectionDataset(annotations, EVALUATION, 0)[Key(0, 0)]


def test_boxes_refer_to_the_upright_image(make_annotations):
    annotations = make_annotations(suffix="jpg")
    upright = Image.open(annotations.path(0)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(annotations.path(0), exif=exif.tobytes())
    for noted in ((40, 60), (60, 40), (0, 0)):  # upright, as stored, unknown
        annotations.image_sizes[0] = noted
        item = DetectionDataset(annotations, EVALUATION, 0)[Key(0, 0)]
        assert item.image.shape == (3, 32, 48)
        expected = annotations.boxes[:2] / (60, 40, 60, 40)
        np.testing.assert_allclose(cxcywh_to_xyxy(item.target.boxes).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("annotated", "actual", "expected", "kept"),
    [
        ((40, 60), (40, 60), [[10, 20, 50, 40], [0, 0, 6, 6]], [True, True]),
        ((0, 0), (40, 60), [[10, 20, 50, 40], [0, 0, 6, 6]], [True, True]),
        ((40, 60), (80, 120), [[20, 40, 100, 80], [0, 0, 12, 12]], [True, True]),
        ((40, 60), (20, 30), [[5, 10, 25, 20], [0, 0, 3, 3]], [True, True]),
        ((40, 60), (401, 600), [[100, 200.5, 500, 401], [0, 0, 60, 60.15]], [True, True]),  # scaled and rounded
        ((40, 60), (30, 30), [[10, 20, 30, 30], [0, 0, 6, 6]], [True, True]),  # cut
        ((40, 60), (15, 9), [[9, 15, 9, 15], [0, 0, 6, 6]], [False, True]),
    ],
)
def test_the_file_is_believed_where_sizes_differ(annotated, actual, expected, kept):
    boxes = np.array([[10, 20, 50, 40], [0, 0, 6, 6]], float)
    result, remaining = boxes_in_file(boxes, annotated, actual)
    np.testing.assert_allclose(result, expected)
    assert remaining.tolist() == kept


def test_senseless_arguments_are_refused(make_annotations):
    annotations = make_annotations()
    with pytest.raises(UsageError, match=r"seed: .*negative; got -1"):
        DetectionDataset(annotations, EVALUATION, -1)
    with pytest.raises(DataError, match="no images to train on"):
        DetectionDataset(annotations.select([]), EVALUATION, 0)
