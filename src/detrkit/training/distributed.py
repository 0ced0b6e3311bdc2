"""One process or many: `torchrun` starts them, this module is all that knows of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this one's number.
        size: how many they are.
        local_rank: this one's number on its machine, which chooses the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """The one process that writes files and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(value) / self.size

    def mean_of(self, numbers: Sequence[float], device: torch.device) -> Sequence[float]:
        """The means of the numbers of each process; one process alone does not wait for its device."""
        if self.size == 1 or not numbers:
            return numbers
        means: list[float] = self.mean(torch.tensor(numbers, device=device)).tolist()
        return means

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it holds in any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; an empty list in all but the main process."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.is_main else None
        distributed.gather_object(value, gathered)
        return gathered or []

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def share_of(self, items: Sequence[int]) -> Sequence[int]:
        """The items that fall to this process: every `size`-th."""
        return items[self.rank :: self.size]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model, its gradients averaged over all processes."""
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        wrapped.broadcast_buffers = False  # they are constants; the argument of this name is going away
        return wrapped

    @staticmethod
    def apart(model: nn.Module) -> AbstractContextManager[None]:
        """Within it, the gradients of a wrapped model add up in each process, until a backward pass outside of it."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def processors() -> int:
    """How many processors this process may use; a container or a batch system may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that `torchrun` started, and leave them at the end; one process alone joins nothing."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if distributed.is_initialized():  # by the caller, who will leave them, too
        yield World(distributed.get_rank(), distributed.get_world_size(), local_rank)
        return
    if size == 1:
        yield World()
        return
    here = World(int(os.environ["RANK"]), size, local_rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    # The others wait while the main process lets every image through a frozen backbone, once.
    patience = timedelta(hours=4)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    try:
        yield here
        distributed.barrier()  # the main process may still be writing; whoever fails does not wait for the others
    finally:
        distributed.destroy_process_group()
