"""Maxima that are found block by block, next to those of the stock kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance.ops import pool
from lightning_lance.ops.pool import max_pool, window


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Few different values, so that many windows have several maxima; zeros of both signs, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    values = torch.where(torch.rand(shape, generator=generator) < 0.5, -values, values)
    for special in (torch.nan, torch.inf, -torch.inf):
        values[torch.rand(shape, generator=generator) < 0.03] = special
    return values


def identical(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN included, and with the same strides."""
    integers = {4: torch.int32, 8: torch.int64}[found.element_size()]
    return found.stride() == expected.stride() and torch.equal(found.view(integers), expected.view(integers))


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    block=st.sampled_from([1, 3000, 1 << 20]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_blocks_find_what_the_stock_kernel_finds(
    shape: tuple[int, ...], dtype: torch.dtype, block: int, seed: int, **arguments: Any
) -> None:
    frame = window(2, *(arguments[name] for name in ("kernel", "stride", "padding", "dilation", "ceil_mode")))
    assume(all(2 * pad <= size for pad, size in zip(frame.padding, frame.kernel, strict=True)))
    input = drawn(shape, dtype, seed)
    try:
        expected, packed, stride = pool._pool(input, frame)
    except RuntimeError:
        assume(False)
    before = pool._BLOCK_BYTES, pool._SAMPLE_BYTES
    try:
        pool._BLOCK_BYTES = pool._SAMPLE_BYTES = block
        found = pool._pool_blocks(input, frame)
    finally:
        pool._BLOCK_BYTES, pool._SAMPLE_BYTES = before
    assert identical(found[0], expected)
    assert torch.equal(found[1], packed)
    assert found[2] == stride


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 3, ceil_mode=True)])
def test_gradients_of_wide_maps(layer: nn.MaxPool2d, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    blocks = pool._pool_blocks
    monkeypatch.setattr(pool, "_pool_blocks", lambda *given: calls.append(given) or blocks(*given))
    input = torch.randn(9, 24, 31 * torch.get_num_threads(), 32).relu_().requires_grad_()
    expected = layer(input)
    grad = torch.randn_like(expected)
    (stock,) = torch.autograd.grad(expected, input, grad)
    found = max_pool(input, window(2, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode))
    assert calls
    assert identical(found.detach(), expected.detach())
    (ours,) = torch.autograd.grad(found, input, grad)
    assert identical(ours, stock)
    channels_last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert max_pool(channels_last, window(2, 2)).is_contiguous(memory_format=torch.channels_last)
    assert len(calls) == 1
