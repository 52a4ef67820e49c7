"""Layers that can only change outside of a basis: plain autograd on the written-out weight is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import LanceError, measure_saved_bytes
from lightning_lance.ops.conv import low_rank_conv
from lightning_lance.ops.factors import Factors
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.linear import low_rank_linear
from lightning_lance.ops.reserved import Form, Parts, effective_weight, reserved_conv, reserved_linear
from lightning_lance.tensors.linalg import contrast_scale
from tests.ops.test_conv import Case, cases
from tests.oracles import batch_mode, orthonormal, relative_error

CPU = torch.device("cpu")


def make(weight: Tensor, side: FeatureSide, columns: int, complement: bool) -> tuple[Parts, Form, Tensor]:
    """Random parts, and the weight that they stand for as a function of the trained one, for autograd."""
    columns = min(max(columns, 0 if complement else 1), side.width)
    basis = torch.stack([orthonormal(side.width, columns, weight.dtype) for _ in range(side.groups)])
    form = Form(side, weight.shape, complement)
    rows = side.rows(weight)
    if complement:
        anchor = rows @ basis
        trained = (weight + torch.randn_like(weight)).requires_grad_()
        moved = side.rows(trained)
        written = side.weight(moved - moved @ basis @ basis.mT + rows @ basis @ basis.mT, weight.shape)
        return Parts(trained, basis, anchor), form, written
    trained = torch.randn(rows.shape[0] * rows.shape[1], columns, dtype=weight.dtype).requires_grad_()
    written = side.weight(rows + trained.view(*rows.shape[:2], columns) @ basis.mT, weight.shape)
    return Parts(trained, basis, weight), form, written


def agree(output: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    assert relative_error(output.detach(), expected.detach()) < tolerance
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, leaves, grad)
    plain = torch.autograd.grad(expected, leaves, grad)
    for got, wanted in zip(ours, plain, strict=True):
        assert relative_error(got, wanted) < tolerance


def unbiased(batch: int, columns: int, spatial: tuple[Tensor | None, ...], dtype: torch.dtype) -> Factors:
    found = batch_mode(batch, columns, torch.randperm(batch), dtype)
    return Factors(*found, contrast_scale(batch, columns), None, spatial)


@given(
    st.lists(st.integers(1, 6), max_size=2),
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_linear_is_that_of_the_written_out_weight(
    tokens: list[int], batch: int, width: int, out: int, columns: int, complement: bool, bias: bool
) -> None:
    # Few rows and many: both ways to compute it come up.
    weight = torch.randn(out, width, dtype=torch.float64)
    parts, form, written = make(weight, FeatureSide(1, width), columns, complement)
    input = torch.randn(batch, *tokens, width, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(out, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [input, parts.trained, *([offset] if offset is not None else [])]
    agree(reserved_linear(input, parts, offset, form, None), F.linear(input, written, offset), leaves)
    with torch.no_grad():
        plain = F.linear(input, written, offset)
        assert relative_error(reserved_linear(input, parts, offset, form, None), plain) < 1e-10
    assert relative_error(effective_weight(parts, form).detach(), written.detach()) < 1e-12


@given(cases(st.integers(0, 4)), st.integers(0, 3), st.booleans(), st.booleans())
def test_convolution_is_that_of_the_written_out_weight(case: Case, columns: int, patch: bool, complement: bool) -> None:
    module = case.module()
    weight = module.weight.detach()
    side = FeatureSide(case.groups, case.shape[1] // case.groups, case.kernel, patch)
    parts, form, written = make(weight, side, columns, complement)
    input = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    leaves = [input, parts.trained, *([module.bias] if case.bias else [])]
    geometry = case.geometry()
    expected = module._conv_forward(input, written, module.bias)
    agree(reserved_conv(input, parts, module.bias, geometry, form, None), expected, leaves)
    with torch.no_grad():
        assert relative_error(reserved_conv(input, parts, module.bias, geometry, form, None), expected) < 1e-10


def make_steady(weight: Tensor, side: FeatureSide, columns: int) -> tuple[Parts, Form, Tensor]:
    """As :func:`make`, where the trained weight has not moved inside of the basis."""
    parts, form, written = make(weight, side, columns, True)
    trained = written.detach().clone().requires_grad_()
    moved, basis = side.rows(trained), parts.basis
    fixed = (moved @ basis @ basis.mT).detach()
    written = side.weight(moved - moved @ basis @ basis.mT + fixed, weight.shape)
    return parts._replace(trained=trained), form._replace(steady=True), written


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_a_steady_linear_map_is_the_stock_one_with_a_projected_gradient(
    batch: int, width: int, out: int, columns: int
) -> None:
    weight = torch.randn(out, width, dtype=torch.float64)
    parts, form, written = make_steady(weight, FeatureSide(1, width), columns)
    input = torch.randn(batch, width, dtype=torch.float64, requires_grad=True)
    output = reserved_linear(input, parts, None, form, None)
    assert torch.equal(output, F.linear(input, parts.trained))
    agree(output, F.linear(input, written), [input, parts.trained])


@given(cases(st.integers(1, 4)), st.integers(0, 3), st.booleans())
def test_a_steady_convolution_is_the_stock_one_with_a_projected_gradient(case: Case, columns: int, patch: bool) -> None:
    module = case.module()
    side = FeatureSide(case.groups, case.shape[1] // case.groups, case.kernel, patch)
    parts, form, written = make_steady(module.weight.detach(), side, columns)
    input = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    output = reserved_conv(input, parts, module.bias, case.geometry(), form, None)
    assert torch.equal(output, module._conv_forward(input, parts.trained, module.bias))
    agree(output, module._conv_forward(input, written, module.bias), [input, parts.trained])


@pytest.mark.parametrize("rows", [4, 400])
def test_a_steady_gradient_has_no_part_in_the_basis_under_autocast(rows: int) -> None:
    parts, form, _ = make_steady(torch.randn(8, 12), FeatureSide(1, 12), 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = reserved_linear(torch.randn(rows, 12), parts, None, form, None)
    output.float().square().sum().backward()
    grad = parts.trained.grad
    assert grad is not None
    assert output.dtype == torch.bfloat16
    assert float((grad @ parts.basis[0]).norm()) < 1e-6 * float(grad.norm())


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("rows", [8, 400])
@pytest.mark.parametrize("channel", [None, 5])
@pytest.mark.parametrize("token", [None, 3])
def test_a_compressed_linear_gradient_is_the_projected_one(
    complement: bool, rows: int, channel: int | None, token: int | None
) -> None:
    # What the compressed layer of the first experience estimates, projected: the same core, whatever is computed first.
    weight = torch.randn(10, 12, dtype=torch.float64)
    parts, form, written = make(weight, FeatureSide(1, 12), 4, complement)
    factors = unbiased(rows, 4, (None if token is None else orthonormal(6, token),), torch.float64)
    factors = factors._replace(channel=None if channel is None else orthonormal(12, channel))
    input = torch.randn(rows, 6, 12, dtype=torch.float64, requires_grad=True)
    leaves = [input, parts.trained]
    agree(
        reserved_linear(input, parts, None, form, factors), low_rank_linear(input, written, None, factors), leaves, 1e-9
    )


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_compressed_convolution_gradient_is_the_projected_one(complement: bool, groups: int) -> None:
    case = Case((12, 4, 7, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1), groups, "zeros", True)
    weight = case.module().weight.detach()
    parts, form, written = make(weight, FeatureSide(groups, 4 // groups, (3, 3)), 7, complement)
    factors = unbiased(12, 4, (orthonormal(7, 5), None), torch.float64)
    input = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    agree(
        reserved_conv(input, parts, None, case.geometry(), form, factors),
        low_rank_conv(input, written, None, case.geometry(), factors),
        [input, parts.trained],
        1e-9,
    )


@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from(["sgd", "adam"]), st.booleans())
def test_no_gradient_step_moves_an_output_inside_of_the_basis(
    rows: int, columns: int, kind: str, complement: bool
) -> None:
    weight = torch.randn(6, 9)
    parts, form, _ = make(weight, FeatureSide(1, 9), columns, complement)
    outside = orthonormal(9, 9, torch.float32)
    if not complement:  # the subspace form is given a basis outside of the protected one
        parts = Parts(parts.trained, outside[None, :, :columns], weight)
        protected = outside[:, columns:]
    else:
        protected = parts.basis[0]
    trained = parts.trained.detach().clone().requires_grad_()
    with torch.no_grad():
        before = effective_weight(parts._replace(trained=trained), form)
    optimizer: Any = torch.optim.SGD([trained], 0.1, momentum=0.9, weight_decay=0.1)
    if kind == "adam":
        optimizer = torch.optim.AdamW([trained], 0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        reserved_linear(torch.randn(rows, 9), parts._replace(trained=trained), None, form, None).sum().backward()
        optimizer.step()
    with torch.no_grad():
        change = effective_weight(parts._replace(trained=trained), form) - before
    assert float(change.norm()) > 0.0
    assert float((change @ protected).norm()) < 1e-5 * float(change.norm())


@pytest.mark.parametrize("rows", [32, 4096])
@pytest.mark.parametrize("complement", [True, False])
def test_only_the_core_is_kept(rows: int, complement: bool) -> None:
    weight = nn.Parameter(torch.randn(128, 256))
    parts, form, _ = make(weight.detach(), FeatureSide(1, 256), 16, complement)
    # State of the layer, as it is in training: no activation.
    parts = Parts(*(nn.Parameter(tensor.detach(), requires_grad=index == 0) for index, tensor in enumerate(parts[:3])))
    factors = unbiased(rows, 4, (), torch.float32)
    input = torch.randn(rows, 256, requires_grad=True)
    kept = measure_saved_bytes(lambda: reserved_linear(input, parts, None, form, factors).sum())
    core = 4 * (256 if complement else 16) * 4
    assert kept.total == core + 4 * rows + 4 * 4 * 4  # core, groups, rotation


@pytest.mark.parametrize("complement", [True, False])
def test_a_convolution_keeps_the_core_and_no_written_out_weight(complement: bool) -> None:
    case = Case((16, 8, 10, 10), 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros", False)
    weight = case.module(torch.float32).weight.detach()
    parts, form, _ = make(weight, FeatureSide(1, 8, (3, 3)), 16, complement)
    parts = Parts(*(nn.Parameter(tensor.detach(), requires_grad=index == 0) for index, tensor in enumerate(parts[:3])))
    factors = unbiased(16, 4, (None, None), torch.float32)
    input = torch.randn(case.shape, requires_grad=True)
    kept = measure_saved_bytes(lambda: reserved_conv(input, parts, None, case.geometry(), form, factors).sum())
    assert kept.total == 4 * 8 * 10 * 10 * 4 + 4 * 16 + 4 * 4 * 4


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("rows", [4, 400])
def test_under_autocast_the_weight_is_written_out_in_full_precision(complement: bool, rows: int) -> None:
    weight = torch.randn(8, 12)
    parts, form, written = make(weight, FeatureSide(1, 12), 5, complement)
    input = torch.randn(rows, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = reserved_linear(input, parts, None, form, None)
    # In another block: up to torch 2.6, a leaf that was cast without a gradient stays so until the block ends.
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(input, written)
        assert (
            torch.equal(effective_weight(parts, form).bfloat16(), written.detach().bfloat16())
            or relative_error(effective_weight(parts, form), written.detach()) < 1e-6
        )
    assert output.dtype == torch.bfloat16
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, [input, parts.trained], grad)
    plain = torch.autograd.grad(expected, [input, parts.trained], grad)
    for got, wanted in zip(ours, plain, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 0.03


def test_bfloat16_weights_keep_a_float32_basis() -> None:
    weight = torch.randn(8, 12, dtype=torch.float64)
    exact, form, written = make(weight, FeatureSide(1, 12), 5, True)
    parts = Parts(exact.trained.detach().bfloat16().requires_grad_(), exact.basis.float(), exact.anchor.float())
    input = torch.randn(4, 12, dtype=torch.bfloat16, requires_grad=True)
    output = reserved_linear(input, parts, None, form, None)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert parts.trained.grad is not None
    assert parts.trained.grad.dtype == torch.bfloat16
    assert relative_error(effective_weight(parts, form).detach(), written.detach()) < 0.01


def test_saved_tensor_hooks_see_everything() -> None:
    seen: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    parts, form, _ = make(torch.randn(6, 9), FeatureSide(1, 9), 2, True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reserved_linear(torch.randn(5, 9), parts, None, form, None).sum()
    assert sorted(seen) == sorted([(5, 9), (6, 9), (1, 9, 2), (1, 6, 2)])


@pytest.mark.parametrize("complement", [True, False])
def test_second_derivatives_are_refused(complement: bool) -> None:
    input = torch.randn(6, 8, requires_grad=True)
    basis = torch.linalg.qr(torch.randn(8, 3)).Q.unsqueeze(0)
    weight = torch.randn(5, 8)
    trained = (weight.clone() if complement else torch.zeros(5, 3)).requires_grad_()
    form = Form(FeatureSide(1, 8), weight.shape, complement)
    anchor = (weight @ basis[0]).unsqueeze(0) if complement else weight
    output = reserved_linear(input, Parts(trained, basis, anchor), None, form, None)
    with pytest.raises(LanceError, match="no second derivative"):
        torch.autograd.grad(output.square().sum(), trained, create_graph=True)
