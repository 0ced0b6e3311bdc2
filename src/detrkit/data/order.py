"""Which images make up which batch, and in which order batches come: known beforehand for a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from detrkit.data.dataset import Key, random_stream
from detrkit.errors import UsageError

STRETCH = 64
"""Within so many batches that follow each other, images of like sizes are brought together. Of fewer batches more would
be padding, and of more hardly less."""

CELL = 32
"""Sizes within one cell of so many pixels count as one. Else images would meet the same companions in every epoch
wherever each has a size of its own; trainings were worse for it (docs/lab-notes.md, "Who meets in a batch")."""

_SHUFFLE_STREAM = 1  # `dataset` augments with stream 2


class EpochBatches(Sampler[list[Key]]):
    """The keys of every batch of a run: a pure function of the step, so a run can start at any.

    Each epoch has its own permutation of the images. A global batch is the next `batch_size` × `world` of them, and a
    process takes its slice. `accumulate` such batches make a step of the optimiser, and belong to one epoch. An
    incomplete last step is left out (the next epoch's permutation brings other images into it). Where there are fewer
    images than a step takes, the permutation is repeated.

    Images that share a batch are padded to the largest among them. Where `size_of` tells how large each is going to be,
    those of a stretch of `STRETCH` batches are divided among these by their shapes (`alike`).

    Args:
        count: number of images.
        batch_size: images of a batch, in each process.
        seed: of the run, at least 0.
        accumulate: batches of a step.
        start_step: the first step to yield.
        total_steps: the step to stop before.
        rank: of this process.
        world: number of processes.
        size_of: height and width in pixels that an example is going to have, each at least 1; the same whenever it is
            asked. None: whatever meets in a batch meets.

    Raises:
        UsageError: a number that is out of range.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        accumulate: int = 1,
        start_step: int = 0,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        size_of: Callable[[Key], tuple[int, int]] | None = None,
    ):
        for name, number, low in (
            ("count", count, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("accumulate", accumulate, 1),
            ("start_step", start_step, 0),
            ("total_steps", total_steps, 0),
            ("world", world, 1),
        ):
            if number < low:
                raise UsageError("This number is too small", where=name, got=number, expected=f"at least {low}")
        if not 0 <= rank < world:
            raise UsageError("There is no such process", where="rank", got=rank, expected=f"0 … {world - 1}")
        self.count, self.batch_size, self.seed, self.accumulate = count, batch_size, seed, accumulate
        self.start_step, self.total_steps, self.rank, self.world = start_step, total_steps, rank, world
        self.size_of = size_of

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser in which an epoch's images are seen once, or nearly."""
        return max(1, self.count // (self.batch_size * self.world * self.accumulate))

    def __len__(self) -> int:
        return self.accumulate * max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        current, order = (-1, -1), np.zeros((0, 0), np.int64)
        for batch in range(self.start_step * self.accumulate, self.total_steps * self.accumulate):
            epoch, position = divmod(batch, self.steps_per_epoch * self.accumulate)
            stretch, place = divmod(position, STRETCH)
            if current != (epoch, stretch):
                current, order = (epoch, stretch), self._order(epoch, stretch)
            first = self.rank * self.batch_size
            yield [Key(epoch, int(index)) for index in order[place, first : first + self.batch_size]]

    def _order(self, epoch: int, stretch: int) -> np.ndarray:
        """The images of a stretch: a row for each global batch."""
        together = self.batch_size * self.world
        permutation = random_stream(_SHUFFLE_STREAM, self.seed, epoch).permutation(self.count)
        whole = np.resize(permutation, (self.steps_per_epoch * self.accumulate, together))
        order = whole[stretch * STRETCH : (stretch + 1) * STRETCH]
        if self.size_of is None or together == 1:
            return order
        sizes = [self.size_of(Key(epoch, int(index))) for index in order.flat]
        return order.reshape(-1)[alike(sizes, together)].reshape(order.shape)


def alike(sizes: Sequence[tuple[int, int]], together: int) -> np.ndarray:
    """An order in which images that follow each other have like sizes, so that little of a batch is padding.

    They are divided by the ratio of their sides into as many parts as each part then has batches, and by their area
    within a part, all in whole cells of `CELL` pixels. Images of one size stay in their order; and batches stand in the
    order of the first image in each, so that an epoch does not go from small to large.

    Args:
        sizes: height and width of each in pixels, at least 1; as many as fill whole batches.
        together: images of a batch.

    Returns:
        The number of each image in its old place, in the new order.
    """
    height, width = np.ceil(np.array(sizes, np.float64) / CELL).T
    batches = len(sizes) // together
    part = math.ceil(batches / max(1, round(math.sqrt(batches)))) * together
    by_shape = np.argsort(height / width, kind="stable")
    area = height * width
    parts = [by_shape[start : start + part] for start in range(0, len(sizes), part)]
    grouped = np.concatenate([one[np.argsort(area[one], kind="stable")] for one in parts]).reshape(batches, together)
    return grouped[np.argsort(grouped.min(1), kind="stable")].reshape(-1)
