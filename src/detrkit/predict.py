"""From images to detections: `load` a model, `predict` with it.

The answer for an image does not depend on its batch companions: only images of the same resized size share a batch, so
nothing is ever padded. (In the official code, padding makes the published AP depend on the batch size.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from detrkit import models
from detrkit.answers import Answer, Respondent, in_order
from detrkit.arithmetic import Precision, choose_device, choose_dtype
from detrkit.data.loading import LoadedImage, load_images, pictures_of
from detrkit.errors import DataError, ModelError, UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.models import Variant
from detrkit.one_shot.finder import NONE, Boxes
from detrkit.one_shot.model import OneShot
from detrkit.one_shot.saved import attach, calibration_of, is_one_shot
from detrkit.panoptic import PanopticMap
from detrkit.segmentation.model import Segmenter
from detrkit.segmentation.panoptic import THRESHOLD
from detrkit.sources import locate, open_model
from detrkit.structures import Category, Detections

Picture = str | Path | Image.Image | np.ndarray
"""What can be predicted on: a file, a PIL image, or an array (height, width, 3) of uint8 in RGB."""

UNKNOWN_THRESHOLD = 0.5
"""The score from which a detection counts if the detector was never evaluated."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False)
class Detector:
    """A model with what it needs to be used on images: its variant, its categories, its device.

    Attributes:
        model: the detector, which is put into evaluation mode, as are the two below.
        variant: the module of its variant.
        categories: the table that labels point into.
        preset: the preset that it was built from.
        device: where it computes.
        about: what was stored with it, such as its metrics.
        one_shot: what was trained to find by example around the model; None of a model that was not.
        segmenter: the model with its mask head; None of a model without one.
        dtype: in what it detects; finding by example is in float32.
    """

    model: nn.Module
    variant: Variant | ModuleType
    categories: tuple[Category, ...]
    preset: str = ""
    device: torch.device = _CPU
    about: dict[str, Any] | None = None
    one_shot: OneShot | None = None
    segmenter: Segmenter | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for one in (self.model, self.one_shot, self.segmenter):
            if one is not None:
                one.eval()

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies, which cannot hold a module: the variant goes by its name."""
        return {**self.__dict__, "variant": self._variant_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, variant=models.variant(state["variant"]))

    @property
    def _variant_name(self) -> str:
        return self.variant.__name__.rpartition(".")[2]

    def __repr__(self) -> str:
        names = ", ".join(category.name for category in self.categories[:5])
        more = f" and {len(self.categories) - 5} more" if len(self.categories) > 5 else ""
        masks = "" if self.segmenter is None else ", with masks"
        kind = self.preset or self._variant_name
        return f"<Detector {kind}{masks}, images of {self.image_size[0]} pixels on {self.device}: {names}{more}>"

    @property
    def image_size(self) -> tuple[int, int]:
        """The shorter side that images are resized to, and the limit of the longer, in pixels."""
        config: Any = self.model.config
        return config.image_size, config.longest

    @property
    def threshold(self) -> float:
        """The score from which a detection counts: where F1 was best on the validation images, or 0.5 if not known.

        DETR weighs no-object little, so its scores run high, and 0.5 often shows an object twice.
        """
        known = (self.about or {}).get("threshold")
        return float(known) if isinstance(known, int | float) and 0 <= known <= 1 else UNKNOWN_THRESHOLD

    @property
    def panoptic_threshold(self) -> float:
        """The score above which a query makes a segment of an image: as `threshold`, or the paper's 0.85."""
        known = (self.about or {}).get("threshold")
        return self.threshold if isinstance(known, int | float) else THRESHOLD

    @property
    def calibration(self) -> Calibration:
        """What makes probabilities of the scores of what is found by example; none if that was never measured."""
        return calibration_of(self.about) or NONE

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path is a sequence of text, and is one picture
        self,
        images: Picture,
        *,
        threshold: float | None = ...,
        ensemble: bool = ...,
        batch_size: int = ...,
        workers: int = ...,
    ) -> Detections: ...
    @overload
    def predict(
        self,
        images: Sequence[Picture],
        *,
        threshold: float | None = ...,
        ensemble: bool = ...,
        batch_size: int = ...,
        workers: int = ...,
    ) -> list[Detections]: ...
    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        ensemble: bool = False,
        batch_size: int = 8,
        workers: int = 0,
    ) -> Detections | list[Detections]:
        """Find the objects.

        Args:
            images: one picture or a list of them: file, PIL image, or RGB array (height, width, 3) of uint8. A JPEG
                file that is shown at a quarter of its size or less is decoded at a smaller scale, so its answer may
                differ a little from that for its pixels.
            threshold: least score that is reported, in [0, 1]; None: the detector's own (`Detector.threshold`).
            ensemble: let all decoder layers answer together, overlaps suppressed.
            batch_size: at most so many images go through the model at once.
            workers: processes that load images; 0: none but this one.

        Returns:
            One answer for one picture, a list for a list, best scores first.

        Raises:
            DataError: an image cannot be read; it names the file.
            ModelError: the model was trained to find by example, and has to be shown what to look for; or its scores
                are not finite.
            UsageError: an option that makes no sense.
        """
        pictures, single = pictures_of(images)
        found = list(
            self.stream(pictures, threshold=threshold, ensemble=ensemble, batch_size=batch_size, workers=workers)
        )
        return found[0] if single else found

    @overload
    def find(
        self,
        example: Picture | Sequence[Picture],
        box: Boxes,
        images: Picture,
        *,
        name: str = ...,
        **search: Any,
    ) -> Detections: ...
    @overload
    def find(
        self,
        example: Picture | Sequence[Picture],
        box: Boxes,
        images: Sequence[Picture],
        *,
        name: str = ...,
        **search: Any,
    ) -> list[Detections]: ...
    def find(
        self,
        example: Picture | Sequence[Picture],
        box: Boxes,
        images: Picture | Sequence[Picture],
        *,
        name: str = "object",
        **search: Any,
    ) -> Detections | list[Detections]:
        """Find all that is like an example, which takes no label: `detrkit.find.find` does the same for several things.

        Args:
            example: a picture that shows one, or a list of such.
            box: where it is there: left, top, right and bottom in pixels of the upright image; for a list of pictures a
                list of boxes.
            images: one picture to search, or a list of them.
            name: what it is called.
            **search: fields of `detrkit.find.Search`, such as `threshold=0.3` or `candidates="windows"`.

        Returns:
            One answer for one picture, a list for a list, best scores first.

        Raises:
            DataError: an image cannot be read; it names the file.
            UsageError: a box that is none, or lies outside its image, or an option that makes no sense.
        """
        from detrkit.find import examples_of, find, search_of

        pictures, single = pictures_of(images)
        found = list(find(self, [examples_of(name, example, box)], pictures, search_of(search)))
        return found[0] if single else found

    def stream(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        ensemble: bool = False,
        batch_size: int = 8,
        workers: int = 0,
        unreadable: Callable[[int, DataError], None] | None = None,
    ) -> Iterator[Detections]:
        """The same as `predict`, one after the other and in order, without holding all of them.

        `unreadable` is called with the index and the error of an image that cannot be read, which is then left out;
        without it, such an image is an error.
        """
        if self.one_shot is not None:
            raise ModelError(
                "The model finds what it is shown, and knows no classes of its own",
                remedy="Show it an example: Detector.find(example, box, images), or detrkit find.",
            )
        threshold = self.threshold if threshold is None else threshold
        _check(threshold, batch_size, workers)
        if ensemble and self.segmenter is not None:
            raise UsageError(
                "Masks belong to the answers of the last decoder layer, and the ensemble is of all layers",
                remedy="Leave the ensemble out.",
            )
        yield from self._answers(
            pictures_of(images)[0],
            lambda group: self._respondent.detect(group, threshold, ensemble),
            batch_size=batch_size,
            workers=workers,
            unreadable=unreadable,
        )

    @overload
    def segment(  # type: ignore[overload-overlap]  # a path is a sequence of text, and is one picture
        self, images: Picture, *, threshold: float | None = ..., batch_size: int = ..., workers: int = ...
    ) -> PanopticMap: ...
    @overload
    def segment(
        self, images: Sequence[Picture], *, threshold: float | None = ..., batch_size: int = ..., workers: int = ...
    ) -> list[PanopticMap]: ...
    def segment(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        batch_size: int = 8,
        workers: int = 0,
    ) -> PanopticMap | list[PanopticMap]:
        """Cut images into segments: things one by one, and stuff where the model knows any (panoptic segmentation).

        Args:
            images: one picture or a list of them, as for `predict`.
            threshold: score above which a query makes a segment; None: `Detector.panoptic_threshold`.
            batch_size: at most so many images go through the model at once.
            workers: processes that load images; 0: none but this one.

        Returns:
            One map for one picture, a list for a list.

        Raises:
            DataError: an image cannot be read; it names the file.
            ModelError: the model has no mask head, or its scores are not finite.
            UsageError: an option that makes no sense.
        """
        pictures, single = pictures_of(images)
        found = list(self.segment_stream(pictures, threshold=threshold, batch_size=batch_size, workers=workers))
        return found[0] if single else found

    def segment_stream(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        batch_size: int = 8,
        workers: int = 0,
        unreadable: Callable[[int, DataError], None] | None = None,
    ) -> Iterator[PanopticMap]:
        """The same as `segment`, one after the other; `unreadable` as for `stream`."""
        if self.segmenter is None:
            raise ModelError(
                "The model has no mask head, and cannot cut an image into segments",
                remedy="Train one on it: detrkit train DATA --masks --init MODEL --out RUN.",
            )
        chosen = self.panoptic_threshold if threshold is None else threshold
        _check(chosen, batch_size, workers)
        yield from self._answers(
            pictures_of(images)[0],
            lambda group: self._respondent.segment(group, chosen),
            batch_size=batch_size,
            workers=workers,
            unreadable=unreadable,
        )

    def _answers(
        self,
        pictures: Sequence[Picture],
        respond: Callable[[Sequence[LoadedImage]], Iterable[Answer]],
        *,
        batch_size: int,
        workers: int,
        unreadable: Callable[[int, DataError], None] | None,
    ) -> Iterator[Answer]:
        """What is said of each image, in order; those of one size go through the model together."""
        shortest, longest = self.image_size
        loaded = load_images(pictures, shortest=shortest, longest=longest, workers=workers, unreadable=unreadable)
        yield from in_order(loaded, respond, batch_size)

    @property
    def _respondent(self) -> Respondent:
        return Respondent(self.model, self.segmenter, self.variant, self.categories, self.device, self.dtype)


def load(name: str | Path, *, device: str = "auto", precision: Precision = "fp32") -> Detector:
    """A detector from a run folder, a model folder, weights of others, or the Hugging Face hub.

    Args:
        name: a run folder (of which the best model is taken), a checkpoint or a model folder; a checkpoint file of the
            official repositories; a folder that `transformers` wrote; or a name on the hub, `organisation/name` or
            `organisation/name@revision`, which is fetched into its cache and found there without a network.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: arithmetic of the model; its heads compute in fp32 all the same. `auto`: bf16 where the machine has
            instructions for it, else fp32.

    Raises:
        MissingExtraError: a name on the hub, and the extra `hub` is not installed.
        ModelError: nothing there, neither cached nor reachable, a damaged file, or weights that fit no detector.
        UsageError: a device that this machine does not have, or an unknown precision.
    """
    chosen = choose_device(device)
    dtype = choose_dtype(precision, chosen)
    saved = open_model(name)
    one_shot = attach(saved.model, saved.about, locate(name).path) if is_one_shot(saved.about) else None
    if one_shot is not None and precision != "auto" and dtype != torch.float32:
        raise UsageError(
            "The model finds what it is shown, which is done in fp32 alone", where="precision", got=precision
        )
    whole = (one_shot or saved.segmenter or saved.model).to(chosen).eval()
    if chosen.type != "mps":
        whole.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    variant = models.variant(saved.variant)
    return Detector(
        saved.model, variant, saved.categories, saved.preset, chosen, saved.about, one_shot, saved.segmenter, dtype
    )


def _check(threshold: Any, batch_size: Any, workers: Any) -> None:
    if not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise UsageError("Bad value for threshold", got=repr(threshold), expected="between 0 and 1")
    for name, number, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if not isinstance(number, Integral) or number < least:
            raise UsageError(f"Bad value for {name}", got=repr(number), expected=f"an integer of at least {least}")
