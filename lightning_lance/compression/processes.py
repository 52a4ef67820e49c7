"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Processes that train one model; every one of them calls the same methods in the same order.

    Attributes:
        count: of them, all in the default group of :mod:`torch.distributed`; 1: this process is alone.
        rank: number of this one.
    """

    count: int = 1
    rank: int = 0

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, found: Any) -> list[Any]:
        """The objects of all processes, in the order of their ranks."""
        gathered = [found] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(gathered, found)
        return gathered

    def first(self, found: Any) -> Any:
        """The object of process 0, on every process."""
        handed = [found]
        if self.count > 1:
            torch.distributed.broadcast_object_list(handed, src=0)
        return handed[0]
