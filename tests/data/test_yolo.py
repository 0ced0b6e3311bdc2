from pathlib import Path

import pytest
import yaml
from PIL import Image
from pycocotools import mask

from detrkit.data import formats
from detrkit.errors import DataError


def picture(path, size=(200, 100), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


def label(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def simple(root, text, split="train", **yaml_entries):
    picture(root / "images" / split / "a.jpg")
    if text is not None:
        label(root / "labels" / split / "a.txt", text)
    content = {"path": ".", split: f"images/{split}", "names": ["cat", "dog"]} | yaml_entries
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def test_labels_become_pixels_of_the_image(tmp_path):
    simple(tmp_path, "1 0.5 0.5 0.2 0.4\n\n0 0.05 0.1 0.1 0.2 \n")
    found = formats.read(tmp_path)["train"]
    assert found.boxes.ravel().tolist() == pytest.approx([80, 30, 120, 70, 0, 0, 20, 20])
    assert found.labels.tolist() == [1, 0]
    assert [category[:2] for category in found.categories] == [(0, "cat"), (1, "dog")]
    assert found.image_sizes.tolist() == [[100, 200]]
    assert not found.problems.counts


def test_labels_refer_to_the_upright_image(tmp_path):
    simple(tmp_path, "0 0.5 0.25 0.5 0.5")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    found = formats.read(tmp_path)["train"]
    assert found.image_sizes.tolist() == [[200, 100]]
    assert found.boxes.tolist() == [[25, 0, 75, 100]]


@pytest.mark.parametrize(
    ("line", "kind", "kept"),
    [
        ("0 0.1 0.2 0.5 0.2 0.5 0.6", "polygon-label", [[20, 20, 100, 60]]),
        ("0 0.1 nan 0.5 0.2 0.5 0.6", "polygon-label", []),
        ("0 0.5 0.5 0.2 0.4 0.9", "malformed-line", []),
        ("0 0.5 0.5 0.2", "malformed-line", []),
        ("cat 0.5 0.5 0.2 0.4", "malformed-line", []),
        ("0.5 0.5 0.5 0.2 0.4", "malformed-line", []),
        ("nan 0.5 0.5 0.2 0.4", "malformed-line", []),
        ("7 0.5 0.5 0.2 0.4", "unknown-category", []),
        ("-1 0.5 0.5 0.2 0.4", "unknown-category", []),
        ("1e300 0.5 0.5 0.2 0.4", "unknown-category", []),
        ("0 0.5 0.5 0 0.4", "degenerate-box", []),
        ("0 0.5 0.5 -0.2 0.4", "inverted-box", [[80, 30, 120, 70]]),
        ("0 0 0.5 0.2 0.4", "outside-box", [[0, 30, 20, 70]]),
        ("0 inf 0.5 0.2 0.4", "non-finite-box", []),
        ("0 1.0 0.5 1e308 1e308", "non-finite-box", []),
    ],
)
def test_each_problem_is_counted_and_named(tmp_path, line, kind, kept):
    simple(tmp_path, f"1 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n{line}\n")
    found = formats.read(tmp_path)["train"]
    assert found.boxes[2:].ravel().tolist() == pytest.approx([side for box in kept for side in box])
    assert found.problems.counts[kind] == 1
    assert "a.txt, line 3" in found.problems.examples[kind][0]


@pytest.mark.parametrize("line", ["0,5 0,5 0,2 0,4", "0 0,5 0,5 0,2 0,4", "0 0.5 0.5 0 0.4"])
def test_an_image_of_which_no_line_can_be_used_is_no_empty_one(tmp_path, line):
    simple(tmp_path, f"{line}\n\n")
    for name, text in (("b", ""), ("c", "1 0.5 0.5 0.1 0.1")):
        picture(tmp_path / "images" / "train" / f"{name}.jpg")
        (tmp_path / "labels" / "train" / f"{name}.txt").write_text(text)
    (tmp_path / "images" / "train" / "d.jpg").touch()
    found = formats.read(tmp_path)["train"]
    assert [Path(name).name for name in found.file_names] == ["b.jpg", "c.jpg"]
    assert found.problems.counts["emptied-image"] == 1
    assert "a.jpg" in found.problems.examples["emptied-image"][0]


def test_polygons_are_masks_where_masks_are_asked_for(tmp_path):
    simple(
        tmp_path, "0 0.1 0.2 0.5 0.2 0.5 0.6\n1 0.5 0.5 0.2 0.4\n7 0.1 0.2 0.5 0.2 0.5 0.6\n0 0.1 nan 0.5 0.2 0.5 0.6\n"
    )
    found = formats.read(tmp_path, masks=True)["train"]
    assert found.boxes.ravel().tolist() == pytest.approx([20, 20, 100, 60, 80, 30, 120, 70])
    assert found.problems.counts == {"missing-mask": 1, "unknown-category": 1, "non-finite-box": 1}
    masks = found.masks.encoded(found.rows(0))
    expected = mask.frPyObjects([[20, 20, 100, 20, 100, 60]], 100, 200)
    assert masks[:1].to_coco() == [{"size": [100, 200], "counts": expected[0]["counts"].decode()}]
    assert masks.known.tolist() == [True, False]
    assert found.areas.tolist() == [mask.area(expected[0]), 40 * 40]


def test_boxes_alone_are_no_masks(tmp_path):
    simple(tmp_path, "1 0.5 0.5 0.2 0.4\n")
    with pytest.raises(DataError, match="No object has a mask; got 1 boxes;"):
        formats.read(tmp_path, masks=True)
    assert formats.read(tmp_path, masks="any")["train"].masks is None


def test_key_points_after_the_box_are_ignored(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4 0.9 0.9 2 0.8 0.8 2", kpt_shape=[2, 3])
    assert formats.read(tmp_path)["train"].boxes.ravel().tolist() == pytest.approx([80, 30, 120, 70])


def test_pixel_coordinates_are_refused_as_such(tmp_path):
    simple(tmp_path, "0 100 50 20 40")
    with pytest.raises(DataError, match=r"not fractions of the image.*100 50 20 40.*Divide"):
        formats.read(tmp_path)


def test_an_image_without_a_label_file_is_empty_and_noted(tmp_path):
    simple(tmp_path, None)
    found = formats.read(tmp_path)["train"]
    assert (len(found), len(found.boxes)) == (1, 0)
    assert found.problems.counts == {"unannotated-image": 1}


def test_unreadable_images_are_dropped_with_their_boxes(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4")
    (tmp_path / "images" / "train" / "b.jpg").write_bytes(b"")
    label(tmp_path / "labels" / "train" / "b.txt", "0 0.5 0.5 0.2 0.4")
    found = formats.read(tmp_path)["train"]
    assert list(found.file_names) == ["images/train/a.jpg"]
    assert (len(found.boxes), found.problems.counts) == (1, {"unreadable-image": 1})
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="None of the 2 images can be read"):
        formats.read(tmp_path)


def test_pictures_of_kinds_that_are_not_read_are_counted(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4")
    (tmp_path / "images" / "train" / "b.gif").touch()
    found = formats.read(tmp_path)["train"]
    assert (len(found), found.problems.counts) == (1, {"unread-image": 1})


def test_a_missing_folder_of_several_is_noted(tmp_path):
    simple(tmp_path, "", train=["images/train", "images/nowhere"])
    found = formats.read(tmp_path)["train"]
    assert (len(found), found.problems.counts) == (1, {"missing-split": 1})
    assert "images/nowhere" in found.problems.examples["missing-split"][0]


def test_a_split_that_does_not_exist_is_noted_where_another_does(tmp_path):
    simple(tmp_path, "", val="images/nowhere")
    found = formats.read(tmp_path)
    assert list(found) == ["train"]
    assert found["train"].problems.counts == {"missing-split": 1}
    simple(tmp_path, "", train="images/nowhere")
    with pytest.raises(DataError, match=r"None of the folders and lists that the file names exists.*images/nowhere"):
        formats.read(tmp_path)


def test_names_may_be_a_table_with_gaps_or_a_count(tmp_path):
    simple(tmp_path, "5 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4", names={5: "x", 2: "y"})
    found = formats.read(tmp_path)["train"]
    assert [category[:2] for category in found.categories] == [(2, "y"), (5, "x")]
    assert found.labels.tolist() == [1]
    simple(tmp_path, "", names=None, nc=2)
    assert [category.name for category in formats.read(tmp_path)["train"].categories] == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", "not YAML"),
        ("train: 5\nnames: [a]", "neither a path nor a list"),
        ("train: images\nnames: 5", "names is neither"),
        ("train: images\nnames: {a: b}", "not numbers"),
        ("train: images\nnc: -1", "names is neither"),
    ],
)
def test_yaml_files_that_cannot_be_used_are_refused(tmp_path, content, message):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=rf"data\.yaml: malformed-file.*{message}"):
        formats.recognise(tmp_path)


def test_two_yaml_files_are_refused_and_others_are_passed_over(tmp_path):
    simple(tmp_path, "")
    (tmp_path / "data.yaml").rename(tmp_path / "a.yaml")
    (tmp_path / "other.yaml").write_text("colour: blue")
    (tmp_path / "broken.yml").write_text("[")
    assert list(formats.read(tmp_path)) == ["train"]
    (tmp_path / "b.yaml").write_text((tmp_path / "a.yaml").read_text())
    with pytest.raises(DataError, match=r"more than one file that describes.*a\.yaml, b\.yaml"):
        formats.read(tmp_path)
    assert list(formats.read(tmp_path / "b.yaml")) == ["train"]


@pytest.mark.parametrize(
    ("entry", "images"),
    [
        ("../train/images", "train/images"),
        ("train", "train/images"),
        ("train/images", "train/images"),
        (["one/images", "two/images"], "two/images"),
    ],
)
def test_entries_of_the_yaml_file_are_found(tmp_path, entry, images):
    root = tmp_path / "set"
    for place in entry if isinstance(entry, list) else [images]:
        picture(root / place / "a.jpg")
        label(root / place.replace("images", "labels") / "a.txt", "0 0.5 0.5 0.2 0.4")
    (root / "data.yaml").write_text(yaml.safe_dump({"train": entry, "names": ["cat"]}))
    found = formats.read(root)["train"]
    assert list(found.file_names)[-1] == f"{images}/a.jpg"
    assert len(found.boxes) == (2 if isinstance(entry, list) else 1)
    assert not found.problems.counts


def test_lists_of_images_are_read_and_may_not_leave_the_data_set(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4", train="train.txt")
    absolute = tmp_path / "images" / "train" / "a.jpg"
    for line in ("images/train/a.jpg", "./images/train/a.jpg", str(absolute)):
        (tmp_path / "train.txt").write_text(f"{line}\n\n{line}\n")
        found = formats.read(tmp_path)["train"]
        assert list(found.file_names) == ["images/train/a.jpg"]
        assert len(found.boxes) == 1
    (tmp_path / "train.txt").write_text("images/train/a.jpg\n../b.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: unsafe-path"):
        formats.read(tmp_path)


DARKNET = "classes = 2\ntrain = data/train.txt\nvalid=data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"


def darknet(root, description=DARKNET, prefix="", name="obj.data"):
    for split in ("train", "valid"):
        picture(root / f"obj_{split}_data" / f"{split}.jpg")
        label(root / f"obj_{split}_data" / f"{split}.txt", "1 0.5 0.5 0.2 0.4")
        label(root / f"{split}.txt", f"{prefix}obj_{split}_data/{split}.jpg\n")
    label(root / name, description)
    label(root / "obj.names", "cat\ndog\n")


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("prefix", ["", "data/"])
def test_the_layout_of_darknet_is_read(tmp_path, prefix, separator):
    darknet(tmp_path, DARKNET.replace("data/", f"data{separator}"), prefix)
    for split in ("train", "valid"):
        lines = (tmp_path / f"{split}.txt").read_text()
        label(tmp_path / f"{split}.txt", lines.replace("/", separator))
    for path in (tmp_path, tmp_path / "obj.data"):
        found = formats.read(path)
        assert list(found) == ["train", "val"]
        assert list(found["val"].file_names) == ["obj_valid_data/valid.jpg"]
        assert [category[:2] for category in found["train"].categories] == [(0, "cat"), (1, "dog")]
        assert [part.boxes.ravel().tolist() for part in found.values()] == [pytest.approx([80, 30, 120, 70])] * 2
        assert not any(part.problems.counts for part in found.values())


@pytest.mark.parametrize("entry", ["data/", "../data/", "data", "data/.", "data\\", "data/images/train", "data//"])
def test_a_folder_called_data_is_no_other_folder_of_the_yaml_file(tmp_path, entry):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4", val=entry)
    found = formats.read(tmp_path)
    assert list(found) == ["train"]
    assert list(found["train"].file_names) == ["images/train/a.jpg"]
    assert found["train"].problems.counts == {"missing-split": 1}


@pytest.mark.parametrize("entry", ["data/", "../data/", "data", "data/.", "data\\", "data//"])
def test_a_folder_called_data_is_not_the_whole_data_set_of_darknet(tmp_path, entry):
    darknet(tmp_path, DARKNET.replace("valid=data/valid.txt", f"valid={entry}"))
    found = formats.read(tmp_path)
    assert list(found) == ["train"]
    assert list(found["train"].file_names) == ["obj_train_data/train.jpg"]
    assert found["train"].problems.counts == {"missing-split": 1}


@pytest.mark.parametrize("line", ["data/images/train/a.jpg", "data\\images\\train\\a.jpg"])
def test_images_in_lists_of_a_yaml_file_may_have_data_before_them(tmp_path, line):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4", train="train.txt")
    label(tmp_path / "train.txt", f"{line}\ndata/\ndata/none.jpg\n")
    found = formats.read(tmp_path)["train"]
    assert (list(found.file_names), len(found.boxes)) == (["images/train/a.jpg"], 1)
    assert found.problems.counts == {"missing-image": 2}
    assert f"{tmp_path}/data/none.jpg" in found.problems.examples["missing-image"][1]
    picture(tmp_path / "data" / "images" / "train" / "a.jpg")
    assert list(formats.read(tmp_path)["train"].file_names) == ["data/images/train/a.jpg"]


@pytest.mark.parametrize(
    ("yaml_name", "name", "content"),
    [
        ("cats.yaml", "obj.data", DARKNET.encode()),
        ("data.yaml", "data.data", DARKNET.replace("valid", "none").encode()),
        ("data.yaml", "data.data", b"\xff\xfe\0"),
    ],
)
def test_a_yaml_file_comes_before_a_file_of_darknet(tmp_path, yaml_name, name, content):
    darknet(tmp_path)
    (tmp_path / "obj.data").unlink()
    (tmp_path / name).write_bytes(content)
    label(tmp_path / yaml_name, "train: obj_train_data\nval: obj_valid_data\nnames: [a, b]\n")
    found = formats.read(tmp_path)
    assert list(found) == ["train", "val"]
    assert [category.name for category in found["val"].categories] == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/voc.names\n",
        "classes = 1\ntrain = /elsewhere/train.txt\nvalid =\nnames = labels.txt\n",
        "classes = 1\nnc = 1\ntrain = train.txt\n",
    ],
)
def test_a_file_of_darknet_without_its_names_or_lists_leaves_other_data_sets_alone(tmp_path, content):
    picture(tmp_path / "JPEGImages" / "a.jpg")
    box = "<xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>70</ymax>"
    label(
        tmp_path / "Annotations" / "a.xml",
        f"<annotation><filename>a.jpg</filename><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>",
    )
    label(tmp_path / "ImageSets" / "Main" / "train.txt", "a\n")
    label(tmp_path / "train.txt", "JPEGImages/a.jpg\n")
    label(tmp_path / "labels.txt", "cat\n")
    label(tmp_path / "voc.data", content)
    found = formats.read(tmp_path)["train"]
    assert [source.format for source in formats.recognise(tmp_path).values()] == ["voc"]
    assert found.boxes.tolist() == [[10, 20, 60, 70]]


def test_two_files_of_darknet_are_refused(tmp_path):
    darknet(tmp_path)
    label(tmp_path / "other.data", DARKNET)
    with pytest.raises(DataError, match=r"more than one file that describes.*obj\.data, other\.data"):
        formats.read(tmp_path)
    assert list(formats.read(tmp_path / "other.data")) == ["train", "val"]


@pytest.mark.parametrize("place", ["{}/obj.data", "./obj.data", "obj.data"])
@pytest.mark.parametrize("names", ["../obj.names", "data/x.names", "..\\obj.names"])
def test_names_of_darknet_come_from_the_data_set_alone(tmp_path, monkeypatch, place, names):
    root = tmp_path / "set"
    darknet(root, DARKNET.replace("data/obj.names", names))
    (root / "obj.names").rename(tmp_path / "obj.names")
    monkeypatch.chdir(root)
    with pytest.raises(DataError) as caught:
        formats.read(place.format(root))
    assert caught.value.what == "malformed-file: the data set has no such file of names"
    assert caught.value.got == names
    assert caught.value.remedy == "Mend the file and try again."


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("obj.data", DARKNET.replace("data/train.txt", ".."), "unsafe-path"),
        ("obj.data", DARKNET.replace("train.txt", "no.txt").replace("valid.txt", "no.txt"), "None of the folders"),
        ("train.txt", "../b.jpg\n", "unsafe-path"),
    ],
)
def test_messages_about_files_of_darknet_do_not_call_them_yaml(tmp_path, name, content, what):
    darknet(tmp_path / "set")
    label(tmp_path / "set" / name, content)
    with pytest.raises(DataError, match=what) as caught:
        formats.read(tmp_path / "set" / "obj.data")
    assert "the YAML file" not in str(caught.value)


def test_files_of_data_that_are_none_of_darknet_are_passed_over(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.2 0.4")
    (tmp_path / "data.yaml").rename(tmp_path / "set.yaml")
    (tmp_path / "a.data").write_bytes(b"\xff\xfe\0")
    label(tmp_path / "b.data", "names = some\n")
    assert len(formats.read(tmp_path)["train"]) == 1
    with pytest.raises(DataError, match="the file is no text"):
        formats.recognise(tmp_path / "a.data")


@pytest.mark.parametrize(
    ("images", "labels", "splits"),
    [
        ("images/train2017", "labels/train2017", ["train"]),
        ("valid/images", "valid/labels", ["val"]),
        ("images", "labels", ["all"]),
        (".", ".", ["all"]),
    ],
)
def test_folders_are_recognised_without_a_yaml_file(tmp_path, images, labels, splits):
    picture(tmp_path / images / "a.jpg")
    label(tmp_path / labels / "a.txt", "3 0.5 0.5 0.2 0.4")
    if images == ".":
        (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    found = formats.read(tmp_path)
    assert list(found) == splits
    assert len(found[splits[0]].boxes) == 1
    assert [category.name for category in found[splits[0]].categories] == (
        ["a", "b", "c", "d"] if images == "." else ["0", "1", "2", "3"]
    )


def test_an_image_folder_within_the_image_folder_keeps_its_labels(tmp_path):
    picture(tmp_path / "images" / "train" / "images" / "a.jpg")
    label(tmp_path / "images" / "train" / "labels" / "a.txt", "0 0.5 0.5 0.2 0.4")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cat]")
    assert len(formats.read(tmp_path)["train"].boxes) == 1


def test_a_folder_around_the_data_set_may_be_called_images(tmp_path):
    root = tmp_path / "images" / "set"
    picture(root / "a.jpg")
    label(root / "a.txt", "1 0.5 0.5 0.2 0.4")
    label(root / "classes.txt", "cat\ndog\n")
    found = formats.read(root)["all"]
    assert (found.labels.tolist(), found.problems.counts) == ([1], {})
    (root / "classes.txt").unlink()
    (root / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]")
    (root / "train.txt").write_text("a.jpg\n")
    found = formats.read(root)["train"]
    assert (found.labels.tolist(), found.problems.counts) == ([1], {})


def test_the_label_file_in_labels_comes_before_the_one_beside_the_image(tmp_path):
    simple(tmp_path, "1 0.5 0.5 0.2 0.4")
    label(tmp_path / "images" / "train" / "a.txt", "a caption")
    found = formats.read(tmp_path)["train"]
    assert (found.labels.tolist(), found.problems.counts) == ([1], {})


@pytest.mark.parametrize(
    "entry", ["images\\train", ".\\images\\train\\", "..\\images\\train", "list.txt", "lists\\l.txt"]
)
@pytest.mark.parametrize("base", [".", "..\\set", "C:\\elsewhere"])
def test_paths_of_windows_are_understood(tmp_path, entry, base):
    simple(tmp_path / "set", "1 0.5 0.5 0.2 0.4", train=entry, path=base)
    label(tmp_path / "set" / "list.txt", ".\\images\\train\\a.jpg\nimages\\train\\a.jpg\n")
    label(tmp_path / "set" / "lists" / "l.txt", "images\\train\\a.jpg\n")
    found = formats.read(tmp_path / "set")["train"]
    assert (found.labels.tolist(), found.problems.counts) == ([1], {})
