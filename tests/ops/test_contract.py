"""What all operators that keep a core have in common: exact where they must be, the projection elsewhere."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lance import LanceError, measure_saved_bytes
from lightning_lance.ops.factors import Factors, compress
from tests.live_bytes import LiveBytes
from tests.ops.table import NAMED, Case, Function, Operator, Problem, operators
from tests.oracles import gradients, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def results(function: Function, input: Tensor, trained: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output and gradients, on tensors of the strides that are given."""
    leaves = [leaf.detach().requires_grad_() for leaf in (input, trained, bias) if leaf is not None]
    output = function(leaves[0], leaves[1], None if bias is None else leaves[2])
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def wanted(problem: Problem, factors: Factors) -> list[Tensor]:
    """By plain autograd in float64: on the input for everything exact, on the projected input for the weight."""
    double = problem.to(torch.float64)
    exact = list(gradients(double.stock(), *double.arguments, double.grad))
    exact[2] = gradients(double.stock(), problem.projected(factors), *double.arguments[1:], double.grad)[2]
    return exact


def compare(problem: Problem, factors: Factors, tolerance: float = 1e-10) -> None:
    found = results(problem.ours(factors), *problem.arguments, problem.grad)
    if problem.operator.exact:
        assert torch.equal(found[0], results(problem.stock(), *problem.arguments, problem.grad)[0])
    expected = wanted(problem, factors)
    for name, one, other in zip(("output", "input", "weight", "bias"), found, expected, strict=False):
        assert one.dtype == problem.input.dtype
        assert relative_error(one, other) < tolerance, name
    assert len(found) == len(expected)


def some_ranks(operator: Operator, rank: int = 3) -> list[int | None]:
    """The same rank in every mode."""
    return [min(rank, size) for size in operator.case.modes]


@given(operator=operators(), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_full_rank_gradients_are_those_of_torch(operator: Operator, seed: int) -> None:
    torch.manual_seed(seed)
    case = operator.case
    problem = operator.draw()
    expected = gradients(problem.stock(), *problem.arguments, problem.grad)
    whole = case.factors([None] * len(case.modes))
    square = case.factors([case.shape[0] or None, *case.modes[1:]])._replace(scale=1.0)
    for factors in (whole, square):
        found = results(problem.ours(factors), *problem.arguments, problem.grad)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-10
        with torch.no_grad():
            assert relative_error(problem.ours(factors)(*problem.arguments), expected[0]) < 1e-10


@given(operator=operators(st.integers(1, 7)), seed=st.integers(0, 99), unbiased=st.booleans(), data=st.data())
@settings(max_examples=200)
def test_low_rank_weight_gradients_are_those_of_the_projected_input(
    operator: Operator, seed: int, unbiased: bool, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    ranks = [data.draw(st.none() | st.integers(1, size)) for size in operator.case.modes]
    if unbiased and ranks[0] == 1:
        ranks[0] = None
    compare(operator.draw(), operator.case.factors(ranks, unbiased))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_every_combination_of_truncated_modes(name: str, unbiased: bool) -> None:
    operator = NAMED[name]
    count = len(operator.case.modes)
    for truncated in range(2**count):
        ranks = [3 if truncated >> mode & 1 else None for mode in range(count)]
        compare(operator.draw(), operator.case.factors(ranks, unbiased))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("name", NAMED)
def test_empty_single_and_odd_batches(name: str, batch: int) -> None:
    named = NAMED[name]
    operator = Operator(named.case.with_batch(batch), named.form, named.columns, named.patch)
    ranks = [2 if batch > 2 else None, *some_ranks(operator, 2)[1:]]
    compare(operator.draw(), operator.case.factors(ranks))


@pytest.mark.parametrize(("size", "rank"), [(3, 2), (4, 2), (5, 3)])
@pytest.mark.parametrize(
    "name", ["rows", "tokens", "pointwise", "dense", "grouped", "circular", "steady tokens", "complement few rows"]
)
def test_the_average_over_every_sample_order_is_the_plain_gradient(name: str, size: int, rank: int) -> None:
    named = NAMED[name]
    operator = Operator(named.case.with_batch(size), named.form, named.columns, named.patch)
    problem = operator.draw()
    plain = gradients(problem.stock(), *problem.arguments, problem.grad)[2]
    found: list[Tensor] = []
    unscaled: list[Tensor] = []
    ranks = [rank, *[None] * (len(operator.case.modes) - 1)]
    for order in permutations(range(size)):
        factors = operator.case.factors(ranks, order=order)
        found.append(results(problem.ours(factors), *problem.arguments, problem.grad)[2])
        unscaled.append(results(problem.ours(factors._replace(scale=1.0)), *problem.arguments, problem.grad)[2])
    assert len(found) == math.factorial(size)
    assert relative_error(torch.stack(found).mean(0), plain) < 1e-12
    assert max(relative_error(one, plain) for one in found) > 1e-2  # a single order is an estimate
    assert relative_error(torch.stack(unscaled).mean(0), plain) > 1e-2  # and without the scale it has a bias


@pytest.mark.parametrize("truncated", range(8))
@pytest.mark.parametrize("name", NAMED)
def test_kept_bytes_are_the_core_the_factors_and_the_groups(name: str, truncated: int) -> None:
    operator = NAMED[name]
    size, channels, *sizes = operator.case.modes
    batch, channel, spatial = (3 if truncated >> bit & 1 else None for bit in range(3))
    factors = operator.case.factors([batch, channel, *[spatial] * len(sizes)], dtype=torch.float32)
    problem = operator.draw(torch.float32)
    state = {key: nn.Parameter(getattr(problem, key), key == "trained") for key in ("trained", "basis", "anchor")}
    problem = Problem(**{**vars(problem), **state})
    input, bias = problem.input.requires_grad_(), None if problem.bias is None else nn.Parameter(problem.bias)
    width = channel or channels
    if operator.form == "subspace" and not operator.case.kernel:
        width = problem.basis.shape[2]  # of the input in the subspace
    core = (batch or size) * width * math.prod(spatial or n for n in sizes)
    beside = (3 * 3 + size if batch else 0) + (channels * 3 if channel else 0) + (3 * sum(sizes) if spatial else 0)
    # The result of an identity keeps the input alive, as the layer before would: it must not be kept by ours.
    kept = measure_saved_bytes(lambda: problem.ours(factors)(input * 1.0, problem.trained, bias))
    assert kept.total == 4 * (core + beside)
    assert len({holder.op for holder in kept.holders}) == 1


def test_the_core_is_the_input_itself_where_nothing_is_truncated() -> None:
    input = torch.randn(4, 5)
    assert compress(input, Factors(None, None, 1.0, None, ()), 1, 1) is input


@pytest.mark.parametrize("name", NAMED)
def test_all_that_backward_reads_goes_through_the_hooks(name: str) -> None:
    """With zeros in place of what was saved, the gradients are zero; with what was saved, they do not need the input.

    Overwriting the input's memory after the forward pass changes nothing, where its batch mode is projected.
    """
    operator = NAMED[name]
    problem = operator.draw()
    factors = operator.case.factors([3, *[None] * (len(operator.case.modes) - 1)])
    expected = results(problem.ours(factors), *problem.arguments, problem.grad)
    leaves = [problem.input.clone().requires_grad_(), problem.trained.clone().requires_grad_()]
    output = problem.ours(factors)(leaves[0], leaves[1], problem.bias)
    leaves[0].data.fill_(float("nan"))
    for one, other in zip(torch.autograd.grad(output, leaves, problem.grad), expected[1:], strict=False):
        assert torch.equal(one, other)
    leaves[0].data.normal_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, torch.zeros_like):
        output = problem.ours(factors)(leaves[0], leaves[1], problem.bias)
    assert not any(grad.any() for grad in torch.autograd.grad(output, leaves, problem.grad))


@pytest.mark.parametrize("name", NAMED)
def test_gradients_that_nobody_asks_for_are_not_computed(name: str) -> None:
    operator = NAMED[name]
    problem, factors = operator.draw(), operator.case.factors(some_ranks(operator))
    work = {}
    for asked in ((True, False), (False, True), (True, True)):
        leaves = [
            leaf.clone().requires_grad_(flag)
            for leaf, flag in zip((problem.input, problem.trained), asked, strict=True)
        ]
        output = problem.ours(factors)(leaves[0], leaves[1], problem.bias)
        with FlopCounterMode(display=False) as counter:
            output.backward(problem.grad)
        work[asked] = counter.get_total_flops()
        assert [leaf.grad is not None for leaf in leaves] == list(asked)
    assert min(work.values()) > 0
    assert work[True, True] == work[True, False] + work[False, True]


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided", "expanded", "grad"])
@pytest.mark.parametrize("name", NAMED)
def test_memory_layouts(name: str, layout: str) -> None:
    operator = NAMED[name]
    problem = operator.draw()
    input, trained, grad = problem.input, problem.trained, problem.grad
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if layout == "channels last":
        if last is None:
            pytest.skip("there is no such format for these axes")
        input, grad = input.contiguous(memory_format=last), grad.contiguous(memory_format=last)
        trained = trained.contiguous(memory_format=last) if trained.dim() == input.dim() else trained
    elif layout == "transposed":
        input = input.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        input = torch.randn(*input.shape[:-1], 2 * input.shape[-1], dtype=torch.float64)[..., ::2]
    elif layout == "expanded":
        input = input[:1].expand(input.shape)
    else:
        grad = torch.ones((), dtype=torch.float64).expand(grad.shape)
    problem = Problem(**{**vars(problem), "input": input, "trained": trained, "grad": grad})
    for ranks in ([3, *[None] * (len(operator.case.modes) - 1)], some_ranks(operator)):
        compare(problem, operator.case.factors(ranks))
        if operator.exact and operator.case.kernel:
            stock, ours = problem.stock(), problem.ours(operator.case.factors(ranks))
            assert ours(*problem.arguments).stride() == stock(*problem.arguments).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_lower_precisions(name: str, dtype: torch.dtype) -> None:
    operator = NAMED[name]
    factors = operator.case.factors(some_ranks(operator, 4), dtype=dtype)
    compare(operator.draw(dtype), factors, {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", NAMED)
def test_factors_of_another_dtype_than_the_input(name: str, dtype: torch.dtype, tolerance: float) -> None:
    operator = NAMED[name]
    compare(operator.draw(), operator.case.factors(some_ranks(operator, 4), dtype=dtype), tolerance)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", NAMED)
def test_autocast(name: str, inside: bool) -> None:
    """Float32 weights under autocast: output in bfloat16, gradients in float32; backward inside or outside of it."""
    operator = NAMED[name]
    problem = operator.draw(torch.float32)
    problem = Problem(**{**vars(problem), "grad": problem.grad.bfloat16()})
    factors = operator.case.factors(some_ranks(operator, 4), dtype=torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in problem.arguments if leaf is not None]
    bias = None if problem.bias is None else leaves[2]
    with torch.autocast("cpu", torch.bfloat16):
        output = problem.ours(factors)(leaves[0], leaves[1], bias)
        if inside:
            output.backward(problem.grad)
    if not inside:
        output.backward(problem.grad)
    assert output.dtype == torch.bfloat16
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        if operator.exact:
            assert torch.equal(output, problem.stock()(*problem.arguments))
    for one, other in zip([output.detach(), *[leaf.grad for leaf in leaves]], wanted(problem, factors), strict=True):
        assert relative_error(one, other) < 4e-2


@pytest.mark.parametrize("name", NAMED)
def test_second_derivatives_raise_and_are_never_wrong(name: str) -> None:
    operator = NAMED[name]
    problem = operator.draw()
    leaves = [problem.input.requires_grad_(), problem.trained.requires_grad_()]
    for ranks in (some_ranks(operator), [None] * len(operator.case.modes)):
        output = problem.ours(operator.case.factors(ranks))(torch.tanh(leaves[0]), leaves[1], problem.bias)
        for leaf in leaves:
            with pytest.raises(LanceError, match=r"create_graph=True.*no second derivative.*restore\(model\)"):
                torch.autograd.grad(output.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("name", NAMED)
def test_function_transforms_raise(name: str) -> None:
    operator = NAMED[name]
    problem = operator.draw()
    run = problem.ours(operator.case.factors(some_ranks(operator)))

    def loss(trained: Tensor) -> Tensor:
        return run(problem.input, trained, problem.bias).square().sum()

    several = problem.trained.expand(2, *problem.trained.shape)
    for call in (lambda: torch.func.grad(loss)(problem.trained), lambda: torch.func.vmap(loss)(several)):
        with pytest.raises(RuntimeError, match="setup_context"):
            call()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"setup_context|jvp"):
        torch.func.jvp(loss, (problem.trained,), (problem.trained,))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    operator = NAMED[name]
    problem = operator.draw()
    inner = problem.ours(operator.case.factors(some_ranks(operator)))

    def run(x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return inner(torch.tanh(x), t, b)

    def through(x: Tensor, t: Tensor, b: Tensor | None) -> Any:
        return checkpoint(run, x, t, b, use_reentrant=reentrant)

    plain = gradients(run, *problem.arguments, problem.grad)
    for one, other in zip(gradients(through, *problem.arguments, problem.grad), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["relu_", "add_", "mul_"])
@pytest.mark.parametrize("name", NAMED)
def test_operators_in_place_may_follow(name: str, change: str) -> None:
    """Torch refuses them on a view that a function of ours returns."""
    operator = NAMED[name]
    problem = operator.draw()
    inner = problem.ours(operator.case.factors(some_ranks(operator)))
    arguments = {"relu": (), "add": (2.0,), "mul": (3.0,)}[change[:-1]]

    def run(x: Tensor, t: Tensor, b: Tensor | None, name: str = change) -> Tensor:
        output = inner(x, t, b)
        assert not output._is_view()
        return getattr(output, name)(*arguments)  # type: ignore[no-any-return]

    found = results(run, *problem.arguments, problem.grad)
    expected = results(lambda x, t, b: run(x, t, b, change[:-1]), *problem.arguments, problem.grad)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMED)
def test_an_operator_used_twice_gets_both_gradients(name: str) -> None:
    operator = NAMED[name]
    problem = operator.draw()
    inner = problem.ours(operator.case.factors(some_ranks(operator)))
    once = results(inner, *problem.arguments, problem.grad)
    other = results(inner, 2 * problem.input, *problem.arguments[1:], problem.grad)
    twice = results(lambda x, t, b: inner(x, t, b) + inner(2 * x, t, b), *problem.arguments, problem.grad)
    assert relative_error(twice[1], 3 * once[1]) < 1e-12
    for found, one, two in zip(twice[2:], once[2:], other[2:], strict=True):
        assert relative_error(found, one + two) < 1e-12


@pytest.mark.parametrize(
    "name",
    ["rows", "tokens", "pointwise", "dense", "circular", "complement tokens", "subspace grouped", "steady dense"],
)
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    operator = NAMED[name]
    problem = operator.draw()
    run = problem.ours(operator.case.factors(some_ranks(operator)))
    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = gradients(run, *problem.arguments, problem.grad)
    for one, other in zip(gradients(compiled, *problem.arguments, problem.grad), expected, strict=True):
        assert relative_error(one, other) < 1e-12


LARGE = {
    "linear": Case((64, 32, 64), 64),
    "pointwise": Case((64, 16, 16, 16), 16, (1, 1), (1, 1), 0, (1, 1)),
    "dense": Case((64, 16, 16, 16), 16, (3, 3), (1, 1), 1, (1, 1)),
}


@pytest.mark.parametrize("ranks", [[4, None, None], [4, 8, 4]], ids=["batch", "all"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LARGE)
def test_neither_pass_copies_or_rebuilds_the_input(name: str, layout: Any, ranks: list[int | None]) -> None:
    case = LARGE[name]
    if not case.kernel and layout == torch.channels_last:
        pytest.skip("there is no such format for these axes")
    factors = case.factors([*ranks[:2], *[ranks[2]] * (len(case.modes) - 2)], dtype=torch.float32)
    problem = Operator(case).draw(torch.float32)
    input = problem.input.contiguous(memory_format=layout).requires_grad_()
    weight = problem.trained.contiguous(memory_format=layout if case.kernel else torch.contiguous_format)
    weight.requires_grad_()
    assert problem.bias is not None
    run = problem.ours(factors)
    with LiveBytes(input, weight, problem.bias) as forward:
        output = run(input, weight, problem.bias)
    # The output, the core, and what is left on the way to it: a sixteenth of the input for each step.
    assert output.nbytes < forward.peak < output.nbytes + 0.25 * input.nbytes
    grad = torch.randn_like(output)
    with LiveBytes(input, weight, problem.bias, grad) as backward:
        output.backward(grad)
    assert input.grad is not None
    assert input.grad.nbytes < backward.peak < input.grad.nbytes + 0.35 * input.nbytes
    with LiveBytes(input, weight, problem.bias, grad) as frozen:  # a frozen input costs no input gradient
        run(input.detach(), weight, problem.bias).backward(grad)
    assert frozen.peak < max(0.35 * input.nbytes, output.nbytes + 0.25 * input.nbytes)
