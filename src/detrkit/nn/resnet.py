"""ResNet with frozen batch norms (He et al., CVPR 2016), under torchvision's names of weights.

Also `resnet-nano`, a small one with group norms (Wu and He, ECCV 2018) that trains from nothing on small batches.
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

from detrkit.nn.backbone import LEVELS, Backbone, check_levels
from detrkit.nn.convolution import Conv2d, conv2d, settings_of
from detrkit.nn.recomputing import Recomputable


class Architecture(NamedTuple):
    """The numbers of a ResNet.

    `blocks` and `widths` are for the four stages; a bottleneck block gives out four times its width; `groups` is the
    number of groups of the group norms, 0 for frozen batch norms.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: int = 64
    groups: int = 0


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnet-nano": Architecture((1, 1, 1, 1), bottleneck=False, widths=(32, 64, 128, 192), stem=32, groups=8),
}
"""The family by name; the first four are tables 1 of the paper."""


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose statistics and affine parameters are constants: a scale and a shift a channel.

    Detectors see too few images a step for batch statistics to be worth anything, so DETR freezes them.

    Args:
        channels: number of channels.
        eps: added to the variance before the root.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """The scale and the shift of each channel, in float32 whatever the buffers are held in."""
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        return scale, self.bias.float() - self.running_mean.float() * scale

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`x` normalised by the constants, in the type of `x`."""
        scale, shift = (value.to(x.dtype).view(1, -1, 1, 1) for value in self.affine())
        return torch.addcmul(shift, x, scale)


def conv_norm(x: Float[Tensor, "b _ _ _"], conv: nn.Conv2d, norm: nn.Module) -> Float[Tensor, "b _ _ _"]:
    """Convolve, then normalise.

    A frozen norm is folded into the convolution's weights: the same function, without a pass over the feature map.
    Maps are many times larger than weights, so this pays at every size that a detector runs at; the gradient still
    reaches the weights that are trained.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        result: Tensor = norm(conv(x))
        return result
    scale, shift = norm.affine()
    return conv2d(x, conv.weight, shift.to(conv.weight.dtype), settings_of(conv), scale)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = kernel // 2 * dilation
    return Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)


def _norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if groups else FrozenBatchNorm2d(channels)


class BasicBlock(Recomputable):
    """Two 3×3 convolutions and a shortcut (figure 5 left of the paper).

    Args:
        inputs: channels of the input.
        width: channels of the output.
        stride: step of the first convolution.
        entry_dilation: dilation up to where the stride stands, or stood before the stage was dilated.
        dilation: dilation of what comes after it.
        groups: of the group norms, 0 for frozen batch norms.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, entry_dilation: int, dilation: int, groups: int):
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride, entry_dilation)
        self.bn1 = _norm(width, groups)
        self.conv2 = _conv(width, width, 3, 1, dilation)
        self.bn2 = _norm(width, groups)
        self.downsample = _shortcut(inputs, width, stride, groups)

    def forward(self, x: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b _ _ _"]:
        """The block's output, after its last ReLU."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        return _add(conv_norm(out, self.conv2, self.bn2), x, self.downsample)

    def last_norm(self) -> nn.Module:
        """The norm that the residual branch ends with."""
        return self.bn2


class Bottleneck(Recomputable):
    """1×1, 3×3 and 1×1 convolutions and a shortcut (figure 5 right), the stride in the 3×3 as torchvision has it.

    Arguments as for `BasicBlock`; the output has four times `width` channels.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, entry_dilation: int, dilation: int, groups: int):
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = _norm(width, groups)
        self.conv2 = _conv(width, width, 3, stride, entry_dilation)
        self.bn2 = _norm(width, groups)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = _norm(width * self.expansion, groups)
        self.downsample = _shortcut(inputs, width * self.expansion, stride, groups)

    def forward(self, x: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b _ _ _"]:
        """The block's output, after its last ReLU."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = F.relu(conv_norm(out, self.conv2, self.bn2), inplace=True)
        return _add(conv_norm(out, self.conv3, self.bn3), x, self.downsample)

    def last_norm(self) -> nn.Module:
        """The norm that the residual branch ends with."""
        return self.bn3


def _shortcut(inputs: int, outputs: int, stride: int, groups: int) -> nn.Sequential | None:
    """A projection where the shapes differ. At a dilated stage the stride is 1 but the channels still change."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs, groups))


def _add(branch: Tensor, x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    if downsample is not None:
        conv, norm = downsample
        assert isinstance(conv, nn.Conv2d)
        x = conv_norm(x, conv, norm)
    # Neither a convolution nor an addition needs its own result for the gradient, so both may be overwritten.
    # A group norm does not either.
    return F.relu(branch.add_(x), inplace=True)


class ResNet(Backbone):
    """A ResNet without its classifier. `state_dict` has torchvision's names, at the top level.

    Args:
        architecture: one of `ARCHITECTURES`.
        levels: which feature maps to return, by stride; stages beyond the last one are not built.
        dilated: the last stage (stride 32) keeps the stride 16, and all 3×3 convolutions after the place of its
            stride use dilation 2, so that every second cell is what the undilated network computes. For bottleneck
            blocks this is torchvision's `replace_stride_with_dilation=[False, False, True]`, DETR's DC5.

    Raises:
        UsageError: levels that do not exist.
    """

    def __init__(self, architecture: Architecture, *, levels: tuple[int, ...] = (32,), dilated: bool = False):
        super().__init__()
        levels = check_levels(levels)
        block = Bottleneck if architecture.bottleneck else BasicBlock
        self.conv1 = _conv(3, architecture.stem, 7, 2)
        self.bn1 = _norm(architecture.stem, architecture.groups)
        channels = architecture.stem
        self._depth = LEVELS.index(levels[-1]) + 1
        self._maps: list[tuple[int, int]] = []  # channels and stride of every stage's output
        for index in range(self._depth):
            is_dilated = dilated and index == 3
            width, stride = architecture.widths[index], 1 if index == 0 or is_dilated else 2
            blocks = []
            for number in range(architecture.blocks[index]):
                is_entry = number == 0
                dilation = 2 if is_dilated else 1
                entry_dilation = 1 if is_entry else dilation
                step = stride if is_entry else 1
                blocks.append(block(channels, width, step, entry_dilation, dilation, architecture.groups))
                channels = width * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self._maps.append((channels, LEVELS[index] // 2 if is_dilated else LEVELS[index]))
        self._return([LEVELS.index(level) for level in levels])

    def _return(self, stages: Sequence[int]) -> None:
        self._returned = tuple(stages)
        self.channels, self.strides = (
            tuple(part) for part in zip(*(self._maps[stage] for stage in stages), strict=True)
        )

    def return_finer_levels(self) -> None:
        """Return the outputs of all stages that are built."""
        self._return(range(self._depth))

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The feature maps of the levels that were asked for, finest first."""
        x = F.relu(conv_norm(images, self.conv1, self.bn1), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for index, layer in enumerate(self._layers()):
            x = layer(x)
            if index in self._returned:
                features.append(x)
        return tuple(features)

    def _layers(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{index + 1}") for index in range(self._depth)]

    def stages(self) -> tuple[Sequence[nn.Module], ...]:
        """The stem, and each stage that is built."""
        return ((self.conv1, self.bn1), *([layer] for layer in self._layers()))

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """He et al.'s initialisation (fan out), norms at one and zero.

        Each residual branch ends with a small scale, so that the sum over all blocks keeps the size of the signal. A
        scale of zero (Goyal et al., 2017, section 5.1) would close the branch for ever where the norm is frozen, and
        where it is not, a network as small as `resnet-nano` learns more slowly from it.
        """
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                elif isinstance(module, nn.GroupNorm):
                    module.reset_parameters()
                elif isinstance(module, FrozenBatchNorm2d):
                    module.load_state_dict(FrozenBatchNorm2d(len(module.weight)).state_dict())
            for block in blocks:
                norm = block.last_norm()
                assert isinstance(norm.weight, Tensor)
                norm.weight.fill_(1 / math.sqrt(len(blocks)))

    def is_unused(self, name: str) -> bool:
        """Whether the tensor belongs to a stage that was not built."""
        match = re.match(r"layer([1-4])\.", name)
        return match is not None and int(match.group(1)) > self._depth
