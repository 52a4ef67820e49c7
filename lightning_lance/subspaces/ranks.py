"""What the ``rank`` argument means: one rule per mode, per layer."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

from lightning_lance.errors import ConfigError

ModeRank: TypeAlias = "int | float | Literal['full', 'compact']"
"""Rule of one mode: a rank, an energy in (0, 1], ``"full"``, or ``"compact"`` (a rule of that mode's own)."""

MODES = ("batch", "channel", "spatial")
_ALIASES = {"feature": "channel", "token": "spatial"}

COMPACT_SPATIAL_ENERGY = 0.9
"""Energy of the spatial and token modes under ``"compact"``, where truncating them is :func:`worthwhile`."""


COMPACT_BATCH_PART = 6
"""The batch rank under ``"compact"`` is one of so many parts of the batch."""


def compact_batch_rank(batch_size: int) -> int:
    """Batch rank under ``"compact"`` of inputs with spatial or token modes: a sixth of the batch, at least 4."""
    return max(4, -(-batch_size // COMPACT_BATCH_PART))


def worthwhile(size: int, rank: int, work: float) -> bool:
    """Whether ``"compact"`` truncates a spatial or token mode: it is at least halved, or that is cheap for this layer.

    Projecting takes ``rank`` multiply-adds on each element of what the batch mode has left of the input, a sixth, and
    as many in the backward pass: at most a quarter of the layer's own. Depthwise and narrow pointwise convolutions do
    so little on each element that a few bytes less would take them as long as all the rest.

    Args:
        size: length of the mode.
        rank: of the factor that holds the energy.
        work: multiply-adds of the layer's forward pass on each element of its input.
    """
    return 2 * rank <= size or 2 * rank / COMPACT_BATCH_PART <= work / 4


@dataclass(frozen=True)
class SafeTruncation:
    """When a spatial or token mode is truncated under ``"auto"``: it costs neither learning nor time.

    Attributes:
        energy: that each truncated mode has to hold.
        fewer: how many times fewer elements all modes together have to leave: what needs most of its directions to hold
            the energy has gradients in the others too.
        rounding: multiply-adds that take as long as rounding an element and expanding it.
        slack: how many times more energy than at first may be lost before a layer is looked at again.
    """

    energy: float = 0.94
    fewer: float = 4.0
    rounding: float = 16.0
    slack: float = 1.5

    def pays(self, sizes: Sequence[int], ranks: Sequence[int], work: float, outputs: float, pointwise: bool) -> bool:
        """Whether ranks leave so few elements, and projecting takes no longer than what it saves.

        Args:
            sizes: lengths of the spatial or token modes.
            ranks: columns of their factors; a mode that is kept whole has its size.
            work: multiply-adds of the layer's forward pass on each element of its input.
            outputs: elements of the output for each one of the input.
            pointwise: whether the gradient of the weight is computed on the ranks in place of the sizes; other
                convolutions expand the core first.
        """
        kept = math.prod(ranks) / math.prod(sizes)
        if kept * self.fewer > 1.0:
            return False
        projecting, left = 0.0, 1.0
        for size, rank in zip(sizes, ranks, strict=True):
            if rank < size:
                projecting += rank * left
                left *= rank / size
        saved = (1.0 - kept) * (self.rounding + (work if pointwise else 0.0))
        return projecting * (1.0 + (outputs if pointwise else 1.0)) <= saved

    def least(self, modes: int) -> float:
        """Energy that so many truncated modes have to hold together while training."""
        return 1.0 - self.slack * (1.0 - self.energy**modes)


SAFE = SafeTruncation()


@dataclass(frozen=True)
class ModeRanks:
    """Rank rule of each mode of one layer.

    Attributes:
        batch: axis 0 of the input.
        channel: channels of a convolution, features of a linear layer.
        spatial: every spatial axis of a convolution, every token axis of a linear layer. ``"auto"``: where
            :class:`SafeTruncation` allows it.
        sparing: whether the layer is left alone where projecting its input would make little of what is kept smaller.
    """

    batch: ModeRank = "full"
    channel: ModeRank = "full"
    spatial: ModeRank | Literal["auto"] = "full"
    sparing: bool = False

    @property
    def spatial_rank(self) -> ModeRank:
        """Rule of the spatial modes with the energy that ``"compact"`` or ``"auto"`` stands for."""
        if self.spatial == "auto":
            return SAFE.energy
        return COMPACT_SPATIAL_ENERGY if self.spatial == "compact" else self.spatial

    def batch_rank(self, size: int) -> ModeRank:
        """Rule of a learned batch mode of this size, with the rank that ``"compact"`` stands for."""
        return compact_batch_rank(size) if self.batch == "compact" else self.batch

    @property
    def automatic(self) -> bool:
        """Whether modes are projected only where that costs nothing."""
        return self.spatial == "auto"

    @property
    def projects(self) -> bool:
        """Whether any mode is to be projected, be it on all of it."""
        return any(rank not in ("full", "auto") for rank in (self.batch, self.channel, self.spatial))


AUTO = ModeRanks(spatial="auto")
"""Batch and channels whole, spatial and token modes as :class:`SafeTruncation` says."""

COMPACT = ModeRanks("compact", "full", "compact", sparing=True)
"""A sixth of the batch without bias, spatial and token modes by energy where that pays, channels whole."""


def _checked(rank: Any, where: str) -> ModeRank:
    if isinstance(rank, str) and rank in ("full", "compact"):
        return rank  # type: ignore[return-value]
    # Python numbers from here on, also for NumPy's: rules go into checkpoints that load safely.
    if isinstance(rank, bool):
        pass
    elif isinstance(rank, Integral):
        if int(rank) >= 1:
            return int(rank)
    elif isinstance(rank, Real) and 0.0 < float(rank) <= 1.0:
        return float(rank)
    whole = "'auto', None, " if where == "rank" else ""
    raise ConfigError(
        f"{where}={rank!r} is not a rank. Allowed: {whole}'full', 'compact', an int of at least 1 (the rank), "
        "a float in (0, 1] (the energy to hold)."
    )


def _per_mode(rank: Any, where: str) -> ModeRanks:
    if rank is None:
        return ModeRanks()
    if isinstance(rank, str) and rank == "auto":
        return AUTO
    if isinstance(rank, Mapping):
        if not rank:
            raise ConfigError(f"{where}={{}} is empty. Give 'auto', 'compact', None, a number, or a mapping of modes.")
        modes: dict[str, ModeRank] = {}
        for key, value in rank.items():
            mode = _ALIASES.get(key, key)
            if mode not in MODES:
                raise ConfigError(
                    f"{where} has the unknown mode {key!r}. Allowed: batch, channel (or feature), spatial (or token). "
                    "Modes of single layers go below their pattern: {'layer4.*': {'batch': 8, 'spatial': 0.9}}."
                )
            if mode in modes:
                raise ConfigError(f"{where} names the {mode} mode twice; keep one of its names.")
            checked = _checked(value, f"{where}[{key!r}]")
            modes[mode] = COMPACT.channel if (mode, checked) == ("channel", "compact") else checked
        return ModeRanks(modes.get("batch", "full"), modes.get("channel", "full"), modes.get("spatial", "full"))
    checked = _checked(rank, where)
    return COMPACT if checked == "compact" else ModeRanks(checked, checked, checked)


def matches(name: str, pattern: str) -> bool:
    """Whether a module name, or the name of a module that contains it, matches a shell-style pattern."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def closest(pattern: str, names: list[str]) -> str:
    """The names a mistyped pattern may have meant, for messages."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(near) or "none"


class RankRules:
    """Parsed ``rank`` argument: the rules of each layer.

    Args:
        rank: ``"auto"`` (spatial and token modes where that costs nothing), ``None`` (nothing is projected),
            ``"compact"``, an int (that rank in every mode, clipped to its size), a float (that energy in every mode,
            the published rule), a mapping mode -> rule, in which a mode that is not named is kept whole, or a mapping
            layer pattern -> any of these.

    Raises:
        ConfigError: the value is none of these.
    """

    def __init__(self, rank: Any = "auto") -> None:
        self.patterns: dict[str, ModeRanks] = {}
        self.default = ModeRanks()
        if isinstance(rank, Mapping) and not any(key in MODES or key in _ALIASES for key in rank):
            if not rank:
                raise ConfigError(
                    "rank={} is empty. Give 'auto', 'compact', None, a number, or a mapping of modes or layer patterns."
                )
            wrong = [key for key in rank if not isinstance(key, str)]
            if wrong:
                raise ConfigError(
                    f"rank has the key {wrong[0]!r}. Allowed keys: the modes batch, channel (or feature), spatial (or "
                    "token), or layer patterns such as 'layer4.*'."
                )
            if all(key.isidentifier() and not isinstance(value, Mapping) for key, value in rank.items()):
                self._check_modes_meant(rank)
            self.patterns = {key: _per_mode(value, f"rank[{key!r}]") for key, value in rank.items()}
        else:
            self.default = _per_mode(rank, "rank")

    @staticmethod
    def _check_modes_meant(rank: Mapping[str, Any]) -> None:
        known = [*MODES, *_ALIASES]
        for key in rank:
            if difflib.get_close_matches(key, known, n=1, cutoff=0.75):
                raise ConfigError(
                    f"rank has the unknown mode {key!r}. Allowed modes: batch, channel (or feature), spatial (or "
                    f"token). A layer of that name is meant by the pattern '{key}*'."
                )

    def all_rules(self) -> list[ModeRanks]:
        return [self.default, *self.patterns.values()]

    def for_layer(self, name: str) -> ModeRanks:
        """Rules of a layer: the first pattern that matches its name, else the default."""
        for pattern, ranks in self.patterns.items():
            if matches(name, pattern):
                return ranks
        return self.default
