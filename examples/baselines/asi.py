"""Subspace iteration, one round a step, warm-started from the step before.

Method: Nguyen, Quélennec, Nguyen & Tartaglione, *Beyond Low-rank Decomposition: A Shortcut Approach for Efficient
On-Device Learning* (ASI), ICML 2025. Each mode n has a fixed rank and a basis U; a step replaces the basis by
`orth(X_(n) X_(n)ᵀ U)`, one block power iteration, in place of a singular value decomposition.

The paper chooses the ranks before training, layer by layer, from a table of ranks and gradient errors under a memory
budget. Here the ranks are those of one HOSVD with the same energy for all layers, on the first input, so that the
comparison with per-step HOSVD is one of the decomposition alone; that HOSVD is also the start.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from examples.baselines.hosvd import ENERGY, hosvd_bases
from examples.baselines.per_step import as_factors, install
from lightning_lance.ops.factors import Factors
from lightning_lance.tensors.linalg import mode_product, unfold


def iterate(input: Tensor, basis: Tensor, axis: int) -> Tensor:
    """`orth(X_(n) X_(n)ᵀ U)` for a basis `(n, r)` of mode `axis`, without the Gram matrix of the mode."""
    along = 0 if axis else input.dim() - 1
    found = torch.zeros_like(basis)
    for piece in input.split(max(1, input.shape[along] // 16), dim=along):  # unfolding copies: a piece at a time
        projected = mode_product(piece, basis.T, axis)
        found.addmm_(unfold(piece, axis), unfold(projected, axis).T)
    return torch.linalg.qr(found).Q


class Asi:
    """Follows the leading subspace of each mode from step to step.

    A batch of another size than before starts anew.

    Args:
        energy: fraction of the first input's energy that each mode holds, from which the ranks follow.
    """

    def __init__(self, energy: float = ENERGY) -> None:
        self.energy = energy
        self.shape: torch.Size | None = None
        self.bases: list[Tensor | None] = []

    def __call__(self, input: Tensor, channel_axis: int) -> Factors:
        if input.shape != self.shape:
            self.shape, self.bases = input.shape, hosvd_bases(input, self.energy)
        else:
            self.bases = [
                None if basis is None else iterate(input, basis, axis) for axis, basis in enumerate(self.bases)
            ]
        return as_factors(self.bases, channel_axis)


def install_asi(layers: Iterable[nn.Module], energy: float = ENERGY) -> None:
    """Make convolutions and linear layers keep a Tucker decomposition whose bases follow by subspace iteration."""
    install(layers, lambda: Asi(energy))
