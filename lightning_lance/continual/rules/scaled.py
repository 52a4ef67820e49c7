"""Scaled gradient projection: a protected direction closes as far as it mattered.

Saha & Roy, *Continual Learning with Scaled Gradient Projection*, AAAI 2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lance.continual.basis import Moments
from lightning_lance.continual.leftover import energy_along
from lightning_lance.continual.memory import LayerMemory
from lightning_lance.continual.rules.rule import Layer, Now, Rule
from lightning_lance.ops.features import FeatureSide
from lightning_lance.tensors.checked import Stored

SCALE = 10.0
"""Coefficient α; the paper's value for CIFAR-100."""


class Scaled(Rule):
    """A step along the protected direction ``m`` is multiplied with ``1 - λ``, ``λ`` its importance in [0, 1].

    The gradient and the step are both projected, so that plain gradient descent moves by the square of that.

    Of an experience with singular values ``σ``, the importance is ``(α + 1) σ / (α σ + max σ)`` (eq. 6); those of all
    experiences are summed, up to 1. What an experience may have forgotten afterwards is what ``λ < 1`` lets through.
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._importance: dict[str, Tensor] = {}

    def memory(self, side: FeatureSide, label: str, dtype: torch.dtype, device: torch.device, own: bool) -> LayerMemory:
        return LayerMemory(side.width, side.groups, label, dtype, device, compact=False)

    def directions(self, layers: Mapping[str, Layer], now: Now) -> None:
        for name, layer in layers.items():
            layer.memory.reserve()
            if name in self._importance:
                layer.memory.scale(self._importance[name])

    def consolidate(self, name: str, layer: Layer, now: Now) -> None:
        super().consolidate(name, layer, now)
        assert layer.moments is not None
        groups = [Moments.of(found) for found in layer.moments.groups()]
        shares = [energy_along(seen, basis) for seen, basis in zip(groups, layer.memory.protected, strict=True)]
        values = torch.stack(shares).sqrt()
        largest = values.amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        importance = (SCALE + 1) * values / (SCALE * values + largest)
        before = self._importance.get(name)
        if before is not None:
            importance[:, : before.shape[1]] += before
        self._importance[name] = importance.clamp(max=1.0)

    @property
    def bytes(self) -> int:
        return sum(found.nbytes for found in self._importance.values())

    def state_dict(self) -> dict[str, Any]:
        return {"importance": dict(self._importance)}

    def check_state(self, state: Stored, memories: Mapping[str, LayerMemory]) -> None:
        (importance,) = state.fields("importance")
        for name, item in importance.named():
            memory = memories.get(name)
            if memory is None or memory.compact:
                item.refuse("importances of a layer that stores columns")
            found = item.tensor((memory.groups, max(memory.counts)), (torch.float64,))
            if bool(((found < 0.0) | (found > 1.0)).any()):
                item.refuse(
                    "importances from 0 to 1", f"a tensor from {float(found.min()):.3g} to {float(found.max()):.3g}"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._importance = dict(state["importance"])
