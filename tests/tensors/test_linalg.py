"""Multilinear algebra against tensorly, and bases against their definitions, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tenalg import mode_dot
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lance.tensors.linalg import (
    contrast_scale,
    energy_rank,
    group_rotation,
    mode_product,
    mode_products,
    orthonormalize,
    sample_groups,
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


@pytest.mark.parametrize("mode", [0, 1, 2, 3, -1])
def test_mode_product_keeps_a_channels_last_format(mode: int) -> None:
    tensor = torch.randn(3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    matrix = torch.randn(2, tensor.shape[mode], dtype=torch.float64)
    product = mode_product(tensor, matrix, mode)
    torch.testing.assert_close(product, mode_product(tensor.contiguous(), matrix, mode), check_stride=False)
    assert product.is_contiguous(memory_format=torch.channels_last)


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4),
    rows=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    left=st.tuples(st.booleans(), st.booleans()),
    first=st.integers(1, 2),
    channels_last=st.booleans(),
)
def test_products_with_neighbouring_modes_are_tensorlys(
    shape: tuple[int, ...], rows: tuple[int, int], left: tuple[bool, bool], first: int, channels_last: bool
) -> None:
    tensor = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    matrices = [
        None if whole else torch.randn(count, shape[first + axis], dtype=torch.float64)
        for axis, (count, whole) in enumerate(zip(rows, left, strict=True))
    ]
    expected = tensor.numpy()
    for mode, matrix in enumerate(matrices, start=first):
        if matrix is not None:
            expected = mode_dot(expected, matrix.numpy(), mode)
    found = mode_products(tensor, matrices, first)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_mode_product_of_an_empty_tensor(shape: tuple[int, ...], mode: int) -> None:
    product = mode_product(torch.zeros(shape), torch.ones(5, shape[mode]), mode)
    assert product.shape == torch.Size([5 if axis == mode else n for axis, n in enumerate(shape)])
    assert not product.any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5)])
def test_products_with_the_modes_of_empty_maps(shape: tuple[int, ...]) -> None:
    found = mode_products(torch.zeros(shape), [torch.ones(2, shape[2]), torch.ones(3, shape[3])], 2)
    assert found.shape == (*shape[:2], 2, 3)
    assert not found.any()


CPU = torch.device("cpu")


@given(size=st.integers(1, 40), data=st.data())
def test_groups_are_runs_as_equal_as_can_be(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    groups = sample_groups(size, count, CPU)
    assert groups.dtype == torch.int32
    assert groups.tolist() == sorted(groups.tolist())
    sizes = torch.bincount(groups, minlength=count)
    assert sizes.numel() == count
    assert sizes.max() - sizes.min() <= 1


def basis(size: int, count: int) -> torch.Tensor:
    """``Φ = Z Tᵀ`` from its definition."""
    groups = sample_groups(size, count, CPU).long()
    indicators = torch.nn.functional.one_hot(groups, count).double()
    return indicators @ group_rotation(size, count, torch.float64, CPU).T


@given(size=st.integers(1, 40), data=st.data())
def test_rotated_groups_are_the_constant_and_contrasts(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    found = basis(size, count)
    torch.testing.assert_close(found.T @ found, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(found[:, 0], torch.full((size,), size**-0.5, dtype=torch.float64))
    assert group_rotation(size, count, torch.float64, CPU).is_contiguous()


@pytest.mark.parametrize("make", [sample_groups, lambda b, r, d: group_rotation(b, r, torch.float32, d)])
class TestSharedTensors:
    def test_equal_arguments_share_one(self, make: Any) -> None:
        assert make(16, 4, CPU) is make(16, 4, CPU)
        assert make(16, 5, CPU) is not make(16, 4, CPU)

    def test_made_in_inference_mode_they_serve_training(self, make: Any) -> None:
        with torch.inference_mode():
            found = make(23, 5, CPU)
        assert not found.is_inference()

    def test_made_under_fake_tensors_they_do_not_poison_real_calls(self, make: Any) -> None:
        with FakeTensorMode():
            make(29, 6, CPU)
        assert type(make(29, 6, CPU)) is torch.Tensor

    def test_they_ignore_the_default_device(self, make: Any) -> None:
        with torch.device("meta"):
            found = make(31, 7, CPU)
        assert found.device.type == "cpu"


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_contrast_scale_makes_the_expected_projector_the_identity(size: int) -> None:
    from itertools import permutations

    for columns in range(2, size + 1):
        phi = basis(size, columns)
        weights = torch.full((columns,), contrast_scale(size, columns), dtype=torch.float64)
        weights[0] = 1.0
        orders = [list(order) for order in permutations(range(size))]
        mean = sum((phi[order] * weights) @ phi[order].T for order in orders) / len(orders)
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
