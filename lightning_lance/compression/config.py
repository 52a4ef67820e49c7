"""The options, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_lance.errors import ConfigError
from lightning_lance.subspaces.ranks import ModeRanks, RankRules
from lightning_lance.tensors.units import parse_bytes

Rank: TypeAlias = "int | float | str | Mapping[str, Any]"
Layers: TypeAlias = "int | str | Sequence[str]"


AUTO_CORE_BITS = 4
"""Bits of an element of a core under ``"auto"``, with an unbiased batch mode."""


@dataclass(frozen=True)
class LanceConfig:
    """What to compress and how far.

    Attributes:
        rank: ``"auto"``; an int, that rank in every mode, clipped to its size; a float in (0, 1], that energy in
            every mode (the published rule); a mapping mode -> rule with the modes ``batch``, ``channel`` (or
            ``feature``) and ``spatial`` (or ``token``), each an int, an energy or ``"full"``; or a mapping layer
            pattern -> any of these. ``"auto"`` is batch rank ``max(4, B / 6)``, the whole
            batch where a sample is one row; channels whole; spatial and token energy .9, where that halves the mode or
            costs little next to the layer.
        batch: ``"unbiased"`` weights sums over random groups of samples so that the weight gradient has no bias
            from it; ``"projected"`` projects it, as published.
        core_bits: bits in which each element of a core is kept: 4, 8, or ``None`` for its own dtype. ``"auto"`` is 4,
            and ``None`` with ``batch="projected"``, as published, and in layers with full ranks.
        layers: ``"trainable"`` (every supported layer whose weight requires grad), an int (the last n of them), or
            shell-style patterns of module names; the name of a container means all in it.
        companions: also swap layers beside them for exact variants that keep less; ``"approximate"`` adds inexact
            ones; ``False`` compresses the inputs of linear layers and convolutions only.
        freeze_norms: run batch-norm layers whose affine parameters are frozen in eval mode while training, as the paper
            does. Changes what training computes, so it is never done unasked.
        memory_budget: bytes, or a string such as ``"4MiB"``, for the cores and factors of all compressed layers at the
            calibrated batch size; lowers spatial energy, then the batch rank, then channel energy until they fit.
        refresh: ``"epoch"`` or a number of training batches: recompute the subspaces that often from ordinary training
            steps. ``None``: the published one-shot method.
        calibration_batches: number of batches that define the subspaces.
        seed: seed of the random sample orders.

    Raises:
        ConfigError: a value is not allowed.
    """

    rank: Rank = "auto"
    batch: Literal["unbiased", "projected"] = "unbiased"
    core_bits: int | Literal["auto"] | None = "auto"
    layers: Layers = "trainable"
    companions: bool | Literal["approximate"] = True
    freeze_norms: bool = False
    memory_budget: int | str | None = None
    refresh: Literal["epoch"] | int | None = None
    calibration_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        rules = RankRules(self.rank)
        if self.batch not in ("unbiased", "projected"):
            raise ConfigError(f"batch={self.batch!r} is not allowed. Allowed: 'unbiased', 'projected'.")
        if self.batch == "unbiased" and any(
            ranks.batch == 1 and type(ranks.batch) is int for ranks in rules.all_rules()
        ):
            raise ConfigError(
                "rank of the batch mode is 1 with batch='unbiased', which needs a constant column and another. "
                "Give a batch rank of at least 2, or batch='projected'."
            )
        if isinstance(self.core_bits, bool) or self.core_bits not in ("auto", 4, 8, None):
            raise ConfigError(f"core_bits={self.core_bits!r} is not allowed. Allowed: 'auto', 4, 8, None.")
        if self.companions not in (True, False, "approximate"):
            raise ConfigError(f"companions={self.companions!r} is not allowed. Allowed: True, False, 'approximate'.")
        if self.freeze_norms not in (True, False):
            raise ConfigError(f"freeze_norms={self.freeze_norms!r} is not allowed. Allowed: True, False.")
        if not _selects(self.layers):
            raise ConfigError(
                f"layers={self.layers!r} is not allowed. Allowed: 'trainable', an int of at least 1 (the last n "
                "trainable layers), a name pattern or a list of them such as ['layer4.*', 'fc']."
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.refresh not in (None, "epoch") and not _positive(self.refresh):
            raise ConfigError(
                f"refresh={self.refresh!r} is not allowed. Allowed: None, 'epoch', or an int of at least 1 (batches)."
            )
        if not _positive(self.calibration_batches):
            raise ConfigError(
                f"calibration_batches={self.calibration_batches!r} is not allowed. Allowed: an int of at least 1."
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed!r} is not allowed. Allowed: an int of 64 bits.")

    def bits(self, ranks: ModeRanks) -> int | None:
        """Bits of an element of the core of a layer with these ranks; ``None``: its own dtype."""
        if self.core_bits != "auto":
            return self.core_bits
        return AUTO_CORE_BITS if self.batch == "unbiased" and not ranks.full else None

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def rules(self) -> RankRules:
        """The parsed rank rules."""
        return RankRules(self.rank)


def _selects(layers: object) -> bool:
    if isinstance(layers, str):
        return bool(layers)
    if isinstance(layers, Sequence):
        return bool(layers) and all(isinstance(pattern, str) and pattern for pattern in layers)
    return _positive(layers)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
