"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """A second model whose weights follow those in training: a ← decay · a + (1 − decay) · w.

    Early in a run the decay is smaller, (1 + n) / (10 + n) after n steps, so that the average forgets the start; the
    first step's weights are taken as they are.

    Args:
        model: the model in training.
        decay: of the average, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=False)
        self._averaged.eval()

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self._averaged.module

    @property
    def steps(self) -> int:
        """How many steps it has seen."""
        return int(self._averaged.n_averaged)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._averaged.n_averaged.fill_(steps)

    def update(self, model: nn.Module) -> None:
        """Take the weights after a step into account."""
        self._averaged.update_parameters(model)

    def tensors(self) -> dict[str, Tensor]:
        """Its state, by name."""
        return self._averaged.module.state_dict()

    def _blend(self, averages: Sequence[Tensor], weights: Sequence[Tensor], seen: Tensor | int) -> None:
        # `seen` is the same number as `steps`, but on the model's device, which would have to be waited for.
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
