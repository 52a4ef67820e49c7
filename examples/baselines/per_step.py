"""Layers that decompose their input anew at every step: what the baselines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_lance.ops.conv import LowRankConv, geometry
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.linear import LowRankLinear

Decompose: TypeAlias = Callable[[Tensor, int], Factors]
"""Tucker factors of an input; the second argument is its channel or feature axis."""


class PerStepConv2d(nn.Conv2d):
    """Convolution that keeps a Tucker decomposition of its input, made at every training step."""

    decompose: Decompose
    formula_bytes: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return super()._conv_forward(input, weight, bias)
        factors = self.decompose(input.detach(), 1)
        self.formula_bytes = tucker_bytes(input, factors, 1)
        how = geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        core = compress(input.detach(), factors, 1, 2)
        output: Tensor = LowRankConv.apply(input, weight, bias, how, core, *factors[:4], *factors.spatial)
        return output


class PerStepLinear(nn.Linear):
    """Linear layer that keeps a Tucker decomposition of its input, made at every training step."""

    decompose: Decompose
    formula_bytes: int

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        factors = self.decompose(input.detach(), input.dim() - 1)
        self.formula_bytes = tucker_bytes(input, factors, input.dim() - 1)
        core = compress(input.detach(), factors, input.dim() - 1, 1)
        output: Tensor = LowRankLinear.apply(input, self.weight, self.bias, core, *factors[:4], *factors.spatial)
        return output


def install(layers: Iterable[nn.Module], make: Callable[[], Decompose]) -> None:
    """Turn convolutions and linear layers, in place, into layers that decompose their input at every step.

    Args:
        layers: `nn.Conv2d` and `nn.Linear` modules.
        make: called once per layer, so that a method can carry state from step to step.
    """
    for layer in layers:
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            raise TypeError(f"{type(layer).__name__} is neither nn.Conv2d nor nn.Linear")
        layer.__class__ = PerStepConv2d if isinstance(layer, nn.Conv2d) else PerStepLinear
        layer.decompose = make()


def as_factors(bases: list[Tensor | None], channel_axis: int) -> Factors:
    """One basis `(n, r)` per axis of the input, `None` for a mode that is kept whole, as the operators take them."""
    spatial = tuple(basis for axis, basis in enumerate(bases) if axis not in (0, channel_axis))
    rows = None if bases[0] is None else bases[0].T.contiguous()
    return Factors(rows, None, 1.0, bases[channel_axis], spatial)


def _batch(factors: Factors) -> Tensor | None:
    return None if factors.rotation is None else factors.rotation.T


def tucker_bytes(input: Tensor, factors: Factors, channel_axis: int) -> int:
    """Bytes of the core and the factors of one input, by formula."""
    elements = 1
    spatial = iter(factors.spatial)
    for axis, size in enumerate(input.shape):
        basis = _batch(factors) if axis == 0 else factors.channel if axis == channel_axis else next(spatial)
        elements *= size if basis is None else basis.shape[1]
    bases = (_batch(factors), factors.channel, *factors.spatial)
    return (elements + sum(basis.numel() for basis in bases if basis is not None)) * input.element_size()
