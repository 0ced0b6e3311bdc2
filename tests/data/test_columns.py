from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.data.columns import BoxColumns, ImageColumns, build, sanitise, with_categories
from detrkit.data.files import Listing, safe_name, split_name, unique_stems, upright_size, walk_images
from detrkit.data.problems import EXAMPLES_KEPT, Problems
from detrkit.data.splits import split
from detrkit.errors import DataError
from detrkit.masks import RunLengths
from detrkit.structures import Category

TABLE = (Category(3, "cat"), Category(7, "dog"))


def clean(rows, size=(100, 200)):
    problems = Problems()
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    sizes = np.tile(np.array(size, np.int32), (len(boxes), 1))
    mended, good, repaired = sanitise(boxes, sizes, problems, lambda row: f"row {row}")
    return mended[good].tolist(), repaired.tolist(), problems


def assembled(root, names, boxes, *, sizes=None, check_files=False, **options):
    count = len(boxes)
    columns = BoxColumns(
        images=np.array([image for image, _ in boxes], np.int64),
        boxes=np.array([box for _, box in boxes], np.float64).reshape(-1, 4),
        labels=np.arange(count) % 2,
        areas=np.array(options.pop("areas", [np.nan] * count), np.float64),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        where=lambda row: f"box {row}",
    )
    sizes = np.array(sizes if sizes is not None else [(100, 200)] * len(names)).reshape(-1, 2)
    images = ImageColumns(list(names), np.arange(10, 10 + len(names)), sizes)
    return build(root, images, columns, TABLE, Problems(), "test", check_files=check_files, **options)


@pytest.mark.parametrize(
    ("box", "expected", "kind"),
    [
        ((1, 2, 30, 40), [[1, 2, 30, 40]], None),
        ((-5, 2, 30, 400), [[0, 2, 30, 100]], "outside-box"),
        ((30, 40, 1, 2), [[1, 2, 30, 40]], "inverted-box"),
        ((30, 2, 1, 40), [[1, 2, 30, 40]], "inverted-box"),
        ((5, 5, 5, 9), [], "degenerate-box"),
        ((300, 5, 400, 9), [], "degenerate-box"),
        ((np.nan, 5, 400, 9), [], "non-finite-box"),
        ((0, 5, np.inf, 9), [], "non-finite-box"),
        ((-0.005, 0, 200.005, 100), [[0, 0, 200, 100]], None),
    ],
)
def test_each_kind_of_box_is_mended_or_dropped_and_counted(box, expected, kind):
    boxes, repaired, problems = clean([box])
    assert boxes == expected
    assert problems.counts == ({kind: 1} if kind else {})
    assert problems.examples == ({kind: ["row 0"]} if kind else {})
    assert repaired == [kind in ("outside-box", "inverted-box")]


def test_boxes_of_images_of_unknown_size_are_only_cut_at_zero():
    boxes, _, problems = clean([(-4, 1, 5000, 6000)], size=(0, 0))
    assert boxes == [[0, 1, 5000, 6000]]
    assert problems.counts == {"outside-box": 1}


def test_many_problems_are_all_counted_and_a_few_named():
    _, _, problems = clean([(1, 1, 1, 1)] * 1000)
    assert problems.counts == {"degenerate-box": 1000}
    assert len(problems.examples["degenerate-box"]) == EXAMPLES_KEPT


def test_boxes_are_sorted_by_image_and_keep_their_order_within():
    found = assembled(Path(), ["a.jpg", "b.jpg", "c.jpg"], [(2, (1, 1, 9, 9)), (0, (2, 2, 9, 9)), (2, (3, 3, 9, 9))])
    assert found.offsets.tolist() == [0, 1, 1, 3]
    assert found.boxes[:, 0].tolist() == [2, 1, 3]
    assert found.labels.tolist() == [1, 0, 0]
    assert found.image_ids.tolist() == [10, 11, 12]


def test_stated_areas_are_kept_where_sensible_and_never_exceed_a_cut_box():
    boxes = [(0, (5, 5, 5, 5)), *[(0, (0, 0, 10, 10))] * 3, (0, (190, 0, 210, 10))]
    found = assembled(Path(), ["a.jpg"], boxes, areas=[1, 55, 0, np.nan, 200])
    assert found.areas.tolist() == [55, 100, 100, 100]


def test_missing_images_go_with_their_boxes_and_others_are_noted(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("here.jpg", "extra.jpg", "sub/here.PNG", ".hidden.jpg"):
        (tmp_path / name).touch()
    boxes = [(0, (1, 1, 5, 5)), (1, (2, 2, 5, 5)), (2, (3, 3, 5, 5))]
    found = assembled(tmp_path, ["here.jpg", "gone.jpg", "sub/here.PNG"], boxes, check_files=True, note_others=True)
    assert list(found.file_names) == ["here.jpg", "sub/here.PNG"]
    assert found.boxes[:, 0].tolist() == [1, 3]
    assert found.problems.counts == {"missing-image": 1, "unannotated-image": 1}
    assert found.problems.examples["missing-image"] == [str(tmp_path / "gone.jpg")]
    assert found.problems.examples["unannotated-image"] == [str(tmp_path / "extra.jpg")]


def test_a_name_that_is_escaped_is_that_of_its_file(tmp_path):
    for name in ("b\u00e4r 1.jpg", "100%25.jpg"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    (tmp_path.parent / "out.jpg").touch()
    listed = ["b%C3%A4r%201.jpg", "100%25.jpg", "..%2Fout.jpg", "%00.jpg"]
    found = assembled(tmp_path, listed, [(0, (1, 1, 5, 5))], check_files=True, note_others=True)
    assert list(found.file_names) == ["b\u00e4r 1.jpg", "100%25.jpg"]
    assert len(found.boxes) == 1
    assert found.problems.counts == {"escaped-file-name": 1, "missing-image": 2}
    assert found.problems.examples["escaped-file-name"] == [f"{tmp_path / listed[0]}: b\u00e4r 1.jpg"]


def test_all_images_missing_is_an_error_that_says_where_was_looked(tmp_path):
    with pytest.raises(DataError, match=r"None of the 1 images exists.*'a.jpg' is not in .* or elsewhere"):
        assembled(tmp_path, ["a.jpg"], [], check_files=True, looked=[Path("elsewhere")])


def test_unknown_sizes_come_from_headers_and_unreadable_images_go(tmp_path):
    Image.new("RGB", (31, 17)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"<html>")
    found = assembled(tmp_path, ["good.png", "bad.png"], [(1, (1, 1, 5, 5))], sizes=[(0, 0), (0, 0)], check_files=True)
    assert found.image_sizes.tolist() == [[17, 31]]
    assert len(found.boxes) == 0
    assert found.problems.counts == {"unreadable-image": 1}
    assert found.problems.examples["unreadable-image"] == [
        f"{tmp_path / 'bad.png'}: The file holds a web page or XML, not an image. Download the image again."
    ]


def test_one_file_named_twice_is_noted():
    assert assembled(Path(), ["a.jpg", "a.jpg"], []).problems.counts == {"duplicate-file-name": 1}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "C:\\a.jpg", "..\\a.jpg", "", "a\0", "\ud800"]
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(DataError, match="unsafe-path"):
        safe_name(name, "file.json")


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a.jpg", "a.jpg"), ("a\\b.jpg", "a/b.jpg"), ("./a//b/../c.jpg", "a/c.jpg"), ("ä..b.jpg", "ä..b.jpg")],
)
def test_names_inside_the_folder_are_made_plain(name, plain):
    assert safe_name(name, "") == plain


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_its_upright_size(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (31, 17)).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == ((31, 17) if orientation >= 5 else (17, 31))


def test_a_header_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    for name in ("a.jpg", "missing.jpg", "."):
        with pytest.raises(DataError, match=str(tmp_path)):
            upright_size(tmp_path / name)


def test_listing_tells_what_exists_exactly(tmp_path):
    (tmp_path / "sub.jpg").mkdir()
    (tmp_path / "sub.jpg" / "a.jpg").touch()
    listing = Listing(tmp_path)
    assert "sub.jpg/a.jpg" in listing
    assert "sub.jpg/A.jpg" not in listing
    assert "sub.jpg" not in listing
    assert "gone/a.jpg" not in listing


def test_images_are_found_at_any_depth_and_hidden_ones_are_not(tmp_path):
    for name in ("b.JPG", "a/c.tiff", "a/note.txt", ".git/d.jpg", "__MACOSX/e.jpg", "a/._c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(walk_images(tmp_path)) == ["b.JPG", "a/c.tiff"]


def test_stems_are_made_unique():
    names = ["a.jpg", "a.png", "b/a.jpg", "a_png.jpg", "a.webp"]
    unique = unique_stems(names)
    assert unique[:3] == ["a.jpg", "a_png.png", "b/a.jpg"]
    assert len({Path(name).with_suffix("") for name in unique}) == len(names)
    assert [Path(name).suffix for name in unique] == [Path(name).suffix for name in names]


@pytest.mark.parametrize(
    ("raw", "name"),
    [("valid", "val"), ("Validation", "val"), ("train2017", "train"), ("test", "test"), ("fold1", "fold1")],
)
def test_splits_have_one_name(raw, name):
    assert split_name(raw) == name


def test_labels_move_to_another_table_by_id_and_name_and_else_by_name():
    found = assembled(Path(), ["a.jpg", "b.jpg"], [(0, (1, 1, 9, 9)), (0, (2, 2, 9, 9)), (1, (3, 3, 9, 9))])
    moved = with_categories(found, (Category(1, "bird"), Category(9, "dog"), Category(3, "cat")))
    assert moved.labels.tolist() == [2, 1, 2]
    assert not moved.problems.counts
    lost = with_categories(found, (Category(1, "dog"),))
    assert lost.labels.tolist() == [0]
    assert lost.offsets.tolist() == [0, 1, 1]
    assert lost.problems.counts == {"unknown-category": 2}
    assert not found.problems.counts
    assert with_categories(found, TABLE) is found
    with pytest.raises(DataError, match="no category in common"):
        with_categories(found, (Category(3, "lion"),))


def test_masks_go_where_their_boxes_go():
    def runs(part):
        return part.masks.encoded(slice(0, len(part.boxes))).boxes().tolist()

    marks = np.zeros((4, 20, 20), bool)
    for number, mark in enumerate(marks):
        mark[number, number] = True
    found = assembled(Path(), ["a.jpg", "b.jpg"], [(image, (1, 1, 9, 9)) for image in (1, 0, 1, 0)])
    found = replace(found, labels=np.array([0, 1, 0, 1]), masks=RunLengths.encode(marks))
    corner = [[number, number, number + 1, number + 1] for number in range(4)]
    assert runs(with_categories(found, (TABLE[1],))) == [corner[1], corner[3]]
    parts = split(found, {"train": 0.5, "val": 0.5}, seed=0)
    assert {part.file_names[0]: runs(part) for part in parts.values()} == {"a.jpg": corner[:2], "b.jpg": corner[2:]}
    assert runs(found.select([1, 0, 1])) == corner[2:] + corner[:2] + corner[2:]


def test_a_name_that_stands_twice_in_the_table_is_matched_by_its_id():
    found = assembled(Path(), ["a.jpg"], [(0, (1, 1, 9, 9)), (0, (2, 2, 9, 9))])
    moved = with_categories(found, (Category(1, "cat"), Category(3, "cat"), Category(7, "dog")))
    assert moved.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("file", "sizes", "boxes", "kept", "frames"),
    [
        # Sizes as stored, or exchanged, and boxes on the upright image: cut where that ends.
        ((640, 480), (480, 640), [(100, 400, 200, 600), (100, 500, 200, 600)], None, (640, 480)),
        ((640, 480), (480, 640), [(400, 600, 500, 700)], [[400, 600, 480, 640]], (640, 480)),
        # The size of a scaled image is the one that its boxes are stated in.
        ((240, 320), (480, 640), [(600, 400, 700, 500)], [[600, 400, 640, 480]], (480, 640)),
        # Nothing is looked up, or found, where boxes fit, or the file cannot be read.
        ((640, 480), (480, 640), [(100, 400, 200, 450)], None, (480, 640)),
        (None, (480, 640), [(100, 400, 200, 600)], [[100, 400, 200, 480]], (480, 640)),
    ],
)
def test_boxes_are_cut_where_the_image_in_the_file_ends(tmp_path, file, sizes, boxes, kept, frames):
    if file:
        Image.new("RGB", file[::-1]).save(tmp_path / "a.png")
    else:
        (tmp_path / "a.png").touch()
    found = assembled(tmp_path, ["a.png"], [(0, box) for box in boxes], sizes=[sizes], check_files=True)
    assert found.boxes.tolist() == (kept or [list(box) for box in boxes])
    assert found.image_sizes.tolist() == [list(frames)]
    counted = {"size-mismatch": 1} if file and max(high for *_, high in boxes) > sizes[0] else {}
    assert found.problems.counts == counted | ({"outside-box": 1} if kept else {})
    if counted:
        told = f"{sizes[1]} × {sizes[0]} annotated, {file[1]} × {file[0]} in the file"
        assert found.problems.examples["size-mismatch"] == [f"{tmp_path / 'a.png'}: {told}"]
