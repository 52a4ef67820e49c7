"""Indices of maxima as places in their windows: what comes back is what torch returned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.tensors.places import Window, pack, unpack, window

POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def come_back(index: Tensor, sizes: tuple[int, ...], where: Window) -> Tensor:
    """Check that packing loses nothing, and return the codes."""
    codes = pack(index, sizes, where)
    found = unpack(codes, index.shape, index.stride(), sizes, where)
    assert found.stride() == index.stride()
    assert torch.equal(found, index)
    return codes


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, Window, tuple[int, ...], bool]:
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel = per_axis(1, {1: 20, 2: 5, 3: 3}[axes])
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    dilation = per_axis(1, 3)
    sizes = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + extra
        for k, p, d, extra in zip(kernel, padding, dilation, per_axis(0, 6), strict=True)
    )
    return axes, Window(kernel, per_axis(1, 4), padding, dilation), sizes, draw(st.booleans())


@given(pool=pools(), seed=st.integers(0, 2**16), ties=st.booleans(), last=st.booleans())
@settings(max_examples=200)
def test_indices_come_back(pool: Any, seed: int, ties: bool, last: bool) -> None:
    axes, where, sizes, ceil = pool
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(seed))
    if ties:
        x = x.round()
    if last and axes == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    _, index = POOL[axes](x, *where, ceil_mode=ceil, return_indices=True)
    codes = come_back(index, sizes, where)
    count = math.prod(where.kernel)
    per_byte = 4 if count <= 4 else 2 if count <= 16 else 1
    assert codes.nbytes == -(-index.numel() // per_byte)


@pytest.mark.parametrize(("side", "itemsize"), [(16, 1), (17, 2)])
def test_many_places_take_more_than_a_byte(side: int, itemsize: int) -> None:
    x = torch.randn(2, 3, 2 * side, 2 * side)
    _, index = F.max_pool2d(x, side, 3, return_indices=True)
    codes = come_back(index, (2 * side, 2 * side), window(2, side, 3))
    assert codes.nbytes == itemsize * index.numel()


def test_a_window_wider_than_the_input() -> None:
    """Two places of it lie at one distance: either code leads back to it."""
    x = torch.randn(2, 3, 3, 3)
    _, index = F.max_pool2d(x, 6, 1, 3, return_indices=True)
    come_back(index, (3, 3), window(2, 6, 1, 3))


def test_an_axis_in_front_changes_no_place() -> None:
    x = torch.randn(4, 5, 31)
    _, index = F.max_pool1d(x, 5, 2, 1, 2, return_indices=True)
    where = window(1, 5, 2, 1, 2)
    codes = come_back(index, (31,), where)
    assert torch.equal(come_back(index.unsqueeze(-2), (1, 31), where.with_axis()), codes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2, 3), Window((3, 3), (3, 3), (0, 0), (1, 1))),
        ((2, (3,), [], 1, [2, 1]), Window((3, 3), (3, 3), (1, 1), (2, 1))),
        ((1, [np.int64(4)], torch.tensor(2), (1,)), Window((4,), (2,), (1,), (1,))),
        ((3, (1, 2, 3), (3, 2, 1)), Window((1, 2, 3), (3, 2, 1), (0, 0, 0), (1, 1, 1))),
    ],
)
def test_arguments_as_the_stock_operators_take_them(arguments: Any, expected: Window) -> None:
    assert window(*arguments) == expected
