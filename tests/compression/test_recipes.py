"""What is computed again from what is kept of another tensor: right values, few bytes, and never a stale recipe."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.compression.store import Bits
from tests.stock import kept, make_store, run

FOUR, EIGHT = Bits(4, 4), Bits(8, 8)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6 in place": lambda: nn.ReLU6(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(-0.7, 1.2),
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Hardswish": nn.Hardswish,
    "Hardswish in place": lambda: nn.Hardswish(inplace=True),
    "Mish": nn.Mish,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
}


class Block(nn.Module):
    """Convolution, norm, activation, dropout, convolution; what is between norm and convolution can be changed."""

    def __init__(self, activation: nn.Module, channels: int, training: bool = True, p: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation
        self.dropout = nn.Dropout(p)
        self.second = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm.train(training)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.uniform_(0.3, 2.0)
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.dropout(self.activation(self.norm(self.first(x))))))


def assert_near(function: Any, x: Tensor, bits: Bits, error: float, seed: int = 0) -> None:
    """Outputs are those of plain training, each gradient is near its own."""
    torch.manual_seed(seed)
    grad = torch.randn_like(function(x))
    expected, found = run(function, x, grad, None, seed), run(function, x, grad, make_store(bits), seed)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for left, right in zip(found[1:], expected[1:], strict=True):
        scale = right.norm() + 0.05 * grad.norm()  # some gradients are zero, but for what rounding leaves
        assert (left - right).norm() <= error * scale, (left - right).norm() / scale


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(
    sizes=st.tuples(st.integers(2, 5), st.integers(3, 9), st.integers(3, 9)),
    channels=st.integers(1, 9),
    last=st.booleans(),
    training=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=6, deadline=None)
def test_gradients_of_a_chain(
    name: str, sizes: tuple[int, int, int], channels: int, last: bool, training: bool, p: float, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, height, width = sizes
    block = Block(ACTIVATIONS[name](), channels, training, p)
    x = torch.randn(batch, 3, height, width)
    if last:
        block, x = block.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_near(block, x, EIGHT, 0.03, seed)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("last", [False, True])
def test_the_output_of_norm_and_activation_is_not_kept(name: str, last: bool) -> None:
    """Of 4 bits: the input of the norm, 8 behind a smooth activation, and a bit for one that is not."""
    torch.manual_seed(0)
    block, x = Block(ACTIVATIONS[name](), 16), torch.randn(8, 3, 16, 16)
    if last:
        block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    smooth = not name.startswith(("ReLU", "Leaky", "Hardtanh"))
    elements = 8 * 16 * 16 * 16
    expected = elements * (8 if smooth else 5) // 8
    inputs = 8 * 3 * 16 * 16 // 2
    assert expected + inputs <= kept(block, x, FOUR)[1] <= 1.1 * (expected + inputs)
    assert_near(block, x, FOUR, 0.25)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardswish()])
def test_an_activation_without_a_norm(activation: nn.Module) -> None:
    net, x = nn.Sequential(nn.Linear(8, 64), activation, nn.Dropout(0.5), nn.Linear(64, 8)), torch.randn(4, 32, 8)
    elements = 4 * 32 * 64
    expected = elements // 2 + elements // 8 + 4 * 32 * 8 // 2
    assert expected <= kept(net, x, FOUR)[1] <= 1.1 * expected
    assert_near(net, x, EIGHT, 0.03)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "written to": lambda x: x.add_(1.0),
    "written to through a view": lambda x: (x[:, :1].mul_(3.0), x)[1],
    "written to without gradients": lambda x: (x.detach().neg_(), x)[1],
    "another tensor": lambda x: x + 1.0,
    "flipped": lambda x: x.flip(-1),
    "transposed": lambda x: x.transpose(2, 3),
    "a view and back": lambda x: x.flatten(1).view(x.shape),
    "pooled": lambda x: F.max_pool2d(x, 2),
    "a part": lambda x: x[1:],
    "a copy": lambda x: x.clone(),
    "joined": lambda x: torch.cat([x, x]),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Hardswish()])
def test_what_lies_between(name: str, activation: nn.Module) -> None:
    """Whoever changes the output of an activation gets the gradient of what he made of it."""
    torch.manual_seed(0)
    block = Block(activation, 6)
    block.between = BETWEEN[name]
    assert_near(block, torch.randn(4, 3, 8, 8), EIGHT, 0.03)


def test_a_view_of_all_is_found_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.norm(x)).flatten(1))  # type: ignore[no-any-return]

    net, x = Net(), torch.randn(16, 8, 8, 8)
    assert_near(net, x, EIGHT, 0.03)
    expected = x.numel() * 5 // 8
    assert expected <= kept(net, x, FOUR)[1] <= 1.15 * expected  # a map is half a group


def test_parameters_of_the_norm_are_those_of_the_forward_pass() -> None:
    """An optimizer that steps before the backward pass changes no input of a convolution."""
    torch.manual_seed(0)
    block, x = Block(nn.ReLU(), 8), torch.randn(4, 3, 8, 8)
    expected = run(block, x, None)[-2]

    class Late(torch.autograd.Function):
        """Writes on the parameters of the norm when the backward pass begins."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            block.norm.weight.data.zero_()
            block.norm.bias.data.fill_(5.0)
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return Late.apply(self.block(x))  # type: ignore[no-any-return,no-untyped-call]

    found = run(Net(), x, None, make_store(EIGHT))[-2]
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_the_input_of_a_norm_is_let_go_when_the_next_operator_begins() -> None:
    store = make_store(FOUR)
    norm = nn.BatchNorm2d(4)
    store.protect([*norm.parameters(), *norm.buffers()])
    with store:
        x = torch.randn(4, 4, 8, 8).requires_grad_() * 1
        reference = StorageWeakRef(x.untyped_storage())
        y = norm(x)
        del x
        gc.collect()
        assert not reference.expired()
        z = torch.relu(y)
        assert reference.expired()
        del y
    z.sum().backward()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, 0.0])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_numbers_that_no_range_holds(value: float, activation: nn.Module) -> None:
    """Where plain training has finite gradients, so has ours."""
    torch.manual_seed(0)
    block, x = Block(activation, 4), torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0] = value
    expected, found = run(block, x, None), run(block, x, None, make_store(FOUR))
    for left, right in zip(found, expected, strict=True):
        assert left.isfinite().all() or not right.isfinite().all()


def test_a_norm_that_multiplies_by_nothing() -> None:
    """As the last norm of a residual block at the start: its output is the bias, exactly."""
    torch.manual_seed(0)
    block = Block(nn.ReLU(), 6)
    nn.init.zeros_(block.norm.weight)
    assert_near(block, torch.randn(4, 3, 8, 8), EIGHT, 0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Block(nn.ReLU(), 6)
    if dtype is torch.float64:
        assert_near(block.double(), torch.randn(4, 3, 8, 8, dtype=dtype), EIGHT, 0.03)
        return

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return self.block(x).float()  # type: ignore[no-any-return]

    assert_near(Cast(), torch.randn(4, 3, 8, 8), EIGHT, 0.05)


def test_gradient_of_a_gradient() -> None:
    torch.manual_seed(0)
    block, x = Block(nn.SiLU(), 6), torch.randn(4, 3, 8, 8)

    def penalty(store: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        if store is not None:
            store.protect([*block.parameters(), *block.buffers()])
            with store:
                output = block(leaf)
                (grad,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
                loss = grad.square().sum()
        else:
            output = block(leaf)
            (grad,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
            loss = grad.square().sum()
        return list(torch.autograd.grad(loss, [p for p in block.parameters() if p is not block.second.bias]))

    expected = penalty(None)
    scale = torch.stack([grad.norm() for grad in expected]).norm()
    for left, right in zip(penalty(make_store(EIGHT)), expected, strict=True):
        assert (left - right).norm() <= 0.05 * right.norm() + 0.01 * scale


def test_nothing_is_remembered_after_the_step() -> None:
    store = make_store(FOUR)
    block = Block(nn.SiLU(), 6)
    store.protect([*block.parameters(), *block.buffers()])
    with store:
        loss = block(torch.randn(4, 3, 8, 8)).sum()
    assert not store.recipes._found
    loss.backward()
    del loss
    gc.collect()
    assert not store._stretches
