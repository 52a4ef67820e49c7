"""What earlier experiences have outside of a protected basis, and how long a step may be there.

A threshold leaves out a few percent of an experience's energy, and a change of the weights outside of ``M`` moves
earlier outputs through it. Plain gradient descent hardly does: its step in a direction is as long as the energy that
the present experience has there. Optimisers that scale every coordinate to the same step, such as Adam, move as far
where the present experience has next to nothing and earlier ones have something.

So a step in a direction is multiplied with ``b / (b + ρ a)``, where ``b`` is the share of the present experience's
energy in it, ``a`` the sum of the shares of the earlier ones, and ``ρ`` the damping: it is left as it is where earlier
experiences have nothing, and shortest where they have more than the present one.

Related: orthogonal weights modification (Zeng et al., Nature Machine Intelligence 2019) divides every step by the
energy of the past; scaled gradient projection (Saha & Roy, AAAI 2023) lets steps into the protected basis by its
energies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.continual.basis import Moments, Residual, as_double, inner_moments, residual, split
from lightning_lance.tensors.linalg import orthonormalize, symmetric_eigh

LEFT_OUT = 2e-3
"""Energy of earlier experiences, each of 1 in all, that is not kept apart by direction, unless told otherwise."""

_NOTHING = torch.finfo(torch.float32).eps ** 2
"""A share of the energy below this is rounding."""


class Leftover(NamedTuple):
    """Second moments ``R = L diag(a) Lᵀ + rest (I - M Mᵀ - L Lᵀ)`` of earlier experiences, each of trace 1.

    Attributes:
        directions: ``L``, shape ``(K, k)``, orthonormal and orthogonal to ``M``; zero columns count for nothing.
        energies: ``a``, shape ``(k,)``, float64.
        rest: mean energy of each direction outside of ``M`` and ``L``.
    """

    directions: Tensor
    energies: Tensor
    rest: float

    def along(self, basis: Tensor) -> Tensor:
        """Energies ``diag(Uᵀ R U)`` along orthonormal columns ``(K, r)`` outside of ``M``; shape ``(r,)``, float64."""
        shares = (as_double(self.directions).T @ as_double(basis)).square()
        return (self.energies - self.rest) @ shares + self.rest


def nothing(width: int) -> Leftover:
    """Before the first experience has ended."""
    return Leftover(torch.zeros(width, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0.0)


def energy_along(moments: Moments, basis: Tensor) -> Tensor:
    """Share of an experience's energy along orthonormal columns ``(K, r)``; shape ``(r,)``, float64."""
    if moments.is_root:
        matrix = moments.matrix.detach().cpu()
        energy = (matrix.T @ basis.detach().to(matrix)).square().sum(0, dtype=torch.float64)
    else:
        matrix, basis = as_double(moments.matrix), as_double(basis)
        energy = ((matrix @ basis) * basis).sum(0)
    return energy.clamp_(min=0.0) / moments.total if moments.total > 0.0 else energy.zero_()


def step_sizes(past: Tensor, present: Tensor, damping: float) -> Tensor:
    """``b / (b + ρ a)``, in [0, 1]; 1 where earlier experiences have nothing.

    Args:
        past: ``a``, shape ``(r,)``; what is below 0 is rounding.
        present: ``b``, same shape, not negative.
        damping: ``ρ``.
    """
    past = past.clamp(min=0.0)
    known = damping * past > _NOTHING
    return torch.where(known, present / (present + damping * past).clamp(min=_NOTHING), torch.ones_like(past))


def outside(
    before: Leftover,
    moments: Moments,
    rest: Residual | None,
    basis: Tensor,
    already: int,
    apart: bool,
    left_out: float = LEFT_OUT,
    most: int | None = None,
) -> Leftover:
    """What is left outside of a protected basis after one more experience.

    Args:
        before: what was left before it.
        moments: of the experience.
        rest: of the moments, what is outside of ``basis``, where it is known already.
        basis: ``M`` after the experience, shape ``(K, m)``.
        already: how many of its columns it had before.
        apart: keep directions; else their mean energy alone.
        left_out: energy of an experience, of 1 in all, that the directions which are not kept may hold.
        most: number of directions that are kept at most; ``None``: as many as that asks for.
    """
    width, count = basis.shape
    open_count = width - count
    if open_count == 0 or moments.total <= 0.0:
        return before if moments.total <= 0.0 else nothing(width)
    if not apart and before.directions.shape[1] == 0:
        held = split(moments, basis).held if rest is None else rest.held
        return before._replace(rest=before.rest + max(0.0, 1.0 - held / moments.total) / open_count)
    rest = residual(split(moments, basis)) if rest is None else rest
    fresh = rest.values / moments.total
    found = _until(fresh, left_out / 4) if apart else fresh.numel()  # what is left out early is not multiplied
    # In the precision that they are stored in: sizes of steps need no more, and it is twice as fast.
    protected = basis.detach().cpu()
    known = before.directions.detach().to(protected)
    # Orthogonal to the older columns already, as far as that precision goes; what is left of them is removed below.
    added = protected[:, already:]
    known = known - added @ (added.T @ known)
    known = known * (before.energies - before.rest).clamp(min=0.0).sqrt().to(known)
    root = torch.cat([known, rest.vectors(found, known.dtype) * fresh[:found].sqrt().to(known)], 1)
    gram = root.new_zeros(root.shape[1], root.shape[1])
    gram[: known.shape[1]] = known.T @ root
    gram[known.shape[1] :, : known.shape[1]] = gram[: known.shape[1], known.shape[1] :].T
    gram.diagonal()[known.shape[1] :] = fresh[:found]  # the vectors of the rest are orthonormal
    values, rotation = symmetric_eigh(gram, gram.dtype)
    kept = min(_until(values, left_out * 3 / 4), open_count) if apart else 0
    kept = kept if most is None else min(kept, most)
    kept = min(kept, int((values > torch.finfo(torch.float32).eps).sum()))
    dropped = float(values[kept:].sum()) + float(fresh[found:].sum())
    tail = dropped / (open_count - kept) if kept < open_count else 0.0
    directions = root @ (rotation[:, :kept] / values[:kept].sqrt())
    directions -= protected @ (protected.T @ directions)
    # One step of Newton's iteration to the nearest orthonormal columns, which squares what is missing.
    directions = 1.5 * directions - 0.5 * (directions @ (directions.T @ directions))
    return Leftover(directions, values[:kept].double() + before.rest, before.rest + tail)


def _until(values: Tensor, left_out: float) -> int:
    """How many of the leading ones there are until the others sum to no more than that."""
    beyond = values.sum() - values.cumsum(0)
    return min(int((beyond > left_out).sum()) + 1, values.numel())


def inside(before: Leftover, free: Tensor, moments: Moments | None = None) -> Leftover:
    """The same where a basis of everything outside of ``M`` is stored: its columns become the directions.

    Args:
        before: what was left before the experience.
        free: orthonormal, ``(K, K - m)``, after it.
        moments: of the experience; ``None``: they are in ``before`` already.
    """
    basis = as_double(free)
    mixed = basis.T @ as_double(before.directions)
    energies = (mixed * (before.energies - before.rest)) @ mixed.T
    energies.diagonal().add_(before.rest)
    if moments is not None and moments.total > 0.0:
        energies += inner_moments(free, moments)[0] / moments.total
    values, rotation = symmetric_eigh((energies + energies.T) / 2)
    directions = basis @ rotation
    return Leftover(orthonormalize(directions) if free.shape[1] else directions, values, 0.0)
