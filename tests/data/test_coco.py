import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.data import formats, json_stream
from detrkit.data.json_stream import read_lists
from detrkit.errors import DataError, Error

IMAGES = [{"id": 5, "file_name": "a.jpg", "width": 200, "height": 100}]
CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 0, "name": "cat"}, {"id": 7, "name": "dog"}]


def box(identifier=1, image_id=5, category_id=90, bbox=(10, 20, 30, 40), **others):
    return {"id": identifier, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **others}


def put(root, annotations, images=IMAGES, categories=CATEGORIES, name="annotations/instances_train.json", **others):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = others | {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def opened(root, annotations=(), **options):
    path = put(root, list(annotations), **options)
    (found,) = formats.read(path, check_files=False).values()
    return found


def test_boxes_categories_and_flags_are_read(tmp_path):
    found = opened(
        tmp_path,
        [
            box(1, area=700.5, segmentation=[[1, 2, 3, 4, 5, 6]]),
            box(2, category_id=0, iscrowd=1, segmentation={"counts": [1, 2], "size": [3, 1]}),
            box(3, category_id=7, bbox=(0.5, 1, 2.25, 3), area=0, difficult=1),
        ],
    )
    assert [category[:2] for category in found.categories] == [(0, "cat"), (7, "dog"), (90, "dog")]
    assert found.labels.tolist() == [2, 0, 1]
    assert found.boxes.tolist() == [[10, 20, 40, 60], [10, 20, 40, 60], [0.5, 1, 2.75, 4]]
    assert found.areas.tolist() == [700.5, 1200, 6.75]
    assert found.crowd.tolist() == [False, True, False]
    assert found.difficult.tolist() == [False, False, True]
    assert found.image_ids.tolist() == [5]
    assert found.image_sizes.tolist() == [[100, 200]]
    assert not found.problems.counts


def test_ids_may_be_written_as_strings(tmp_path):
    images = [{"id": "12", "file_name": "a.jpg", "width": "200", "height": 100.0}]
    found = opened(tmp_path, [box("1", "12", "3")], images=images, categories=[{"id": "3", "name": "x"}])
    assert (found.image_ids.tolist(), found.categories[0].id, len(found.boxes)) == ([12], 3, 1)
    assert found.image_sizes.tolist() == [[100, 200]]


def test_flags_may_be_written_in_other_ways_and_zero_is_not_set(tmp_path):
    written = [1, "1", True, "true", 0, "0", False, "false", None, "no"]
    found = opened(tmp_path, [box(one, iscrowd=flag, difficult=flag) for one, flag in enumerate(written)])
    assert found.crowd.tolist() == found.difficult.tolist() == [True] * 4 + [False] * 6


def test_an_id_that_is_too_large_belongs_to_no_other(tmp_path):
    """Text gets numbers of our own, far below zero: an id of a file must not be one of them."""
    own = -(2**62)
    images = [{"id": name, "file_name": f"{name}.jpg", "width": 99, "height": 99} for name in ("x", "y")]
    found = opened(tmp_path, [box(1, own), box(2, own + 1)], images=images)
    assert len(found.boxes) == 0
    assert found.problems.counts["unknown-image"] == 2


def test_image_ids_that_are_text_are_numbered(tmp_path):
    images = [{"id": name, "file_name": f"{name}.jpg", "width": 99, "height": 99} for name in ("x", "y")]
    found = opened(tmp_path, [box(1, "y"), box(2, "z")], images=images)
    assert found.image_ids.tolist() == [1, 2]
    assert found.offsets.tolist() == [0, 0, 1]
    assert found.problems.counts == {"text-image-id": 2, "unknown-image": 1}


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (box(bbox=(10, 20, -5, 40)), "inverted-box"),
        (box(bbox=(10, 20, 500, 40)), "outside-box"),
        (box(bbox=(10, 20, 0, 40)), "degenerate-box"),
        (box(bbox=(float("nan"), 20, 10, 40)), "non-finite-box"),
        (box(bbox=(10, 20, float("inf"), 40)), "non-finite-box"),
        (box(bbox=(1e308, 20, 1e308, 40)), "non-finite-box"),
        (box(bbox=(10, 20, 10**400, 40)), "non-finite-box"),
        (box(bbox=(10, 20, 30)), "malformed-box"),
        (box(bbox=("10", "20", "30", "wide")), "malformed-box"),
        (box(bbox=("10", 20, "30.0", 40)), "text-box"),
        (box(bbox=("10", "20", "-5", "40")), "text-box inverted-box"),
        (box(bbox=(10, 20, None, 40)), "malformed-box"),
        (box() | {"bbox": None}, "malformed-box"),
        (box() | {"bbox": {}}, "malformed-box"),
        (box(category_id=8), "unknown-category"),
        (box(image_id=8), "unknown-image"),
        (box(image_id=None), "malformed-annotation"),
        (box(category_id=[]), "malformed-annotation"),
        ("text", "malformed-annotation"),
    ],
)
@pytest.mark.parametrize("sound", [0, 3])
def test_each_problem_is_counted_and_the_others_survive(tmp_path, annotation, kind, sound):
    found = opened(tmp_path, [box(100 + number) for number in range(sound)] + [annotation])
    is_lost = kind in ("degenerate-box", "non-finite-box", "malformed-box") or annotation == box(category_id=[])
    kinds = kind.split()
    assert found.problems.counts == dict.fromkeys(kinds, 1) | ({"emptied-image": 1} if is_lost and not sound else {})
    assert len(found) == (0 if is_lost and not sound else 1)
    assert all("annotation" in found.problems.examples[kind][0] for kind in kinds)
    assert len(found.boxes) == sound + (kinds[-1] in ("inverted-box", "outside-box", "text-box"))


def test_numbers_that_are_text_are_numbers_and_others_are_shown(tmp_path):
    found = opened(tmp_path, [box(4, bbox=["10", "20.5", "30", "40"]), box(5, bbox=["10", "x", "30", "40"])])
    assert found.boxes.tolist() == [[10, 20.5, 40, 60.5]]
    assert found.problems.examples["malformed-box"][0].endswith(": annotation 5: ['10', 'x', '30', '40']")


def test_images_are_found_where_their_names_are_escaped(tmp_path):
    images = [{"id": 5, "file_name": "b%C3%A4r.png", "width": 200, "height": 100}]
    put(tmp_path, [box()], images=images, name="annotations/instances_train.json")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "b\u00e4r.png")
    found = formats.read(tmp_path)["train"]
    assert (list(found.file_names), found.problems.counts) == (["b\u00e4r.png"], {"escaped-file-name": 1})


def test_annotation_ids_may_repeat_or_be_absent(tmp_path):
    absent = box()
    del absent["id"]
    found = opened(tmp_path, [box(4), box(4), box(4), absent, absent])
    assert len(found.boxes) == 5
    assert found.problems.counts == {"duplicate-annotation-id": 2}


def test_files_without_boxes_images_or_categories_are_read(tmp_path):
    assert opened(tmp_path).summary() == "1 images, 0 boxes, 3 classes, 1 images without boxes"
    assert len(opened(tmp_path, images=[], categories=[])) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images":[],"annotations":[],"categories":[]', "is missing at the end, near 'categories'"),
        ('{"images":[],"annotations":[{"id":1,', "near 'annotations'.*cut off"),
        ('{"images":[],"annotations":[{"id":1} {}],"categories":[]}', "or ] is missing"),
        ('{"images":[],"annotations":{},"categories":[]}', "'annotations' is not a list"),
        ('{"images":[],"annotations":[],"categories":[]} x', "'x' follows"),
        ('{"images":[],"annotations":[' + "[" * 200_000 + ',"categories":1', "malformed-file|nested too deeply"),
        ('{"images":[7],"annotations":[],"categories":[]}', "not an object"),
        ('{"images":[{"id":1}],"annotations":[],"categories":[]}', "image 0 lacks an id or a file_name"),
        ('{"images":[],"annotations":[],"categories":[{"name":"x"}]}', "a category lacks an id"),
        ('{"images":[],"annotations":[],"x":"categories"}', "the list 'categories' is missing"),
        ('{"images":[{"id":1,"file_name":"/a.jpg"}],"annotations":[],"categories":[]}', "unsafe-path"),
        (
            '{"images":[{"id":1,"file_name":"a"},{"id":1,"file_name":"b"}],"annotations":[],"categories":[]}',
            "'a' and 'b'",
        ),
        ('{"images":[],"annotations":[],"categories":[{"id":1,"name":"a"},{"id":1}]}', "id 1, .*duplicate-category"),
        ('{"images":[],"annotations":[{"id":1}],"categories":[]}', "no category"),
        ('{"images":[],"annotations":[],"categories":[],"n":' + "9" * 5000 + "}", "malformed-file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name_and_cause(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        formats.read(path, check_files=False)
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b'{"images":[],"annotations":[],"categories":[{"id":1,"name":"\xff"}]}')
    with pytest.raises(DataError, match="malformed-file"):
        formats.read(path, check_files=False)


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = put(tmp_path, [box()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(formats.read(path, check_files=False)["train"].boxes) == 1


LAYOUTS = {
    "annotations/instances_{}2017.json": "{}2017/a.jpg",
    "annotations/instances_{}.json": "{}/a.jpg",
    "annotations/{}.json": "images/{}/a.jpg",
    "{}/_annotations.coco.json": "{}/a.jpg",
    "instances_{}.json": "images/a.jpg",
    "{}.json": "a.jpg",
}


@pytest.mark.parametrize(("file", "image"), LAYOUTS.items())
def test_layouts_are_recognised_with_their_images(tmp_path, file, image):
    for split in ("train", "valid"):
        put(tmp_path, [box()], name=file.format(split))
        (tmp_path / image.format(split)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image.format(split)).touch()
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "other.json").write_text("[]")
    sources = formats.recognise(tmp_path)
    assert sorted(sources) == ["train", "val"]
    read = formats.read(tmp_path)
    assert all(part.path(0).is_file() for part in read.values())
    assert list(formats.read(tmp_path, "valid")) == ["val"]
    assert list(formats.read(sources["val"].path)) == ["val"]


def test_a_single_file_of_no_particular_name_is_the_whole(tmp_path):
    put(tmp_path, [box()], name="result.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").touch()
    (tmp_path / "data" / "b.jpg").touch()
    (found,) = formats.read(tmp_path).items()
    assert found[0] == "all"
    assert found[1].root == tmp_path / "data"
    assert found[1].problems.counts == {"unannotated-image": 1}


def test_official_instances_files_win_over_their_companions(tmp_path):
    for kind in ("instances", "person_keypoints", "panoptic", "captions"):
        put(tmp_path, [], name=f"annotations/{kind}_val2017.json")
    assert formats.recognise(tmp_path)["val"].path.name == "instances_val2017.json"


def test_two_files_for_one_split_are_refused(tmp_path):
    put(tmp_path, [], name="train.json")
    put(tmp_path, [], name="annotations/train2017.json")
    with pytest.raises(DataError, match="Two COCO files could be the split 'train'"):
        formats.recognise(tmp_path)


def test_missing_sizes_are_read_from_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "train").mkdir()
    Image.new("RGB", (31, 17)).save(tmp_path / "train" / "a.jpg", exif=exif)
    put(tmp_path, [box(bbox=(1, 2, 16, 29))], images=[{"id": 5, "file_name": "a.jpg"}])
    found = formats.read(tmp_path)["train"]
    assert found.image_sizes.tolist() == [[31, 17]]
    assert not found.problems.counts


def plain(content, key):
    """What the standard parser says, less the masks."""
    return [
        {name: 0 if name == "segmentation" else value for name, value in item.items()}
        if isinstance(item, dict)
        else item
        for item in content[key]
    ]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder that every example writes over: hundreds of new ones would take longer than what is tested."""
    return tmp_path_factory.mktemp("scratch")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(
    items=st.lists(JSON_VALUES, max_size=8),
    other=JSON_VALUES,
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
)
def test_reading_in_pieces_equals_reading_at_once(scratch, items, other, chunk, indent):
    path = scratch / "a.json"
    polygons = {"segmentation": [[1.5, 2, 3e-7], []], "text": '"segmentation": [[1, 2]]', "last": -1.5e10}
    content = {"before": other, "annotations": [*items, polygons, *items], "after": other}
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_BYTES", chunk)
        read = [item for _, batch in read_lists(path, ("annotations",)) for item in batch]
    assert read[len(items)] == plain(content, "annotations")[len(items)]
    assert read[: len(items)] == read[len(items) + 1 :] == items


MEMBERS = ("id", "bbox", "name")
MEMBER = st.sampled_from([*MEMBERS, "segmentation", "other"])


@pytest.mark.parametrize("installed", [True, False])
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(
    items=st.lists(st.dictionaries(MEMBER, JSON_VALUES | st.just(2**70) | st.floats()), min_size=1, max_size=8),
    chunk=st.integers(1, 200),
)
def test_wanted_members_arrive_whatever_decodes_them(scratch, installed, items, chunk):
    """Numbers of the same type, NaN and halves of surrogates included; a member that is there twice is the second."""
    path = scratch / "members.json"
    polygons = {"segmentation": [[1.5, 2]], "id": 7, "bbox": [0, 1.0, -2, 3e5], "other": {"id": 8}}
    content = {"before": items, "annotations": [*items, polygons, *items], "after": 1}
    path.write_text(json.dumps(content).replace('"id": 7', '"id": 6, "id": 7'), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_BYTES", chunk)
        if not installed:
            patch.setattr(json_stream, "_decoder", lambda members: None)
        read = [item for _, batch in read_lists(path, ("annotations",), members=MEMBERS) for item in batch]

    def wanted(item):
        return repr({name: item[name] for name in MEMBERS if name in item})

    assert [wanted(item) for item in read] == [wanted(item) for item in content["annotations"]]


def test_members_alone_are_made_where_that_is_faster(tmp_path, monkeypatch):
    pytest.importorskip("msgspec")
    path = tmp_path / "b.json"
    made = [{"id": number, "other": 1, "segmentation": [[1, 2]]} for number in range(50)]
    path.write_text(json.dumps({"annotations": made}), encoding="utf-8")
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 400)
    read = [item for _, batch in read_lists(path, ("annotations",), members=("id",)) for item in batch]
    assert [item["id"] for item in read] == list(range(50))
    assert sum("other" not in item for item in read) > 25
    made[20]["id"] = math.nan  # from here on it is the other decoder's
    path.write_text(json.dumps({"annotations": made}), encoding="utf-8")
    read = [item for _, batch in read_lists(path, ("annotations",), members=("id",)) for item in batch]
    assert [item["id"] for item in read if item["id"] == item["id"]] == [*range(20), *range(21, 50)]
    assert "other" not in read[2]
    assert all("other" in item for item in read[30:])


FIELD = st.none() | st.integers(-3, 3) | st.just(2**70) | st.floats() | st.sampled_from(["1", "x", "", True, [], {}])
BOX = st.lists(st.floats() | st.integers(-300, 300) | FIELD, max_size=5) | FIELD
ANNOTATION = st.fixed_dictionaries(
    {},
    optional={
        "id": FIELD,
        "image_id": FIELD,
        "category_id": FIELD,
        "bbox": BOX,
        "area": FIELD,
        "iscrowd": FIELD,
        "segmentation": BOX,
    },
)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(
    annotations=st.lists(ANNOTATION | FIELD, max_size=5),
    images=st.lists(st.fixed_dictionaries({"id": FIELD, "file_name": st.text(max_size=5)}), max_size=3),
    categories=st.lists(st.fixed_dictionaries({"id": FIELD, "name": FIELD}), max_size=3),
)
def test_whatever_stands_in_a_file_gives_sound_columns_or_an_error_of_ours(scratch, annotations, images, categories):
    try:
        found = opened(
            scratch / "fuzz",
            annotations,
            images=[*IMAGES, *images],
            categories=[*CATEGORIES, *categories],
        )
    except Error:
        return
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (found.areas > 0).all()
    assert ((found.labels >= 0) & (found.labels < len(found.categories))).all()
    assert found.offsets[-1] == len(found.boxes) == len(found.crowd)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_not_utf_8_is_refused_and_not_passed_over(tmp_path, encoding, indent):
    path = put(tmp_path, [box()])
    text = json.dumps(json.loads(path.read_text()), indent=indent)
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + text).encode(encoding))
    (tmp_path / "train").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "train" / "a.jpg")
    for chosen in (tmp_path, path):
        with pytest.raises(DataError, match=r"malformed-file: .*UTF-16 or UTF-32; expected UTF-8\. Save it as UTF-8"):
            formats.read(chosen)
    path.write_bytes((mark + '{"settings": 1}').encode(encoding))
    assert formats.recognise(tmp_path)["all"].format == "folder"
