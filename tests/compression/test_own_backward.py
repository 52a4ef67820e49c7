"""Norms and gates whose backward pass reads what is kept as it is: gradients and behaviour are those of the stock ones.

Each step runs twice, once with the backward passes of ours and once with the stock ones, which read the same few bits.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.compression import kept, operators
from lightning_lance.tensors import native, rounding
from tests.oracles import relative_error
from tests.stock import names, same_bits

pytestmark = pytest.mark.skipif(native._native is None, reason="nothing was compiled")

NEVER = 1 << 60
OURS = {"BatchNormBackward", "GateBackward"}
POOL = "MaxPoolBackward"
SMOOTH = "SmoothBackward"
Step = Callable[[], list[Tensor]]


class Layer(nn.Module):
    """A convolution, whose result something is done with."""

    def __init__(self, function: Callable[[Layer, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = norm if norm is not None else nn.BatchNorm2d(16)
        self.function = function
        self.unused = nn.Linear(4, 4)  # for sessions that are to leave the convolution alone

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self, self.conv(batch))


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module,
    x: Tensor,
    ours: bool,
    *,
    back: Callable[[Tensor], Any] | None = None,
    expected: Iterable[str] = OURS,
    bits: int = 4,
    around: Any = None,
) -> Any:
    """The gradients of all parameters after a step, or what ``back`` returns for its output."""
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(operators, "LARGE", NEVER)
        session = LanceSession(model, LanceConfig(bits=bits))
        session.start()
        try:
            with around or nullcontext(), session.step():
                output = model(x)
            assert names(output) & OURS == (set(expected) if ours else set())
            if back is not None:
                return back(output)
            output.backward(fixed_gradient(output))
            return [p.grad for p in model.parameters()]
        finally:
            session.stop()


def fixed_gradient(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)


def both(make: Callable[[], nn.Module], x: Tensor | None = None, **options: Any) -> tuple[Any, Any]:
    """What :func:`run` returns with the backward passes of ours and with the stock ones."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        found.append(run(make(), batch() if x is None else x, ours, **options))
    return found[0], found[1]


def assert_close(ours: Any, stock: Any, bound: float = 1e-5) -> None:
    assert len(ours) == len(stock)
    for left, right in zip(ours, stock, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert relative_error(left, right) < bound


def norm_and_relu(layer: Layer, x: Tensor) -> Tensor:
    return F.relu(layer.norm(x))


# Gradients ------------------------------------------------------------------------------------------------------------


def frozen(norm: nn.Module, *which: str) -> nn.Module:
    for name in which:
        getattr(norm, name).requires_grad_(False)
    return norm


def moved(norm: nn.Module) -> nn.Module:
    """With statistics and weights of some training."""
    for name, tensor in (*norm.named_buffers(), *norm.named_parameters()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return norm


NORMS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "training": (lambda: nn.BatchNorm2d(16), OURS),
    "of some training": (lambda: moved(nn.BatchNorm2d(16)), OURS),
    "momentum of a mean": (lambda: nn.BatchNorm2d(16, momentum=None), OURS),
    "no running statistics": (lambda: nn.BatchNorm2d(16, track_running_stats=False), OURS),
    "no running statistics, eval": (lambda: nn.BatchNorm2d(16, track_running_stats=False).eval(), OURS),
    "no weight": (lambda: nn.BatchNorm2d(16, affine=False), OURS),
    "weight frozen": (lambda: frozen(moved(nn.BatchNorm2d(16)), "weight"), OURS),
    "bias frozen": (lambda: frozen(moved(nn.BatchNorm2d(16)), "bias"), OURS),
    "both frozen": (lambda: frozen(moved(nn.BatchNorm2d(16)), "weight", "bias"), OURS),
    "eval": (lambda: moved(nn.BatchNorm2d(16)).eval(), OURS),
    "eval, bias frozen": (lambda: frozen(moved(nn.BatchNorm2d(16)).eval(), "bias"), OURS),
    "eval, weight frozen": (lambda: frozen(moved(nn.BatchNorm2d(16)).eval(), "weight"), {"GateBackward"}),
    "eval, no weight": (lambda: nn.BatchNorm2d(16, affine=False).eval(), {"GateBackward"}),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_the_stock_kernels(name: str, last: bool, bits: int, threads: int) -> None:
    make, expected = NORMS[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = batch().contiguous(memory_format=torch.channels_last) if last else batch()
        ours, stock = both(lambda: Layer(norm_and_relu, make()), x, expected=expected, bits=bits)
    finally:
        torch.set_num_threads(before)
    assert_close(ours, stock)


@pytest.mark.parametrize("shape", [(2048, 16), (64, 16, 33), (2, 16, 8, 9, 16), (1, 16, 2100), (4, 1, 100, 100)])
@pytest.mark.parametrize("training", [True, False])
def test_every_number_of_axes(shape: tuple[int, ...], training: bool) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
            self.norm = moved(kind(shape[1])).train(training)
            self.scale = nn.Parameter(torch.rand(shape[1:]))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.norm(x * self.scale))

    assert_close(*both(Norm, torch.randn(shape)), bound=5e-5)  # sums that cancel


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_needs_no_gradient(training: bool) -> None:
    norm = moved(nn.BatchNorm2d(3)).train(training)
    x = torch.randn(8, 3, 40, 40)
    assert_close(*both(lambda: copy.deepcopy(norm), x, expected={"BatchNormBackward"}))


@pytest.mark.parametrize("training", [True, False])
def test_norms_go_back_as_the_stock_ones_under_autocast_and_in_half_precision(training: bool) -> None:
    norm = moved(nn.BatchNorm2d(16)).train(training)
    mixed = both(
        lambda: Layer(norm_and_relu, copy.deepcopy(norm)), around=torch.autocast("cpu", torch.bfloat16), bits=8
    )
    assert_close(*mixed, bound=0.01)
    true = both(lambda: Layer(norm_and_relu, copy.deepcopy(norm)).bfloat16(), batch().bfloat16(), bits=8)
    assert_close(*true, bound=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_take_the_stock_kernels(dtype: torch.dtype) -> None:
    ours, stock = both(lambda: Layer(norm_and_relu).to(dtype), batch().to(dtype), expected=())
    assert all(same_bits(left, right) for left, right in zip(ours, stock, strict=True))


GATES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "relu": lambda _, x: F.relu(x),
    "relu of torch": lambda _, x: torch.relu(x),
    "relu of a tensor": lambda _, x: x.relu(),
    "relu in place": lambda _, x: F.relu(x, inplace=True),
    "relu_": lambda _, x: torch.relu_(x),
    "relu_ of a tensor": lambda _, x: x.relu_(),
    "relu6": lambda _, x: F.relu6(x),
    "relu6 in place": lambda _, x: F.relu6(x, inplace=True),
    "hardtanh": lambda _, x: F.hardtanh(x),
    "hardtanh between others": lambda _, x: F.hardtanh(x, -0.7, 0.6),
    "hardtanh above zero": lambda _, x: F.hardtanh(x, 0.3, 0.7),
    "hardtanh in place": lambda _, x: F.hardtanh(x, -0.5, 0.25, inplace=True),
    "hardtanh_": lambda _, x: F.hardtanh_(x, -0.7, 0.6),
    "in place behind a norm": lambda layer, x: F.relu(layer.norm(x) * 1, inplace=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", [name for name in GATES if "norm" not in name])
def test_gates_bit_for_bit(name: str, last: bool, dtype: torch.dtype) -> None:
    """Also between bounds that half precision rounds inwards."""
    x = torch.randn(8, 16, 16, 17).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    grad = torch.randn(8, 16, 16, 17).to(dtype)
    layer = Layer(GATES[name])
    found = []
    for large in (operators.LARGE, NEVER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "LARGE", large)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            session = LanceSession(layer, LanceConfig(bits=4))
            session.start()
            with session.step():
                output = layer.function(layer, leaf * 1)
            session.stop()
        if large != NEVER and "hardtanh" not in name:  # some bounds are for the stock kernels
            assert output.grad_fn.name() == "GateBackward"
        found.append((output.detach(), *torch.autograd.grad(output, leaf, grad)))
    plain = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer.function(layer, plain * 1)
    found.append((output.detach(), *torch.autograd.grad(output, plain, grad)))
    for others in found[1:]:
        assert all(same_bits(left, right) for left, right in zip(found[0], others, strict=True))


def test_running_statistics_are_those_of_the_stock_operator() -> None:
    for momentum in (0.1, None):
        found = []
        for ours in (True, False):
            torch.manual_seed(0)
            model = Layer(norm_and_relu, nn.BatchNorm2d(16, momentum=momentum))
            for seed in range(2):
                run(model, batch(seed), ours)
            found.append([buffer.clone() for buffer in model.norm.buffers()])
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_statistics_are_those_of_the_forward_pass() -> None:
    """With fixed statistics, another step may change them before the backward pass."""
    model = Layer(norm_and_relu, moved(nn.BatchNorm2d(16)).eval())
    expected = run(copy.deepcopy(model), batch(), True)

    def back(output: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            model.norm.running_mean.add_(5)
            model.norm.running_var.mul_(9)
        output.backward(fixed_gradient(output))
        return [p.grad for p in model.parameters()]

    assert_close(run(model, batch(), True, back=back), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("expanded", ["sum", "mean over axes", "one sample"])
def test_gradients_of_any_stride(expanded: str, training: bool) -> None:
    def back(output: Tensor) -> None:
        if expanded == "sum":
            output.sum().backward()
        elif expanded == "one sample":
            output.backward(torch.randn(1, 16, 1, 1, generator=torch.Generator().manual_seed(0)).expand_as(output))
        else:
            output.mean((2, 3)).square().sum().backward()

    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Layer(lambda layer, x: layer.norm(x) if training else F.relu(layer.norm(x)), moved(nn.BatchNorm2d(16)))
        model.norm.train(training)
        run(model, batch(), ours, back=back, expected={"BatchNormBackward"} if training else OURS)
        found.append([p.grad for p in model.parameters()])
    # Behind a norm, a gradient that is the same everywhere leaves nothing but rounding.
    large = [i for i, p in enumerate(found[1]) if p is not None and float(p.abs().max()) > 1e-2]
    assert large
    assert_close(*([gradients[index] for index in large] for gradients in found), bound=1e-4)


# What autograd does with them -----------------------------------------------------------------------------------------


POOLS: dict[str, Callable[[Tensor], Any]] = {
    "half": lambda x: F.max_pool2d(x, 2),
    "overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dilated": lambda x: F.max_pool2d(x, (2, 3), (1, 2), (1, 0), (3, 2)),
    "of torch": lambda x: torch.max_pool2d(x, 3, 1),
    "beyond the end": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "large windows": lambda x: F.max_pool2d(x, 7, 3, 3),
    "of a module": nn.MaxPool2d(2, padding=1),
    "a sample alone": lambda x: F.max_pool2d(x.flatten(0, 1), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_pools_bit_for_bit(name: str, ties: bool, dtype: torch.dtype) -> None:
    x = torch.randn(8, 16, 16, 17).to(dtype)
    if ties:
        x = x.round()
    x[0, 0, 3, 3] = torch.nan
    found = []
    for how in ("ours", "stock", "plain"):
        leaf = x.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "LARGE", operators.LARGE if how == "ours" else NEVER)
            session = LanceSession(Layer(norm_and_relu), LanceConfig(bits=4))
            session.start()
            with session.step() if how != "plain" else nullcontext():
                output = POOLS[name](leaf * 1)
            session.stop()
        assert (output.grad_fn.name() == POOL) == (how == "ours")
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append((output.detach(), *torch.autograd.grad(output, leaf, grad)))
    for others in found[1:]:
        assert all(same_bits(left, right) for left, right in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 2),
        lambda x: F.max_pool1d(x.flatten(1, 2), 2),
        lambda x: F.max_pool3d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 4),
    ],
)
def test_other_pools_take_the_stock_kernel(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 16, 16, 17)
    x[0, 0, 3, 3] = 9.0
    found = []
    for how in ("step", "plain"):
        leaf = x.clone().requires_grad_()
        session = LanceSession(Layer(norm_and_relu), LanceConfig(bits=4))
        session.start()
        with session.step() if how == "step" else nullcontext():
            output = function(leaf * 1)
        session.stop()
        assert POOL not in names(output)
        found.append(torch.autograd.grad(output.square().sum(), leaf)[0])
    assert same_bits(*found)


def test_pools_in_any_backward_pass() -> None:
    """Derivatives of derivatives, many at a time, in a checkpointed segment, and twice through a graph."""

    def pooled(layer: Layer, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(layer.norm(x)).square(), 3, 2, 1)

    def back(output: Tensor) -> list[Tensor]:
        assert (POOL in names(output)) == (operators.LARGE != NEVER)
        many = torch.stack([fixed_gradient(output), torch.ones_like(output)])
        first = torch.autograd.grad(output, parameters, fixed_gradient(output), retain_graph=True)
        again = torch.autograd.grad(output, parameters, fixed_gradient(output), retain_graph=True)
        batched = torch.autograd.grad(output, parameters, many, retain_graph=True, is_grads_batched=True)
        graph = torch.autograd.grad(output, parameters, fixed_gradient(output), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), parameters)
        return [*first, *again, *batched, *graph, *second]

    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Layer(pooled)
        parameters = list(model.norm.parameters())
        found.append(run(model, batch(), ours, back=back))
    assert_close(*found)

    ours, stock = both(lambda: Layer(lambda layer, x: checkpoint(pooled, layer, x, use_reentrant=False)), expected=())
    assert_close(ours, stock)


SMOOTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "of a module": nn.GELU(),
}


class Smooth(nn.Module):
    """Two linear maps and what lies between."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 192), nn.Linear(192, 48)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def smooth_steps(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
    x = torch.randn(8, 65, 48, generator=torch.Generator().manual_seed(0))
    return both(make, x, expected=(), **options)


@pytest.mark.parametrize("name", SMOOTHS)
def test_smooth_activations_go_back_as_the_stock_ones(name: str) -> None:
    """Their derivatives, and their results for the weight of the next layer, are looked up."""

    def back(output: Tensor) -> list[Tensor]:
        assert (SMOOTH in names(output)) == (operators.LARGE != NEVER and name != "hardswish")
        return list(torch.autograd.grad(output, model.parameters(), fixed_gradient(output), retain_graph=True))

    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Smooth(SMOOTHS[name])
        x = torch.randn(8, 65, 48, generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch:
            if not ours:  # neither here nor there
                patch.setattr(rounding, "map_elements", lambda *_: False)
                patch.setattr(kept, "map_elements", lambda *_: False)
            found.append(run(model, x, ours, back=back, expected=()))
    assert_close(*found)


@pytest.mark.parametrize("around", [None, torch.bfloat16])
def test_smooth_activations_in_half_precision(around: torch.dtype | None) -> None:
    def make() -> nn.Module:
        model = Smooth(F.gelu)
        return model if around else model.bfloat16()

    x = torch.randn(8, 65, 48).to(torch.float32 if around else torch.bfloat16)
    ours, stock = both(make, x, expected=(), around=torch.autocast("cpu", around) if around else None)
    assert_close(ours, stock, bound=0.01)


def test_smooth_activations_in_any_backward_pass() -> None:
    def back(output: Tensor) -> list[Tensor]:
        many = torch.stack([fixed_gradient(output), torch.ones_like(output)])
        batched = torch.autograd.grad(output, parameters, many, retain_graph=True, is_grads_batched=True)
        graph = torch.autograd.grad(output, parameters, fixed_gradient(output), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), parameters)
        return [*batched, *graph, *second]

    for name, function in SMOOTHS.items():
        found = []
        for ours in (True, False):
            torch.manual_seed(0)
            scale = nn.Parameter(torch.rand(48))
            model = Smooth(function)
            model.forward = lambda x, scale=scale, function=function: function(x * scale) * scale  # type: ignore
            parameters = [scale]
            x = torch.randn(8, 130, 48, generator=torch.Generator().manual_seed(0))
            found.append(run(model, x, ours, back=back, expected=()))
        assert_close(*found), name

    def segment(x: Tensor) -> Tensor:
        return checkpoint(F.gelu, x, use_reentrant=False)

    assert_close(*smooth_steps(lambda: Smooth(segment)))


@pytest.mark.parametrize("name", SMOOTHS)
def test_hooks_of_tensors_are_asked_once(name: str) -> None:
    leaf = torch.randn(256, 256).requires_grad_()
    for graph in (False, True):
        found = []
        for how in ("ours", "plain"):
            asked = []

            def hook(grad: Tensor, asked: list[int] = asked) -> Tensor:
                asked.append(1)
                return grad * 2

            session = LanceSession(nn.Linear(4, 4), LanceConfig(bits=4))
            session.start()
            with session.step() if how == "ours" else nullcontext():
                before = leaf * 1
                before.register_hook(hook)
                output = SMOOTHS[name](before)
            session.stop()
            found.append(torch.autograd.grad(output.square().sum(), leaf, create_graph=graph)[0])
            assert len(asked) == 1
        assert relative_error(found[0].detach(), found[1].detach()) < 0.2


def test_a_smooth_activation_of_a_layout_of_its_own() -> None:
    ours, stock = smooth_steps(lambda: Smooth(lambda x: F.gelu(x.transpose(1, 2)).transpose(1, 2)))
    assert_close(ours, stock)
    ours, stock = smooth_steps(lambda: Smooth(lambda x: F.gelu(x[:1].expand(x.shape))))
    assert_close(ours, stock)
    ours, stock = smooth_steps(lambda: Smooth(lambda x: F.gelu(x[:, ::2]).repeat_interleave(2, 1)[:, :65]))
    assert_close(ours, stock)


@pytest.mark.parametrize("function", [lambda x: F.silu(x * 1, inplace=True), lambda x: F.silu(x.double()).float()])
def test_other_smooth_activations_take_the_stock_kernel(function: Callable[[Tensor], Tensor]) -> None:
    def back(output: Tensor) -> list[Tensor]:
        assert SMOOTH not in names(output)
        return []

    torch.manual_seed(0)
    run(Smooth(function), torch.randn(8, 65, 48), True, back=back, expected=())


@pytest.mark.parametrize(
    "arguments", [(0,), (3, 0), (2, 2, 2), (2, 2, 1, 0), ((1, 2, 3),), ("2",), (2.5,), (400,), (2, -1), (2, 1, -1)]
)
def test_windows_are_refused_as_by_the_stock_operator(arguments: tuple[Any, ...]) -> None:
    plain, ours = (outcome(lambda _, x: F.max_pool2d(x, *arguments), how) for how in ("plain", "ours"))
    assert isinstance(plain, tuple)
    assert ours == plain


def test_second_derivatives() -> None:
    for kind in ("training", "eval"):
        norm, _ = NORMS[kind]

        def make(norm: Any = norm) -> nn.Module:
            return Layer(lambda layer, x: F.hardtanh(F.relu(layer.norm(x)) * layer.norm(x).square()), norm())

        found = []
        for ours in (True, False):
            torch.manual_seed(0)
            model = make()

            def back(output: Tensor, model: nn.Module = model) -> list[Tensor]:
                parameters = [model.conv.weight, *model.norm.parameters()]
                first = torch.autograd.grad(output.sum(), parameters, create_graph=True)
                return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), parameters)]

            # The convolution would refuse: it is left out.
            with pytest.MonkeyPatch.context() as patch:
                if not ours:
                    patch.setattr(operators, "LARGE", NEVER)
                session = LanceSession(model, LanceConfig(bits=4, layers=["unused"]))
                session.start()
                with session.step():
                    output = model(batch())
                assert names(output) & OURS == (OURS if ours else set())
                found.append(back(output))
                session.stop()
        assert_close(*found)


def test_twice_through_a_retained_graph_and_no_further() -> None:
    model = Layer(norm_and_relu)

    def back(output: Tensor) -> list[list[Tensor]]:
        parameters, grad = [model.conv.weight, *model.norm.parameters()], fixed_gradient(output)
        first = torch.autograd.grad(output, parameters, grad, retain_graph=True)
        second = torch.autograd.grad(output, parameters, grad)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(output, parameters, grad)
        return [list(first), list(second)]

    first, second = run(model, batch(), True, back=back)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["norm.weight", "norm.bias", "conv.weight"])
def test_one_gradient_alone(wanted: str) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Layer(norm_and_relu)
        found.append(
            run(
                model,
                batch(),
                ours,
                back=lambda o, m=model: torch.autograd.grad(o, m.get_parameter(wanted), fixed_gradient(o)),
            )
        )
    assert_close(*found)


def test_batched_gradients() -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = Layer(norm_and_relu)
        x = torch.randn(8, 16, 16, 17).requires_grad_()
        model = Whole(layer.norm)
        grads = torch.randn(3, 8, 16, 16, 17)
        found.append(
            run(
                model,
                x,
                ours,
                back=lambda o, x=x, m=model, g=grads: torch.autograd.grad(
                    o, [x, *m.parameters()], g, is_grads_batched=True
                ),
            )
        )
    assert_close(*found)


class Whole(nn.Module):
    """A norm and a gate of some input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["backward in the step", "backward behind it"])
def test_checkpoints(reentrant: bool, inside: bool) -> None:
    """What is around a segment has the backward passes of ours; what is in it may not."""
    found = []
    for large in (operators.LARGE, NEVER):
        torch.manual_seed(0)
        model = nn.Sequential(Layer(norm_and_relu), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "LARGE", large)
            session = LanceSession(model, LanceConfig(bits=4))
            session.start()
            with session.step():
                middle = model[0](batch())
                output = checkpoint(lambda x, m=model: F.relu(m[2](m[1](x))), middle, use_reentrant=reentrant)
                assert names(middle) & OURS == (OURS if large != NEVER else set())
                if inside:
                    output.backward(fixed_gradient(output))
            if not inside:
                output.backward(fixed_gradient(output))
            session.stop()
        found.append([p.grad for p in model.parameters()])
    assert_close(*found)


def test_a_forward_mode_tangent() -> None:
    """Of the input, and of weights alone."""
    norm = moved(nn.BatchNorm2d(16))
    x, tangent, direction = torch.randn(3, 8, 16, 16, 17).unbind()[0], torch.randn(8, 16, 16, 17), torch.randn(16)

    def tangents(weights: bool) -> Tensor:
        with forward_ad.dual_level():
            input = x.clone().requires_grad_() if weights else forward_ad.make_dual(x, tangent)
            weight = forward_ad.make_dual(norm.weight.detach(), direction) if weights else norm.weight
            output = F.relu(F.batch_norm(input, None, None, weight, norm.bias, True))
            found = forward_ad.unpack_dual(output).tangent
            assert found is not None
            return found.detach().clone()

    for weights in (False, True):
        expected = tangents(weights)
        session = LanceSession(norm, LanceConfig(bits=4))
        session.start()
        with session.step():
            found = tangents(weights)
        session.stop()
        assert relative_error(found, expected) < 1e-6


def test_transforms() -> None:
    norm = moved(nn.BatchNorm2d(16)).eval()
    x = torch.randn(8, 16, 16, 17)
    weights = dict(norm.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.relu(torch.func.functional_call(norm, weights, (x,))).square().mean()

    everything = [
        lambda: list(torch.func.grad(loss)(weights, x).values()),
        lambda: list(
            torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x[:, None].repeat(1, 4, 1, 1, 1)).values()
        ),
        lambda: [torch.func.jvp(lambda w: loss(w, x), (weights,), (weights,))[1]],
        lambda: list(torch.func.jacrev(loss)(weights, x).values()),
    ]
    for transform in everything:
        expected = transform()
        session = LanceSession(norm, LanceConfig(bits=4))
        session.start()
        with session.step():
            found = transform()
        session.stop()
        assert_close(found, expected)


def test_hooks_of_others_on_top() -> None:
    """They are given tensors, and what they return is read."""
    model = Layer(norm_and_relu)
    plain = copy.deepcopy(model)
    output = plain(batch())
    output.backward(fixed_gradient(output))
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    with session.step(), torch.autograd.graph.save_on_cpu():
        output = model(batch())
    output.backward(fixed_gradient(output))
    session.stop()
    assert_close([p.grad for p in model.norm.parameters()], [p.grad for p in plain.norm.parameters()])


def test_hooks_of_modules_and_tensors() -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        seen: list[Tensor] = []

        def function(layer: Layer, x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            x.register_hook(lambda g: seen.append(g.clone()))
            x = layer.norm(x)
            x.retain_grad()
            seen.append(x)
            return F.relu(x)

        model = Layer(function)
        model.norm.register_full_backward_hook(lambda _, inputs, outputs, seen=seen: seen.extend((*inputs, *outputs)))
        model.norm.register_full_backward_pre_hook(lambda _, outputs: (outputs[0] * 2,))
        handle = nn.modules.module.register_module_full_backward_pre_hook(
            lambda module, outputs, seen=seen: seen.extend(outputs)
        )
        try:
            gradients = run(model, batch(), ours)
        finally:
            handle.remove()
        found.append([*gradients, *(t.grad if t.requires_grad else t for t in seen)])
    assert len(found[0]) > 6
    assert_close(*found)


def test_hooks_may_write_on_gradients() -> None:
    """They are tensors of their own, not views."""
    for function in (lambda layer, x: layer.norm(x), lambda _, x: F.relu(x)):
        x = torch.randn(8, 16, 16, 17, requires_grad=True)
        norm = Layer(function)
        session = LanceSession(norm, LanceConfig(bits=4))
        session.start()
        with session.step():
            output = function(norm, x)
        session.stop()
        assert names(output) & OURS
        (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
        assert not gradient._is_view()
        gradient.detach_()
        gradient.mul_(torch.ones((), requires_grad=True))


def test_gradients_of_weights_share_no_memory() -> None:
    model = Layer(norm_and_relu)
    run(model, batch(), True)
    storages = [p.grad.untyped_storage() for p in model.norm.parameters()]
    assert len({s.data_ptr() for s in storages}) == 2
    assert [s.nbytes() for s in storages] == [64, 64]


# In place -------------------------------------------------------------------------------------------------------------


def outcome(function: Callable[[Layer, Tensor], Tensor], how: str) -> Any:
    """Gradients, or the message of what is raised: plain, through stock kernels, or through ours."""
    torch.manual_seed(0)
    model = Layer(function, moved(nn.BatchNorm2d(16)))
    session = LanceSession(model, LanceConfig(bits=8, layers=["unused"])) if how != "plain" else None
    with pytest.MonkeyPatch.context() as patch:
        if how == "stock":
            patch.setattr(operators, "LARGE", NEVER)
        if session is not None:
            session.start()
        try:
            with nullcontext() if session is None else session.step():
                output = model(batch())
            output.backward(fixed_gradient(output))
        except Exception as error:
            return type(error), str(error)
        finally:
            if session is not None:
                session.stop()
    return [p.grad for p in model.parameters() if p.grad is not None]


def other_view(_: Layer, x: Tensor) -> Tensor:
    view = x.view(8, -1)
    F.relu_(x)
    return view * 2


def then_added(layer: Layer, x: Tensor) -> Tensor:
    y = layer.norm(x)
    y = F.relu(y, inplace=True)
    y += 1
    y.mul_(2)
    return y


WRITTEN: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a leaf": lambda layer, x: F.relu_(torch.ones(1 << 16, requires_grad=True)) + x.sum(),
    "a view of a leaf": lambda layer, x: F.relu_(torch.ones(1 << 16, requires_grad=True)[1:]) + x.sum(),
    "a view": lambda layer, x: F.relu_(x[1:]) + x.sum(),
    "a reshaped view": lambda layer, x: F.relu_(x.view(8, -1)) + x.sum(),
    "a part of several": lambda layer, x: F.relu_(torch.cat([x, x]).split(8)[0]),
    "one of several": lambda layer, x: F.relu_(torch.stack([x, x]).unbind()[0]),
    "a tensor with other views": other_view,
    "the result of a norm, written on again": then_added,
    "the result of a gate": lambda layer, x: F.relu(x).add_(1),
    "the result of a gate in place": lambda layer, x: F.relu(x * 1, inplace=True).mul_(2).relu_(),
    "hardtanh of a view": lambda layer, x: F.hardtanh_(x.flatten(1)) + x.sum(),
    "of a tensor without grad": lambda layer, x: x.sum() + F.relu_(x.detach().clone()),
    "a gate whose bounds are reversed": lambda layer, x: F.hardtanh(x, 1.0, -1.0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_writing_is_refused_or_done_as_without(name: str) -> None:
    plain, stock, ours = (outcome(WRITTEN[name], how) for how in ("plain", "stock", "ours"))
    if isinstance(plain, tuple) and "modified by an inplace operation" in plain[1]:
        assert_close(ours, stock)  # what was packed before is as it was
    elif isinstance(plain, tuple):
        assert stock == plain
        assert ours == plain
    else:
        assert_close(ours, stock)
        assert_close(ours, plain, bound=0.1)


def test_what_is_retained_of_a_tensor_written_on() -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        kept: list[Tensor] = []

        def function(_: Layer, x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            x = x * 1
            x.retain_grad()
            x.register_hook(lambda g: kept.append(g.clone()))
            kept.append(x)
            return F.relu(x, inplace=True) * 2

        gradients = run(Layer(function), batch(), ours, expected={"GateBackward"})
        found.append([gradients[0], kept[0].grad, kept[1]])
    assert all(same_bits(left, right) for left, right in zip(*found, strict=True))


def test_a_weight_changed_before_the_backward_pass() -> None:
    """As the stock operator in a step: the gradient is that of the weight as it is then."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Layer(norm_and_relu, moved(nn.BatchNorm2d(16)))

        def back(output: Tensor, model: Layer = model) -> Any:
            with torch.no_grad():
                model.norm.weight.mul_(3)
            try:
                output.backward(fixed_gradient(output))
            except RuntimeError as error:
                return str(error)
            return [p.grad for p in model.parameters()]

        found.append(run(model, batch(), ours, back=back))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert_close(*found)


# Arguments ------------------------------------------------------------------------------------------------------------

ZEROS, ONES = torch.zeros(16), torch.ones(16)
ARGUMENTS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "weight too short": lambda layer, x: F.batch_norm(x, None, None, ONES[:15], None, True),
    "weight too long": lambda layer, x: F.batch_norm(x, None, None, torch.ones(17), None, True),
    "bias too short": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight, ONES[:15], True),
    "bias too long": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight, torch.ones(17), True),
    "statistics too short": lambda layer, x: F.batch_norm(x, ZEROS[:3].clone(), ONES[:3].clone(), None, None, True),
    "variance too short": lambda layer, x: F.batch_norm(x, ZEROS.clone(), ONES[:3].clone(), None, None, True),
    "fixed statistics too short": lambda layer, x: F.batch_norm(x, ZEROS[:3], ONES[:3], layer.norm.weight),
    "mean alone": lambda layer, x: F.batch_norm(x, ZEROS.clone(), None, layer.norm.weight, None, True),
    "no fixed statistics": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight),
    "statistics with grad": lambda layer, x: F.batch_norm(
        x, torch.zeros(16, requires_grad=True), ONES, layer.norm.weight, None, False
    ),
    "one value a channel": lambda layer, x: F.batch_norm(x.reshape(1, -1), None, None, None, None, True),
    "eps of zero": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight, None, True, 0.1, 0.0),
    "eps below zero": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight, None, True, 0.1, -1.0),
    "one axis": lambda layer, x: F.batch_norm(x.flatten(), None, None, None, None, True),
    "two axes of weights": lambda layer, x: F.batch_norm(x, None, None, layer.norm.weight[None], None, True),
    "weights in double precision": lambda layer, x: F.batch_norm(x, None, None, ONES.double(), None, True),
    "weights in half precision": lambda layer, x: F.batch_norm(x, None, None, ONES.bfloat16(), None, True),
    "weights with gaps": lambda layer, x: F.batch_norm(
        x, None, None, layer.norm.weight.repeat_interleave(2)[::2], None, True
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_refused_as_by_the_stock_operator(name: str) -> None:
    """Some of them the operator beneath it would read and write beyond."""
    plain, ours = (outcome(ARGUMENTS[name], how) for how in ("plain", "ours"))
    if isinstance(plain, tuple):
        assert ours == plain
    else:
        nothing = [bool(grad.isnan().all()) for grad in plain]  # older versions take any eps
        assert [bool(grad.isnan().all()) for grad in ours] == nothing
        assert_close(*([g for g, lost in zip(grads, nothing, strict=True) if not lost] for grads in (ours, plain)), 0.1)


# Memory and threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nothing_outlives_the_graph(training: bool) -> None:
    """Without the help of the collector of circles."""
    held: list[Any] = []

    def function(layer: Layer, x: Tensor) -> Tensor:
        for _ in range(2):
            held.append(weakref.ref(x.untyped_storage()))
            x = F.relu(layer.norm(x))
        return F.relu(x * 1, inplace=True)

    model = Layer(function, moved(nn.BatchNorm2d(16)).train(training))
    gc.collect()
    gc.disable()
    before = {id(node) for node in gc.get_objects() if type(node).__name__ in OURS}
    try:
        run(model, batch(), True)
        assert held
        assert not {id(node) for node in gc.get_objects() if type(node).__name__ in OURS} - before
    finally:
        gc.enable()


def test_inputs_are_not_kept_beside_their_bits() -> None:
    """Nor after a step whose graph is alive."""
    storages: list[Any] = []

    def function(layer: Layer, x: Tensor) -> Tensor:
        storages.append(torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage()))
        return F.relu(layer.norm(x)).mean()

    model = Layer(function)
    run(model, batch(), True, back=lambda output: storages[0].expired() or pytest.fail("the input is alive"))


def test_gradients_are_added_up_in_place() -> None:
    """Where branches meet autograd writes on a gradient whose memory nobody else holds, such as the base of a view."""
    bases: list[Tensor | None] = []

    def function(layer: Layer, x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(lambda g: bases.append(g._base))
        return F.relu(layer.norm(x))

    run(Layer(function), batch(), True)
    assert bases == [None]


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_a_trace_is_of_stock_operators() -> None:
    model = Layer(lambda layer, x: torch.jit.trace(lambda y: F.relu(y), x.detach().requires_grad_())(x))
    run(model, batch(), True, expected=())


def test_steps_of_several_threads() -> None:
    expected = run(seeded(), batch(), True)
    found: list[Any] = [None] * 4

    def work(index: int) -> None:
        model = seeded()
        session = LanceSession(model, LanceConfig(bits=4))
        session.start()
        with session.step():
            output = model(batch())
        assert names(output) & OURS == OURS
        output.backward(fixed_gradient(output))
        session.stop()
        found[index] = [p.grad for p in model.parameters()]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in found:
        assert_close(gradients, expected)


def seeded() -> Layer:
    layer = Layer(norm_and_relu)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(3)))
    return layer


def test_a_backward_pass_in_another_thread() -> None:
    model = seeded()
    expected = run(seeded(), batch(), True)

    def back(output: Tensor) -> list[Tensor | None]:
        thread = threading.Thread(target=lambda: output.backward(fixed_gradient(output)))
        thread.start()
        thread.join()
        return [p.grad for p in model.parameters()]

    assert_close(run(model, batch(), True, back=back), expected)


def test_models_are_copied_after_a_step() -> None:
    model = Layer(norm_and_relu)
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    with session.step():
        output = model(batch())
    output.backward(fixed_gradient(output))
    again = copy.deepcopy(model)
    session.stop()
    assert_close(list(again.state_dict().values()), list(model.state_dict().values()), 1e-12)


def test_anomalies_are_detected() -> None:
    model = Layer(norm_and_relu)
    plain = copy.deepcopy(model)
    with torch.autograd.detect_anomaly():
        ours = run(model, batch(), True)
        assert_close(ours, run(plain, batch(), False))


@pytest.mark.parametrize(
    "function",
    [
        *GATES.values(),
        norm_and_relu,
        lambda layer, x: F.max_pool2d(F.hardswish(x), 2),
        lambda layer, x: F.max_pool2d(F.relu(x), 3, 2),
        lambda layer, x: F.relu6(layer.norm(x), inplace=True) + x,
        lambda layer, x: F.hardtanh(layer.norm(x)) + x,
    ],
)
def test_plain_training_is_said_to_keep_what_it_keeps(function: Callable[[Layer, Tensor], Tensor]) -> None:
    """Also where the stock operator makes a copy for itself, or keeps an input of which ours reads nothing."""
    model = Layer(function)
    plain = measure_saved_bytes(lambda: model(batch()).square(), model)
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    with session.step():
        output = model(batch())
        loss = output.square()
    assert names(output) & {*OURS, POOL}
    loss.backward(torch.ones_like(loss))
    report = session.report
    session.stop()
    assert report is not None
    assert report.plain is not None
    assert report.plain.total == plain.total


@pytest.mark.parametrize(
    "arguments", [{"ceil_mode": None}, {"ceil_mode": 1}, {"kernel_size": True}, {"stride": (True, 2)}]
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any]) -> None:
    session = LanceSession(nn.Linear(4, 4), LanceConfig(bits=4))
    session.start()
    x = torch.randn(4, 16, 32, 33).requires_grad_()
    for around in (nullcontext(), session.step()):
        with around, pytest.raises(TypeError):
            F.max_pool2d(x, **{"kernel_size": 2, **arguments})
    session.stop()


def test_a_pool_whose_indices_lie_in_another_order() -> None:
    """A tensor of one pixel is in both formats; the stock operator takes the other one."""
    found = []
    for ours in (True, False):
        x = torch.empty_strided((64, 1024, 1, 1), (1024, 1, 1024, 1024), dtype=torch.bfloat16)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
        session = LanceSession(nn.Linear(4, 4), LanceConfig(bits=4))
        session.start()
        with session.step() if ours else nullcontext():
            output = F.max_pool2d(x, 2, 1, 1)
        session.stop()
        found.append(torch.autograd.grad(output.float().square().sum(), x)[0])
    assert same_bits(*found)
