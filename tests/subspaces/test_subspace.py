"""Statistics, spectra and factors of one layer, with tensorly's HOSVD as the oracle."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

from lightning_lance import LanceConfig, swap
from lightning_lance.errors import CalibrationError, LanceWarning, StateError
from lightning_lance.subspaces.ranks import ModeRanks, RankRules
from lightning_lance.subspaces.subspace import (
    BatchRule,
    CapturedEnergy,
    LayerStatistics,
    LayerSubspace,
    ZeroInputError,
)

tensorly.set_backend("numpy")
CPU = torch.device("cpu")


def anisotropic(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random tensor whose every mode has a decaying spectrum."""
    tensor = torch.randn(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        mix = torch.randn(size, size, dtype=torch.float64) * torch.exp(-torch.arange(size) / 2.0)
        tensor = torch.movedim(torch.movedim(tensor, axis, -1) @ mix.T, -1, axis)
    return (tensor / tensor.norm() * 10).to(dtype)


def gathered(inputs: list[Tensor], ranks: ModeRanks, axis: int = 1) -> LayerStatistics:
    statistics = LayerStatistics(ranks, axis, "layer")
    for tensor in inputs:
        statistics.update(tensor)
    return statistics


# --- the batch mode ---------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 600), rank=st.integers(1, 700), unbiased=st.booleans())
def test_an_int_batch_rank_is_clipped_to_the_batch(size: int, rank: int, unbiased: bool) -> None:
    columns = BatchRule(rank, unbiased).columns(size)
    assert columns == min(max(rank, 2 if unbiased else 1), size)


@pytest.mark.parametrize(("size", "columns"), [(1, 1), (2, 2), (4, 4), (5, 4), (24, 4), (25, 5), (64, 11), (128, 22)])
def test_the_compact_batch_rank(size: int, columns: int) -> None:
    assert BatchRule("compact").columns(size) == columns
    assert BatchRule("full").columns(size) == size


@given(
    size=st.integers(1, 300),
    energy=st.floats(0.05, 0.99),
    constant=st.floats(0, 1),
)
def test_a_batch_energy_gives_the_smallest_rank_that_holds_more(size: int, energy: float, constant: float) -> None:
    rule = BatchRule(energy, False, constant)
    columns = rule.columns(size)
    assert 1 <= columns <= size

    def held(count: int) -> float:
        return constant + (count - 1) * (1 - constant) / max(size - 1, 1)

    if columns < size:
        assert held(columns) > energy - 1e-9
    if columns > 1:
        assert held(columns - 1) <= energy + 1e-9


def test_the_scale_of_the_contrasts() -> None:
    assert BatchRule(8, True).contrast_scale(64) == pytest.approx(63 / 7)
    assert BatchRule(8, True).contrast_scale(8) == 1.0
    assert BatchRule(8, True).contrast_scale(1) == 1.0
    assert BatchRule(8, False).contrast_scale(64) == 1.0


def test_the_constant_energy_is_that_of_the_batch_mean() -> None:
    inputs = [torch.randn(6, 3, 4, dtype=torch.float64) + 2 for _ in range(3)]
    statistics = gathered(inputs, ModeRanks(0.5, "full", "full"))
    constant = sum(float((x.mean(0, keepdim=True).expand_as(x)).square().sum()) for x in inputs)
    total = sum(float(x.square().sum()) for x in inputs)
    assert statistics.spectra().constant_energy == pytest.approx(constant / total, rel=1e-12)


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(7, 6, 5), (4, 6, 5, 3), (3, 4, 5, 3, 2)])
@pytest.mark.parametrize("rank", [2, 0.8])
def test_factors_span_the_leading_singular_vectors_of_tensorlys_unfoldings(
    axis: int, shape: tuple[int, ...], rank: int | float
) -> None:
    inputs = [anisotropic(*shape) for _ in range(3)]
    subspace = gathered(inputs, RankRules(rank).default, axis).spectra().subspace(RankRules(rank).default, True)
    channel_axis = axis % len(shape)
    modes = [dim for dim in range(1, len(shape)) if dim != channel_axis]
    group = subspace.spatial[tuple(shape[dim] for dim in modes)]
    keys = ["channel", *(f"spatial_{index}" for index in range(len(modes)))]
    for mode, factor, key in zip([channel_axis, *modes], [subspace.channel, *group], keys, strict=True):
        unfolding = np.concatenate([tensorly.unfold(x.numpy(), mode) for x in inputs], axis=1)
        left, singular, _ = np.linalg.svd(unfolding, full_matrices=False)
        energies = np.cumsum(singular**2) / np.sum(singular**2)
        columns = rank if isinstance(rank, int) else int(np.argmax(energies > rank)) + 1
        if columns >= shape[mode]:
            assert factor is None
            continue
        assert factor is not None
        assert factor.shape == (shape[mode], columns)
        projector = left[:, :columns] @ left[:, :columns].T
        np.testing.assert_allclose((factor @ factor.T).numpy(), projector, atol=1e-8)
        assert subspace.energy[key] == pytest.approx(energies[columns - 1], rel=1e-9)


@pytest.mark.parametrize("rule", [2, 0.6, 0.95])
def test_factors_are_contiguous_and_own_no_more_than_they_need(rule: int | float) -> None:
    ranks = RankRules(rule).default
    subspace = gathered([anisotropic(8, 12, 9, 7, dtype=torch.float32)], ranks).spectra().subspace(ranks, True)
    factors = list(subspace.factors())
    assert factors
    for factor in factors:
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.numel() * 4
        assert factor.dtype == torch.float32
        assert not factor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_take_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    ranks = ModeRanks(4, 3, 2)
    subspace = gathered([anisotropic(8, 6, 5, dtype=dtype)], ranks).spectra().subspace(ranks, True)
    assert {factor.dtype for factor in subspace.factors()} == {dtype}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for factor in subspace.factors():
        eye = torch.eye(factor.shape[1], dtype=torch.float64)
        assert (factor.double().T @ factor.double() - eye).abs().max() < tolerance


def test_a_wide_mode_gives_an_orthonormal_factor_in_float64_too() -> None:
    ranks = ModeRanks("full", 8, "full")
    scale = torch.exp(-torch.arange(1100) / 6.0)
    inputs = torch.randn(40, 1100, dtype=torch.float64) * scale
    subspace = gathered([inputs], ranks, -1).spectra().subspace(ranks, True)
    assert subspace.channel is not None
    assert subspace.channel.shape == (1100, 8)
    eye = torch.eye(8, dtype=torch.float64)
    assert (subspace.channel.T @ subspace.channel - eye).abs().max() < 1e-12
    best = torch.linalg.svdvals(inputs)[:8].square().sum()
    assert float((inputs @ subspace.channel).square().sum()) > 0.97 * float(best)


def test_ranks_as_wide_as_their_mode_keep_it_whole() -> None:
    ranks = ModeRanks(4, 6, 1.0)
    subspace = gathered([anisotropic(8, 6, 5, 5)], ranks).spectra().subspace(ranks, True)
    assert subspace.channel is None
    assert subspace.spatial == {(5, 5): (None, None)}
    assert subspace.energy == {"channel": 1.0, "spatial_0": 1.0, "spatial_1": 1.0}
    assert subspace.any_size


def test_compact_leaves_a_spatial_mode_whole_where_it_costs_more_than_it_saves() -> None:
    """The energy is spread: more than half of the directions are needed for nine tenths of it."""
    input = torch.randn(16, 3, 12, 12)
    found = {}
    for rank in ("compact", 0.9):
        for work in (9.0, 4608.0):
            statistics = LayerStatistics(ModeRanks("full", "full", rank), 1, "layer", work)
            statistics.update(input)
            subspace = statistics.spectra().subspace(statistics.ranks, True)
            found[rank, work] = [factor is not None for factor in subspace.spatial[12, 12]]
            assert (subspace.energy["spatial_0"] < 1.0) == found[rank, work][0]
    assert found == {
        ("compact", 9.0): [False, False],
        ("compact", 4608.0): [True, True],
        (0.9, 9.0): [True, True],
        (0.9, 4608.0): [True, True],
    }


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 10), (4, 5, 6)),
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, (3, 2), stride=(2, 3), padding=0), (2, 4, 41, 62)),
        (nn.Conv1d(6, 6, 5, groups=6, padding=2), (2, 6, 20)),
        (nn.Conv3d(2, 6, 2, stride=2, groups=2), (1, 2, 8, 8, 8)),
    ],
    ids=str,
)
def test_work_is_the_multiply_adds_on_an_element(layer: nn.Module, shape: tuple[int, ...]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    swap(layer, LanceConfig(rank="compact"))
    input = torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(input)
    work = layer.lance_work()  # type: ignore[operator]
    assert work == pytest.approx(counter.get_total_flops() / 2 / input.numel(), rel=0.06)  # but for the edges


def test_statistics_of_one_process_split_over_two_are_the_same() -> None:
    ranks = ModeRanks(0.7, 0.7, 0.7)
    inputs = [anisotropic(6, 5, 4, 4), anisotropic(6, 5, 4, 4), anisotropic(3, 5, 8, 2)]
    whole = gathered(inputs, ranks).spectra().subspace(ranks, True)
    first, second, third = gathered(inputs[:1], ranks), gathered(inputs[1:], ranks), gathered([], ranks)
    signatures = [statistics.signature() for statistics in (first, second)]
    for statistics in (first, second, third):
        for signature in signatures:
            statistics.extend(signature, CPU)
    for target, *parts in zip(first.tensors(), second.tensors(), third.tensors(), strict=True):
        for part in parts:
            target += part
    summed = first.spectra().subspace(ranks, True)
    assert summed.batch == BatchRule(0.7, True, pytest.approx(whole.batch.constant_energy))
    assert summed.spatial.keys() == whole.spatial.keys() == {(4, 4), (8, 2)}
    for one, other in zip(summed.factors(), whole.factors(), strict=True):
        torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-8)


def test_processes_whose_sketches_grew_differently_can_be_summed() -> None:
    ranks = ModeRanks("full", 0.8, "full")
    narrow = [torch.randn(60, 1100) * torch.exp(-torch.arange(1100) / 4.0)]
    wide = [torch.randn(150, 1100) * torch.tensor([1.0] * 120 + [0.0] * 980)]
    first = gathered(narrow, ranks, -1)
    with pytest.warns(LanceWarning, match="layer, channel mode: energy 0.8"):
        second = gathered(wide, ranks, -1)
    third = gathered([], ranks, -1)
    signatures = [first.signature(), second.signature()]
    for statistics in (first, second, third):
        for signature in signatures:
            statistics.extend(signature, CPU)
    shapes = [[tensor.shape for tensor in statistics.tensors()] for statistics in (first, second, third)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("width", [6, 1100])
def test_stored_statistics_continue_exactly(width: int) -> None:
    ranks = ModeRanks(0.5, 0.8, 0.8)
    first, second = anisotropic(30, 4, width, dtype=torch.float32), anisotropic(30, 4, width, dtype=torch.float32)
    one = LayerStatistics(ranks, -1, "layer")
    one.update(first)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other = LayerStatistics(ranks, -1, "layer")
    other.load_state_dict(torch.load(buffer, weights_only=True), CPU)
    assert (other.calls, other.shape, other.channels) == (one.calls, one.shape, one.channels)
    for statistics in (one, other):
        statistics.update(second)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_stored_statistics_of_a_grown_sketch_continue_exactly() -> None:
    ranks = ModeRanks("full", 0.8, "full")
    wide = torch.randn(150, 1100) * torch.tensor([1.0] * 120 + [0.0] * 980)
    one = LayerStatistics(ranks, -1, "layer")
    with pytest.warns(LanceWarning):
        one.update(wide)
    other = LayerStatistics(ranks, -1, "layer")
    other.load_state_dict(one.state_dict(), CPU)
    following = torch.randn(20, 1100)
    for statistics in (one, other):
        statistics.update(following)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_stored_statistics_of_other_rules_are_refused() -> None:
    one = gathered([anisotropic(8, 6, 5)], ModeRanks(4, 0.7, 0.7))
    other = LayerStatistics(ModeRanks(4, "full", 0.7), 1, "layer2")
    with pytest.raises(StateError, match="layer2: the stored statistics do not fit its rank rules"):
        other.load_state_dict(one.state_dict(), CPU)


# --- inputs that define no subspace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("shape", "axis"), [((4, 6, 5), 1), ((4, 1100), -1)])
@pytest.mark.parametrize("rank", ["auto", "compact", 0.7, 3])
def test_values_that_are_not_finite_are_an_error(
    value: float, shape: tuple[int, ...], axis: int, rank: int | float | str
) -> None:
    broken = torch.randn(shape)
    broken[(2,) * len(shape)] = value
    ranks = RankRules(rank).default
    statistics = gathered([torch.randn(shape), broken, torch.randn(shape)], ranks, axis)
    with pytest.raises(CalibrationError, match=r"layer received NaN or Inf.*Finite inputs are needed: check the data"):
        statistics.spectra()


def test_squares_that_overflow_are_an_error_not_a_wrong_subspace() -> None:
    statistics = gathered([torch.full((4, 6, 5), 1e19)], ModeRanks(4, 0.7, 0.7))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        statistics.spectra()


def test_nothing_but_zeros_is_an_error_of_its_own() -> None:
    with pytest.raises(ZeroInputError, match="layer received only zeros"):
        gathered([torch.zeros(4, 6, 5)] * 2, ModeRanks(4, 0.7, 0.7)).spectra()
    with pytest.raises(ZeroInputError):
        gathered([torch.zeros(4, 1100)], ModeRanks(4, 0.7, 0.7), -1).spectra()


def test_no_input_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="layer saw no input"):
        gathered([], ModeRanks()).spectra()


def test_an_empty_batch_adds_nothing() -> None:
    ranks = ModeRanks(4, 0.7, 0.7)
    full = anisotropic(8, 6, 5)
    with_empty = gathered([full[:0], full, full[:0]], ranks)
    alone = gathered([full], ranks)
    assert with_empty.shape == (0, 6, 5)
    for one, other in zip(with_empty.tensors(), alone.tensors(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ZeroInputError):
        gathered([full[:0]], ranks).spectra()


def test_inputs_with_other_channels_are_an_error() -> None:
    statistics = gathered([torch.randn(2, 3, 4)], ModeRanks())
    with pytest.raises(CalibrationError, match="inputs with 3 and with 5 channels"):
        statistics.update(torch.randn(2, 5, 4))


def test_inputs_that_need_gradients_leave_no_graph() -> None:
    tensor = torch.randn(4, 6, 5, requires_grad=True)
    with torch.enable_grad():
        statistics = gathered([tensor * 2], ModeRanks(0.5, 0.7, 0.7))
    assert not any(part.requires_grad for part in statistics.tensors())


# --- the subspace object ----------------------------------------------------------------------------------------------


def example(dtype: torch.dtype = torch.float32) -> LayerSubspace:
    ranks = ModeRanks(4, 3, 2)
    inputs = [anisotropic(8, 6, 5, 7, dtype=dtype), anisotropic(8, 6, 4, 4, dtype=dtype)]
    return gathered(inputs, ranks).spectra().subspace(ranks, True)


def test_formula_bytes_by_hand() -> None:
    subspace = example()
    # core 4 x 3 x 2 x 2, channel factor 6 x 3, spatial factors 5 x 2 and 7 x 2, four bytes each; order 16 x 4 bytes
    assert subspace.core_shape(16, 6, (5, 7)) == (4, 3, 2, 2)
    assert subspace.formula_bytes(16, 6, (5, 7), 4) == 4 * (48 + 18 + 10 + 14) + 16 * 4
    assert subspace.formula_bytes(16, 6, (4, 4), 2) == 2 * (48 + 18 + 8 + 8) + 16 * 4
    # A batch as small as the rank is kept whole, in the order it came in.
    assert subspace.formula_bytes(4, 6, (5, 7), 4) == 4 * (48 + 18 + 10 + 14)
    projected = LayerSubspace(BatchRule(4, False), None, {(5,): (None,)})
    assert projected.formula_bytes(16, 6, (5,), 4) == 4 * 4 * 6 * 5


@pytest.mark.parametrize(("bits", "row"), [(8, 128 + 8), (4, 64 + 4), (2, 32 + 4)])
def test_formula_bytes_of_a_rounded_core_by_hand(bits: int, row: int) -> None:
    """Every 128 elements of the core: their codes, and the two ends of their range. Factors stay as they are."""
    subspace = LayerSubspace(BatchRule(4, True), torch.eye(100)[:, :50], any_size=True, bits=bits)
    elements = 4 * 50 * 3 * 3
    assert subspace.formula_bytes(16, 100, (3, 3), 4) == math.ceil(elements / 128) * row + 4 * 100 * 50 + 4 * 16
    tiny = LayerSubspace(BatchRule("full"), any_size=True, bits=bits)
    assert tiny.formula_bytes(1, 2, (), 4) == 8  # a range would take more than the elements


def test_an_input_is_projected_where_core_and_factors_are_no_larger() -> None:
    whole = LayerSubspace(BatchRule("full"), any_size=True)
    assert whole.shrinks(16, 6, (5, 7))  # as large as the input: our operator runs, for the gradient it was asked for
    half = LayerSubspace(BatchRule(4, False), torch.eye(64)[:, :32], any_size=True)
    for batch in range(1, 200):  # 4 x 32 in the core, 64 x 32 in the factor
        assert half.shrinks(batch, 64, ()) == (min(batch, 4) * 32 + 64 * 32 <= 64 * batch)


def test_sizes_without_factors_have_none() -> None:
    subspace = example()
    assert subspace.spatial_factors((5, 7)) is not None
    assert subspace.spatial_factors((7, 5)) is None
    whole = LayerSubspace(BatchRule(4), any_size=True)
    assert whole.spatial_factors((7, 5)) == (None, None)
    assert whole.spatial_factors(()) == ()


def test_formula_bytes_of_sizes_without_factors_are_those_of_the_plain_input() -> None:
    assert example().formula_bytes(16, 6, (9, 9), 4) == 16 * 6 * 9 * 9 * 4


def test_a_stored_subspace_loads_safely_and_is_equal() -> None:
    subspace = example()
    buffer = io.BytesIO()
    torch.save(subspace.state_dict(), buffer)
    buffer.seek(0)
    loaded = LayerSubspace.from_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.batch == subspace.batch
    assert (loaded.energy, loaded.any_size) == (subspace.energy, subspace.any_size)
    assert loaded.spatial.keys() == subspace.spatial.keys()
    for one, other in zip(loaded.factors(), subspace.factors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", [{}, {"batch": [1, 2, 3, 4]}, {"spatial": [[1]]}, {"energy": None}])
def test_a_state_of_another_form_is_refused(broken: dict[str, Any]) -> None:
    state = {**example().state_dict(), **broken} if broken else {}
    with pytest.raises(StateError, match="Resume without the callback's state to calibrate anew"):
        LayerSubspace.from_state_dict(state)


def test_moving_makes_a_copy() -> None:
    subspace = example()
    moved = subspace.to(CPU, torch.float64)
    assert {factor.dtype for factor in moved.factors()} == {torch.float64}
    assert {factor.dtype for factor in subspace.factors()} == {torch.float32}
    assert moved.batch == subspace.batch


@pytest.mark.parametrize("axis", [1, -1])
def test_captured_energy_is_that_of_tensorlys_core(axis: int) -> None:
    ranks = ModeRanks(4, 3, 2)
    calibrated = [anisotropic(8, 6, 5, 6) for _ in range(2)]
    subspace = gathered(calibrated, ranks, axis).spectra().subspace(ranks, True)
    probe = anisotropic(8, 6, 5, 6)
    modes = [1, 2, 3] if axis == 1 else [3, 1, 2]
    group = subspace.spatial[tuple(probe.shape[mode] for mode in modes[1:])]
    factors = [factor.numpy() for factor in (subspace.channel, *group) if factor is not None]
    core = multi_mode_dot(probe.numpy(), factors, modes, transpose=True)
    captured = CapturedEnergy(subspace, axis)
    captured.update(probe)
    assert captured.fraction == pytest.approx(float((core**2).sum() / probe.square().sum()), rel=1e-12)
    assert captured.shapes == [(8, *(probe.shape[mode] for mode in modes))]
    assert captured.itemsize == 8


def test_captured_energy_of_nothing_and_of_a_whole_subspace() -> None:
    captured = CapturedEnergy(LayerSubspace(BatchRule(4), any_size=True), 1)
    assert captured.fraction == 1.0
    captured.update(torch.zeros(2, 3, 4))
    assert captured.fraction == 1.0
    captured.update(torch.randn(2, 3, 4))
    assert captured.fraction == 1.0


def test_energies_of_several_sizes_are_their_least() -> None:
    ranks = ModeRanks("full", "full", 2)
    flat, steep = torch.randn(200, 1, 9, dtype=torch.float64), torch.zeros(4, 1, 5, dtype=torch.float64)
    steep[:, :, 0] = 1.0
    subspace = gathered([flat, steep], ranks).spectra().subspace(ranks, True)
    expected = torch.linalg.svdvals(flat[:, 0])[:2].square().sum() / flat.square().sum()
    assert subspace.energy["spatial_0"] == pytest.approx(float(expected))
    assert not math.isclose(subspace.energy["spatial_0"], 1.0)


@pytest.mark.parametrize("size", [40, 1200])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_factor_holds_its_own_columns_only(size: int, columns: int) -> None:
    statistics = LayerStatistics(ModeRanks("full", columns, "full"), -1, "layer")
    statistics.update(torch.randn(64, size))
    subspace = statistics.spectra().subspace(ModeRanks("full", columns, "full"), unbiased=True)
    assert subspace.channel is not None
    assert subspace.channel.shape == (size, columns)
    assert subspace.channel.untyped_storage().nbytes() == 4 * size * columns
