from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import measure_saved_bytes
from lightning_lance.compression.functional import compact_functional
from tests.companions import assert_same, run, same_bits, special

MEAN, VAR = torch.randn(3), torch.rand(3) + 0.1
WEIGHT, BIAS = torch.randn(3), torch.randn(3)

# Expression on (2, 3, 8, 8) -> bytes that it may keep.
ONE_BIT = 2 * 3 * 8 * 8 // 8
CALLS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "F.relu": (F.relu, ONE_BIT),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), ONE_BIT),
    "F.relu_": (F.relu_, ONE_BIT),
    "torch.relu": (torch.relu, ONE_BIT),
    "torch.relu by keyword": (lambda x: torch.relu(input=x), ONE_BIT),
    "torch.relu_": (torch.relu_, ONE_BIT),
    "Tensor.relu": (lambda x: x.relu(), ONE_BIT),
    "Tensor.relu_": (lambda x: x.relu_(), ONE_BIT),
    "F.relu6": (F.relu6, ONE_BIT),
    "F.hardtanh": (lambda x: F.hardtanh(x, max_val=0.5), ONE_BIT),
    "F.hardtanh_": (F.hardtanh_, ONE_BIT),
    "F.leaky_relu": (F.leaky_relu, ONE_BIT),
    "F.leaky_relu, slope": (lambda x: F.leaky_relu(x, 0.2), ONE_BIT),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, negative_slope=0.2), ONE_BIT),
    "F.hardsigmoid": (F.hardsigmoid, ONE_BIT),
    "F.dropout": (F.dropout, ONE_BIT),
    "F.dropout in place": (lambda x: F.dropout(x, p=0.2, inplace=True), ONE_BIT),
    "torch.dropout": (lambda x: torch.dropout(x, 0.1, True), ONE_BIT),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), 2 * 3 * 16 // 4),
    "F.max_pool2d, all arguments": (lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0), dilation=1, ceil_mode=True), 60),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, kernel_size=3, stride=2, padding=1), 48),
    "F.max_pool1d": (lambda x: F.max_pool1d(x[0], 2), 24),
    "F.max_pool3d": (lambda x: F.max_pool3d(x, (1, 2, 2)), 24),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False), 0),
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x[0], 2), 0),
    "F.avg_pool3d": (lambda x: F.avg_pool3d(x, 2, divisor_override=3), 0),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x[0], 3), 0),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (None, 3)), 0),
    "F.adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), 0),
    "F.adaptive_avg_pool2d, mean": (lambda x: F.adaptive_avg_pool2d(x, 1), 0),
    "F.batch_norm": (lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT, BIAS), 0),
    "F.batch_norm, no affine": (lambda x: F.batch_norm(x, MEAN, VAR, eps=1e-3), 0),
}


def within(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def wrapped(x: Tensor) -> Any:
        with compact_functional():
            return function(x)

    return wrapped


def kept(function: Callable[[Tensor], Any], x: Tensor) -> int:
    # Small tensors such as the statistics of a batch norm are the caller's, as a module's buffers are.
    saved = measure_saved_bytes(lambda: function(x.clone().requires_grad_() + 0))
    return sum(holder.bytes for holder in saved.holders if holder.shape != (3,))


@pytest.mark.parametrize("name", CALLS)
def test_same_result_in_fewer_bytes(name: str) -> None:
    function, expected = CALLS[name]
    x = special(2, 3, 8, 8).nan_to_num(nan=0.5)
    output = function(x.clone())
    assert_same(function, within(function), x, torch.randn_like(output))
    assert kept(within(function), x) == expected
    if "mean" not in name:
        assert kept(function, x) > expected


APPROXIMATE: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "F.gelu": (F.gelu, 0.5),
    "F.gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.5),
    "F.silu": (F.silu, 0.5),
    "F.silu in place": (lambda x: F.silu(x, inplace=True), 0.5),
    "F.mish": (F.mish, 0.5),
    "F.hardswish": (F.hardswish, 0.5),
    "torch.sigmoid": (torch.sigmoid, 0.5),
    "Tensor.sigmoid": (lambda x: x.sigmoid(), 0.5),
    "F.sigmoid": (F.sigmoid, 0.5),
    "torch.tanh": (torch.tanh, 0.5),
    "Tensor.tanh": (lambda x: x.tanh(), 0.5),
    "F.batch_norm": (lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True), 0.6),
    "F.batch_norm, fixed": (lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT, BIAS), 0),
    "F.layer_norm": (lambda x: F.layer_norm(x, (8, 8)), 0.75),
    "F.group_norm": (lambda x: F.group_norm(x, 3), 0.75),
    "F.scaled_dot_product_attention": (lambda x: F.scaled_dot_product_attention(x, x, x), 3.4),
    "F.relu": (F.relu, 1 / 8),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_ones_have_exact_outputs(name: str) -> None:
    function, bytes_per_element = APPROXIMATE[name]

    def ours(x: Tensor) -> Any:
        with compact_functional(approximate=True):
            return function(x)

    x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    left, right = run(ours, x, grad), run(function, x, grad)
    assert same_bits(left[0], right[0])
    assert torch.cosine_similarity(left[1].flatten(), right[1].flatten(), dim=0) > 0.99
    assert kept(ours, x) <= bytes_per_element * x.numel() < kept(function, x) / 2
    assert kept(within(function), x) >= kept(ours, x)


def test_approximate_batch_norm_updates_running_statistics() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    statistics = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
    F.batch_norm(x, *statistics[0], training=True, momentum=0.3)
    with compact_functional(approximate=True):
        F.batch_norm(x, *statistics[1], training=True, momentum=0.3)
        with pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm(x[:1, :, :1, :1], None, None, training=True)
    assert all(same_bits(a, b) for a, b in zip(*statistics, strict=True))


UNTOUCHED: dict[str, Callable[[Tensor], Any]] = {
    "indices asked for": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "no dropout": lambda x: F.dropout(x, training=False),
    "dropout of everything": lambda x: F.dropout(x, 1.0),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "a weight that trains": lambda x: F.batch_norm(x, MEAN, VAR, WEIGHT.clone().requires_grad_()),
    "another activation": lambda x: F.gelu(x) * 2,
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_not_covered_runs_as_ever(name: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    function = UNTOUCHED[name]
    assert_same(function, within(function), x, torch.randn_like(function(x)))
    assert kept(within(function), x) == kept(function, x)


def test_errors_are_the_stock_ones() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with compact_functional():
        with pytest.raises(TypeError, match=r"relu\(\) got an unexpected keyword argument"):
            F.relu(x, other=1)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="dropout probability"):
            F.dropout(x, 1.5)
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            F.avg_pool2d(x[None], 1, out=torch.empty(1, 2, 3))  # type: ignore[call-arg]


def test_without_a_gradient() -> None:
    x = torch.randn(2, 3, 8, 8)
    with compact_functional():
        assert F.relu(x).grad_fn is None
        assert F.relu(torch.arange(-2, 3)).tolist() == [0, 0, 0, 1, 2]
        with torch.no_grad():
            assert F.relu(x.clone().requires_grad_()).grad_fn is None
        with torch.inference_mode():
            assert same_bits(F.max_pool2d(x, 2), torch.max_pool2d(x, 2))


def test_modules_that_were_not_swapped() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.3)
    )
    model[1].eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert_same(lambda x: model(x), within(model), x, torch.randn_like(model(x)))
    saved = measure_saved_bytes(lambda: within(model)(x), model)
    # The input of the convolution, a bit for each of 2 x 4 x 6 x 6 and 2 x 4 x 3 x 3, and 2 bits for the latter.
    assert saved.total == 4 * x.numel() + 288 // 8 + 72 // 8 + 72 // 4


def test_backward_inside_of_the_block() -> None:
    x, grad = torch.randn(4, 5), torch.randn(4, 5)

    def ours(x: Tensor) -> Tensor:
        return F.leaky_relu(F.relu(x) * 3 - 1)

    expected = run(ours, x, grad)
    with compact_functional():
        found = run(ours, x, grad)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_transforms_of_functions() -> None:
    x = torch.randn(3, 4)
    with compact_functional():
        found = torch.func.vmap(torch.func.grad(lambda row: F.relu(row).square().sum()))(x)
    assert torch.equal(found, 2 * x.relu())


def test_the_block_ends() -> None:
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(KeyError), compact_functional():
        raise KeyError
    assert measure_saved_bytes(lambda: F.relu(x * 2)).total == 32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    linear = nn.Linear(8, 16)

    def forward(x: Tensor) -> Tensor:
        return F.leaky_relu(F.relu6(F.relu(linear(x)) - 0.5))

    x, grad = torch.randn(4, 8), torch.randn(4, 16)
    compiled: Any = torch.compile(forward, backend=backend, fullgraph=True)
    expected = run(forward, x, grad)
    for function in (compiled, within(compiled), compiled):
        assert all(same_bits(a, b) for a, b in zip(run(function, x, grad), expected, strict=True))
    found, stock = (measure_saved_bytes(lambda f=f: f(x), linear).total for f in (within(compiled), forward))
    assert found < stock / 4
