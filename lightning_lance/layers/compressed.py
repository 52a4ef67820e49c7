"""What every layer that compresses its input shares: its state, and the factors of a call."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lightning_lance.errors import LanceWarning
from lightning_lance.layers.registry import Variant
from lightning_lance.layers.sharing import SharedCores
from lightning_lance.ops.core import Core, keep_input
from lightning_lance.ops.factors import Factors
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import LayerSubspace, Sizes
from lightning_lance.tensors.linalg import group_rotation, sample_groups
from lightning_lance.tensors.orders import SampleOrder


class Observer(Protocol):
    """Sees every input of a layer in a forward pass."""

    def update(self, input: Tensor, /) -> None: ...


@dataclass
class LayerState:
    """State of one compressed layer, in the module's ``__dict__`` and never in its buffers.

    Attributes:
        name: qualified name of the module.
        selected: whether its input is to be compressed; a frozen convolution only stops keeping it.
        ranks: rank rules.
        unbiased: whether the batch mode is estimated without bias.
        bits: of an element of a core; ``None``: as it is.
        order: source of sample orders, shared by the layers of a model.
        subspace: factors; ``None`` until calibrated, and the stock path runs.
        observer: collects statistics of the inputs, during calibration or refresh.
        unknown_sizes: spatial sizes that were met without factors, each warned about once.
        shared: cores of living inputs, where other layers may read the same one.
    """

    name: str
    selected: bool
    ranks: ModeRanks
    unbiased: bool
    order: SampleOrder
    bits: int | None = None
    subspace: LayerSubspace | None = None
    observer: Observer | None = None
    unknown_sizes: set[Sizes] = field(default_factory=set)
    shared: SharedCores | None = None

    def factors(self, input: Tensor, sizes: Sizes, channels: int) -> Factors | None:
        """Factors for one input, or ``None`` where the stock path must run."""
        subspace = self.subspace
        if subspace is None:
            return None
        spatial = subspace.spatial_factors(sizes)
        if spatial is None:
            self._warn_once(sizes)
            return None
        size = input.shape[0]
        if not subspace.shrinks(size, channels, sizes):
            return None
        columns = subspace.batch.columns(size)
        if columns >= size:
            return Factors(None, None, 1.0, subspace.channel, spatial, subspace.bits)
        rotation = group_rotation(size, columns, input.dtype, input.device)
        groups = sample_groups(size, columns, input.device)
        if subspace.batch.unbiased:
            groups = groups.index_select(0, self.order.draw(size, input.device))
        scale = subspace.batch.contrast_scale(size)
        return Factors(rotation, groups, scale, subspace.channel, spatial, subspace.bits)

    def _warn_once(self, sizes: Sizes) -> None:
        if sizes in self.unknown_sizes:
            return
        self.unknown_sizes.add(sizes)
        assert self.subspace is not None
        known = ", ".join(map(_text, self.subspace.spatial))
        warnings.warn(
            f"{self.name or 'the model'}: an input of size {_text(sizes)} came, calibration saw {known}. It is kept "
            "whole for such calls. Let the calibration batches hold every size, or set rank={'spatial': 'full', ...}.",
            LanceWarning,
            stacklevel=2,
        )


def _text(sizes: Sizes) -> str:
    return "x".join(map(str, sizes)) or "()"


class Compressed(Variant):
    """Base of the variants that keep a core of their input.

    Attributes:
        channel_axis: 1 for convolutions, -1 for linear layers.
    """

    compresses: ClassVar[bool] = True
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
            self._lance.observer.update(input)

    def lance_factors(self, input: Tensor) -> Factors | None:
        """Factors for a call, or ``None`` where the stock path must run."""
        return self._lance.factors(input, self.sizes(input), input.shape[self.channel_axis])

    def lance_kept(self, input: Tensor) -> tuple[Factors, Core | None] | None:
        """Factors for a call, with the core where other layers read the same input; ``None``: the stock path."""
        shared = self._lance.shared
        if shared is None or torch.compiler.is_compiling():
            factors = self.lance_factors(input)
            return None if factors is None else (factors, None)
        subspace = self._lance.subspace
        assert subspace is not None
        kept = shared.recall(input, subspace, self.channel_axis)
        if kept is None:
            factors = self.lance_factors(input)
            if factors is None:
                return None
            with torch.no_grad():
                axis = self.channel_axis % input.dim()
                kept = factors, keep_input(input, factors, axis, 2 if self.channel_axis == 1 else 1)
            shared.remember(input, subspace, self.channel_axis, *kept)
        return kept
