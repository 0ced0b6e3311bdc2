"""What pre-trainings have in common: unlabelled images, divided and described, and what a run wrote down so far."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from detrkit.data.pictures import Pictures, open_pictures
from detrkit.data.problems import Problems
from detrkit.documents import parse_json, read_text
from detrkit.errors import DataError, UsageError
from detrkit.training.pretext import ImageOptions

Sources = str | Path | Iterable[str | Path]
"""Folders, images and tar shards: one or several."""


def open_images(
    images: Sources, options: ImageOptions, seed: int, notes: list[str], out: Path
) -> tuple[Pictures, Pictures]:
    """The images to train on and those that are held out; says in `notes` how many they are.

    What the run itself draws into `out` is none of them.

    Raises:
        DataError: no images there, or a single one.
        UsageError: nothing or everything would be held out.
    """
    if not 0 < options.val_fraction < 1:
        raise UsageError(
            "Some images must be held out, and some be left",
            where="val_fraction",
            got=options.val_fraction,
            expected="above 0 and below 1",
        )
    found = _without(open_pictures(images), out)
    if len(found) < 2:
        raise DataError("One image cannot be divided", where=found.source, remedy="Give a folder of images.")
    train, val = found.split(options.val_fraction, seed)
    count, held_out = len(train), len(val)
    train, val = _spread(train, options.limit), _spread(val, options.val_limit)
    taken = f" ({len(train):,} of {count:,})" if len(train) < count else ""
    notes.append(f"Training: {train.summary()}{taken}, from {found.source}")
    evaluated = f", of which {len(val):,} are evaluated" if len(val) < held_out else ""
    notes.append(f"Held out: {held_out:,} of {len(found):,} images, chosen by seed {seed}{evaluated}")
    notes.extend(found.problems.lines())
    return train, val


def _without(pictures: Pictures, folder: Path) -> Pictures:
    """The images that do not lie in a folder."""
    own = folder.absolute()
    kept = [index for index in range(len(pictures)) if own not in Path(pictures.name(index)).absolute().parents]
    return pictures if len(kept) == len(pictures) else pictures.select(kept)


def left_out(out: Path) -> Path:
    """The file that names the images of a run that could not be used, a line each."""
    return out / "left-out.txt"


def _spread(pictures: Pictures, limit: int) -> Pictures:
    """At most so many of the images; folders often are sorted by what they show, so they are taken from everywhere."""
    if not 0 < limit < len(pictures):
        return pictures
    return pictures.select(np.linspace(0, len(pictures) - 1, limit).round().astype(np.int64))


def describe(pictures: Pictures) -> dict[str, Any]:
    """Count and fingerprint of images: the same fingerprint, the same names and sizes of files."""
    return {
        "source": pictures.source,
        "images": len(pictures),
        "problems": pictures.problems.counts,
        "fingerprint": pictures.fingerprint(),
    }


def missing(problems: Problems, total: int) -> tuple[str, ...]:
    """What to say of held-out images that could not be used."""
    if not (lost := problems.counts.get("unusable-image", 0)):
        return ()
    example = problems.examples["unusable-image"][0]
    return (f"Held-out images that could not be used and do not count: {lost:,} of {total:,}, such as {example}",)


def evaluations(out: Path) -> list[dict[str, Any]]:
    """The lines that a run wrote of its evaluations, the first one first; empty where there are none.

    Raises:
        DataError: the file is damaged.
    """
    file = out / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        lines = [parse_json(line) for line in read_text(file).splitlines()]
        return [line for line in lines if line["event"] == "evaluated"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("The file is damaged", where=file, got=error, expected="a JSON object on each line") from error


def figures_so_far(out: Path) -> list[dict[str, float]]:
    """The figures of a run's evaluations, those that were defined; errors as of `evaluations`."""
    return [
        {name: float(value) for name, value in line.items() if type(value) in (int, float)} for line in evaluations(out)
    ]


def replaced(out: Path) -> int:
    """How many different images of a run's training set could not be used.

    Raises:
        DataError: the file that names them is damaged.
    """
    file = out / "replaced.jsonl"
    if not file.exists():
        return 0
    try:
        lines = [parse_json(line)["image"] for line in read_text(file).splitlines()]
        return len({failure for line in lines for failure in line.split(" | ")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("The file is damaged", where=file, got=error, expected="a JSON object on each line") from error
