"""The options, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_lance.compression.presets import preset_named, settle
from lightning_lance.compression.skipping import KINDS
from lightning_lance.compression.store import Bits
from lightning_lance.errors import ConfigError
from lightning_lance.subspaces.ranks import RankRules
from lightning_lance.tensors.units import parse_bytes

Rank: TypeAlias = "int | float | str | Mapping[str, Any] | None"
Layers: TypeAlias = "int | str | Sequence[str]"

BITS: dict[Any, Bits] = {
    "auto": Bits(4, 4),
    2: Bits(2, 4),
    4: Bits(4, 4),
    8: Bits(8, 8),
    None: Bits(None, None),
}
"""What ``bits`` stands for. Two bits are enough for the gradient of a weight; the error of what input gradients are
computed from is passed on to every layer before."""

CALIBRATION_BATCHES = 8

BATCH = ("unbiased", "projected", "learned")
CALIBRATION = ("training", "eval")


@dataclass(frozen=True)
class LanceConfig:
    """How what autograd keeps is compressed, and how far.

    Attributes:
        rank: on what the inputs of linear layers and convolutions are projected, for the gradients of their weights.
            ``"auto"``: spatial and token modes where that costs neither learning nor time, as the first steps find and
            later ones watch; batch and channels stay whole; more where a ``memory_budget`` asks for it. ``None``:
            nothing is.
            ``"compact"``, for fine-tuning: batch rank ``max(4, B / 6)`` without bias, the whole batch where a sample is
            one row; channels whole; spatial and token energy .9, where that halves the mode or costs little next to the
            layer. Unless layers are named or there is a ``memory_budget``, nothing is projected where the inputs that
            this makes smaller are less than .6 of all that a step keeps, as with norms in training mode; nor is an
            input that is kept in any case or computed from what is. An int: that rank in every mode, clipped to its
            size. A float in (0, 1]: that energy in every mode (the published rule). A mapping mode -> rule with the
            modes ``batch``, ``channel`` (or ``feature``) and ``spatial`` (or ``token``), each an int, an energy,
            ``"compact"`` or ``"full"``, which is that of modes not named; it is done whatever it saves. Or a mapping
            layer pattern -> any of these.
        bits: of each element of what is kept: ``"auto"`` (4, and 8 where an operator is sensitive; nothing after a
            first step of which plain training keeps less than 250 KB, unless a rank or budget is given), 8, 4, 2 (for
            what gradients of weights alone need; 4 for the rest), or ``None``: nothing is rounded, and gradients are
            exact.
        batch: ``"unbiased"`` weights sums over random groups of samples so that the weight gradient has no bias
            from the batch mode; ``"projected"`` leaves the weights out; ``"learned"`` is the published one: a factor
            from the singular vectors of the batch positions of what defines the subspaces, for batches of that size,
            and inputs are projected also where the core is no smaller.
        layers: where to project: ``"trainable"`` (every supported layer whose weight requires grad), an int (the last n
            of them), or shell-style patterns of module names; the name of a container means all in it.
        freeze_norms: run batch-norm layers whose affine parameters are frozen in eval mode while training, as the paper
            does. Changes what training computes, so it is never done unasked.
        memory_budget: bytes, or a string such as ``"40MB"``, for all that autograd keeps of a step of the size of the
            first ones. What no rank can lower is counted first; then spatial energy, the batch rank and channel energy
            are lowered, in this order, until the rest fits.
        refresh: ``"epoch"`` or a number of training steps: recompute the subspaces that often from ordinary training
            steps. ``None``: the published one-shot method.
        calibration_batches: number of batches whose inputs define the subspaces. ``None``: 8, or what the preset says.
        seed: seed of the random sample orders.
        skip: kinds of layers that are neither projected nor counted by ``layers``: ``"depthwise"`` convolutions, the
            ``"classifier"``, which is the last layer of the model, or in a stream the heads.
        calibration: what defines the subspaces. ``"training"``: the first training steps; in a stream forward passes in
            training mode. ``"eval"``: forward passes in eval mode, without gradients, before the first training step.
        preset: ``"published"``, the method of arXiv 2509.21617 as its authors have it: energy .7 in every mode, also
            the batch mode, whose factor is learned, from 100 batches in eval mode; no rounding; depthwise convolutions
            and the classifier train plainly; frozen batch norms in eval mode. It sets ``rank``, ``batch``, ``bits``,
            ``skip``, ``calibration``, ``freeze_norms``, ``memory_budget`` and ``refresh``; an option that has its
            default counts as not given.
        release_memory: give freed memory back to the system at once while training, where glibc serves the process
            (:func:`~lightning_lance.freed_memory`): the peak of the process falls, a step takes longer.

    Raises:
        ConfigError: a value is not allowed.
    """

    rank: Rank = "auto"
    bits: int | Literal["auto"] | None = "auto"
    batch: Literal["unbiased", "projected", "learned"] = "unbiased"
    layers: Layers = "trainable"
    freeze_norms: bool = False
    memory_budget: int | str | None = None
    refresh: Literal["epoch"] | int | None = None
    calibration_batches: int | None = None
    seed: int = 0
    skip: str | Sequence[str] = ()
    calibration: Literal["training", "eval"] = "training"
    preset: str | None = None
    release_memory: bool = False

    def __post_init__(self) -> None:
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip or ())
        object.__setattr__(self, "skip", skip)
        preset = preset_named(self.preset)
        usual: Mapping[str, Any] = {}
        if preset is not None:
            settle(self, str(self.preset), preset.compression, preset.stream)
            usual = preset.usual
        if self.calibration_batches is None:
            object.__setattr__(self, "calibration_batches", usual.get("calibration_batches", CALIBRATION_BATCHES))
        rules = RankRules(self.rank)
        if self.batch not in BATCH:
            raise ConfigError(f"batch={self.batch!r} is not allowed. Allowed: {', '.join(map(repr, BATCH))}.")
        if self.batch == "learned" and self.memory_budget is not None:
            raise ConfigError(
                f"memory_budget={self.memory_budget!r} with batch='learned', whose rank is that of its energy. Allowed "
                "with a budget: batch='unbiased', 'projected'."
            )
        if self.calibration not in CALIBRATION:
            raise ConfigError(
                f"calibration={self.calibration!r} is not allowed. Allowed: {', '.join(map(repr, CALIBRATION))}."
            )
        unknown = [kind for kind in self.skip if kind not in KINDS]
        if unknown:
            raise ConfigError(f"skip={unknown[0]!r} is not allowed. Allowed: {', '.join(map(repr, KINDS))}.")
        if self.batch == "unbiased" and any(
            ranks.batch == 1 and type(ranks.batch) is int for ranks in rules.all_rules()
        ):
            raise ConfigError(
                "rank of the batch mode is 1 with batch='unbiased', which needs a constant column and another. "
                "Give a batch rank of at least 2, or batch='projected'."
            )
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r} is not allowed. Allowed: {', '.join(map(repr, BITS))}.")
        if self.freeze_norms not in (True, False):
            raise ConfigError(f"freeze_norms={self.freeze_norms!r} is not allowed. Allowed: True, False.")
        if self.release_memory not in (True, False):
            raise ConfigError(f"release_memory={self.release_memory!r} is not allowed. Allowed: True, False.")
        if not _selects(self.layers):
            raise ConfigError(
                f"layers={self.layers!r} is not allowed. Allowed: 'trainable', an int of at least 1 (the last n "
                "trainable layers), a name pattern or a list of them such as ['layer4.*', 'fc']."
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
            if self.rank is None:
                raise ConfigError(
                    f"memory_budget={self.memory_budget!r} with rank=None: nothing is projected, so that no bytes can "
                    "be saved by projecting less. Allowed with a budget: rank='auto', 'compact', a number or a mapping."
                )
        if self.refresh not in (None, "epoch") and not _positive(self.refresh):
            raise ConfigError(
                f"refresh={self.refresh!r} is not allowed. Allowed: None, 'epoch', or an int of at least 1 (steps)."
            )
        if not _positive(self.calibration_batches):
            raise ConfigError(
                f"calibration_batches={self.calibration_batches!r} is not allowed. Allowed: an int of at least 1."
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed!r} is not allowed. Allowed: an int of 64 bits.")

    @property
    def batches(self) -> int:
        """How many batches define the subspaces."""
        assert self.calibration_batches is not None
        return self.calibration_batches

    def in_stream(self) -> LanceConfig:
        """The same options for a stream of experiences, where some values of presets are others."""
        preset = preset_named(self.preset)
        return self if preset is None else replace(self, **preset.stream)

    def uncompressed(self) -> LanceConfig:
        """The same options without projections."""
        return replace(self, preset=None, rank=None, memory_budget=None)

    @property
    def kept_bits(self) -> Bits:
        """Bits of an element of what is kept."""
        return BITS[self.bits]

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
