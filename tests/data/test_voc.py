from xml.sax.saxutils import escape

import pytest
from PIL import Image

from detrkit.data import formats
from detrkit.errors import DataError


def item(name, *corners, inner="", difficult=0):
    sides = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return (
        f"<object><name>{escape(name)}</name>{inner}<difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
    )


def put(path, *objects, file_name="", size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(f"<annotation><filename>{file_name}</filename>{shape}{''.join(objects)}</annotation>")


def official(root, files, lists):
    """A devkit with images of no content."""
    for stem, objects in files.items():
        put(root / "Annotations" / f"{stem}.xml", *objects)
        (root / "JPEGImages" / f"{stem}.jpg").parent.mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages" / f"{stem}.jpg").touch()
    for name, stems in lists.items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")


def test_the_devkit_layout_is_read_with_one_table_for_all_splits(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    files = {
        "1": [item("dog", 11, 21, 40, 60), item("cat & co", 1, 1, 200, 100, difficult=1, inner=part)],
        "2": [],
        "3": [item("bird", 5, 5, 9, 9)],
    }
    official(
        tmp_path, files, {"train": ["1"], "val": ["2"], "trainval": ["1", "2"], "test": ["3"], "dog_train": ["1  1"]}
    )
    splits = formats.read(tmp_path)
    assert list(splits) == ["test", "train", "val"]
    train = splits["train"]
    assert [category[:2] for category in train.categories] == [(1, "bird"), (2, "cat & co"), (3, "dog")]
    assert all(part.categories == train.categories for part in splits.values())
    with pytest.raises(DataError, match="No object has a mask; got 2 boxes"):
        formats.read(tmp_path, "train", masks=True)
    assert train.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 200, 100]]
    assert train.labels.tolist() == [2, 1]
    assert train.difficult.tolist() == [False, True]
    assert train.areas.tolist() == [1200, 20000]
    assert train.image_sizes.tolist() == [[100, 200]]
    assert [len(part.boxes) for part in splits.values()] == [1, 2, 0]
    assert formats.read(tmp_path, "test")["test"].categories == train.categories


def test_trainval_is_the_training_split_where_it_stands_for_both(tmp_path):
    official(tmp_path, {"1": [], "2": []}, {"trainval": ["1"], "test": ["2"]})
    assert {name: list(part.file_names) for name, part in formats.read(tmp_path).items()} == {
        "train": ["1.jpg"],
        "test": ["2.jpg"],
    }


def test_a_devkit_within_the_folder_is_found_and_two_are_refused(tmp_path):
    official(tmp_path / "VOCdevkit" / "VOC2007", {"1": []}, {"test": ["1"]})
    assert list(formats.recognise(tmp_path)) == list(formats.recognise(tmp_path / "VOCdevkit")) == ["test"]
    official(tmp_path / "VOCdevkit" / "VOC2012", {"1": []}, {})
    with pytest.raises(DataError, match=r"more than one VOC data set.*VOC2007.*VOC2012"):
        formats.recognise(tmp_path)


@pytest.mark.parametrize("lists", [{}, {"train": ["1"]}])
def test_folders_in_lower_case_are_read_as_those_of_the_devkit(tmp_path, lists):
    official(tmp_path, {"1": [item("dog", 11, 21, 40, 60)]}, lists)
    (tmp_path / "Annotations").rename(tmp_path / "annotations")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    ((split, part),) = formats.read(tmp_path).items()
    assert (split, list(part.file_names)) == ("train" if lists else "all", ["1.jpg"])
    assert part.boxes.tolist() == [[10, 20, 40, 60]]
    assert [category.name for category in part.categories] == ["cat", "dog"]


def test_a_folder_of_annotations_in_lower_case_that_is_of_other_things_is_passed_over(tmp_path):
    put(tmp_path / "annotations" / "1.xml")
    assert {source.format for source in formats.recognise(tmp_path).values()} == {"voc"}
    (tmp_path / "annotations" / "1.xml").write_text("<annotations/>")
    (tmp_path / "1.jpg").touch()
    assert {source.format for source in formats.recognise(tmp_path).values()} == {"folder"}


@pytest.mark.parametrize("folders", [("",), ("train/", "valid/")])
def test_files_beside_their_images_are_read(tmp_path, folders):
    for folder in folders:
        put(tmp_path / f"{folder}a.b.xml", item("cat", 1, 1, 9, 9), file_name="C:\\somewhere\\else.png")
        (tmp_path / f"{folder}a.b.PNG").touch()
    splits = formats.read(tmp_path)
    assert list(splits) == (["all"] if len(folders) == 1 else ["train", "val"])
    assert all(list(part.file_names) == ["a.b.PNG"] for part in splits.values())


def test_the_file_name_helps_where_no_image_has_the_stem(tmp_path):
    put(tmp_path / "1.xml", file_name="photo.jpg")
    put(tmp_path / "2.xml", file_name="gone.jpg")
    (tmp_path / "photo.jpg").touch()
    found = formats.read(tmp_path)["all"]
    assert list(found.file_names) == ["photo.jpg"]
    assert found.problems.counts == {"missing-image": 1}


def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path):
    put(tmp_path / "1.xml", file_name="../photo.jpg")
    with pytest.raises(DataError, match="unsafe-path"):
        formats.read(tmp_path)


def test_files_that_count_from_zero_are_noticed_over_all_splits(tmp_path):
    files = {"1": [item("cat", 10, 20, 40, 60)], "2": [item("cat", 0, 7, 10, 10)]}
    official(tmp_path, files, {"train": ["1"], "test": ["2"]})
    for part in (formats.read(tmp_path)["train"], formats.read(tmp_path, "train")["train"]):
        assert part.boxes.tolist() == [[10, 20, 40, 60]]
        assert part.problems.counts == {"zero-based-voc": 1}
        assert part.problems.examples["zero-based-voc"] == [str(tmp_path / "Annotations" / "2.xml")]


@pytest.mark.parametrize(
    ("corners", "kind", "kept"),
    [
        ((181, 29, 181, 29), "degenerate-box", 0),
        ((181, 29, 181, 40), None, 1),
        ((40, 60, 11, 21), "inverted-box", 1),
        ((11, 21, 400, 60), "outside-box", 1),
        (("nan", 21, 40, 60), "non-finite-box", 0),
        (("wide", 21, 40, 60), "malformed-box", 0),
        (("", 21, 40, 60), "malformed-box", 0),
    ],
)
def test_each_problem_is_counted_and_named(tmp_path, corners, kind, kept):
    official(tmp_path, {"1": [item("cat", *corners), item("dog", 5, 5, 9, 9)]}, {})
    found = formats.read(tmp_path)["all"]
    assert len(found.boxes) == kept + 1
    assert kind != "inverted-box" or found.boxes[0].tolist() == [10, 20, 40, 60]
    assert found.problems.counts == ({kind: 1} if kind else {})
    assert not kind or "1.xml: object 1" in found.problems.examples[kind][0]


def test_a_list_of_classes_decides_the_table(tmp_path):
    official(tmp_path, {"1": [item("cat", 1, 1, 9, 9), item("cow", 1, 1, 9, 9)]}, {})
    (tmp_path / "classes.txt").write_text("zebra\ncat\n")
    found = formats.read(tmp_path)["all"]
    assert [category.name for category in found.categories] == ["zebra", "cat"]
    assert found.labels.tolist() == [1]
    assert found.problems.counts == {"unknown-category": 1}


def test_an_image_without_its_file_is_counted(tmp_path):
    official(tmp_path, {"1": []}, {"train": ["1", "2", "", "1"]})
    found = formats.read(tmp_path)["train"]
    assert len(found) == 1
    assert found.problems.counts == {"missing-annotation": 1}


def test_a_missing_size_is_read_from_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (31, 17)).save(tmp_path / "1.jpg", exif=exif)
    put(tmp_path / "1.xml", item("cat", 2, 2, 16, 30), size=None)
    assert formats.read(tmp_path)["all"].image_sizes.tolist() == [[31, 17]]


BOMB = '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;&x;">]><annotation><filename>&z;</filename></annotation>'


@pytest.mark.parametrize("text", ["", "<annotation>", "\x00", "<?xml version='1.0' encoding='no'?><a/>"])
@pytest.mark.parametrize("lists", [{}, {"train": ["1", "2"], "val": ["3"]}])
def test_files_that_are_no_annotations_are_left_out_by_name(tmp_path, text, lists):
    official(tmp_path, {"1": [item("cat", 1, 1, 9, 9)], "2": [], "3": []}, lists)
    (tmp_path / "Annotations" / "2.xml").write_text(text)
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / "2.jpg")
    found = formats.read(tmp_path)
    first = found["train" if lists else "all"]
    assert first.problems.counts["unreadable-annotation"] == 1
    assert first.problems.counts["emptied-image"] == 1
    assert "unannotated-image" not in first.problems.counts
    assert "2.xml: " in first.problems.examples["unreadable-annotation"][0]
    assert "missing-annotation" not in first.problems.counts
    assert [name for part in found.values() for name in part.file_names] == ["1.jpg", "3.jpg"]
    if lists:
        assert not found["val"].problems.counts


def test_xml_of_other_things_among_annotations_is_not_read(tmp_path):
    official(tmp_path, {"1": [item("cat", 1, 1, 9, 9)], "2": []}, {})
    (tmp_path / "Annotations" / "2.xml").write_text("<html/>")
    problems = formats.read(tmp_path)["all"].problems
    assert problems.counts == {"unread-annotation": 1, "unannotated-image": 1}
    assert problems.examples["unread-annotation"] == [str(tmp_path / "Annotations" / "2.xml")]


def test_lists_of_other_things_are_no_splits(tmp_path):
    files = {stem: [item("cat", 1, 1, 9, 9)] for stem in "12345"}
    lists = {"train": ["1", "2"], "val": ["3"], "all": ["1", "2", "3"], "labels": ["cat"], "extra": ["4"]}
    official(tmp_path, files, lists)
    assert {name: len(part) for name, part in formats.read(tmp_path).items()} == {"train": 2, "val": 1, "extra": 1}


@pytest.mark.parametrize("others", [[], ["1"]])
def test_bombs_are_refused_and_so_is_a_set_of_which_nothing_can_be_read(tmp_path, others):
    official(tmp_path, {stem: [] for stem in ("2", *others)}, {})
    for text in (BOMB, *([] if others else ["<annotation>"])):
        (tmp_path / "Annotations" / "2.xml").write_text(text)
        with pytest.raises(DataError, match=r"2\.xml: malformed-file"):
            formats.read(tmp_path)


def test_images_without_a_file_of_their_own_are_noted(tmp_path):
    for stem in ("1", "2"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{stem}.png")
    put(tmp_path / "1.xml", item("cat", 1, 1, 9, 9))
    problems = formats.read(tmp_path)["all"].problems
    assert problems.counts == {"unannotated-image": 1}
    assert problems.examples["unannotated-image"] == [str(tmp_path / "2.png")]


def test_an_image_that_has_lost_all_its_boxes_is_no_empty_one(tmp_path):
    official(tmp_path, {"1": [item("cat", 9, 9, 9, 9)], "2": [], "3": [item("cat", 1, 1, 9, 9)]}, {})
    text = (tmp_path / "Annotations" / "3.xml").read_text()
    (tmp_path / "Annotations" / "4.xml").write_text(text.replace("<xmin>1<", "<xmin>1,5<"))
    (tmp_path / "JPEGImages" / "4.jpg").touch()
    found = formats.read(tmp_path)["all"]
    assert list(found.file_names) == ["2.jpg", "3.jpg"]
    assert found.problems.counts == {"degenerate-box": 1, "malformed-box": 1, "emptied-image": 2}
    assert found.offsets.tolist() == [0, 0, 1]


PROJECT = "<?xml version='1.0'?>\n<project version='4'><annotationProcessing/></project>"


@pytest.mark.parametrize("place", [".idea/misc.xml", "misc.xml", "train/misc.xml", "__MACOSX/a.xml", "train/.x/a.xml"])
def test_an_xml_file_of_something_else_makes_no_data_set(tmp_path, place):
    put(tmp_path / place, item("cat", 1, 1, 9, 9))
    if "misc" in place:
        (tmp_path / place).write_text(PROJECT)
    (tmp_path / "train").mkdir(exist_ok=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "train" / "a.png")
    assert {name: source.format for name, source in formats.recognise(tmp_path).items()} == {"all": "folder"}


def test_copies_in_hidden_folders_are_no_annotations(tmp_path):
    for folder in ("train", "train/.ipynb_checkpoints"):
        put(tmp_path / folder / "a.xml", item("cat", 1, 1, 9, 9))
        (tmp_path / folder / "a.jpg").touch()
    assert list(formats.read(tmp_path)["train"].file_names) == ["a.jpg"]


def test_annotations_are_known_by_their_element_in_any_encoding(tmp_path):
    put(tmp_path / "a.xml", item("cat", 1, 1, 9, 9))
    (tmp_path / "a.jpg").touch()
    text = (tmp_path / "a.xml").read_text()
    (tmp_path / "a.xml").write_bytes(f'<?xml version="1.0" encoding="UTF-16"?>{text}'.encode("utf-16"))
    (tmp_path / "A project.xml").write_text("<!-- of something else -->")
    found = formats.read(tmp_path)["all"]
    assert len(found.boxes) == 1
    assert "A project.xml: " in found.problems.examples["unreadable-annotation"][0]


@pytest.mark.parametrize(
    "odd", [(0, 0, 0, 0), (0, 0, 0, 5), (0, 20, 30, 40), (30, 40, 0, 0)], ids=["placeholder", "line", "slip", "swapped"]
)
def test_one_box_does_not_shift_all_others(tmp_path, odd):
    files = {str(number): [item("cat", 1, 1, 100, 80)] for number in range(10)}
    official(tmp_path, files | {"last": [item("cat", *odd)]}, {})
    found = formats.read(tmp_path)["all"]
    assert found.boxes[:10].tolist() == [[0, 0, 100, 80]] * 10
    assert "zero-based-voc" not in found.problems.counts
    assert found.problems.counts
