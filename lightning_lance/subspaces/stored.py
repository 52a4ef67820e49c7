"""The stored state of a compressed run, checked as a whole before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lance.subspaces.subspace import LayerStatistics, LayerSubspace
from lightning_lance.tensors.checked import LARGEST, Stored


@dataclass(frozen=True)
class StoredRun:
    """The parts of a stored state that were found to be whole.

    Attributes:
        config: options of the stored run by name; their values are for the options' own check.
        subspaces: layer name -> factors.
        order: seed and count of the sample orders; ``None`` where the run had no layer.
        dropped: name, type and reason of layers that were left alone after calibration.
        observed: steps in the running observation.
        steps: training steps so far.
        looked: whether a step has said which layers ``rank="auto"`` looks at.
        most: bytes that plain training would have kept of the largest step that was looked at.
        trained: of each parameter whether it has trained.
        fixed: bytes that the steps of the running observation kept whatever the ranks.
        evidence: of the last step that was observed: layers that projecting saves nothing of, bytes that it could make
            smaller, and of all that was kept.
        observing: layer name -> state of its statistics; ``None`` where nothing was observed.
    """

    config: dict[str, Any]
    subspaces: dict[str, LayerSubspace]
    order: tuple[int, int] | None
    dropped: list[tuple[str, str, str]]
    observed: int
    steps: int
    looked: bool
    most: int
    trained: list[bool]
    fixed: int
    evidence: tuple[list[str], int, int]
    observing: dict[str, Any] | None


def check_session_state(
    state: Any,
    version: int,
    channels: Mapping[str, int],
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> StoredRun:
    """Read what ``LanceSession.state_dict`` returned, or raise before anything is changed.

    Args:
        state: plain containers and tensors.
        version: the version that is read.
        channels: name -> channels (or features) of the input, of each layer that may get a subspace.
        statistics: name -> fresh statistics with the rank rules of the layer, which those stored must fit; they are
            not changed.

    Raises:
        StateError: a value is missing, of another type, shape or dtype, not finite or out of range; the state is of
            another version, or of a layer of other width, which is named.
    """
    advice = "Resume without the callback's state to calibrate anew."
    stored = Stored(state, "the stored state", advice)
    (found,) = stored.fields("version")
    if isinstance(found.value, bool) or not isinstance(found.value, int) or found.value != version:
        found.refuse(f"version {version}, the one that this package reads")
    config, subspaces, order, dropped, observed, steps, fixed = stored.fields(
        "config", "subspaces", "order", "dropped", "observed", "steps", "fixed"
    )
    evidence, looked, most, trained, observing = stored.fields("evidence", "looked", "most", "trained", "observing")
    options = {name: item.value for name, item in config.named()}
    factors = {
        name: LayerSubspace.from_state_dict(item.value, f"{name}: the stored subspace", channels.get(name))
        for name, item in subspaces.named()
    }
    numbers = order.items()
    drawn = None
    if numbers or factors:
        seed, count = order.items(2)
        drawn = (seed.integer(-LARGEST - 1), count.integer(0))
    left = []
    for item in dropped.items():
        name, kind, reason = (part.text() for part in item.items(3))
        left.append((name, kind, reason))
    seen = None
    if observing.value is not None:
        seen = {}
        for name, item in observing.named():
            seen[name] = item.value
            fresh = None if statistics is None else statistics.get(name)
            if fresh is not None:
                LayerStatistics(fresh.ranks, fresh.channel_axis, name, fresh.work, fresh.learned).load_state_dict(
                    item.value, torch.device("cpu"), channels.get(name)
                )
    names, inputs, total = evidence.items(3)
    found_then = [item.text() for item in names.items()], inputs.integer(0), total.integer(0)
    counts = observed.integer(0), steps.integer(0), looked.flag(), most.integer(0)
    flags = [item.flag() for item in trained.items()]
    return StoredRun(options, factors, drawn, left, *counts, flags, fixed.integer(0), found_then, seen)
