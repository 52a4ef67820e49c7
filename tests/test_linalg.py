"""Multilinear algebra against tensorly, and bases against their definitions, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tenalg import mode_dot
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lance.linalg import (
    contrast_scale,
    cosine_basis,
    energy_rank,
    mode_product,
    orthonormalize,
    symmetric_eigh,
    unfold,
)

tensorly.set_backend("numpy")

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def drawn(shape: list[int], seed: int, order: list[int] | None = None) -> torch.Tensor:
    """A tensor of that shape whose memory lies in the given order of axes."""
    generator = torch.Generator().manual_seed(seed)
    order = order or list(range(len(shape)))
    memory = torch.randn([shape[axis] for axis in order], generator=generator, dtype=torch.float64)
    return memory.permute([order.index(axis) for axis in range(len(shape))])


@given(shape=shapes, data=st.data())
def test_unfold_is_tensorlys_unfolding(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    mode = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = drawn(shape, 0, order)
    assert tensor.shape == torch.Size(shape)
    expected = tensorly.unfold(tensor.numpy(), mode % len(shape))
    np.testing.assert_array_equal(unfold(tensor, mode).numpy(), expected)


@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), rows=st.integers(1, 6), data=st.data())
def test_mode_product_is_tensorlys(shape: list[int], rows: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    mode = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor, matrix = drawn(shape, 1, order), drawn([rows, shape[mode]], 2)
    expected = mode_dot(tensor.numpy(), matrix.numpy(), mode % len(shape))
    actual = mode_product(tensor, matrix, mode)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_mode_product_of_an_empty_tensor(shape: tuple[int, ...], mode: int) -> None:
    product = mode_product(torch.zeros(shape), torch.ones(5, shape[mode]), mode)
    assert product.shape == torch.Size([5 if axis == mode else n for axis, n in enumerate(shape)])
    assert not product.any()


@given(size=st.integers(1, 40), data=st.data())
def test_cosine_basis_is_the_orthonormal_dct_ii(size: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, size))
    basis = cosine_basis(size, columns, torch.float64, torch.device("cpu"))
    assert basis.shape == (size, columns)
    assert basis.is_contiguous()
    assert basis.untyped_storage().nbytes() == size * columns * 8  # not a view of a full basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(basis[:, 0], torch.full((size,), size**-0.5, dtype=torch.float64))
    for position in range(size):
        for frequency in range(1, columns):
            expected = math.sqrt(2 / size) * math.cos(math.pi / size * (position + 0.5) * frequency)
            assert basis[position, frequency].item() == pytest.approx(expected, abs=1e-13)


def test_cosine_basis_is_one_shared_tensor() -> None:
    first = cosine_basis(16, 4, torch.float32, torch.device("cpu"))
    assert cosine_basis(16, 4, torch.float32, torch.device("cpu")) is first
    assert cosine_basis(16, 4, torch.float64, torch.device("cpu")).dtype == torch.float64


def test_cosine_basis_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        basis = cosine_basis(23, 5, torch.float32, torch.device("cpu"))
    assert not basis.is_inference()
    weight = torch.ones(5, requires_grad=True)
    (basis @ weight).sum().backward()
    assert weight.grad is not None


def test_cosine_basis_made_under_fake_tensors_does_not_poison_real_calls() -> None:
    with FakeTensorMode():
        cosine_basis(29, 6, torch.float32, torch.device("cpu"))
    basis = cosine_basis(29, 6, torch.float32, torch.device("cpu"))
    assert type(basis) is torch.Tensor
    assert basis.sum().item() == pytest.approx(math.sqrt(29), rel=1e-5)


def test_cosine_basis_ignores_the_default_device() -> None:
    with torch.device("meta"):
        basis = cosine_basis(31, 7, torch.float32, torch.device("cpu"))
    assert basis.device.type == "cpu"
    assert basis.sum().item() == pytest.approx(math.sqrt(31), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_contrast_scale_makes_the_expected_projector_the_identity(size: int) -> None:
    from itertools import permutations

    for columns in range(2, size + 1):
        basis = cosine_basis(size, columns, torch.float64, torch.device("cpu"))
        weights = torch.full((columns,), contrast_scale(size, columns), dtype=torch.float64)
        weights[0] = 1.0
        orders = [list(order) for order in permutations(range(size))]
        mean = sum((basis[order] * weights) @ basis[order].T for order in orders) / len(orders)
        torch.testing.assert_close(mean, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_contrast_scale_is_one_where_the_basis_is_whole() -> None:
    assert contrast_scale(8, 8) == 1.0
    assert contrast_scale(1, 1) == 1.0


@given(size=st.integers(1, 12), rank=st.integers(0, 12))
def test_symmetric_eigh_descends_and_rebuilds(size: int, rank: int) -> None:
    root = drawn([size, max(rank, 1)], 3) * (rank > 0)
    gram = root @ root.T
    values, vectors = symmetric_eigh(gram)
    assert values.dtype == vectors.dtype == torch.float64
    assert bool((values >= 0).all())
    assert bool((values[:-1] >= values[1:]).all())
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, gram, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@given(
    values=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    energy=st.floats(0.01, 1.0),
    missing=st.floats(0, 50),
)
def test_energy_rank_is_the_smallest_that_holds_more(values: list[float], energy: float, missing: float) -> None:
    ordered = sorted(values, reverse=True)
    total = sum(ordered) + missing
    rank = energy_rank(torch.tensor(ordered, dtype=torch.float64), total, energy)
    assert 1 <= rank <= len(ordered)
    if energy == 1.0:
        assert rank == len(ordered)
        return
    held = [sum(ordered[:count]) for count in range(len(ordered) + 1)]
    tolerance = 1e-9 * max(total, 1.0)
    if rank < len(ordered):
        assert held[rank] > energy * total - tolerance
    if rank > 1:
        assert held[rank - 1] <= energy * total + tolerance


def test_energy_rank_needs_more_than_the_energy_not_as_much() -> None:
    values = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    assert energy_rank(values, 4.0, 0.5) == 2
    assert energy_rank(values, 4.0, 0.49) == 1
    assert energy_rank(values, 4.0, 0.75) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalize_keeps_away_from_a_basis_even_where_columns_nearly_lie_in_it(dtype: torch.dtype) -> None:
    protected = torch.linalg.qr(torch.randn(60, 20, dtype=dtype)).Q
    columns = protected[:, :8] + 1e-4 * torch.randn(60, 8, dtype=dtype)
    basis = orthonormalize(columns, protected)
    epsilon = torch.finfo(dtype).eps
    assert (protected.T @ basis).abs().max() < 20 * epsilon
    assert (basis.T @ basis - torch.eye(8, dtype=dtype)).abs().max() < 20 * epsilon
    # The span is that of the columns, together with the protected basis.
    rest = columns - protected @ (protected.T @ columns)
    outside = rest - basis @ (basis.T @ rest)
    assert outside.norm() < 1e-3 * rest.norm()
