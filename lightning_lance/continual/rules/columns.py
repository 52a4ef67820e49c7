r"""Columns of one's own: each experience may move a few protected directions, and keeps that change for itself.

The directions that matter most to an experience are protected first, by the experiences before it, and what is left
free late in a stream memorises. Where an experience is known when it is evaluated, as it is with a head of its own, it
can have a few columns of its own there. With ``M`` protected in a layer of weight ``W`` (``O x K``), ``S`` the second
moments of its inputs before the experience, and

.. math:: v_j = m_j^T S m_j / \operatorname{tr} S,

the columns with the largest :math:`v_j / O` over all layers are opened, ``J``, until they hold a fraction of the
weights. Training moves everything outside of ``M̄``, which is ``M`` without ``J``. Afterwards
:math:`A = (W_{eff} - W) M_J` is stored for this experience alone, :math:`W \leftarrow W_{eff} - A M_J^T`, so that
``W M`` is what it was and nothing earlier moves. The experience is evaluated with :math:`W + A M_J^T`. Where the stored
``M`` is rounded, and orthonormal no longer, the dual vectors of the columns stand for ``M_J`` on the right.

Related: scale matrices of *trust region gradient projection* (Lin et al., TRGP, ICLR 2022, eq. 4), conceptors of
CODE-CL (Apolinario, Choudhary & Roy, arXiv 2411.15235).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lance.continual.leftover import energy_along
from lightning_lance.continual.memory import LayerMemory, Stage
from lightning_lance.continual.rules.rule import Layer, Now
from lightning_lance.continual.rules.threshold import Threshold
from lightning_lance.continual.stored_memory import read_columns
from lightning_lance.ops.features import FeatureSide
from lightning_lance.tensors.checked import Stored

STORED_COLUMNS = torch.bfloat16
"""Dtype of columns, whose numbers may be of any size."""

STORED_BASIS = torch.float16
"""Dtype of the bases that they refer to: orthonormal columns, with no number beyond 1."""

UNDAMPED = 0.1
"""Share of the energy that is not protected in directions that damping leaves alone."""

DAMPED = 1 / 6
"""Share of a layer's directions that it damps at most: each takes as much as one that is protected."""


class Own(NamedTuple):
    """What one experience has for itself in one layer.

    Attributes:
        indices: columns ``J`` of the protected basis, in each group.
        values: ``A``, shape ``(groups, rows, j)``; a group with fewer columns ends in zeros.
        counts: columns that the basis had, in each group.
    """

    indices: list[list[int]]
    values: Tensor
    counts: list[int]


class Columns(Threshold):
    """The threshold rule, and a few protected directions that each experience moves for itself.

    An experience whose name is known from an earlier one trains by the threshold rule alone, with the columns that
    this name has: they belong to both.
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._own: dict[str, dict[str, Own]] = {}
        self._last: str | None = None
        # Of the running experience: C = W M_J in each layer that has opened columns.
        self._anchors: dict[str, Tensor] = {}
        # ... and the columns that its name has from before.
        self._merged: dict[str, Own] = {}

    def memory(self, side: FeatureSide, label: str, dtype: torch.dtype, device: torch.device, own: bool) -> LayerMemory:
        return LayerMemory(side.width, side.groups, label, dtype, device, not own, STORED_BASIS if own else None)

    def damped(self, layer: Layer, now: Now) -> tuple[float, int | None]:
        return UNDAMPED * (1.0 - self.threshold(now)), round(DAMPED * layer.memory.width)

    def needs_moments(self, now: Now) -> bool:
        return super().needs_moments(now) or self._opens(now)

    def owns(self, now: Now) -> bool:
        return self._opens(now)

    def _opens(self, now: Now) -> bool:
        return now.own is not None and now.own not in self._own and self.options.columns > 0.0 and now.experience > 0

    def directions(self, layers: Mapping[str, Layer], now: Now) -> None:
        super().directions(layers, now)
        self._anchors, self._merged = {}, {}
        for name, own in self._of(now.own).items():
            if name in layers:  # go on from what the name has
                _add(layers[name], change(layers[name], own))
                self._merged[name] = own
        if not self._opens(now):
            return
        for name, chosen in self._choose(layers).items():
            layer = layers[name]
            layer.memory.open(chosen)
            self._anchors[name] = _products(layer, chosen)
            before = self._of(self._last).get(name)
            if before is not None:  # a start that has something to do with the new task
                _add(layer, change(layer, _taken_over(before, chosen, layer.memory.counts)))

    def _of(self, own: str | None) -> dict[str, Own]:
        return {} if own is None else self._own.get(own, {})

    def _choose(self, layers: Mapping[str, Layer]) -> dict[str, list[list[int]]]:
        """Columns to open, by energy of the coming experience for each number that they take."""
        found: list[tuple[float, str, int, int]] = []
        budget = 0.0
        for name, layer in layers.items():
            budget += self.options.columns * layer.weight.numel()
            if layer.moments is None or not layer.memory.has_columns or not layer.moments.count:
                continue
            groups = layer.moments.groups()
            total = sum(seen.total for seen in groups) or 1.0
            bases = layer.memory.protected
            for group, (seen, count) in enumerate(zip(groups, layer.memory.counts, strict=True)):
                shares = energy_along(seen, bases[group, :, :count]) * (seen.total / total)
                found += [(float(v) / layer.rows, name, group, j) for j, v in enumerate(shares)]
        chosen: dict[str, list[list[int]]] = {}
        for _, name, group, column in sorted(found, key=lambda entry: -entry[0]):
            budget -= layers[name].rows
            if budget < 0.0:
                break
            chosen.setdefault(name, [[] for _ in layers[name].memory.counts])[group].append(column)
        return {name: [sorted(columns) for columns in groups] for name, groups in chosen.items()}

    def freezes(self, layer: Layer, now: Now) -> bool:
        chosen = layer.memory.stage is Stage.CALIBRATED
        may_open = self._opens(now) and layer.memory.has_columns
        return (layer.memory.opened is None if chosen else not may_open) and super().freezes(layer, now)

    def detach(self, layers: Mapping[str, Layer], now: Now) -> None:
        for name, own in self._merged.items():
            _add(layers[name], -change(layers[name], own))
        self._merged = {}
        if now.own is None or now.own in self._own:
            return
        stored = {}
        for name, anchor in self._anchors.items():
            layer = layers[name]
            assert layer.memory.opened is not None
            own = Own(layer.memory.opened, _products(layer, layer.memory.opened) - anchor, list(layer.memory.counts))
            _add(layer, -change(layer, own))
            stored[name] = own._replace(values=own.values.to(STORED_COLUMNS))
        self._own[now.own], self._last, self._anchors = stored, now.own, {}

    def abandon(self, layers: Mapping[str, Layer]) -> None:
        for name in {**self._anchors, **self._merged}:
            layer = layers[name]
            part = self.not_shared(name, layer, layer.side.rows(layer.weight.detach()).double())
            assert part is not None
            _add(layer, -part)
        self._anchors, self._merged = {}, {}

    def own_change(self, name: str, layer: Layer, own: str | None) -> Tensor | None:
        found = self._of(own).get(name)
        return None if found is None else change(layer, found)

    def not_shared(self, name: str, layer: Layer, rows: Tensor) -> Tensor | None:
        if name in self._merged:
            return change(layer, self._merged[name]).to(rows)
        if name not in self._anchors:
            return None
        assert layer.memory.opened is not None
        opened, memory = layer.memory.opened, layer.memory
        values = _stacked([part @ found for part, found in zip(rows, memory.columns(opened), strict=True)])
        return change(layer, Own(opened, values - self._anchors[name], memory.counts))

    def own_columns(self, own: str | None) -> dict[str, tuple[int, int]]:
        return {name: (sum(map(len, found.indices)), found.values.nbytes) for name, found in self._of(own).items()}

    @property
    def names(self) -> list[str]:
        return list(self._own)

    @property
    def bytes(self) -> int:
        return sum(own.values.nbytes for found in self._own.values() for own in found.values())

    def state_dict(self) -> dict[str, Any]:
        own = {
            key: {name: [found.indices, found.values.cpu(), found.counts] for name, found in layers.items()}
            for key, layers in self._own.items()
        }
        return {"own": own, "last": self._last}

    def check_state(self, state: Stored, memories: Mapping[str, LayerMemory]) -> None:
        own, last = state.fields("own", "last")
        experiences = dict(own.named())
        rows: dict[str, int] = {}
        for layers in experiences.values():
            for name, item in layers.named():
                _check(item, name, memories, rows)
        if last.value is not None and last.text() not in experiences:
            last.refuse(f"None or one of {', '.join(map(repr, experiences)) or 'no names'}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._own = {key: {name: Own(*found) for name, found in layers.items()} for key, layers in state["own"].items()}
        self._last, self._anchors, self._merged = state["last"], {}, {}

    def running_state(self) -> dict[str, Any]:
        return {"anchors": dict(self._anchors), "merged": {name: list(own) for name, own in self._merged.items()}}

    def check_running(
        self, state: Stored, memories: Mapping[str, LayerMemory], opened: Mapping[str, list[list[int]]]
    ) -> None:
        anchors, merged = state.fields("anchors", "merged")
        rows = {name: found for name in memories if (found := self.rows(name)) is not None}
        held = dict(anchors.named())
        if held.keys() != opened.keys():
            anchors.refuse(f"entries of {', '.join(opened) or 'no layer'}", f"a dict of {', '.join(held) or 'nothing'}")
        for name, item in held.items():
            widest = max(map(len, opened[name]))
            item.tensor((memories[name].groups, rows.get(name), widest), (torch.float64,))
        for name, item in merged.named():
            _check(item, name, memories, rows)

    def rows(self, name: str) -> int | None:
        return next((layers[name].values.shape[1] for layers in self._own.values() if name in layers), None)

    def resume(self, layers: Mapping[str, Layer], state: dict[str, Any]) -> None:
        self._anchors = {name: found.clone() for name, found in state["anchors"].items()}
        self._merged = {name: Own(*own) for name, own in state["merged"].items()}


def _check(stored: Stored, name: str, memories: Mapping[str, LayerMemory], rows: dict[str, int]) -> None:
    """Refuse what is not an experience's part in a layer; ``rows`` of the layer's weight are noted where not known."""
    memory = memories.get(name)
    if memory is None or not memory.has_columns:
        stored.refuse("columns of a layer that stores some")
    indices, values, counts = stored.items(3)
    numbers = [item.integer(0, held) for item, held in zip(counts.items(memory.groups), memory.counts, strict=True)]
    widest = max(map(len, read_columns(indices, numbers)))
    found = values.tensor((memory.groups, rows.get(name), widest), (STORED_COLUMNS,))
    rows.setdefault(name, found.shape[1])


def change(layer: Layer, own: Own) -> Tensor:
    """What the columns add to a weight, shape ``(groups, rows, K)``, float64 on the CPU."""
    duals = layer.memory.duals(own.indices, own.counts)
    return torch.stack(
        [v[:, : d.shape[1]] @ d.T for v, d in zip(own.values.to("cpu", torch.float64), duals, strict=True)]
    )


def _products(layer: Layer, indices: list[list[int]]) -> Tensor:
    """``W M_J``, shape ``(groups, rows, j)``, float64 on the CPU."""
    rows = layer.side.rows(layer.weight.detach()).to("cpu", torch.float64)
    return _stacked([part @ found for part, found in zip(rows, layer.memory.columns(indices), strict=True)])


def _stacked(products: list[Tensor]) -> Tensor:
    """Pieces ``(rows, j)`` of different widths as one tensor, with zeros behind the narrower ones."""
    widest = max(found.shape[1] for found in products)
    return torch.stack([torch.nn.functional.pad(found, (0, widest - found.shape[1])) for found in products])


def _taken_over(own: Own, indices: list[list[int]], counts: list[int]) -> Own:
    """Those of an experience's columns that another one has too, in a basis that has grown."""
    found = torch.zeros(own.values.shape[0], own.values.shape[1], max(map(len, indices)), dtype=own.values.dtype)
    for group, (had, chosen) in enumerate(zip(own.indices, indices, strict=True)):
        for position, column in enumerate(chosen):
            if column in had:
                found[group, :, position] = own.values[group, :, had.index(column)]
    return Own(indices, found, list(counts))


@torch.no_grad()
def _add(layer: Layer, rows: Tensor) -> None:
    """Add ``(groups, rows, K)`` to the weight, rounded once."""
    weight = layer.weight
    exact = weight.detach().to("cpu", torch.float64) + layer.side.weight(rows.cpu(), weight.shape)
    weight.data.copy_(exact)
