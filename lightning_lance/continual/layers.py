"""Layers in training whose weight can only change outside of what their memory protects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from lightning_lance.continual.memory import LayerMemory
from lightning_lance.errors import LanceWarning
from lightning_lance.layers import registry
from lightning_lance.layers.compressed import Compressed, LayerState
from lightning_lance.layers.conv import CompressedConv
from lightning_lance.layers.linear import CompressedLinear
from lightning_lance.ops.conv import Geometry, geometry
from lightning_lance.ops.factors import WHOLE
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.reserved import (
    Form,
    Parts,
    drop,
    effective_weight,
    full_precision,
    precision,
    reserved_conv,
    reserved_linear,
)
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.tensors.checked import Stored
from lightning_lance.tensors.orders import SampleOrder

WATCH_STEPS = 32
"""A steady reservation is looked at every so many steps."""

ROUNDED_PASSES = 3
"""Along a basis in bfloat16: each pass leaves less than 1% of the last one, so that three reach float32."""

EXACT_PASSES = 6
"""The same for float64."""

OUTSIDE_TOLERANCE = 1e-5
"""Relative to the gradient, of what rounding leaves in it along protected directions."""

STEADY_TOLERANCE = 1e-4
"""Relative to the weight. Roundings of ten thousand steps in float32 add up to a tenth of it at most."""

LONGEST = 1.1
"""What a stored basis may multiply a vector's length with: 1, but for rounding and damped directions beside it."""


class Reservation:
    """Fixed and trained tensors of one layer during one experience.

    They are parameters, for they live as long as the weight does: state, and no activation.

    Where all directions outside of ``M`` are trained, the weight ``W`` itself is what an optimiser steps on, with
    gradients that have no part in ``M``. Some steps are sums of such gradients, and leave ``W M`` alone. Others do not:
    ``W M`` is noted before them (:meth:`before_step`), and made what it was after them (:meth:`after_step`). In
    between nothing is stored for it but a product with one vector, by which :meth:`watch` sees that it holds. A weight
    in half precision is rounded too coarsely for that, and somebody's own optimiser may move weights at any time: then
    ``C = W M`` is stored, and what moves inside of ``M`` is left out wherever the weight is used.

    Args:
        weight: the layer's weight, at the start of the experience.
        memory: of the layer, with its directions reserved.
        side: feature side of the layer.
        steady: the optimiser's steps on the weight are sums of gradients (:func:`steps_are_sums`).
        flat: a weight for which ``C`` is stored, too, is the one that the layer works with after every step. So it may
            be averaged, or exchanged for an average, by whoever knows the parameter only.
        known: the optimisers move the weight in ``step()`` alone (:func:`steps_are_known`), so that ``C`` need not be
            stored.

    Attributes:
        form: parametrisation in use.
        flat: steps may be anything, and what they move inside of ``M`` is taken back after each.
        stepping: an optimiser's step on the weight is under way.
        anchor: ``C``, where it is stored.
        shown: a weight to work with for the time being, such as that of an earlier experience; ``None``: one's own.
        update: ``V``, the trained parameter of a truncated reservation; ``None``: the weight itself is trained.
    """

    def __init__(
        self,
        weight: Tensor,
        memory: LayerMemory,
        side: FeatureSide,
        steady: bool = False,
        flat: bool = False,
        known: bool = False,
    ) -> None:
        whole = memory.reserved is None
        # In half precision what rounding leaves in M is no longer small.
        self._fine = whole and known and weight.dtype == memory.dtype
        steady = steady and self._fine and not memory.scaled
        self.flat = whole and not steady and (flat or self._fine)
        stored = whole and memory.rounded and memory.importance is None  # as it is: not twice in memory
        damped = memory.steps.shape[1] if stored and memory.steps is not None else 0
        self.form = Form(side, weight.shape, whole, steady or self.flat, ROUNDED_PASSES if stored else 1, damped)
        self._looks = 0
        self.stepping = False
        self._label = memory.label
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
        # W M while a step is under way, a vector v in the span of M, and W v.
        self._held: Tensor | None = None
        self._vector: Tensor | None = None
        self._expected: Tensor | None = None
        if not whole:
            rows = weight.numel() // side.width
            self.update = Parameter(weight.new_zeros(rows, self.basis.shape[2]))
        elif self._fine:
            self._expected = self._seen(weight)
        else:
            self.anchor = Parameter(self._anchored(weight), requires_grad=False)

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
        """Before a training call or a step: see whether ``W M`` is what it was, at times 1, 2, 4 … and every 32."""
        if self._expected is None or self.stepping:
            return
        self._held = None  # the last step is done with
        self._looks += 1
        if self._looks % WATCH_STEPS and self._looks & (self._looks - 1):
            return
        if not self._is_steady(weight) and bool(weight.isfinite().all()):  # NaN is not worth keeping: others are loaded
            self._say_moved("What follows is kept out of there, for more memory. ")
            self.anchor = Parameter(self._anchored(weight), requires_grad=False)
            self.form, self.flat = self.form._replace(steady=False), False
            self._expected = None

    def _say_moved(self, consequence: str) -> None:
        warnings.warn(
            f"{self._label}: its weight was changed, and not in a step of an optimiser of torch.optim; some of that is "
            f"in what earlier experiences need, and stays. {consequence}Change weights in optimizer.step() alone, or "
            "before the experience begins.",
            LanceWarning,
            stacklevel=2,
        )

    def _is_closed(self) -> Tensor:
        """1 for each column of the basis that may not move at all, else 0; shape ``(groups, m)``."""
        closed: Tensor
        if self.mask is not None:
            closed = self.mask > 1.0 - 1e-5
        elif self._scaled:
            closed = torch.linalg.vector_norm(self.basis, dim=1) > 1.0 - 1e-5
        else:
            closed = torch.ones(self.basis.shape[0], self.basis.shape[2], device=self.basis.device)
        return closed.to(torch.float32)

    def _seen(self, weight: Tensor) -> Tensor:
        """``W M v`` for one vector ``v``, shape ``(groups, rows, 1)``: no product with all of ``M``."""
        if self._vector is None:
            count = self.basis.shape[2]
            signs = 1.0 - 2.0 * (torch.arange(count, device=self.basis.device) % 2)
            signs = (self._is_closed() * signs / math.sqrt(max(1, count))).unsqueeze(2)
            dtype = precision(self.basis, weight)
            with full_precision(weight.device.type):
                self._vector = self.basis.detach().to(dtype) @ signs.to(dtype)
        with full_precision(weight.device.type):
            return self.form.side.rows(weight.detach()).to(self._vector.dtype).matmul(self._vector)

    def _is_steady(self, weight: Tensor) -> bool:
        """Whether ``W M`` is what it was, as far as one vector of its span in each group tells."""
        assert self._expected is not None
        excess = torch.linalg.vector_norm(self._seen(weight) - self._expected)
        rows = torch.linalg.vector_norm(weight.detach()) / math.sqrt(self.form.side.width)
        return bool(excess <= STEADY_TOLERANCE * (torch.linalg.vector_norm(self._expected) + rows))

    def parts(self, weight: Tensor) -> Parts:
        """Tensors of the parametrisation, given the layer's weight as it is now."""
        if self.update is None:
            return Parts(weight, self.basis, self.anchor, self.mask)
        return Parts(self.update, self.basis, weight)

    @torch.no_grad()
    def before_step(self, weight: Tensor, sums: bool, momentum: Tensor | None = None) -> None:
        """Note ``W M``, until :meth:`after_step`, unless the step is a sum of gradients and these are outside of ``M``.

        Args:
            weight: the layer's weight, with its gradient.
            sums: whether the step is one: :func:`is_sum`.
            momentum: of gradients before, which is in the step too.
        """
        if self.anchor is not None or self._held is not None or weight.grad is None or self._expected is None:
            return
        # What has a part in M once may have it in a momentum ever after.
        self.flat = self.flat or not sums or not self._is_outside(weight.grad)
        self.flat = self.flat or not (momentum is None or self._is_outside(momentum))
        if self.flat:
            self._held = self._along(weight)

    def _along(self, weight: Tensor) -> Tensor:
        dtype = precision(self.basis, weight)
        with full_precision(weight.device.type):
            return self.form.side.rows(weight.detach()).to(dtype).matmul(self.basis.to(dtype))

    def _is_outside(self, grad: Tensor) -> bool:
        """Whether a gradient has no part in ``M``: penalties on weights, noise or clipped values have some."""
        if grad.is_sparse:
            return False
        part = torch.linalg.vector_norm(self._seen(grad))
        return bool(part <= OUTSIDE_TOLERANCE * torch.linalg.vector_norm(grad))

    @torch.no_grad()
    def after_step(self, weight: Tensor) -> None:
        """After a step on the weight: drop of it what may not move, and go on from the result.

        What was noted stays until the next forward pass: the step may be part of another one, which goes on.
        """
        self.stepping = False
        anchor = self.anchor if self._held is None else self._held
        if not self.flat or anchor is None:
            return
        parts = self.parts(weight)._replace(anchor=anchor)
        weight.copy_(effective_weight(parts, self.form._replace(steady=False)))
        self._anchor_loose(weight)
        if self._scaled and self._held is not None:
            self._held = torch.where(self._is_closed().unsqueeze(1) > 0, self._held, self._along(weight))

    @torch.no_grad()
    def adopt(self, weight: Tensor, before: Tensor) -> None:
        """Go on from a weight that somebody has put in the place of the one that the layer works with.

        What of it differs inside of the protected basis is dropped, then or at the end.

        Args:
            weight: the layer's weight, with the new values.
            before: its values before.
        """
        self._held = None
        rows = self.form.side.rows(exact(before))
        change = self.form.side.rows(exact(weight)) - rows
        if self._expected is not None:
            if not self._is_steady(weight):
                form = self.form._replace(passes=EXACT_PASSES, damped=0)
                change = drop(change, exact(self.basis), None, self._is_closed(), form)
                weight.data.copy_(self.form.side.weight(rows + change, self.form.shape))
            return
        if self.update is None:
            self._anchor_loose(weight)
            return
        # Along the normalised columns of U: where step sizes are 0, nothing may move.
        size = torch.linalg.vector_norm(exact(self.basis), dim=1, keepdim=True)
        basis = exact(self.basis) / size.clamp(min=torch.finfo(torch.float32).tiny)
        weight.data.copy_(self.form.side.weight(rows + (change @ basis) @ basis.mT, self.form.shape))
        self.update.data.zero_()

    def _anchor_loose(self, weight: Tensor) -> None:
        """Where columns are closed in part, steps count from this weight on."""
        if self._scaled and self.anchor is not None:
            closed = self._is_closed().unsqueeze(1) > 0
            self.anchor.data.copy_(torch.where(closed, self.anchor, self._anchored(weight)))

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the layer works with, computed in float64 and rounded once."""
        trained, basis, anchor, mask = self.parts(weight)
        if anchor is None:
            return weight.detach()
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
            "expected": stored(self._expected),
            "update": stored(self.update),
            "weight": stored(weight) if self.written_out else None,
            "steady": [self.form.steady, self._looks],
            "flat": self.flat,
        }

    def check(self, stored: Stored, weight: Tensor) -> dict[str, Any]:
        """The state that :meth:`state_dict` returned, which fits this reservation; nothing is changed.

        Raises:
            StateError: a value is missing, or of another type, shape or dtype.
        """
        start, basis, anchor, expected, update, kept, steady, flat = stored.fields(
            "start", "basis", "anchor", "expected", "update", "weight", "steady", "flat"
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
        whole, watched = self.update is None, self._fine and bool(holds.value)
        rows, dtype = self.form.side.rows(weight).shape[1], precision(self.basis, weight)
        for item, wanted, shape in (
            (anchor, whole and not watched, (groups, rows, count)),
            (expected, whole and watched, (groups, rows, 1)),
        ):
            if wanted:
                item.tensor(shape, (dtype,), finite=False)
            elif item.value is not None:
                item.refuse("None, since the layer trains " + ("its weight in another way" if whole else "another one"))
        if self.update is not None:
            update.tensor(self.update.shape, (self.update.dtype,), finite=False)
        elif update.value is not None:
            update.refuse("None, since the layer trains its weight")
        if self.update is not None or ((self._scaled or basis.value is not None) and not flat.value):
            kept.tensor(weight.shape, (weight.dtype,), finite=False)
        elif kept.value is not None:
            kept.refuse("None, since the model's own state holds the weight")
        return dict(stored.value)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], weight: Tensor) -> None:
        """Go on with stored tensors that were checked; the weight gets its stored values where there are any."""
        self._start, self._scaled = state["start"], self._scaled or state["basis"] is not None
        steady, self._looks = state["steady"]
        self.flat = state["flat"]
        self.form = self.form._replace(steady=steady)
        if state["basis"] is not None:
            self.basis = Parameter(state["basis"].to(weight.device), requires_grad=False)
            self.form, self.mask, self._vector = self.form._replace(passes=1, damped=0), None, None
        for name in ("anchor", "expected"):
            found = state[name]
            found = None if found is None else Parameter(found.to(weight.device), requires_grad=False)
            setattr(self, name if name == "anchor" else "_expected", found)
        for own, name in ((self.update, "update"), (weight.data, "weight")):
            if own is not None and state[name] is not None:
                own.copy_(state[name])

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Drop what an optimiser has added to the weight inside of the protected basis: no output changes.

        A truncated reservation has nothing to drop, and a damped one keeps it until the end.
        """
        if self.anchor is not None and not self.written_out and fingerprint(weight) != self._start:
            # Through .data, so that a graph that saved the weight can still run backward.
            weight.data.copy_(self.effective(weight))

    @torch.no_grad()
    def fold(self, weight: Tensor) -> None:
        """Write the effective weight into the layer's own; one that was not trained stays bit for bit."""
        if self._held is not None and self.stepping:  # the step has failed half way
            self.after_step(weight)
        if self._expected is not None and not self._is_steady(weight):
            self._say_moved("")
            self._expected = None
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
                if not is_sum(optimizer, group) or momentum is not None:
                    return False
                found = True
    return found


def steps_are_known(optimizers: Iterable[torch.optim.Optimizer], weight: Tensor) -> bool:
    """Whether a weight is moved by optimisers of torch alone, which do so in ``step()`` and nowhere else."""
    holding = [
        optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(weight is held for held in group["params"])
    ]
    return bool(holding) and all(map(is_known, holding))


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is one of :mod:`torch.optim`."""
    return type(optimizer).__module__.startswith("torch.optim.")


def is_sum(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the next step on a group's parameters is a sum of their gradients, as far as its kind tells."""
    return type(optimizer) is torch.optim.SGD and not group["weight_decay"]


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
