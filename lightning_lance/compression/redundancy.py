"""Find compressed layers whose input autograd keeps anyway, for another operation: a core would only add to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.layers.compressed import Compressed


class _Inputs:
    """Observer that identifies the storages of the inputs that a layer compresses, and keeps none of them."""

    def __init__(self, layer: Compressed) -> None:
        self.layer = layer
        self.storages: list[Any] = []

    def update(self, input: Tensor) -> None:
        subspace, sizes = self.layer._lance.subspace, self.layer.sizes(input)
        known = subspace is not None and subspace.spatial_factors(sizes) is not None
        if known and subspace.shrinks(input.shape[0], input.shape[self.layer.channel_axis], sizes):  # type: ignore[union-attr]
            self.storages.append(_storage(input))


class _Item:
    """Stands in the graph for a saved tensor; alive as long as autograd keeps it."""

    __slots__ = ("__weakref__", "shape", "storage")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.storage = _storage(tensor)


def _storage(tensor: Tensor) -> Any:
    # Weak, so that nothing is kept; its address stays unique as long as the reference lives.
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def kept_anyway(run: Callable[[], Any], layers: Mapping[str, Compressed]) -> list[str]:
    """Names of the layers every input of which stays in memory for the backward pass of another operation.

    Attention keeps its output, which the projection after it reads; sigmoid and softmax keep theirs; a layer that is
    not compressed keeps an input that it shares with others. The gradient of such a layer may as well be exact.

    Args:
        run: a forward pass with gradients, which returns the loss or outputs.
        layers: calibrated layers of the model that it runs.
    """
    inputs = {name: _Inputs(layer) for name, layer in layers.items()}
    items: list[weakref.ref[_Item]] = []

    def pack(tensor: Tensor) -> _Item:
        item = _Item(tensor)
        items.append(weakref.ref(item))
        return item

    def unpack(item: _Item) -> Tensor:
        return torch.empty(item.shape, device="meta")

    for name, layer in layers.items():
        layer._lance.observer = inputs[name]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            result = run()
    finally:
        for layer in layers.values():
            layer._lance.observer = None
    kept = {item.storage.cdata for reference in items if (item := reference()) is not None}
    del result
    return [name for name, seen in inputs.items() if seen.storages and all(s.cdata in kept for s in seen.storages)]
