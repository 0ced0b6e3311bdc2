"""The named structures that flow between the parts of the library.

Plain tensors travel inside a part; these stand at the borders. Letters in shapes: `b` image, `q` query, `t` target,
`d` channel, `c` class, `h w` grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from detrkit.errors import MissingExtraError, UsageError
from detrkit.masks import RunLengths

if TYPE_CHECKING:
    import supervision

NORMALIZATION_MEAN = (0.485, 0.456, 0.406)
"""Mean of the RGB channels in [0, 1] over ImageNet: every image tensor in the library is normalised with it."""

NORMALIZATION_STD = (0.229, 0.224, 0.225)
"""Standard deviation that goes with `NORMALIZATION_MEAN`."""


class Category(NamedTuple):
    """A row of the category table: `id` as the data set's files say it, `name` for people.

    The label of a category is its row number, 0 … c − 1; ids may have gaps and start anywhere. `is_thing`: what can be
    counted, such as a person; False for stuff, such as the sky, of which an image holds one segment at most.
    """

    id: int
    name: str
    is_thing: bool = True

    def to_json(self) -> list[int | str | bool]:
        """Id and name, and, of stuff only, that it is no thing."""
        return [self.id, self.name] if self.is_thing else [self.id, self.name, False]


def rows_of(categories: Sequence[Category], table: Sequence[Category]) -> list[int]:
    """The row of each category in another table, or −1 where it has none.

    A category is found by its id and name; failing that, by its name where only one row has it.

    Args:
        categories: what is looked for.
        table: where it is looked for.
    """
    exact = {(category.id, category.name): row for row, category in enumerate(table)}
    named: dict[str, list[int]] = {}
    for row, category in enumerate(table):
        named.setdefault(category.name, []).append(row)
    alike = [named.get(category.name, []) for category in categories]
    return [
        exact.get((category.id, category.name), rows[0] if len(rows) == 1 else -1)
        for category, rows in zip(categories, alike, strict=True)
    ]


class Target(NamedTuple):
    """What an image truly holds, as the losses want it.

    `labels` are rows of the category table; `boxes` are cxcywh in [0, 1] of the unpadded image; `name` is the image's
    file, for messages. `masks`, where they were asked for, are in pixels of the resized, unpadded image; one without
    any pixel is not known, or too small to be seen at this size.
    """

    labels: Int64[Tensor, " t"]
    boxes: Float[Tensor, "t 4"]
    name: str = ""
    masks: Bool[Tensor, "t h w"] | None = None

    def to(self, device: torch.device | str) -> Target:
        """The same target on another device."""
        early = torch.device(device).type != "cpu"  # where it is not, numbers would be read before they are there
        masks = None if self.masks is None else self.masks.to(device, non_blocking=early)
        labels, boxes = (part.to(device, non_blocking=early) for part in (self.labels, self.boxes))
        return Target(labels, boxes, self.name, masks)


class Batch(NamedTuple):
    """Images of unequal sizes, padded to the largest.

    `images` are normalised (`NORMALIZATION_MEAN`), with zeros to the right and below; `padding` is True where padded.
    """

    images: Float[Tensor, "b 3 h w"]
    padding: Bool[Tensor, "b h w"]
    targets: tuple[Target, ...] = ()

    @staticmethod
    def from_images(
        images: Sequence[Float[Tensor, "3 _ _"]], targets: Sequence[Target] = (), *, multiple_of: int = 1
    ) -> Batch:
        """Pad normalised images to the largest height and width among them.

        Args:
            images: tensors of shape (3, height, width), sizes may differ.
            targets: one for each image, or none at all.
            multiple_of: the padded height and width are rounded up to a multiple of this, in pixels.

        Raises:
            UsageError: no image, a tensor that is not (3, height, width), or a number of targets that is not the
                number of images.
        """
        if not images:
            raise UsageError("A batch needs at least one image", got="an empty list")
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise UsageError(
                    f"Image {index} of the batch has the wrong shape",
                    got=tuple(image.shape),
                    expected="(3, height, width)",
                )
        if targets and len(targets) != len(images):
            raise UsageError("Targets and images differ in number", got=f"{len(targets)} targets, {len(images)} images")
        height, width = (-(-max(image.shape[axis] for image in images) // multiple_of) * multiple_of for axis in (1, 2))
        padded = images[0].new_zeros(len(images), 3, height, width)
        padding = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
        for index, image in enumerate(images):
            padded[index, :, : image.shape[1], : image.shape[2]] = image
            padding[index, : image.shape[1], : image.shape[2]] = False
        return Batch(padded, padding, tuple(targets))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.padding.to(device, non_blocking=True),
            tuple(target.to(device) for target in self.targets),
        )


class PatchBatch(NamedTuple):
    """Unlabelled images with patches that were cut from them: a batch of random query patch detection (UP-DETR).

    `images` and `padding` are as in `Batch`; `patches` are `p` pieces of each image, all scaled to `s` × `s` pixels and
    normalised; `boxes` say where each was cut, cxcywh in [0, 1] of the unpadded image; `names` are the images' files,
    for messages.
    """

    images: Float[Tensor, "b 3 h w"]
    padding: Bool[Tensor, "b h w"]
    patches: Float[Tensor, "b p 3 s s"]
    boxes: Float[Tensor, "b p 4"]
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> PatchBatch:
        """The same batch on another device."""
        return PatchBatch(
            self.images.to(device, non_blocking=True),
            self.padding.to(device, non_blocking=True),
            self.patches.to(device, non_blocking=True),
            self.boxes.to(device, non_blocking=True),
            self.names,
        )


class FeatureBatch(NamedTuple):
    """What a backbone that does not train says of unlabelled images and of places in them: a `PatchBatch` that has gone
    through the backbone already.

    `images` are the backbone's maps, zeros to the right and below; `padding` is True where a cell lies in the padded
    part; `patches` are the features of places, which `boxes` give as cxcywh in [0, 1] of the unpadded image; `names`
    are the images' files. `regions` are targets of one class, the places in each image that stand out, where these
    were looked for.
    """

    images: Float[Tensor, "b f h w"]
    padding: Bool[Tensor, "b h w"]
    patches: Float[Tensor, "b p f"]
    boxes: Float[Tensor, "b p 4"]
    names: tuple[str, ...] = ()
    regions: tuple[Target, ...] = ()

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same batch on another device."""
        return FeatureBatch(
            self.images.to(device, non_blocking=True),
            self.padding.to(device, non_blocking=True),
            self.patches.to(device, non_blocking=True),
            self.boxes.to(device, non_blocking=True),
            self.names,
            tuple(target.to(device) for target in self.regions),
        )


class EpisodeBatch(NamedTuple):
    """Images, and what is looked for in them: a batch of one-shot detection.

    `images` and `padding` are as in `Batch`. Episode `e` looks in image `asked[e]` for what image `source[e]` shows in
    the box `exemplars[e]` (cxcywh in [0, 1] of the unpadded image); `targets[e]` are all its instances there, of one
    class; `names` are the images' files, for messages.
    """

    images: Float[Tensor, "b 3 h w"]
    padding: Bool[Tensor, "b h w"]
    asked: Int64[Tensor, " e"]
    source: Int64[Tensor, " e"]
    exemplars: Float[Tensor, "e 4"]
    targets: tuple[Target, ...]
    names: tuple[str, ...]


class Queries(NamedTuple):
    """What the decoder is asked.

    `content` starts the decoder's stream (zeros in DETR); `position` is added wherever queries are compared (a learned
    embedding, plus a prompt where there is one); `blocked[i, j]` True: query i may not attend to query j. `groups` says
    of how many equal sets the queries consist that are matched each on its own (Group DETR); 1: they are one set.
    """

    content: Float[Tensor, "b q d"]
    position: Float[Tensor, "b q d"]
    blocked: Bool[Tensor, "q q"] | None = None
    groups: int = 1


class Memory(NamedTuple):
    """What the encoder made of a batch of images: `n` tokens each, row by row over the grid.

    `padding` is True where a token lies in the padded part; None where nothing is padded. `features` are the
    backbone's maps, finest first, and `projected` is the coarsest of them at the tokens' width before the encoder, for
    heads that need more than the tokens.
    """

    tokens: Float[Tensor, "b n d"]
    position: Float[Tensor, "b n d"]
    padding: Bool[Tensor, "b n"] | None
    grid: tuple[int, int]
    features: tuple[Float[Tensor, "b _ _ _"], ...] = ()
    projected: Float[Tensor, "b d _ _"] | None = None

    def select(self, images: Int64[Tensor, " e"]) -> Memory:
        """The memory of some of the images, as often as they are named, without the features.

        That of a single image stays one row, which serves any number of rows of queries.
        """
        if len(self.tokens) == 1:
            return self._replace(features=(), projected=None)
        padding = None if self.padding is None else self.padding[images]
        return Memory(self.tokens[images], self.position[images], padding, self.grid)


class Hidden(NamedTuple):
    """What the decoder answers at each layer; `reference` points are (x, y) in [0, 1], where the variant has them.

    `groups` are those of the queries.
    """

    states: Float[Tensor, "layer b q d"]
    reference: Float[Tensor, "b q 2"] | None = None
    groups: int = 1


class Predictions(NamedTuple):
    """What the heads say, for all decoder layers at once; the last layer is the answer.

    `boxes` are cxcywh in [0, 1] of the unpadded image. `logits` of softmax variants end in the no-object class. Where
    the queries were several `groups`, each layer appears once for each group, the first group last.
    """

    logits: Float[Tensor, "layer b q c"]
    boxes: Float[Tensor, "layer b q 4"]
    hidden: Float[Tensor, "layer b q d"]


@dataclass(frozen=True, eq=False)
class Detections:
    """The final answer for one image.

    Attributes:
        boxes: (n, 4) float32, xyxy in pixels of the original, upright image.
        scores: (n,) float32 in [0, 1].
        labels: (n,) int64, rows of `categories`.
        categories: the category table that the labels point into.
        image_size: height and width of the original image in pixels.
        source: the file that the image came from, where there is one.
        segments: the mask of each detection, of the image's size, where the model makes them.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    categories: tuple[Category, ...]
    image_size: tuple[int, int]
    source: str = ""
    segments: RunLengths | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detections]:
        """The detections one by one."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, chosen: np.ndarray | slice | list[int] | int | np.integer) -> Detections:
        """The detections that a boolean mask, an index array, a slice or a number chooses.

        Raises:
            IndexError: there is none of that number.
        """
        if isinstance(chosen, int | np.integer):
            chosen = [int(chosen)]
        return Detections(
            self.boxes[chosen],
            self.scores[chosen],
            self.labels[chosen],
            self.categories,
            self.image_size,
            self.source,
            None if self.segments is None else self.segments[chosen],
        )

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"] | None:
        """The pixels of each detection, decoded anew at each call; None where the model makes no masks."""
        if self.segments is None:
            return None
        return self.segments.decode() if len(self) else np.zeros((0, *self.image_size), bool)

    @property
    def names(self) -> list[str]:
        """The category name of each detection."""
        return [self.categories[label].name for label in self.labels]

    def above(self, threshold: float) -> Detections:
        """The detections whose score is at least `threshold`."""
        return self[self.scores >= threshold]

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results: a dict for each detection, with the data set's category id and the box as xywh pixels.

        Masks, where there are any, stand under `segmentation` as compressed run lengths.
        """
        masks = [{}] * len(self) if self.segments is None else self.segments.to_coco()
        return [
            {
                "image_id": int(image_id),
                "category_id": int(self.categories[label].id),
                "bbox": [float(x0), float(y0), float(x1) - float(x0), float(y1) - float(y0)],
                "score": float(score),
                **({"segmentation": mask} if mask else {}),
            }
            for (x0, y0, x1, y1), score, label, mask in zip(self.boxes, self.scores, self.labels, masks, strict=True)
        ]

    def to_supervision(self) -> supervision.Detections:
        """The same as a `supervision.Detections`.

        Raises:
            MissingExtraError: the package `supervision` is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise MissingExtraError("supervision", "supervision", "Detections.to_supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.labels,
            mask=self.masks,
            data={"class_name": np.array(self.names, dtype=str)},
        )
