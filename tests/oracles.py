"""Slow, obviously right references: the projected input by tensorly, gradients by plain autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

from lightning_lance.ops.factors import Factors

tensorly.set_backend("numpy")


def orthonormal(size: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, columns, dtype=torch.float64)).Q.contiguous().to(dtype)


def dct(size: int, columns: int) -> np.ndarray:
    """Orthonormal DCT-II columns from their definition."""
    position = (np.arange(size) + 0.5)[:, None]
    basis = np.sqrt(2.0 / size) * np.cos(np.pi / size * position * np.arange(columns)[None])
    basis[:, 0] = size**-0.5
    return basis


def projected_input(input: Tensor, factors: Factors, channel_axis: int, first_spatial: int) -> Tensor:
    """``X̂ = G ×₀ (P Φ S) ×_c U_c ×_s U_s …`` with the core ``G = X ×₀ (P Φ)ᵀ ×_c U_cᵀ …``, in float64."""
    core, rebuild, modes = [], [], []
    if factors.basis is not None:
        basis = factors.basis.double().numpy()
        if factors.order is not None:
            basis = basis[factors.order.numpy()]
        weights = np.full(basis.shape[1], factors.scale)
        weights[0] = 1.0
        core.append(basis.T)
        rebuild.append(basis * weights)
        modes.append(0)
    for mode, factor in [(channel_axis, factors.channel), *enumerate(factors.spatial, first_spatial)]:
        if factor is not None:
            core.append(factor.double().numpy().T)
            rebuild.append(factor.double().numpy())
            modes.append(mode)
    values = input.detach().double().numpy()
    if not modes:
        return torch.from_numpy(values)
    return torch.from_numpy(np.ascontiguousarray(multi_mode_dot(multi_mode_dot(values, core, modes), rebuild, modes)))


def gradients(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
) -> tuple[Tensor, ...]:
    """Output and the gradients of input, weight and bias for one gradient of the output."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (input, weight, bias) if leaf is not None]
    output = function(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    output.backward(grad)
    return (output.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖a - b‖ / ‖b‖``, or the norm of ``a`` where ``b`` is zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    difference, norm = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    return difference / norm if norm else difference


def every_combination(columns: Sequence[int]) -> list[tuple[bool, ...]]:
    """Every choice of truncated modes."""
    return [tuple(bool(code >> index & 1) for index in range(len(columns))) for code in range(2 ** len(columns))]
