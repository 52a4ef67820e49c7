"""Count the bytes of tensors that are alive at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations make while it is active.

    Storages that existed before, such as those of arguments, are left out as long as ``known`` names them.

    Attributes:
        live: bytes of the storages made so far that are still alive.
        peak: the most that were alive at once.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.finalize[Any, Any]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._keep = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._track(leaf)
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self.live -= size


def storages_die(make: Any) -> bool:
    """Whether the storage of what ``make`` returns is freed with its last reference."""
    made = make()
    reference = torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage())
    del made
    return bool(reference.expired())
