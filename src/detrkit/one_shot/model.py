"""One-shot detection: a detector that is shown examples of something and finds all of it in an image.

An exemplar's feature is added to all queries, and every instance of its class in the image is a target (UP-DETR, Dai et
al., CVPR 2021, section 4.3; its code was never published). The paper stops there. Here each place that is found is also
compared with the exemplar: both are cut into parts, looked up in the backbone's map, and their likeness enters the
score. That can be trained, and means something before any training. It holds a detector of any variant.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.errors import UsageError
from detrkit.nn.heads import MLP
from detrkit.nn.pooling import extents, pool_grids, pool_lattice
from detrkit.one_shot.background import Usual
from detrkit.prompts import Place, ask, start_as_tokens
from detrkit.structures import Memory, Predictions

SHARPNESS = 8.0
"""By how much the logit of a match rises, at first, from no likeness (cosine 0) to the same (1)."""

ALIKE = 0.5
"""The likeness (cosine) that, at first, counts neither for nor against a match."""

MIRRORED = 2
"""Cells of the map by which images are continued on each side before places are compared."""


class Encoded(NamedTuple):
    """Images that can be searched for many things.

    Attributes:
        memory: what the encoder made of them.
        compared: the backbone's maps, in which places are compared.
        extent: height and width of each image, as shares of what the cells of its map stand for.
    """

    memory: Memory
    compared: Float[Tensor, "b f h w"]
    extent: Float[Tensor, "b 2"]

    def without(self, usual: Usual | None) -> Encoded:
        """The same, with places compared by what is unusual in them."""
        return self if usual is None else self._replace(compared=usual.taken_from(self.compared))


class Exemplars(NamedTuple):
    """What a model keeps of exemplars: what queries are told, and what places are compared with (of unit length)."""

    prompts: Float[Tensor, "e d"]
    looks: Float[Tensor, "e w"]


class OneShot(nn.Module):
    """A detector that finds by example.

    Args:
        detector: a model with `queries` and `decode`. What is found is of its last class.
        place: what of a query the prompt is added to.
        prompted: whether queries are told what is looked for. Without it the detector's own answers are compared with
            the exemplars, which any detector can do.
        cells: a place is compared with an exemplar part by part, `cells` × `cells` of them.
        width: numbers that a place's look is projected to by a small network that both sides share; 0: the features
            themselves are compared, so that there is nothing to learn.

    Raises:
        UsageError: a number that makes no sense.
    """

    def __init__(
        self, detector: nn.Module, *, place: Place = "content", prompted: bool = True, cells: int = 3, width: int = 128
    ):
        super().__init__()
        for name, number, least in (("cells", cells, 1), ("width", width, 0)):
            if number < least:
                raise UsageError(f"Bad value for {name}", got=number, expected=f"at least {least}")
        if place not in get_args(Place):
            raise UsageError("Bad value for place", got=repr(place), expected=", ".join(get_args(Place)))
        config: Any = detector.config
        backbone: Any = detector.backbone
        channels = backbone.channels[-1]
        self.detector, self.place, self.prompted, self.cells, self.width = detector, place, prompted, cells, width
        self.exemplar_projection = nn.Linear(channels, config.dim) if prompted else None
        parts = channels * cells * cells
        self.look_norm = nn.LayerNorm(parts) if width else None
        self.look_head = MLP(parts, width, width) if width else None
        self.sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))
        self.offset = nn.Parameter(torch.tensor(ALIKE))

    @torch.no_grad()
    def start_from_nothing(self) -> None:
        """Let prompts begin as zeros, so that queries at first answer as if nothing were asked, and learn to listen."""
        if self.exemplar_projection is not None:
            nn.init.zeros_(self.exemplar_projection.weight)
            nn.init.zeros_(self.exemplar_projection.bias)

    def start_as_tokens(self) -> None:
        """Let prompts begin as tokens (`prompts.start_as_tokens`); where a variant makes these otherwise, at random."""
        if self.exemplar_projection is not None:
            start_as_tokens(self.exemplar_projection, self.detector)

    def encode(self, images: Float[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"]) -> Encoded:
        """All that is done to images once, whatever is looked for in them."""
        detector: Any = self.detector
        memory = detector.encode(images, padding)
        return self._encoded(memory, images, padding)

    def see(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        """What the backbone alone says of images without padding: enough to compare places with exemplars.

        Images are continued as in a mirror. Else all places at a border would look alike, as nothing else does.
        """
        backbone: Any = self.detector.backbone
        rows, columns = (_mirrored(side, backbone.strides[-1]).to(images.device) for side in images.shape[-2:])
        features = (backbone(images[..., rows[:, None], columns])[-1][..., MIRRORED:-MIRRORED, MIRRORED:-MIRRORED],)
        none = images.new_zeros(len(images), 0, 0)
        return self._encoded(Memory(none, none, None, (0, 0), features), images, None)

    def _encoded(
        self, memory: Memory, images: Float[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"] | None
    ) -> Encoded:
        backbone: Any = self.detector.backbone
        features = memory.features[-1]
        height, width = features.shape[-2:]
        return Encoded(memory, features, extents(images, padding, (height, width), backbone.strides[-1]))

    def show(self, encoded: Encoded, image: Int64[Tensor, " e"], boxes: Float[Tensor, "e 4"]) -> Exemplars:
        """What is kept of exemplars.

        Args:
            encoded: images with examples.
            image: which of them each exemplar is in.
            boxes: where it is, cxcywh in [0, 1] of the unpadded image.
        """
        features = self._parts(encoded.memory.features[-1][image], encoded.extent[image], boxes[:, None], 1)[:, 0, 0]
        projection = self.exemplar_projection
        prompts = features.new_zeros(len(features), 0) if projection is None else projection(features)
        return Exemplars(prompts, self.look(encoded, image, boxes[:, None])[:, 0])

    def look(
        self, encoded: Encoded, image: Int64[Tensor, " e"], boxes: Float[Tensor, "e n 4"]
    ) -> Float[Tensor, "e n w"]:
        """What places look like, as vectors of unit length; the cosine of two says how alike they are.

        Args:
            encoded: images.
            image: which of them each row of places is in.
            boxes: cxcywh in [0, 1] of the unpadded image; they get no gradient.
        """
        return self._look(self._parts(encoded.compared[image], encoded.extent[image], boxes, self.cells))

    def look_everywhere(
        self, encoded: Encoded, x: Float[Tensor, " x"], y: Float[Tensor, " y"], size: tuple[float, float]
    ) -> Float[Tensor, "y x w"]:
        """What boxes of one size look like in the first image, with corners at `x` and `y`, all in [0, 1] of it."""
        height, width = encoded.extent[0].tolist()
        part = (size[0] * width, size[1] * height)
        return self._look(pool_lattice(encoded.compared[0], x * width, y * height, part, self.cells))

    def _look(self, parts: Float[Tensor, "*n c f"]) -> Float[Tensor, "*n w"]:
        looks = parts.flatten(-2)
        if self.look_norm is not None and self.look_head is not None:
            looks = self.look_head(self.look_norm(looks))
        return F.normalize(looks.float(), dim=-1)

    def answer(
        self, encoded: Encoded, image: Int64[Tensor, " e"], prompts: Float[Tensor, "e d"], *, only_last: bool = False
    ) -> Predictions:
        """What the decoder finds, before it is compared with anything.

        Args:
            encoded: images, encoded once for all that is looked for.
            image: which of them each prompt is asked about.
            prompts: of `Exemplars`; one without numbers asks nothing.
            only_last: the last decoder layer's answer is enough.

        Returns:
            Predictions, one row for each prompt.
        """
        detector: Any = self.detector
        memory = encoded.memory.select(image)
        queries = detector.queries(len(image))
        if prompts.shape[1]:
            queries = ask(queries, prompts[:, None], place=self.place)
        hidden = detector.decode(memory, queries)
        if only_last:
            hidden = hidden._replace(states=hidden.states[-1:])
        found: Predictions = detector.predict(hidden)
        return found

    def evidence(self, likeness: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """What a likeness (cosine) adds to the logit of a match."""
        return self.sharpness.exp() * (likeness - self.offset)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        padding: Bool[Tensor, "b h w"],
        image: Int64[Tensor, " e"],
        source: Int64[Tensor, " e"],
        boxes: Float[Tensor, "e 4"],
    ) -> Predictions:
        """Look in images for what others of the same batch show.

        Args:
            images: normalised, zeros where padded.
            padding: True where padded.
            image: which image each exemplar is looked for in.
            source: which image it is taken from.
            boxes: where it is there, cxcywh in [0, 1] of the unpadded image.

        Returns:
            Predictions of all layers, one row for each exemplar; of the last class's logit, likeness is a part.
        """
        encoded = self.encode(images, padding)
        exemplars = self.show(encoded, source, boxes)
        found = self.answer(encoded, image, exemplars.prompts)
        layers = [self.look(encoded, image, places) for places in found.boxes.detach().float()]
        likeness = torch.einsum("leqw,ew->leq", torch.stack(layers), exemplars.looks)
        last = torch.zeros_like(found.logits)
        last[..., self.matched] = self.evidence(likeness).to(last.dtype)
        return found._replace(logits=found.logits + last)

    @property
    def matched(self) -> int:
        """Which logit is that of what is looked for: the last class, before no-object where there is one."""
        config: Any = self.detector.config
        return int(config.num_classes) - 1

    def _parts(
        self, maps: Float[Tensor, "e f h w"], extent: Float[Tensor, "e 2"], boxes: Float[Tensor, "e n 4"], cells: int
    ) -> Float[Tensor, "e n c f"]:
        """The features of the parts of places, in maps that stand for more than the image."""
        height, width = extent[:, None].unbind(-1)
        return pool_grids(maps, boxes * torch.stack([width, height, width, height], -1), cells)


def _mirrored(side: int, stride: int) -> Int64[Tensor, " n"]:
    """Where the pixels of a side come from that is continued at both ends, also where it is shorter than these."""
    places = torch.arange(-MIRRORED * stride, side + -side % stride + MIRRORED * stride) % max(2 * side - 2, 1)
    return torch.minimum(places, 2 * side - 2 - places)
