"""The batch mode of a layer: sums over groups of samples, which need no learning, or a factor learned as published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lance.subspaces.ranks import ModeRank, compact_batch_rank
from lightning_lance.tensors.checked import LARGEST, Stored
from lightning_lance.tensors.linalg import contrast_scale, group_rotation, sample_groups

ROUNDING = 0.01
"""How far a stored fraction of an energy may be above 1: both sums were rounded."""


@dataclass(frozen=True)
class BatchRule:
    """How many groups of samples represent a batch of any size.

    Attributes:
        rank: an int, an energy, ``"compact"`` or ``"full"``.
        unbiased: weight the contrasts so that the gradient estimate has no bias; needs random groups.
        constant_energy: measured fraction of the input's energy in the constant direction. The contrasts
            share the rest evenly, since the samples of a batch are exchangeable; this turns an energy into
            a rank for any batch size without a Gram matrix of the batch mode.
    """

    rank: ModeRank = "full"
    unbiased: bool = True
    constant_energy: float = 0.0

    unconditional: ClassVar[bool] = False
    """Whether inputs are projected where core and factors are larger than the input itself."""

    def columns(self, size: int) -> int:
        """Batch rank at a batch size; the size itself where the mode is kept whole."""
        if self.rank == "full":
            return size
        if self.rank == "compact":
            rank = compact_batch_rank(size)
        elif isinstance(self.rank, int):
            rank = self.rank
        elif self.rank >= 1.0:
            return size
        elif self.constant_energy > self.rank:
            rank = 1
        else:
            share = (1.0 - self.constant_energy) / max(size - 1, 1)
            rank = 1 + math.floor((self.rank - self.constant_energy) / share) + 1 if share > 0 else 1
        return min(max(rank, 2 if self.unbiased else 1), size)

    def contrast_scale(self, size: int) -> float:
        """Weight of the contrasts in the weight gradient; 1 where a bias is accepted."""
        return contrast_scale(size, self.columns(size)) if self.unbiased else 1.0

    def projection(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """``rotation`` and ``groups`` of :class:`~lightning_lance.ops.factors.Factors`, which are those of all batches.

        An unbiased mode puts the groups in an order that is drawn for each batch.

        Args:
            size: of the batch.
            dtype: of the rotation.
            device: of both.
        """
        columns = self.columns(size)
        if columns >= size:
            return None, None
        return group_rotation(size, columns, dtype, device), sample_groups(size, columns, device)

    def factors(self) -> Iterator[Tensor]:
        """Tensors that are this layer's own."""
        return iter(())

    def to(self, device: torch.device, dtype: torch.dtype) -> BatchRule:
        """The rule with those on a device and in a dtype."""
        return self

    def formula_bytes(self, size: int, itemsize: int) -> int:
        """Bytes kept for one call beside the core: the group of each sample (int32), where groups are random."""
        return 4 * size if self.unbiased and self.columns(size) < size else 0

    def state(self) -> list[Any]:
        """Plain values and CPU tensors."""
        return [self.rank, self.unbiased, self.constant_energy]


@dataclass(frozen=True)
class LearnedBatch(BatchRule):
    """A batch mode with a factor of its own, for batches of the size that it was learned from (LANCE, as published).

    A batch of another size, such as the last one of an epoch, has no such factor: its batch mode is kept whole.

    Attributes:
        factor: ``(B, r)`` with orthonormal columns; ``None``: the whole mode.
    """

    factor: Tensor | None = field(default=None, compare=False)

    unconditional: ClassVar[bool] = True

    def columns(self, size: int) -> int:
        return size if self.factor is None or size != self.factor.shape[0] else self.factor.shape[1]

    def projection(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        return (None if self.factor is None or self.columns(size) >= size else self.factor.T), None

    def factors(self) -> Iterator[Tensor]:
        if self.factor is not None:
            yield self.factor

    def to(self, device: torch.device, dtype: torch.dtype) -> LearnedBatch:
        return self if self.factor is None else replace(self, factor=self.factor.to(device, dtype).contiguous())

    def formula_bytes(self, size: int, itemsize: int) -> int:
        return 0 if self.factor is None or self.columns(size) >= size else self.factor.numel() * itemsize

    def state(self) -> list[Any]:
        return [*super().state(), None if self.factor is None else self.factor.detach().cpu()]


def stored_rule(batch: Stored) -> BatchRule:
    """What :meth:`BatchRule.state` returned, checked.

    Raises:
        StateError: a value is missing, of another type, or out of range.
    """
    learned = isinstance(batch.value, (list, tuple)) and len(batch.value) == 4
    rank, unbiased, constant, *factor = batch.items(4 if learned else 3)
    values = _stored_rank(rank), unbiased.flag(), constant.number(0.0, 1.0 + ROUNDING)
    return LearnedBatch(*values, stored_factor(factor[0], None)) if learned else BatchRule(*values)


def _stored_rank(rank: Stored) -> ModeRank:
    value = rank.value
    if isinstance(value, str) and value in ("full", "compact"):
        return value  # type: ignore[return-value]
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
    if not whole and not (isinstance(value, float) and 0.0 < value <= 1.0):
        rank.refuse("'compact', 'full', an int of at least 1, a float in (0, 1]")
    return value  # type: ignore[no-any-return]


def stored_factor(stored: Stored, size: int | None) -> Tensor | None:
    """A factor ``(size, r)`` with orthonormal columns, or ``None``."""
    if stored.value is None:
        return None
    found = stored.tensor((size, None))
    if not 1 <= found.shape[1] <= found.shape[0]:
        stored.refuse("a factor with at least one column and no more than rows")
    stored.orthonormal(found)
    return found
