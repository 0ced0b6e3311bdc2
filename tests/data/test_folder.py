import pytest

from detrkit.data import formats
from detrkit.errors import DataError


def test_images_at_any_depth_form_one_unlabelled_set(tmp_path):
    for name in ("b.jpg", "deep/er/a.webp", "deep/note.txt", ".cache/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = formats.read(tmp_path)["all"]
    assert list(found.file_names) == ["b.jpg", "deep/er/a.webp"]
    assert found.path(1) == tmp_path / "deep" / "er" / "a.webp"
    assert found.image_ids.tolist() == [1, 2]
    assert found.image_sizes.tolist() == [[0, 0], [0, 0]]
    assert found.categories == ()
    assert found.boxes.shape == (0, 4)
    assert found.select([1]).offsets.tolist() == [0, 0]


def test_files_that_may_be_annotations_are_noted(tmp_path):
    names = ("annotations.xml", "labels.csv", "ds0/ann/a.jpg.json", "ds0/ann/b.txt")
    for name in ("ds0/img/a.jpg", "ds0/img/b.png", "notes.txt", *names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    problems = formats.read(tmp_path)["all"].problems
    assert problems.counts == {"unread-annotation": 4}
    assert problems.examples["unread-annotation"] == [str(tmp_path / name) for name in names]
    assert "export COCO, VOC or YOLO" in next(problems.lines())


def test_a_folder_without_images_is_no_data_set(tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(DataError, match=r"No data set is recognised; got the entries note\.txt"):
        formats.read(tmp_path)


def test_pictures_of_kinds_that_are_not_read_are_counted(tmp_path):
    for name in ("a.jpg", "a.cr2", "deep/a.heic", "c.GIF", ".d.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    problems = formats.read(tmp_path)["all"].problems
    assert problems.counts == {"unread-image": 2}
    assert problems.examples["unread-image"] == [str(tmp_path / "c.GIF"), str(tmp_path / "deep" / "a.heic")]
