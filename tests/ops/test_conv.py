"""Convolutions that keep a core, over the settings of torch.nn: exact where they must be, the projection elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceError, measure_saved_bytes
from lightning_lance.ops.conv import Geometry, geometry, low_rank_conv
from lightning_lance.ops.factors import Factors
from lightning_lance.tensors.linalg import contrast_scale
from tests.live_bytes import LiveBytes
from tests.oracles import batch_mode, gradients, orthonormal, projected_input, relative_error

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Case:
    """A convolution as torch.nn takes it, and the shape of an input."""

    shape: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    mode: str
    bias: bool

    def module(self, dtype: torch.dtype = torch.float64) -> Any:
        return MODULES[len(self.kernel)](
            self.shape[1],
            self.out,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.mode,
        ).to(dtype)

    def geometry(self) -> Geometry:
        made = self.module()
        return geometry(made.kernel_size, made.stride, made.padding, made.dilation, made.groups, made.padding_mode)


@st.composite
def cases(draw: st.DrawFn, batches: st.SearchStrategy[int] = st.integers(0, 7)) -> Case:  # noqa: B008
    """Settings that torch.nn accepts."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, dilation = per_axis(1, 4 if axes < 3 else 2), per_axis(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "int", "tuple", "tuple"]))
    stride = (1,) * axes if padding == "same" else per_axis(1, 3)
    if padding == "int":
        padding = draw(st.integers(0, 2))
    elif padding == "tuple":
        padding = per_axis(0, 3)
    # Long enough for the kernel without padding, and for padding by reflection.
    sizes = tuple(
        max(d * (k - 1) + 1, 4) + extra
        for k, d, extra in zip(kernel, dilation, per_axis(0, 3 if axes < 3 else 1), strict=True)
    )
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    if draw(st.booleans()) and groups > 1:
        channels = groups  # depthwise
    shape = (draw(batches), channels, *sizes)
    return Case(shape, out, kernel, stride, padding, dilation, groups, mode, draw(st.booleans()))


def factors_for(shape: tuple[int, ...], ranks: list[int | None], unbiased: bool, dtype: torch.dtype) -> Factors:
    """Random factors with these ranks; ``None`` keeps a mode whole."""
    batch, channel, *spatial = ranks
    order = torch.randperm(shape[0]) if unbiased else None
    return Factors(
        *((None, None) if batch is None else batch_mode(shape[0], batch, order, dtype)),
        contrast_scale(shape[0], batch) if unbiased and batch is not None and batch > 1 else 1.0,
        None if channel is None else orthonormal(shape[1], channel, dtype),
        tuple(
            None if rank is None else orthonormal(size, rank, dtype)
            for size, rank in zip(shape[2:], spatial, strict=True)
        ),
    )


def stock(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """The module's own forward, as a function of input, weight and bias."""
    module = case.module(dtype)
    return lambda x, w, b: module._conv_forward(x, w, b)


def drawn(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input, weight, bias and gradient of the output."""
    module = case.module(dtype)
    input = torch.randn(case.shape, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        output = module(input)
    bias = None if module.bias is None else module.bias.detach()
    return input, module.weight.detach(), bias, torch.randn_like(output)


def compare(case: Case, factors: Factors) -> None:
    """Against plain autograd on the input for everything exact, and on the projected input for the weight."""
    input, weight, bias, grad = drawn(case)
    plain = gradients(stock(case), input, weight, bias, grad)
    made = case.geometry()
    ours = gradients(lambda x, w, b: low_rank_conv(x, w, b, made, factors), input, weight, bias, grad)
    assert torch.equal(ours[0], plain[0])
    assert relative_error(ours[1], plain[1]) < 1e-12
    rebuilt = projected_input(input, factors, 1, 2)
    assert relative_error(ours[2], gradients(stock(case), rebuilt, weight, bias, grad)[2]) < 1e-10
    if bias is not None:
        assert relative_error(ours[3], plain[3]) < 1e-12


@given(case=cases(), seed=st.integers(0, 99))
def test_full_rank_gradients_are_those_of_torch(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    input, weight, bias, grad = drawn(case)
    expected = gradients(stock(case), input, weight, bias, grad)
    whole = Factors(None, None, 1.0, None, (None,) * len(case.kernel))
    ranks = [case.shape[0] or None, *case.shape[1:]]
    square = factors_for(case.shape, ranks, True, torch.float64)._replace(scale=1.0)
    for factors in (whole, square):
        actual = gradients(
            lambda x, w, b, f=factors: low_rank_conv(x, w, b, case.geometry(), f), input, weight, bias, grad
        )
        assert torch.equal(actual[0], expected[0])
        for one, other in zip(actual[1:], expected[1:], strict=True):
            assert relative_error(one, other) < 1e-10


@given(case=cases(st.integers(1, 7)), seed=st.integers(0, 99), unbiased=st.booleans(), data=st.data())
def test_low_rank_weight_gradient_is_that_of_the_projected_input(
    case: Case, seed: int, unbiased: bool, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    ranks = [data.draw(st.none() | st.integers(1, size)) for size in case.shape]
    if unbiased and ranks[0] == 1:
        ranks[0] = None
    compare(case, factors_for(case.shape, ranks, unbiased, torch.float64))


DENSE = Case((8, 6, 7, 5), 4, (3, 2), (2, 1), (1, 2), (1, 2), 1, "zeros", True)
POINTWISE = Case((8, 6, 7, 5), 4, (1, 1), (1, 1), 0, (1, 1), 1, "zeros", True)
STRIDED_POINTWISE = Case((8, 6, 7, 5), 4, (1, 1), (2, 3), 0, (1, 1), 1, "zeros", False)
GROUPED = Case((8, 6, 7, 5), 4, (3, 3), (1, 2), 1, (1, 1), 2, "zeros", False)
DEPTHWISE = Case((8, 6, 7, 5), 12, (3, 3), (1, 1), "same", (1, 1), 6, "zeros", True)
EVEN_SAME = Case((8, 6, 7, 5), 4, (2, 4), (1, 1), "same", (1, 1), 1, "zeros", True)
CIRCULAR = Case((8, 6, 7, 5), 4, (3, 3), (2, 1), (2, 1), (1, 1), 1, "circular", True)
REFLECTED = Case((8, 6, 7, 5), 3, (3, 3), (1, 1), (1, 2), (1, 1), 3, "reflect", False)
REPLICATED = Case((8, 6, 7), 4, (3,), (2,), (2,), (2,), 1, "replicate", True)
VOLUME = Case((8, 4, 5, 4, 6), 2, (2, 3, 1), (1, 2, 1), (0, 1, 0), (2, 1, 1), 2, "zeros", True)
NAMED = {
    "dense": DENSE,
    "pointwise": POINTWISE,
    "strided pointwise": STRIDED_POINTWISE,
    "grouped": GROUPED,
    "depthwise": DEPTHWISE,
    "even same": EVEN_SAME,
    "circular": CIRCULAR,
    "reflected": REFLECTED,
    "replicated": REPLICATED,
    "volume": VOLUME,
}


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_every_combination_of_truncated_modes(name: str, unbiased: bool) -> None:
    case = NAMED[name]
    for truncated in range(2 ** len(case.shape)):
        ranks = [3 if truncated >> mode & 1 else None for mode in range(len(case.shape))]
        compare(case, factors_for(case.shape, ranks, unbiased, torch.float64))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_empty_single_and_odd_batches(name: str, batch: int) -> None:
    case = NAMED[name]
    case = Case(**{**case.__dict__, "shape": (batch, *case.shape[1:])})
    ranks = [2 if batch > 2 else None, 2, *[2] * len(case.kernel)]
    compare(case, factors_for(case.shape, ranks, True, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_the_output_is_bit_for_bit_the_stock_one(name: str, dtype: torch.dtype) -> None:
    case = NAMED[name]
    module = case.module(dtype)
    factors = factors_for(case.shape, [3, 2, *[2] * len(case.kernel)], True, dtype)
    for input in (torch.randn(case.shape).to(dtype), torch.randn(case.shape).to(dtype).transpose(-1, -2).contiguous()):
        if input.shape == torch.Size(case.shape):
            ours = low_rank_conv(input, module.weight, module.bias, case.geometry(), factors)
            assert torch.equal(ours, module(input))


@pytest.mark.parametrize("name", ["pointwise", "dense", "grouped", "circular"])
@pytest.mark.parametrize(("size", "rank"), [(3, 2), (4, 2), (4, 3), (5, 2)])
def test_the_average_over_every_sample_order_is_the_plain_gradient(name: str, size: int, rank: int) -> None:
    case = NAMED[name]
    case = Case(**{**case.__dict__, "shape": (size, *case.shape[1:])})
    input, weight, bias, grad = drawn(case)
    plain = gradients(stock(case), input, weight, bias, grad)[2]
    total = torch.zeros_like(plain)
    worst = 0.0
    for order in permutations(range(size)):
        factors = Factors(
            *batch_mode(size, rank, order),
            contrast_scale(size, rank),
            None,
            (None, None),
        )
        made = case.geometry()
        ours = gradients(lambda x, w, b, g=made, f=factors: low_rank_conv(x, w, b, g, f), input, weight, bias, grad)
        worst = max(worst, relative_error(ours[2], plain))
        total += ours[2]
    assert relative_error(total / math.factorial(size), plain) < 1e-12
    assert worst > 1e-2


@pytest.mark.parametrize("name", ["pointwise", "dense", "depthwise", "circular"])
@pytest.mark.parametrize("truncated", range(8))
def test_kept_bytes_are_the_core_the_factors_and_the_groups(name: str, truncated: int) -> None:
    case = NAMED[name]
    batch, channel, spatial = (3 if truncated >> bit & 1 else None for bit in range(3))
    factors = factors_for(case.shape, [batch, channel, spatial, spatial], True, torch.float32)
    module = case.module(torch.float32)
    input = torch.randn(case.shape, requires_grad=True)
    core = 4 * (batch or 8) * (channel or 6) * (spatial or 7) * (spatial or 5)
    expected = core + (4 * 3 * 3 + 4 * 8 if batch else 0) + (4 * 6 * 3 if channel else 0)
    expected += 4 * (7 + 5) * 3 if spatial else 0
    kept = measure_saved_bytes(
        lambda: low_rank_conv(input * 1.0, module.weight, module.bias, case.geometry(), factors), module
    )
    assert kept.total == expected
    assert {holder.op for holder in kept.holders} == {"LowRankConvBackward"}


def test_a_frozen_convolution_keeps_nothing_and_its_gradients_are_exact() -> None:
    for case in NAMED.values():
        input, weight, bias, grad = drawn(case)
        leaf, offset = input.clone().requires_grad_(), None if bias is None else bias.clone().requires_grad_()
        parameter, made = nn.Parameter(weight, requires_grad=False), case.geometry()

        def run(x: Tensor = leaf, w: Tensor = parameter, b: Any = offset, made: Geometry = made) -> Tensor:
            return low_rank_conv(x * 1.0, w, b, made, None)

        assert measure_saved_bytes(run).total == 0
        run().backward(grad)
        expected = gradients(stock(case), input, weight, bias, grad)
        assert leaf.grad is not None
        assert relative_error(leaf.grad, expected[1]) < 1e-12
        assert parameter.grad is None
        if offset is not None:
            assert offset.grad is not None
            assert relative_error(offset.grad, expected[3]) < 1e-12


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("layout", ["channels last", "strided", "expanded", "grad"])
def test_memory_layouts(name: str, layout: str) -> None:
    case = NAMED[name]
    input, weight, bias, grad = drawn(case)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if layout == "channels last" and last is not None:
        input, weight, grad = (tensor.contiguous(memory_format=last) for tensor in (input, weight, grad))
    elif layout == "strided":
        wide = torch.randn(*case.shape[:-1], 2 * case.shape[-1], dtype=torch.float64)
        input = wide[..., ::2]
    elif layout == "expanded":
        input = input[:1].expand(case.shape)
    else:
        grad = torch.ones((), dtype=torch.float64).expand(grad.shape)
    for ranks in ([3, None, *[None] * len(case.kernel)], [3, 4, *[3] * len(case.kernel)]):
        factors = factors_for(case.shape, ranks, True, torch.float64)
        made = case.geometry()
        ours = gradients_as_given(
            lambda x, w, b, f=factors, g=made: low_rank_conv(x, w, b, g, f), input, weight, bias, grad
        )
        plain = gradients_as_given(stock(case), input, weight, bias, grad)
        assert torch.equal(ours[0], plain[0])
        assert ours[0].stride() == plain[0].stride()
        assert relative_error(ours[1], plain[1]) < 1e-12
        expected = gradients(stock(case), projected_input(input, factors, 1, 2), weight, bias, grad)[2]
        assert relative_error(ours[2], expected) < 1e-10


def gradients_as_given(function: Any, input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """As ``gradients``, on tensors of the strides that were given."""
    leaves = [leaf.detach().requires_grad_() for leaf in (input, weight, bias) if leaf is not None]
    output = function(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_lower_precisions(name: str, dtype: torch.dtype) -> None:
    case = NAMED[name]
    input, weight, bias, grad = drawn(case, dtype)
    factors = factors_for(case.shape, [4, 3, *[3] * len(case.kernel)], True, dtype)
    made = case.geometry()
    ours = gradients(lambda x, w, b: low_rank_conv(x, w, b, made, factors), input, weight, bias, grad)
    assert {found.dtype for found in ours} == {dtype}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    double = [None if tensor is None else tensor.double() for tensor in (weight, bias, grad)]
    rebuilt = gradients(stock(case), projected_input(input, factors, 1, 2), *double)  # type: ignore[arg-type]
    exact = gradients(stock(case), input.double(), *double)  # type: ignore[arg-type]
    assert relative_error(ours[2], rebuilt[2]) < tolerance
    assert relative_error(ours[1], exact[1]) < tolerance
    if bias is not None:
        assert relative_error(ours[3], exact[3]) < tolerance


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(name: str, inside: bool) -> None:
    """Float32 weights under bfloat16 autocast, backward inside or outside of it."""
    case = NAMED[name]
    factors = factors_for(case.shape, [4, 3, *[3] * len(case.kernel)], True, torch.float32)
    input, weight, bias, grad = drawn(case, torch.float32)
    results = []
    for function in (stock(case, torch.float32), lambda x, w, b: low_rank_conv(x, w, b, case.geometry(), factors)):
        leaves = [leaf.clone().requires_grad_() for leaf in (input, weight, bias) if leaf is not None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(leaves[0], leaves[1], leaves[2] if bias is not None else None)
            assert output.dtype == torch.bfloat16
            if inside:
                output.backward(grad.bfloat16())
        if not inside:
            output.backward(grad.bfloat16())
        assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}  # type: ignore[union-attr]
        results.append([output.detach(), *[leaf.grad for leaf in leaves]])
    plain, ours = results
    assert torch.equal(ours[0], plain[0])
    for one, other in zip(ours[1::2], plain[1::2], strict=True):
        assert relative_error(one, other) < 2e-2
    rebuilt = projected_input(input, factors, 1, 2)
    double = None if bias is None else bias.double()
    expected = gradients(stock(case), rebuilt, weight.double(), double, grad.bfloat16().double())[2]
    assert relative_error(ours[2], expected) < 4e-2


def test_second_derivatives_raise_and_are_never_wrong() -> None:
    factors = factors_for(DENSE.shape, [3, None, None, None], True, torch.float64)
    input, weight, bias, _ = drawn(DENSE)
    input.requires_grad_()
    for given_factors in (factors, None):
        weight = weight.detach().requires_grad_(given_factors is not None)
        output = low_rank_conv(torch.tanh(input), weight, bias, DENSE.geometry(), given_factors)
        with pytest.raises(LanceError, match=r"create_graph=True.*restore\(model\)"):
            torch.autograd.grad(output.sum(), input, create_graph=True)


def test_function_transforms_raise() -> None:
    factors = factors_for(DENSE.shape, [3, None, None, None], True, torch.float64)
    input, weight, _, _ = drawn(DENSE)
    made = DENSE.geometry()

    def loss(weight: Tensor) -> Tensor:
        return low_rank_conv(input, weight, None, made, factors).square().sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(weight)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(loss)(weight.expand(2, *weight.shape))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    factors = factors_for(DENSE.shape, [3, 4, 3, None], True, torch.float64)
    input, weight, bias, grad = drawn(DENSE)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return low_rank_conv(torch.tanh(x), w, b, DENSE.geometry(), factors)

    plain = gradients(run, input, weight, bias, grad)
    again = gradients(lambda x, w, b: checkpoint(run, x, w, b, use_reentrant=reentrant), input, weight, bias, grad)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["pointwise", "dense", "circular"])
def test_compiled_in_one_graph(name: str) -> None:
    case = NAMED[name]
    factors = factors_for(case.shape, [3, 4, *[3] * len(case.kernel)], True, torch.float64)
    input, weight, bias, grad = drawn(case)
    made = case.geometry()

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return low_rank_conv(x, w, b, made, factors)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = gradients(run, input, weight, bias, grad)
    for one, other in zip(gradients(compiled, input, weight, bias, grad), expected, strict=True):
        assert relative_error(one, other) < 1e-12


def test_the_gradient_is_computed_from_the_core_without_the_input() -> None:
    """Overwriting the input's memory after the forward pass changes nothing: it is not read again."""
    for case in NAMED.values():
        factors = factors_for(case.shape, [3, *[None] * (len(case.shape) - 1)], True, torch.float64)
        input, weight, bias, grad = drawn(case)
        made = case.geometry()
        expected = gradients(lambda x, w, b, g=made, f=factors: low_rank_conv(x, w, b, g, f), input, weight, bias, grad)
        leaves = [input.requires_grad_(), weight.requires_grad_()]
        output = low_rank_conv(input, weight, bias, case.geometry(), factors)
        with torch.no_grad():
            input.data.fill_(float("nan"))
        for one, other in zip(torch.autograd.grad(output, leaves, grad), expected[1:], strict=False):
            assert torch.equal(one, other)


@given(case=cases())
def test_the_geometry_pads_as_the_module_does(case: Case) -> None:
    made = case.geometry()
    module = case.module()
    with torch.no_grad():
        output = module(torch.zeros(1, *case.shape[1:], dtype=torch.float64))
    sizes = tuple(
        (size + 2 * pad - d * (k - 1) - 1) // s + 1
        for size, pad, d, k, s in zip(
            made.padded(case.shape[2:]), made.padding, made.dilation, made.kernel, made.stride, strict=True
        )
    )
    assert sizes == tuple(output.shape[2:])


@pytest.mark.parametrize("ranks", [[4, None, None, None], [4, 8, 4, 4]], ids=["batch", "all"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_neither_pass_copies_or_rebuilds_the_input(kernel: int, layout: torch.memory_format, ranks: list[Any]) -> None:
    case = Case((64, 16, 16, 16), 16, (kernel,) * 2, (1, 1), kernel // 2, (1, 1), 1, "zeros", True)
    factors = factors_for(case.shape, ranks, True, torch.float32)
    module, made = case.module(torch.float32).to(memory_format=layout), case.geometry()
    input = torch.randn(case.shape).to(memory_format=layout).requires_grad_()
    with LiveBytes(input, *module.parameters()) as forward:
        output = low_rank_conv(input, module.weight, module.bias, made, factors)
    # The output, the core, and what is left on the way to it: a sixteenth of the input for each step.
    assert output.nbytes < forward.peak < output.nbytes + 0.25 * input.nbytes
    grad = torch.randn_like(output)
    with LiveBytes(input, grad, *module.parameters()) as backward:
        output.backward(grad)
    assert input.grad is not None
    assert input.grad.nbytes < backward.peak < input.grad.nbytes + 0.35 * input.nbytes


def test_a_frozen_input_costs_no_input_gradient() -> None:
    case = Case((64, 16, 16, 16), 16, (3, 3), (1, 1), 1, (1, 1), 1, "zeros", True)
    factors = factors_for(case.shape, [4, None, None, None], True, torch.float32)
    module = case.module(torch.float32)
    input = torch.randn(case.shape)
    output = low_rank_conv(input, module.weight, module.bias, case.geometry(), factors)
    grad = torch.randn_like(output)
    with LiveBytes(input, grad, *module.parameters()) as backward:
        output.backward(grad)
    assert backward.peak < 0.35 * input.nbytes
