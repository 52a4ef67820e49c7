"""Sums over groups of samples, against the product with the whole basis in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lance.ops.factors import Factors, batch_matrix, compress, group_sums, project_gradient, summed
from lightning_lance.tensors.linalg import contrast_scale, mode_product
from tests.oracles import batch_mode, orthonormal, relative_error


@given(
    st.integers(1, 20),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_sums_are_those_of_the_samples(size: int, rest: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, size))
    _, groups = batch_mode(size, rank, torch.randperm(size))
    values = torch.randn(size, *rest, dtype=dtype)
    sums = group_sums(values, groups, rank)
    assert sums.dtype == dtype
    for group in range(rank):
        torch.testing.assert_close(sums[group], values[groups == group].sum(0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced", "transposed"])
@pytest.mark.parametrize("spatial", [False, True])
def test_the_core_is_that_of_the_basis_in_every_layout(layout: str, spatial: bool) -> None:
    size, rank = 13, 5
    values = torch.randn(size, 6, 8, 10, dtype=torch.float64)
    values = {
        "contiguous": lambda: values,
        "channels_last": lambda: values.contiguous(memory_format=torch.channels_last),
        "expanded": lambda: values[:, :1].expand(-1, 6, -1, -1),
        "sliced": lambda: torch.randn(2 * size, 6, 8, 20, dtype=torch.float64)[::2, :, :, ::2],
        "transposed": lambda: torch.randn(10, 6, 8, size, dtype=torch.float64).transpose(0, 3),
    }[layout]()
    rotation, groups = batch_mode(size, rank, torch.randperm(size))
    factors = (orthonormal(8, 3), None) if spatial else (None, None)
    core = compress(values, Factors(rotation, groups, 1.0, None, factors), 1, 2)
    basis = rotation[:, groups.long()]
    expected = unprojected = torch.einsum("rb,bchw->rchw", basis, values)
    if spatial:
        expected = torch.einsum("rchw,hk->rckw", expected, factors[0])
    assert relative_error(core, expected) < 1e-13
    assert relative_error(mode_product(values, batch_matrix(rotation, groups), 0), unprojected) < 1e-13


@pytest.mark.parametrize(("wide", "narrow"), [(40, 3), (3, 40)])
def test_the_weights_are_on_one_side_or_the_other(wide: int, narrow: int) -> None:
    size, rank = 11, 4
    scale = contrast_scale(size, rank)
    rotation, groups = batch_mode(size, rank, torch.randperm(size))
    factors = Factors(rotation, groups, scale, None, ())
    input, grad = torch.randn(size, wide, dtype=torch.float64), torch.randn(size, narrow, dtype=torch.float64)
    projected, core = project_gradient(grad, compress(input, factors, 1, 1), factors)
    basis = rotation[:, groups.long()]
    weights = torch.tensor([1.0] + [scale] * (rank - 1), dtype=torch.float64)
    assert relative_error(projected.T @ core, (basis @ grad).T @ (weights[:, None] * (basis @ input))) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_product(dtype: torch.dtype) -> None:
    """Its sums would be rounded at every addition: 512 ones and many small numbers are lost one by one."""
    values = torch.full((600, 1), 2.0**-9, dtype=dtype)
    values[0] = 1.0
    factors = Factors(*batch_mode(600, 2, None, dtype), 1.0, None, ())
    assert not summed(values)
    core = compress(values, factors, 1, 1)
    expected = compress(values.double(), Factors(*batch_mode(600, 2, None), 1.0, None, ()), 1, 1)
    assert relative_error(core, expected) < 0.02
