"""Layers in training whose weight can only change outside of what their memory protects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from lightning_lance.continual.memory import LayerMemory
from lightning_lance.layers import registry
from lightning_lance.layers.compressed import Compressed, LayerState
from lightning_lance.layers.conv import CompressedConv
from lightning_lance.layers.linear import CompressedLinear
from lightning_lance.ops.conv import Geometry, geometry
from lightning_lance.ops.factors import WHOLE
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.reserved import Form, Parts, effective_weight, precision, reserved_conv, reserved_linear
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.tensors.checked import Stored
from lightning_lance.tensors.orders import SampleOrder

WATCH_STEPS = 32
"""A steady reservation is looked at every so many steps."""

ROUNDED_PASSES = 3
"""Along a basis in bfloat16: each pass leaves less than 1% of the last one, so that three reach float32."""

EXACT_PASSES = 6
"""The same for float64."""

STEADY_TOLERANCE = 1e-4
"""Relative to the weight. Independent roundings of ten thousand steps in float32 add up to some 2e-6."""

LONGEST = 1.1
"""What a stored basis may multiply a vector's length with: 1, but for rounding and damped directions beside it."""

_BEFORE_STEADY = {"steady": [False, 0], "flat": False}
"""What states have that were stored before there were steady reservations."""


class Reservation:
    """Fixed and trained tensors of one layer during one experience.

    They are parameters, for they live as long as the weight does: state, and no activation.

    Args:
        weight: the layer's weight, at the start of the experience.
        memory: of the layer, with its directions reserved.
        side: feature side of the layer.
        steady: the optimiser's steps on the weight are sums of gradients (:func:`steps_are_sums`), so that projecting
            these is enough. It is looked after: where something else moves the weight inside of the protected basis,
            the reservation goes on with the form that holds for any steps.
        flat: the weight is the one that the layer works with after every step, for :meth:`flatten` is called then. So
            it may be averaged, or exchanged for an average, by whoever knows the parameter only.

    Attributes:
        form: parametrisation in use.
        shown: a weight to work with for the time being, such as that of an earlier experience; ``None``: one's own.
        update: ``V``, the trained parameter of a truncated reservation; ``None``: the weight itself is trained.
    """

    def __init__(
        self, weight: Tensor, memory: LayerMemory, side: FeatureSide, steady: bool = False, flat: bool = False
    ) -> None:
        whole = memory.reserved is None
        self.flat = flat and whole
        # In half precision what rounding leaves in M is no longer small.
        steady = steady and whole and not memory.scaled and weight.dtype == memory.dtype
        steady = steady or self.flat
        stored = whole and memory.rounded and memory.importance is None  # as it is: not twice in memory
        damped = memory.steps.shape[1] if stored and memory.steps is not None else 0
        self.form = Form(side, weight.shape, whole, steady, ROUNDED_PASSES if stored else 1, damped)
        self._version, self._steps = weight._version, 0
        self._start = fingerprint(weight)
        self._scaled, self._dtype = memory.scaled, memory.dtype
        self.shown: Tensor | None = None
        if stored:
            basis = memory.stored
        else:
            basis = memory.closed() if whole else memory.directions()
        self.basis = Parameter(basis.to(weight.device).contiguous(), requires_grad=False)
        self.mask: Parameter | None = None
        if stored and (memory.opened is not None or memory.scaled):
            self.mask = Parameter(memory.closing().to(weight.device), requires_grad=False)
        self.anchor: Parameter | None = None
        self.update: Parameter | None = None
        if whole:
            self.anchor = Parameter(self._anchored(weight), requires_grad=False)
        else:
            rows = weight.numel() // side.width
            self.update = Parameter(weight.new_zeros(rows, self.basis.shape[2]))

    def _anchored(self, weight: Tensor) -> Tensor:
        found = self.form.side.rows(exact(weight)) @ exact(self.basis)
        return found.to(self.basis.device, precision(self.basis, weight))

    @property
    def _damped(self) -> bool:
        """Whether dropping what is outside of the reservation twice is not the same as dropping it once."""
        return self._scaled and self.update is None and not self.flat

    @property
    def written_out(self) -> bool:
        """Whether the weight that the layer works with is another tensor than the one that it holds."""
        return self.update is not None or self._damped

    @torch.no_grad()
    def watch(self, weight: Tensor) -> None:
        """Before a training step: see whether a steady reservation still is, after 1, 2, 4 … and every 32 steps."""
        if not self.form.steady or self.flat or weight._version == self._version:
            return
        self._version = weight._version
        self._steps += 1
        if self._steps % WATCH_STEPS and self._steps & (self._steps - 1):
            return
        if not self._is_steady(weight):
            self.form = self.form._replace(steady=False)

    def _is_steady(self, weight: Tensor) -> bool:
        """Whether ``W M = C``, seen along one vector of ``span(M)`` in each group: no product with all of ``M``."""
        assert self.anchor is not None
        rows, count = self.form.side.rows(weight.detach()), self.basis.shape[2]
        if count == 0:
            return True
        signs = 1.0 - 2.0 * (torch.arange(count, device=weight.device) % 2)
        signs = signs.to(self.anchor).div_(math.sqrt(count)).expand(self.basis.shape[0], count).unsqueeze(2)
        signs = signs if self.mask is None else signs * self.mask.unsqueeze(2).to(signs)
        expected = self.anchor @ signs
        excess = torch.baddbmm(expected, rows.to(signs.dtype), self.basis.to(signs.dtype) @ signs, beta=-1)
        size = torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(rows) / math.sqrt(self.form.side.width)
        return bool(torch.linalg.vector_norm(excess) <= STEADY_TOLERANCE * size)

    def parts(self, weight: Tensor) -> Parts:
        """Tensors of the parametrisation, given the layer's weight as it is now."""
        if self.update is None:
            assert self.anchor is not None
            return Parts(weight, self.basis, self.anchor, self.mask)
        return Parts(self.update, self.basis, weight)

    @torch.no_grad()
    def flatten(self, weight: Tensor) -> None:
        """After a step on the weight: drop of it what may not move, and go on from the result."""
        assert self.anchor is not None
        parts = self.parts(weight)
        weight.copy_(effective_weight(parts, self.form._replace(steady=False)))
        self._anchor_loose(weight)

    @torch.no_grad()
    def adopt(self, weight: Tensor, before: Tensor) -> None:
        """Go on from a weight that somebody has put in the place of the one that the layer works with.

        What of it differs inside of the protected basis is dropped, then or at the end.

        Args:
            weight: the layer's weight, with the new values.
            before: its values before.
        """
        if self.update is None:
            self._anchor_loose(weight)
            if self.form.steady and not self.flat and not self._is_steady(weight):
                self.form = self.form._replace(steady=False)
            return
        # Along the normalised columns of U: where step sizes are 0, nothing may move.
        size = torch.linalg.vector_norm(exact(self.basis), dim=1, keepdim=True)
        basis = exact(self.basis) / size.clamp(min=torch.finfo(torch.float32).tiny)
        rows = self.form.side.rows(exact(before))
        change = self.form.side.rows(exact(weight)) - rows
        weight.data.copy_(self.form.side.weight(rows + (change @ basis) @ basis.mT, self.form.shape))
        self.update.data.zero_()

    def _anchor_loose(self, weight: Tensor) -> None:
        """Where columns are closed in part, steps count from this weight on."""
        if self._scaled and self.anchor is not None:
            closed = torch.linalg.vector_norm(self.basis, dim=1) if self.mask is None else self.mask
            loose = closed.unsqueeze(1) < 1.0 - 1e-5
            self.anchor.data.copy_(torch.where(loose, self._anchored(weight), self.anchor))

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the layer works with, computed in float64 and rounded once."""
        trained, basis, anchor, mask = self.parts(weight)
        parts = Parts(exact(trained), exact(basis), exact(anchor), mask)
        passes = EXACT_PASSES if self.form.passes > 1 else 1
        return effective_weight(parts, self.form._replace(passes=passes)).to(weight)

    def state_dict(self, weight: Tensor) -> dict[str, Any]:
        """What does not follow from the memory, on the CPU; the weight too where a state dict holds another one."""

        def stored(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().cpu()

        return {
            "start": self._start,
            "basis": stored(self.basis) if self._scaled and self.mask is None else None,
            "anchor": stored(self.anchor),
            "update": stored(self.update),
            "weight": stored(weight) if self.written_out else None,
            "steady": [self.form.steady, self._steps],
            "flat": self.flat,
        }

    def check(self, stored: Stored, weight: Tensor) -> dict[str, Any]:
        """The state that :meth:`state_dict` returned, which fits this reservation; nothing is changed.

        Raises:
            StateError: a value is missing, or of another type, shape or dtype.
        """
        if isinstance(stored.value, dict):
            stored = Stored({**_BEFORE_STEADY, **stored.value}, stored.place, stored.advice)
        start, basis, anchor, update, kept, steady, flat = stored.fields(
            "start", "basis", "anchor", "update", "weight", "steady", "flat"
        )
        start.real()
        holds, steps = steady.items(2)
        holds.flag()
        steps.integer(0)
        if flat.flag() and self.update is not None:
            flat.refuse("False for a layer that trains a smaller parameter")
        groups, width, count = self.basis.shape
        if basis.value is not None:
            scaled = basis.tensor((groups, width, None), (self._dtype,))
            count = scaled.shape[2]
            longest = float(torch.linalg.matrix_norm(scaled.double(), 2).max()) if scaled.numel() else 0.0
            if longest > LONGEST:
                basis.refuse(
                    "orthogonal columns no longer than 1", f"a tensor that makes vectors {longest:.3g} times longer"
                )
        for item, own in ((anchor, self.anchor), (update, self.update)):
            if own is None:
                if item.value is not None:
                    item.refuse("None, since the layer trains " + ("its weight" if item is update else "another one"))
            else:
                item.tensor((*own.shape[:-1], count), (own.dtype,), finite=False)
        if self.update is not None or ((self._scaled or basis.value is not None) and not flat.value):
            kept.tensor(weight.shape, (weight.dtype,), finite=False)
        elif kept.value is not None:
            kept.refuse("None, since the model's own state holds the weight")
        return dict(stored.value)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], weight: Tensor) -> None:
        """Go on with stored tensors that were checked; the weight gets its stored values where there are any."""
        self._start, self._scaled = state["start"], self._scaled or state["basis"] is not None
        steady, self._steps = state["steady"]
        self.flat = state["flat"]
        self.form, self._version = self.form._replace(steady=steady), weight._version
        if state["basis"] is not None:
            self.basis = Parameter(state["basis"].to(weight.device), requires_grad=False)
            self.form, self.mask = self.form._replace(passes=1, damped=0), None
        if self.anchor is not None:
            self.anchor = Parameter(state["anchor"].to(self.anchor), requires_grad=False)
        for own, name in ((self.update, "update"), (weight.data, "weight")):
            if own is not None and state[name] is not None:
                own.copy_(state[name])

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Drop what an optimiser has added to the weight inside of the protected basis: no output changes.

        A truncated reservation has nothing to drop, and a damped one keeps it until the end.
        """
        if not self.written_out and fingerprint(weight) != self._start:
            # Through .data, so that a graph that saved the weight can still run backward.
            weight.data.copy_(self.effective(weight))

    @torch.no_grad()
    def fold(self, weight: Tensor) -> None:
        """Write the effective weight into the layer's own; one that was not trained stays bit for bit."""
        self.settle(weight)
        if self._damped and fingerprint(weight) != self._start:
            weight.data.copy_(self.effective(weight))
            self._start = fingerprint(weight)
        if self.update is not None and bool(self.update.any()):
            weight.data.copy_(self.effective(weight))
            self.update.zero_()


def steps_are_sums(optimizers: Iterable[torch.optim.Optimizer], weight: Tensor) -> bool:
    """Whether every step on a weight, from now on, is a sum of its gradients times numbers, and nothing else.

    So are those of gradient descent, with momentum too, but not with weight decay, nor with momentum from before.
    """
    found = False
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(weight is held for held in group["params"]):
                momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
                if type(optimizer) is not torch.optim.SGD or group["weight_decay"] != 0 or momentum is not None:
                    return False
                found = True
    return found


def fingerprint(*tensors: Tensor) -> float:
    """A number that changes when values do."""
    return sum(float(exact(tensor).sum()) for tensor in tensors)


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


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

    def lance_reserved(self, operator: Callable[..., Tensor], input: Tensor, parts: Parts, *arguments: Any) -> Tensor:
        """Run an operator whose last argument are the factors of its input."""
        factors = arguments[-1] or WHOLE
        whole = (*parts, *factors, *factors.spatial)
        return self.lance_run(operator, operator.__name__, input, whole, input, parts, *arguments)

    def lance_form(self) -> Form:
        """Parametrisation of a call. A compiled graph cannot look after a steady one."""
        form = self.reservation.form
        return form._replace(steady=False) if torch.compiler.is_compiling() else form

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
        self.lance_observe(input)
        factors = self.lance_factors(input) if self.lance_trains() else None
        parts, form = self.lance_parts()
        return self.lance_reserved(reserved_linear, input, parts, self.bias, form, factors)


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

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == len(self.kernel_size) + 1:
            return self._conv_forward(input.unsqueeze(0), weight, bias).squeeze(0)
        self.lance_observe(input)
        factors = self.lance_factors(input) if self.lance_trains() else None
        parts, form = self.lance_parts()
        return self.lance_reserved(reserved_conv, input, parts, bias, self.lance_geometry(), form, factors)


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
