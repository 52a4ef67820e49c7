"""Layers in training whose weight can only change outside of what their memory protects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance.continual.reservation import Reservation
from lightning_lance.layers import registry
from lightning_lance.layers.compressed import Compressed, LayerState, unwatched
from lightning_lance.layers.conv import CompressedConv
from lightning_lance.layers.linear import CompressedLinear
from lightning_lance.ops.conv import Geometry, convolve, geometry
from lightning_lance.ops.factors import WHOLE, Factors
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.reserved import Form, Parts, reserved_conv, reserved_linear, stock_weight, transformable_weight
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.tensors.orders import SampleOrder


@dataclass
class ReservedState(LayerState):
    """State of a compressed layer with a reservation."""

    reservation: Reservation | None = None


class Reserved(Compressed):
    """Base of the variants with a reservation."""

    _lance: ReservedState
    weight: Tensor

    @property
    def reservation(self) -> Reservation:
        """The layer's reservation."""
        assert self._lance.reservation is not None
        return self._lance.reservation

    def lance_trains(self) -> bool:
        """Whether a gradient of the weight is wanted, so that something of the input must be kept.

        Asked once at the start of every call, and the place where a steady reservation is looked after.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.reservation.watch(self.weight)
        trained = self.lance_parts()[0].trained
        return torch.is_grad_enabled() and trained.requires_grad

    def lance_reserved(
        self, operator: Callable[..., Tensor], stock: Callable[..., Tensor], input: Tensor, *arguments: Any
    ) -> Tensor:
        """Run an operator on the layer's parametrised weight.

        Args:
            operator: ``operator(input, parts, *arguments, form, factors)``.
            stock: ``stock(input, weight, *arguments)``, which is watched as all stock operators are.
            input: of the call.
            arguments: what both take.
        """
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return stock(input, transformable_weight(*self.lance_parts()), *arguments)
        weight, parts, form, factors = self.lance_call(input)
        if weight is not None:
            return stock(input, weight, *arguments)
        projections = factors or WHOLE
        whole = (*parts, *projections, *projections.spatial)
        return self.lance_run(operator, operator.__name__, input, whole, input, parts, *arguments, form, factors)

    @unwatched
    def lance_call(self, input: Tensor) -> tuple[Tensor | None, Parts, Form, Factors | None]:
        """What a call works with; the first is the weight of a stock operator, where one can run."""
        self.lance_observe(input)
        factors = self.lance_factors(input) if self.lance_trains() else None
        parts, form = self.lance_parts()
        weight = stock_weight(input, parts, form, factors) if self.lance_as_stock() else None
        return weight, parts, form, factors

    def lance_as_stock(self) -> bool:
        """Whether a stock operator would keep the input itself, not a padded copy of it."""
        return True

    def lance_form(self) -> Form:
        """Parametrisation of a call."""
        return self.reservation.form

    def lance_parts(self) -> tuple[Parts, Form]:
        """What a call works with."""
        found, form = self.reservation, self.lance_form()
        if found.shown is None:
            return found.parts(self.weight), form
        return Parts(found.shown, found.basis, found.shown), form._replace(complement=True, steady=True)

    def lance_leave(self) -> None:
        self.reservation.fold(self.weight)

    def lance_stock(self) -> dict[str, Any]:
        found = super().lance_stock()
        if self.reservation.written_out:
            weight = nn.Parameter(self.reservation.effective(self.weight), self.weight.requires_grad)
            found["_parameters"] = {**found["_parameters"], "weight": weight}
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # What is saved is the weight that the layer works with, whoever loads it.
        self.reservation.settle(self.weight)
        stock: Any = super()
        stock._save_to_state_dict(destination, prefix, keep_vars)
        if self.reservation.written_out:
            destination[prefix + "weight"] = self.reservation.effective(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        before = self.weight.detach().clone()
        stock: Any = super()
        stock._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict:
            self.reservation.adopt(self.weight, before)


class ReservedLinear(Reserved, CompressedLinear):
    """:class:`torch.nn.Linear` in a reserved subspace."""

    in_features: int
    bias: Tensor | None

    @staticmethod
    def side(module: Any, patch: bool) -> tuple[FeatureSide, Geometry | None]:
        """Feature side of a layer, and the geometry of its patches."""
        return FeatureSide(1, module.in_features), None

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        return self.lance_reserved(reserved_linear, F.linear, input, self.bias)


class ReservedConv(Reserved, CompressedConv):
    """:class:`torch.nn.Conv1d`, 2d and 3d in a reserved subspace."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def side(module: Any, patch: bool) -> tuple[FeatureSide, Geometry | None]:
        """Feature side of a layer, and the geometry of its patches."""
        shape = geometry(
            module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        )
        return FeatureSide(module.groups, module.in_channels // module.groups, module.kernel_size, patch), shape

    def lance_as_stock(self) -> bool:
        return not self.lance_geometry().pad  # else it would keep the padded input, and padding the other one

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == len(self.kernel_size) + 1:
            return self._conv_forward(input.unsqueeze(0), weight, bias).squeeze(0)
        return self.lance_reserved(reserved_conv, convolve, input, bias, self.lance_geometry())


_RESERVED: dict[type[registry.Variant], type[ReservedLinear] | type[ReservedConv]] = {
    CompressedLinear: ReservedLinear,
    CompressedConv: ReservedConv,
}


def reserved_variant(module: nn.Module) -> type[ReservedLinear] | type[ReservedConv] | None:
    """The variant that can reserve a subspace of a module, or ``None`` where its type is not supported."""
    variant = registry.find(module)
    return next((_RESERVED[cls] for cls in variant.__mro__ if cls in _RESERVED), None) if variant is not None else None


def install_reservation(module: nn.Module, name: str, reservation: Reservation, order: SampleOrder) -> None:
    """Make a module, compressed or not, train in its reservation, until it gets its own class back.

    Args:
        module: a supported layer.
        name: its qualified name.
        reservation: made from its weight as it is now.
        order: source of sample orders, for a layer that is not compressed.
    """
    variant = reserved_variant(module)
    assert variant is not None
    state = module._lance if isinstance(module, Compressed) else LayerState(name, False, ModeRanks(), True, order)
    registry.uninstall(module)
    registry.install(module, variant)
    module.__dict__["_lance"] = ReservedState(**vars(state), reservation=reservation)


def reserved_layers(model: nn.Module) -> dict[str, Reserved]:
    """Name -> layer, for the layers that train in a reservation."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Reserved)}
