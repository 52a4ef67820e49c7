"""Layers that read one input, such as query, key and value projections, keep one core of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lance.ops.factors import Factors
from lightning_lance.subspaces.subspace import LayerSubspace


class SharedCores:
    """Cores of the inputs that are alive, for the next layer that reads the same tensor. One per model.

    An input is held weakly and its cores go with it; a new tensor at its address is never mistaken for it.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def recall(self, input: Tensor, subspace: LayerSubspace, channel_axis: int) -> tuple[Tensor, Factors] | None:
        """Factors and core of this very tensor, unwritten since, in this subspace; else ``None``."""
        seen = self._seen.get(id(input))
        if seen is None or seen.input() is not input or seen.version != _version(input):
            return None
        return next(((core, f) for own, axis, core, f in seen.cores if own is subspace and axis == channel_axis), None)

    def remember(
        self, input: Tensor, subspace: LayerSubspace, channel_axis: int, core: Tensor, factors: Factors
    ) -> None:
        """Keep the factors and the core of an input as long as it lives."""
        key, found = id(input), self._seen
        seen = found.get(key)
        if seen is None or seen.input() is not input or seen.version != _version(input):
            seen = found[key] = _Seen(weakref.ref(input, lambda _: found.pop(key, None)), _version(input), [])
        seen.cores.append((subspace, channel_axis, core, factors))

    def __reduce__(self) -> Any:
        return SharedCores, ()  # a copied or pickled model starts with none


class _Seen(NamedTuple):
    """One input: a weak reference, its version when it was compressed, and its cores by subspace and channel axis."""

    input: Any
    version: int
    cores: list[tuple[LayerSubspace, int, Tensor, Factors]]


def _version(tensor: Tensor) -> int:
    return -2 if tensor.is_inference() else tensor._version


def link(layers: Iterable[Any]) -> None:
    """Let compressed layers with equal factors share them, and the core of an input that they share.

    Layers that read one input have equal statistics, so that equal rank rules give equal factors.

    Args:
        layers: compressed layers, calibrated or not.
    """
    buckets: dict[Any, list[list[Any]]] = {}
    shared: SharedCores | None = None
    for layer in layers:
        state = layer._lance
        shared = shared or state.shared
        state.shared = None
        if state.subspace is None:
            continue
        alike = buckets.setdefault(_signature(state.subspace), [])
        group = next((found for found in alike if _equal(found[0]._lance.subspace, state.subspace)), None)
        if group is None:
            alike.append([layer])
        else:
            group.append(layer)
    shared = shared or SharedCores()
    for group in (group for alike in buckets.values() for group in alike if len(group) > 1):
        for layer in group:
            layer._lance.subspace = group[0]._lance.subspace
            layer._lance.shared = shared


def _signature(subspace: LayerSubspace) -> Any:
    shapes = tuple(factor.shape for factor in subspace.factors())
    return (
        subspace.batch,
        subspace.bits,
        subspace.channel is None,
        shapes,
        frozenset(subspace.spatial),
        subspace.any_size,
    )


def _equal(one: LayerSubspace, other: LayerSubspace) -> bool:
    pairs = zip(one.factors(), other.factors(), strict=True)
    return one.spatial.keys() == other.spatial.keys() and all(torch.equal(a, b) for a, b in pairs)
