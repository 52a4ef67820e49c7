from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lance.layers.registry import find
from tests.companions import assert_same, compact, kept, layouts, run, same_bits, special

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(
    shape=st.lists(st.integers(0, 7), max_size=5).map(tuple),
    p=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 0.999, 1.0]),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_bit_for_bit_the_stock_one(shape: tuple[int, ...], p: float, dtype: torch.dtype, inplace: bool) -> None:
    module = nn.Dropout(p, inplace)
    assert_same(module, compact(module), special(*shape, dtype=dtype), special(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 5, 6)])
def test_every_memory_layout(shape: tuple[int, ...]) -> None:
    module = nn.Dropout(0.3)
    grads = layouts(*shape)
    for x in layouts(*shape).values():
        for grad in grads.values():
            assert_same(module, compact(module), x, grad)


def test_large_inputs_draw_the_same_numbers() -> None:
    assert_same(nn.Dropout(0.4), compact(nn.Dropout(0.4)), torch.randn(70_001), torch.randn(70_001))


@pytest.mark.parametrize("inplace", [False, True])
def test_one_bit_per_element(inplace: bool) -> None:
    module = nn.Dropout(0.5, inplace)
    x = torch.randn(4, 3, 10, 11)
    assert kept(module, x) >= 4 * x.numel()
    assert kept(compact(module), x) == x.numel() // 8


def test_eval_mode_and_no_gradient_take_the_stock_path() -> None:
    ours = compact(nn.Dropout(0.5)).eval()
    x = torch.randn(5, requires_grad=True)
    assert ours(x) is x
    ours.train()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = ours(x)
    torch.set_rng_state(state)
    assert same_bits(found, nn.Dropout(0.5)(x.detach()))


def test_called_twice() -> None:
    module = nn.Dropout(0.3)
    ours = compact(module)
    x, grad = torch.randn(8, 9), torch.randn(8, 9)
    assert_same(lambda x: module(module(x)), lambda x: ours(ours(x)), x, grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(inplace: bool) -> None:
    torch._dynamo.reset()
    ours = torch.compile(compact(nn.Dropout(0.25, inplace)), backend="aot_eager", fullgraph=True)
    output, grad = run(ours, torch.ones(1000), torch.ones(1000))
    assert same_bits(output, grad)
    assert set(output.tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}


def test_dropout_of_channels_is_left_alone() -> None:
    assert not any(find(module) for module in (nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout()))


def test_copies_and_pickles() -> None:
    ours = compact(nn.Dropout(0.3))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(ours, other, torch.randn(50), torch.randn(50))
