"""Find by example: draw a box around one object, get all that are like it, before any label exists."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from detrkit import models
from detrkit.boxes import nms, xyxy_to_cxcywh
from detrkit.data.images import check_picture, open_image
from detrkit.data.loading import check_pictures, load_images
from detrkit.errors import DataError, UsageError
from detrkit.one_shot.finder import Box, Boxes, Finder, Shown, Sought, seek
from detrkit.one_shot.model import OneShot
from detrkit.one_shot.search import Search
from detrkit.postprocess import Scored
from detrkit.predict import Detector, Picture
from detrkit.structures import Category, Detections

LARGEST = 640
"""The shorter side, in pixels, up to which images are enlarged so that windows see small examples in detail."""

SAME = 0.5
"""Where several things are looked for, places that overlap by more than this (IoU) are the same."""

SEEN = 32
"""So many of the images that are searched say what is usual in them."""

LEVELLED = 12
"""So many of these are searched beforehand, to tell from what likeness on a place is taken for the thing."""


@dataclass(frozen=True)
class Thing:
    """One thing that is looked for.

    Attributes:
        name: what it is called.
        examples: images and a box in each; an image may come more than once.
        unlike: what looks like it and is something else.
    """

    name: str
    examples: tuple[tuple[Picture, Box], ...]
    unlike: tuple[tuple[Picture, Box], ...] = ()


def find(
    detector: Detector,
    things: Sequence[Thing],
    images: Sequence[Picture],
    search: Search | None = None,
    *,
    workers: int = 0,
    unreadable: Callable[[int, DataError], None] | None = None,
) -> Iterator[Detections]:
    """Everything in images that is like the examples.

    Args:
        detector: any. One that was trained on episodes (`detrkit train --task one-shot`) has learnt what is alike; of
            others the backbone's features are compared.
        things: what is looked for, each with at least one example.
        images: where. Where nothing was learnt, the first of them also say what is usual in them and so tells nothing.
        search: how.
        workers: processes that load images; 0: none but this one.
        unreadable: called with the index and the error of an image that cannot be read, which is then left out; without
            it, such an image is an error.

    Returns:
        One answer an image, in order, best scores first; labels are the numbers of the things.

    Raises:
        DataError: an image, or that of an example, cannot be read; it names the file.
        UsageError: nothing to look for, or a box that is none or lies outside its image.
    """
    search = search or Search()
    if not isinstance(images, list | tuple):
        raise UsageError("This is no list of pictures", got=type(images).__name__, expected="a list of files or images")
    check_pictures(images)
    if not things or not all(thing.examples for thing in things):
        raise UsageError("There is no example of what is to be found", expected="at least one box for each thing")
    drawn = _drawn(things)
    smallest = min(_smallest(one) for one in drawn)
    finder = _finder(detector, search)
    sizes = _sizes(detector, finder, search, smallest)
    usual = _usual(detector, finder, images, sizes)
    if usual:
        finder = finder.adapted(usual)
    with torch.inference_mode():
        shown = _looked_at(finder, drawn, sizes, len(things))
        sought = [_sought(thing, one, search) for thing, one in zip(things, shown, strict=True)]
        sought = finder.level(_spread(usual, LEVELLED), sought)
    shortest, longest = sizes
    categories = tuple(Category(number + 1, thing.name) for number, thing in enumerate(things))
    for image in load_images(images, shortest=shortest, longest=longest, workers=workers, unreadable=unreadable):
        scored = _joined(finder.search(image.tensor.to(detector.device), sought), search)
        height, width = image.original
        chosen = (scored.scores >= search.threshold).nonzero()[:, 0]
        pixels = scored.boxes[chosen] * scored.boxes.new_tensor([width, height, width, height])
        yield Detections(
            pixels.float().cpu().numpy(),
            scored.scores[chosen].float().cpu().numpy(),
            scored.labels[chosen].cpu().numpy(),
            categories,
            image.original,
            image.name,
        )


class _Drawn(NamedTuple):
    """A picture, the boxes that are drawn in it, and whose each is: the thing's number, the place among its boxes."""

    picture: Picture
    boxes: list[Box]
    owners: list[tuple[int, int]]


def _drawn(things: Sequence[Thing]) -> list[_Drawn]:
    """The examples of all things and what they are not, picture by picture: none is opened for each of its boxes."""
    drawn: dict[str | int, _Drawn] = {}
    for number, thing in enumerate(things):
        for place, (picture, box) in enumerate((*thing.examples, *thing.unlike)):
            key = str(picture) if isinstance(picture, str | Path) else id(picture)
            one = drawn.setdefault(key, _Drawn(picture, [], []))
            one.boxes.append(box)
            one.owners.append((number, place))
    return list(drawn.values())


def _inside(one: _Drawn, height: int, width: int) -> np.ndarray:
    """Its boxes, (e, 4), inside the image of this size."""
    return np.stack([_checked(box, height, width, _called(one.picture)) for box in one.boxes])


def _smallest(one: _Drawn) -> float:
    """The shortest side of its boxes, as a share of the image's shorter side; the image is not kept."""
    image = _open(one.picture)
    boxes = _inside(one, image.height, image.width)
    return float((boxes[:, 2:] - boxes[:, :2]).min()) / min(image.size)


def _open(picture: Picture) -> Image.Image:
    return open_image(picture, name="" if isinstance(picture, str | Path) else _called(picture))


def _called(picture: Picture) -> str:
    return str(picture) if isinstance(picture, str | Path) else "the image of an example"


def _checked(box: Box, height: int, width: int, name: str) -> np.ndarray:
    """A box of at least one pixel inside its image.

    Raises:
        UsageError: it is no such box.
    """
    try:
        x0, y0, x1, y1 = (float(side) for side in box)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "This is no box", where=name, got=box, expected="left, top, right, bottom in pixels"
        ) from error
    size = f"{width} × {height} pixels"
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise UsageError("The box of the example is not finite", where=name, got=(x0, y0, x1, y1))
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise UsageError(
            "The box of the example has no area",
            where=name,
            got=(x0, y0, x1, y1),
            expected="left < right and top < bottom, in pixels",
            remedy="Give two corners: left, top, right, bottom.",
        )
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
        raise UsageError(
            "The box of the example lies outside its image",
            where=name,
            got=(x0, y0, x1, y1),
            expected=f"inside {size}",
            remedy="Boxes are left, top, right, bottom in pixels of the upright image.",
        )
    cut = np.clip([x0, y0, x1, y1], 0, [width, height] * 2)
    if min(cut[2:] - cut[:2]) < 1:
        raise UsageError(
            "The box of the example lies outside its image", where=name, got=box, expected=f"inside {size}"
        )
    return cut


def _finder(detector: Detector, search: Search) -> Finder:
    model = detector.one_shot
    if model is None:
        model = OneShot(detector.model, prompted=False, width=0, cells=4).to(detector.device).eval()
    candidates = search.candidates or ("queries" if model.width else "windows")
    if model.width and candidates != "queries":
        raise UsageError(
            "A model that was trained to find by example proposes places itself",
            where="candidates",
            got=repr(candidates),
            expected="'queries', or nothing",
            remedy="To search windows, take a detector or a pre-training.",
        )
    return Finder(model, candidates, detector.calibration, search.overlap)


def _sizes(detector: Detector, finder: Finder, search: Search, smallest: float) -> tuple[int, int]:
    """The shorter side at which images are searched, and the limit of the longer; `smallest` is of the examples."""
    config: Any = detector.model.config
    size = search.image_size
    if not size and finder.candidates == "windows":
        wanted = math.ceil(finder.model.cells * config.stride / smallest)
        size = max(config.image_size, min(wanted, LARGEST))
    seen = models.at_size(config, size) if size else config
    return seen.image_size, seen.longest


def _usual(detector: Detector, finder: Finder, images: Sequence[Picture], sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Some of the images that are searched, spread over all of them, where nothing was learnt of what is alike."""
    if finder.model.width:
        return []
    some = _spread(images, SEEN)
    loaded = load_images(some, shortest=sizes[0], longest=sizes[1], unreadable=lambda index, error: None)
    return [image.tensor.to(detector.device) for image in loaded]


def _looked_at(finder: Finder, drawn: Sequence[_Drawn], sizes: tuple[int, int], count: int) -> list[Shown]:
    """The examples of each of the things, and after them what it is not; every image is encoded once."""
    found: list[dict[int, Shown]] = [{} for _ in range(count)]
    for one in drawn:
        # Read as what is searched is, so that an example looks like itself.
        (image,) = load_images([one.picture], shortest=sizes[0], longest=sizes[1])
        height, width = image.original
        inside = torch.from_numpy(_inside(one, height, width) / (width, height, width, height)).float()
        shown = finder.show(image.tensor.to(finder.device), xyxy_to_cxcywh(inside))
        for row, (number, place) in enumerate(one.owners):
            found[number][place] = shown.select([row])
    return [Shown.joined([rows[place] for place in sorted(rows)]) for rows in found]


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """So many of them at most, from the first to the last."""
    return [values[place] for place in np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def _sought(thing: Thing, shown: Shown, search: Search) -> Sought:
    """What is looked for, of which the first rows are examples and the others what it is not."""
    count, total = len(thing.examples), len(shown.looks)
    unlike = shown.select(range(count, total)) if total > count else None
    return seek(shown.select(range(count)), unlike=unlike, combine=search.combine)


def _joined(found: Sequence[Scored], search: Search) -> Scored:
    """What was found of all things, best first; of a place only the best answer where that is asked for."""
    together = Scored(*(torch.cat(column) for column in zip(*(one[:3] for one in found), strict=True)))
    if search.exclusive and len(found) > 1:
        order = nms(together.boxes, together.scores, torch.zeros_like(together.labels), min(search.overlap, SAME))
    else:
        order = together.scores.argsort(descending=True, stable=True)
    return Scored(*(column[order] for column in together[:3]))


def examples_of(name: str, example: Picture | Sequence[Picture], box: Boxes) -> Thing:
    """A thing of one picture and its box, or of as many boxes as pictures.

    Raises:
        UsageError: no pictures, or pictures and boxes that differ in number.
    """
    if isinstance(example, str) or not isinstance(example, Sequence):
        check_picture(example, "example")
        return Thing(name, ((example, box),))  # type: ignore[arg-type]  # `find` looks at the box
    for one in example:
        check_picture(one, "example")
    if len(example) != len(box):
        raise UsageError("Every picture of an example needs a box", got=f"{len(example)} pictures and {len(box)} boxes")
    return Thing(name, tuple(zip(example, box, strict=True)))  # type: ignore[arg-type]


def search_of(fields: Mapping[str, Any]) -> Search:
    """A `Search` with some fields set.

    Raises:
        UsageError: a field that does not exist; names the nearest.
    """
    known = [field.name for field in dataclasses.fields(Search)]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                "There is no such option of a search",
                got=repr(name),
                expected=", ".join(known),
                remedy=f"Did you mean {close[0]!r}?" if close else "",
            )
    return Search(**fields)
