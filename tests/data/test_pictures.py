import gzip
import io
import os
import pickle
import shutil
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from detrkit.data.files import walk_images
from detrkit.data.images import open_image
from detrkit.data.pictures import open_pictures
from detrkit.errors import DataError, UsageError


def encoded(number, size=(24, 20), suffix="png"):
    """The bytes of an image file that is different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=suffix)
    return stream.getvalue()


def write_folder(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return folder


def write_shard(path, members, kind=tarfile.GNU_FORMAT):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(pictures):
    return list(pictures.names)


NESTED = ("b.png", "z/1.PNG", "z/a/2.png", "c/3.png", "a.png")


def test_a_folder_is_listed_like_everywhere_and_others_are_passed_over(tmp_path):
    write_folder(tmp_path, [*NESTED, ".hidden.png", ".cache/x.png", "__MACOSX/y.png", "notes.txt"])
    pictures = open_pictures(tmp_path)
    assert names(pictures) == list(walk_images(tmp_path)) == ["a.png", "b.png", "c/3.png", "z/1.PNG", "z/a/2.png"]
    assert len(pictures) == 5
    assert pictures.name(2) == str(tmp_path / "c/3.png")
    assert np.array_equal(pictures.open(2), open_image(tmp_path / "c/3.png"))
    assert pictures.sizes.tolist() == [(tmp_path / name).stat().st_size for name in pictures.names]
    assert pictures.summary() == "5 images"
    assert not pictures.problems.counts


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_gives_the_pixels_of_the_folder(tmp_path, kind):
    folder = write_folder(tmp_path / "images", ["a.png", "n/b.png", "n/c.png"])
    long = "d" * 90 + "/" + "é" * 40 + ".png"
    members = [(name, (folder / name).read_bytes()) for name in walk_images(folder)]
    others = [("a.json", b"{}"), ("n/b.cls", b"7"), (".e.png", members[0][1]), ("__MACOSX/._a.png", b"x")]
    shard = write_shard(tmp_path / "s.tar", [*members[:2], *others, *members[2:], (long, encoded(9))], kind)
    inside, outside = open_pictures(shard), open_pictures(folder)
    assert names(inside) == [*names(outside), long]
    assert inside.name(1) == f"{shard}/n/b.png"
    for index in range(3):
        assert np.array_equal(inside.open(index), outside.open(index))
    assert np.array_equal(inside.open(3), open_image(encoded(9)))
    assert inside.summary() == "4 images in 1 tar shard"
    assert not inside.problems.counts


def test_photographs_are_decoded_smaller_where_that_is_enough(tmp_path):
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (160, 120)).save(tmp_path / "folder" / "a.jpg")
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", (tmp_path / "folder" / "a.jpg").read_bytes())])
    for source in (tmp_path / "folder", shard):
        pictures = open_pictures(source)
        assert [pictures.open(0, coarse=side).size for side in (0, 61, 60, 16)] == [
            (160, 120), (160, 120), (80, 60), (40, 30)
        ]  # fmt: skip


def test_sources_of_all_kinds_together(tmp_path):
    folder = write_folder(tmp_path / "mixed", ["m.png", "deep/n.png"])
    write_shard(folder / "deep/s-0.tar", [("0.png", encoded(5)), ("1.png", encoded(6))])
    single = write_folder(tmp_path, ["one.png"]) / "one.png"
    shard = write_shard(tmp_path / "t.tar", [("0.png", encoded(7))])
    pictures = open_pictures([str(single), folder, shard])
    expected = [single, folder / "m.png", folder / "deep/n.png", f"{folder}/deep/s-0.tar/0.png"]
    expected += [f"{folder}/deep/s-0.tar/1.png", f"{shard}/0.png"]
    assert [pictures.name(index) for index in range(6)] == list(map(str, expected))
    assert pictures.summary() == "6 images, 3 of them in 2 tar shards"
    assert np.array_equal(pictures.open(4), open_image(encoded(6)))
    assert np.array_equal(pictures.open(-1), open_image(encoded(7)))


def test_no_image_is_opened_to_list_it(tmp_path):
    (tmp_path / "a.jpg").write_text("no image at all")
    pictures = open_pictures(tmp_path)
    with pytest.raises(DataError, match=r"a\.jpg: The file is not an image"):
        pictures.open(0)


def test_members_are_read_wherever_their_name_points_and_nothing_is_written(tmp_path):
    inner = tmp_path / "in"
    inner.mkdir()
    unsafe = ["../up.png", "/abs.png", "./here.png", "a/../../b.png"]
    shard = write_shard(inner / "s.tar", [(name, encoded(number)) for number, name in enumerate(unsafe)])
    pictures = open_pictures(shard)
    assert names(pictures) == unsafe
    for index in range(4):
        assert np.array_equal(pictures.open(index), open_image(encoded(index)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "s.tar"]


def test_irregular_members_are_counted(tmp_path):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("f.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("d.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("empty.png"))
        for _ in range(2):
            info = tarfile.TarInfo("twice.png")
            info.size = len(encoded(0))
            tar.addfile(info, io.BytesIO(encoded(0)))
    pictures = open_pictures(shard)
    assert names(pictures) == ["twice.png"] * 2
    assert pictures.problems.counts == {"unusable-image": 4, "duplicate-file-name": 1}
    assert pictures.problems.examples["unusable-image"][-1] == f"{shard}/empty.png: 0 bytes"


@pytest.fixture
def three(tmp_path):
    """A shard of three images, and where the header of each begins."""
    shard = write_shard(tmp_path / "s.tar", [(f"{number}.png", encoded(number)) for number in range(3)])
    with tarfile.open(shard) as tar:
        return shard, [member.offset for member in tar.getmembers()]


def test_a_truncated_shard_gives_what_is_whole(three):
    shard, headers = three
    whole = shard.read_bytes()
    end = headers[2] + 512 + -(-len(encoded(2)) // 512) * 512
    for length, left in ((headers[2] + 600, 2), (headers[2] + 100, 2), (headers[2], 2), (end, 3), (end + 100, 3)):
        shard.write_bytes(whole[:length])
        pictures = open_pictures(shard)
        assert names(pictures) == [f"{number}.png" for number in range(left)], length
        assert pictures.problems.counts == {"damaged-shard": 1}, length
        assert str(shard) in pictures.problems.examples["damaged-shard"][0]
        assert np.array_equal(pictures.open(left - 1), open_image(encoded(left - 1)))


def test_a_damaged_header_is_told(three):
    shard, headers = three
    data = bytearray(shard.read_bytes())
    data[headers[1] + 5] ^= 0xFF
    shard.write_bytes(data)
    pictures = open_pictures(shard)
    assert names(pictures) == ["0.png"]
    assert pictures.problems.examples["damaged-shard"] == [f"{shard}: a header is damaged at byte {headers[1]:,}"]


def test_members_behind_the_end_are_told(three):
    shard, _ = three
    shard.write_bytes(shard.read_bytes() * 2)
    pictures = open_pictures(shard)
    assert len(pictures) == 3
    assert pictures.problems.counts == {"damaged-shard": 1}


@pytest.mark.parametrize("data", [b"<html>not found</html>" * 99, b"x" * 100])
def test_what_is_no_tar_is_named(tmp_path, data):
    shard = tmp_path / "s.tar"
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"s\.tar: There is no image here.*damaged-shard.*expected files that end in"):
        open_pictures(shard)
    write_folder(tmp_path, ["a.png"])
    pictures = open_pictures(tmp_path)
    assert names(pictures) == ["a.png"]
    assert pictures.problems.counts == {"damaged-shard": 1}


@pytest.mark.parametrize("size", ["-600", "1e9", "99999999999999999999999"])
def test_sizes_that_cannot_be_are_damage(tmp_path, size):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, headers in enumerate(({}, {"size": size}, {})):
            info = tarfile.TarInfo(f"{number}.png")
            info.size, info.pax_headers = len(encoded(number)), headers
            tar.addfile(info, io.BytesIO(encoded(number)))
    pictures = open_pictures(shard)
    assert names(pictures)[0] == "0.png"
    for index in range(len(pictures)):
        assert np.array_equal(pictures.open(index), open_image(encoded(index)))
    assert len(pictures) == 3 or pictures.problems.counts["damaged-shard"] == 1


def test_random_damage_never_escapes(three, rng):
    shard, _ = three
    whole = np.frombuffer(shard.read_bytes(), np.uint8)
    for _ in range(80):
        data = whole.copy()
        header = 512 * rng.integers(len(data) // 512)
        data[header + rng.integers(512, size=3)] = rng.integers(256, size=3)
        shard.write_bytes(data.tobytes())
        with suppress(DataError):
            pictures = open_pictures(shard)
            for index in range(len(pictures)):
                pictures.open(index)


def test_compressed_shards_are_refused_or_counted(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("a.png", encoded(0))])
    packed = tmp_path / "p.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    disguised = tmp_path / "d.tar"
    disguised.write_bytes(packed.read_bytes())
    for path in (packed, disguised):
        with pytest.raises(DataError, match=r"The tar shard is compressed.*Decompress it"):
            open_pictures(path)
    pictures = open_pictures(tmp_path)
    assert names(pictures) == ["a.png"]
    assert sorted(pictures.problems.examples["compressed-shard"]) == [str(disguised), str(packed)]


def test_the_same_file_counts_once(tmp_path):
    folder = write_folder(tmp_path / "images", ["a.png", "n/b.png"])
    shard = write_shard(folder / "s.tar", [("c.png", encoded(3))])
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "hard.png").hardlink_to(folder / "a.png")
    (folder / "n/loop").symlink_to(folder)
    (tmp_path / "other").symlink_to(folder / "n")
    (tmp_path / "s2.tar").symlink_to(shard)
    pictures = open_pictures([folder, folder, tmp_path / "other", tmp_path / "s2.tar", folder / "n/b.png"])
    assert names(pictures) == ["a.png", "c.png", "n/b.png"]
    assert pictures.problems.counts == {"repeated-path": 7}


def test_equal_images_in_two_files_are_two(tmp_path):
    write_folder(tmp_path, ["a.png"])
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    assert len(open_pictures(tmp_path)) == 2


def test_useless_files_are_counted(tmp_path, monkeypatch):
    write_folder(tmp_path, ["a.png", "locked/b.png"])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    scandir = os.scandir

    def guarded(path):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    pictures = open_pictures(tmp_path)
    assert names(pictures) == ["a.png"]
    assert pictures.problems.counts == {"unusable-image": 3, "unreadable-folder": 1}
    told = " ".join(pictures.problems.examples["unusable-image"])
    assert all(reason in told for reason in ("empty.jpg: 0 bytes", "broken.jpg: No such", "pipe.jpg: no regular file"))


def test_pictures_of_kinds_that_are_not_read_are_counted(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.HEIC").write_bytes(b"some")
    with pytest.raises(DataError, match=r"no image here.*1 × unread-image .*a\.HEIC"):
        open_pictures(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "b.dng").write_bytes(b"the same, as the camera saw it")
    assert open_pictures(tmp_path).problems.counts == {"unread-image": 1}


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.png").touch()
    write_folder(tmp_path / "good", ["a.png"])
    for name, message in (
        ("gone", "There is no such file or folder.*Check the path"),
        ("notes.txt/x.png", "There is no such file or folder"),
        ("n\0.png", "The path cannot be read"),
        ("void", "There is no image here.*jpg"),
        ("empty.png", "There is no image here.*empty.png: 0 bytes"),
        ("notes.txt", "neither a folder, nor an image, nor a tar shard.*.tar, .jpg"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_pictures([tmp_path / "good", tmp_path / name])
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(UsageError, match="No images were named"):
        open_pictures([])


def test_a_shard_that_changes_after_it_was_listed(three):
    shard, headers = three
    pictures = open_pictures(shard)
    shard.write_bytes(shard.read_bytes()[: headers[2] + 600])
    assert np.array_equal(pictures.open(1), open_image(encoded(1)))
    with pytest.raises(DataError, match=r"s\.tar/2\.png: The tar shard is shorter"):
        pictures.open(2)
    shard.unlink()
    with pytest.raises(DataError, match=r"s\.tar/1\.png: The tar shard cannot be read; got No such file"):
        pictures.open(1)


def test_an_image_stays_where_it_is_when_others_come_or_all_move(tmp_path):
    few = write_folder(tmp_path / "few", [f"{index:03d}.png" for index in range(60)])
    write_shard(few / "s.tar", [(f"{index}.png", encoded(index)) for index in range(20)])
    many = shutil.copytree(few, tmp_path / "many")
    write_folder(many, [f"x/{index}.png" for index in range(30)])
    train, held = open_pictures(few).split(0.2, 3)
    assert len(train) + len(held) == 80
    assert 6 <= len(held) <= 28
    more_train, more_held = open_pictures(many).split(0.2, 3)
    assert set(train.names) < set(more_train.names)
    assert set(held.names) < set(more_held.names)
    other = open_pictures(few).split(0.2, 4)[1]
    assert set(other.names) != set(held.names)
    assert np.array_equal(held.open(0), open_image(few / held.names[0]))


def test_shares_that_make_no_sense(tmp_path):
    pictures = open_pictures(write_folder(tmp_path, ["a.png", "b.png"]))
    assert [len(part) for part in pictures.split(0.0, 0)] == [2, 0]
    assert [len(part) for part in pictures.split(0.001, 0)] == [1, 1]
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="val_fraction"):
            pictures.split(share, 0)
    with pytest.raises(DataError, match="1 images cannot be divided"):
        pictures.select([0]).split(0.5, 0)


def test_the_fingerprint_knows_names_and_sizes_and_not_the_place(tmp_path):
    folder = write_folder(tmp_path / "a", ["1.png", "n/2.png"])
    write_shard(folder / "s.tar", [("3.png", encoded(3))])
    before = open_pictures(folder)
    moved = open_pictures(shutil.copytree(folder, tmp_path / "b"))
    assert moved.fingerprint() == before.fingerprint()
    assert before.select([1, 0, 2]).fingerprint() != before.fingerprint()
    (folder / "s.tar").rename(folder / "t.tar")
    assert open_pictures(folder).fingerprint() != before.fingerprint()
    (folder / "1.png").rename(folder / "0.png")
    renamed = open_pictures(folder).fingerprint()
    (folder / "0.png").write_bytes(b"other")
    assert len({before.fingerprint(), renamed, open_pictures(folder).fingerprint()}) == 3


def test_a_selection_keeps_its_images(three):
    shard, _ = three
    chosen = open_pictures(shard).select([2, 0])
    assert names(chosen) == ["2.png", "0.png"]
    for index, number in enumerate((2, 0)):
        assert np.array_equal(chosen.open(index), open_image(encoded(number)))


def test_pictures_travel_to_another_process(three):
    shard, _ = three
    pictures = pickle.loads(pickle.dumps(open_pictures(shard)))
    assert np.array_equal(pictures.open(1), open_image(encoded(1)))


@pytest.mark.parametrize("mode", ["rotated", "grey", "deep", "rgba"])
def test_images_come_out_upright_and_rgb_from_a_shard_too(tmp_path, mode):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    if mode == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(stream, "jpeg", exif=exif)
    elif mode == "deep":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(stream, "png")
    else:
        Image.fromarray(pixels).convert({"grey": "L", "rgba": "RGBA"}[mode]).save(stream, "png")
    image = open_pictures(write_shard(tmp_path / "s.tar", [("a.png", stream.getvalue())])).open(0)
    assert image.mode == "RGB"
    assert image.size == ((20, 30) if mode == "rotated" else (30, 20))
