"""The examination: reads a data set, looks at its boxes, classes and images, and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.doctor import boxes, classes, images
from detrkit.data.doctor.findings import Diagnosis, Finding, Place, Resolution, in_order, is_loss
from detrkit.data.doctor.kinds import KINDS, Severity
from detrkit.data.doctor.pictures import Pictures, digest_of, look
from detrkit.data.problems import POLICIES, every_place
from detrkit.documents import opened
from detrkit.errors import DataError

MOST_STATED = 10_000
"""Files whose sizes are asked for before a training, to find those that stand in both splits; of more, none is."""

MOST_READ = 200_000_000
"""Bytes of files of equal size that are read before a training, to see whether they are the same."""

_ORDER = ("train", "val", "test")


def examine(
    path: str | Path,
    resolution: Resolution,
    *,
    decode: bool = True,
    annotations: str = "",
    on_start: Callable[[int], Callable[[], None]] | None = None,
) -> Diagnosis:
    """Look through a data set.

    Args:
        path: what `formats.recognise` takes.
        resolution: of the model that would be trained, for what depends on it.
        decode: whether every image is decoded; without it, unreadable images, copies and true sizes are not found.
        annotations: the format that is meant where a folder holds several, as of `formats.recognise`.
        on_start: called with the number of images before they are decoded; gives what is called after each.

    Raises:
        DataError: no data set is there, none that is recognised, or more than one.
        UsageError: there is no such format of annotations.
    """
    sources = formats.recognise(path, annotations=annotations)
    splits, found = _read(path, sources, annotations)
    order = [name for name in _ORDER if name in splits]
    splits = {name: splits[name] for name in dict.fromkeys([*order, *splits])}
    format = next(iter(sources.values())).format
    pictures: dict[str, Pictures] = {}
    if decode and splits:
        on_image = on_start(sum(map(len, splits.values()))) if on_start else lambda: None
        pictures = {name: look(part, on_image) for name, part in splits.items()}
    if splits:
        found += _absences(path, splits, sources)
    for name, part in splits.items():
        found += _problems(part, name)
        told = boxes.report(part, format)
        found += boxes.findings(part, name, told, format)
        found += classes.object_findings(part, name, resolution, told.elsewhere)
    if splits:
        found += classes.findings(splits, format)
    found += images.findings({name: (splits[name], seen) for name, seen in pictures.items()})
    return Diagnosis(Path(path), format, splits, in_order(found), resolution, bool(pictures), pictures)


def _read(
    path: str | Path, sources: Mapping[str, formats.Source], meant: str
) -> tuple[dict[str, Annotations], list[Finding]]:
    """What can be read, and what is said of the rest."""
    with every_place():
        try:
            return formats.read(path, annotations=meant), []
        except DataError as error:
            together = error
        splits, found = {}, []
        for name in sources:
            try:
                splits.update(formats.read(path, name, annotations=meant))
            except DataError as error:
                found.append(_refusal(error, name))
    if not found:  # each alone can be read, but not all under one table
        name = ", ".join(splits)
        found = [Finding.of("disagreeing-splits", name, [Place(together.where, together.got)], str(together.what))]
        splits = dict(list(splits.items())[:1])
    return splits, found


def _refusal(error: DataError, split: str) -> Finding:
    """An error of reading as a finding: of its own kind where it names one."""
    kind = error.what.partition(":")[0]
    kind = kind if kind in POLICIES else "unreadable-split"
    said = error.what.removeprefix(f"{kind}: ")
    return Finding.of(kind, split, [Place(error.where, error.got)], f"{said[:1].upper()}{said[1:]}.", severity="broken")


def _absences(
    path: str | Path, splits: Mapping[str, Annotations], sources: Mapping[str, formats.Source]
) -> Iterator[Finding]:
    name = "train" if "train" in splits else next(iter(splits))
    part = splits[name]
    if part.crowd.all():  # also where there is no box, or no image
        unread = part.problems.examples.get("unread-annotation", [])
        more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
        said = f"Not read, and maybe its annotations: {unread[0]}{more}." if unread else ""
        yield Finding.of("no-boxes", name, [Place(part.source, f"{len(part):,} images")], said)
    if "train" not in sources and len(sources) > 1:
        yield Finding.of("no-training", ", ".join(sources), [Place(str(path), ", ".join(sources))])
    if "val" not in sources:
        yield Finding.of("no-validation", name, [Place(part.source, ", ".join(sources))])


def _problems(part: Annotations, split: str) -> Iterator[Finding]:
    """What reading counted, apart from what the doctor tells itself, with more to say."""
    for kind, count in sorted(part.problems.counts.items()):
        if kind in boxes.MENDED:
            continue
        places = [Place(place) for place in part.problems.examples[kind]]
        severity, said = _gravity(kind, count, part)
        yield Finding.of(kind, split, places, said, count=count, severity=severity)


def _gravity(kind: str, count: int, part: Annotations) -> tuple[Severity, str]:
    """How grave a counted problem is: what leaves out a fifth of all is no repair."""
    action, unit, _ = POLICIES[kind]
    left = {"image": len(part), "box": len(part.boxes)}.get(unit)
    if action == "dropped" and left is not None and is_loss(count, left + count):
        return "broken", f"{count:,} of {left + count:,} {'images' if unit == 'image' else 'boxes'} are lost so."
    return KINDS[kind].severity, ""


def examine_briefly(train: Annotations, val: Annotations, resolution: Resolution) -> tuple[Finding, ...]:
    """What can be found in a moment, without decoding an image: before every training.

    Boxes in another order or counted from 1, boxes that stand twice, classes that cannot be learnt, most objects too
    small to be found, and files that stand in both splits, or how many could not be compared in a moment. What reading
    counted is not told again.

    Args:
        train: the split to train on.
        val: the split to validate on; the same images where a training is to learn them by heart.
        resolution: of the model that is trained.
    """
    by_heart = train.root == val.root and np.array_equal(train.file_names.bytes, val.file_names.bytes)
    splits = {"train": train} if by_heart else {"train": train, "val": val}
    format = train.source.partition(" ")[0]
    found: list[Finding] = []
    for name, part in splits.items():
        report = boxes.report(part, format)
        told = boxes.findings(part, name, report, format)
        found += [finding for finding in told if finding.kind not in boxes.MENDED]
        found += classes.small_objects(part, name, resolution, report.elsewhere, classes.MOST_SMALL)
    found += [finding for finding in classes.findings(splits, format) if finding.kind != "category-ids"]
    if len(splits) == 2:
        found += _shared_files(train, val)
    return in_order(found)


def _shared_files(train: Annotations, val: Annotations) -> Iterator[Finding]:
    """Files of both splits with the same bytes. Only files of equal size are read, each once, and not too many."""
    names, count = "train, val", len(train) + len(val)
    if count > MOST_STATED:
        yield Finding.of("uncompared-image", names, [Place(str(val.root), f"{count:,} images")], count=len(val))
        return
    sizes: dict[int, list[int]] = {}
    for row in range(len(train)):
        sizes.setdefault(_bytes(train.path(row)), []).append(row)
    known: dict[int, dict[bytes, int]] = {}  # of each size that was read: the training images by what they hold
    read, same, left = 0, [], []
    for row in range(len(val)):
        path, size = val.path(row), _bytes(val.path(row))
        if not size or size not in sizes:
            continue
        cost = size * (1 if size in known else 1 + len(sizes[size]))
        if read + cost > MOST_READ:
            left.append(Place(str(path), f"{size:,} bytes, as {len(sizes[size]):,} training images have", "val", row))
            continue
        read += cost
        if size not in known:
            known[size] = {_digest(train.path(other)): other for other in reversed(sizes[size])}  # the first one stays
        digest = _digest(path)
        if digest and digest in known[size]:
            same.append(Place(str(path), f"the same as {train.path(known[size][digest])}", "val", row))
    for kind, places in (("image-in-two-splits", same), ("uncompared-image", left)):
        if places:
            yield Finding.of(kind, names, places)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return digest_of(file)
    except OSError:
        return b""
