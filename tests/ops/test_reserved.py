"""Reserved weights: what no gradient step changes, and the precision that they are written out in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.reserved import Form, Parts, drop, effective_weight, outside, overlap_of, reserved_linear
from tests.ops.table import Case, Operator, Problem, operators
from tests.oracles import orthonormal, relative_error


def parts_of(problem: Problem) -> tuple[Parts, Form]:
    form, case = problem.operator.form, problem.operator.case
    static = Form(case.side(problem.operator.patch), problem.weight_shape, form != "subspace", form == "steady")
    return Parts(problem.trained, problem.basis, problem.anchor), static


@given(operators(st.just(2)).filter(lambda operator: operator.form != "plain"))
def test_the_weight_is_the_written_out_one(operator: Operator) -> None:
    problem = operator.draw()
    assert relative_error(effective_weight(*parts_of(problem)), problem.written(problem.trained)) < 1e-12


@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from(["sgd", "adam"]), st.booleans())
def test_no_gradient_step_moves_an_output_inside_of_the_basis(
    rows: int, columns: int, kind: str, complement: bool
) -> None:
    weight, directions = torch.randn(6, 9), orthonormal(9, 9, torch.float32)
    basis, others = directions[:, :columns], directions[:, columns:]
    form = Form(FeatureSide(1, 9), weight.shape, complement)
    trained = (weight.clone() if complement else torch.zeros(6, columns)).requires_grad_()
    # The subspace form is given a basis outside of the protected one.
    parts = Parts(trained, basis[None], (weight @ basis)[None] if complement else weight)
    protected = basis if complement else others
    with torch.no_grad():
        before = effective_weight(parts, form)
    optimizer: Any = torch.optim.SGD([trained], 0.1, momentum=0.9, weight_decay=0.1)
    if kind == "adam":
        optimizer = torch.optim.AdamW([trained], 0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        reserved_linear(torch.randn(rows, 9), parts, None, form, None).sum().backward()
        optimizer.step()
    with torch.no_grad():
        change = effective_weight(parts, form) - before
    assert float(change.norm()) > 0.0
    assert float((change @ protected).norm()) < 1e-5 * float(change.norm())


@pytest.mark.parametrize("rows", [4, 400])  # a product with the inputs, and one with the weight
def test_damped_columns_shorten_steps_and_leave_what_is_protected(rows: int) -> None:
    """Against the passes written out, with columns that are orthonormal but for rounding."""
    width, protected, damped = 30, 5, 4
    exact = orthonormal(width, protected + damped)
    basis = (exact + 1e-3 * torch.randn_like(exact))[None]
    mask = torch.cat([torch.ones(protected), torch.tensor([0.9, 0.5, 0.1, 0.0])]).double()[None]
    mask[0, 2] = 0.0  # an open column
    weight = torch.randn(6, width, dtype=torch.float64)
    form = Form(FeatureSide(1, width), weight.shape, complement=True, passes=6, damped=damped)
    anchor = (weight @ basis[0])[None]
    trained = (weight + torch.randn_like(weight)).requires_grad_()
    found = effective_weight(Parts(trained, basis, anchor, mask), form)

    expected = trained
    for number in range(6):
        closed = mask[0] if number == 0 else torch.cat([mask[0, :protected], torch.zeros(damped)])
        expected = expected - ((expected @ basis[0] - anchor[0]) * closed) @ basis[0].T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    closed = basis[0][:, [0, 1, 3, 4]]
    assert float(((found - weight) @ closed).detach().abs().max()) < 1e-12
    lengths = (found - weight).detach() @ exact[:, protected:] / ((trained - weight).detach() @ exact[:, protected:])
    torch.testing.assert_close(lengths.median(0).values, 1.0 - mask[0, protected:], rtol=0, atol=0.05)

    inputs = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    output = reserved_linear(inputs, Parts(trained, basis, anchor, mask), None, form, None)
    reference = F.linear(inputs, expected)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(y.square().sum(), (inputs, trained), retain_graph=True) for y in (output, reference)]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("rows", [4, 400])
def test_a_steady_gradient_has_no_part_in_the_basis_under_autocast(rows: int) -> None:
    parts, form = parts_of(Operator(Case((rows, 12), 8), "steady", 5).draw(torch.float32))
    parts.trained.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = reserved_linear(torch.randn(rows, 12), parts, None, form, None)
    output.float().square().sum().backward()
    grad = parts.trained.grad
    assert grad is not None
    assert output.dtype == torch.bfloat16
    assert float((grad @ parts.basis[0]).norm()) < 1e-6 * float(grad.norm())


@pytest.mark.parametrize("form", ["complement", "subspace"])
def test_under_autocast_the_weight_is_written_out_in_full_precision(form: str) -> None:
    problem = Operator(Case((4, 12), 8), form, 5).draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = effective_weight(*parts_of(problem))
    assert found.dtype == torch.float32
    assert relative_error(found, problem.written(problem.trained)) < 1e-6


def test_bfloat16_weights_keep_a_float32_basis() -> None:
    exact = Operator(Case((4, 12), 8, bias=False), "complement", 5).draw()
    problem = exact.to(torch.bfloat16)
    parts, form = parts_of(problem)
    assert parts.basis.dtype == parts.anchor.dtype == torch.float32
    assert relative_error(effective_weight(parts, form), exact.written(exact.trained)) < 0.01
    output = reserved_linear(problem.input, parts, None, form, None)
    assert relative_error(output, F.linear(exact.input, exact.written(exact.trained))) < 0.02


@given(
    st.integers(1, 2),
    st.integers(8, 60),
    st.floats(0.05, 0.95),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_one_pass_with_the_overlap_leaves_nothing_in_a_rounded_basis(
    groups: int, width: int, share: float, masked: bool, anchored: bool, seed: int
) -> None:
    """Against the exact projection, with columns that are orthonormal but for the rounding of float16."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, int(share * width))
    basis = torch.stack([orthonormal(width, count) for _ in range(groups)]).half()
    mask = torch.randint(0, 2, (groups, count), generator=generator).float() if masked else None
    rows = torch.randn(groups, 5, width, generator=generator, dtype=torch.float64)
    expected = torch.randn(groups, 5, count, generator=generator, dtype=torch.float64) if anchored else None
    form = Form(FeatureSide(groups, width), torch.Size((5 * groups, width)), complement=True, passes=2)
    given = None if expected is None else expected.float()
    found = drop(rows.float(), basis.float(), given, mask, form, True, overlap_of(basis, mask)).double()

    for group in range(groups):
        closed = slice(None) if mask is None else mask[group] > 0
        columns = basis[group].double()[:, closed]
        excess = rows[group] @ columns - (0.0 if expected is None else expected[group][:, closed])
        exact = rows[group] - excess @ torch.linalg.pinv(columns)
        torch.testing.assert_close(found[group], exact, rtol=0, atol=3e-6)


def test_a_gradient_that_was_noted_is_known_until_somebody_writes_on_it() -> None:
    weight = torch.randn(6, 9, requires_grad=True)
    basis = orthonormal(9, 4, torch.float32)[None]
    form = Form(FeatureSide(1, 9), weight.shape, complement=True, steady=True)
    inputs = torch.randn(40, 9)
    reserved_linear(inputs, Parts(weight, basis, None), None, form, None).square().sum().backward()
    assert weight.grad is not None
    assert outside.has(weight.grad, basis)
    assert not outside.has(weight.grad, basis.clone())
    assert not outside.has(weight.grad.clone(), basis)
    reserved_linear(inputs, Parts(weight, basis, None), None, form, None).square().sum().backward()
    assert not outside.has(weight.grad, basis)  # another one was added
    weight.grad = None
    reserved_linear(inputs, Parts(weight, basis, None), None, form, None).square().sum().backward()
    assert outside.has(weight.grad, basis)  # type: ignore[arg-type]
    torch.nn.utils.clip_grad_value_([weight], 0.1)
    assert not outside.has(weight.grad, basis)  # type: ignore[arg-type]


def test_what_is_known_of_gradients_does_not_grow_and_keeps_none_alive() -> None:
    basis = orthonormal(9, 4, torch.float32)[None]
    alive = [torch.randn(3, 9) for _ in range(20)]
    for grad in alive:
        outside.add(grad, basis)
    for _ in range(2000):
        outside.add(torch.randn(3, 9), basis)
    assert len(outside._found) <= 300
    assert all(outside.has(grad, basis) for grad in alive)
    fresh = [torch.randn(3, 9) for _ in range(500)]
    assert not any(outside.has(grad, basis) for grad in fresh)
