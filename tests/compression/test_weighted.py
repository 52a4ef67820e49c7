"""Gradients of weights in half precision: as near as that is, and everything else as the stock operators do it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.compression import operators
from lightning_lance.ops import weighted
from lightning_lance.ops.conv import Geometry, convolve
from lightning_lance.tensors import native
from tests.oracles import relative_error
from tests.stock import names, same_bits

pytestmark = pytest.mark.skipif(native._native is None, reason="nothing was compiled")

NEVER = 1 << 60
NODES = {"LinearBackward", "ConvBackward"}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor takes its time, and where there is little to multiply."""
    monkeypatch.setattr(operators, "has_half_products", lambda: True)
    monkeypatch.setattr(operators, "MULTIPLICATIONS", 1)
    monkeypatch.setattr(operators, "LARGE", 1)


def step(
    model: nn.Module, x: Tensor, ours: bool, *, bits: Any = "auto", around: Any = None, back: Any = None
) -> tuple[Tensor, list[Tensor], set[str]]:
    """Result, gradients of input and parameters, and the nodes of a step, with products in half precision or not."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(operators, "MULTIPLICATIONS", NEVER)
        session = LanceSession(model, LanceConfig(bits=bits))
        session.start()
        with around or nullcontext(), session.step():
            output = model(leaf * 1)
        session.stop()
    wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    if back is not None:
        return output, back(output, wanted), names(output)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return output, list(torch.autograd.grad(output, wanted, gradient, allow_unused=True)), names(output)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: nn.Linear(64, 20), (48, 64)),
    "tokens": (lambda: nn.Linear(64, 20, bias=False), (4, 9, 64)),
    "many axes": (lambda: nn.Linear(64, 20), (2, 3, 5, 64)),
    "1d": (lambda: nn.Conv1d(8, 12, 3, 2, 1), (4, 8, 40)),
    "2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 8, 12, 13)),
    "strided": (lambda: nn.Conv2d(8, 12, (3, 5), (2, 3), (1, 2), bias=False), (4, 8, 13, 14)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), (4, 8, 12, 13)),
    "reflected": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (4, 8, 12, 13)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(48, 20)), (64, 48)),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_alone_differ_and_little(name: str, last: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    if last and isinstance(model, nn.Conv2d):
        x = x.contiguous(memory_format=torch.channels_last)
    ours, stock = step(model, x, True), step(model, x, False)
    assert ours[2] & NODES
    assert not stock[2] & NODES
    assert same_bits(ours[0], stock[0])
    assert relative_error(ours[1][0], stock[1][0]) < 1e-5
    for parameter, left, right in zip(model.parameters(), ours[1][1:], stock[1][1:], strict=True):
        assert left.dtype is right.dtype
        assert left.shape == right.shape
        assert relative_error(left, right) < (0.01 if parameter.dim() > 1 else 5e-3)
    weight = next(i for i, p in enumerate(model.parameters(), 1) if p.dim() > 1)
    assert not torch.equal(ours[1][weight], stock[1][weight])


def test_computed_inputs_are_computed_in_half_precision() -> None:
    """Behind a norm and an activation the input is not kept but for the norm's own; behind an activation for that."""
    nets = [
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU6()),
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(16, 12, 3)),
        nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 9)),
    ]
    for net in nets:
        found = []
        for ours in (True, False):
            torch.manual_seed(0)
            found.append(step(net, torch.randn(4, 8, 14, 64 if isinstance(net[0], nn.Linear) else 14), ours))
        ours, stock = found
        assert ours[2] & NODES
        for left, right in zip(ours[1], stock[1], strict=True):
            assert relative_error(left, right) < 0.01


def test_one_input_of_several_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(48, 48) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(f(x).unflatten(-1, (4, 12)) for f in (self.q, self.k, self.v)))

    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 16, 48)
    ours, stock = step(model, x, True), step(model, x, False)
    for left, right in zip(ours[1], stock[1], strict=True):
        assert relative_error(left, right) < 0.01 or float(right.abs().max()) < 1e-5


def taken(model: nn.Module, x: Tensor, **options: Any) -> bool:
    return bool(step(model, x, True, **options)[2] & NODES)


def test_what_is_asked_for_in_more_bits_is_multiplied_in_full() -> None:
    model, x = nn.Linear(48, 20), torch.randn(64, 48)
    assert taken(model, x)
    assert taken(model, x, bits=4)
    assert not taken(model, x, bits=8)
    assert not taken(model, x, bits=None)


def test_other_weights_and_inputs_take_the_stock_operator() -> None:
    x = torch.randn(64, 48)
    assert not taken(nn.Linear(48, 20).double(), x.double())
    assert not taken(nn.Linear(48, 20).bfloat16(), x.bfloat16())
    assert not taken(nn.Linear(48, 20), x, around=torch.autocast("cpu", torch.bfloat16))
    assert not taken(nn.Linear(48, 20).requires_grad_(False), x)
    assert not taken(nn.Conv2d(8, 8, 3, padding="same"), torch.randn(2, 8, 9, 9))
    assert not taken(nn.Conv2d(8, 8, 3), torch.randn(8, 9, 9))
    image = torch.randn(4, 8, 12, 13)
    assert taken(nn.Conv2d(8, 8, 3, padding=1), image)
    for options in ({"groups": 2}, {"dilation": 2}, {"padding": 2}, {"stride": (1, 4)}):
        assert not taken(nn.Conv2d(8, 8, 3, **options), image)
    assert not taken(nn.Conv2d(8, 8, (3, 5), padding=1), image[..., :4])
    assert not taken(nn.Conv3d(4, 6, 3, padding=1), torch.randn(2, 4, 6, 7, 8))
    assert not taken(nn.ConvTranspose2d(8, 8, 3), torch.randn(2, 8, 9, 9))
    assert taken(nn.Linear(48, 20), x)


def test_few_multiplications_take_the_stock_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "MULTIPLICATIONS", 64 * 48 * 20 + 1)
    assert not taken(nn.Linear(48, 20), torch.randn(64, 48))
    monkeypatch.setattr(operators, "MULTIPLICATIONS", 64 * 48 * 20)
    assert taken(nn.Linear(48, 20), torch.randn(64, 48))


@pytest.mark.parametrize("shape", [(20,), (1,), (), (1, 20), (48, 20), (48, 1), None])
def test_any_bias(shape: tuple[int, ...] | None) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 64))
            self.bias = None if shape is None else nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    model, x = Biased(), torch.randn(48, 64)
    ours, stock = step(model, x, True), step(model, x, False)
    assert all(relative_error(left, right) < 0.01 for left, right in zip(ours[1], stock[1], strict=True))


@pytest.mark.parametrize("offset", [0.0, 10.0, 50.0, 300.0, 3e4])
@pytest.mark.parametrize("behind", [nn.Identity, nn.ReLU, nn.GELU])
def test_inputs_far_from_zero_are_multiplied_in_full(offset: float, behind: type[nn.Module]) -> None:
    """Where gradients sum to zero, nothing of the offset is left in that of the weight, but for rounding."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.behind, self.layer = behind(), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.behind(x + offset))

    def back(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad(output, wanted[1:2], gradient - gradient.mean(0)))

    torch.manual_seed(0)
    model, x = Shifted(), torch.randn(4096, 64)
    plain = model(x)
    [expected] = back(plain, [x, model.layer.weight])
    ours, stock = (relative_error(step(model, x, how, back=back)[1][0], expected) for how in (True, False))
    assert ours < 1.2 * stock


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_pass_under_autocast(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)

    def back(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            return list(torch.autograd.grad(output, wanted, gradient))

    ours, stock = (step(model, x, how, back=back)[1] for how in (True, False))
    assert relative_error(ours[0], stock[0]) < 1e-5
    assert all(relative_error(left, right) < 0.02 for left, right in zip(ours, stock, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 0},
        {"stride": (1, 1, 1)},
        {"stride": []},
        {"stride": -1},
        {"padding": (1, 1, 1)},
        {"dilation": ()},
        {"padding": "sam"},
        {"groups": 3},
        {"stride": 1.5},
    ],
)
def test_arguments_are_refused_as_by_the_stock_operator(arguments: dict[str, Any]) -> None:
    x, weight = torch.randn(4, 8, 12, 13).requires_grad_(), torch.randn(6, 8, 3, 3).requires_grad_()
    found = []
    session = LanceSession(nn.Linear(3, 3), LanceConfig(bits=4))
    session.start()
    for around in (nullcontext(), session.step()):
        with around, pytest.raises(Exception) as caught:  # noqa: PT011
            F.conv2d(x * 1, weight, **arguments)
        found.append((caught.type, str(caught.value)))
    session.stop()
    assert found[0] == found[1]


@pytest.mark.parametrize("function", [F.linear, F.conv2d])
@pytest.mark.parametrize("shapes", [((4, 8, 9, 9), (7, 5, 3, 3)), ((4, 8), (7, 5)), ((4, 8, 9, 8), (2,))])
def test_shapes_are_refused_as_by_the_stock_operator(function: Any, shapes: Any) -> None:
    found = []
    for ours in (True, False):
        x, weight = (torch.randn(shape).requires_grad_() for shape in shapes)
        model = nn.Linear(3, 3)
        session = LanceSession(model, LanceConfig(bits=4))
        session.start()
        try:
            with session.step() if ours else nullcontext():
                found.append(tuple(function(x * 1, weight).shape))
        except (RuntimeError, ValueError) as error:
            found.append((type(error), str(error)))  # type: ignore[arg-type]
        session.stop()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["rows", "tokens", "2d", "strided", "1d", "weight norm"])
def test_in_any_backward_pass(name: str) -> None:
    """Many at a time and with a graph: in full precision. The second derivatives go through the first graph too."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)

    def back(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        many = torch.stack([gradient, torch.ones_like(gradient)])
        batched = torch.autograd.grad(output, wanted, many, retain_graph=True, is_grads_batched=True)
        graph = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), wanted, retain_graph=True)
        once = torch.autograd.grad(output, wanted, gradient, retain_graph=True)
        again = torch.autograd.grad(output, wanted, gradient)
        assert all(torch.equal(left, right) for left, right in zip(once, again, strict=True))
        return [*batched, *graph, *second, *once]

    ours, stock = (step(model, x, ours, back=back)[1] for ours in (True, False))
    count = len(ours) // 4
    for index, (left, right) in enumerate(zip(ours, stock, strict=True)):
        assert relative_error(left.detach(), right.detach()) < (0.01 if index >= 2 * count else 1e-5)


def test_a_checkpointed_segment_takes_the_stock_operator() -> None:
    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(lambda x: self.first(x).relu(), x, use_reentrant=False))

    torch.manual_seed(0)
    model, x = Segment(), torch.randn(64, 48)
    ours, stock = step(model, x, True), step(model, x, False)
    for left, right in zip(ours[1], stock[1], strict=True):
        assert relative_error(left, right) < 0.01


def test_some_gradients_alone() -> None:
    model = nn.Conv2d(8, 12, 3, padding=1)
    model.bias.requires_grad_(False)
    torch.manual_seed(0)
    x = torch.randn(4, 8, 12, 13)
    for keep in (True, False):

        def back(output: Tensor, wanted: list[Tensor], keep: bool = keep) -> list[Tensor]:
            return list(torch.autograd.grad(output.sum(), wanted[:1] if keep else wanted[1:]))

        ours, stock = (step(model, x, ours, back=back)[1] for ours in (True, False))
        assert all(relative_error(a, b) < 0.01 for a, b in zip(ours, stock, strict=True))


def test_results_may_be_written_on() -> None:
    model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(inplace=True))
    torch.manual_seed(0)
    x = torch.randn(4, 9, 64)
    ours, stock = step(model, x, True), step(model, x, False)
    assert all(relative_error(left, right) < 0.01 for left, right in zip(ours[1], stock[1], strict=True))


class Permuted(nn.Module):
    """As in ConvNeXt, with an input that is kept too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(self.conv(x).tanh().permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 32), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(2), nn.Linear(14 * 14, 32), nn.Linear(32, 8), nn.Tanh()),
        Permuted(),
    ],
)
def test_plain_training_is_said_to_keep_what_it_keeps(model: nn.Module) -> None:
    x = torch.randn(16, 3, 16, 16)
    plain = measure_saved_bytes(lambda: model(x).square().mean()).total
    session = LanceSession(model)
    session.start()
    with session.step():
        model(x).square().mean().backward()
    session.stop()
    assert session.report is not None
    assert session.report.plain is not None
    assert session.report.plain.total == plain


def test_a_kernel_that_returns_something_else_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of some shapes do: full precision is compared with once, and taken instead."""
    stock, asked = weighted._stock, []

    def broken(grad: Tensor, *arguments: Any) -> Any:
        asked.append(grad.dtype)
        gradient, weight, bias = stock(grad, *arguments)
        return gradient, weight * 2 if grad.dtype is torch.bfloat16 else weight, bias

    monkeypatch.setattr(weighted, "_stock", broken)
    monkeypatch.setattr(weighted, "_SOUND", {})
    torch.manual_seed(0)
    model, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(4, 8, 12, 13)
    expected = step(model, x, False)[1][1]
    for round in range(3):
        found = step(model, x, True)
        assert found[2] & NODES
        assert relative_error(found[1][1], expected) < 0.01
        assert asked.count(torch.bfloat16) == 1
        assert asked.count(torch.float32) == round + 1


def test_a_sound_kernel_is_compared_once_and_taken_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "_SOUND", {})
    torch.manual_seed(0)
    model, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(4, 8, 12, 13)
    first, again = step(model, x, True)[1], step(model, x, True)[1]
    assert list(weighted._SOUND.values()) == [True]
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    step(model, x[:2], True)
    assert len(weighted._SOUND) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e-30])
def test_some_gradients_say_nothing_of_a_kernel(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "_SOUND", {})

    def back(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(output, wanted, torch.full_like(output, value)))

    found = step(nn.Conv2d(8, 12, 3, padding=1), torch.randn(4, 8, 12, 13), True, back=back)[1]
    assert found[1].isfinite().all() == (value < 1)
    assert not weighted._SOUND


def test_without_the_library_nothing_is_multiplied_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "has_half_products", weighted.has_half_products)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not taken(nn.Linear(48, 20), torch.randn(64, 48))


@given(
    batch=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    extra=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    last=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_usual_convolutions(
    batch: int, channels: Any, kernel: Any, extra: Any, stride: int, padding: int, last: bool
) -> None:
    """Against float64. This is of the library's kernels, which have faults in other convolutions."""
    sizes = tuple(k + more for k, more in zip(kernel, extra, strict=True))
    steps, pads = (tuple(min(stride, k) for k in kernel), tuple(min(padding, (k - 1) // 2) for k in kernel))
    geometry = Geometry(kernel, steps, pads, (1, 1), 1)
    assert weighted.is_usual(geometry, sizes)
    draw = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels[0], *sizes, generator=draw).bfloat16()
    weight = torch.randn(channels[1], channels[0], *kernel, generator=draw)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    output = convolve(x.double(), weight.double(), None, geometry)
    grad = torch.randn(output.shape, generator=draw)
    alone = [False, True, False]
    expected = weighted._stock(grad.bfloat16().double(), x.double(), weight.double(), geometry, alone)[1]
    found = weighted._stock(grad.bfloat16(), x, weight.bfloat16(), geometry, alone)[1]
    assert relative_error(found, expected) < 0.01


def test_asking_the_processor_works_anywhere() -> None:
    assert weighted.has_half_products() in (True, False)
