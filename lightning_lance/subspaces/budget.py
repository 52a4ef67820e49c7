"""Fit what is kept into a number of bytes, by the ranks of the layers whose inputs are projected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_lance.errors import ConfigError
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import LayerSpectra, LayerSubspace
from lightning_lance.tensors.rounding import SMALLEST_GROUP
from lightning_lance.tensors.units import format_bytes

SPATIAL_LADDER = (0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
CHANNEL_LADDER = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class BudgetedLayer:
    """What the allocation needs to know of a layer.

    Attributes:
        spectra: spectra of every mode, the channel mode included.
        ranks: rules asked for.
        shape: input shape at the calibrated batch size, with the channels moved to axis 1.
        itemsize: bytes of an input element.
    """

    spectra: LayerSpectra
    ranks: ModeRanks
    shape: tuple[int, ...]
    itemsize: int


def allocate(
    layers: Mapping[str, BudgetedLayer], budget: int, unbiased: bool, bits: int | None = None, fixed: int = 0
) -> dict[str, LayerSubspace]:
    """Subspaces of all layers within a number of bytes.

    Lowers, in this order and evenly over the layers: the spatial energy, the batch rank down to 2, then the channel
    energy from .99 down. Even is better than greedy by captured energy per byte: the mean dominates the energy,
    not the gradient.

    Args:
        layers: name -> layer.
        budget: bytes for all that is kept.
        unbiased: whether the batch mode is estimated without bias.
        bits: of an element of a core; ``None``: as it is.
        fixed: bytes that are kept whatever the ranks; the rest is for cores, factors and groups of all layers together.

    Returns:
        Name -> subspace, the first rung of the ladder that fits.

    Raises:
        ConfigError: the lowest rung needs more; the message names it.
    """
    needed = 0
    for spatial, shrink, channel in _rungs(max(layer.shape[0] for layer in layers.values())):
        found = {
            name: layer.spectra.subspace(_lowered(layer, spatial, shrink, channel), unbiased, bits)
            for name, layer in layers.items()
        }
        needed = fixed + _bytes(layers, found)
        if needed <= budget:
            return found
    raise ConfigError(
        f"memory_budget={budget} bytes cannot be met: {format_bytes(fixed)} are kept whatever the ranks, and the "
        f"{len(layers)} layers whose inputs are projected need {format_bytes(needed - fixed)} with the lowest ones "
        f"(spatial energy {SPATIAL_LADDER[-1]}, batch rank 2, channel energy {CHANNEL_LADDER[-1]}). "
        f"Allowed for this batch size: at least {needed}."
    )


def _bytes(layers: Mapping[str, BudgetedLayer], found: Mapping[str, LayerSubspace]) -> int:
    """What the layers keep at the most: rounded by the smallest groups, and with the rotations of the batch mode."""
    cores: dict[Any, int] = {}
    rotations: dict[int, int] = {}
    for name, layer in layers.items():
        subspace, (batch, channels, *sizes) = found[name], layer.shape
        shape = batch, channels, tuple(sizes)
        core = (layer.spectra.totals, subspace.core_shape(*shape))  # layers that read one input share it
        cores[core] = subspace.formula_bytes(*shape, layer.itemsize, SMALLEST_GROUP)
        columns = subspace.batch.columns(batch)
        if subspace.batch.unbiased and columns < batch:
            rotations[columns] = columns**2 * layer.itemsize
    return sum(cores.values()) + sum(rotations.values())


def _rungs(batch: int) -> Iterator[tuple[float | None, float, float | None]]:
    """(spatial energy, factor on the batch rank, channel energy), from the ranks asked for downwards."""
    yield None, 1.0, None
    for energy in SPATIAL_LADDER:
        yield energy, 1.0, None
    shrink = 1.0
    while shrink * batch > 2:
        shrink *= 0.75
        yield SPATIAL_LADDER[-1], shrink, None
    for energy in CHANNEL_LADDER:
        yield SPATIAL_LADDER[-1], 0.0, energy


def _lowered(layer: BudgetedLayer, spatial: float | None, shrink: float, channel: float | None) -> ModeRanks:
    ranks = layer.ranks
    if spatial is not None and not isinstance(ranks.spatial, int):
        asked = ranks.spatial if isinstance(ranks.spatial, float) else 1.0
        ranks = replace(ranks, spatial=min(asked, spatial))
    if shrink < 1.0:
        batch = layer.shape[0]
        columns = layer.spectra.subspace(ranks, True).batch.columns(batch)
        ranks = replace(ranks, batch=min(columns, max(2, math.floor(columns * shrink))))
    if channel is not None and not isinstance(ranks.channel, int):
        asked = ranks.channel if isinstance(ranks.channel, float) else 1.0
        ranks = replace(ranks, channel=min(asked, channel))
    return ranks


def gathering_ranks(ranks: ModeRanks) -> ModeRanks:
    """Rules under which the statistics of every mode that the ladder may lower are collected."""
    channel = CHANNEL_LADDER[0] if isinstance(ranks.channel, str) else ranks.channel
    spatial = SPATIAL_LADDER[0] if isinstance(ranks.spatial, str) else ranks.spatial
    return replace(ranks, channel=channel, spatial=spatial)
