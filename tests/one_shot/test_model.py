"""The one-shot detector: what is shown, what is answered, and how likeness enters the score; for every variant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_shot.squares import STRIDE, Samples, episode, small
from torch import Tensor

from detrkit import models
from detrkit.boxes import cxcywh_to_xyxy
from detrkit.errors import UsageError
from detrkit.nn.pooling import pool_boxes
from detrkit.one_shot.background import usual_in
from detrkit.one_shot.model import MIRRORED, OneShot
from detrkit.prompts import ask
from detrkit.structures import Batch

VARIANTS = models.names()


def plain_answers(model: OneShot, image: Tensor, padding: Tensor, prompt: Tensor | None):
    """What the detector answers about one image, its queries told of a prompt by hand."""
    queries = model.detector.queries(1)
    if prompt is not None:
        queries = ask(queries, prompt[None, None], place=model.place)
    return model.detector(image[None], padding[None], queries)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "unprompted"])
@pytest.mark.parametrize("width", [16, 0], ids=["learnt", "raw"])
def test_one_step_is_what_its_parts_give_one_by_one(variant: str, prompted: bool, width: int):
    model = small(variant, prompted=prompted, width=width, place="both")
    images, padding, asked, source, boxes = episode()
    found = model(images, padding, asked, source, boxes)
    encoded = model.encode(images, padding)
    for row in range(len(boxes)):
        exemplar = model.show(encoded, source[row : row + 1], boxes[row : row + 1])
        alone = plain_answers(model, images[asked[row]], padding[asked[row]], exemplar.prompts[0] if prompted else None)
        expected = alone.logits[:, 0].clone()
        for layer, places in enumerate(alone.boxes):
            looks = model.look(encoded, asked[row : row + 1], places)[0]
            expected[layer, :, model.matched] += model.evidence(looks @ exemplar.looks[0])
        torch.testing.assert_close(found.boxes[:, row], alone.boxes[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits[:, row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_change_the_answer_and_only_where_they_are_asked(variant: str):
    model = small(variant)
    images, padding, asked, source, boxes = episode()
    encoded = model.encode(images, padding)
    prompts = model.show(encoded, source, boxes).prompts
    both = model.answer(encoded, asked, prompts)
    other = model.answer(encoded, asked, torch.cat([prompts[:1], -prompts[1:]]))
    torch.testing.assert_close(both.boxes[:, 0], other.boxes[:, 0])
    assert (both.boxes[:, 1:] - other.boxes[:, 1:]).abs().amax((0, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_likeness_raises_the_logit_of_the_last_class_alone(variant: str):
    model = small(variant, prompted=False, config={"num_classes": 3})
    images, padding, asked, _, _ = episode(images=2, episodes=2)
    encoded = model.encode(images, padding)
    plain = model.answer(encoded, asked, torch.zeros(2, 0))
    # What is shown is what the first query points at: nothing can be more alike.
    own = plain.boxes[-1, :, 0].detach()
    logits = model(images, padding, asked, asked, own).logits
    gained = logits - plain.logits
    others = [index for index in range(gained.shape[-1]) if index != model.matched]
    assert gained[..., others].abs().max() == 0
    most = model.evidence(torch.ones(())).item()
    assert most == pytest.approx(8 * 0.5)
    torch.testing.assert_close(gained[-1, :, 0, model.matched], torch.full((2,), most), atol=1e-4, rtol=0)
    assert gained[..., model.matched].max() <= most + 1e-4
    model.sharpness.data += math.log(2)
    again = model(images, padding, asked, asked, own).logits - plain.logits
    torch.testing.assert_close(again, 2 * gained, atol=1e-3, rtol=1e-4)


@given(st.floats(-1, 1), st.floats(0.01, 1))
@settings(max_examples=20)
def test_more_likeness_is_never_less_evidence(likeness: float, more: float):
    model = small()
    low, high = model.evidence(torch.tensor([likeness, likeness + more]))
    assert high > low


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_learns_from_likeness(variant: str):
    model = small(variant).train()
    images, padding, asked, source, boxes = episode()
    found = model(images, padding, asked, source, boxes)
    found.logits[..., model.matched].square().sum().backward()
    detector = model.detector
    for part in (model.exemplar_projection, model.look_head, model.look_norm, detector.backbone):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters()), part
    for number in (model.sharpness, model.offset):
        assert number.grad is not None
        assert number.grad.abs() > 0
    moved = [p.grad for p in detector.box_head.parameters() if p.grad is not None]
    assert all(not grad.any() for grad in moved), "where a box is must not be bent towards what looks right"


@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_get_no_gradient_from_looks_and_looks_learn_without_prompts(variant: str):
    model = small(variant, prompted=False)
    images, padding, asked, source, boxes = episode()
    boxes.requires_grad_()
    model.detector.requires_grad_(False)
    model(images, padding, asked, source, boxes.detach()).logits.sum().backward()
    assert model.look_head.layers[0].weight.grad.abs().max() > 0
    assert boxes.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_of_queries_train_and_one_answers(variant: str):
    single, model = (small(variant, config={"query_groups": groups}) for groups in (1, 2))
    count = model.detector.config.num_queries
    single.load_state_dict(
        {
            name: tensor[:count] if ".query_" in name and len(tensor) == 2 * count else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    inputs = episode()
    one = single(*inputs)
    torch.testing.assert_close(model(*inputs).logits, one.logits)
    found = model.train()(*inputs)
    assert found.logits.shape[0] == 2 * one.logits.shape[0]
    # The first group comes last, and the other ones do not disturb it.
    torch.testing.assert_close(found.logits[-1], one.logits[-1], atol=1e-4, rtol=1e-4)
    assert (found.logits[: len(one.logits)] - found.logits[len(one.logits) :]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [16, 0])
def test_padding_changes_no_look(variant: str, width: int):
    model = small(variant, width=width)
    model.detector.backbone = Samples(model.detector.backbone.channels[-1])
    # All but the first have sides that are no multiples of the stride: their last cells are partly padding.
    large, narrow, flat = (torch.randn(3, *size) for size in ((96, 128), (90, 50), (37, 121)))
    batch = Batch.from_images([large, narrow, flat])
    encoded = model.encode(batch.images, batch.padding)
    boxes = torch.tensor([[[0.5, 0.4, 0.5, 0.6], [0.7, 0.6, 0.6, 0.8], [0.1, 0.2, 0.1, 0.1]]])
    for row, image in enumerate((large, narrow, flat)):
        alone = model.see(image[None])
        there, here = torch.tensor([row]), torch.tensor([0])
        torch.testing.assert_close(
            model.look(encoded, there, boxes), model.look(alone, here, boxes), atol=1e-4, rtol=1e-4
        )
        shown = [model.show(one, where, boxes[0, :1]) for one, where in ((encoded, there), (alone, here))]
        torch.testing.assert_close(shown[0].prompts, shown[1].prompts, atol=1e-4, rtol=1e-4)
    expected = [[1, 1], [90 / 96, 50 / 128], [37 / 96, 121 / 128]]
    torch.testing.assert_close(encoded.extent, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_looks_everywhere_are_looks_at_boxes(variant: str):
    model = small(variant, cells=2)
    encoded = model.see(torch.randn(1, 3, 70, 53))
    x, y, size = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.1, 0.4]), (0.3, 0.45)
    everywhere = model.look_everywhere(encoded, x, y, size)
    assert everywhere.shape == (2, 3, 16)
    for row, top in enumerate(y):
        for column, left in enumerate(x):
            box = torch.tensor([[[left + size[0] / 2, top + size[1] / 2, *size]]])
            torch.testing.assert_close(
                everywhere[row, column], model.look(encoded, torch.tensor([0]), box)[0, 0], atol=1e-4, rtol=1e-4
            )


def test_raw_looks_are_the_whitened_means_of_parts():
    model = small(width=0, cells=2)
    encoded = model.see(torch.randn(1, 3, 64, 64))
    features = encoded.memory.features[-1][0]
    other = torch.randn(features.shape[0], 5, 6)
    usual = usual_in([features, other])
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    x0, y0, x1, y1 = cxcywh_to_xyxy(box)[0].tolist()
    parts = []
    for row in range(2):
        for column in range(2):
            w, h = (x1 - x0) / 2, (y1 - y0) / 2
            part = torch.tensor([[x0 + (column + 0.5) * w, y0 + (row + 0.5) * h, w, h]])
            parts.append((pool_boxes(features, part)[0] - usual.mean) @ usual.whitening)
    expected = torch.nn.functional.normalize(torch.cat(parts), dim=0)
    look = model.look(encoded.without(usual), torch.tensor([0]), box[None])[0, 0]
    torch.testing.assert_close(look, expected, atol=1e-4, rtol=1e-4)


def test_whitened_features_are_centred_alike_and_told_apart(generator: torch.Generator):
    mixing = torch.randn(4, 4, generator=generator)
    maps = [(mixing @ torch.randn(4, h * 40, generator=generator) + 3).view(4, h, 40) for h in (20, 30)]
    mean, matrix = usual_in(maps)
    tokens = torch.cat([one.flatten(1) for one in maps], 1)
    torch.testing.assert_close(mean, tokens.mean(1), atol=1e-4, rtol=1e-4)
    white = (tokens - mean[:, None]).T @ matrix
    covariance = white.T @ white / len(white)
    values = torch.linalg.eigvalsh(torch.cov(tokens, correction=0))
    off = covariance - torch.diag(covariance.diagonal())
    assert off.abs().max() < 1e-3
    torch.testing.assert_close(covariance.diagonal(), values / (values + 0.3 * values.mean()), atol=1e-3, rtol=1e-3)


def test_a_single_colour_can_be_whitened():
    mean, matrix = usual_in([torch.ones(3, 4, 4)])
    assert torch.isfinite(matrix).all()
    torch.testing.assert_close(mean, torch.ones(3))


def test_prompts_start_as_tokens():
    model = small()
    model.start_as_tokens()
    features = torch.randn(5, model.detector.backbone.channels[-1])
    token = model.detector.projection(features[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(model.exemplar_projection(features), 4 * token, atol=1e-4, rtol=1e-4)
    unprompted = small(prompted=False)
    unprompted.start_as_tokens()
    assert unprompted.exemplar_projection is None


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="cells; got 0; expected at least 1"):
        small(cells=0)
    with pytest.raises(UsageError, match="width; got -1"):
        small(width=-1)
    with pytest.raises(UsageError, match="place; got 'above'; expected position, content, both"):
        OneShot.__init__.__wrapped__(OneShot.__new__(OneShot), small().detector, place="above")  # types unchecked


@pytest.mark.parametrize("size", [(64, 80), (50, 37), (90, 5), (1, 16)])
def test_images_are_continued_as_in_a_mirror(size: tuple[int, int]):
    model, given = small(), []
    backbone = Samples(model.detector.backbone.channels[-1])
    backbone.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    model.detector.backbone = backbone
    image = torch.randn(2, 3, *size)
    encoded = model.see(image)
    bottom, right = (-side % STRIDE for side in size)
    margin = MIRRORED * STRIDE
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (margin, margin + bottom), (margin, margin + right)), "reflect")
    np.testing.assert_array_equal(given[0].numpy(), expected)
    # Of the map only what is image is kept.
    torch.testing.assert_close(encoded.memory.features[-1], backbone(image)[0])
    assert encoded.extent.tolist() == [[pytest.approx(side / (side + -side % STRIDE)) for side in size]] * 2


@pytest.mark.parametrize("width", [4 * STRIDE, 4 * STRIDE + 1, 5 * STRIDE - 1])
def test_a_place_looks_the_same_however_wide_the_image_is(width: int):
    model = small(width=0, cells=1)
    model.detector.backbone = Samples(model.detector.backbone.channels[-1])
    wide = torch.randn(1, 3, 2 * STRIDE, 6 * STRIDE)
    seen = []
    for image in (wide, wide[..., :width]):
        height, whole = image.shape[-2:]
        place = torch.tensor([[[3.5 * STRIDE / whole, STRIDE / height, STRIDE / whole, STRIDE / height]]])
        padding = torch.zeros(1, height, whole, dtype=torch.bool)
        seen += [model.look(one, torch.tensor([0]), place) for one in (model.see(image), model.encode(image, padding))]
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], atol=1e-4, rtol=1e-4)


def test_a_border_hardly_shows_in_windows():
    model = small(config={"stride": 8})
    plain = torch.randn(3, 1, 1).expand(1, 3, 72, 96)
    uneven = []
    for encoded in (model.see(plain), model.encode(plain, torch.zeros(1, 72, 96, dtype=torch.bool))):
        features = encoded.memory.features[-1].detach()
        uneven.append(float((features - features[..., 4:5, 6:7]).abs().max()))
    assert uneven[0] < 0.6 * uneven[1]


def test_an_image_without_padding_is_seen_alike_by_both_ways():
    model = small()
    model.detector.backbone = Samples(model.detector.backbone.channels[-1])
    image = torch.randn(2, 3, 64, 4 * STRIDE)
    seen, encoded = model.see(image), model.encode(image, torch.zeros(2, 64, 64, dtype=torch.bool))
    torch.testing.assert_close(seen.memory.features[-1], encoded.memory.features[-1])
    assert torch.equal(seen.extent, encoded.extent)
