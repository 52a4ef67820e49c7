"""What every layer that compresses its input shares: its state, and the factors of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_lance.layers.registry import Variant
from lightning_lance.layers.sharing import SharedCores
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.saving import OurRule, saving
from lightning_lance.ops.watching import unwatched
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import LayerSubspace, Sizes
from lightning_lance.tensors.orders import SampleOrder


class Observer(Protocol):
    """Sees every input of a layer in a forward pass."""

    def update(self, input: Tensor, /) -> None: ...


@dataclass
class LayerState:
    """State of one compressed layer, in the module's ``__dict__`` and never in its buffers.

    Attributes:
        name: qualified name of the module.
        selected: whether its input is to be projected.
        ranks: rank rules.
        unbiased: whether the batch mode is estimated without bias.
        order: source of sample orders, shared by the layers of a model.
        subspace: factors; ``None`` until calibrated, and the stock path runs.
        observer: collects statistics of the inputs, during calibration or refresh.
        shared: cores of living inputs, where other layers may read the same one.
        learned: whether the batch mode gets a factor of its own.
    """

    name: str
    selected: bool
    ranks: ModeRanks
    unbiased: bool
    order: SampleOrder
    subspace: LayerSubspace | None = None
    observer: Observer | None = None
    shared: SharedCores | None = None
    learned: bool = False

    def factors(self, input: Tensor, sizes: Sizes, channels: int) -> Factors | None:
        """Factors for one input, or ``None`` where the stock path must run."""
        subspace = self.subspace
        if subspace is None:
            return None
        spatial = subspace.spatial_factors(sizes)
        if spatial is None:
            return None
        size = input.shape[0]
        if not subspace.shrinks(size, channels, sizes):
            return None
        rotation, groups = subspace.batch.projection(size, input.dtype, input.device, self.order)
        if rotation is None:
            return Factors(None, None, 1.0, subspace.channel, spatial)
        scale = subspace.batch.contrast_scale(size)
        return Factors(rotation, groups, scale, subspace.channel, spatial)


class Compressed(Variant):
    """Base of the variants that keep a core of their input.

    Attributes:
        channel_axis: 1 for convolutions, -1 for linear layers.
    """

    channel_axis: ClassVar[int]
    _lance: LayerState

    @staticmethod
    def sizes(input: Tensor) -> Sizes:
        """Spatial or token sizes of an input."""
        raise NotImplementedError

    def lance_work(self) -> float:
        """Multiply-adds of the forward pass on each element of an input."""
        raise NotImplementedError

    def lance_observe(self, input: Tensor) -> None:
        """Show an input to the observer, if there is one."""
        if self._lance.observer is not None:
            _observe(self._lance.observer, input)

    def lance_factors(self, input: Tensor) -> Factors | None:
        """Factors for a call, or ``None`` where the stock path must run."""
        return self._lance.factors(input, self.sizes(input), input.shape[self.channel_axis])

    @unwatched
    def lance_core(self, input: Tensor) -> tuple[Tensor, Factors] | None:
        """Core of an input and the factors that made it, which other layers of the same input share; or ``None``."""
        shared = None if torch.compiler.is_compiling() else self._lance.shared
        axis = self.channel_axis % input.dim()
        subspace = self._lance.subspace
        found = None if shared is None or subspace is None else shared.recall(input, subspace, axis)
        if found is not None:
            return found
        factors = self.lance_factors(input)
        if factors is None:
            return None
        with torch.no_grad():
            core = compress(input, factors, axis, 2 if axis == 1 and self.channel_axis == 1 else 1)
        if shared is not None and subspace is not None:
            shared.remember(input, subspace, axis, core, factors)
        return core, factors

    @unwatched
    def lance_run(self, operator: Callable[..., Tensor], input: Tensor, factors: Factors, *arguments: Any) -> Tensor:
        """Run one of our operators; what it keeps of its input goes through the store, if one is there."""
        if torch.compiler.is_compiling() or saving.store is None:
            return operator(input, *arguments)
        saving.store.instead_of(input, self._lance.name)
        before = saving.rule, saving.name
        saving.rule, saving.name = _CoreRule(factors), operator.__name__
        try:
            return operator(input, *arguments)
        finally:
            saving.rule, saving.name = before


@unwatched
def _observe(observer: Observer, input: Tensor) -> None:
    observer.update(input)


class _CoreRule(OurRule):
    """Of an operator of ours: its core is kept for the weight's gradient alone, and factors stay as they are."""

    __slots__ = ("whole",)

    def __init__(self, factors: Factors) -> None:
        tensors = (factors.rotation, factors.groups, factors.channel, *factors.spatial)
        self.whole = {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}

    def __call__(self, saved: Tensor, store: Any) -> Any:
        if not saved.is_floating_point() or saved.untyped_storage()._cdata in self.whole:
            return saved.detach()  # another object, which a ledger counts
        return store.rounded(saved, store.bits.weight)
