"""What a backbone is, and the backbones by name.

A backbone turns normalised images into feature maps, one a level. It is built here without weights of its own; what
it starts from (a file, or a random initialisation that somebody asked for) is the business of `detrkit.nn.weights`.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrkit.errors import MissingExtraError, ModelError, UsageError

LEVELS = (4, 8, 16, 32)
"""The levels that a convolutional backbone can return, named by their stride in pixels."""

STAGES = 5
"""A backbone is a stem and four stages; freezing counts them from the image upwards."""

TRANSFORMERS_PREFIX = "transformers:"

MOST_AT_ONCE = 2**21
"""Pixels that a processor has before it at most, however many threads it has: a bound for memory, which binds from
three or four threads on."""


class Backbone(nn.Module, ABC):
    """Images to feature maps.

    Attributes:
        channels: channels of each returned level, finest level first.
        strides: true stride of each returned level in pixels, in the same order; with `dilated` the level named 32
            has the stride 16.
        at_once: pixels of the images that go through it together on a processor, for each of its threads, where no
            gradient is wanted. Measured: the wide maps of more images come and go without ever being in a cache.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    at_once: int = 5 * 2**17

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The feature maps of the levels that were asked for, finest first.

        Args:
            images: normalised with `NORMALIZATION_MEAN` and `NORMALIZATION_STD`.

        Returns:
            A tensor (b, channels, ceil(h / stride), ceil(w / stride)) for each level; some networks of transformers
            round down instead, so take the size from the tensor.
        """
        if images.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.maps(images)
        limit = min(self.at_once * torch.get_num_threads(), MOST_AT_ONCE)
        parts = torch.split(images, max(1, limit // max(1, images.shape[2] * images.shape[3])))
        found = [self.maps(part) for part in parts]
        return found[0] if len(found) == 1 else tuple(torch.cat(level) for level in zip(*found, strict=True))

    @abstractmethod
    def maps(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """What `forward` returns, of images that go through the network together."""

    @abstractmethod
    def stages(self) -> tuple[Sequence[nn.Module], ...]:
        """The modules of the stem and of each stage that is built, from the image upwards."""

    @abstractmethod
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Give every weight a random start from which the network trains.

        Args:
            generator: the source of the numbers; torch's default one where None.
        """

    def freeze(self, stages: int) -> None:
        """Stop training the first `stages` of stem and stages, and train all the others.

        Args:
            stages: 0 trains everything, 1 freezes the stem, 2 the stem and the first stage (as DETR does), 5 all.

        Raises:
            UsageError: `stages` is not in 0 … 5.
        """
        if not 0 <= stages <= STAGES:
            raise UsageError(
                "A backbone has a stem and four stages to freeze",
                where="frozen_stages",
                got=stages,
                expected=f"0 … {STAGES}",
                remedy="0 trains everything; 2 is what DETR does.",
            )
        for number, modules in enumerate(self.stages()):
            for module in modules:
                module.requires_grad_(number >= stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Training mode, but for the stages of which nothing trains: they answer as they are evaluated.

        Some networks drop whole paths in training, and a frozen one would say something else of an image each time.
        """
        super().train(mode)
        stages = (module for modules in self.stages() for module in modules)
        for part in (*self.children(), *stages):  # not itself, which tells what was asked for when a stage thaws
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    @abstractmethod
    def return_finer_levels(self) -> None:
        """Return all finer levels that are built beside those that were asked for, for heads that draw outlines."""

    def adapt(self, weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """A weight file's tensors in the form that this backbone holds them (by default: as they are).

        Args:
            weights: by the names that stand in the file, any common prefix already removed.
            where: the file, for messages.

        Raises:
            ModelError: the tensors are of a kind that this backbone cannot use.
        """
        return weights

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of this name belongs to a part of the architecture that was left out here."""
        return False


def names() -> tuple[str, ...]:
    """The names that `build_backbone` knows, besides `transformers:…`."""
    return (
        "mobilenet_v2",
        "mobilenet_v2_torchvision",
        "resnet-nano",
        "resnet101",
        "resnet18",
        "resnet34",
        "resnet50",
    )


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels in rising order.

    Raises:
        UsageError: no level, a repeated one, or one that is not in `LEVELS`.
    """
    if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(LEVELS):
        raise UsageError(
            "These are not levels of a backbone",
            where="levels",
            got=tuple(levels),
            expected=f"some of {LEVELS}, each at most once",
            remedy="A level is named by its stride in pixels; DETR takes (32,).",
        )
    return tuple(sorted(levels))


def build_backbone(
    name: str, *, levels: tuple[int, ...] = (32,), dilated: bool = False, frozen_stages: int = 2
) -> Backbone:
    """A backbone by name, its weights not yet set (see `detrkit.nn.weights.load_backbone_weights`).

    Args:
        name: one of `names()`, or `transformers:` followed by a model of the Hugging Face hub or a folder.
        levels: which feature maps to return, named by stride: some of 4, 8, 16, 32. Stages beyond the last one are
            not built.
        dilated: keep the last stage at stride 16 and dilate its convolutions by 2 instead (DETR's DC5).
        frozen_stages: how many of stem and stages keep their weights, see `Backbone.freeze`.

    Raises:
        UsageError: an unknown name, or levels or frozen stages that no backbone has.
        MissingExtraError: `transformers:…` without the package.
    """
    # The families stand on `Backbone` above, so they can only be imported once this module is complete.
    from detrkit.nn import mobilenet, resnet

    backbone: Backbone
    if name.startswith(TRANSFORMERS_PREFIX):
        backbone = AutoBackbone(name.removeprefix(TRANSFORMERS_PREFIX), levels=levels, dilated=dilated)
    elif name in resnet.ARCHITECTURES:
        backbone = resnet.ResNet(resnet.ARCHITECTURES[name], levels=levels, dilated=dilated)
    elif name in mobilenet.CONVENTIONS:
        backbone = mobilenet.MobileNetV2(mobilenet.CONVENTIONS[name], levels=levels, dilated=dilated)
    else:
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        raise UsageError(
            "There is no backbone of this name",
            where="backbone",
            got=repr(name),
            expected=f"one of {', '.join(names())}, or {TRANSFORMERS_PREFIX}<hub name or folder>",
            remedy=f"Did you mean {near[0]!r}?" if near else "",
        )
    backbone.freeze(frozen_stages)
    return backbone


class AutoBackbone(Backbone):
    """A backbone of the package `transformers`, by hub name or folder.

    Its batch norms are frozen, as in every other backbone here: detectors train with few images a step. `freeze` goes
    by the names that convolutional and hierarchical backbones have in common (an embedder or stem, then `stages.0` …).

    Args:
        source: a model of the Hugging Face hub, or a folder that holds one. Only its configuration is read here.
        levels: which feature maps to return, by stride in pixels. Any stride that the network has.
        dilated: not available here.

    Raises:
        MissingExtraError: the package `transformers` is not installed.
        UsageError: the source has no configuration of a backbone, or the network does not have these levels.
    """

    def __init__(self, source: str, *, levels: tuple[int, ...] = (32,), dilated: bool = False):
        super().__init__()
        if dilated:
            raise UsageError(
                "Backbones of transformers cannot be dilated", where="dilated", remedy="Ask for the level 16 instead."
            )
        transformers = import_transformers(source)
        self.source = source
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            config.out_features = list(config.stage_names)[1:]
            body = transformers.AutoBackbone.from_config(config)
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(
                "This is not a backbone of transformers",
                where=TRANSFORMERS_PREFIX + source,
                got=str(error).split("\n", 1)[0],
                remedy="Give a hub name or a folder whose config.json transformers.AutoBackbone takes.",
            ) from error
        freeze_batch_norms(body)
        self.body = body
        self._choose(levels)

    def _choose(self, levels: tuple[int, ...]) -> None:
        """Find the maps of the wanted strides by one look at a blank image: configurations do not say them."""
        side = 224  # a multiple of 32 and of the 14 of many vision transformers
        training = self.body.training
        with torch.no_grad():
            maps = self.body.eval()(torch.zeros(1, 3, side, side)).feature_maps
        self.body.train(training)
        self.train(self.training)
        strides = [round(side / map_.shape[-1]) for map_ in maps]
        self._found = tuple(sorted(set(strides)))
        wanted = tuple(sorted(levels))
        if not wanted or not set(wanted) <= set(strides):
            raise UsageError(
                "The backbone does not have these levels",
                where=TRANSFORMERS_PREFIX + self.source,
                got=wanted,
                expected=f"some of {tuple(sorted(set(strides)))}",
            )
        # Of several maps of one stride (all layers of a vision transformer), the deepest says most.
        self._chosen = tuple(len(strides) - 1 - strides[::-1].index(stride) for stride in wanted)
        self.strides = wanted
        self.channels = tuple(int(maps[index].shape[1]) for index in self._chosen)

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The feature maps of the levels that were asked for, finest first."""
        maps = self.body(images).feature_maps
        return tuple(maps[index] for index in self._chosen)

    def return_finer_levels(self) -> None:
        """Return all maps that are finer than the coarsest of those that were asked for."""
        self._choose(tuple(stride for stride in self._found if stride <= self.strides[-1]))

    def stages(self) -> tuple[Sequence[nn.Module], ...]:
        """The embedder or stem, then the stages, as far as the names tell."""
        found: list[list[nn.Module]] = [[] for _ in range(STAGES)]
        for name, module in self.body.named_modules():
            last = name.rsplit(".", 1)[-1]
            if last in ("embedder", "embeddings", "stem"):
                found[0].append(module)
            for number in range(1, STAGES):
                if name.endswith((f"stages.{number - 1}", f"encoder.layers.{number - 1}")):
                    found[number].append(module)
        return tuple(found)

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Keep what the network's own construction gave: its random start is part of its definition."""

    def pretrained(self) -> dict[str, Tensor]:
        """The published weights of `source`, by the names that this module holds them under.

        Raises:
            ModelError: they cannot be fetched or read, or do not hold every weight of the backbone.
        """
        where = TRANSFORMERS_PREFIX + self.source
        try:
            # The class itself, because AutoBackbone takes folders for models of timm.
            body, found = type(self.body).from_pretrained(
                self.source, config=self.body.config, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                "The backbone's weights cannot be had",
                where=where,
                got=str(error).split("\n", 1)[0],
                remedy="Give a folder with the weights, or say weights = 'random'.",
            ) from error
        tensors = body.state_dict()
        # A norm on the outputs is part of the wrapper, not of the published network, and starts as the identity.
        missing = sorted(key for key in found["missing_keys"] if tensors[key].ndim > 1)
        if missing:
            listed = ", ".join(missing[:6])
            raise ModelError("The published weights lack some of the backbone's", where=where, got=f"missing: {listed}")
        return {f"body.{name}": value for name, value in tensors.items()}


def import_transformers(source: str) -> Any:
    """The package `transformers`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "transformers", "transformers", f"The backbone {TRANSFORMERS_PREFIX + source!r}"
        ) from error
    return transformers


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm inside `module` by a frozen one that holds the same numbers."""
    from detrkit.nn.resnet import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(
                {key: value for key, value in child.state_dict().items() if key != "num_batches_tracked"}
            )
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)
