"""A learned batch mode against the HOSVD of the stacked batches; its state, and sums over processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_lance.errors import CalibrationError, StateError
from lightning_lance.ops.conv import LowRankConv, geometry
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.linear import LowRankLinear
from lightning_lance.subspaces.batch import BatchRule, LearnedBatch
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import LayerStatistics, LayerSubspace
from tests.hosvd import assert_same_factor, hosvd, projected
from tests.oracles import gradients, orthonormal, relative_error

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def batches(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs whose spectra fall in every mode, with energy in the mean, as after a ReLU."""
    mixes = [orthonormal(n, n) * torch.logspace(0, -1.5, n, dtype=torch.float64) @ orthonormal(n, n).T for n in shape]
    found = []
    for _ in range(count):
        x = torch.randn(shape, dtype=torch.float64) + 0.3
        for axis, mix in enumerate(mixes):
            x = torch.tensordot(x, mix, ([axis], [1])).movedim(-1, axis)
        found.append(x.to(dtype))
    return found


def statistics(inputs: list[Tensor], energy: float, channel_axis: int = 1) -> LayerStatistics:
    found = LayerStatistics(ModeRanks(energy, energy, energy), channel_axis, "layer", learned=True)
    for input in inputs:
        found.update(input)
    return found


def subspace_of(found: LayerStatistics) -> LayerSubspace:
    return found.spectra().subspace(found.ranks, unbiased=False)


def factors_of(subspace: LayerSubspace, sizes: tuple[int, ...], size: int, dtype: torch.dtype) -> Factors:
    rotation, groups = subspace.batch.projection(size, dtype, CPU)
    spatial = subspace.spatial_factors(sizes)
    assert spatial is not None
    return Factors(rotation, groups, subspace.batch.contrast_scale(size), subspace.channel, spatial)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("energy", [0.6, 0.7, 0.9])
def test_convolution_has_the_factors_ranks_and_gradients_of_a_hosvd(dtype: torch.dtype, energy: float) -> None:
    inputs = batches((8, 6, 7, 5), 5, dtype)
    bases = hosvd(inputs, energy)
    subspace = subspace_of(statistics(inputs, energy))
    found = [*subspace.batch.factors(), subspace.channel, *subspace.spatial[7, 5]]
    for factor, basis in zip(found, bases, strict=True):
        assert factor is not None
        assert basis is not None
        assert_same_factor(factor, basis, 100 * TOLERANCE[dtype])
    x, weight, grad = inputs[0], torch.randn(4, 6, 3, 3, dtype=dtype), torch.randn(8, 4, 4, 5, dtype=dtype)
    form, factors = geometry((3, 3), (2, 1), (1, 1), (1, 1), 1, "zeros"), factors_of(subspace, (7, 5), 8, dtype)
    core = compress(x, factors, 1, 2)
    assert core.shape == subspace.core_shape(8, 6, (7, 5)) == tuple(basis.shape[1] for basis in bases)  # type: ignore[union-attr]
    ours = gradients(
        lambda i, w, b: LowRankConv.apply(i, w, b, form, core, *factors[:4], *factors.spatial), x, weight, None, grad
    )
    conv = lambda i, w, b: F.conv2d(i, w, b, (2, 1), 1)  # noqa: E731
    plain = gradients(conv, x, weight, None, grad)
    expected = gradients(conv, projected(x, bases), weight.double(), None, grad.double())
    assert torch.equal(ours[0], plain[0])
    assert relative_error(ours[1], plain[1]) < TOLERANCE[dtype]
    assert relative_error(ours[2], expected[2]) < TOLERANCE[dtype]
    assert relative_error(plain[2], expected[2]) > 0.05  # what it differs from


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_layer_with_tokens_has_them_too(dtype: torch.dtype) -> None:
    inputs = batches((6, 5, 9), 4, dtype)
    bases = hosvd(inputs, 0.8)
    subspace = subspace_of(statistics(inputs, 0.8, -1))
    for factor, basis in zip(
        [*subspace.batch.factors(), *subspace.spatial[(5,)], subspace.channel], bases, strict=True
    ):
        assert factor is not None
        assert basis is not None
        assert_same_factor(factor, basis, 100 * TOLERANCE[dtype])
    x, weight, grad = inputs[1], torch.randn(3, 9, dtype=dtype), torch.randn(6, 5, 3, dtype=dtype)
    factors = factors_of(subspace, (5,), 6, dtype)
    core = compress(x, factors, 2, 1)
    found = gradients(
        lambda i, w, b: LowRankLinear.apply(i, w, b, core, *factors[:4], *factors.spatial), x, weight, None, grad
    )
    expected = gradients(F.linear, projected(x, bases), weight.double(), None, grad.double())
    assert relative_error(found[2], expected[2]) < TOLERANCE[dtype]


@given(st.integers(2, 9), st.floats(0.2, 0.95), st.integers(0, 1000))
def test_the_rank_is_the_smallest_strictly_above_the_energy(size: int, energy: float, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(size, 3, 2, 2, dtype=torch.float64) + 0.5 for _ in range(3)]
    subspace = subspace_of(statistics(inputs, energy))
    values = np.linalg.svd(torch.cat([x.flatten(1) for x in inputs], 1).numpy(), compute_uv=False) ** 2
    rank = subspace.batch.columns(size)
    share = values.cumsum() / values.sum()
    assert share[rank - 1] > energy
    assert rank == 1 or share[rank - 2] <= energy
    assert math.isclose(subspace.energy["batch"], share[rank - 1], rel_tol=1e-9)


def test_a_batch_of_another_size_keeps_its_batch_mode_whole_and_teaches_nothing_about_it() -> None:
    inputs = batches((8, 4, 3, 3), 3)
    one, other = (subspace_of(statistics(given, 0.7)) for given in (inputs, [*inputs, inputs[0][:5]]))
    [learned], [also] = one.batch.factors(), other.batch.factors()
    assert torch.equal(learned, also)
    assert one.batch.columns(8) < 8
    assert one.batch.columns(5) == 5
    assert one.batch.projection(5, torch.float64, CPU) == (None, None)
    assert one.core_shape(5, 4, (3, 3))[0] == 5
    assert one.batch.formula_bytes(5, 8) == 0


def test_it_projects_where_a_core_is_no_smaller_and_the_formula_counts_its_factor() -> None:
    subspace = subspace_of(statistics(batches((3, 40), 3, torch.float32), 0.7, -1))
    core = math.prod(subspace.core_shape(3, 40, ()))
    factors = sum(factor.numel() for factor in subspace.factors())
    assert subspace.formula_bytes(3, 40, (), 4) == 4 * (core + factors)
    assert factors == 3 * subspace.batch.columns(3) + 40 * subspace.core_shape(3, 40, ())[1]
    assert subspace.shrinks(3, 40, ())
    assert all(factor.is_contiguous() for factor in subspace.factors())
    assert not LayerSubspace(BatchRule("full"), torch.eye(40), any_size=True).shrinks(3, 40, ())


def test_all_of_the_energy_is_the_whole_mode() -> None:
    found = LayerStatistics(ModeRanks("full", 0.7, 0.7), 1, "layer", learned=True)
    found.update(torch.randn(4, 3, 5, 5))
    subspace = subspace_of(found)
    assert subspace.batch.columns(4) == 4
    assert not list(subspace.batch.factors())
    two = LayerStatistics(ModeRanks("compact", "full", "full"), 1, "layer", learned=True)
    two.update(torch.randn(30, 3, 5, 5))
    assert subspace_of(two).batch.columns(30) == 5


def test_state_round_trip() -> None:
    subspace = subspace_of(statistics(batches((8, 6, 5, 4), 3), 0.7))
    loaded = LayerSubspace.from_state_dict(subspace.state_dict())
    assert isinstance(loaded.batch, LearnedBatch)
    assert loaded.batch == subspace.batch
    for one, other in zip(subspace.factors(), loaded.factors(), strict=True):
        assert torch.equal(one, other)
    half = subspace.to(CPU, torch.float32)
    assert {factor.dtype for factor in half.factors()} == {torch.float32}
    assert len(list(half.factors())) == 4
    for damage in ([0.7, False, 0.1, 3], [0.7, False, 0.1, torch.ones(4, 2)], [0.7, False, 0.1, None, None]):
        with pytest.raises(StateError, match="batch"):
            LayerSubspace.from_state_dict({**subspace.state_dict(), "batch": damage})


def test_statistics_go_on_from_their_state_and_sum_over_processes() -> None:
    inputs = batches((6, 4, 3, 3), 4)
    whole, part = statistics(inputs, 0.7), statistics(inputs[:2], 0.7)
    resumed = LayerStatistics(part.ranks, 1, "layer", learned=True)
    resumed.load_state_dict(part.state_dict(), CPU)
    for input in inputs[2:]:
        resumed.update(input)
    summed, other = statistics(inputs[:2], 0.7), statistics(inputs[2:], 0.7)
    late = LayerStatistics(part.ranks, 1, "layer", learned=True)  # a process that saw nothing
    for found in (summed, late):
        found.extend(other.signature(), CPU)
    for mine, theirs, third in zip(summed.tensors(), other.tensors(), late.tensors(), strict=True):
        mine.add_(theirs).add_(third)
    for found in (resumed, summed):
        for one, expected in zip(subspace_of(found).factors(), subspace_of(whole).factors(), strict=True):
            assert relative_error(one @ one.T, expected @ expected.T) < 1e-12
    with pytest.raises(CalibrationError, match=r"batches of 6 samples here and of 5 on another"):
        summed.extend(statistics([inputs[0][:5]], 0.7).signature(), CPU)
    with pytest.raises(StateError, match="batch mode is not learned"):
        LayerStatistics(part.ranks, 1, "layer").load_state_dict(part.state_dict(), CPU)
