"""Indices of maxima as places in their windows: what comes back is what torch returned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.tensors import native
from lightning_lance.tensors.places import Window, out_sizes, pack, pool, scatter, unpack, window
from tests.stock import same_bits

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_native", None)
        assert torch.equal(come_back(index, sizes, where), codes)


@pytest.mark.skipif(native._native is None, reason="nothing was compiled")
@given(pool=pools(), seed=st.integers(0, 2**16), planes=st.integers(1, 5), threads=st.sampled_from([1, 3]))
@settings(max_examples=150)
def test_gradients_are_those_of_the_stock_kernel(pool: Any, seed: int, planes: int, threads: int) -> None:
    axes, where, sizes, ceil = pool
    x = torch.randn(2, planes, *sizes, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    result, index = POOL[axes](x, *where, ceil_mode=ceil, return_indices=True)
    # A dilated window may lie in the padding with all of its elements: torch writes beside its own memory there.
    assume(int(index.max()) < math.prod(sizes) and bool(result.isfinite().all()))
    grad = torch.randn_like(result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_threads", lambda _: threads)
        found = scatter(pack(index, sizes, where), grad, sizes, where)
    assert found is not None
    (expected,) = torch.autograd.grad(result, x, grad)
    assert torch.equal(found, expected)


@st.composite
def flat_pools(draw: st.DrawFn) -> tuple[Window, tuple[int, ...]]:
    kernel, sizes, stride, padding = [], [], [], []
    for _ in range(2):
        kernel.append(draw(st.integers(1, draw(st.sampled_from([3, 5, 16])))))
        padding.append(draw(st.integers(0, kernel[-1] // 2)))
        sizes.append(max(1, kernel[-1] - 2 * padding[-1]) + draw(st.integers(0, 40)))
        stride.append(draw(st.sampled_from([1, 2, 2, 3, 7, 50])))
    return Window(tuple(kernel), tuple(stride), tuple(padding), (1, 1)), tuple(sizes)


@pytest.mark.skipif(native._native is None, reason="nothing was compiled")
@given(
    drawn=flat_pools(),
    planes=st.integers(1, 9),
    ceil=st.booleans(),
    ties=st.booleans(),
    odd=st.booleans(),
    threads=st.sampled_from([1, 3]),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300, deadline=None)
def test_maxima_and_places_are_those_of_the_stock_operator(
    drawn: Any, planes: int, ceil: bool, ties: bool, odd: bool, threads: int, wide: bool, seed: int
) -> None:
    where, sizes = drawn
    assume(planes * math.prod(sizes) < 20_000)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(planes, *sizes, generator=draw)
    if ties:
        x = x.round()  # zeros of both signs
    if odd:
        special = torch.tensor([math.nan, math.inf, -math.inf, -math.inf])
        x = torch.where(torch.rand(x.shape, generator=draw) < 0.4, special[torch.randint(0, 4, x.shape)], x)
    result, index = torch.ops.aten.max_pool2d_with_indices(x, *where, ceil)
    before = native._native.widen(wide)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_threads", lambda _: threads)
            found = pool(x, where, ceil)
    finally:
        native._native.widen(before)
    assert found is not None
    assert same_bits(found[0], result)
    assert out_sizes(sizes, where, ceil) == result.shape[1:]
    assert torch.equal(unpack(found[1], index.shape, index.stride(), sizes, where), index)


@pytest.mark.skipif(native._native is None, reason="nothing was compiled")
@pytest.mark.parametrize(
    ("x", "arguments"),
    [
        (torch.randn(2, 8, 8, dtype=torch.float64), (2,)),
        (torch.randn(2, 8, 8).bfloat16(), (2,)),
        (torch.randn(8, 8), (2,)),
        (torch.randn(1, 1, 2, 8, 8), (2,)),
        (torch.randn(2, 8, 8).mT, (2,)),
        (torch.randn(2, 8, 8), (2, 2, 1, 2)),
        (torch.randn(2, 8, 8), (2, 2, 2)),
        (torch.randn(2, 8, 8), (2, 2, -1)),
        (torch.randn(2, 8, 8), (2, 0)),
        (torch.randn(2, 8, 8), (9,)),
        (torch.randn(2, 20, 20), (17,)),
        (torch.randn(4, 1, 8, 8), (2,)),  # in channels last too, as the stock result is then
    ],
)
def test_there_is_no_pass_for_other_pools(x: Tensor, arguments: tuple[int, ...]) -> None:
    assert pool(x, window(2, *arguments), False) is None


@pytest.mark.skipif(native._native is None, reason="nothing was compiled")
def test_a_window_outside_of_the_input_gets_no_gradient() -> None:
    where = window(2, 2, 2, 1, 2)  # at -1 and 1 of an axis of one element
    _, index = F.max_pool2d(torch.randn(1, 2, 1, 9), *where, return_indices=True)
    grad = torch.randn(index.shape)
    found = scatter(pack(index, (1, 9), where), grad, (1, 9), where)
    assert found is not None
    assert int((found != 0).sum()) <= int((index < 9).sum())


def test_there_is_no_pass_for_other_gradients() -> None:
    where = window(2, 2)
    _, index = F.max_pool2d(torch.randn(2, 3, 8, 8), 2, return_indices=True)
    codes = pack(index, (8, 8), where)
    assert scatter(codes, torch.randn(2, 3, 4, 4, dtype=torch.float64), (8, 8), where) is None
    assert scatter(codes, torch.randn(2, 3, 4, 4).bfloat16(), (8, 8), where) is None


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
