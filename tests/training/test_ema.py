"""The moving average against its formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrkit.training.ema import Average


def trained(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_average_follows_its_formula(decay: float) -> None:
    model = nn.Linear(3, 2)
    average = Average(model, decay)
    expected: dict[str, torch.Tensor] = {}
    for step in range(30):
        trained(model, step)
        average.update(model)
        for name, weight in model.state_dict().items():
            now = min(decay, (1 + step) / (10 + step))
            expected[name] = now * expected[name] + (1 - now) * weight if step else weight.clone()
    assert average.steps == 30
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_a_model_of_its_own_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    average = Average(model, 0.9)
    trained(model, 0)
    average.update(model)
    first = average.model[0].weight.detach().clone()
    trained(model, 1)
    assert torch.equal(average.model[0].weight, first)
    assert not average.model.training
    assert model.training
    assert average.tensors().keys() == model.state_dict().keys()


def test_an_average_goes_on_where_another_stood() -> None:
    model = nn.Linear(3, 2)
    whole = Average(model, 0.9)
    for step in range(3):
        trained(model, step)
        whole.update(model)
    resumed = Average(model, 0.9)
    resumed.model.load_state_dict(whole.tensors())
    resumed.steps = whole.steps
    trained(model, 3)
    whole.update(model)
    resumed.update(model)
    assert resumed.steps == 4
    assert all(
        torch.equal(one, other) for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )
