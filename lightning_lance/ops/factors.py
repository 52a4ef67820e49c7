"""The factors of one call, and the projections that forward and backward share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_lance.linalg import mode_product


class Factors(NamedTuple):
    """Everything that defines the projection of one input.

    Attributes:
        basis: cosine basis ``(B, r)``, shared by all layers, or ``None``: the batch mode is kept whole.
        order: permutation ``(B,)`` of the samples, int32, or ``None``: the order they came in.
        scale: weight of the non-constant columns in the weight gradient.
        channel: ``(C, r)`` or ``None``.
        spatial: ``(n, r)`` or ``None`` for each spatial or token axis.
        bits: of an element of the core; ``None``: it is kept as it is.
    """

    basis: Tensor | None
    order: Tensor | None
    scale: float
    channel: Tensor | None
    spatial: tuple[Tensor | None, ...]
    bits: int | None = None


def batch_matrix(basis: Tensor, order: Tensor | None, scale: float = 1.0) -> Tensor:
    """``(r, B)`` rows that project a batch, in the drawn order; the non-constant ones times ``scale``."""
    rows = basis if order is None else basis.index_select(0, order)
    if scale != 1.0:
        rows = rows.clone() if order is None else rows
        rows[:, 1:] *= scale
    return rows.transpose(0, 1)


def batch_product(matrix: Tensor, tensor: Tensor) -> Tensor:
    """``X ×_0 A`` as one matrix product that reads the tensor once, in either memory format."""
    if tensor.dim() > 2 and not tensor.is_contiguous():
        last = tensor.movedim(1, -1)
        if last.is_contiguous():
            return mode_product(last, matrix, 0).movedim(-1, 1)
    return mode_product(tensor, matrix, 0)


def compress(input: Tensor, factors: Factors, channel_axis: int, first_spatial: int) -> Tensor:
    """Core ``G = X ×_0 Φᵀ ×_c U_cᵀ ×_s U_sᵀ …`` (LANCE, arXiv 2509.21617, eq. for the Tucker core).

    The batch mode goes first: it shrinks the tensor most, in one pass over the activation; what follows
    works on ``r / B`` of it.

    Args:
        input: activation, axis 0 the batch.
        factors: projections.
        channel_axis: axis of the channel or feature mode.
        first_spatial: axis of the first spatial or token mode.

    Returns:
        The core; the input itself where no mode is truncated.
    """
    core = input
    if factors.basis is not None:
        core = batch_product(batch_matrix(factors.basis, factors.order).to(input.dtype), core)
    for offset, factor in enumerate(factors.spatial):
        if factor is not None:
            core = mode_product(core, factor.to(input.dtype).T, first_spatial + offset)
    if factors.channel is not None:
        core = mode_product(core, factors.channel.to(input.dtype).T, channel_axis)
    return core


def project_gradient(grad: Tensor, basis: Tensor | None, order: Tensor | None, scale: float) -> Tensor:
    """``Φᵀ g`` with the unbiased weights; the gradient itself where the batch mode is whole."""
    if basis is None:
        return grad
    return batch_product(batch_matrix(basis, order, scale).to(grad.dtype), grad)
