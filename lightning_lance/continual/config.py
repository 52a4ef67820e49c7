"""What to protect, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.presets import preset_named, settle
from lightning_lance.continual.moments import ROWS_PER_UPDATE
from lightning_lance.continual.rules import RULES
from lightning_lance.errors import ConfigError

HIGHEST_THRESHOLD = 0.999
"""A growing threshold stops here: protecting all energy would protect every direction."""

AUTO_THRESHOLD = 0.95
"""Of an experience's energy, with one head or many."""

AUTO_DAMPING = 0.3
"""With optimisers whose steps are as long in all directions."""


@dataclass(frozen=True)
class ContinualConfig:
    """What to protect.

    Attributes:
        rule: which directions an experience may move and what is stored afterwards, a name in
            :data:`lightning_lance.continual.rules.RULES`. ``"columns"``: what is protected does not move, but that each
            experience whose name is given has a few columns of its own; without names it is ``"threshold"``.
            ``"scaled"``: a protected direction closes as far as it mattered (SGP).
        threshold: fraction of an experience's input energy that is protected after it, in each layer. Higher keeps
            more of what was learned, and leaves less to learn in. ``"auto"``: .95, and .97 with the preset.
        threshold_growth: added to the threshold after each experience, up to .999 (LANCE, arXiv 2509.21617: .97 and
            .003 for ten experiences of CIFAR-100).
        columns: fraction of the protected layers' weights that an experience may have as columns of its own; and as
            values of its own of parameters that no basis protects, such as positions.
        reserved: directions that an experience may change. ``"full"``: everything that is not protected. An int: that
            many leading directions of the experience outside of what is protected; a float in (0, 1]: those that hold
            that energy; ``"threshold"``: those that together with the protected ones hold the threshold. Then only
            ``rows x directions`` numbers of a layer are trained, with gradients and optimiser state of that size.
        damping: how much shorter steps are in directions that are not protected and in which earlier experiences have
            energy all the same: a step is multiplied with ``b / (b + damping * a)``, where ``b`` is the share of the
            present experience's energy in a direction and ``a`` the sum of the shares of earlier ones. ``"auto"``: 0
            with :class:`torch.optim.SGD`, whose steps are short there by themselves. With other optimisers, such as
            Adam, whose steps are as long in all directions, .3.
            With damping a layer stores the directions outside of what is protected in which earlier experiences have
            energy.
        feature_side: of convolutions. ``"patch"``: unfolded patches; ``"channel"``: channels, whose bases are smaller
            by the number of kernel positions squared, and fuller.
        heads: name patterns of modules or parameters that train freely and are not protected, such as the heads of
            tasks.
        max_rows: feature vectors taken from one input; a random subset where there are more.
        freeze_above: fraction of a layer's directions from which on its weight is frozen. The last few directions
            add little to what can be learned; once the first layers are frozen, nothing before the first trained one
            is kept for backward. 1: a layer trains as long as it has any direction free.
        warn_above: fraction of a layer's directions that may be protected before a warning. Layers of at most 32
            inputs, such as the first one of a network, are not worth one while others have room.
        compress_first: whether inputs are projected in the first experience too, which trains in all directions.
        preset: ``"published"``, the method of arXiv 2509.21617 as its authors have it: ``rule="threshold"``, the first
            experience without projections, later ones train directions up to the threshold only and in full steps, and
            layers train as long as any is free. It sets these options. The same name in
            :class:`~lightning_lance.LanceConfig` is energy .98 of the batch mode and the locations then.

    Raises:
        ConfigError: a value is not allowed.
    """

    rule: str = "columns"
    threshold: float | Literal["auto"] = "auto"
    threshold_growth: float = 0.003
    columns: float = 1 / 32
    reserved: int | float | Literal["full", "threshold"] = "full"
    damping: float | Literal["auto"] = "auto"
    feature_side: Literal["patch", "channel"] = "patch"
    heads: str | Sequence[str] = ()
    max_rows: int = ROWS_PER_UPDATE
    freeze_above: float = 0.95
    warn_above: float = 0.9
    compress_first: bool = True
    preset: str | None = None

    def __post_init__(self) -> None:
        preset = preset_named(self.preset)
        if preset is not None:
            settle(self, str(self.preset), preset.protection)
            if self.threshold == "auto":
                object.__setattr__(self, "threshold", preset.usual["threshold"])
        if isinstance(self.heads, str):
            object.__setattr__(self, "heads", (self.heads,))
        if not all(isinstance(pattern, str) for pattern in self.heads):
            raise ConfigError(f"heads={self.heads!r} is not a list of name patterns such as ['classifier', 'heads.*'].")
        if self.rule not in RULES:
            raise ConfigError(f"rule={self.rule!r} is not allowed. Allowed: {', '.join(map(repr, RULES))}.")
        if not _is_threshold(self.threshold):
            raise ConfigError(
                f"threshold={self.threshold!r} is not allowed. Allowed: 'auto', or a fraction in (0, 1], such as 0.97."
            )
        if isinstance(self.columns, bool) or not 0.0 <= self.columns <= 1.0:
            raise ConfigError(
                f"columns={self.columns!r} is not allowed. Allowed: a fraction in [0, 1], such as 0.03; 0 for none."
            )
        if not 0.0 <= self.threshold_growth < 1.0:
            raise ConfigError(
                f"threshold_growth={self.threshold_growth!r} is not allowed. Allowed: [0, 1), such as 0.003."
            )
        if not _is_reserved(self.reserved):
            raise ConfigError(
                f"reserved={self.reserved!r} is not allowed. Allowed: 'full', 'threshold', an int of at least 1 "
                "(directions), a float in (0, 1] (their energy)."
            )
        if not _is_damping(self.damping):
            raise ConfigError(
                f"damping={self.damping!r} is not allowed. Allowed: 'auto', or a finite number of at least 0."
            )
        if self.compress_first not in (True, False):
            raise ConfigError(f"compress_first={self.compress_first!r} is not allowed. Allowed: True, False.")
        if self.feature_side not in ("patch", "channel"):
            raise ConfigError(f"feature_side={self.feature_side!r} is not allowed. Allowed: 'patch', 'channel'.")
        if not 0.0 < self.freeze_above <= 1.0:
            raise ConfigError(
                f"freeze_above={self.freeze_above!r} is not allowed. Allowed: a fraction in (0, 1], such as 0.95."
            )
        if isinstance(self.max_rows, bool) or self.max_rows < 1:
            raise ConfigError(f"max_rows={self.max_rows!r} is not allowed. Allowed: an int of at least 1.")

    def threshold_of(self, experience: int) -> float:
        """Threshold after an experience, counted from 0."""
        threshold = AUTO_THRESHOLD if isinstance(self.threshold, str) else self.threshold
        return max(threshold, min(threshold + self.threshold_growth * experience, HIGHEST_THRESHOLD))

    def damping_of(self, optimizers: Iterable[torch.optim.Optimizer]) -> float:
        """Damping with the given optimisers."""
        if not isinstance(self.damping, str):
            return float(self.damping)
        if all(isinstance(found, torch.optim.SGD) for found in optimizers):
            return 0.0
        return AUTO_DAMPING


@dataclass(frozen=True)
class ContinualOptions(ContinualConfig, LanceConfig):
    """What to protect, and how far what autograd keeps is compressed meanwhile.

    Attributes:
        calibration_batches: batches of an experience that define its subspaces, before and after it.
        layers: which layers may keep a projected input. Which are protected does not depend on it.
        refresh: not allowed: the subspaces are found once for each experience.

    Raises:
        ConfigError: a value is not allowed.
    """

    def __post_init__(self) -> None:
        ContinualConfig.__post_init__(self)
        LanceConfig.__post_init__(self)
        if self.refresh is not None:
            raise ConfigError(
                f"refresh={self.refresh!r} is not allowed in continual learning: the subspaces are found once for each "
                "experience. Leave it out."
            )


def _is_threshold(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return bool(value == "auto")
    return 0.0 < value <= 1.0


def _is_damping(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return bool(value == "auto")
    return 0.0 <= value < math.inf


def _is_reserved(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 1
    return value in ("full", "threshold") or (isinstance(value, float) and 0.0 < value <= 1.0)
