"""Linear maps and convolutions whose weight can only change outside of a protected basis.

With ``M`` orthonormal and ``W₀`` the weight at the start of an experience, two parametrisations of the weight:

- *complement*: ``W = T - (T M - C) Mᵀ`` with ``C = W₀ M`` fixed and ``T``, of the shape of the weight, trained;
- *subspace*: ``W = W₀ + V Uᵀ`` with ``W₀`` and ``U ⟂ M`` fixed and ``V``, one column for each of ``U``'s, trained.

In both ``W M = W₀ M`` whatever an optimiser does to ``T`` or ``V``, and the gradient is exact but for the compression
of the input. No copy of ``W`` is kept for backward.

``M`` may be given in half precision, orthonormal but for its rounding: subtracting the part along it then takes
``(MᵀM)⁻¹`` in between, which is close to the identity, or a few passes, each of which leaves about a thousandth of the
last one. And single columns of it may be open, by a mask, as if they were none of it. Behind them there may be others,
``L``, along which steps are only shorter, by the mask again: one pass has them too, the first one of a weight, so that
the others make good what it moves in ``M``.

An optimiser whose steps are sums of gradients, as those of gradient descent are, leaves ``T M = C`` where it was, for
the gradients have no part in ``M``. The complement form is *steady* then: ``W = T``, and only gradients are projected.
So it is where what a step has moved inside of ``M`` is taken back after it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.ops.backward import first_order_only, outside_autocast
from lightning_lance.ops.conv import Geometry, conv_input_grad, conv_weight_grad, convolve
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.linear import linear_weight_grad, owned


class Form(NamedTuple):
    """Static part of a parametrisation.

    Attributes:
        side: feature side of the layer.
        shape: shape of the weight.
        complement: which of the two parametrisations.
        steady: of the complement form: ``T M = C`` holds by itself.
        passes: of the complement form: how often the part along ``M`` is subtracted.
        damped: of the complement form: columns at the end of the basis along which steps are only shorter.
    """

    side: FeatureSide
    shape: torch.Size
    complement: bool
    steady: bool = False
    passes: int = 1
    damped: int = 0


class Parts(NamedTuple):
    """Tensors of a parametrisation.

    Attributes:
        trained: ``T`` of the weight's shape, or ``V`` of shape ``(rows, r)``.
        basis: ``M`` or ``U``, shape ``(groups, K, m)``.
        anchor: ``C`` of shape ``(groups, rows / groups, m)``, not needed where the form is steady; or ``W₀`` of the
            weight's shape.
        mask: of the complement form: 0 for the columns of ``M`` that are open, else 1, and for those that are damped
            what steps lack of their full length, shape ``(groups, m)``; ``None``: 1 for all.
        overlap: what :func:`overlap_of` returned for basis and mask, which one pass does with; ``None``: it takes all
            passes.
    """

    trained: Tensor
    basis: Tensor
    anchor: Tensor | None
    mask: Tensor | None = None
    overlap: Tensor | None = None


_SCALE = 2.0**10
"""Of overlaps: most are too small for the precision of float16."""


def overlap_of(basis: Tensor, mask: Tensor | None) -> Tensor:
    """``(MᵀM)⁻¹ - I`` of the closed columns of a basis that is orthonormal but for float16's rounding, times 1024.

    Args:
        basis: ``(groups, K, m)``.
        mask: of zeros and ones, ``(groups, m)``; ``None``: all are closed.

    Returns:
        ``(groups, m, m)`` float16, 0 where a column is open.
    """
    exact = basis.to(torch.promote_types(basis.dtype, torch.float32))
    excess = torch.eye(basis.shape[2], dtype=exact.dtype, device=exact.device) - exact.mT @ exact
    if mask is not None:
        excess = excess * mask.unsqueeze(1).to(exact.dtype) * mask.unsqueeze(2).to(exact.dtype)
    # The first two terms of its series; the next one is a billionth.
    return torch.baddbmm(excess, excess, excess).mul_(_SCALE).half()


def precision(basis: Tensor, trained: Tensor) -> torch.dtype:
    """What a weight is computed in: that of the basis, or where it is rounded that of the weight, float32 at least."""
    if basis.dtype in (torch.float32, torch.float64):
        return basis.dtype
    return torch.promote_types(trained.dtype, torch.float32)


def drop(
    rows: Tensor,
    basis: Tensor,
    expected: Tensor | None,
    mask: Tensor | None,
    form: Form,
    transposed: bool = False,
    overlap: Tensor | None = None,
) -> Tensor:
    """Rows ``(groups, n, K)`` with their products with the basis made ``expected``, ``(groups, n, m)``; ``None``: 0.

    Args:
        rows: of a weight; with ``transposed`` of its gradient, or what is multiplied with it.
        basis: see :class:`Parts`, in the dtype of the rows.
        expected: likewise.
        mask: likewise.
        form: static part of the parametrisation.
        transposed: take the passes in the opposite order, as the gradient of this does.
        overlap: likewise.
    """
    for count in _columns(basis, form, transposed) if overlap is None else [basis.shape[2]]:
        part = basis[:, :, :count]
        excess = rows @ part if expected is None else torch.baddbmm(expected[:, :, :count], rows, part, beta=-1)
        if mask is not None:
            excess = excess * mask[:, :count].unsqueeze(1).to(excess.dtype)
        if overlap is not None:
            excess = torch.baddbmm(excess, excess, overlap.to(excess.dtype), alpha=1 / _SCALE)
        rows = torch.baddbmm(rows, excess, part.mT, alpha=-1)
    return rows


def _columns(basis: Tensor, form: Form, transposed: bool) -> list[int]:
    """How many leading columns of the basis each pass has: all of them in one, without those damped in the others."""
    every = basis.shape[2]
    counts = [every] + [every - form.damped] * (form.passes - 1)
    return counts[::-1] if transposed else counts


def effective_weight(parts: Parts, form: Form) -> Tensor:
    """``W``, in the precision of :func:`precision`, also under autocast."""
    trained, basis, anchor, mask, overlap = parts
    if form.steady:
        return trained
    assert anchor is not None
    dtype = precision(basis, trained)
    basis = basis.to(dtype)
    with full_precision(trained.device.type):
        if form.complement:
            rows = form.side.rows(trained).to(dtype)
            found = drop(rows, basis, anchor, mask, form, overlap=overlap)
            return form.side.weight(found, form.shape).to(trained.dtype)
        rows = form.side.rows(anchor).to(dtype)
        update = trained.view(rows.shape[0], rows.shape[1], -1).to(dtype)
        merged = torch.baddbmm(rows, update, basis.mT)
        return form.side.weight(merged, form.shape).to(anchor.dtype)


def trained_grad(
    weight_grad: Tensor, basis: Tensor, form: Form, mask: Tensor | None = None, overlap: Tensor | None = None
) -> Tensor:
    """Gradient of ``T``, or of ``V``, from that of ``W``."""
    rows = form.side.rows(weight_grad)
    if form.steady:  # what rounding leaves in M would stay in the weight
        rows = rows.to(precision(basis, weight_grad))
    basis = basis.to(rows.dtype)
    if form.complement:
        return form.side.weight(drop(rows, basis, None, mask, form, True, overlap), form.shape)
    return (rows @ basis).flatten(0, 1)


class _Outside:
    """Gradients that were made without a part in a basis, known by their memory and version, which are held weakly."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, int, int]] = {}

    def add(self, grad: Tensor, basis: Tensor) -> None:
        """Note one; who writes on it afterwards changes its version."""
        if torch.compiler.is_compiling() or type(grad) is not Tensor or grad.element_size() < 4:
            return  # in half precision rounding alone gives it a part
        if len(self._found) >= _MOST_NOTED:
            self._found = {key: entry for key, entry in self._found.items() if not entry[0].expired()}
        storage = grad.untyped_storage()
        reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._found[reference.cdata] = (reference, grad._version, basis.data_ptr())

    def has(self, grad: Tensor, basis: Tensor) -> bool:
        """Whether a gradient is one that was noted for this basis, as it was then."""
        entry = self._found.get(grad.untyped_storage()._cdata)
        return entry is not None and entry[1:] == (grad._version, basis.data_ptr())


_MOST_NOTED = 256
outside = _Outside()


def full_precision(device: str) -> Any:
    """A context in which autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _on_activations(rows: int, dtype: torch.dtype, parts: Parts, form: Form) -> bool:
    """Whether projecting inputs and gradients costs less than writing the weight out, forward and backward."""
    out, width = form.shape
    if form.steady:
        return False
    plain = dtype == parts.trained.dtype == precision(parts.basis, parts.trained) and parts.basis.shape[2] > 0
    if not plain or torch.is_autocast_enabled(parts.trained.device.type):
        return False
    if form.complement:
        return rows * (2 * width * form.passes + out) < 2 * out * width * form.passes
    return rows * (out + width) < out * width


def _linear(input: Tensor, parts: Parts, bias: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """Output, and the input's projection where one was computed on the way, both with flat rows."""
    trained, basis, anchor, mask, _ = parts
    if not _on_activations(input.numel() // input.shape[-1], input.dtype, parts, form):
        return F.linear(input, effective_weight(parts, form), bias), None
    assert anchor is not None
    flat = input.reshape(-1, input.shape[-1])
    columns = basis[0].to(flat.dtype)
    if form.complement:
        projected = flat
        part = flat.new_zeros(flat.shape[0], columns.shape[1])
        for count in _columns(basis, form, transposed=True):
            left = projected @ columns[:, :count]
            left = left if mask is None else left * mask[:, :count]
            projected = torch.addmm(projected, left, columns[:, :count].T, alpha=-1)
            part[:, :count] += left
        output = F.linear(projected, trained, bias).addmm_(part, anchor[0].T)
    else:
        part = projected = flat @ columns
        output = F.linear(flat, anchor, bias).addmm_(part, trained.T)
    leading = input.shape[:-1]
    return output.view(*leading, output.shape[1]), projected.view(*leading, projected.shape[1])


def _linear_input_grad(grad: Tensor, parts: Parts, form: Form) -> Tensor:
    trained, basis, anchor, mask, overlap = parts
    if not _on_activations(grad.numel() // grad.shape[-1], grad.dtype, parts, form):
        return grad @ effective_weight(parts, form).to(grad.dtype)
    assert anchor is not None
    flat = grad.reshape(-1, grad.shape[-1])
    if form.complement:
        rows, expected = (flat @ trained)[None], (flat @ anchor[0])[None]
        found = drop(rows, basis.to(flat.dtype), expected, mask, form, overlap=overlap)[0]
    else:
        found = (flat @ anchor).addmm_(flat @ trained, basis[0].T)
    return found.view(*grad.shape[:-1], found.shape[1])


class OutsideGradient(torch.autograd.Function):
    """A steady weight as it is, whose gradient has no part in ``M``: for stock operators.

    ``apply(trained, basis, mask, overlap, form)``.
    """

    @staticmethod
    def forward(
        ctx: Any, trained: Tensor, basis: Tensor, mask: Tensor | None, overlap: Tensor | None, form: Form
    ) -> Tensor:
        # Not saved as activations are, which somebody's hooks may round.
        ctx.basis, ctx.mask, ctx.overlap, ctx.form = basis, mask, overlap, form
        return trained.view_as(trained)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = trained_grad(grad, ctx.basis, ctx.form, ctx.mask, ctx.overlap).to(grad.dtype)
        outside.add(found, ctx.basis)
        return found, None, None, None, None


class ReservedLinear(torch.autograd.Function):
    """Linear map with a reparametrised weight, that keeps the core of its input.

    Saved: core, tensors of the parametrisation, factors. For the subspace form the core is that of ``x U``.
    ``apply(input, trained, bias, basis, anchor, mask, overlap, form, rotation, groups, scale, channel, *spatial)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        trained: Tensor,
        bias: Tensor | None,
        basis: Tensor,
        anchor: Tensor,
        mask: Tensor | None,
        overlap: Tensor | None,
        form: Form,
        rotation: Tensor | None,
        groups: Tensor | None,
        scale: float,
        channel: Tensor | None,
        *spatial: Tensor | None,
    ) -> Tensor:
        parts = Parts(trained, basis, anchor, mask, overlap)
        output, projected = _linear(input, parts, bias, form)
        core = None
        # In the complement form x(I - MMᵀ) replaces x only where it is compressed: x itself may be shared with others.
        ctx.projected = not form.complement or (projected is not None and rotation is not None and channel is None)
        if ctx.needs_input_grad[1]:
            if form.complement:
                source = projected if ctx.projected and projected is not None else input
                core = compress(source, Factors(rotation, groups, scale, channel, spatial), input.dim() - 1, 1)
            elif projected is not None and channel is None:
                core = compress(projected, Factors(rotation, groups, scale, None, spatial), input.dim() - 1, 1)
            else:
                found = compress(input, Factors(rotation, groups, scale, channel, spatial), input.dim() - 1, 1)
                core = found @ (basis[0] if channel is None else channel.to(basis.dtype).T @ basis[0]).to(found.dtype)
        ctx.form, ctx.scale = form, scale
        ctx.save_for_backward(core, trained, basis, anchor, mask, overlap, rotation, groups, channel, *spatial)
        return owned(output)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        core, trained, basis, anchor, mask, overlap, rotation, groups, channel, *spatial = ctx.saved_tensors
        grad_input = grad_trained = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _linear_input_grad(grad, Parts(trained, basis, anchor, mask, overlap), ctx.form)
        if ctx.needs_input_grad[1]:
            complement = ctx.form.complement
            factors = Factors(rotation, groups, ctx.scale, channel if complement else None, tuple(spatial))
            few = channel is None and math.prod(core.shape[:-1]) < grad.shape[-1]
            few = few and not (ctx.form.steady and grad.dtype != precision(basis, trained))
            if not ctx.projected and few:
                core = core.to(grad.dtype)
                rows = core.flatten(0, -2)[None]
                core = drop(rows, basis.to(grad.dtype), None, mask, ctx.form, True, overlap).view(core.shape)
            grad_trained = linear_weight_grad(grad, core, factors)
            if not ctx.projected and not few:
                grad_trained = trained_grad(grad_trained, basis, ctx.form, mask, overlap)
            outside.add(grad_trained, basis)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return (grad_input, grad_trained, grad_bias, *[None] * (9 + len(spatial)))


class ReservedConv(torch.autograd.Function):
    """Convolution with a reparametrised weight, that keeps the core of its input.

    The weight is written out in forward and again in backward, which costs its rows times the basis: little next to
    the positions that it is applied to.
    ``apply(input, trained, bias, basis, anchor, mask, overlap, geometry, form, rotation, groups, scale, channel,
    *spatial)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        trained: Tensor,
        bias: Tensor | None,
        basis: Tensor,
        anchor: Tensor,
        mask: Tensor | None,
        overlap: Tensor | None,
        geometry: Geometry,
        form: Form,
        rotation: Tensor | None,
        groups: Tensor | None,
        scale: float,
        channel: Tensor | None,
        *spatial: Tensor | None,
    ) -> Tensor:
        core = None
        if ctx.needs_input_grad[1]:
            core = compress(input, Factors(rotation, groups, scale, channel, spatial), 1, 2)
        ctx.geometry, ctx.form, ctx.scale, ctx.shape = geometry, form, scale, tuple(input.shape)
        ctx.save_for_backward(core, trained, basis, anchor, mask, overlap, rotation, groups, channel, *spatial)
        weight = effective_weight(Parts(trained, basis, anchor, mask, overlap), form)
        return convolve(input, weight, bias, geometry)

    @staticmethod
    @first_order_only
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        core, trained, basis, anchor, mask, overlap, rotation, groups, channel, *spatial = ctx.saved_tensors
        grad_input = grad_trained = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = effective_weight(Parts(trained, basis, anchor, mask, overlap), ctx.form)
            grad_input = conv_input_grad(grad, weight, ctx.geometry, ctx.shape)
        if ctx.needs_input_grad[1]:
            factors = Factors(rotation, groups, ctx.scale, channel, tuple(spatial))
            weight_grad = conv_weight_grad(grad, core, ctx.form.shape, ctx.geometry, factors)
            grad_trained = trained_grad(weight_grad, basis, ctx.form, mask, overlap)
            outside.add(grad_trained, basis)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
        return (grad_input, grad_trained, grad_bias, *[None] * (10 + len(spatial)))


def stock_weight(input: Tensor, parts: Parts, form: Form, factors: Factors | None) -> Tensor | None:
    """The weight for the stock operator, where that can run: its input is kept whole, and the weight is steady.

    ``None`` also for few rows of a linear map, where it is less work to project the input in the backward pass, and
    under autocast, which would cast this weight in every call and keep each copy.

    Args:
        input: of the call.
        parts: tensors of the parametrisation.
        form: static part of it.
        factors: projections of the input; ``None``: it is kept whole.
    """
    if factors is not None or not form.steady or not torch.is_grad_enabled():
        return None
    out, width = form.shape[:2]
    few = len(form.shape) == 2 and input.numel() // width < out
    if few or torch.is_autocast_enabled(input.device.type):
        return None
    weight: Tensor = OutsideGradient.apply(parts.trained, parts.basis, parts.mask, parts.overlap, form)
    return weight


def transformable_weight(parts: Parts, form: Form) -> Tensor:
    """The weight for a stock operator in a transform of :mod:`torch.func`: made of what it can differentiate.

    Args:
        parts: tensors of the parametrisation.
        form: static part of it.
    """
    trained, basis, anchor, mask, _ = parts
    if not form.steady:
        return effective_weight(Parts(trained, basis, None if anchor is None else anchor.detach(), mask), form)
    fixed = trained.detach()
    # Nothing is added, and the derivative of it has no part in M. In float64, of which autocast keeps its hands off.
    added = trained - fixed if fixed.device.type == "mps" else (trained - fixed).double()
    return fixed + trained_grad(added, basis.to(added.dtype), form, mask).to(fixed.dtype)


def reserved_linear(input: Tensor, parts: Parts, bias: Tensor | None, form: Form, factors: Factors | None) -> Tensor:
    """Linear map in a reserved subspace.

    Args:
        input: ``(B, *tokens, K)``.
        parts: tensors of the parametrisation.
        bias: ``(O,)`` or ``None``.
        form: static part of the parametrisation.
        factors: projections of the input that is kept for the gradient; ``None``: it is kept whole.

    Returns:
        ``(B, *tokens, O)``.
    """
    if not torch.is_grad_enabled():
        return _linear(input, parts, bias, form)[0]
    trained, basis, anchor, mask, overlap = parts  # compilers up to torch 2.6 take no slices of named tuples
    rotation, groups, scale, channel, spatial = factors or Factors(None, None, 1.0, None, (None,) * (input.dim() - 2))
    result: Tensor = ReservedLinear.apply(
        *(input, trained, bias, basis, anchor, mask, overlap, form), *(rotation, groups, scale, channel, *spatial)
    )
    return result


def reserved_conv(
    input: Tensor, parts: Parts, bias: Tensor | None, geometry: Geometry, form: Form, factors: Factors | None
) -> Tensor:
    """Convolution in a reserved subspace.

    Args:
        input: ``(B, C, *sizes)`` with one to three spatial axes.
        parts: tensors of the parametrisation.
        bias: ``(O,)`` or ``None``.
        geometry: static arguments of the convolution.
        form: static part of the parametrisation.
        factors: projections of the input that is kept for the gradient; ``None``: it is kept whole.

    Returns:
        ``(B, O, *out)``.
    """
    if not torch.is_grad_enabled():
        return convolve(input, effective_weight(parts, form), bias, geometry)
    trained, basis, anchor, mask, overlap = parts
    rotation, groups, scale, channel, spatial = factors or Factors(None, None, 1.0, None, (None,) * (input.dim() - 2))
    result: Tensor = ReservedConv.apply(
        *(input, trained, bias, basis, anchor, mask, overlap, geometry, form),
        *(rotation, groups, scale, channel, *spatial),
    )
    return result
