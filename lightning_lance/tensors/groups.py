"""The batch mode: samples are summed in groups, and the sums turned into a constant direction and contrasts.

Summing costs one pass over the activation and one addition per element, whatever the rank; a product with a matrix
of ``r`` rows takes ``2 r`` operations on each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lance.tensors.tracing import eager_cpu


def batch_matrix(rotation: Tensor, groups: Tensor | None, scale: float = 1.0) -> Tensor:
    """``Φᵀ``, shape ``(r, B)``: a column of the rotation for every sample; the contrasts times ``scale``."""
    rows = rotation if groups is None else rotation.index_select(1, groups)
    if scale != 1.0:
        rows = rows.clone() if groups is None else rows
        rows[1:] *= scale
    return rows


def summed(tensor: Tensor) -> bool:
    """Whether summing groups is exact enough and the faster way.

    Accelerators multiply faster than they add to places in memory, in an order of their own; half precision would be
    rounded at every addition; a compiler fuses the product.
    """
    return eager_cpu(tensor)


def group_sums(tensor: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums over the samples of each group, ``(count, …)`` in the memory format of the tensor."""
    return torch.zeros_like(tensor[:count]).index_add_(0, groups, tensor)
