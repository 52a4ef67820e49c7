"""The stored state of a stream, checked as a whole before any of it is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lance.errors import StateError
from lightning_lance.tensors.checked import FLOATS, Stored, described, tolerance

_BELOW_ZERO = -1e-6
"""An energy as far below 0 is rounding."""


class StoredMemory(NamedTuple):
    """The state of one layer, as :class:`~lightning_lance.continual.LayerMemory` holds it."""

    stage: str
    basis: Tensor
    is_free: bool
    counts: list[int]
    soft: Tensor
    energies: Tensor
    rest: list[float]
    reserved: Tensor | None


class StoredStream(NamedTuple):
    """The state of a stream; ``memories``: name -> width, groups, dtype, and a state for :func:`read_memory`."""

    experience: int
    memories: dict[str, tuple[int, int, torch.dtype, Any]]
    known: set[str]
    said: set[str]


def read_memory(
    state: Any, label: str, groups: int, width: int, dtype: torch.dtype, stages: Collection[str]
) -> StoredMemory:
    """What a layer protects, from plain containers and tensors.

    Args:
        state: the stored state.
        label: the layer's name.
        groups: channel groups of the layer.
        width: length ``K`` of a feature vector.
        dtype: of the bases.
        stages: names of the stages.

    Raises:
        StateError: a value is missing, of another type, shape or dtype, not finite or out of range, or a basis is not
            orthonormal.
    """
    place = f"{label}: the stored memory"
    advice = "Load it with the model and feature_side that it was made with; what it protected cannot be rebuilt."
    stage, basis, is_free, counts, soft, energies, rest, reserved = Stored(state, place, advice).fields(
        "stage", "basis", "is_free", "counts", "soft", "energies", "rest", "reserved"
    )
    name, free = stage.text(stages), is_free.flag()
    shape = tuple(basis.value.shape[:2]) if isinstance(basis.value, Tensor) else ()
    if len(shape) == 2 and shape != (groups, width):
        raise StateError(
            f"{label}: the stored basis is for {shape[0]} groups of width {shape[1]}, the layer has {groups} of width "
            f"{width}. {advice}"
        )
    taken = [item.integer(0, width) for item in counts.items(groups)]
    columns = [width - count for count in taken] if free else taken
    main = basis.tensor((groups, width, max(columns)), (dtype,))
    for group, used in zip(main, columns, strict=True):
        basis.orthonormal(group[:, :used])
        if bool(group[:, used:].any()):
            basis.refuse(f"zeros after the first {used} columns of a group")
    beside = soft.tensor((groups, width, 0 if free else None), (dtype,))
    for group, own in zip(main, beside, strict=True):
        soft.orthonormal(own, zeros=True)
        if not free:
            _check_outside(soft, own, group)
    past = energies.tensor((groups, (main if free else beside).shape[2]), (torch.float64,))
    if bool((past < _BELOW_ZERO).any()):
        energies.refuse("energies of at least 0", "a tensor with negative ones")
    left = [item.number(_BELOW_ZERO) for item in rest.items(groups)]
    chosen = None
    if reserved.value is not None:
        chosen = reserved.tensor((groups, width, None), (dtype,))
        for group, own in zip(main, chosen, strict=True):
            reserved.orthonormal(own, zeros=True)
            if not free:
                _check_outside(reserved, own, group)
    return StoredMemory(name, main, free, taken, beside, past, left, chosen)


def _check_outside(stored: Stored, columns: Tensor, protected: Tensor) -> None:
    """Refuse columns that are not orthogonal to the protected ones."""
    both = protected.double().T @ columns.double()
    off = float(both.abs().max()) if both.numel() else 0.0
    if off > tolerance(columns.dtype):
        stored.refuse("directions outside of what is protected", f"directions {off:.2g} inside of it")


def read_stream(state: Any, version: int, feature_side: str) -> StoredStream:
    """What a stream holds between two experiences, from plain containers and tensors; the memories are still to check.

    Args:
        state: the stored state.
        version: that is read.
        feature_side: that is asked for.

    Raises:
        StateError: a value is missing, of another type or out of range, or the state is of another version or feature
            side.
    """
    advice = "What it protected cannot be rebuilt: continue with the version of the package that wrote it."
    stored = Stored(state, "the stored stream", advice)
    (found,) = stored.fields("version")
    if isinstance(found.value, bool) or not isinstance(found.value, int) or found.value != version:
        raise StateError(
            f"the stored state has version {described(found.value)}; this package reads {version}. What it protected "
            "cannot be rebuilt: continue with the version that wrote it."
        )
    side, experience, memories, known, said = stored.fields("feature_side", "experience", "memories", "known", "said")
    if side.text() != feature_side:
        raise StateError(
            f"the stored stream protects feature_side={side.value!r}, asked for is {feature_side!r}. Give the stored "
            "one."
        )
    layers = {}
    for name, item in memories.named():
        width, groups, dtype, memory = item.items(4)
        (basis,) = memory.fields("basis")
        sizes = (groups.integer(1), width.integer(1))
        if not isinstance(basis.value, Tensor) or tuple(basis.value.shape[:2]) != sizes:
            basis.refuse(f"a tensor for {sizes[0]} groups of width {sizes[1]}, as is said beside it")
        layers[name] = (sizes[1], sizes[0], FLOATS[dtype.text(FLOATS)], memory.value)
    names, told = ({item.text() for item in found.items()} for found in (known, said))
    return StoredStream(experience.integer(0), layers, names, told)
