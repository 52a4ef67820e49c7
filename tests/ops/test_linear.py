"""The linear map that keeps a core: exact where it must be, the hand-written projection elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceError, measure_saved_bytes
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.linear import low_rank_linear
from lightning_lance.tensors.linalg import contrast_scale
from tests.live_bytes import LiveBytes
from tests.oracles import batch_mode, gradients, orthonormal, projected_input, relative_error

CPU = torch.device("cpu")
WHOLE = Factors(None, None, 1.0, None, ())


def factors_for(
    shape: tuple[int, ...],
    batch: int | None,
    channel: int | None,
    tokens: list[int | None],
    unbiased: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Factors:
    """Random factors with these ranks; ``None`` keeps a mode whole."""
    order = torch.randperm(shape[0]) if unbiased else None
    return Factors(
        *((None, None) if batch is None else batch_mode(shape[0], batch, order, dtype)),
        contrast_scale(shape[0], batch) if unbiased and batch is not None and batch > 1 else 1.0,
        None if channel is None else orthonormal(shape[-1], channel, dtype),
        tuple(
            None if rank is None else orthonormal(size, rank, dtype)
            for size, rank in zip(shape[1:-1], tokens, strict=True)
        ),
    )


def compare(input: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, tolerance: float = 1e-10) -> None:
    """Against plain autograd on the input for everything exact, and on the projected input for the weight."""
    grad = torch.randn(*input.shape[:-1], weight.shape[0], dtype=input.dtype)
    plain = gradients(F.linear, input, weight, bias, grad)
    ours = gradients(lambda x, w, b: low_rank_linear(x, w, b, factors), input, weight, bias, grad)
    assert torch.equal(ours[0], plain[0])
    assert relative_error(ours[1], plain[1]) < 1e-12
    rebuilt = projected_input(input, factors, input.dim() - 1, 1)
    expected = gradients(F.linear, rebuilt, weight, bias, grad)[2]
    assert relative_error(ours[2], expected) < tolerance
    if bias is not None:
        assert relative_error(ours[3], plain[3]) < 1e-12


shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@given(shape=shapes, out=st.integers(1, 5), bias=st.booleans(), data=st.data())
def test_full_rank_gradients_are_those_of_torch(shape: list[int], out: int, bias: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shape[0] = data.draw(st.integers(0, 7))
    input = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(out, shape[-1], dtype=torch.float64)
    offset = torch.randn(out, dtype=torch.float64) if bias else None
    grad = torch.randn(*shape[:-1], out, dtype=torch.float64)
    expected = gradients(F.linear, input, weight, offset, grad)
    whole = Factors(None, None, 1.0, None, (None,) * (len(shape) - 2))
    square = factors_for(tuple(shape), shape[0] or None, shape[-1], list(shape[1:-1]))._replace(scale=1.0)
    for factors in (whole, square):
        actual = gradients(lambda x, w, b, f=factors: low_rank_linear(x, w, b, f), input, weight, offset, grad)
        assert torch.equal(actual[0], expected[0])
        for one, other in zip(actual[1:], expected[1:], strict=True):
            assert relative_error(one, other) < 1e-10


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=2, max_size=5), unbiased=st.booleans())
def test_low_rank_weight_gradient_is_that_of_the_projected_input(
    data: st.DataObject, shape: list[int], unbiased: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ranks = [data.draw(st.none() | st.integers(1, size)) for size in shape]
    if unbiased and ranks[0] == 1:
        ranks[0] = None
    factors = factors_for(tuple(shape), ranks[0], ranks[-1], ranks[1:-1], unbiased)
    bias = torch.randn(4, dtype=torch.float64) if data.draw(st.booleans()) else None
    input = torch.randn(shape, dtype=torch.float64)
    compare(input, torch.randn(4, shape[-1], dtype=torch.float64), bias, factors)


@pytest.mark.parametrize("truncated", range(16))
@pytest.mark.parametrize("unbiased", [True, False])
def test_every_combination_of_truncated_modes(truncated: int, unbiased: bool) -> None:
    shape = (8, 5, 4, 6)
    ranks: list[int | None] = [3 if truncated >> mode & 1 else None for mode in range(4)]
    factors = factors_for(shape, ranks[0], ranks[3], ranks[1:3], unbiased)
    compare(
        torch.randn(shape, dtype=torch.float64),
        torch.randn(7, 6, dtype=torch.float64),
        torch.randn(7, dtype=torch.float64),
        factors,
    )


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (3, 2), (4, 2), (4, 3), (5, 2), (5, 3)])
@pytest.mark.parametrize("tokens", [(), (3,)])
def test_the_average_over_every_sample_order_is_the_plain_gradient(
    size: int, rank: int, tokens: tuple[int, ...]
) -> None:
    shape = (size, *tokens, 4)
    input, weight = torch.randn(shape, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    grad = torch.randn(size, *tokens, 3, dtype=torch.float64)
    plain = gradients(F.linear, input, weight, None, grad)[2]
    total = torch.zeros_like(plain)
    orders = list(permutations(range(size)))
    worst = 0.0
    for order in orders:
        factors = Factors(
            *batch_mode(size, rank, order),
            contrast_scale(size, rank),
            None,
            (None,) * len(tokens),
        )
        found = gradients(lambda x, w, b, f=factors: low_rank_linear(x, w, b, f), input, weight, None, grad)[2]
        worst = max(worst, relative_error(found, plain))
        total += found
    assert relative_error(total / len(orders), plain) < 1e-12
    assert rank == size or worst > 1e-2  # a single order is an estimate


def test_without_the_scale_the_average_is_not_the_plain_gradient() -> None:
    input, weight = torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    grad = torch.randn(4, 3, dtype=torch.float64)
    plain = gradients(F.linear, input, weight, None, grad)[2]
    total = torch.zeros_like(plain)
    for order in permutations(range(4)):
        factors = Factors(*batch_mode(4, 2, order), 1.0, None, ())
        total += gradients(lambda x, w, b, f=factors: low_rank_linear(x, w, b, f), input, weight, None, grad)[2]
    assert relative_error(total / 24, plain) > 0.05


@pytest.mark.parametrize("truncated", range(8))
@pytest.mark.parametrize("bias", [True, False])
def test_kept_bytes_are_the_core_the_factors_and_the_groups(truncated: int, bias: bool) -> None:
    shape = (16, 6, 10)
    ranks: list[int | None] = [5 if truncated >> mode & 1 else None for mode in range(3)]
    factors = factors_for(shape, ranks[0], ranks[2], ranks[1:2], dtype=torch.float32)
    input = torch.randn(shape, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(7, 10))
    offset = torch.nn.Parameter(torch.randn(7)) if bias else None
    core = 4 * (5 if ranks[0] else 16) * (5 if ranks[1] else 6) * (5 if ranks[2] else 10)
    expected = core
    if ranks[0]:
        expected += 4 * 5 * 5 + 4 * 16  # rotation and groups
    if ranks[1]:
        expected += 4 * 6 * 5
    if ranks[2]:
        expected += 4 * 10 * 5
    # The result of an identity keeps the input alive, as the layer before would: it must not be kept by ours.
    kept = measure_saved_bytes(lambda: low_rank_linear(input * 1.0, weight, offset, factors))
    assert kept.total == expected
    assert {holder.op for holder in kept.holders} == {"LowRankLinearBackward"}


def test_layers_share_the_rotation() -> None:
    weight = torch.nn.Parameter(torch.randn(10, 10))

    def run() -> Tensor:
        value = torch.randn(16, 10)
        for _ in range(3):
            value = low_rank_linear(value, weight, None, factors_for((16, 10), 4, None, [], dtype=torch.float32))
        return value

    assert measure_saved_bytes(run).total == 3 * (4 * 4 * 10 + 4 * 16) + 4 * 4 * 4


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    factors = factors_for((6, 5), 3, 2, [])
    grad = torch.ones(6, 4, dtype=torch.float64)
    input = torch.randn(6, 5, dtype=torch.float64)
    weight = torch.randn(4, 5, dtype=torch.float64)
    for leaf in (input, weight):
        leaf.requires_grad_()
        with profiled_matrix_products() as shapes:
            low_rank_linear(input, weight, None, factors).backward(grad)
        leaf.requires_grad_(False)
        # The input gradient is (6, 4) x (4, 5); the weight gradient (4, 3) x (3, 2).
        assert ((6, 5) in shapes) == (leaf is input)
        assert ((4, 2) in shapes) == (leaf is weight)


@contextmanager
def profiled_matrix_products() -> Iterator[set[tuple[int, ...]]]:
    """Shapes of the matrix products that backward makes."""
    shapes: set[tuple[int, ...]] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                shapes.add(tuple(result.shape))
            return result

    with Products():
        yield shapes


@pytest.mark.parametrize(
    "layout",
    ["transposed", "strided", "expanded", "sliced"],
)
def test_inputs_and_gradients_that_are_not_contiguous(layout: str) -> None:
    base = torch.randn(8, 6, 10, dtype=torch.float64)
    input = {
        "transposed": base.transpose(0, 2).contiguous().transpose(0, 2),
        "strided": torch.randn(16, 6, 20, dtype=torch.float64)[::2, :, ::2],
        "expanded": base[:1].expand(8, 6, 10),
        "sliced": torch.randn(9, 8, 12, dtype=torch.float64)[1:, 1:7, 2:],
    }[layout]
    assert not input.is_contiguous()
    factors = factors_for((8, 6, 10), 3, 4, [2])
    weight = torch.randn(7, 10, dtype=torch.float64)
    compare(input, weight, None, factors)
    # and a gradient with other strides, or with none at all, as the one of sum()
    for grad in (torch.randn(7, 6, 8, dtype=torch.float64).permute(2, 1, 0), torch.ones((), dtype=torch.float64)):
        expanded = grad.expand(8, 6, 7)
        ours = gradients(lambda x, w, b: low_rank_linear(x, w, b, factors), input, weight, None, expanded)
        rebuilt = projected_input(input, factors, 2, 1)
        assert relative_error(ours[2], gradients(F.linear, rebuilt, weight, None, expanded)[2]) < 1e-10
        assert relative_error(ours[1], gradients(F.linear, input, weight, None, expanded)[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    shape = (8, 6, 10)
    factors = factors_for(shape, 4, 5, [3], dtype=dtype)
    input, weight, bias = torch.randn(shape).to(dtype), torch.randn(7, 10).to(dtype), torch.randn(7).to(dtype)
    grad = torch.randn(8, 6, 7).to(dtype)
    plain = gradients(F.linear, input, weight, bias, grad)
    ours = gradients(lambda x, w, b: low_rank_linear(x, w, b, factors), input, weight, bias, grad)
    assert [found.dtype for found in ours] == [dtype] * 4
    assert torch.equal(ours[0], plain[0])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    rebuilt = projected_input(input, factors, 2, 1)
    expected = gradients(F.linear, rebuilt, weight.double(), None, grad.double())[2]
    assert relative_error(ours[2], expected) < tolerance
    for one, other in ((ours[1], plain[1]), (ours[3], plain[3])):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize(
    ("factor_dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_factors_of_another_dtype_than_the_input(factor_dtype: torch.dtype, tolerance: float) -> None:
    factors = factors_for((8, 6, 10), 4, 5, [3], dtype=factor_dtype)
    input, weight = torch.randn(8, 6, 10, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    compare(input, weight, None, factors, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    """Float32 weights under autocast: output in the low precision, gradients in float32; backward inside or outside."""
    factors = factors_for((8, 6, 10), 4, 5, [3], dtype=torch.float32)
    leaves = [torch.randn(8, 6, 10), torch.randn(7, 10), torch.randn(7)]
    results: list[Any] = []
    for function in (F.linear, lambda x, w, b: low_rank_linear(x, w, b, factors)):
        input, weight, bias = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", dtype=dtype):
            output = function(input, weight, bias)
            assert output.dtype == dtype
            if inside:
                output.float().square().mean().backward()
        if not inside:
            output.float().square().mean().backward()
        assert [leaf.grad.dtype for leaf in (input, weight, bias)] == [torch.float32] * 3  # type: ignore[union-attr]
        results.append((output, input.grad, weight.grad, bias.grad))
    stock, ours = results
    assert torch.equal(ours[0], stock[0])
    assert relative_error(ours[1], stock[1]) < 2e-2
    assert relative_error(ours[3], stock[3]) < 2e-2
    grad = (2 * ours[0].detach().double() / ours[0].numel()).double()
    rebuilt = projected_input(leaves[0], factors, 2, 1)
    expected = gradients(F.linear, rebuilt, leaves[1].double(), None, grad)[2]
    assert relative_error(ours[2], expected) < 2e-2


def test_second_derivatives_raise_and_are_never_wrong() -> None:
    factors = factors_for((8, 5), 3, None, [])
    input = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    first = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    last = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = low_rank_linear(torch.tanh(F.linear(input, first)), last, None, factors).sum()
    with pytest.raises(LanceError, match=r"create_graph=True.*restore\(model\)"):
        torch.autograd.grad(loss, input, create_graph=True)


def test_function_transforms_raise() -> None:
    factors = factors_for((8, 5), 3, None, [])
    input, weight = torch.randn(8, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return low_rank_linear(input, weight, None, factors).square().sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(weight)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(loss)(weight.expand(2, 4, 5))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"setup_context|jvp"):
        torch.func.jvp(loss, (weight,), (weight,))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    factors = factors_for((8, 5), 3, 4, [])
    leaves = [torch.randn(8, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)]
    grad = torch.randn(8, 4, dtype=torch.float64)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return low_rank_linear(torch.tanh(x), w, b, factors)

    plain = gradients(run, leaves[0], leaves[1], None, grad)
    again = gradients(lambda x, w, b: checkpoint(run, x, w, b, use_reentrant=reentrant), *leaves, None, grad)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


def test_compiled_in_one_graph() -> None:
    factors = factors_for((8, 6, 10), 4, 5, [3])
    leaves = [torch.randn(8, 6, 10), torch.randn(7, 10), torch.randn(7)]
    leaves = [leaf.double() for leaf in leaves]
    grad = torch.randn(8, 6, 7, dtype=torch.float64)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return low_rank_linear(x, w, b, factors)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, *leaves, grad), gradients(run, *leaves, grad), strict=True):
        assert relative_error(one, other) < 1e-12


def test_the_gradient_is_computed_from_the_core_without_the_input() -> None:
    """Overwriting the input's memory after the forward pass changes nothing: it is not read again."""
    factors = factors_for((8, 5), 3, 4, [])
    input = torch.randn(8, 5, dtype=torch.float64)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected = gradients(
        lambda x, w, b: low_rank_linear(x, w, b, factors), input, weight, None, torch.ones(8, 4).double()
    )
    output = low_rank_linear(input, weight, None, factors)
    input.fill_(float("nan"))
    (found,) = torch.autograd.grad(output, weight, torch.ones_like(output))
    assert torch.equal(found, expected[2])


def test_the_core_is_the_input_itself_where_nothing_is_truncated() -> None:
    input = torch.randn(4, 5)
    assert compress(input, WHOLE, 1, 1) is input


@pytest.mark.parametrize("ranks", [(4, None, [None]), (4, 16, [4])], ids=["batch", "all"])
def test_neither_pass_copies_or_rebuilds_the_input(ranks: tuple[Any, Any, Any]) -> None:
    shape = (64, 32, 64)
    factors = factors_for(shape, ranks[0], ranks[1], ranks[2], dtype=torch.float32)
    input, weight = torch.randn(shape, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    with LiveBytes(input, weight) as forward:
        output = low_rank_linear(input, weight, None, factors)
    assert output.nbytes < forward.peak < output.nbytes + 0.25 * input.nbytes
    grad = torch.randn_like(output)
    with LiveBytes(input, weight, grad) as backward:
        output.backward(grad)
    assert input.grad is not None
    assert input.grad.nbytes < backward.peak < input.grad.nbytes + 0.25 * input.nbytes
