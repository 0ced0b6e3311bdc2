"""Which images a command is about, and where the pictures made of them go."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from detrkit.data.problems import Problems

JPEG_QUALITY = 92


def find_images(wanted: Sequence[str], out: Path, note: Callable[[str], None]) -> dict[Path, str]:
    """The images that files, folders and patterns mean, each once, with a name for its picture.

    The name is relative to the folder that was named, or the file's own; where two would be the same, all names are
    relative to the folder that all images have in common. A name that no picture can be written under gets `.jpg`.

    Args:
        wanted: files, folders (searched to any depth), and patterns with `*`, `?`, `[…]` and `**`.
        out: where pictures go; folders are not searched there.
        note: told of pictures in folders and patterns that are of kinds that are not read.

    Raises:
        DataError: something is missing, or there is no image.
        UsageError: a picture would overwrite an image.
    """
    if not wanted:
        raise UsageError("There are no images to look at", expected="images, folders or patterns behind the model")
    from detrkit.data.files import is_image_name
    from detrkit.data.problems import Problems

    problems = Problems()
    names: dict[Path, str] = {}
    seen: set[Path] = set()
    for text in wanted:
        for file, name in _matches(text, out, problems):
            if (real := file.resolve()) not in seen:
                seen.add(real)
                names[file] = name
    if not names:
        raise DataError(
            "No image is found",
            where=", ".join(wanted),
            got="; ".join(problems.lines()),
            expected="JPEG, PNG, WebP, BMP or TIFF files",
        )
    for line in problems.lines():
        note(line)
    if Counter(names.values()).most_common(1)[0][1] > 1:
        parents = [str(file.absolute().parent) for file in names]
        common = os.path.commonpath([os.path.normpath(parent) for parent in parents])
        names = {file: Path(os.path.relpath(file.absolute(), common)).as_posix() for file in names}
    taken = set(names.values())
    for file, name in names.items():
        if not is_image_name(Path(name).name):
            while name in taken:
                name = f"{name}.jpg"
            taken.add(name)
            names[file] = name
        if (out / name).resolve() in seen:
            raise UsageError("A picture would overwrite an image", where=out / name, remedy="Name another --out.")
    return names


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture in the format of its suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        picture.save(file, quality=JPEG_QUALITY)
    elif file.suffix.lower() == ".png":
        picture.save(file, compress_level=1)  # a third of the time; photographs hardly shrink further
    else:
        picture.save(file)


def _matches(text: str, out: Path, problems: Problems) -> Iterator[tuple[Path, str]]:
    path = Path(text)
    if path.is_dir():
        yield from _below(path, out, problems)
    elif path.exists() or not glob.has_magic(text):
        if not path.exists():
            raise DataError("There is no such file or folder", where=path, remedy="Check the path of the images.")
        yield path, path.name
    else:
        yield from _matching(text, out, problems)


def _matching(pattern: str, out: Path, problems: Problems) -> Iterator[tuple[Path, str]]:
    from detrkit.data.files import is_image_name, unread_pictures

    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
    if not found:
        raise DataError("Nothing matches the pattern", where=pattern, remedy="Check the path of the images.")
    for name in map(Path, found):
        if name.is_dir():
            yield from _below(name, out, problems)
        elif is_image_name(name.name):
            yield name, name.name
    for text in unread_pictures(map(os.fspath, found)):
        problems.add("unread-image", text)


def _below(folder: Path, out: Path, problems: Problems) -> Iterator[tuple[Path, str]]:
    from detrkit.data.files import walk_images

    passed_over = out.resolve()
    for name in walk_images(folder, problems):
        file = folder / name
        if passed_over not in file.resolve().parents:
            yield file, name
