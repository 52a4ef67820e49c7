"""Multilinear algebra on plain tensors: unfoldings, mode products, bases and the energy rule.

Notation follows Kolda & Bader, *Tensor Decompositions and Applications*, SIAM Review 51(3), 2009:
a *mode* is one axis of a tensor, ``X_(n)`` its mode-n unfolding, ``X ×_n A`` the mode-n product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lance.tensors.cached import constant


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding ``X_(n)`` (Kolda & Bader, section 2.4, columns in C order).

    Args:
        tensor: shape ``(n_0, ..., n_{N-1})``.
        mode: the axis that becomes the rows; may be negative.

    Returns:
        Matrix of shape ``(n_mode, numel / n_mode)``, a view where the strides allow it.
    """
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Mode-n product ``X ×_n A`` (Kolda & Bader, eq. 2.5), as one (batched) matrix product.

    In a channels-last format, where mode 1 is innermost, it is computed and returned in that format, without a copy. A
    compiler, which finds formats by itself, is not asked: up to 2.6 it refuses to tell in a backward pass.

    Args:
        tensor: shape ``(..., n_mode, ...)``.
        matrix: shape ``(m, n_mode)``; pass ``factor.T`` to project on a factor of shape ``(n_mode, r)``.
        mode: the contracted axis; may be negative.

    Returns:
        Tensor whose axis ``mode`` has ``m`` entries.
    """
    mode %= tensor.dim()
    if tensor.dim() > 2 and not torch.compiler.is_compiling() and not tensor.is_contiguous():
        last = tensor.movedim(1, -1)
        if last.is_contiguous():
            inner = -1 if mode == 1 else max(mode - 1, 0)
            return mode_product(last, matrix, inner).movedim(-1, 1)
    before, after = tensor.shape[:mode], tensor.shape[mode + 1 :]
    if not after:
        return tensor @ matrix.transpose(0, 1)
    if mode == 0:
        return (matrix @ tensor.reshape(tensor.shape[0], math.prod(after))).reshape(matrix.shape[0], *after)
    product = matrix @ tensor.reshape(math.prod(before), tensor.shape[mode], math.prod(after))
    return product.reshape(*before, matrix.shape[0], *after)


SMALL_MAP = 64
"""Positions of a map, up to which projecting both of its axes at once is faster."""


def mode_products(
    tensor: Tensor, matrices: Sequence[Tensor | None], first: int, *others: tuple[Tensor | None, int]
) -> Tensor:
    """Products with neighbouring modes, ``X ×_first A_1 ×_(first+1) A_2 …``, and then with others.

    The last two modes of a small map are one mode for the Kronecker product of their matrices (Kolda & Bader, section
    2.6): more arithmetic, in a matrix product that is large enough to be fast.

    Args:
        tensor: shape ``(..., n_first, n_(first+1), ...)``.
        matrices: shapes ``(m, n)``; ``None`` leaves a mode as it is.
        first: mode of the first one, not negative.
        others: a matrix, or ``None``, and its mode.
    """
    small = len(matrices) == 2 and first + 2 == tensor.dim() and not torch.compiler.is_compiling()
    if small and tensor.is_contiguous():
        one, other = matrices
        rows, columns = tensor.shape[first:]
        if one is not None and other is not None and rows * columns <= SMALL_MAP:
            both = one[:, None, :, None] * other[None, :, None, :]
            both = both.reshape(one.shape[0] * other.shape[0], rows * columns)
            tensor = (tensor.flatten(first) @ both.T).view(*tensor.shape[:first], one.shape[0], other.shape[0])
            matrices = ()
    neighbours = [(matrix, first + offset) for offset, matrix in enumerate(matrices)]
    for matrix, mode in (*neighbours, *others):
        if matrix is not None:
            tensor = mode_product(tensor, matrix, mode)
    return tensor


@constant
def sample_groups(size: int, count: int, device: torch.device) -> Tensor:
    """Group of each sample: ``count`` runs of neighbours, as equal as can be.

    Args:
        size: number ``B`` of samples.
        count: number ``1 <= r <= B`` of groups.
        device: device of the result.

    Returns:
        int32 of shape ``(B,)``, from 0 to ``count - 1``; shared with other callers.
    """
    groups = torch.arange(size, device="cpu").mul_(count).div_(size, rounding_mode="floor")
    return groups.to(device=device, dtype=torch.int32)


@constant
def group_rotation(size: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix ``T`` that turns the sums over :func:`sample_groups` into coefficients in an orthonormal basis.

    With the indicators of the groups in the columns of ``Z``, the basis is ``Φ = Z Tᵀ``: its first column is constant
    and the others are contrasts, which sum to zero. Dividing by the square roots of the group sizes makes the columns
    of ``Z`` orthonormal, and a Householder reflection brings the constant vector, which they span, to the front.

    Args:
        size: number ``B`` of samples.
        count: number ``1 <= r <= B`` of groups.
        dtype: dtype of the result; it is computed in float64.
        device: device of the result.

    Returns:
        Contiguous tensor of shape ``(r, r)``; shared with other callers.
    """
    sizes = [-(-size * (k + 1) // count) - -(-size * k // count) for k in range(count)]
    root = torch.tensor(sizes, dtype=torch.float64, device="cpu").sqrt_()
    rotation = torch.eye(count, dtype=torch.float64, device="cpu")
    if count > 1:
        mirror = root / math.sqrt(size)
        mirror[0] -= 1.0
        rotation -= torch.outer(mirror, mirror).mul_(2.0 / mirror.dot(mirror))
    return rotation.div_(root).to(device=device, dtype=dtype)


def contrast_scale(size: int, columns: int) -> float:
    r"""Weight :math:`(B-1)/(r-1)` of the contrasts that makes the batch mode unbiased.

    Over a uniformly random order of the samples, every contrast of norm 1 has
    :math:`E[\phi\phi^T] = (I - 11^T/B)/(B-1)`, so that the constant column plus the others
    weighted by this number has expectation ``I``.
    """
    return 1.0 if columns >= size else (size - 1) / (columns - 1)


def symmetric_eigh(gram: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of a Gram matrix, eigenvalues in descending order and never negative.

    Args:
        gram: symmetric positive semi-definite, shape ``(n, n)``. Computed on the CPU, where the solver is the same on
            every machine of a distributed run.
        dtype: precision; float32 takes half the time and is off by ``1e-7`` of the largest eigenvalue.

    Returns:
        ``(eigenvalues (n,), eigenvectors (n, n))`` of that dtype, on the CPU.
    """
    values, vectors = torch.linalg.eigh(gram.detach().to("cpu", dtype))
    return values.flip(0).clamp_(min=0.0), vectors.flip(1)


def energy_rank(eigenvalues: Tensor, total: float, energy: float) -> int:
    """Smallest rank whose leading eigenvalues hold more than ``energy`` of ``total``.

    Args:
        eigenvalues: shape ``(n,)``, descending.
        total: the trace, which may exceed the sum where only leading eigenvalues are known.
        energy: fraction in (0, 1]; 1 asks for every direction.

    Returns:
        Rank between 1 and ``n``; ``n`` where even all of them hold less.
    """
    if energy >= 1.0:
        return eigenvalues.numel()
    reached = torch.cumsum(eigenvalues, 0) > energy * total
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else eigenvalues.numel()


def orthonormalize(columns: Tensor, against: Tensor | None = None) -> Tensor:
    """Orthonormal basis of the columns, orthogonal to ``against`` to machine precision.

    Two rounds of projection and QR ("twice is enough", Giraud, Langou & Rozloznik, 2005); columns that a projection has
    left orthonormal need no QR.

    Args:
        columns: shape ``(n, r)``, of full column rank.
        against: optional orthonormal basis of shape ``(n, m)``.
    """
    for _ in range(2):
        if against is not None:
            columns = columns - against @ (against.T @ columns)
        products = columns.T @ columns
        products.diagonal().sub_(1.0)
        allowed = max(16, columns.shape[1]) * torch.finfo(columns.dtype).eps
        if products.numel() and float(products.abs().max()) > allowed:
            columns = torch.linalg.qr(columns).Q
    return columns


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """``X (I - M Mᵀ)``: the part of row vectors outside of a basis.

    Args:
        rows: ``(..., n, K)``, such as a weight gradient.
        basis: orthonormal, ``(..., K, m)``.
    """
    return rows - (rows @ basis) @ basis.mT
