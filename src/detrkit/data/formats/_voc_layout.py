"""Where Pascal VOC's XML files, images and lists of splits lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from detrkit.data.files import is_known_split, split_name, walk_files
from detrkit.data.formats import Source
from detrkit.documents import opened, read_text
from detrkit.errors import DataError

HEAD_BYTES = 1 << 12
_OFFICIAL = ("train", "val", "trainval", "test")
_ROOT = re.compile(rb"<annotation[\s/>]")


def sources(root: Path) -> dict[str, Source]:
    """The splits of the VOC files in a folder, in a devkit below it, or in its folders of splits.

    Raises:
        DataError: a devkit of several years.
    """
    if not root.is_dir():
        return {}
    years = sorted(
        path.parent
        for path in (root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root).glob("VOC[0-9]*/Annotations")
    )
    if len(years) > 1:
        raise DataError(
            "There is more than one VOC data set",
            where=root,
            got=", ".join(map(str, years)),
            remedy="Pass one of them.",
        )
    base = years[0] if years else root
    if _holds_annotations(_xml_in(annotations_in(base))):
        return _official(base)
    folders = {split_name(path.name): path for path in _split_folders(root)}
    if folders:
        return {split: Source("voc", split, path, path) for split, path in folders.items()}
    return {"all": Source("voc", "all", root, root)} if _holds_annotations(_xml_in(root)) else {}


def annotations_in(base: Path) -> Path:
    """The folder of a data set's XML files: `Annotations`, which many tools write in lower case."""
    return min((path for path in base.iterdir() if is_for_annotations(path)), default=base / "Annotations")


def is_for_annotations(folder: Path) -> bool:
    """Whether a folder is called as the one of the XML files is."""
    return folder.name.lower() == "annotations" and folder.is_dir()


def _official(base: Path) -> dict[str, Source]:
    """The splits of the devkit's layout."""
    annotations = annotations_in(base)
    images = next((base / name for name in ("JPEGImages", "images") if (base / name).is_dir()), annotations)
    lists = {path.stem: path for path in sorted((base / "ImageSets" / "Main").glob("*.txt"))}
    lists = _apart(lists, annotations)
    if not lists:
        return {"all": Source("voc", "all", annotations, images)}
    return {split: Source("voc", split, lists[name], images) for split, name in lists_of_splits(lists).items()}


def _apart(lists: dict[str, Path], annotations: Path) -> dict[str, Path]:
    """The lists without those that only look like splits beside official ones: of all images, of classes, of other
    things. A split of another name holds images of its own."""
    known = {name: path for name, path in lists.items() if name in _OFFICIAL}
    if not known:
        return lists
    taken = {stem for path in known.values() for stem in _stems(path)}
    for name, path in lists.items():
        stems = set() if name in known else _stems(path)
        if stems and not stems & taken and any((annotations / f"{stem}.xml").is_file() for stem in stems):
            known[name] = path
            taken |= stems
    return known


def _stems(path: Path) -> set[str]:
    """What a list names; nothing where it cannot be read, which is told where it is read as a split."""
    try:
        return {line.strip() for line in read_text(path).splitlines() if line.strip()}
    except (OSError, ValueError):
        return set()


def lists_of_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits, and which of the lists each is.

    Beside the official lists stand those of one class ("dog_train"), which are no splits; and trainval is one only
    where train and val do not make it up.
    """
    lists = set(names)
    if lists & set(_OFFICIAL):
        lists = {name for name in lists if name in _OFFICIAL or name.rpartition("_")[2] not in _OFFICIAL}
    if "trainval" in lists:
        lists -= {"trainval"} if {"train", "val"} <= lists else {"train", "val"}
    # Of two that are one split the official one is meant.
    ordered = sorted(lists, key=lambda name: (name in _OFFICIAL, name))
    return {"train" if name == "trainval" else split_name(name): name for name in ordered}


def _xml_in(folder: Path) -> list[Path]:
    """XML files at any depth, in order; hidden ones and those in hidden folders are passed over."""
    return sorted(folder / name for name in walk_files(folder, lambda name: name.endswith(".xml")))


def _holds_annotations(files: Sequence[Path]) -> bool:
    """Whether one of the files is an annotation: beside images lie XML files of other things, too."""
    return any(map(_is_annotation, files))


def _is_annotation(path: Path) -> bool:
    try:
        with opened(path) as file:
            beginning = file.read(HEAD_BYTES)
    except OSError:
        return False
    return _ROOT.search(beginning.replace(b"\0", b"")) is not None  # UTF-16, without its zeros, is as good as ASCII


def _split_folders(root: Path) -> list[Path]:
    """Folders called like splits that hold annotations themselves."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and is_known_split(path.name))
    return [path for path in folders if _holds_annotations([file for file in _xml_in(path) if file.parent == path])]


def set_of(source: Source) -> tuple[Path, list[Path]]:
    """The folder that keys are relative to, and the folders with the XML files of the whole data set."""
    if source.path.suffix == ".txt":
        annotations = annotations_in(source.path.parents[2])
        return annotations, [annotations]
    if is_known_split(source.path.name) and source.path in (siblings := _split_folders(source.path.parent)):
        return source.path.parent, siblings
    return source.path, [source.path]


def xml_files(folders: Sequence[Path]) -> Iterator[Path]:
    """The XML files of some folders, in order."""
    for folder in folders:
        yield from _xml_in(folder)
