"""What a layer stores of its protected basis, checked before any of it is used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.tensors.checked import FLOATS, Stored

ADVICE = "What it protected cannot be rebuilt: load another checkpoint."
"""What to do about a bad value in a stored stream."""

STAGES = ("empty", "calibrated", "training", "consolidated")

_LOOSE = 0.1
"""How far inner products of directions beside a basis may be from those of orthonormal ones: steps stay steps."""

_ROUNDING = -1e-3
"""Sums of energies, each experience's 1 in all, may be below 0 by rounding."""


class StoredMemory(NamedTuple):
    """The parts of a stored memory that were found to be whole; see :class:`~lightning_lance.continual.LayerMemory`."""

    stage: str
    basis: Tensor
    is_free: bool
    compact: bool
    counts: list[int]
    soft: Tensor
    energies: Tensor
    rest: list[float]
    reserved: Tensor | None


def read_memory(
    stored: Stored, groups: int, width: int, dtype: torch.dtype, stages: Collection[str] = STAGES
) -> StoredMemory:
    """Read what ``LayerMemory.state_dict`` returned, or raise before anything is changed.

    Args:
        stored: the state.
        groups: of the layer.
        width: length of its feature vectors.
        dtype: of its bases.
        stages: what the state may be.

    Raises:
        StateError: a value is missing, of another type, shape or dtype, not finite, or bases are not orthonormal.
    """
    stage, basis, is_free, compact, counts, soft, energies, rest, reserved = stored.fields(*StoredMemory._fields)
    free = is_free.flag()
    if free and not compact.flag():
        is_free.refuse("False where 'compact' is False")
    numbers = [item.integer(0, width) for item in counts.items(groups)]
    if stage.text(stages) == "empty" and any(numbers):
        counts.refuse("zeros in stage 'empty'", str(numbers))
    held = [width - number for number in numbers] if free else numbers
    matrix = basis.tensor((groups, width, max(held)), (dtype,) if compact.flag() else tuple(FLOATS.values()))
    for part, count in zip(matrix, held, strict=True):
        basis.orthonormal(part[:, :count])
        if part[:, count:].any():
            basis.refuse(f"zeros behind the {count} columns of a group")
        if matrix.dtype != dtype:  # they are made orthonormal wherever they are used
            wide = part[:, :count].double()
            if torch.linalg.cholesky_ex(wide.T @ wide).info:
                basis.refuse("columns that are independent of each other")
    beside = soft.tensor((groups, width, 0 if free else None), (dtype,))
    known = energies.tensor((groups, max(held) if free else beside.shape[2]), (torch.float64,))
    if bool((known < _ROUNDING).any()):
        energies.refuse("energies of at least 0", f"a tensor with {float(known.min()):.3g}")
    for part in beside:
        soft.orthonormal(part, zeros=True, off=_LOOSE)
    for part, protected in zip(beside, matrix, strict=True):
        if part.numel() and protected.numel() and float((part.double().T @ protected.double()).abs().max()) > _LOOSE:
            soft.refuse("directions outside of the basis")
    following = None
    if reserved.value is not None:
        following = reserved.tensor((groups, width, None), (dtype,))
    tails = [item.number(_ROUNDING) for item in rest.items(groups)]
    return StoredMemory(
        stage.text(), matrix, free, compact.flag(), numbers, beside.clone(), known.clone(), tails, following
    )


def read_columns(stored: Stored, counts: Sequence[int]) -> list[list[int]]:
    """Indices of columns of a basis, ascending, in each group.

    Args:
        stored: a list for each group.
        counts: columns that there are in each group.
    """
    found = []
    for item, count in zip(stored.items(len(counts)), counts, strict=True):
        columns = [index.integer(0, max(count - 1, 0)) for index in item.items()]
        if columns != sorted(set(columns)) or len(columns) > count:
            item.refuse(f"different columns of {count}, ascending", str(columns)[:60])
        found.append(columns)
    return found
