"""Slow, obviously right references: the projected input by tensorly, gradients by plain autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

from lightning_lance.ops.factors import Factors
from lightning_lance.tensors.linalg import group_rotation, sample_groups

tensorly.set_backend("numpy")


def orthonormal(size: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, columns, dtype=torch.float64)).Q.contiguous().to(dtype)


def batch_mode(
    size: int, rank: int, order: Sequence[int] | Tensor | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Rotation and groups of a batch whose samples are in some order; ``None``: as they come."""
    device = torch.device("cpu")
    groups = sample_groups(size, rank, device)
    if order is not None:
        groups = groups[torch.as_tensor(order, dtype=torch.int64)]
    return group_rotation(size, rank, dtype, device), groups


def projected_input(input: Tensor, factors: Factors, channel_axis: int, first_spatial: int) -> Tensor:
    """``X̂ = G ×₀ (Φ S) ×_c U_c ×_s U_s …`` with the core ``G = X ×₀ Φᵀ ×_c U_cᵀ …``, in float64."""
    core, rebuild, modes = [], [], []
    if factors.rotation is not None:
        assert factors.groups is not None
        basis = factors.rotation.double().numpy().T[factors.groups.numpy()]
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


def parameter_gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the sum of squares of what a network makes of an input, by name; of what is trained."""
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖a - b‖ / ‖b‖``, or the norm of ``a`` where ``b`` is zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    difference, norm = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    return difference / norm if norm else difference


def every_combination(columns: Sequence[int]) -> list[tuple[bool, ...]]:
    """Every choice of truncated modes."""
    return [tuple(bool(code >> index & 1) for index in range(len(columns))) for code in range(2 ** len(columns))]
