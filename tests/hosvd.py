"""HOSVD of stacked calibration batches by tensorly's unfoldings and numpy's SVD, to compare subspaces with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

tensorly.set_backend("numpy")


def hosvd(inputs: Sequence[Tensor], energy: float | Sequence[float | None]) -> list[np.ndarray | None]:
    """Factors of every mode of batches that are stacked along one more axis; ``None`` for a mode without an energy.

    A mode has the fewest singular vectors whose squared singular values hold strictly more than its energy.
    """
    stack = torch.stack(list(inputs), -1).double().numpy()
    energies = [energy] * (stack.ndim - 1) if isinstance(energy, float) else list(energy)
    found: list[np.ndarray | None] = []
    for mode, wanted in enumerate(energies):
        if wanted is None:
            found.append(None)
            continue
        vectors, values, _ = np.linalg.svd(tensorly.unfold(stack, mode), full_matrices=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        found.append(vectors[:, : int(np.argmax(share > wanted)) + 1])
    return found


def projected(input: Tensor, bases: Sequence[np.ndarray | None]) -> Tensor:
    """``X ×₀ U₀U₀ᵀ ×₁ U₁U₁ᵀ …`` in float64."""
    modes = [mode for mode, basis in enumerate(bases) if basis is not None]
    matrices = [basis @ basis.T for basis in bases if basis is not None]
    values = input.detach().double().numpy()
    return torch.from_numpy(np.ascontiguousarray(multi_mode_dot(values, matrices, modes) if modes else values))


def assert_same_factor(found: Tensor, basis: np.ndarray, tolerance: float) -> None:
    """The same columns but for their signs."""
    assert tuple(found.shape) == basis.shape  # the rank
    products = found.double().numpy().T @ basis
    assert np.abs(np.abs(products) - np.eye(len(products))).max() < tolerance
