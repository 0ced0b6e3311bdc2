"""ResNet against torchvision's figures, against an independent forward pass, and its own promises."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from filling import fill, filled, image
from torch import Tensor, nn

from detrkit.errors import UsageError
from detrkit.nn.backbone import build_backbone
from detrkit.nn.resnet import ARCHITECTURES, FrozenBatchNorm2d, ResNet, conv_norm

ALL = (4, 8, 16, 32)


def norm_of(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in names), training=False, eps=1e-5)


def plain_forward(weights: dict[str, Tensor], x: Tensor, *, bottleneck: bool, dilated: bool) -> list[Tensor]:
    """The network written out from the keys alone: every convolution, then its batch norm."""
    x = F.relu(norm_of(weights, "bn1", F.conv2d(x, weights["conv1.weight"], stride=2, padding=3)))
    x, features = F.max_pool2d(x, 3, 2, 1), []
    for stage in (1, 2, 3, 4):
        number = 0
        while f"layer{stage}.{number}.conv1.weight" in weights:
            name, held = f"layer{stage}.{number}", dilated and stage == 4
            stride = 2 if stage > 1 and number == 0 and not held else 1
            out = x
            for conv in (1, 2, 3) if bottleneck else (1, 2):
                kernel = weights[f"{name}.conv{conv}.weight"]
                is_strided = conv == (2 if bottleneck else 1)
                is_after = held and (number > 0 or (not bottleneck and conv == 2))
                reach = 2 if is_after and kernel.shape[-1] == 3 else 1
                padding = reach if kernel.shape[-1] == 3 else 0
                out = F.conv2d(out, kernel, None, stride if is_strided else 1, padding, reach)
                out = norm_of(weights, f"{name}.bn{conv}", out)
                out = F.relu(out) if conv < (3 if bottleneck else 2) else out
            if f"{name}.downsample.0.weight" in weights:
                x = F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride)
                x = norm_of(weights, f"{name}.downsample.1", x)
            x, number = F.relu(out + x), number + 1
        features.append(x)
    return features


# Computed with torchvision 0.29 (models.resnet18/resnet50, evaluation mode, replace_stride_with_dilation where
# dilated) from `fill` and `image(65, 97)`: shape, mean and standard deviation of layer4, and [0, :4, 1, 1].
TORCHVISION = {
    ("resnet18", False): ((1, 512, 3, 4), 0.8290793, 1.073088, [0.0, 0.0, 1.432673, 0.0]),
    ("resnet50", False): ((1, 2048, 3, 4), 0.8227067, 0.9691743, [1.056203, 0.1759539, 0.9050829, 0.0]),
    ("resnet50", True): ((1, 2048, 5, 7), 0.8925405, 1.051732, [0.8611045, 0.0, 0.5553646, 0.0]),
}


@pytest.mark.parametrize(("name", "dilated"), TORCHVISION)
def test_gives_the_figures_of_torchvision(name: str, dilated: bool):
    shape, mean, std, some = TORCHVISION[name, dilated]
    (features,) = filled(build_backbone(name, dilated=dilated))(image(65, 97))
    assert features.shape == shape
    assert features.mean().item() == pytest.approx(mean, rel=1e-5)
    assert features.std().item() == pytest.approx(std, rel=1e-5)
    assert features[0, :4, 1, 1].tolist() == pytest.approx(some, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_level_equals_the_network_written_out(name: str, dilated: bool):
    backbone = filled(build_backbone(name, levels=ALL, dilated=dilated))
    x = image(64, 96)
    with torch.no_grad():
        expected = plain_forward(backbone.state_dict(), x, bottleneck=ARCHITECTURES[name].bottleneck, dilated=dilated)
        features = backbone(x)
    assert len(features) == 4
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    # torchvision's parameter counts less the classifier, norms included.
    [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032), ("resnet101", 42_500_160)],
)
def test_holds_the_published_number_of_weights(name: str, count: int):
    with torch.device("meta"):
        backbone = ResNet(ARCHITECTURES[name])
    assert sum(value.numel() for key, value in backbone.state_dict().items() if "running" not in key) == count


def test_names_are_those_of_torchvision():
    with torch.device("meta"):
        keys = set(ResNet(ARCHITECTURES["resnet50"]).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var")
    assert {"conv1.weight", *(f"bn1.{part}" for part in norm)} <= keys
    assert {"layer1.0.conv1.weight", "layer4.2.conv3.weight", "layer2.0.downsample.0.weight"} <= keys
    assert {f"layer3.0.downsample.1.{part}" for part in norm} <= keys
    assert len(keys) == 53 * 5
    assert "layer1.1.downsample.0.weight" not in keys


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 31), (1, 1)])
@pytest.mark.parametrize("name", ["resnet18", "resnet-nano"])
def test_grids_are_rounded_up(name: str, size: tuple[int, int]):
    backbone = build_backbone(name, levels=ALL)
    features = backbone(image(*size, count=2))
    for stride, channels, map_ in zip(backbone.strides, backbone.channels, features, strict=True):
        assert map_.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
    assert backbone.strides == ALL


def test_bottlenecks_give_four_times_their_width():
    with torch.device("meta"):
        assert ResNet(ARCHITECTURES["resnet50"], levels=ALL).channels == (256, 512, 1024, 2048)
        assert ResNet(ARCHITECTURES["resnet34"], levels=ALL).channels == (64, 128, 256, 512)


def test_levels_come_finest_first_and_later_stages_are_not_built():
    backbone = build_backbone("resnet18", levels=(16, 4))
    assert (backbone.strides, backbone.channels) == ((4, 16), (64, 256))
    assert [map_.shape[-1] for map_ in backbone(image(64, 64))] == [16, 4]
    assert not any(key.startswith("layer4") for key in backbone.state_dict())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet-nano"])
def test_dilation_computes_the_same_cells_and_those_between(name: str):
    coarse, fine = (filled(build_backbone(name, dilated=dilated)) for dilated in (False, True))
    if ARCHITECTURES[name].groups:  # a group norm looks at all cells, so take the statistics out of the comparison
        for backbone in (coarse, fine):
            for module in list(backbone.modules()):
                for key, child in list(module.named_children()):
                    if isinstance(child, nn.GroupNorm):
                        setattr(module, key, FrozenBatchNorm2d(child.num_channels))
    assert (coarse.strides, fine.strides) == ((32,), (16,))
    x = image(96, 129)
    torch.testing.assert_close(fine(x)[0][:, :, ::2, ::2], coarse(x)[0], rtol=1e-4, atol=1e-4)


def test_dilation_begins_after_the_place_of_the_stride():
    stage = build_backbone("resnet50", dilated=True).get_submodule("layer4")
    assert [block.conv2.dilation for block in stage] == [(1, 1), (2, 2), (2, 2)]
    assert [block.conv2.stride for block in stage] == [(1, 1)] * 3
    stage = build_backbone("resnet18", dilated=True).get_submodule("layer4")
    assert [conv.dilation[0] for block in stage for conv in (block.conv1, block.conv2)] == [1, 2, 2, 2]


def trained_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for name, value in norm.state_dict().items():
        if value.ndim:
            value.copy_(torch.from_numpy(fill(name, (channels,))))
    return norm


def test_frozen_norm_is_a_batch_norm_in_evaluation():
    norm, frozen = trained_norm(5), FrozenBatchNorm2d(5)
    frozen.load_state_dict({key: value for key, value in norm.state_dict().items() if "tracked" not in key})
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(frozen(x), norm(x))
    torch.testing.assert_close(frozen.train()(x), norm(x))
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_norm_uses_the_epsilon_that_detr_uses():
    frozen = FrozenBatchNorm2d(1)
    frozen.running_var.zero_()
    assert frozen(torch.full((1, 1, 1, 1), 2.0)).item() == pytest.approx(2 / 1e-5**0.5, rel=1e-6)


def test_folding_the_norm_changes_neither_outputs_nor_gradients():
    conv, norm = nn.Conv2d(4, 5, 3, 2, 1, bias=False), trained_norm(5)
    frozen = FrozenBatchNorm2d(5)
    frozen.load_state_dict({key: value for key, value in norm.state_dict().items() if "tracked" not in key})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
    results = []
    for which in (norm, frozen):
        x = torch.randn(2, 4, 9, 8, generator=generator.manual_seed(1), requires_grad=True)
        conv.weight.grad = None
        out = conv_norm(x, conv, which)
        out.square().sum().backward()
        results.append((out, x.grad, conv.weight.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_folded_weights_are_made_again_and_not_kept():
    conv, frozen = nn.Conv2d(4, 5, 3, bias=False), FrozenBatchNorm2d(5)
    x, kept = torch.randn(1, 4, 6, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        conv_norm(x, conv, frozen)
    assert {tensor.data_ptr() for tensor in kept} >= {x.data_ptr(), conv.weight.data_ptr()}
    assert sum(tensor.numel() for tensor in kept) == x.numel() + conv.weight.numel() + 5


@pytest.mark.usefixtures("narrow")
def test_freezing_stops_the_stages_from_the_image_upwards():
    backbone = build_backbone("resnet18", frozen_stages=2)
    trained = {name.split(".")[0] for name, value in backbone.named_parameters() if value.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    (features,) = backbone(image(64, 64))
    features.sum().backward()
    assert all((value.grad is not None) == value.requires_grad for value in backbone.parameters())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["resnet-nano", "resnet50"])
def test_random_start_is_repeatable_and_keeps_the_size_of_the_signal(name: str):
    first, second, other = (build_backbone(name, levels=ALL, frozen_stages=0) for _ in range(3))
    for backbone, seed in ((first, 3), (second, 3), (other, 4)):
        backbone.initialise(torch.Generator().manual_seed(seed))
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    features = first(image(64, 64))
    assert all(0.05 < map_.std().item() < 5 for map_ in features)
    features[-1].square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in first.parameters())


@pytest.mark.usefixtures("narrow")
def test_random_start_forgets_what_was_loaded():
    used, fresh = filled(build_backbone("resnet18")), build_backbone("resnet18")
    for backbone in (used, fresh):
        backbone.initialise(torch.Generator().manual_seed(0))
    state = fresh.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in used.state_dict().items())


def test_nano_is_small_and_trains_all_its_weights():
    backbone = build_backbone("resnet-nano", levels=ALL, frozen_stages=0)
    assert backbone.channels == (32, 64, 128, 192)
    assert 500_000 < sum(value.numel() for value in backbone.parameters()) < 1_000_000
    assert not list(backbone.buffers())
    assert all(value.requires_grad for value in backbone.parameters())


def test_nano_learns_a_rule_from_nothing():
    generator = torch.Generator().manual_seed(0)
    backbone = build_backbone("resnet-nano", frozen_stages=0)
    backbone.initialise(generator)
    head = nn.Linear(192, 2)
    with torch.no_grad():
        head.weight.zero_()
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 1e-3)
    for _ in range(25):
        images = torch.randn(8, 3, 32, 32, generator=generator) * 0.3
        labels = torch.arange(8) % 2
        images[labels == 1, :, 8:20, 8:20] += 1
        loss = F.cross_entropy(head(backbone(images)[-1].mean((2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["resnet18", "resnet-nano"])
def test_memory_format_and_mixed_precision_keep_the_answer(name: str):
    backbone = filled(build_backbone(name))
    x = image(64, 64, count=2)
    (expected,) = backbone(x)
    last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    (features,) = last(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        (rough,) = backbone(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - expected).norm() < 0.05 * expected.norm()
    (rough,) = copy.deepcopy(backbone).bfloat16()(x.bfloat16())
    assert (rough.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.usefixtures("narrow")
def test_the_images_are_not_written_to():
    x = image(64, 64)
    before = x.clone()
    build_backbone("resnet18")(x)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("narrow")
def test_returned_levels_are_not_written_to_by_later_stages():
    backbone = filled(build_backbone("resnet18", levels=ALL))
    x = image(64, 64)
    features = backbone(x)
    for level, map_ in zip(ALL, features, strict=True):
        alone = filled(build_backbone("resnet18", levels=(level,)))(x)[0]
        assert torch.equal(map_, alone)


def test_impossible_levels_are_refused():
    with pytest.raises(UsageError, match=r"levels.*got \(64,\).*expected some of \(4, 8, 16, 32\)"):
        ResNet(ARCHITECTURES["resnet18"], levels=(64,))
