"""Which change would let a run keep less, and about how much."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_lance.compression.config import BITS, LanceConfig
from lightning_lance.compression.frozen_norms import frozen_norms
from lightning_lance.compression.saved_bytes import Holder, SavedBytes
from lightning_lance.compression.store import Bits
from lightning_lance.compression.surgery import plan
from lightning_lance.compression.truncation import saves_little
from lightning_lance.errors import PlanError
from lightning_lance.subspaces.ranks import compact_batch_rank
from lightning_lance.tensors.rounding import FEWEST, kept_bytes
from lightning_lance.tensors.units import format_bytes

WORTH = 0.05
"""Fraction of what is kept below which a change is not worth a line."""

MOST = 2

LOWER: dict[Any, Any] = {None: "auto", 8: 4, 4: 2, "auto": 2}
"""The next fewer ``bits``."""

WHY: dict[Any, str] = {
    2: "where gradients of weights alone need it",
    4: "in place of 8",
    "auto": "gradients are then rounded",
}


@dataclass(frozen=True)
class Change:
    """A change of the run.

    Attributes:
        saves: bytes that it keeps less, about.
        text: what to do.
    """

    saves: int
    text: str

    def __str__(self) -> str:
        return f"{format_bytes(self.saves):>7} less: {self.text}"


def advice(
    kept: SavedBytes, config: LanceConfig, model: nn.Module, projected: Collection[str], now: Bits
) -> list[Change]:
    """The one or two changes that would help most, the best one first; none that does not apply.

    Args:
        kept: what a step keeps.
        config: the options with which it did.
        model: the model.
        projected: names of the layers whose inputs the rank says to project.
        now: bits in which the step kept it, which may be fewer than the options say.
    """
    holders = [in_bits(holder, now, config.kept_bits) for holder in kept.holders]
    kept = SavedBytes(sum(holder.bytes for holder in holders), holders)
    found = [_micro_batches(kept, model), _fewer_bits(kept, config), _frozen_norms(kept, model)]
    if not projected:
        found.append(_compact(kept, config, model))
    worth = [change for change in found if change is not None and change.saves > WORTH * kept.total]
    return sorted(worth, key=lambda change: -change.saves)[:MOST]


def in_bits(holder: Holder, now: Bits, then: Bits) -> Holder:
    """What is kept, if it were rounded to other bits than now; what is not rounded stays as it is."""
    before, after = (now.weight, then.weight) if holder.for_weight else (now.other, then.other)
    if holder.bits is None or holder.bits > 8 or before is None or after is None:
        return holder
    width = min(max(holder.bits * after // before, 2), 8)
    sizes = [kept_bytes(FEWEST, 4, bits) for bits in (holder.bits, width)]
    return replace(holder, bytes=holder.bytes * sizes[1] // sizes[0], bits=width)


def _fewer_bits(kept: SavedBytes, config: LanceConfig) -> Change | None:
    lower = LOWER.get(config.bits)
    if lower is None:
        return None
    if config.bits is None:
        floating = [h for h in kept.holders if h.dtype.is_floating_point and h.op != "elsewhere"]
        bits = BITS[lower].other
        saves = sum(h.bytes - kept_bytes(h.bytes // h.dtype.itemsize, h.dtype.itemsize, bits) for h in floating)
    else:
        saves = sum(h.bytes - in_bits(h, config.kept_bits, BITS[lower]).bytes for h in kept.holders)
    return Change(saves, f"bits={lower!r}, {WHY[lower]}")


def _frozen_norms(kept: SavedBytes, model: nn.Module) -> Change | None:
    norms = [name for name, module in frozen_norms(model).items() if module.training]
    many = "batch norm" if len(norms) == 1 else "batch norms"
    text = f"freeze_norms=True, {len(norms)} {many} with frozen weights"
    saves = sum(holder.bytes for holder in kept.holders if holder.module in norms and not holder.shared)
    return Change(saves, text) if norms else None


def _micro_batches(kept: SavedBytes, model: nn.Module) -> Change | None:
    batch = _batch(kept)
    if batch < 2:
        return None
    saves = sum(holder.bytes for holder in kept.holders if holder.shape and holder.shape[0] % batch == 0) // 2
    trains = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    text = "half the batch, accumulate_grad_batches=2"
    return Change(saves, f"{text} (batch norms see half)" if trains else text)


def _compact(kept: SavedBytes, config: LanceConfig, model: nn.Module) -> Change | None:
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    batch = _batch(kept)
    columns = compact_batch_rank(batch)
    if not frozen or columns >= batch or config.memory_budget is not None or config.rank == "compact":
        return None
    try:
        names = {entry.name for entry in plan(model, replace(config, rank="compact")).entries}
    except PlanError:
        return None
    # A sample that is one row is kept whole.
    inputs = sum(h.bytes for h in kept.holders if h.for_weight and h.module in names and len(h.shape) > 2)
    if saves_little(inputs, kept.total, config):
        return None
    return Change(inputs * (batch - columns) // batch, 'rank="compact", for fine-tuning')


def _batch(kept: SavedBytes) -> int:
    """Size of the batch, by what is kept of it; tokens may be rows of their own."""
    sizes = [h.shape[0] for h in kept.holders if len(h.shape) > 1 and h.bytes * 100 > kept.total]
    return min(sizes, default=1)
