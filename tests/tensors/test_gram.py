"""Streaming second moments: exact ones against tensorly's unfolding, sketches against the exact eigenpairs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.errors import LanceWarning
from lightning_lance.tensors.gram import (
    OVERSAMPLING,
    SKETCH_ABOVE,
    SKETCH_WIDTH,
    GramMatrix,
    NystromSketch,
    mode_statistics,
)
from lightning_lance.tensors.linalg import energy_rank
from tests.live_bytes import LiveBytes

tensorly.set_backend("numpy")
CPU = torch.device("cpu")


@given(shape=st.lists(st.integers(0, 5), min_size=2, max_size=5), data=st.data())
def test_gram_matrix_is_that_of_tensorlys_unfolding(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    mode = data.draw(st.integers(0, len(shape) - 1))
    torch.manual_seed(0)
    calls = [torch.randn([shape[axis] for axis in order], dtype=torch.float64) for _ in range(2)]
    calls = [call.permute([order.index(axis) for axis in range(len(shape))]) for call in calls]
    statistics = GramMatrix(shape[mode], torch.float64, CPU)
    expected = np.zeros((shape[mode], shape[mode]))
    for call in calls:
        statistics.update(call, mode)
        if call.numel():
            unfolding = tensorly.unfold(call.numpy(), mode)
            expected += unfolding @ unfolding.T
    np.testing.assert_allclose(statistics.gram.numpy(), expected, rtol=1e-13, atol=1e-13)
    assert statistics.trace == pytest.approx(float(np.trace(expected)), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 40, 30, 9), (1, 40, 30, 70), (3, 200, 110)])
def test_gram_matrix_of_an_input_larger_than_one_piece(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lance.tensors.gram._chunks.__defaults__", (1000,))
    tensor = torch.randn(shape, dtype=torch.float64)
    for mode in range(len(shape)):
        statistics = GramMatrix(shape[mode], torch.float64, CPU)
        statistics.update(tensor, mode)
        unfolding = tensor.movedim(mode, 0).flatten(1)
        torch.testing.assert_close(statistics.gram, unfolding @ unfolding.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16])
def test_gram_matrix_accumulates_low_precision_inputs_in_float32(input_dtype: torch.dtype) -> None:
    tensor = torch.randn(64, 8, 9, dtype=input_dtype)
    statistics = GramMatrix(8, torch.float32, CPU)
    for _ in range(20):
        statistics.update(tensor, 1)
    unfolding = tensor.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(statistics.gram.double(), 20 * unfolding @ unfolding.T, rtol=1e-4, atol=1e-2)


def test_the_exact_matrix_serves_every_mode_up_to_the_limit_and_where_a_sketch_would_be_larger() -> None:
    assert isinstance(mode_statistics(SKETCH_ABOVE, 0.9, torch.float32, CPU), GramMatrix)
    assert isinstance(mode_statistics(SKETCH_ABOVE + 1, 0.9, torch.float32, CPU), NystromSketch)
    assert isinstance(mode_statistics(1100, 550 - OVERSAMPLING, torch.float32, CPU), GramMatrix)
    assert isinstance(mode_statistics(1100, 549 - OVERSAMPLING, torch.float32, CPU), NystromSketch)


def spectrum(kind: str, size: int) -> Tensor:
    """Eigenvalues of a known decay."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    if kind == "exponential":
        return torch.exp(-index / 8)
    if kind == "power":
        return index**-1.5
    flat_tail = torch.full((size,), 1e-4, dtype=torch.float64)
    flat_tail[:20] = torch.linspace(2.0, 1.0, 20)
    return flat_tail


def matrix_of(values: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """An ``(n, columns)`` matrix with these eigenvalues of its Gram matrix (the leading ``columns`` of them)."""
    count = min(columns, values.numel())
    left = torch.linalg.qr(torch.randn(values.numel(), count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64)).Q
    return ((left * values[:count].sqrt()) @ right.T).to(dtype)


@pytest.mark.parametrize("kind", ["exponential", "power", "flat tail"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [24, 0.7])
def test_sketch_holds_nearly_the_best_energy(kind: str, dtype: torch.dtype, rank: int | float) -> None:
    size = 600
    values = spectrum(kind, size)[:200]
    matrix = matrix_of(torch.cat([values, values.new_zeros(size - 200)]), 200, dtype)
    sketch = NystromSketch(size, rank, dtype, CPU)
    for piece in matrix.split(50, 1):  # four updates, as from four batches
        sketch.update(piece.T.reshape(5, 10, size), 2)
    assert sketch.trace == pytest.approx(float(values.sum()), rel=1e-5)
    found, vectors = sketch.eigh()
    count = 24 if isinstance(rank, int) else energy_rank(found, sketch.trace, rank)
    best = float(values[:count].sum())
    basis = vectors[:, :count].double()
    captured = float((basis.T @ matrix.double()).square().sum())
    assert captured >= 0.98 * best
    # The eigenvalues never claim energy that the basis does not hold.
    claimed = float(found[:count].sum())
    assert claimed <= captured * (1 + 1e-4)
    assert claimed >= 0.9 * captured
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    assert (basis.T @ basis - torch.eye(count, dtype=torch.float64)).abs().max() < tolerance
    if kind != "power":
        assert captured >= 0.995 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [3, 64, 0.9])
def test_sketch_of_data_of_less_rank_than_its_width(dtype: torch.dtype, rank: int | float) -> None:
    matrix = torch.randn(800, 5, dtype=dtype) @ torch.randn(5, 100, dtype=dtype)
    sketch = NystromSketch(800, rank, dtype, CPU)
    sketch.update(matrix, 0)
    found, vectors = sketch.eigh()
    exact = torch.linalg.svdvals(matrix.double())[:5].square()
    count = min(5, vectors.shape[1])
    torch.testing.assert_close(found[:count].double(), exact[:count], rtol=1e-3, atol=0)
    assert vectors.isfinite().all()
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1], dtype=dtype)).abs().max() < 1e-5
    held = float((vectors[:, :count].T @ matrix).square().sum())
    assert held == pytest.approx(float(exact[:count].sum()), rel=1e-3)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 0.0])
def test_sketch_of_inputs_whose_mean_is_nearly_everything(spread: float) -> None:
    tensor = 1.0 + spread * torch.randn(64, 1024)
    sketch = NystromSketch(1024, 64, torch.float32, CPU)
    sketch.update(tensor, 1)
    found, vectors = sketch.eigh()
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max() < 1e-5
    assert float(found[0]) == pytest.approx(sketch.trace, rel=1e-3)
    assert float((vectors[:, 0] @ tensor.T).square().sum()) == pytest.approx(sketch.trace, rel=1e-3)


def test_the_energy_rule_widens_a_sketch_and_says_so() -> None:
    size = 500
    matrix = matrix_of(torch.cat([torch.ones(150), torch.zeros(size - 150)]).double(), 200, torch.float32)
    sketch = NystromSketch(size, 0.7, torch.float32, CPU, "layer4, channel mode")
    with pytest.warns(LanceWarning, match=r"layer4, channel mode: energy 0\.7 of a mode 500 wide needs more than 48"):
        sketch.update(matrix, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sketch.update(matrix, 0)  # only the first input may widen it
    found, vectors = sketch.eigh()
    rank = energy_rank(found, sketch.trace, 0.7)
    assert vectors.shape[1] >= rank
    assert float((vectors[:, :rank].T @ matrix).square().sum()) >= 0.69 * float(matrix.square().sum())
    assert sketch.width <= size


def test_a_sketch_that_holds_enough_stays_as_it_is_and_is_silent() -> None:
    matrix = matrix_of(spectrum("exponential", 500), 200, torch.float32)
    sketch = NystromSketch(500, 0.9, torch.float32, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sketch.update(matrix, 0)
    assert sketch.width == SKETCH_WIDTH


def test_a_flat_spectrum_widens_the_sketch_to_the_whole_mode_at_most() -> None:
    matrix = torch.eye(300)
    sketch = NystromSketch(300, 0.99, torch.float32, CPU)
    with pytest.warns(LanceWarning, match=r"energy 0\.99"):
        sketch.update(matrix, 0)
    assert sketch.width == 300
    found, vectors = sketch.eigh()
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max() < 1e-5
    assert float(found.sum()) <= 300 * (1 + 1e-3)


@pytest.mark.parametrize(
    ("shape", "mode", "dtype"),
    [
        ((64, 2048), 1, torch.float32),
        ((32, 16, 2048), 2, torch.float32),  # a linear layer's features: the unfolding is a view
        ((16, 2048, 7, 7), 1, torch.float32),  # channels: it is a copy
        ((16, 2048, 7, 7), 1, torch.bfloat16),
        ((1, 1100, 40, 40), 1, torch.float32),  # one sample larger than the memory allowed
        ((4, 1400, 96), 1, torch.float32),  # tokens
        ((256, 1030), 1, torch.float64),
    ],
)
@pytest.mark.parametrize("rank", [8, 0.7])
def test_a_wide_mode_needs_at_most_256_floats_per_row(
    shape: tuple[int, ...], mode: int, dtype: torch.dtype, rank: int | float
) -> None:
    size = shape[mode]
    scale = torch.exp(-torch.arange(size) / 8).reshape(-1, *[1] * (len(shape) - mode - 1))
    tensor = (torch.randn(shape) * scale + 0.01 * scale).to(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = size * 256 * accumulate.itemsize
    with LiveBytes(tensor) as memory:
        statistics = mode_statistics(size, rank, accumulate, CPU)
        assert isinstance(statistics, NystromSketch)
        for _ in range(2):
            statistics.update(tensor, mode)
        updating = memory.peak
        statistics.eigh()
    assert updating > 2 * statistics.width * size * accumulate.itemsize  # the measurement sees the accumulators
    assert updating <= allowed
    assert memory.peak <= allowed


def test_an_exact_mode_makes_no_copy_of_a_large_input() -> None:
    tensor = torch.randn(64, 32, 64, 64)
    with LiveBytes(tensor) as memory:
        statistics = GramMatrix(32, torch.float32, CPU)
        statistics.update(tensor, 1)
    assert memory.peak < tensor.nbytes * 0.6


@pytest.mark.parametrize("kind", [GramMatrix, NystromSketch])
def test_the_sum_of_two_halves_is_the_whole(kind: type) -> None:
    size = 300
    first, second = torch.randn(2, 40, size, dtype=torch.float64) * torch.exp(-torch.arange(size) / 8)
    arguments = (size, torch.float64, CPU) if kind is GramMatrix else (size, 30, torch.float64, CPU)
    whole, half, other = (kind(*arguments) for _ in range(3))
    whole.update(torch.cat([first, second]), 1)
    half.update(first, 1)
    other.update(second, 1)
    for target, source in zip(half.tensors(), other.tensors(), strict=True):
        target += source  # what a sum over processes does, in place
    assert half.trace == pytest.approx(whole.trace, rel=1e-12)
    values, vectors = whole.eigh()
    summed_values, summed_vectors = half.eigh()
    torch.testing.assert_close(summed_values, values, rtol=1e-9, atol=1e-9 * float(values[0]))
    torch.testing.assert_close(
        summed_vectors[:, :10].abs(), vectors[:, :10].abs(), rtol=0, atol=1e-6
    )  # up to sign, the leading ones


def test_processes_that_widened_differently_agree_on_a_width_in_any_order() -> None:
    size = 500
    narrow = matrix_of(spectrum("exponential", size), 100, torch.float64)
    wide = matrix_of(torch.cat([torch.ones(150), torch.zeros(size - 150)]).double(), 200, torch.float64)
    for order in ([0, 1], [1, 0]):
        sketches = [NystromSketch(size, 0.8, torch.float64, CPU) for _ in range(3)]
        sketches[0].update(narrow, 0)
        with pytest.warns(LanceWarning):
            sketches[1].update(wide, 0)
        widths = [sketches[index].width for index in order]
        assert widths[0] != widths[1]
        for sketch in sketches:  # the third process saw no such input
            for width in widths:
                sketch.agree(width)
        assert {sketch.width for sketch in sketches} == {min(widths)}
        for source in sketches[1:]:
            for target, part in zip(sketches[0].tensors(), source.tensors(), strict=True):
                target += part
        expected = NystromSketch(size, min(widths) - OVERSAMPLING, torch.float64, CPU)
        expected.update(torch.cat([narrow, wide], 1), 0)
        assert sketches[0].trace == pytest.approx(expected.trace, rel=1e-12)
        torch.testing.assert_close(sketches[0].eigh()[0], expected.eigh()[0], rtol=1e-8, atol=1e-10)


def test_a_sketch_that_took_a_stored_width_keeps_what_it_holds_on_the_next_update() -> None:
    wide = matrix_of(torch.cat([torch.ones(150), torch.zeros(350)]).double(), 200, torch.float64)
    stored = NystromSketch(500, 0.8, torch.float64, CPU)
    with pytest.warns(LanceWarning):
        stored.update(wide, 0)
    resumed = NystromSketch(500, 0.8, torch.float64, CPU)
    resumed.agree(stored.width)
    for target, saved in zip(resumed.tensors(), stored.tensors(), strict=True):
        target.copy_(saved)
    flat = torch.eye(500, dtype=torch.float64)
    for sketch in (stored, resumed):
        sketch.update(flat, 0)
    for one, other in zip(stored.tensors(), resumed.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sketch_takes_what_is_not_finite_and_lets_its_owner_say_so(value: float) -> None:
    tensor = torch.randn(8, 1100)
    tensor[3, 7] = value
    sketch = NystromSketch(1100, 0.9, torch.float32, CPU)
    sketch.update(tensor, 1)
    assert not all(bool(part.isfinite().all()) for part in sketch.tensors())


def test_two_sketches_of_a_mode_draw_the_same_test_matrix_without_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, second = (NystromSketch(1200, 9, torch.float32, CPU) for _ in range(2))
    assert torch.equal(first.test, second.test)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        third = NystromSketch(1200, 9, torch.float32, CPU)
    assert torch.equal(first.test, third.test)
