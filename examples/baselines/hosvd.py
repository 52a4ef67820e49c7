"""HOSVD of every activation at every step.

Method: Nguyen, Quélennec, Tartaglione, Tardieu & Nguyen, *Activation Map Compression through Tensor Decomposition for
Deep Learning*, NeurIPS 2024. Every mode of the input, the batch included, is cut to the smallest rank whose singular
values hold a fraction ε of the energy; the weight gradient is computed from core and factors.

The left singular vectors come from the Gram matrix of each unfolding, which costs less time and memory than the
singular value decomposition of the unfolding itself and spans the same subspace.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from examples.baselines.per_step import as_factors, install
from lightning_lance.ops.factors import Factors
from lightning_lance.subspaces.subspace import Spectrum
from lightning_lance.tensors.gram import GramMatrix

ENERGY = 0.8
"""Explained variance that each mode holds, unless another is asked for."""


def hosvd_bases(input: Tensor, energy: float) -> list[Tensor | None]:
    """Orthonormal basis `(n, r)` of each mode, `None` where the energy rule keeps it whole."""
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    bases: list[Tensor | None] = []
    for axis, size in enumerate(input.shape):
        if energy >= 1.0 or size == 1:
            bases.append(None)
            continue
        gram = GramMatrix(size, accumulate, input.device)
        gram.update(input, axis)
        values, vectors = gram.eigh()
        bases.append(Spectrum(values, vectors, gram.trace).truncate(energy, input.dtype, input.device)[0])
    return bases


class Hosvd:
    """Decomposes each input by itself.

    Args:
        energy: fraction of the energy that each mode holds; 1 keeps every mode whole.
    """

    def __init__(self, energy: float = ENERGY) -> None:
        self.energy = energy

    def __call__(self, input: Tensor, channel_axis: int) -> Factors:
        return as_factors(hosvd_bases(input, self.energy), channel_axis)


def install_hosvd(layers: Iterable[nn.Module], energy: float = ENERGY) -> None:
    """Make convolutions and linear layers keep the HOSVD of their input."""
    install(layers, lambda: Hosvd(energy))
