"""Random sample orders from a counter, so that a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import torch
from torch import Tensor

_MIX = 0x9E3779B97F4A7C15  # golden-ratio increment of SplitMix64: neighbouring counts give unrelated seeds


class SampleOrder:
    """Source of one random permutation per call, shared by the layers of a model.

    The whole state is ``(seed, count)``: no global generator is touched, and copying, saving and restoring it
    is exact. It lives in a tensor so that compiled graphs can advance it.

    Args:
        seed: an int of 64 bits.

    Attributes:
        state: seed and count, int64 ``(2,)``.
        offset: number of the process among several, each of which draws orders of its own.
    """

    def __init__(self, seed: int = 0) -> None:
        self.state = torch.tensor([seed, 0], dtype=torch.int64, device="cpu")
        self.offset = 0

    def draw(self, size: int, device: torch.device) -> Tensor:
        """A uniformly random permutation of ``range(size)``, int32, on ``device``."""
        if torch.compiler.is_compiling():
            order: Tensor = draw_order(self.state, size, self.offset)
        else:
            order = _draw(self.state, size, self.offset)
        return order if device.type == "cpu" else order.to(device, non_blocking=True)


def _draw(state: Tensor, size: int, offset: int) -> Tensor:
    seed, count = state.tolist()
    seed += offset * 0x5851F42D4C957F2D
    state[1] += 1
    mixed = (seed * 0x2545F4914F6CDD1D + (count + 1) * _MIX) & 0x7FFF_FFFF_FFFF_FFFF
    generator = torch.Generator("cpu").manual_seed(mixed)
    return torch.randperm(size, generator=generator, dtype=torch.int32, device="cpu")


@torch.library.custom_op("lightning_lance::draw_order", mutates_args=("state",))
def draw_order(state: Tensor, size: int, offset: int) -> Tensor:
    """:func:`_draw` as an operator that compiled graphs can call without a break."""
    return _draw(state, size, offset)


@draw_order.register_fake
def _(state: Tensor, size: int, offset: int) -> Tensor:
    return state.new_empty(size, dtype=torch.int32)
