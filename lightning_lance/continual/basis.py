"""Protected and reserved bases of one layer's feature side, on plain tensors.

Growing a basis by an energy threshold follows Saha, Garg & Roy, *Gradient Projection Memory for Continual Learning*,
ICLR 2021, eq. 8 and 9, with second moments in place of the sample matrix. Bases and spectra are computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.tensors.linalg import energy_rank, orthonormalize, symmetric_eigh


class UpTo(NamedTuple):
    """As many directions as together with the protected ones hold more than a fraction of the energy."""

    threshold: float


class Moments(NamedTuple):
    """Second moments ``S`` of feature vectors, whole or as a root.

    Attributes:
        matrix: ``S`` itself, shape ``(K, K)``, or a root ``F`` with ``S = F Fᵀ``, shape ``(K, k)``.
        is_root: which of them.
        total: the trace of ``S``; may exceed that of ``F Fᵀ`` where only leading directions are known.
    """

    matrix: Tensor
    is_root: bool
    total: float

    @classmethod
    def of(cls, gram: Tensor | Moments) -> Moments:
        """Moments of a Gram matrix ``(K, K)``."""
        return gram if isinstance(gram, Moments) else cls(gram, False, float(gram.diagonal().double().sum()))


class Residual(NamedTuple):
    """What of the moments lies outside of a basis.

    Attributes:
        values: energies of the directions, descending, shape ``(k,)``; those that are only rounding are left out.
        rotation: the directions, shape ``(K, k)``; or in the columns of ``root``, shape ``(n, k)``.
        root: ``F`` outside of the basis, shape ``(K, n)``, where the moments are a root; else ``None``.
        held: energy inside of the basis.
        total: all energy.
    """

    values: Tensor
    rotation: Tensor
    root: Tensor | None
    held: float
    total: float

    def without(self, count: int) -> Residual:
        """The same but for the leading directions, which the basis is enlarged by."""
        held = self.held + float(self.values[:count].sum())
        return self._replace(values=self.values[count:], rotation=self.rotation[:, count:], held=held)

    def vectors(self, count: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """The leading directions, or all of them: shape ``(K, count)``."""
        if self.root is None:
            return self.rotation[:, :count].to(dtype)
        scale = self.values[:count].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        return self.root.to(dtype) @ (self.rotation[:, :count] / scale).to(dtype)


class Split(NamedTuple):
    """Moments next to an orthonormal basis, on the CPU: a Gram matrix in float64, a root in its own precision.

    Attributes:
        moments: whole or as a root.
        matrix: of the moments.
        basis: ``(K, m)``.
        crossed: ``S M``, shape ``(K, m)``; of a root ``Mᵀ F``, shape ``(m, k)``.
        held: energy inside of the basis, ``tr(Mᵀ S M)``.
    """

    moments: Moments
    matrix: Tensor
    basis: Tensor
    crossed: Tensor
    held: float


def split(gram: Tensor | Moments, basis: Tensor) -> Split:
    """What of the moments lies inside of an orthonormal basis ``(K, m)``; ``m`` may be 0.

    The squares of a root's rounding are far below what counts as energy, so that it stays in its precision.
    """
    moments = Moments.of(gram)
    if moments.is_root:
        matrix = moments.matrix.detach().cpu()
        basis = basis.detach().to(matrix)
        crossed = basis.T @ matrix
        return Split(moments, matrix, basis, crossed, float(crossed.square().sum(dtype=torch.float64)))
    matrix, basis = as_double(moments.matrix), as_double(basis)
    crossed = matrix @ basis
    return Split(moments, matrix, basis, crossed, float((basis * crossed).sum()))


def residual(found: Split) -> Residual:
    """Spectrum of moments in the complement of a basis."""
    moments, matrix, basis, crossed, held = found
    root = None
    if moments.is_root:
        root = matrix - basis @ crossed
        double = root.double()
        values, rotation = symmetric_eigh(double.T @ double)
    else:
        outside = matrix - crossed @ basis.T
        outside = outside - basis @ (basis.T @ outside)
        values, rotation = symmetric_eigh((outside + outside.T) / 2)
    # float32 sums carry noise of this size; a direction below it is no direction of the data.
    floor = moments.total * torch.finfo(torch.float32).eps
    count = min(int((values > floor).sum()), matrix.shape[0] - basis.shape[1])
    return Residual(values[:count], rotation[:, :count], root, held, moments.total)


def grow(basis: Tensor, gram: Tensor | Moments, threshold: float) -> Tensor:
    """Enlarge a protected basis by the fewest directions that bring its energy above a threshold.

    Args:
        basis: orthonormal ``M``, shape ``(K, m)``; its columns come back unchanged.
        gram: Gram matrix ``(K, K)`` of an experience's feature vectors, or their moments.
        threshold: fraction of the energy to protect, in (0, 1].

    Returns:
        Shape ``(K, m + k)``, orthonormal, dtype of ``basis``.
    """
    return grow_and_rest(basis, gram, threshold)[0]


def grow_and_rest(basis: Tensor, gram: Tensor | Moments, threshold: float) -> tuple[Tensor, Residual | None]:
    """:func:`grow`, and what of the moments is outside of the result; ``None`` where it was not computed."""
    moments = Moments.of(gram)
    needed = threshold * moments.total
    if moments.total <= 0.0 or basis.shape[1] >= basis.shape[0]:
        return basis, None
    found = split(moments, basis)
    if found.held > needed:
        return basis, None
    rest = residual(found)
    count = _needed(rest.values, rest.held, needed, threshold)
    if count == 0:
        return basis, rest
    added = orthonormalize(rest.vectors(count), as_double(found.basis))
    return torch.cat([basis, added.to(basis)], 1).contiguous(), rest.without(count)


def reserve(basis: Tensor, gram: Tensor | Moments, rank: int | float | UpTo) -> Tensor:
    """Leading directions of an experience outside of a protected basis.

    Args:
        basis: orthonormal ``M``, shape ``(K, m)``.
        gram: Gram matrix ``(K, K)`` of the experience's feature vectors, or their moments.
        rank: the number of directions, clipped to what there is; the energy of the rest that they hold; or what they
            hold together with the protected ones.

    Returns:
        Orthonormal ``U``, shape ``(K, r)``, orthogonal to ``M``, dtype of ``basis``; ``r`` may be 0.
    """
    found = split(gram, basis)
    rest = residual(found)
    count = _leading(rest.values, rank, rest.held, rest.total)
    if count == 0:
        return basis.new_empty(basis.shape[0], 0)
    return orthonormalize(rest.vectors(count), as_double(found.basis)).to(basis).contiguous()


def shrink(free: Tensor, gram: Tensor | Moments, threshold: float) -> Tensor:
    """What stays free when :func:`grow` enlarges the basis that a free basis is the complement of.

    Args:
        free: orthonormal basis of everything outside of ``M``, shape ``(K, K - m)``.
        gram: Gram matrix ``(K, K)`` of an experience's feature vectors, or their moments.
        threshold: fraction of the energy to protect, in (0, 1].

    Returns:
        Orthonormal, shape ``(K, K - m - k)``, inside of the span of ``free``; its dtype.
    """
    moments = Moments.of(gram)
    inner, held = inner_moments(free, moments)
    needed = threshold * moments.total
    if moments.total <= 0.0 or free.shape[1] == 0 or held > needed:
        return free
    values, rotation = symmetric_eigh(inner)
    values = values[values > moments.total * torch.finfo(torch.float32).eps]
    count = _needed(values, held, needed, threshold)
    if count == 0:
        return free
    return orthonormalize(as_double(free) @ rotation[:, count:]).to(free).contiguous()


def lead(free: Tensor, gram: Tensor | Moments, rank: int | float | UpTo) -> Tensor:
    """:func:`reserve` from the free basis instead of the protected one; same result up to rounding."""
    moments = Moments.of(gram)
    inner, held = inner_moments(free, moments)
    values, rotation = symmetric_eigh(inner)
    values = values[values > moments.total * torch.finfo(torch.float32).eps]
    count = _leading(values, rank, held, moments.total)
    return orthonormalize(as_double(free) @ rotation[:, :count]).to(free).contiguous()


def _needed(values: Tensor, held: float, needed: float, threshold: float) -> int:
    """How many of the leading directions bring the energy held above what is needed; all for a threshold of 1."""
    reached = held + torch.cumsum(values, 0) > needed
    return int(reached.to(torch.int8).argmax()) + 1 if threshold < 1.0 and bool(reached.any()) else values.numel()


def _leading(values: Tensor, rank: int | float | UpTo, held: float, total: float) -> int:
    """A number of directions, clipped to what there is, or how many hold an energy, by themselves or with ``held``."""
    if isinstance(rank, UpTo):
        needed = rank.threshold * total
        return 0 if held > needed else _needed(values, held, needed, rank.threshold)
    if isinstance(rank, float):
        return energy_rank(values, float(values.sum()), rank)
    return min(rank, values.numel())


def inner_moments(free: Tensor, moments: Moments) -> tuple[Tensor, float]:
    """Moments inside of a free basis, ``(K - m, K - m)``, and the energy outside of it."""
    matrix, basis = as_double(moments.matrix), as_double(free)
    if moments.is_root:
        root = basis.T @ matrix
        return root @ root.T, float(matrix.square().sum() - root.square().sum())
    inner = basis.T @ matrix @ basis
    return (inner + inner.T) / 2, float(matrix.diagonal().sum() - inner.diagonal().sum())


def complement(basis: Tensor) -> Tensor:
    """Orthonormal basis of everything outside of ``M``, shape ``(K, K - m)``, dtype of ``basis``."""
    width, count = basis.shape
    found: Tensor = torch.linalg.qr(as_double(basis), mode="complete").Q[:, count:]
    return orthonormalize(found, as_double(basis)).to(basis).contiguous() if count < width else found.to(basis)


def sharpen(columns: Tensor) -> Tensor:
    """Orthonormal basis of columns that are orthonormal but for rounding, shape ``(K, m)``, float64 on the CPU.

    Gram-Schmidt as a Cholesky decomposition, which is exact here: the products of the columns are close to the
    identity. The first columns of the result depend on the first of the given ones alone.
    """
    exact = as_double(columns)
    if exact.shape[1] == 0:
        return exact
    root = torch.linalg.cholesky(exact.T @ exact)
    found: Tensor = torch.linalg.solve_triangular(root, exact.T, upper=False)
    return found.T.contiguous()


def as_double(tensor: Tensor) -> Tensor:
    """In float64 on the CPU, where all of this is computed."""
    return tensor.detach().to("cpu", torch.float64)
