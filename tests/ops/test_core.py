"""Cores in few bits: what they become again, what they weigh, and what they leave of a gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.ops.conv import geometry, low_rank_conv
from lightning_lance.ops.core import Core, keep, rebuild
from lightning_lance.ops.factors import Factors
from lightning_lance.ops.linear import low_rank_linear
from lightning_lance.subspaces.subspace import BatchRule
from lightning_lance.tensors.precision import core_bytes
from tests.oracles import batch_mode, relative_error

GROUP = 64


def rounded_by_hand(core: Tensor, bits: int) -> Tensor:
    """Every 64 elements in memory order, padded with zeros, to the nearest of evenly spaced levels, in float64."""
    order = sorted(range(core.dim()), key=lambda axis: -core.stride(axis))
    flat = core.double().permute(order).reshape(-1).tolist()
    found: list[float] = []
    for start in range(0, len(flat), GROUP):
        group = flat[start : start + GROUP]
        ends = group + [0.0] * (len(group) < GROUP)
        low, high = min(ends), max(ends)
        step = (high - low) / (2**bits - 1)
        found += [low + step * math.floor((value - low) / step + 0.5) if step else low for value in group]
    shape = [core.shape[axis] for axis in order]
    return (
        torch.tensor(found, dtype=torch.float64).view(shape).permute([order.index(axis) for axis in range(core.dim())])
    )


def bytes_of(core: Core) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in core[:3] if tensor is not None)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_a_core_becomes_the_nearest_levels_again(shape: list[int], bits: int, dtype: torch.dtype, data: Any) -> None:
    axes = data.draw(st.permutations(range(len(shape))))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    core = (scale * torch.randn(shape, dtype=dtype)).permute(axes)
    expected, before = rounded_by_hand(core, bits), core.clone()
    kept = keep(core, bits, owned=False)
    assert torch.equal(core, before)
    found = rebuild(kept)
    assert (found.shape, found.stride(), found.dtype) == (core.shape, core.stride(), core.dtype)
    assert bytes_of(kept) == core_bytes(core.numel(), core.element_size(), bits)
    assert bytes_of(kept) <= core.numel() * core.element_size()
    if kept.form is None:
        assert torch.equal(found, before)
        return
    step = (core.double().max() - core.double().min()).item() / (2**bits - 1)
    # A range of 4-bit codes has two bytes a number, of 8-bit codes four.
    precision = {4: 2**-8, 8: 1e-5}[bits]
    error = (found.double() - before.double()).abs().max()
    assert error <= 0.51 * step + precision * before.abs().max()
    if bits == 8:  # a value in the middle between two levels may go to either
        assert ((found.double() - expected).abs() > precision * expected.abs().max()).sum() <= 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(bits: int, dtype: torch.dtype) -> None:
    core = torch.randn(16, 40).to(dtype)
    kept = keep(core, bits)
    assert bytes_of(kept) == core_bytes(640, 2, bits) == 10 * (GROUP * bits // 8 + bits)
    found = rebuild(kept)
    assert found.dtype == dtype
    assert relative_error(found.double(), core.double()) < {4: 0.12, 8: 0.01}[bits]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 1, 8, 1).expand(4, 6, 8, 8),
        lambda: torch.randn(9, 16, 8)[:, ::2],
        lambda: torch.randn(8, 6, 5, 7).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 50).T,
    ],
)
def test_any_layout_in_memory(make: Any, bits: int) -> None:
    core = make()
    kept = keep(core, bits, owned=False)
    assert kept.form is not None
    assert bytes_of(kept) < core.numel() * 4
    assert relative_error(rebuild(kept).double(), core.double()) < {4: 0.12, 8: 0.01}[bits]


def test_small_empty_and_constant_cores() -> None:
    for count in (0, 1, 9):
        core = torch.randn(count)
        assert keep(core, 4).values is core
    for value in (0.0, 3.0, -1e-30, 1e30):
        core = torch.full((256,), value)
        assert torch.allclose(rebuild(keep(core, 4, owned=False)), core, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_what_is_infinite_does_not_become_a_number(value: float, bits: int) -> None:
    core = torch.randn(128)
    core[100] = value
    found = rebuild(keep(core, bits))
    assert found[:64].isfinite().all()
    assert not found[100].isfinite()


def gradient_of(kind: str, bits: int | None, truncated: bool = True, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Weight gradient with cores in some bits, and the exact one."""
    generator = torch.Generator().manual_seed(0)
    shape, weight_shape = {"linear": ((32, 24), (10, 24)), "conv": ((32, 6, 9, 8), (8, 6, 3, 3))}[kind]
    input = torch.randn(shape, generator=generator).relu_()
    weight = torch.randn(weight_shape, generator=generator).requires_grad_()
    spatial = () if kind == "linear" else (None, None)
    batch = batch_mode(32, rank, None, torch.float32) if truncated else (None, None)
    factors = Factors(*batch, 1.0, None, spatial, bits)

    def run(factors: Factors) -> Tensor:
        if kind == "linear":
            output = low_rank_linear(input, weight, None, factors)
        else:
            shape = geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
            output = low_rank_conv(input, weight, None, shape, factors)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad(output, weight, grad)[0]

    before = input.clone()
    found = run(factors)
    assert torch.equal(input, before), "the input is the user's"
    return found, run(factors._replace(bits=None))


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.01), (4, 0.15)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rounding_changes_a_gradient_little(kind: str, bits: int, tolerance: float) -> None:
    found, unrounded = gradient_of(kind, bits)
    assert 0 < relative_error(found, unrounded) < tolerance


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_whole_batch_in_few_bits_leaves_the_input_alone(kind: str) -> None:
    found, exact = gradient_of(kind, 4, truncated=False)
    assert 0 < relative_error(found, exact) < 0.1


def test_the_mean_over_all_orders_of_rounded_cores_is_the_plain_gradient() -> None:
    """The random order moves the rounding errors too, so that they even out in part."""
    size, rank = 6, 3
    input, grad = torch.rand(size, 64, dtype=torch.float64), torch.randn(size, 5, dtype=torch.float64)
    weight = torch.zeros(5, 64, dtype=torch.float64, requires_grad=True)
    rule = BatchRule(rank, True)
    found = []
    for order in itertools.permutations(range(size)):
        factors = Factors(*batch_mode(size, rank, order), rule.contrast_scale(size), None, (), 4)
        found.append(torch.autograd.grad(low_rank_linear(input, weight, None, factors), weight, grad)[0])
    exact = grad.T @ input
    unrounded = []
    for order in itertools.permutations(range(size)):
        factors = Factors(*batch_mode(size, rank, order), rule.contrast_scale(size), None, ())
        unrounded.append(torch.autograd.grad(low_rank_linear(input, weight, None, factors), weight, grad)[0])
    noise = relative_error(found[0], unrounded[0])
    assert relative_error(torch.stack(unrounded).mean(0), exact) < 1e-12
    assert (
        relative_error(torch.stack(found).mean(0), exact) < noise / 2
    )  # the constant column is the same in every order
