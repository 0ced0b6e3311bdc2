"""MobileNetV2 1.0 (Sandler et al., CVPR 2018) for inference and fine-tuning, batch norms folded into the convolutions.

Fine-tuning a detector freezes the norms anyway, and a folded network is the faster half of its work on a CPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detrkit.errors import ModelError
from detrkit.nn.backbone import LEVELS, Backbone, check_levels
from detrkit.nn.recomputing import Recomputable
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD


class Convention(NamedTuple):
    """What published weights were trained with.

    `centred`: they expect RGB in [-1, 1], not the library's normalisation. `same_padding`: convolutions of stride 2
    are padded as TensorFlow's SAME, not by one on every side. Weights of one convention lose several points of
    accuracy under the other.
    """

    centred: bool
    same_padding: bool


CONVENTIONS = {
    "mobilenet_v2": Convention(centred=True, same_padding=True),
    "mobilenet_v2_torchvision": Convention(centred=False, same_padding=False),
}
"""The same network by name, for the weights of TensorFlow and for those of torchvision."""

# Table 2 of the paper: expansion, channels, blocks, stride.
_TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# The first of `features` after each level (strides 4, 8, 16, 32), and after the stem.
_ENDS = (2, 4, 7, 14, 18)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's SAME rule along one axis: the output has ceil(size / stride) cells.

    Args:
        size: length of the axis.
        kernel: length of the kernel.
        stride: step of the kernel.
        dilation: distance of the kernel's taps.

    Returns:
        The cells to add before and after; the odd one goes after.
    """
    reach = (kernel - 1) * dilation + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


class PaddedConv2d(nn.Conv2d):
    """A convolution with a bias, padded so that the output has ceil(size / stride) cells, and perhaps a ReLU6.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel, odd.
        stride: step of the kernel.
        dilation: distance of the kernel's taps.
        groups: as in `nn.Conv2d`.
        relu6: whether the output is clamped to [0, 6].
        same: pad by TensorFlow's rule, which is lopsided at even sizes; otherwise equally on all sides.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        relu6: bool = True,
        same: bool = True,
    ):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 * dilation, dilation, groups)
        self.relu6, self.same = relu6, same

    def forward(self, input: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ _ _"]:
        """The convolved map."""
        out = self._padded(input) if self.same and self.stride[0] > 1 else self._conv(input, self.padding)  # type: ignore[arg-type]
        return F.relu6(out, inplace=True) if self.relu6 else out

    def _conv(self, x: Float[Tensor, "b c h w"], padding: tuple[int, ...]) -> Float[Tensor, "b _ _ _"]:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _padded(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _ _ _"]:
        """With lopsided borders: a step more on both sides, and what that adds is left out.

        The output is small beside the map, which would have to be copied to get its borders.
        """
        step = self.stride[0]
        borders = [same_padding(size, self.kernel_size[0], step, self.dilation[0]) for size in x.shape[2:]]
        lopsided = [before != after for before, after in borders]
        out = self._conv(x, tuple(before + step * more for (before, _), more in zip(borders, lopsided, strict=True)))
        if not any(lopsided):
            return out
        rows, columns = (slice(more, more + -(-size // step)) for more, size in zip(lopsided, x.shape[2:], strict=True))
        return out[:, :, rows, columns].contiguous(memory_format=torch.channels_last)


class InvertedResidual(Recomputable):
    """Expand, convolve each channel, project; added to the input where the shapes agree (figure 4d of the paper)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int, *, same: bool):
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(nn.Sequential(PaddedConv2d(inputs, hidden, 1, same=same)))
        depthwise = PaddedConv2d(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, same=same)
        layers.append(nn.Sequential(depthwise))
        layers.append(PaddedConv2d(hidden, outputs, 1, relu6=False, same=same))
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ _ _"]:
        """The block's output; no activation follows the projection."""
        out: Tensor = self.conv(x)
        return out.add_(x) if self.has_shortcut else out


class MobileNetV2(Backbone):
    """MobileNetV2 without its classifier. `state_dict` has torchvision's names, less the batch norms.

    Args:
        convention: what the weights were trained with, one of `CONVENTIONS`.
        levels: which feature maps to return, by stride: 24, 32, 96 and 320 channels at 4, 8, 16, 32. Layers beyond
            the last one are not built.
        dilated: the last stage keeps the stride 16, and its blocks after the first use dilation 2, so that all
            pre-trained layers serve at the finer grid.
        head: end the level 32 with the 1×1 convolution to 1280 channels that comes before the classifier.

    Raises:
        UsageError: levels that do not exist.
    """

    input_scale: Tensor
    input_shift: Tensor
    at_once = 5 * 2**15

    def __init__(
        self, convention: Convention, *, levels: tuple[int, ...] = (32,), dilated: bool = False, head: bool = False
    ):
        super().__init__()
        levels = check_levels(levels)
        self.convention = convention
        # From the library's normalisation to RGB in [-1, 1], a constant and so no part of the weights.
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (NORMALIZATION_MEAN, NORMALIZATION_STD))
        self.register_buffer("input_scale", std * 2, persistent=False)
        self.register_buffer("input_shift", mean * 2 - 1, persistent=False)
        depth = LEVELS.index(levels[-1]) + 1
        layers = _layers(convention.same_padding, dilated)[: _ENDS[depth]]
        if head and depth == 4:
            layers.append(nn.Sequential(PaddedConv2d(320, 1280, 1, same=convention.same_padding)))
        self.features = nn.Sequential(*layers)
        ends = [*_ENDS[:depth], len(layers)]
        self._ends = tuple(ends)
        # Channels and stride at the end of every stage.
        self._maps = ((24, 4), (32, 8), (96, 16), (1280 if head else 320, 16 if dilated else 32))[:depth]
        self._return([LEVELS.index(level) for level in levels])

    def _return(self, stages: Sequence[int]) -> None:
        self._returned = tuple(stages)
        self.channels, self.strides = (
            tuple(part) for part in zip(*(self._maps[stage] for stage in stages), strict=True)
        )

    def return_finer_levels(self) -> None:
        """Return the maps at the end of all stages that are built."""
        self._return(range(len(self._maps)))

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The feature maps of the levels that were asked for, finest first."""
        x = torch.addcmul(self.input_shift, images, self.input_scale) if self.convention.centred else images
        features = []
        for index, modules in enumerate(self.stages()):
            for module in modules:
                x = module(x)
            if index - 1 in self._returned:
                features.append(x)
        return tuple(features)

    def stages(self) -> tuple[Sequence[nn.Module], ...]:
        """The stem (to stride 2), and the layers of each stride that are built."""
        starts = (0, *self._ends[:-1])
        return tuple(
            [self.features[index] for index in range(start, end)] for start, end in zip(starts, self._ends, strict=True)
        )

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """He et al.'s initialisation by the true fan in, biases at zero, residual branches made small.

        There is no norm to mend the scale afterwards, so each layer has to keep it.
        """
        shortcuts = [
            module for module in self.modules() if isinstance(module, InvertedResidual) and module.has_shortcut
        ]
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, PaddedConv2d):
                    fan_in = module.weight[0].numel()
                    gain = 2.0 if module.relu6 else 1.0
                    nn.init.normal_(module.weight, std=math.sqrt(gain / fan_in), generator=generator)
                    assert module.bias is not None
                    module.bias.zero_()
            for block in shortcuts:
                projection = block.conv[-1]
                assert isinstance(projection, PaddedConv2d)
                projection.weight.mul_(1 / math.sqrt(len(shortcuts)))

    def adapt(self, weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """Fold the batch norms of torchvision's files into the convolutions; files without norms pass as they are.

        Raises:
            ModelError: weights with torchvision's batch norms, where this network follows TensorFlow's conventions.
        """
        if not any(name.endswith(".running_var") for name in weights):
            return weights
        if self.convention != CONVENTIONS["mobilenet_v2_torchvision"]:
            raise ModelError(
                "These weights were trained by torchvision, with another input range and padding",
                where=where,
                got="batch norms that are not folded, torchvision's form",
                expected="folded weights of TensorFlow's MobileNetV2",
                remedy="Take the backbone 'mobilenet_v2_torchvision' for this file.",
            )
        return fold_batch_norms(weights)

    def is_unused(self, name: str) -> bool:
        """Whether the tensor belongs to a layer that was not built."""
        match = re.match(r"features\.(\d+)\.", name)
        return match is not None and len(self.features) <= int(match.group(1)) <= 18


def _layers(same: bool, dilated: bool) -> list[nn.Module]:
    """The stem and the seventeen blocks."""
    layers: list[nn.Module] = [nn.Sequential(PaddedConv2d(3, 32, 3, stride=2, same=same))]
    channels, reached = 32, 2
    for expansion, outputs, blocks, first_stride in _TABLE:
        for number in range(blocks):
            stride = first_stride if number == 0 else 1
            # Past the stage's first block the taps are two cells of the finer grid apart: one of the grid they learnt.
            dilation = 2 if dilated and reached == 32 else 1
            reached *= stride
            is_held = dilated and reached == 32
            layers.append(InvertedResidual(channels, outputs, expansion, 1 if is_held else stride, dilation, same=same))
            channels = outputs
    return layers


def fold_batch_norm(
    weight: Float[Tensor, "o i kh kw"],
    scale: Float[Tensor, " o"],
    shift: Float[Tensor, " o"],
    mean: Float[Tensor, " o"],
    variance: Float[Tensor, " o"],
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "o i kh kw"], Float[Tensor, " o"]]:
    """The weight and bias of the one convolution that equals a convolution without bias and its batch norm.

    Args:
        weight: of the convolution.
        scale: the norm's weight.
        shift: the norm's bias.
        mean: the norm's running mean.
        variance: the norm's running variance.
        eps: the norm's epsilon.
    """
    factor = scale * (variance + eps).rsqrt()
    return weight * factor.view(-1, 1, 1, 1), shift - mean * factor


def fold_batch_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold every batch norm of a torchvision MobileNetV2 into the convolution before it.

    A norm stands one place after its convolution: `features.0.0` and `features.0.1`. Names of other tensors stay.
    """
    folded = dict(weights)
    for name, weight in weights.items():
        match = re.fullmatch(r"(features\..*?)(\d+)\.weight", name)
        if match is None or weight.ndim != 4:
            continue
        convolution, norm = match.group(1) + match.group(2), f"{match.group(1)}{int(match.group(2)) + 1}"
        parts = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if not all(part in weights for part in parts):
            continue
        scale, shift, mean, variance = (weights[part].double() for part in parts)
        merged, bias = fold_batch_norm(weight.double(), scale, shift, mean, variance)
        folded[name], folded[f"{convolution}.bias"] = merged.to(weight.dtype), bias.float()
        for part in (*parts, f"{norm}.num_batches_tracked"):
            folded.pop(part, None)
    return folded
