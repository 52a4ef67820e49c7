from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance.layers.registry import find
from tests.companions import assert_same, compact, kept, layouts, run, same_bits, special

MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def in_layout(x: Tensor, axes: int, channels_last: bool) -> Tensor:
    if not channels_last or axes == 1 or x.dim() != axes + 2:
        return x
    return x.contiguous(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)


def check(module: nn.Module, x: Tensor, axes: int, channels_last: bool, grad_last: bool) -> None:
    try:
        output = module(x)
    except RuntimeError:  # a window larger than the input
        assume(False)
        return
    grad = torch.randn_like(output)
    assert_same(module, compact(module), in_layout(x, axes, channels_last), in_layout(grad, axes, grad_last))


@st.composite
def shapes(draw: st.DrawFn, axes: int) -> tuple[int, ...]:
    sizes = [draw(st.integers(1, {1: 40, 2: 14, 3: 8}[axes])) for _ in range(axes)]
    batch = [draw(st.integers(1, 3))] if draw(st.booleans()) else []
    return (*batch, draw(st.integers(1, 4)), *sizes)


@given(data=st.data(), axes=st.integers(1, 3), channels_last=st.booleans(), grad_last=st.booleans())
@settings(max_examples=120, deadline=None)
def test_max_pool_bit_for_bit(data: st.DataObject, axes: int, channels_last: bool, grad_last: bool) -> None:
    kernel = [data.draw(st.integers(1, 5)) for _ in range(axes)]
    module = MAX[axes](
        kernel_size=tuple(kernel),
        stride=tuple(data.draw(st.integers(1, 4)) for _ in range(axes)) if data.draw(st.booleans()) else None,
        padding=tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        dilation=tuple(data.draw(st.integers(1, 3)) for _ in range(axes)),
        ceil_mode=data.draw(st.booleans()),
    )
    shape = data.draw(shapes(axes))
    # Where every place of a window lies outside of the input the stock backward writes out of bounds.
    assume(no_empty_window(module, shape, axes))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    values = data.draw(st.sampled_from(["special", "ties", "-inf"]))
    x = {"special": special(*shape), "ties": torch.randint(0, 2, shape), "-inf": torch.full(shape, -torch.inf)}[values]
    check(module, x.to(dtype), axes, channels_last, grad_last)


def no_empty_window(module: Any, shape: tuple[int, ...], axes: int) -> bool:
    try:
        sizes = module(torch.zeros(shape)).shape[-axes:]
    except RuntimeError:  # a window larger than the input
        return False
    tuples = [v if isinstance(v, tuple) else (v,) * axes for v in (module.stride, module.padding, module.dilation)]
    for size, outputs, k, s, p, d in zip(shape[-axes:], sizes, module.kernel_size, *tuples, strict=True):
        if not all(any(0 <= i * s - p + d * j < size for j in range(k)) for i in range(outputs)):
            return False
    return True


@given(data=st.data(), axes=st.integers(1, 3), channels_last=st.booleans(), grad_last=st.booleans())
@settings(max_examples=80, deadline=None)
def test_avg_pool_bit_for_bit(data: st.DataObject, axes: int, channels_last: bool, grad_last: bool) -> None:
    kernel = [data.draw(st.integers(1, 5)) for _ in range(axes)]
    options: dict[str, Any] = {
        "kernel_size": tuple(kernel),
        "stride": tuple(data.draw(st.integers(1, 4)) for _ in range(axes)) if data.draw(st.booleans()) else None,
        "padding": tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": data.draw(st.booleans()),
        "count_include_pad": data.draw(st.booleans()),
    }
    if axes > 1:
        options["divisor_override"] = data.draw(st.sampled_from([None, 3]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    check(AVG[axes](**options), special(*data.draw(shapes(axes)), dtype=dtype), axes, channels_last, grad_last)


@given(data=st.data(), axes=st.integers(1, 3), channels_last=st.booleans(), grad_last=st.booleans())
@settings(max_examples=80, deadline=None)
def test_adaptive_avg_pool_bit_for_bit(data: st.DataObject, axes: int, channels_last: bool, grad_last: bool) -> None:
    size: Any = data.draw(st.integers(1, 5))
    if data.draw(st.booleans()):
        wanted = st.integers(1, 5) if axes == 1 else st.none() | st.integers(1, 5)
        size = tuple(data.draw(wanted) for _ in range(axes))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    check(ADAPTIVE[axes](size), special(*data.draw(shapes(axes)), dtype=dtype), axes, channels_last, grad_last)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_averages_keep_nothing(axes: int) -> None:
    x = torch.randn(2, 3, *[12] * axes)
    for module in (AVG[axes](2), AVG[axes](3, 2, 1), ADAPTIVE[axes](3)):
        assert kept(module, x) >= 4 * x.numel()
        assert kept(compact(module), x) == 0


@pytest.mark.parametrize(("kernel", "bits"), [(1, 2), (2, 2), ((1, 4), 2), (3, 4), (4, 4), (5, 8), (16, 8), (17, 16)])
def test_bits_by_places_in_a_window(kernel: Any, bits: int) -> None:
    x = torch.randn(1, 3, 20, 21)
    module = nn.MaxPool2d(kernel, 1)
    output = module(x)
    assert kept(module, x) == 4 * x.numel() + 8 * output.numel()
    rounded = -(-output.numel() * bits // 8)
    assert kept(compact(module), x) == rounded
    assert_same(module, compact(module), x, torch.randn_like(output))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_at_most_a_byte_per_output(axes: int) -> None:
    x = torch.randn(2, 3, *[12] * axes)
    module = MAX[axes](3, 2, 1)
    assert kept(module, x) >= 4 * x.numel()
    assert kept(compact(module), x) <= module(x).numel()


def test_a_window_wider_than_the_input() -> None:
    module = nn.MaxPool2d((3, 5), padding=(1, 2), stride=1)
    x = torch.randn(2, 3, 4, 2)
    assert_same(module, compact(module), x, torch.randn_like(module(x)))


@pytest.mark.parametrize(
    "module",
    [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((2, 3))],
    ids=lambda m: type(m).__name__,
)
def test_every_memory_layout(module: nn.Module) -> None:
    shape = (2, 3, 8, 9)
    out = module(torch.zeros(shape)).shape
    grads = layouts(*out)
    for x in layouts(*shape).values():
        for grad in grads.values():
            left, right = run(module, x, grad), run(compact(module), x, grad)
            assert all(same_bits(a, b) for a, b in zip(left, right, strict=True))


def test_global_mean_runs_the_stock_operator() -> None:
    for axes in (1, 2, 3):
        x = torch.randn(2, 3, *[4] * axes, requires_grad=True)
        assert type(compact(ADAPTIVE[axes](1))(x).grad_fn).__name__ == type(ADAPTIVE[axes](1)(x).grad_fn).__name__


def test_indices_asked_for_are_left_alone() -> None:
    module = nn.MaxPool2d(2, return_indices=True)
    (variant,) = find(module)
    assert "return_indices" in str(variant.refusal(module))
    ours = compact(nn.MaxPool2d(2))
    ours.return_indices = True  # type: ignore[assignment]
    _, indices = ours(torch.randn(1, 1, 4, 4, requires_grad=True))
    assert indices.dtype == torch.int64


def test_wrong_inputs_get_the_stock_message() -> None:
    for x in (torch.randn(4, requires_grad=True), torch.randn(1, 1, 1, 4, 4, requires_grad=True)):
        with pytest.raises(RuntimeError, match="3D or 4D"):
            compact(nn.MaxPool2d(2))(x)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        compact(nn.MaxPool2d(2, padding=2))(torch.randn(1, 1, 4, 4, requires_grad=True))


def test_called_twice() -> None:
    module = nn.MaxPool2d(3, 2, 1)
    ours = compact(module)
    assert_same(lambda x: module(module(x)), lambda x: ours(ours(x)), torch.randn(2, 3, 9, 9), torch.randn(2, 3, 3, 3))


def test_stock_path_without_gradient() -> None:
    x = torch.randn(1, 2, 6, 6)
    for module in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)):
        ours = compact(module)
        assert ours(x).grad_fn is None
        with torch.no_grad():
            assert same_bits(ours(x.clone().requires_grad_()), module(x))


@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(3, 2, 1), nn.MaxPool1d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3)], ids=repr
)
def test_compiles_in_one_graph(module: nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 8) if "1d" not in type(module).__name__ else torch.randn(2, 3, 8)
    grad = torch.randn_like(module(x))
    ours = torch.compile(compact(module), backend="aot_eager", fullgraph=True)
    for left, right in zip(run(ours, x, grad), run(module, x, grad), strict=True):
        assert torch.equal(left, right)


def test_copies_and_pickles() -> None:
    ours = compact(nn.MaxPool2d(3, 2, 1))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(ours, other, torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4))
