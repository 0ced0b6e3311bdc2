"""Where the parts of a YOLO data set lie: the YAML file and its folders, Darknet's file and lists, or the folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from detrkit.data.files import has_images, is_known_split, split_name, walk_images
from detrkit.data.problems import Problems
from detrkit.documents import read_text
from detrkit.errors import DataError, brief
from detrkit.structures import Category

TABLES = ("classes.txt", "obj.names")
_SYSTEM = (Path("/proc"), Path("/sys"), Path("/dev"))
_YAML = (".yaml", ".yml")
"""Suffixes of the files that say where everything lies."""

_DARKNET = (".data",)
"""Suffix of what Darknet wants in their place."""

SPLITS = ("train", "val", "valid", "validation", "test")


LARGEST = 1 << 19
"""Bytes of the largest YAML file: its parser takes a second for a few hundred kilobytes. Names of a thousand classes
have twenty."""


class _Loader(yaml.SafeLoader):
    """Makes plain values alone, and knows no aliases, with which a few lines can stand for any amount of data."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("there is an alias (*) in it, and aliases are not followed")
        return super().compose_node(parent, index)


class Layout(NamedTuple):
    """A YOLO data set as found.

    `path` is the file that describes it or the folder; `base` what relative paths refer to; `splits` the folders and
    lists of each split; `missing` the splits that are declared and not there; `names` the categories by number, None
    where not said.
    """

    path: Path
    base: Path
    splits: dict[str, list[Path]]
    missing: list[str]
    names: dict[int, str] | None
    has_key_points: bool


def find(root: Path) -> Layout | None:
    """The data set that a file or a folder describes, None where it is none."""
    if root.is_file():
        return _from_file(root, _load(root)) if root.suffix.lower() in _YAML + _DARKNET else None
    candidates = _files(root, _YAML)
    named = [path for path in candidates if path.stem in ("data", "dataset")]
    described = [(path, content) for path in named[:1] or candidates if (content := _load(path, path in named))]
    if not described:
        loaded = [(path, _load(path, must_parse=False)) for path in _files(root, _DARKNET)]
        described = [(path, content) for path, content in loaded if _is_here(path, content)]
    if len(described) > 1:
        raise DataError(
            "There is more than one file that describes a YOLO data set",
            where=root,
            got=", ".join(path.name for path, _ in described),
            remedy="Pass the one that is meant.",
        )
    return _from_file(*described[0]) if described else _from_folders(root)


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def _is_darknet(path: Path) -> bool:
    return path.suffix.lower() in _DARKNET


def _load(path: Path, must_parse: bool = True) -> dict[str, Any]:
    """The content of a file that describes a data set, empty where it describes something else."""
    try:
        text = read_text(path, LARGEST)
        content = _darknet(text) if _is_darknet(path) else yaml.load(text, Loader=_Loader)
    except Exception as error:
        if not must_parse:
            return {}
        _refuse(
            path,
            "the file is no text" if _is_darknet(path) else "the file is not YAML",
            str(error).replace("\n", " "),
            "names and train/val/test",
        )
    described = isinstance(content, dict) and ("names" in content or "nc" in content)
    return content if described and _split_keys(content) else {}


def _darknet(text: str) -> dict[str, str]:
    """Darknet's lines `key = value`."""
    parts = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, sign, value in parts if sign}


def _is_here(path: Path, content: dict[str, Any]) -> bool:
    """Whether what Darknet's file names lies around it: others than Darknet leave such files behind."""
    base = _base(path, content.get("path"))
    places = (_place(path, base, content[key]) for key in _split_keys(content) if content[key])
    return _darknet_names(path, content) is not None and any(places)


def _darknet_names(path: Path, content: dict[str, Any]) -> dict[int, str] | None:
    """The categories of Darknet's file, whose `names` is a file, a line a class; None where the data set has none."""
    own = Path(os.path.abspath(path.parent))  # noqa: PTH100 - without following links
    places = [place for place in _candidates(path, own, content.get("names", "")) if place.is_relative_to(own)]
    return next((names for place in places if (names := _table(place)) is not None), None)


def _table(path: Path) -> dict[int, str] | None:
    """The names in a file, a line a class; None where there is no such file."""
    names = lines(path) if os.path.isfile(path) else None  # noqa: PTH113
    return None if names is None else {row: name.strip() for row, name in enumerate(names) if name.strip()}


def _split_keys(content: dict[str, Any]) -> list[str]:
    """The entries that name splits: the usual ones, and those of other names as they are written here."""
    others = (key for key, entry in content.items() if isinstance(key, str) and entry == f"images/{key}")
    return list(dict.fromkeys([*(key for key in SPLITS if key in content), *others]))


def _refuse(path: Path, what: str, got: object, expected: str) -> NoReturn:
    raise DataError(
        f"malformed-file: {what}", where=path, got=got, expected=expected, remedy="Mend the file and try again."
    )


def _from_file(path: Path, content: dict[str, Any]) -> Layout | None:
    if not content:
        return None
    base, names = _base(path, content.get("path")), _names(path, content)
    splits: dict[str, list[Path]] = {}
    missing = []
    for key in _split_keys(content):
        entries = content[key]
        if not entries:
            continue
        entries = entries if isinstance(entries, list) else [entries]
        if not all(isinstance(entry, str) for entry in entries):
            _refuse(path, f"{key} is neither a path nor a list of paths", brief(entries), "paths")
        places = [place for entry in entries if (place := _place(path, base, entry)) is not None]
        if len(places) < len(entries):
            missing.append(f"{key}: {', '.join(entries)}")
        for place in places:
            _refuse_outside(path, place)
        if places:
            splits.setdefault(split_name(key), []).extend(places)
    if not splits:
        raise DataError(
            "None of the folders and lists that the file names exists",
            where=path,
            got="; ".join(missing) or "no split",
            expected=f"folders below {base}",
            remedy="Mend its entries, or its entry path: if it is YAML; paths start at the file's own folder.",
        )
    return Layout(path, base, splits, missing, names, "kpt_shape" in content)


def _refuse_outside(path: Path, place: Path) -> None:
    """Refuse a split that would be everything around the data set, or the system's own files."""
    real, own = place.resolve(), path.parent.resolve()
    if (real != own and own.is_relative_to(real)) or any(real.is_relative_to(root) for root in _SYSTEM):
        raise DataError(
            "unsafe-path: a split is a folder that the data set lies in, or one of the system",
            where=path,
            got=str(place),
            expected="a folder of images",
            remedy="Mend the entry, or the file's entry path: if it is YAML.",
        )


def _base(path: Path, stated: object) -> Path:
    """The folder that a file's entries start from: its `path` where that exists, else its own folder."""
    own = path.parent
    base = _joined(own, stated) if isinstance(stated, str) else own
    return base if _is_folder(base) else own


def _joined(base: Path, entry: str) -> Path:
    """What a path, maybe one of Windows, refers to; as `safe_name` reads names."""
    return Path(os.path.normpath(base / entry.replace("\\", "/")))


def _candidates(path: Path, base: Path, entry: str) -> list[Path]:
    """What an entry of a file may refer to. Roboflow writes `../train/images` for what lies beside the file."""
    entry = bare = entry.replace("\\", "/")
    while bare.startswith("../"):
        bare = bare[3:]
    written = [entry, bare, _without_data(bare)] if _is_darknet(path) else [entry, bare]
    return [_joined(base, one) for one in dict.fromkeys(written)]


def _without_data(entry: str) -> str:
    """A path without the `data/` that CVAT and others put before all paths, as Darknet expects the data set in a folder
    of that name; as it is where nothing would be left, which would be the whole data set."""
    first, _, rest = os.path.normpath(entry.replace("\\", "/")).partition("/")
    return rest if first == "data" and rest else entry


def _place(path: Path, base: Path, entry: str) -> Path | None:
    """A folder or list that a file names as a split."""
    for place in _candidates(path, base, entry):
        # Some files name the folder of the split, which holds images/ and labels/.
        if _is_folder(place / "images") and not has_images(place):
            return place / "images"
        if _is_folder(place) or (os.path.isfile(place) and place.suffix == ".txt"):  # noqa: PTH113
            return place
    return None


def _is_folder(path: Path) -> bool:
    """Whether there is such a folder; a `Path` would raise for a name that no file can have."""
    return os.path.isdir(path)  # noqa: PTH112


def _names(path: Path, content: dict[str, Any]) -> dict[int, str]:
    stated = content.get("names")
    if _is_darknet(path):
        if (names := _darknet_names(path, content)) is None:
            _refuse(path, "the data set has no such file of names", brief(stated, 80), f"a file below {path.parent}")
        return names
    if isinstance(stated, list):
        return {number: str(name) for number, name in enumerate(stated)}
    if isinstance(stated, dict):
        try:
            return {int(number): str(name) for number, name in sorted(stated.items(), key=lambda item: int(item[0]))}
        except (TypeError, ValueError, OverflowError):
            _refuse(path, "the keys of names are not numbers", brief(list(stated)[:5]), "0: cat, 1: dog, …")
    if stated is None and isinstance(content.get("nc"), int) and 0 < content["nc"] < 2**20:
        return {number: str(number) for number in range(content["nc"])}
    _refuse(path, "names is neither a list nor a table", brief(stated, 80), "names: [cat, dog]")


def _from_folders(root: Path) -> Layout | None:
    splits: dict[str, list[Path]] = {}
    if (root / "images").is_dir() and (root / "labels").is_dir() and _has_labels(root / "labels"):
        inner = sorted(path for path in (root / "images").iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in inner:
            if (root / "labels" / path.name).is_dir():
                splits.setdefault(split_name(path.name), []).append(path)
        if not splits and has_images(root / "images"):
            splits = {"all": [root / "images"]}
    else:
        for path in sorted(path for path in root.iterdir() if path.is_dir() and is_known_split(path.name)):
            if (path / "images").is_dir() and (path / "labels").is_dir():
                splits.setdefault(split_name(path.name), []).append(path / "images")
    if not splits and (root / TABLES[0]).is_file() and has_images(root) and _has_labels(root):
        splits = {"all": [root]}
    if not splits:
        return None
    table = next((root / name for name in TABLES if (root / name).is_file()), root / "labels" / TABLES[0])
    return Layout(root, root, splits, [], _table(table), False)


def _has_labels(folder: Path) -> bool:
    return any(path.name not in TABLES for path in folder.rglob("*.txt"))


def images(found: Layout, split: str, problems: Problems | None = None) -> tuple[Path, list[str]]:
    """The images of a split: a folder, and their paths relative to it.

    Args:
        found: the data set.
        split: which.
        problems: where pictures of kinds that are not read are counted, as of `walk_images`.

    Raises:
        DataError: a list names an image outside the data set.
    """
    places = found.splits[split]
    inside = all(place.is_relative_to(found.base) for place in places)
    root = found.base if inside else Path(os.path.commonpath([str(place) for place in places]))
    root = root if root.is_dir() else root.parent
    names: list[str] = []
    for place in places:
        if place.is_dir():
            prefix = place.relative_to(root).as_posix()
            names += [name if prefix == "." else f"{prefix}/{name}" for name in walk_images(place, problems)]
            continue
        for number, line in enumerate(lines(place) or [], 1):
            if line.strip():
                names.append(_listed(found.base, root, place, number, line.strip()))
    return root, list(dict.fromkeys(names))


def _listed(base: Path, root: Path, place: Path, number: int, line: str) -> str:
    """An image of a text file: relative to the file where it begins with ./, else to the base; or absolute."""
    start = place.parent if line.startswith(("./", ".\\")) else base
    path, rest = _joined(start, line), _without_data(line)
    if rest != line and not os.path.isfile(path) and os.path.isfile(_joined(start, rest)):  # noqa: PTH113
        path = _joined(start, rest)
    if not path.is_relative_to(root):
        raise DataError(
            "unsafe-path: a file name points outside the data folder",
            where=f"{place}, line {number}",
            got=line,
            expected=f"an image below {root}",
            remedy="Mend the list, or the entry path: of the file that names it, if it is YAML.",
        )
    return path.relative_to(root).as_posix()


def label_of(image: Path) -> Path:
    """The label file of an image: that of `label_path`, or where only it exists, the one beside the image: a folder
    that the data set lies in may be called `images`, too."""
    path, beside = label_path(image), image.with_suffix(".txt")
    return beside if not os.path.isfile(path) and os.path.isfile(beside) else path  # noqa: PTH113


def label_path(image: Path) -> Path:
    """Where the label file of an image is written: the last folder `images` becomes `labels`, the suffix `.txt`."""
    parts = list(image.parts)
    for position in reversed(range(len(parts) - 1)):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def lines(path: Path) -> list[str] | None:
    """The lines of a text file, None where there is none. Bytes that are not UTF-8 spoil their line, no more."""
    try:
        return read_text(path, errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError("The file cannot be read", where=path, got=getattr(error, "strerror", None) or error) from error


def categories(found: Layout) -> tuple[Category, ...]:
    """The category table: the names, or numbers up to the highest class of any label file where nobody says them."""
    if found.names is not None:
        return tuple(Category(number, name) for number, name in found.names.items())
    highest = -1
    for split in found.splits:
        root, names = images(found, split)
        for name in names:
            for line in lines(label_of(root / name)) or []:
                word = line.split(maxsplit=1)[:1]
                # A class number of seven digits is a mistake, not a million categories.
                if word and word[0].isdecimal() and len(word[0]) <= 6:
                    highest = max(highest, int(word[0]))
    return tuple(Category(number, str(number)) for number in range(highest + 1))
