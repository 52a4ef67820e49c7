"""The factors of one call, and the projections that forward and backward share.

Samples are summed in groups, and the sums turned into a constant direction and contrasts. Summing costs one pass over
the activation and one addition per element, whatever the rank; a product with a matrix of ``r`` rows takes ``2 r``
operations on each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

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


def batch_matrix(rotation: Tensor, groups: Tensor | None, scale: float = 1.0) -> Tensor:
    """``Φᵀ``, shape ``(r, B)``: a column of the rotation for every sample; the contrasts times ``scale``."""
    rows = rotation if groups is None else rotation.index_select(1, groups)
    if scale != 1.0:
        rows = rows.clone() if groups is None else rows
        rows[1:] *= scale
    return rows


def eager_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU, in full precision, and not traced.

    Several operations have a faster way there than the one that suits every device: memory is close and arithmetic
    dear, sums are made in a fixed order, and what is small need not be large to fill the machine.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return plain and tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64)


def summed(tensor: Tensor) -> bool:
    """Whether summing groups is exact enough and the faster way.

    Accelerators multiply faster than they add to places in memory, in an order of their own; half precision would be
    rounded at every addition; a compiler fuses the product.
    """
    return eager_cpu(tensor)


def group_sums(tensor: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums over the samples of each group, ``(count, …)`` in the memory format of the tensor."""
    return torch.zeros_like(tensor[:count]).index_add_(0, groups, tensor)


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
    channel = None if factors.channel is None else factors.channel.to(input.dtype).T
    return mode_products(core, spatial, first_spatial, (channel, channel_axis), (late, 0))


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
