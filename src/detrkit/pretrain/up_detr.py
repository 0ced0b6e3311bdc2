"""UP-DETR: unsupervised pre-training of a detector by random query patch detection (Dai et al., CVPR 2021).

Patches are cut from an image at random and shown to the detector, each to a group of queries, and the detector is to
say where in the image they were. No label is needed. The task holds a detector of any variant and adds two small heads;
when it is done, the detector is kept and the heads are not. The file reads as figure 2 of the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit import convert, models
from detrkit.errors import ModelError, UsageError
from detrkit.losses.criterion import Answers, Losses, SetCriterion, SoftmaxClassification
from detrkit.losses.matching import Matches, NonFiniteError, PaddedTargets
from detrkit.nn.heads import MLP
from detrkit.prompts import Place, ask, group_of_queries, start_as_tokens
from detrkit.structures import Predictions

OFFICIAL = (("patch2query.", "patch_projection."), ("feature_align.", "reconstruction_head."))
"""What the official code calls the two heads, and what they are called here."""


class PatchPredictions(NamedTuple):
    """What a detector says about patches, for all decoder layers at once; the last layer is the answer.

    `boxes` are cxcywh in [0, 1] of the unpadded image. Neighbouring queries are a group, which was shown one patch
    (`UpDetr.group`). `reconstructed` says what each query believes that the patch's feature is; None without that head.
    `patch_features` are what the backbone says of each patch, averaged over its cells.
    """

    logits: Float[Tensor, "layer b q c"]
    boxes: Float[Tensor, "layer b q 4"]
    reconstructed: Float[Tensor, "layer b q f"] | None
    patch_features: Float[Tensor, "b p f"]


class UpDetr(nn.Module):
    """Random query patch detection with a detector of any variant.

    Args:
        detector: a model with `queries` and `decode`. A patch is of its last class; the others are never right.
        patches: M, how many patches of an image are asked for at once: so many groups its queries form. It need not
            divide their number.
        mask_out: probability, in training, with which a query is not shown its patch (section 3.2).
        mask_out_of: what is masked out: single `queries`, as in the official code, or `patches` with all their
            queries, as in the paper.
        shuffle: in training, exchange the queries among the groups at every step (section 3.2).
        reconstruct: also tell the patch's feature (section 3.3).
        place: what of a query the patch is added to; `position` in the paper.
        start: how the projection of patches starts: `random` as in the official code, or as the projection of `tokens`,
            so that a patch and the tokens of its place are alike from the first step.
        frozen_backbone: the backbone does not train and keeps nothing for its gradient, which the paper found to
            matter (table 5).

    Raises:
        UsageError: more patches than queries, or a probability that is none.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        patches: int = 10,
        mask_out: float = 0.1,
        mask_out_of: Literal["queries", "patches"] = "queries",
        shuffle: bool = False,
        reconstruct: bool = True,
        place: Place = "position",
        start: Literal["random", "tokens"] = "random",
        frozen_backbone: bool = True,
    ):
        super().__init__()
        config: Any = detector.config
        if not 0 <= mask_out < 1:
            raise UsageError("Bad value for mask_out", got=mask_out, expected="at least 0 and below 1")
        self.detector = detector
        self.patches, self.mask_out, self.mask_out_of, self.shuffle, self.place = (
            patches,
            mask_out,
            mask_out_of,
            shuffle,
            place,
        )
        self.register_buffer("group", group_of_queries(config.num_queries, patches), persistent=False)
        backbone: Any = detector.backbone
        channels = backbone.channels[-1]
        self.patch_projection = nn.Linear(channels, config.dim)
        self.reconstruction_head = MLP(config.dim, config.dim, channels) if reconstruct else None
        if start == "tokens" and not start_as_tokens(self.patch_projection, detector):
            raise UsageError("This variant does not make tokens by a projection", remedy="start = 'random'")
        if frozen_backbone:
            backbone.requires_grad_(False).eval()

    group: Int64[Tensor, " q"]

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], **options: Any) -> UpDetr:
        """The task with the weights of an official pre-training checkpoint.

        Args:
            state_dict: tensors by official key, or a training checkpoint that holds them under `model`.
            **options: as of the class. How many patches were asked for, tensors do not show.

        Raises:
            ModelError: tensors that are unknown, missing or of another shape, or a checkpoint without the pretext
                task's, such as one that was fine-tuned already.
        """
        found = convert.read(state_dict)
        heads = {
            key.replace(theirs, ours): value
            for key, value in found.left_out.items()
            for theirs, ours in OFFICIAL
            if key.startswith(theirs)
        }
        if not heads:
            raise ModelError(
                "This is a detector, but no pre-training of UP-DETR",
                got=found.origin,
                expected="tensors patch2query.* and feature_align.*",
                remedy="Take it as a detector: detrkit.convert.from_official, or detrkit train --init.",
            )
        reconstruct = any(key.startswith("reconstruction_head.") for key in heads)
        task = cls(found.model, reconstruct=reconstruct, **options)
        own = {f"detector.{key}": value for key, value in task.detector.state_dict().items()}
        convert.load_strictly(task, {**own, **heads})
        return task

    @classmethod
    def load(cls, folder: str | Path) -> UpDetr:
        """The task of a run of pre-training, with its options; arguments and errors as of `pretrain.saved.load`."""
        from detrkit.pretrain import saved  # which knows this class

        return saved.load(folder)

    def describe(self, patches: Float[Tensor, "b p 3 h w"]) -> Float[Tensor, "b p f"]:
        """What the backbone says of each patch, averaged over its cells; all patches of a batch go through at once."""
        backbone: Any = self.detector.backbone
        return backbone(patches.flatten(0, 1))[-1].mean((-2, -1)).unflatten(0, patches.shape[:2])

    def forward(
        self,
        images: Float[Tensor, "b _ h w"],
        padding: Bool[Tensor, "b h w"],
        patches: Float[Tensor, "b p 3 s s"] | Float[Tensor, "b p f"],
        *,
        known: bool = False,
        also_unasked: bool = False,
    ) -> PatchPredictions | tuple[PatchPredictions, Predictions]:
        """Look for patches.

        Args:
            images: normalised, zeros where padded.
            padding: True where padded.
            patches: normalised; as many as the task was made for, or fewer.
            known: images and patches have gone through the backbone already: `images` are its maps, `patches` features
                such as `describe` gives (`FeatureBatch`).
            also_unasked: also give what the detector finds by its own queries, without any patch.

        Raises:
            UsageError: more patches than the task was made for.
        """
        if patches.shape[1] > self.patches:
            raise UsageError("More patches than groups of queries", got=patches.shape[1], expected=f"≤ {self.patches}")
        detector: Any = self.detector
        memory = detector.encode_features((images,), padding) if known else detector.encode(images, padding)
        found = self.find(memory, patches if known else self.describe(patches))
        if not also_unasked:
            return found
        return found, detector.predict(detector.decode(memory, detector.queries(len(images))))

    def find(self, memory: Any, features: Float[Tensor, "b p f"]) -> PatchPredictions:
        """Look for patches of which the features are known, in images that are encoded already."""
        detector: Any = self.detector
        queries = detector.queries(len(features))
        if self.training and self.shuffle:
            order = torch.randperm(len(self.group), device=features.device)
            every = torch.cat([order + start * len(order) for start in range(queries.groups)])
            queries = queries._replace(content=queries.content[:, every], position=queries.position[:, every])
        asked = ask(queries, self.patch_projection(features), self.patches, self._keep(len(features)), self.place)
        logits, boxes, hidden = detector.predict(detector.decode(memory, asked))
        reconstructed = None if self.reconstruction_head is None else self.reconstruction_head(hidden)
        return PatchPredictions(logits, boxes, reconstructed, features)

    def _keep(self, images: int) -> Float[Tensor, "b q"] | None:
        """Which queries are shown their patch. Drawn from torch's own generator, as dropout is."""
        if not self.training or self.mask_out == 0:
            return None
        count = self.patches if self.mask_out_of == "patches" else len(self.group)
        kept = (torch.rand(images, count, device=self.group.device) > self.mask_out).float()
        return kept[:, self.group] if self.mask_out_of == "patches" else kept


@dataclass(frozen=True)
class PatchCriterion:
    """The loss of random query patch detection (section 3.3): a detector's own, and the reconstruction.

    Attributes:
        detection: the detector's criterion.
        match: among whom the query is chosen that answers for a patch: `all` queries, as in the official code, where a
            query may have to answer for a patch that it was not shown; or those of the patch's own `group`.
        reconstruction_weight: weight of the reconstruction.
    """

    detection: SetCriterion
    match: Literal["all", "group"] = "all"
    reconstruction_weight: float = 1.0

    def __call__(
        self,
        found: PatchPredictions,
        boxes: Float[Tensor, "b p 4"],
        group: Int64[Tensor, " n"],
        num_boxes: float | None = None,
        names: Sequence[str] = (),
    ) -> Losses:
        """All terms of a batch.

        Args:
            found: of all layers.
            boxes: where each patch was cut, cxcywh in [0, 1] of the unpadded image.
            group: which patch each query was shown.
            num_boxes: what sums are divided by; by default the number of patches in the batch.
            names: the images' files, for messages.

        Raises:
            NonFiniteError: predictions are NaN or infinite; names the images.
        """
        images, count = boxes.shape[:2]
        num_boxes = float(images * count) if num_boxes is None else num_boxes
        labels = torch.full((images, count), found.logits.shape[-1] - self._beyond(), device=boxes.device)
        called = tuple(names) or tuple(f"image {index} of the batch" for index in range(images))
        targets = PaddedTargets(labels, boxes, (count,) * images, called)
        matches = self._matches(found, targets, group[: found.logits.shape[2]])
        losses = self.detection.terms(found, targets, matches, num_boxes)
        if found.reconstructed is None:
            return losses
        return losses.joined("feature", _reconstruction(found, matches, num_boxes), self.reconstruction_weight)

    def _beyond(self) -> int:
        """How far the last class is from the end of the logits."""
        return 2 if isinstance(self.detection.classification, SoftmaxClassification) else 1

    def _matches(self, found: Answers, targets: PaddedTargets, group: Int64[Tensor, " n"]) -> Matches:
        if self.match == "all":
            return self.detection.match(found, targets)
        return match_in_groups(self.detection, found, targets, group)


def criterion(
    detector: nn.Module,
    patches: int,
    *,
    match: Literal["all", "group"] = "all",
    tie_no_object: bool = True,
    reconstruction_weight: float = 1.0,
) -> PatchCriterion:
    """The loss for a detector.

    Args:
        detector: a model of any variant, whose own criterion is taken.
        patches: M, of which there are as many as groups of queries.
        match: `all` or `group`, see `PatchCriterion`.
        tie_no_object: weigh no-object by M / N, the share of queries that find something (section 3.1); else as the
            detector's config says. Variants without a no-object class do not care.
        reconstruction_weight: weight of the reconstruction.
    """
    config: Any = detector.config
    own = detection_criterion(detector)
    if tie_no_object and isinstance(own.classification, SoftmaxClassification):
        tied = dataclasses.replace(own.classification, no_object_weight=patches / config.num_queries)
        own = dataclasses.replace(own, classification=tied)
    return PatchCriterion(own, match, reconstruction_weight)


def detection_criterion(detector: nn.Module) -> SetCriterion:
    """The loss that a detector is trained with for its own sake."""
    return models.variant(type(detector).__module__.rpartition(".")[2]).criterion(detector.config)


@torch.no_grad()
def match_in_groups(
    detection: SetCriterion, found: Answers, targets: PaddedTargets, group: Int64[Tensor, " n"]
) -> Matches:
    """For every patch the cheapest query of its own group: no assignment is needed, and none can cross groups.

    Args:
        detection: says what a match costs.
        found: predictions of all layers.
        targets: as many for every image, patch j for group j.
        group: the group of each query.

    Raises:
        NonFiniteError: predictions are NaN or infinite; names the images.
    """
    cost = detection.costs(found, targets)
    finite = torch.isfinite(cost).all(-1).all(-1).all(0)
    if not bool(finite.all()):
        raise NonFiniteError(
            [name for name, is_finite in zip(targets.names, finite.tolist(), strict=True) if not is_finite]
        )
    layers, images, _, count = cost.shape
    other = group[:, None] != torch.arange(count, device=cost.device)
    query = cost.masked_fill(other, torch.inf).argmin(2).flatten(1)
    image = torch.arange(images, device=cost.device).repeat_interleave(count)
    target = torch.arange(count, device=cost.device).repeat(images).expand(layers, -1)
    return Matches(image, query, target)


def _reconstruction(found: PatchPredictions, matches: Matches, num_boxes: float) -> Float[Tensor, " layer"]:
    """Squared distance of normalised features, 2 (1 − cosine), summed over matches and divided by their number.

    What is to be told is detached: else features that are all alike would be the easiest to tell.
    """
    assert found.reconstructed is not None
    layer = torch.arange(len(found.reconstructed), device=matches.image.device)[:, None]
    told = F.normalize(found.reconstructed[layer, matches.image[None], matches.query].float(), dim=-1)
    true = F.normalize(found.patch_features.detach()[matches.image[None], matches.target].float(), dim=-1)
    return (told - true).square().sum((1, 2)) / num_boxes
