"""What is left of earlier experiences outside of a protected basis, against dense second moments in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.continual import FeatureMoments, LayerMemory, complement
from lightning_lance.continual.leftover import LEFT_OUT, step_sizes
from lightning_lance.ops.features import FeatureSide

WIDTH = 20


def spectrum_gram(seed: int, decay: float) -> Tensor:
    """Gram matrix with eigenvalues that fall by a factor, in directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    return directions * decay ** torch.arange(WIDTH, dtype=torch.float64) @ directions.T


def through(memory: LayerMemory, matrix: Tensor, threshold: float, damping: float = 1.0) -> None:
    memory.reserve(matrix, "full", damping)
    memory.start()
    memory.protect(matrix, threshold, soft=True)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("compact", [True, False])
def test_energies_are_those_of_all_experiences_so_far(threshold: float, compact: bool) -> None:
    memory = LayerMemory(WIDTH, dtype=torch.float64, compact=compact)
    past = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    free_seen = False
    for experience in range(6):
        matrix = spectrum_gram(experience, 0.7)
        through(memory, matrix, threshold)
        past += matrix / matrix.trace()
        outside = complement(memory.protected[0])
        if outside.shape[1] == 0:
            break
        free_seen |= memory.free is not None
        (left,) = memory._leftovers()
        found, expected = left.along(outside), (outside.T @ past @ outside).diagonal()
        # Of each experience, what is not kept apart is spread evenly.
        assert float((found - expected).abs().max()) <= LEFT_OUT * (experience + 1) + 1e-9
        assert float(found.sum()) == pytest.approx(float(expected.sum()), abs=LEFT_OUT * (experience + 1))
        if memory.free is not None:
            inner = memory.free[0].T @ past @ memory.free[0]
            assert float((inner - inner.diagonal().diag()).abs().max()) < LEFT_OUT * (experience + 1) + 1e-9
    assert free_seen == compact


def test_directions_stored_in_float32_are_orthonormal_and_outside_of_what_is_protected() -> None:
    width, generator = 400, torch.Generator().manual_seed(0)
    memory = LayerMemory(width)
    past = torch.zeros(width, width, dtype=torch.float64)
    for experience in range(4):
        vectors = torch.randn(width, width, generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(vectors).Q[:, :60]
        matrix = directions * 0.85 ** torch.arange(60, dtype=torch.float64) @ directions.T
        through(memory, matrix, 0.5)
        past += matrix / matrix.trace()
        assert memory.free is None
        (left,) = memory._leftovers()
        protected, found = memory.protected[0].double(), left.directions.double()
        assert found.shape[1] > 10
        assert float((found.T @ found - torch.eye(found.shape[1], dtype=torch.float64)).abs().max()) < 1.5e-6
        assert float((protected.T @ found).abs().max()) < 1e-6
        outside = complement(protected)
        expected = (outside.T @ past @ outside).diagonal()
        assert float((left.along(outside) - expected).abs().max()) <= LEFT_OUT * (experience + 1) + 1e-6


@pytest.mark.parametrize("most", [0, 1, 3])
def test_the_leading_directions_are_kept_and_the_others_count_in_the_mean(most: int) -> None:
    memory = LayerMemory(WIDTH, dtype=torch.float64, compact=False)
    past = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for experience in range(3):
        matrix = spectrum_gram(experience, 0.7)
        memory.reserve(matrix, "full", 1.0)
        memory.start()
        memory.protect(matrix, 0.5, soft=True, left_out=0.0, most=most)
        past += matrix / matrix.trace()
        outside = complement(memory.protected[0])
        energies = outside.T @ past @ outside
        (left,) = memory._leftovers()
        assert left.directions.shape[1] == memory.beside == most
        # What was not kept has no direction any more: later on its share of a grown M is a guess.
        assert float(left.along(outside).sum()) == pytest.approx(
            float(energies.trace()), rel=0.02 if experience else 1e-6
        )
        if experience == 0:
            leading = torch.linalg.eigvalsh(energies).flip(0)[:most]
            torch.testing.assert_close(left.along(left.directions), leading, rtol=1e-6, atol=left.rest)


@pytest.mark.parametrize("left_out", [0.01, 0.2])
def test_what_is_not_kept_holds_no_more_than_is_allowed(left_out: float) -> None:
    memory = LayerMemory(WIDTH, dtype=torch.float64, compact=False)
    matrix = spectrum_gram(0, 0.7)
    memory.reserve()
    memory.start()
    memory.protect(matrix, 0.5, soft=True, left_out=left_out)
    (left,) = memory._leftovers()
    outside = WIDTH - memory.counts[0]
    held = float((left.directions.T @ matrix @ left.directions).trace() / matrix.trace())
    missing = left.rest * (outside - memory.beside)
    total = 1.0 - float((memory.protected[0].T @ matrix @ memory.protected[0]).trace() / matrix.trace())
    assert held + missing == pytest.approx(total, rel=1e-6)
    assert left_out / 4 < missing <= left_out


def test_without_damping_only_the_mean_energy_is_stored_beside_a_basis() -> None:
    memory = LayerMemory(WIDTH, dtype=torch.float64)
    matrix = spectrum_gram(0, 0.5)
    memory.reserve()
    memory.start()
    memory.protect(matrix, 0.8)
    (left,) = memory._leftovers()
    outside = complement(memory.protected[0])
    assert left.directions.shape == (WIDTH, 0)
    assert memory.bytes == memory.protected.nbytes
    share = float((outside.T @ matrix @ outside).trace() / matrix.trace())
    assert left.rest == pytest.approx(share / outside.shape[1])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 100),
)
def test_step_sizes_shrink_with_the_past_and_grow_with_the_present(
    pairs: list[tuple[float, float]], damping: float
) -> None:
    past, present = torch.tensor(pairs, dtype=torch.float64).T
    sizes = step_sizes(past, present, damping)
    assert bool(((sizes >= 0) & (sizes <= 1)).all())
    assert bool((step_sizes(past * 2, present, damping) <= sizes + 1e-12).all())
    assert bool((step_sizes(past, present * 2, damping) >= sizes - 1e-12)[present > 1e-6].all())
    assert bool((sizes[past == 0] == 1).all())


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["full", 3, 0.9]), st.sampled_from([0.5, 0.8, 0.9]))
def test_what_is_protected_stays_closed_and_no_step_gets_longer(
    seed: int, rank: int | float | str, level: float
) -> None:
    memory = LayerMemory(WIDTH, 2, dtype=torch.float64)
    for experience in range(4):
        matrix = torch.stack([spectrum_gram(seed + 10 * experience + group, 0.6) for group in range(2)])
        memory.reserve(matrix, rank if experience else "full", 2.0)
        if experience:
            assert memory.steps is not None
            assert bool(((memory.steps >= 0) & (memory.steps <= 1)).all())
            if memory.reserved is None:
                closed = memory.closed()
                change = torch.eye(WIDTH, dtype=torch.float64) - closed @ closed.mT
            else:
                change = memory.directions() @ memory.reserved.mT
            assert float((change @ memory.protected).abs().max()) < 1e-9
            assert float(torch.linalg.matrix_norm(change, 2).max()) < 1 + 1e-9
        memory.start()
        memory.protect(matrix, level, soft=True)


def test_a_layer_that_calibration_never_reached_keeps_full_steps() -> None:
    memory = LayerMemory(WIDTH, dtype=torch.float64)
    through(memory, spectrum_gram(0, 0.5), 0.8)
    empty = FeatureMoments(FeatureSide(1, WIDTH), None, "layer")
    memory.reserve(empty, "full", 1.5)
    assert memory.steps is not None
    assert bool((memory.steps == 1).all())
    memory.abandon()
    assert memory.steps is None
