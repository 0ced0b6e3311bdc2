import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from detrkit.data import digits as digits_module
from detrkit.data.dataset import random_stream
from detrkit.data.digits import make_digits
from detrkit.errors import MissingExtraError, UsageError

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn")

COUNTS = {"train": 4, "val": 2, "test": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "set"
    make_digits(out, seed=3, **COUNTS)
    return out


def read(out, split):
    return json.loads((out / "annotations" / f"instances_{split}.json").read_text())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_is_coco(made):
    assert sorted(path.name for path in made.iterdir()) == ["annotations", "test", "train", "val"]
    for split, count in COUNTS.items():
        document = read(made, split)
        assert [category["name"] for category in document["categories"]] == list("0123456789")
        assert len(document["images"]) == count
        assert [entry["id"] for entry in document["annotations"]] == list(range(1, len(document["annotations"]) + 1))
        for image in document["images"]:
            with Image.open(made / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (320, 256)
            objects = [entry for entry in document["annotations"] if entry["image_id"] == image["id"]]
            assert 1 <= len(objects) <= 7
            for entry in objects:
                x, y, width, height = entry["bbox"]
                assert x >= 0
                assert y >= 0
                assert x + width <= 320
                assert y + height <= 256
                assert 12 <= height <= 115
                assert 0 < entry["area"] <= width * height
                assert 1 <= entry["category_id"] <= 10


def test_same_seed_same_bytes_and_a_larger_set_begins_with_the_smaller(made, tmp_path):
    make_digits(tmp_path / "again", seed=3, **COUNTS)
    assert contents(tmp_path / "again") == contents(made)
    make_digits(tmp_path / "more", seed=3, train=5, val=0, test=0)
    more = contents(tmp_path / "more" / "train")
    assert {name: more[name] for name in contents(made / "train")} == contents(made / "train")
    assert len(more) == 5
    make_digits(tmp_path / "other", seed=4, train=1, val=0, test=0)
    assert contents(tmp_path / "other" / "train") != {k: v for k, v in more.items() if k.name == "000000.jpg"}


def test_boxes_fit_the_drawn_ink():
    sources = digits_module._load_sources()
    for seed, height in enumerate((16, 30, 60, 110)):
        rng = random_stream(3, seed)
        glyph = digits_module._glyph(sources.digits[seed], 0, height, rng)
        painted = digits_module._lay(np.zeros((200, 200, 3), np.float32), glyph, (20, 30), rng).sum(-1) > 250
        rows, columns = np.nonzero(glyph.ink > 0.5)
        seen_rows, seen_columns = np.nonzero(painted)
        assert abs(seen_rows.min() - 20 - rows.min()) <= 1
        assert abs(seen_columns.max() - 30 - columns.max()) <= 1
        rows, columns = np.nonzero(glyph.outlined > 0.5)
        assert abs(np.ptp(rows) + 1 - height) <= 2
        assert glyph.outlined[[0, -1]].max() <= 0.5, "the outline must not be cut off"


def test_every_digit_can_be_told_from_its_background(made):
    document = read(made, "train")
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        name = document["images"][entry["image_id"] - 1]["file_name"]
        with Image.open(made / "train" / name) as picture:
            grey = np.asarray(picture.convert("L")).astype(float)[y : y + height, x : x + width]
        assert np.percentile(grey, 95) - np.percentile(grey, 5) > 60


def test_no_handwriting_stands_in_two_splits():
    sources = digits_module._load_sources()
    seen = []
    for split in range(3):
        tracked = digits_module._Sources(np.arange(len(sources.labels)), sources.labels, sources.photographs)
        used: set[int] = set()

        class Tracking:
            def __getitem__(self, index, used=used):
                used.add(index)
                return sources.digits[index]

        object.__setattr__(tracked, "digits", Tracking())
        for index in range(10):
            digits_module._compose(tracked, split, random_stream(3, 0, split, index), (64, 64), (7, 7), (8, 9))
        seen.append(used)
    assert all(len(used) > 50 for used in seen)
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))


def test_numbers_of_digits_sizes_and_image_size_are_obeyed(tmp_path):
    make_digits(tmp_path / "a", train=3, val=0, test=0, size=(64, 48), digits=(0, 0))
    assert read(tmp_path / "a", "train")["annotations"] == []
    make_digits(tmp_path / "b", train=3, val=0, test=0, size=(200, 200), digits=(2, 2), heights=(20, 20))
    document = read(tmp_path / "b", "train")
    assert len(document["annotations"]) == 6
    assert all(abs(entry["bbox"][3] - 20) <= 2 for entry in document["annotations"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "must not be negative; got seed -1"),
        ({"val": -1}, "must not be negative"),
        ({"digits": (3, 2)}, "make no sense.*digits \\(3, 2\\)"),
        ({"heights": (2, 9)}, "make no sense"),
        ({"size": (10, 300)}, "make no sense"),
    ],
)
def test_senseless_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        make_digits(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten_and_an_empty_folder_will_do(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    make_digits(out, train=1, val=0, test=0)
    with pytest.raises(UsageError, match=r"a: The folder for the digits is not empty\. Name another"):
        make_digits(out)


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*pip install 'detrkit\[demo\]'"):
        make_digits(tmp_path / "a")
