"""MobileNetV2: padding, folding, conventions, and an independent forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from filling import fill, filled, image
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from detrkit.errors import ModelError
from detrkit.nn.backbone import build_backbone
from detrkit.nn.mobilenet import (
    CONVENTIONS,
    InvertedResidual,
    MobileNetV2,
    PaddedConv2d,
    fold_batch_norm,
    fold_batch_norms,
    same_padding,
)
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD

ALL = (4, 8, 16, 32)


def random_weights(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every ReLU6 works at both of its ends somewhere."""
    generator = torch.Generator().manual_seed(seed)
    for value in backbone.state_dict().values():
        value.normal_(generator=generator)
        if value.ndim == 4:
            value.mul_((3 / value[0].numel()) ** 0.5)
    return backbone


def plain_forward(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The network written out from the keys alone, for even grids and TensorFlow's padding. `x` is RGB in [-1, 1]."""

    def conv(name: str, x: Tensor, stride: int = 1, relu6: bool = True) -> Tensor:
        weight = weights[f"{name}.weight"]
        groups = x.shape[1] if weight.shape[1] == 1 and weight.shape[-1] == 3 else 1
        if weight.shape[-1] == 3:
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        x = F.conv2d(x, weight, weights[f"{name}.bias"], stride, groups=groups)
        return x.clamp(0, 6) if relu6 else x

    x, features = conv("features.0.0", x, stride=2), []
    for number in range(1, 18):
        before, stride = x, 2 if number in (2, 4, 7, 14) else 1
        name = f"features.{number}.conv"
        if number == 1:
            x = conv(f"{name}.1", conv(f"{name}.0.0", x), relu6=False)
        else:
            x = conv(f"{name}.1.0", conv(f"{name}.0.0", x), stride)
            x = conv(f"{name}.2", x, relu6=False)
        if stride == 1 and x.shape == before.shape:
            x = x + before
        if number in (3, 6, 13, 17):
            features.append(x)
    return features


def test_every_level_equals_the_network_written_out():
    backbone = random_weights(build_backbone("mobilenet_v2", levels=ALL))
    pixels = torch.randint(0, 256, (2, 3, 64, 128), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (NORMALIZATION_MEAN, NORMALIZATION_STD))
    with torch.no_grad():
        expected = plain_forward(backbone.state_dict(), pixels / 127.5 - 1)
        features = backbone((pixels / 255 - mean) / std)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gives_the_figures_of_torchvision():
    # Computed with torchvision 0.29 (models.mobilenet_v2, evaluation mode) from `fill` and `image(65, 97)`: shape,
    # mean and standard deviation after features.17, and [0, :4, 1, 1].
    backbone = build_backbone("mobilenet_v2_torchvision")
    weights = {key: torch.from_numpy(fill(key, shape)).float() for key, shape in unfolded_shapes(backbone).items()}
    backbone.load_state_dict(backbone.adapt(weights, "file"))
    (features,) = backbone(image(65, 97))
    assert features.shape == (1, 320, 3, 4)
    assert features.mean().item() == pytest.approx(0.005461692, rel=1e-4)
    assert features.std().item() == pytest.approx(0.2094575, rel=1e-5)
    expected = [0.2296842, -0.1509634, 0.1531073, -0.05073755]
    assert features[0, :4, 1, 1].tolist() == pytest.approx(expected, rel=1e-4)


def unfolded_shapes(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of torchvision's file for the same layers: a norm follows each convolution."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in backbone.state_dict().items():
        if not key.endswith(".weight"):
            continue
        stem, place = key.removesuffix(".weight").rsplit(".", 1)
        shapes[key] = tuple(value.shape)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{stem}.{int(place) + 1}.{part}"] = (value.shape[0],)
    return shapes


@given(size=st.integers(1, 40), kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3), dilation=st.integers(1, 2))
def test_same_padding_is_the_least_that_covers_the_grid(size: int, kernel: int, stride: int, dilation: int):
    before, after = same_padding(size, kernel, stride, dilation)
    cells, reach = -(-size // stride), (kernel - 1) * dilation + 1
    assert before in (after, after - 1)

    def covered(total: int) -> bool:
        return (cells - 1) * stride + reach <= size + total

    assert covered(before + after)
    assert before + after == 0 or not covered(before + after - 1)


@pytest.mark.parametrize(("size", "expected"), [(224, (0, 1)), (8, (0, 1)), (7, (1, 1)), (1, (1, 1))])
def test_same_padding_at_stride_two(size: int, expected: tuple[int, int]):
    assert same_padding(size, 3, 2) == expected


@pytest.mark.parametrize("relu6", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (7, 9)])
def test_convolution_equals_padding_every_side_first(size: tuple[int, int], stride: int, groups: int, relu6: bool):
    conv = random_weights(PaddedConv2d(4, 8, 3, stride=stride, groups=groups, relu6=relu6))
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)) * 3
    (top, bottom), (left, right) = (same_padding(side, 3, stride) for side in size)
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, conv.bias, stride, groups=groups)
    torch.testing.assert_close(conv(x), expected.clamp(0, 6) if relu6 else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 31), (1, 2)])
def test_grids_are_rounded_up(name: str, size: tuple[int, int]):
    backbone = build_backbone(name, levels=ALL)
    features = backbone(image(*size, count=2))
    assert backbone.strides == ALL
    assert backbone.channels == (24, 32, 96, 320)
    for stride, channels, map_ in zip(backbone.strides, backbone.channels, features, strict=True):
        assert map_.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


def test_the_last_level_may_be_sixteen_either_way():
    x = image(64, 64)
    short, dilated = build_backbone("mobilenet_v2", levels=(16,)), build_backbone("mobilenet_v2", dilated=True)
    assert (short.channels, short.strides, short(x)[0].shape) == ((96,), (16,), (1, 96, 4, 4))
    assert (dilated.channels, dilated.strides, dilated(x)[0].shape) == ((320,), (16,), (1, 320, 4, 4))
    assert not any(key.startswith("features.14") for key in short.state_dict())
    assert dilated.state_dict().keys() == build_backbone("mobilenet_v2").state_dict().keys()


# At even grids TensorFlow's padding centres the strided kernel on the odd cells; otherwise on the even ones.
@pytest.mark.parametrize(
    ("name", "size", "first"),
    [("mobilenet_v2", 96, 1), ("mobilenet_v2", 80, 0), ("mobilenet_v2_torchvision", 96, 0)],
)
def test_dilation_computes_the_same_cells_and_those_between(name: str, size: int, first: int):
    coarse, fine = (random_weights(build_backbone(name, dilated=dilated)) for dilated in (False, True))
    x = image(size, size)
    torch.testing.assert_close(fine(x)[0][:, :, first::2, first::2], coarse(x)[0], rtol=1e-4, atol=1e-4)


def test_the_head_is_there_only_where_asked_for():
    backbone = MobileNetV2(CONVENTIONS["mobilenet_v2"], levels=(16, 32), head=True)
    assert backbone.channels == (96, 1280)
    features = backbone(image(64, 64))
    assert [map_.shape[1] for map_ in features] == [96, 1280]
    assert features[-1].min() >= 0
    assert {"features.18.0.weight", "features.18.0.bias"} <= backbone.state_dict().keys()
    assert not any("features.18" in key for key in build_backbone("mobilenet_v2").state_dict())


def test_names_are_those_of_the_weight_files():
    state = build_backbone("mobilenet_v2").state_dict()
    assert len(state) == 52 * 2 - 2
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["features.1.conv.0.0.weight"] == (32, 1, 3, 3)
    assert shapes["features.1.conv.1.weight"] == (16, 32, 1, 1)
    assert shapes["features.14.conv.1.0.weight"] == (576, 1, 3, 3)
    assert shapes["features.17.conv.2.weight"] == (320, 960, 1, 1)


def test_folding_a_norm_is_the_norm_after_the_convolution():
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6).eval()
    for value in (*conv.state_dict().values(), *norm.state_dict().values()):
        if value.ndim:
            value.normal_(generator=generator)
    norm.running_var.abs_()
    weight, bias = fold_batch_norm(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    x = torch.randn(2, 3, 9, 9, generator=generator)
    torch.testing.assert_close(F.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-4, atol=1e-4)


def test_folding_a_file_takes_the_norms_out_and_leaves_the_rest():
    backbone = build_backbone("mobilenet_v2_torchvision", levels=(4,))
    weights = {key: torch.ones(shape) for key, shape in unfolded_shapes(backbone).items()}
    weights["features.0.1.num_batches_tracked"] = torch.tensor(1)
    weights["classifier.1.weight"] = torch.ones(2, 2)
    folded = fold_batch_norms(weights)
    assert folded.keys() == backbone.state_dict().keys() | {"classifier.1.weight"}


def test_weights_of_torchvision_are_refused_where_they_would_be_fed_wrongly():
    weights = {key: torch.ones(shape) for key, shape in unfolded_shapes(build_backbone("mobilenet_v2")).items()}
    with pytest.raises(ModelError, match=r"some\.pth: .*torchvision.*Take the backbone 'mobilenet_v2_torchvision'"):
        build_backbone("mobilenet_v2").adapt(weights, "some.pth")


def test_freezing_goes_by_stride():
    def trained(stages: int) -> set[int]:
        backbone = build_backbone("mobilenet_v2", frozen_stages=stages)
        return {int(name.split(".")[1]) for name, value in backbone.named_parameters() if value.requires_grad}

    assert trained(0) == set(range(18))
    assert trained(1) == set(range(2, 18))
    assert trained(2) == set(range(4, 18))
    assert trained(4) == set(range(14, 18))
    assert trained(5) == set()


def test_random_start_is_repeatable_and_keeps_the_size_of_the_signal():
    first, second = (build_backbone("mobilenet_v2", levels=ALL, frozen_stages=0) for _ in range(2))
    for backbone in (first, second):
        backbone.initialise(torch.Generator().manual_seed(3))
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    blocks = [block for block in first.modules() if isinstance(block, InvertedResidual)]
    for block in blocks:
        weight = block.conv[-1].weight
        variance = 1 / weight[0].numel() / (10 if block.has_shortcut else 1)  # ten branches add up to one signal
        assert weight.square().mean().item() == pytest.approx(variance, rel=0.25)
    assert sum(block.has_shortcut for block in blocks) == 10
    features = first(image(64, 64))
    assert all(0.05 < map_.std().item() < 5 for map_ in features)
    features[-1].square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in first.parameters())


def test_memory_format_and_mixed_precision_keep_the_answer():
    backbone = filled(build_backbone("mobilenet_v2", levels=ALL))
    x = image(66, 64, count=2)
    expected = backbone(x)
    last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    for ours, theirs in zip(last(x.contiguous(memory_format=torch.channels_last)), expected, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone(x)[-1]
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - expected[-1]).norm() < 0.1 * expected[-1].norm()


def test_returned_levels_are_not_written_to_by_later_stages():
    x = image(64, 64)
    features = filled(build_backbone("mobilenet_v2", levels=ALL))(x)
    for level, map_ in zip(ALL, features, strict=True):
        assert torch.equal(map_, filled(build_backbone("mobilenet_v2", levels=(level,)))(x)[0])


def test_the_images_are_not_written_to():
    x = image(64, 64)
    before = x.clone()
    build_backbone("mobilenet_v2")(x)
    assert torch.equal(x, before)


def test_the_conversion_of_the_input_is_no_weight_but_moves_with_the_model():
    backbone = build_backbone("mobilenet_v2")
    assert not any("input" in key for key in backbone.state_dict())
    assert backbone.bfloat16()(image(32, 32).bfloat16())[0].dtype == torch.bfloat16
