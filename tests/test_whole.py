"""Files and folders that are whole or not there, whenever their writer is killed and however full the disk is."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from detrkit import whole
from detrkit.errors import Error
from detrkit.whole import (
    CHECKSUMS,
    append_line,
    damage,
    how_to_make_room,
    kept,
    standing,
    write_text_whole,
    write_whole,
)


class Stop(BaseException):
    """Not an `Exception`: like a kill, it is not to be caught."""


def write_text(text: str) -> Callable[[Path], None]:
    def write(to: Path) -> None:
        (to / "one").write_text(text)
        (to / "two").write_text(text)

    return write


def texts(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.iterdir()) if file.name != CHECKSUMS]


def dying_at(patch: pytest.MonkeyPatch, step: str, number: int, after: bool) -> None:
    """Kill whoever makes the call `number` of a kind, before it or after it."""
    calls = iter(range(100))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            fatal = next(calls) == number
            if fatal and not after:
                raise Stop
            result = real(*args, **options)
            if fatal:
                raise Stop
            return result

        return call

    holder, name = {"_flush": (whole, "_flush"), "rmtree": (shutil, "rmtree")}.get(step, (Path, step))
    patch.setattr(holder, name, dying(getattr(holder, name)))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("step", ["mkdir", "write_text", "_flush", "rename", "rmtree"])
def test_whenever_a_writer_is_killed_a_whole_folder_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, keeps: bool
) -> None:
    """Killed at each call of each kind, before it and after it; then written once more."""
    killed = 0
    for after in (False, True):
        for number in range(20):
            folder = tmp_path / f"{number}{after}" / "last"
            keep = folder.with_name("previous") if keeps else None
            options: dict[str, Any] = {"keep": keep, "checksums": keeps}
            for text in ("first", "old"):
                write_whole(folder, write_text(text), **options)
            with monkeypatch.context() as patch:
                dying_at(patch, step, number, after)
                try:
                    write_whole(folder, write_text("new"), **options)
                    break  # there is no such call any more
                except Stop:
                    killed += 1
            before = stood(folder, keep)
            assert before in ([["old"] * 2, ["first"] * 2][: len(before)], [["new"] * 2, ["old"] * 2][: len(before)])
            with pytest.raises(Stop):  # the next writer fails: what stood must go on standing
                write_whole(folder, dying_writer, **options)
            assert stood(folder, keep) == before
            write_whole(folder, write_text("third"), **options)
            assert stood(folder, keep) == [["third"] * 2, before[0]][: len(before)]
            assert folder.is_dir()
            assert sorted(path.name for path in folder.parent.iterdir()) == ["last", *(["previous"] if keeps else [])]
    assert killed >= 2  # each kind of call is made, so the test has killed something


def stood(folder: Path, keep: Path | None) -> list[list[str]]:
    """What stands, the newest first; all of it is whole."""
    places = [standing(folder), *([] if keep is None else [kept(folder, keep)])]
    assert [damage(place) for place in places] == [""] * len(places)
    return [texts(place) for place in places]


def dying_writer(to: Path) -> None:
    (to / "one").write_text("half")
    raise Stop


def test_small_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_text_whole(file, "ä1")

    def dying(*args: Any, **options: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(Stop):
            write_text_whole(file, "2")
    assert file.read_text(encoding="utf-8") == "ä1"
    write_text_whole(file, "3")
    assert file.read_text() == "3"


def checked(folder: Path) -> Path:
    write_whole(folder, write_text("12345"), checksums=True)
    assert damage(folder) == ""
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "one").write_text("1234"), "one has 4 bytes instead of 5"),
        (
            lambda f: (f / "two").write_text("12346"),
            r"the content of two has changed \(checksum \w{8} instead of \w{8}\)",
        ),
        (lambda f: (f / "two").unlink(), r"two cannot be read \(No such file"),
        (lambda f: (f / CHECKSUMS).write_text("{"), rf"{CHECKSUMS} cannot be read \(JSONDecodeError\)"),
        (lambda f: (f / CHECKSUMS).write_text('{"crc32": [1]}'), rf"{CHECKSUMS} cannot be read"),
        (lambda f: (f / CHECKSUMS).write_text('{"crc32": {"../two": [5, "0"]}}'), r"\.\./two .*has changed"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = checked(tmp_path / "last")
    spoil(folder)
    assert re.search(said, damage(folder))


def test_a_changed_bit_anywhere_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    content = bytes(range(256)) * 5000  # more than one block
    write_whole(folder, lambda to: bool((to / "file").write_bytes(content)) and None, checksums=True)
    assert damage(folder) == ""
    for place in (0, 1 << 20, len(content) - 1):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        (folder / "file").write_bytes(spoilt)
        assert "file has changed" in damage(folder)


def test_a_folder_without_checksums_is_not_judged(tmp_path: Path) -> None:
    write_whole(tmp_path / "last", write_text("1"))
    assert damage(tmp_path / "last") == ""


FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


@needs_full_device
def test_a_full_disk_leaves_the_last_good_file(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_text_whole(file, "1")
    (tmp_path / ".status.json.new").symlink_to(FULL)
    with pytest.raises(Error, match=r"status\.json: The file cannot be written; got .*No space left.*Make room"):
        write_text_whole(file, "2")
    assert file.read_text() == "1"
    assert list(tmp_path.iterdir()) == [file]


def test_only_a_full_disk_asks_for_room(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"file cannot be written; got .*No such file.*See that its folder is there"):
        write_text_whole(tmp_path / "gone" / "status.json", "1")
    for number, text in ((28, "I/O error: No space left on device (os error 28)"), (2, "I/O error: (os error 2)")):
        assert ("Make room" in how_to_make_room(SafetensorError(text))) == (number == errno.ENOSPC)
        assert ("Make room" in how_to_make_room(OSError(number, text))) == (number == errno.ENOSPC)

    def write(to: Path) -> None:
        save_file({"a": np.zeros(1)}, to / "gone" / "model.safetensors")

    with pytest.raises(Error, match=r"folder cannot be written; got .*\(os error 2\).*See that its folder is there"):
        write_whole(tmp_path / "last", write)


@needs_full_device
def test_a_full_disk_ends_a_file_of_lines_with_a_whole_line(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").symlink_to(FULL)
    with pytest.raises(Error, match=r"full\.jsonl: The file cannot be written; got .*No space left"):
        append_line(tmp_path / "full.jsonl", "1")


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A real limit, which cuts in the middle of the line as a full disk would."""
    file = tmp_path / "lines"
    append_line(file, "whole")
    code = """
        import resource, sys
        from pathlib import Path
        from detrkit.errors import Error
        from detrkit.whole import append_line
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            append_line(Path(sys.argv[1]), "x" * 100)
        except Error as error:
            print(error)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(file)], capture_output=True, text=True)
    assert "cannot be written" in said.stdout
    assert file.read_text() == "whole\n"


def test_an_error_of_the_disk_while_flushing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may notice only then that it is full; that it cannot flush folders is none."""
    folder = tmp_path / "last"
    write_whole(folder, write_text("old"))
    for number, fails in ((errno.ENOSPC, True), (errno.EIO, True), (errno.EINVAL, False)):

        def fsync(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            if fails:
                with pytest.raises(Error, match="cannot be written"):
                    write_whole(folder, write_text("new"))
            else:
                write_whole(folder, write_text("new"))
        assert texts(folder) == (["old", "old"] if fails else ["new", "new"])
