"""What of one layer's weight may change during an experience: only what its memory does not protect."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_lance.continual.memory import LayerMemory
from lightning_lance.errors import LanceWarning
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.reserved import (
    Form,
    Parts,
    drop,
    effective_weight,
    full_precision,
    outside,
    overlap_of,
    precision,
)
from lightning_lance.tensors.checked import Stored

WATCH_STEPS = 32
"""A steady reservation is looked at every so many steps."""

EXACT_PASSES = 7
"""Along a rounded basis, each of which leaves less than 1% of the last one: so many reach float64."""

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
    ``W M`` is noted before them (:meth:`before_step`), and made what it was after them (:meth:`end_step`). In
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
        steps: those on the weight that are under way, by the optimiser: a step may be part of another one.
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
        stored = whole and memory.has_columns and memory.importance is None  # as it is: not twice in memory
        damped = memory.steps.shape[1] if stored and memory.steps is not None else 0
        passes = 1
        if stored and memory.rounded:
            passes = EXACT_PASSES if memory.dtype == torch.float64 else passes_along(memory.stored.dtype)
        self.form = Form(side, weight.shape, whole, steady or self.flat, passes, damped)
        self._looks = 0
        self.steps: list[int] = []
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
        self.overlap: Parameter | None = None
        # Coarser columns overlap too much; a linear layer projects few rows mostly; and it is to be small beside M.
        small = 2 * self.basis.shape[2] <= self.basis.shape[1]
        if passes == 2 and not memory.scaled and side.kernel and small:
            self.overlap = Parameter(overlap_of(self.basis.detach(), self.mask), requires_grad=False)
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
        if self._expected is None or self.steps:
            return
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
            return Parts(weight, self.basis, self.anchor, self.mask, self.overlap)
        return Parts(self.update, self.basis, weight)

    @torch.no_grad()
    def before_step(self, weight: Tensor, sums: bool, momentum: Tensor | None = None) -> None:
        """Note ``W M``, until :meth:`end_step`, unless the step is a sum of gradients and these are outside of ``M``.

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
        if outside.has(grad, self.basis):
            return True
        part = torch.linalg.vector_norm(self._seen(grad))
        return bool(part <= OUTSIDE_TOLERANCE * torch.linalg.vector_norm(grad))

    def begin_step(self, step: int) -> None:
        """An optimiser's step on the weight begins, perhaps within another's; one that is under way was broken off."""
        if step in self.steps:
            del self.steps[self.steps.index(step) :]
        self.steps.append(step)

    def end_step(self, step: int, weight: Tensor) -> None:
        """It is done: drop of the weight what may not move. What was noted is kept while an outer step goes on."""
        self._after_step(weight)
        if step in self.steps:
            del self.steps[self.steps.index(step) :]
        if not self.steps:
            self._held = None

    @torch.no_grad()
    def _after_step(self, weight: Tensor) -> None:
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
        trained, basis, anchor, mask, _ = self.parts(weight)
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
            self.overlap = None
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
        if self._held is not None and self.steps:  # the step has failed half way
            self._after_step(weight)
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


def passes_along(stored: torch.dtype) -> int:
    """Passes along a basis that reach float32: in float16 each leaves a thousandth of the last one, in bfloat16 1%."""
    return 2 if torch.finfo(stored).eps < 2**-9 else 3


def fingerprint(*tensors: Tensor) -> float:
    """A number that changes when values do."""
    return sum(float(exact(tensor).sum()) for tensor in tensors)


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
