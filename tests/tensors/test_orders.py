"""Sample orders: uniform, reproducible from two numbers, and apart from every global generator."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from lightning_lance.tensors.orders import SampleOrder

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 1, -3, 2**62, -(2**63), 2**63 - 1])
def test_orders_are_permutations_that_two_numbers_determine(seed: int) -> None:
    first, second = SampleOrder(seed), SampleOrder(seed)
    orders = [first.draw(17, CPU) for _ in range(5)]
    assert first.state.tolist() == [seed, 5]
    for order in orders:
        assert order.dtype == torch.int32
        assert sorted(order.tolist()) == list(range(17))
        assert torch.equal(order, second.draw(17, CPU))
    assert len({tuple(order.tolist()) for order in orders}) == 5


def test_a_restored_count_continues_where_it_stood() -> None:
    source = SampleOrder(7)
    for _ in range(3):
        source.draw(9, CPU)
    saved = source.state.clone()
    expected = [source.draw(size, CPU).tolist() for size in (9, 4, 30)]
    resumed = SampleOrder(0)
    resumed.state.copy_(saved)
    assert [resumed.draw(size, CPU).tolist() for size in (9, 4, 30)] == expected


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda order: pickle.loads(pickle.dumps(order))])
def test_a_copy_draws_the_same_and_does_not_advance_the_original(clone: object) -> None:
    source = SampleOrder(5)
    source.draw(8, CPU)
    made = clone(source)  # type: ignore[operator]
    assert torch.equal(made.draw(8, CPU), SampleOrder.draw(copy.deepcopy(source), 8, CPU))
    assert source.state.tolist() == [5, 1]


def test_other_seeds_and_neighbouring_counts_give_other_orders() -> None:
    orders = {tuple(SampleOrder(seed).draw(20, CPU).tolist()) for seed in range(200)}
    assert len(orders) == 200


def test_no_global_generator_moves() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    SampleOrder(3).draw(64, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_every_order_of_four_samples_is_about_as_frequent() -> None:
    order = SampleOrder(11)
    draws = 4800
    counts = Counter(tuple(order.draw(4, CPU).tolist()) for _ in range(draws))
    assert set(counts) == set(permutations(range(4)))
    expected = draws / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = .001; the draw is the same in every run


@pytest.mark.parametrize("size", [0, 1])
def test_orders_of_nothing_and_of_one(size: int) -> None:
    assert SampleOrder(0).draw(size, CPU).tolist() == list(range(size))


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        order = SampleOrder(4)
        drawn = order.draw(6, CPU)
    assert order.state.device == CPU
    assert torch.equal(drawn, SampleOrder(4).draw(6, CPU))


def test_the_state_loads_safely() -> None:
    buffer = io.BytesIO()
    torch.save(SampleOrder(9).state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).tolist() == [9, 0]


def test_compiled_graphs_draw_what_eager_code_draws() -> None:
    eager, compiled = SampleOrder(2), SampleOrder(2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(size: int) -> torch.Tensor:
        return compiled.draw(size, CPU) + 0

    for _ in range(3):
        assert torch.equal(draw(12), eager.draw(12, CPU))
    assert compiled.state.tolist() == [2, 3]
