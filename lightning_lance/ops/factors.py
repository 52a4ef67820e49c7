"""The factors of one call, and the projections that forward and backward share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_lance.tensors.groups import batch_matrix, group_sums, summed
from lightning_lance.tensors.linalg import mode_product, mode_products


class Factors(NamedTuple):
    """Everything that defines the projection of one input.

    Attributes:
        rotation: ``(r, r)``, sums over groups of samples to coefficients, shared by all layers, or ``None``: the batch
            mode is kept whole. Or ``(r, B)`` without groups: any orthonormal rows.
        groups: group ``(B,)`` of each sample, int32, or ``None``.
        scale: weight of the contrasts, which are all coefficients but the first, in the weight gradient.
        channel: ``(C, r)`` or ``None``.
        spatial: ``(n, r)`` or ``None`` for each spatial or token axis.
    """

    rotation: Tensor | None
    groups: Tensor | None
    scale: float
    channel: Tensor | None
    spatial: tuple[Tensor | None, ...]


WHOLE = Factors(None, None, 1.0, None, ())
"""Of an input that is not projected."""


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
    core, late = input, None
    if factors.rotation is not None:
        if factors.groups is not None and summed(input):
            late = factors.rotation.to(input.dtype)  # the other modes first: they make what is rotated smaller
            core = group_sums(input, factors.groups, late.shape[0])
        else:
            core = mode_product(core, batch_matrix(factors.rotation, factors.groups).to(input.dtype), 0)
    spatial = [None if factor is None else factor.to(input.dtype).T for factor in factors.spatial]
    core = mode_products(core, spatial, first_spatial)
    if factors.channel is not None:
        core = mode_product(core, factors.channel.to(input.dtype).T, channel_axis)
    return core if late is None else mode_product(core, late, 0)


def project_gradient(grad: Tensor, core: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Gradient and core with batch modes of length ``r`` whose contraction has the unbiased weights.

    Args:
        grad: ``(B, …)``.
        core: ``(r, …)``, as :func:`compress` made it.
        factors: its projections.

    Returns:
        ``(r, …)`` each; both as they are where the batch mode is whole.
    """
    rotation, groups, scale = factors.rotation, factors.groups, factors.scale
    if rotation is None:
        return grad, core
    if groups is None or not summed(grad):
        return mode_product(grad, batch_matrix(rotation, groups, scale).to(grad.dtype), 0), core
    sums = group_sums(grad, groups, rotation.shape[0])
    weighted = rotation.to(grad.dtype, copy=True)
    weighted[1:] *= scale
    if core.numel() <= sums.numel():
        return sums, mode_product(core, weighted.T, 0)
    return mode_product(sums, weighted, 0), core
