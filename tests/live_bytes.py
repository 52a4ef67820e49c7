"""Count the bytes of tensors that are alive at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations make while it is active.

    Storages that existed before, such as those of arguments, are left out as long as ``known`` names them.

    Attributes:
        peak: the most bytes of storages made so far that were alive at once, after any operation.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.peak = 0
        # Weak references to storages, whose Python objects may outlive their memory.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known = [StorageWeakRef(tensor.untyped_storage()) for tensor in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._drop()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if all(reference.cdata != known.cdata for known in self._known):
                    self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result

    def alive(self) -> int:
        """Bytes of the storages that are alive."""
        self._drop()
        return sum(size for _, size in self._storages.values())

    def _drop(self) -> None:
        for key in [key for key, (reference, _) in self._storages.items() if reference.expired()]:
            del self._storages[key]
