"""Growing protected bases and reserving outside of them, against singular value decompositions of the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.continual import Moments, complement, grow, project_out, reserve
from lightning_lance.continual.basis import residual, split
from tests.oracles import orthonormal, relative_error


def samples(rows: int, width: int, rank: int, seed: int) -> Tensor:
    """Rows of decaying energy in a random subspace."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return left * 0.7 ** torch.arange(rank, dtype=torch.float64) @ right


def orthonormality(basis: Tensor) -> float:
    return float((basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max()) if basis.numel() else 0.0


def share(rows: Tensor, basis: Tensor) -> float:
    return float((rows @ basis.double()).square().sum() / rows.square().sum())


def gpm_rank(rows: Tensor, basis: Tensor, threshold: float) -> int:
    """Smallest k of GPM's equation 9, by a singular value decomposition of what the basis leaves of the samples."""
    left = rows - rows @ basis.double() @ basis.double().T
    values = torch.linalg.svdvals(left).square()
    total = rows.square().sum()
    held = total - left.square().sum()
    count = 0
    while held <= threshold * total and count < values.numel():
        held, count = held + values[count], count + 1
    return count


drawn = st.tuples(st.integers(3, 60), st.integers(2, 24), st.integers(1, 12), st.integers(0, 8), st.integers(0, 10**6))


@given(drawn, st.floats(0.3, 0.999), st.booleans())
def test_growth_is_the_smallest_that_reaches_the_threshold(
    case: tuple[int, int, int, int, int], threshold: float, as_root: bool
) -> None:
    rows_count, width, rank, known, seed = case
    rows = samples(rows_count, width, rank, seed)
    basis = orthonormal(width, min(known, width), torch.float32)
    gram: Tensor | Moments = rows.T @ rows
    if as_root:
        gram = Moments(rows.T, True, float(rows.square().sum()))
    grown = grow(basis, gram, threshold)
    assert grown.dtype == torch.float32
    assert torch.equal(grown[:, : basis.shape[1]], basis)
    assert orthonormality(grown) < 1e-6
    added = grown.shape[1] - basis.shape[1]
    assert abs(added - gpm_rank(rows, basis, threshold)) <= (0 if share(rows, grown) < threshold + 1e-3 else 1)
    assert share(rows, grown) > threshold - 1e-6 or grown.shape[1] == width
    if added:
        assert share(rows, grown[:, :-1]) <= threshold + 1e-6


@given(drawn, st.integers(1, 30))
def test_a_reserved_basis_is_orthogonal_to_the_protected_one(case: tuple[int, int, int, int, int], rank: int) -> None:
    rows_count, width, data_rank, known, seed = case
    rows = samples(rows_count, width, data_rank, seed).float()
    basis = orthonormal(width, min(known, width), torch.float32)
    found = reserve(basis, rows.T @ rows, rank)
    assert found.shape[1] <= min(rank, width - basis.shape[1])
    assert orthonormality(found) < 1e-6
    if found.numel() and basis.numel():
        assert float((basis.double().T @ found.double()).abs().max()) < 1e-6


def test_the_reserved_basis_holds_the_leading_directions_of_what_is_left() -> None:
    rows, basis = samples(200, 20, 10, 3), orthonormal(20, 4)
    left = rows - rows @ basis @ basis.T
    values, vectors = torch.linalg.eigh(left.T @ left)
    expected = vectors[:, -3:]
    found = reserve(basis, rows.T @ rows, 3)
    assert relative_error(found @ found.T, expected @ expected.T) < 1e-6
    energy = float(values[-3:].sum() / values.sum())
    assert reserve(basis, rows.T @ rows, energy - 1e-6).shape[1] == 3
    assert reserve(basis, rows.T @ rows, energy + 1e-6).shape[1] == 4
    assert reserve(basis, rows.T @ rows, 1.0).shape[1] == 10


def test_root_and_gram_give_the_same_residual() -> None:
    rows, basis = samples(50, 12, 6, 5), orthonormal(12, 2)
    moments = Moments(rows.T, True, float(rows.square().sum()))
    gram, root = residual(split(rows.T @ rows, basis)), residual(split(moments, basis))
    assert root.values.shape == gram.values.shape
    assert relative_error(root.values, gram.values) < 1e-9
    assert relative_error(root.vectors() @ root.vectors().T, gram.vectors() @ gram.vectors().T) < 1e-6
    assert root.held == pytest.approx(gram.held)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_the_complement_is_everything_else(count: int) -> None:
    basis = orthonormal(8, count, torch.float32)
    other = complement(basis)
    assert other.shape == (8, 8 - count)
    assert orthonormality(torch.cat([basis, other], 1)) < 1e-6


def test_a_full_or_covered_basis_does_not_grow() -> None:
    rows = samples(30, 6, 6, 1)
    full = orthonormal(6, 6, torch.float32)
    assert grow(full, rows.T @ rows, 0.99) is full
    assert reserve(full, rows.T @ rows, 3).shape == (6, 0)
    covering = torch.linalg.svd(rows).Vh[:3].T.float()
    assert grow(covering, rows.T @ rows, 0.5) is covering


def test_zero_moments_protect_nothing() -> None:
    assert grow(torch.empty(4, 0), torch.zeros(4, 4), 0.97).shape == (4, 0)
    assert reserve(torch.empty(4, 0), torch.zeros(4, 4), 2).shape == (4, 0)


def test_directions_of_rounding_noise_are_not_directions() -> None:
    rows = samples(500, 64, 3, 2).float()
    assert grow(torch.empty(64, 0), rows.T @ rows, 1.0).shape[1] == 3


def test_project_out_removes_the_basis_in_each_group() -> None:
    basis = torch.stack([orthonormal(7, 3), orthonormal(7, 3)])
    rows = torch.randn(2, 5, 7, dtype=torch.float64)
    left = project_out(rows, basis)
    assert float((left @ basis).abs().max()) < 1e-12
    assert torch.allclose(left + rows @ basis @ basis.mT, rows)
