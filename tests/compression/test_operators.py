"""What is kept in part: outputs and gradients are bit for bit the stock ones, and so many bits are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance.compression.store import Bits
from tests.stock import assert_same, kept, layouts, make_store, run, same_bits, special

Operator = Callable[[Tensor], Tensor]
FOUR = Bits(4, 4)

ACTIVATIONS: dict[str, Operator] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.Hardtanh in place": nn.Hardtanh(inplace=True),
    "F.hardtanh, thresholds that half precision cannot hold": lambda x: F.hardtanh(x, -0.3, 1.7),
    "F.hardtanh, close thresholds": lambda x: F.hardtanh(x, 1.0, 1.0000002),
    "nn.LeakyReLU": nn.LeakyReLU(),
    "nn.LeakyReLU in place": nn.LeakyReLU(0.3, inplace=True),
    "nn.LeakyReLU, slope -.5": nn.LeakyReLU(-0.5),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.Hardsigmoid in place": nn.Hardsigmoid(inplace=True),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(0, 12), min_size=0, max_size=4).map(tuple)


def numbers(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # For a NaN the stock hardtanh kernel answers differently in its vectorised and in its scalar part.
    x = special(*shape, dtype=dtype)
    return x.nan_to_num(nan=0.5) if "tanh" in name or "ReLU6" in name or "relu6" in name else x


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_activations_bit_for_bit(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    assert_same(ACTIVATIONS[name], numbers(name, *shape, dtype=dtype), special(*shape, dtype=dtype))


@given(
    low=st.floats(-300, 300, width=32),
    spread=st.floats(0, 300, width=32) | st.floats(0, 2**-7, width=32),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_any_thresholds_bit_for_bit(low: float, spread: float, dtype: torch.dtype, seed: int) -> None:
    """Kernels compare with them as they are, not as the dtype of the input rounds them."""
    torch.manual_seed(seed)
    x = (low + spread * torch.linspace(-1, 2, 400)).to(dtype)
    assert_same(lambda x: F.hardtanh(x, low, low + spread), x, torch.randn(400).to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(16, 40), (4, 9, 5, 6), (2, 3, 4, 7, 6)])
def test_activations_in_every_layout(name: str, shape: tuple[int, ...]) -> None:
    grads = layouts(*shape)
    for x in layouts(*shape, make=lambda *s, dtype: numbers(name, *s, dtype=dtype)).values():
        for grad in grads.values():
            assert_same(ACTIVATIONS[name], x, grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_bit_an_element(name: str) -> None:
    x = torch.randn(4, 3, 10, 11)
    plain, ours = kept(ACTIVATIONS[name], x)
    assert plain >= 4 * x.numel()
    assert ours == -(-x.numel() // 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for name, operator in ACTIVATIONS.items():
        finite = x.nan_to_num(nan=0.5) if numbers(name, 1) is not None and "relu" not in name.lower() else x
        finite = finite.nan_to_num(nan=0.5) if "6" in name else finite
        assert_same(operator, finite, torch.randn(x.shape).to(dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_the_same_and_keeps_one_bit(p: float, inplace: bool, dtype: torch.dtype) -> None:
    x = special(5, 7, 40, dtype=dtype)
    functional = (lambda x: F.dropout(x, p, True, inplace), lambda x: torch.dropout(x, p, True))
    for operator in (nn.Dropout(p, inplace), *functional):
        assert_same(operator, x, special(5, 7, 40, dtype=dtype))
    assert kept(nn.Dropout(p, inplace), x)[1] == x.numel() // 8


COMPARED: dict[str, tuple[Operator, float]] = {
    "abs": (torch.abs, 2),
    "Tensor.abs": (lambda x: x.abs(), 2),
    "abs(x)": (abs, 2),
    "clamp from below": (lambda x: x.clamp(min=0), 1),
    "clamp from above": (lambda x: torch.clamp(x, max=-1.0), 1),
    "clamp": (lambda x: x.clamp(-1, 3), 1),
    "clamp in place": (lambda x: x.clamp_(-3, -1), 1),
    "clamp_min": (lambda x: torch.clamp_min(x, 1), 1),
    "clamp_max": (lambda x: x.clamp_max(6.0), 1),
    "clip": (lambda x: x.clip(-0.3, 1.7), 1),
    "hardshrink": (F.hardshrink, 1),
    "softshrink": (lambda x: F.softshrink(x, 3.0), 1),
    "maximum": (lambda x: torch.maximum(x, x.flip(0)), 2),
    "minimum": (lambda x: x.minimum(x.flip(0)), 2),
    "max of two": (lambda x: torch.max(x, torch.zeros_like(x)), 2),
    "amax": (lambda x: x.amax(-1), 1),
    "amax of two axes": (lambda x: torch.amax(x, (0, 1), keepdim=True), 1),
    "amin": (lambda x: x.amin(1), 1),
    "max of all": (lambda x: x.max(), 32),
    "min of all": (torch.min, 32),
    "median": (lambda x: x.median(), 32),
    "aminmax": (lambda x: torch.stack(torch.aminmax(x, dim=-1)), 32),
    "largest absolute": (lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1), 32),
    "sum of absolutes": (lambda x: x.norm(1, dim=-1), 32),
    "clamp by a tensor": (lambda x: x.clamp(min=torch.zeros_like(x)), 64),
    "max of one tensor twice": (lambda x: torch.maximum(x, x), 32),
    "max, other shapes": (lambda x: torch.maximum(x, x[:1]), 64),
    "clamp beyond half precision": (lambda x: x.clamp(-2e4, 2e4), 32),
    "clamp between equal bounds": (lambda x: x.clamp(1, 1), 32),
}


def _differentiable(name: str) -> bool:
    """Torch 2.6 has no derivative of some of them."""
    try:
        x = torch.randn(6, 8, 64, requires_grad=True)
        COMPARED[name][0](x * 1).sum().backward()
    except RuntimeError as error:
        return "is not implemented" not in str(error)
    return True


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_bit_for_bit_in_every_layout(name: str) -> None:
    """Of rounded numbers none would be equal to the largest, which is where the gradient goes."""
    if not _differentiable(name):
        pytest.skip("this torch cannot differentiate it")
    operator, bits = COMPARED[name]
    for dtype in (torch.float32, torch.float16):
        for x in layouts(
            6, 8, 64, dtype=dtype, make=lambda *s, dtype: special(*s, dtype=dtype).nan_to_num(0.5)
        ).values():
            assert_same(operator, x, torch.randn_like(operator(x * 1)))
    x = torch.randn(16, 32, 64)
    small = 64 * operator(x * 1).numel() if operator(x * 1).shape != x.shape else 0  # the result, once or twice
    assert kept(operator, x)[1] * 8 <= bits * x.numel() + small + 64


@pytest.mark.parametrize("name", ["abs", "clamp", "maximum", "amax", "amin", "max of two", "aminmax"])
def test_what_is_compared_inside_of_a_transform(name: str) -> None:
    """A tensor of ``vmap`` has no place in memory, and its axes are not those of what is saved."""
    if not _differentiable(name):
        pytest.skip("this torch cannot differentiate it")
    operator = COMPARED[name][0]
    assert_same(torch.vmap(lambda x: operator(x) / (1 + x.square().mean())), torch.randn(5, 6, 8, 64))


DIVIDED: dict[str, Operator] = {
    "logarithm of a softmax": lambda x: torch.log((8 * x).softmax(-1)),
    "logarithm of a softmax, made safe": lambda x: torch.log((8 * x).softmax(-1) + 1e-8),
    "logarithm of channels": lambda x: F.softmax(9 * x.view(-1, 16, 16), 1).log2(),
    "logarithm of a deviation": lambda x: torch.log(F.softplus(4 * x) + 1e-3),
    "quotient": lambda x: x / (F.softplus(4 * x) + 0.01),
    "quotient of a number": lambda x: 1 / (F.softplus(x) + 0.05),
    "square root": lambda x: (x.abs() + 1e-4).sqrt(),
    "one over a square root": lambda x: (x.abs() + 1e-2).rsqrt(),
    "power": lambda x: (x.abs() + 1e-2) ** -0.5,
    "arcus cosine": lambda x: torch.acos((4 * x).tanh() * 0.9999),
    "logarithm near zero": lambda x: torch.log1p(-(2 * x).sigmoid()),
    "angle of two": lambda x: torch.atan2(x, x.flip(0)),
    "length of two": lambda x: torch.hypot(x, x.flip(0)),
    "sine of many turns": lambda x: torch.sin(30 * x),
    "largest": lambda x: x * x.amax(-1, keepdim=True),
    "infinity norm": lambda x: F.normalize(x, p=float("inf"), dim=-1),
    "grid": lambda x: F.grid_sample(
        x[:, None].reshape(-1, 1, 16, 16), x.view(-1, 8, 16, 2).tanh(), align_corners=False
    ),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_gradients_that_hang_on_small_differences(name: str) -> None:
    """Even levels from the smallest to the largest element would stand for the small ones with zero, or far off."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    grad = torch.randn_like(DIVIDED[name](x))
    plain, ours = (run(DIVIDED[name], x, grad, store)[1].flatten() for store in (None, make_store(FOUR)))
    assert ours.isfinite().all()
    assert torch.cosine_similarity(plain, ours, dim=0) > 0.95
    assert 0.9 < ours.norm() / plain.norm() < 1.1
    before, after = kept(DIVIDED[name], x, FOUR)
    assert after <= before


POOLS: dict[str, tuple[Operator, tuple[int, ...]]] = {
    "max 1d": (nn.MaxPool1d(3, 2), (3, 4, 50)),
    "max 2d": (nn.MaxPool2d(2), (3, 8, 12, 10)),
    "max 2d, overlapping": (nn.MaxPool2d(3, 2, 1), (3, 8, 13, 10)),
    "max 2d, dilated, ceil": (nn.MaxPool2d((3, 2), (2, 3), (1, 0), (2, 1), ceil_mode=True), (2, 6, 13, 14)),
    "max 2d, unbatched": (nn.MaxPool2d(2), (16, 12, 10)),
    "max 2d, wide window": (nn.MaxPool2d(17, 5), (4, 16, 28, 24)),
    "max 3d": (nn.MaxPool3d(2), (2, 4, 6, 7, 8)),
    "max 2d, NumPy integers": (lambda x: F.max_pool2d(x, np.int64(2)), (3, 8, 12, 10)),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, [2, 3], [1, 2]), (3, 8, 12, 10)),
    "mean 1d": (nn.AvgPool1d(3), (3, 4, 50)),
    "mean 2d": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (3, 4, 11, 10)),
    "mean 3d": (nn.AvgPool3d(2), (2, 4, 6, 7, 8)),
    "adaptive mean 2d": (nn.AdaptiveAvgPool2d((3, 2)), (3, 4, 11, 10)),
    "adaptive max 2d": (nn.AdaptiveMaxPool2d((3, 2)), (3, 4, 11, 10)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pooling_bit_for_bit_in_every_layout(name: str, dtype: torch.dtype) -> None:
    operator, shape = POOLS[name]
    if dtype == torch.bfloat16 and "mean 3d" in name:
        return  # which torch does not have
    make: Any = special if "max" in name else lambda *s, dtype: torch.randn(s).to(dtype)
    for x in layouts(*shape, dtype=dtype, make=make).values():
        grad = torch.randn_like(run(operator, x, None)[0])
        assert_same(operator, x, grad)


@pytest.mark.parametrize("name", POOLS)
def test_pooling_keeps_places_or_nothing(name: str) -> None:
    operator, shape = POOLS[name]
    x = torch.randn(shape)
    plain, ours = kept(operator, x)
    output = operator(x)
    if "mean" in name:
        assert plain >= x.nbytes
        assert ours == 0
    elif "adaptive" in name:
        assert ours == 8 * output.numel()
    else:
        assert plain >= x.nbytes + 8 * output.numel()
        assert ours <= (2 if "wide" in name else 1) * output.numel() + 1


def test_max_pooling_that_returns_its_indices() -> None:
    x = torch.randn(2, 8, 12, 10)

    def both(x: Tensor) -> Tensor:
        output, index = F.max_pool2d(x, 2, return_indices=True)
        return output + index * 1e-3

    assert_same(both, x)
    assert_same(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), x)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weight", ["trained", "frozen", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_exact_and_nothing_kept_where_it_is_fixed(channels_last: bool, weight: str, training: bool) -> None:
    norm = nn.BatchNorm2d(16, affine=weight != "none")
    norm.running_mean, norm.running_var = torch.randn(16), torch.rand(16) + 0.5
    if weight == "frozen":
        frozen(norm, "weight")
    norm.train(training)
    x = torch.randn(4, 16, 9, 7)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    expected = run(norm, x, torch.randn(4, 16, 9, 7, generator=torch.Generator().manual_seed(1)))
    after = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.load_state_dict(state)
    found = run(norm, x, torch.randn(4, 16, 9, 7, generator=torch.Generator().manual_seed(1)), make_store())
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert all(same_bits(after[name], value) for name, value in norm.state_dict().items())
    plain, ours = kept(norm, x)
    assert plain >= x.nbytes
    assert (ours < 1000) == (not training and weight != "trained")


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (4, 6, 40)),
    "2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (4, 6, 12, 11)),
    "2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (4, 6, 12, 11)),
    "2d, reflected": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (4, 6, 12, 11)),
    "3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 6, 7, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 2, stride=2), (4, 6, 12, 11)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_frozen_convolutions_keep_nothing_of_their_input(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    for x in (torch.randn(shape), layouts(*shape, make=lambda *s, dtype: torch.randn(s)).get("channels_last")):
        if x is None:
            continue
        for left in ((), ("weight",), ("weight", "bias")):
            module = frozen(make(), *left)
            assert_same(module, x)
        assert kept(frozen(make(), "weight"), x)[1] == 0
        assert kept(make(), x)[1] > 0


def test_errors_are_those_of_stock_functions() -> None:
    store = make_store()
    x = torch.randn(20, 20, requires_grad=True)
    for call, message in (
        (lambda: F.hardtanh(x, 2.0, 1.0), "min_val cannot be greater"),
        (lambda: F.relu(torch.randn(300, requires_grad=True), True), "leaf Variable"),
        (lambda: F.max_pool2d(x, 2, bogus=1), "unexpected keyword"),
        (lambda: F.conv2d(x, x), "conv"),
        (lambda: F.leaky_relu_(x * 1, -0.5).sum().backward(), "negative slope"),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as stock:
            call()
        with pytest.raises((RuntimeError, ValueError, TypeError)) as ours, store:
            call()
        assert type(ours.value) is type(stock.value)
        assert message in str(stock.value)
        assert str(ours.value) == str(stock.value)


def test_no_gradient_nothing_kept_and_stock_results() -> None:
    x = torch.randn(4, 8, 12, 12)
    store = make_store()
    with store, torch.no_grad():
        for operator in (F.relu, nn.MaxPool2d(2), nn.Dropout(0.5).eval()):
            assert torch.equal(operator(x), operator(x))
