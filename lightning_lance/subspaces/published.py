"""The published method's own rules (Apolinario & Roy, *LANCE*, arXiv 2509.21617), where ours differ.

Its batch mode is a factor learned from the calibration batches, its "last n layers" count convolutions without
depthwise ones, and in a stream only the leading directions of an experience are trained. Everything here is plain
numerics on tensors and module trees; sessions decide when to call it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.errors import CalibrationError, ConfigError, StateError
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import BatchRule, LayerStatistics, LayerSubspace, Sizes, Spectrum
from lightning_lance.tensors.gram import GramMatrix
from lightning_lance.tensors.linalg import orthonormalize

ENERGY = 0.7
"""Energy that each mode holds in fine-tuning."""

STREAM_ENERGY = 0.98
"""Energy that the batch mode and the location modes hold in a stream, from the second experience on."""

CALIBRATION_BATCHES = 100
"""Batches that define the subspaces, in eval mode."""


def published_ranks(experience: int | None = None) -> ModeRanks | None:
    """Rank rules of every layer.

    Args:
        experience: index in a stream; ``None`` in fine-tuning.

    Returns:
        The rules; ``None`` where nothing is compressed, which is the first experience of a stream. In later ones the
        channel mode has no rule: :func:`trained_directions` says which directions are left to train.
    """
    if experience is None:
        return ModeRanks(ENERGY, ENERGY, ENERGY)
    return None if experience == 0 else ModeRanks(STREAM_ENERGY, "full", STREAM_ENERGY)


@dataclass(frozen=True)
class LearnedBatch(BatchRule):
    """A batch mode with a factor of its own, for batches of the size that it was learned from.

    A batch of another size, such as the last one of an epoch, has no such factor: its batch mode is kept whole, and its
    gradient has no error from it.

    Attributes:
        factor: ``(B, r)`` with orthonormal columns.
    """

    factor: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    unbiased: bool = False

    def columns(self, size: int) -> int:
        """``r`` at the learned batch size, the size itself at others."""
        return int(self.factor.shape[1]) if size == self.factor.shape[0] else size

    def contrast_scale(self, size: int) -> float:
        """1: the projection is used as it is, and is biased."""
        return 1.0

    def projection(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """``(r, B)``, the rows to project on, or ``None`` where the mode is kept whole."""
        if self.columns(size) >= size:
            return None
        return self.factor.to(device, dtype).T


@dataclass
class PublishedSubspace(LayerSubspace):
    """Factors of one layer, that of the batch mode among them."""

    def factors(self) -> Iterator[Tensor]:
        """Every factor tensor."""
        yield self._learned.factor
        yield from super().factors()

    @property
    def _learned(self) -> LearnedBatch:
        assert isinstance(self.batch, LearnedBatch)
        return self.batch

    def to(self, device: torch.device, dtype: torch.dtype) -> PublishedSubspace:
        """A copy whose factors are on a device and in a dtype."""
        moved = super().to(device, dtype)
        assert isinstance(moved, PublishedSubspace)
        return replace(moved, batch=replace(self._learned, factor=self._learned.factor.to(device, dtype).contiguous()))

    def formula_bytes(self, batch: int, channels: int, sizes: Sizes, itemsize: int) -> int:
        """Bytes kept for one call by formula: core and every factor, the batch factor too."""
        count = super().formula_bytes(batch, channels, sizes, itemsize)
        used = self.spatial_factors(sizes) is not None and self.batch.columns(batch) < batch
        return count + (self._learned.factor.numel() * itemsize if used else 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and detached CPU tensors, safe for ``torch.load(weights_only=True)``."""
        return {**super().state_dict(), "batch_factor": self._learned.factor.detach().cpu()}

    @classmethod
    def from_state_dict(
        cls, state: Any, place: str = "a stored subspace", channels: int | None = None
    ) -> PublishedSubspace:
        rest = (
            {key: value for key, value in state.items() if key != "batch_factor"} if isinstance(state, dict) else state
        )
        found = super().from_state_dict(rest, place, channels)
        if not isinstance(state.get("batch_factor"), Tensor):
            raise StateError(
                "a stored subspace has no batch factor; it was not made by the published method. Resume with the "
                "options of the stored run."
            )
        rule = LearnedBatch(found.batch.rank, False, found.batch.constant_energy, state["batch_factor"])
        return cls(rule, found.channel, found.spatial, found.energy, found.any_size, found.bits)


class PublishedStatistics(LayerStatistics):
    """Second moments of the inputs of one layer, those between batch positions too.

    The batch mode is learned from the inputs of the size that comes first; others, such as the last batch of an epoch,
    add to the other modes only.

    Args:
        ranks: rank rules; an energy or a rank of the batch mode asks for a learned factor.
        channel_axis: 1 for convolutions, -1 for linear layers.
        label: names the layer in messages.
        work: multiply-adds of the layer's forward pass on each element of its input.
    """

    def __init__(self, ranks: ModeRanks, channel_axis: int, label: str, work: float = math.inf) -> None:
        super().__init__(ranks, channel_axis, label, work)
        self._batch: GramMatrix | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        """Add one input, shape ``(B, C, *sizes)`` or ``(B, *sizes, C)``."""
        super().update(input)
        if input.numel() == 0:
            return
        if self._batch is None:
            self._batch = GramMatrix(input.shape[0], self._accumulation_dtype, input.device)
        if input.shape[0] == self._batch.gram.shape[0]:
            self._batch.update(input.detach(), 0)

    def tensors(self) -> list[Tensor]:
        """Every accumulator, in an order that is equal on all processes, for a sum in place."""
        return [*super().tensors(), *([] if self._batch is None else self._batch.tensors())]

    def signature(self) -> list[Any]:
        """What was seen, as plain data to exchange between processes."""
        return [*super().signature(), 0 if self._batch is None else self._batch.gram.shape[0]]

    def extend(self, signature: list[Any], device: torch.device) -> None:
        """Make accumulators for what another process saw.

        Raises:
            CalibrationError: the other process learned the batch mode of another batch size.
        """
        *others, size = signature
        super().extend(others, device)
        if size and self._batch is None:
            self._batch = GramMatrix(size, self._accumulation_dtype, device)
        if size and self._batch is not None and self._batch.gram.shape[0] != size:
            raise CalibrationError(
                f"{self.label}: batches of {self._batch.gram.shape[0]} samples here and of {size} on another process. "
                "The published batch mode needs one size: give all processes the same batch_size, and drop_last=True."
            )

    def published(self) -> PublishedSubspace:
        """The subspaces of all modes, by the published rule: energy, or rank, from the spectra of the batches.

        Raises:
            CalibrationError: nothing was seen, or the inputs hold NaN, Inf, or nothing but zeros.
        """
        found = self.spectra().subspace(replace(self.ranks, batch="full"), unbiased=False)
        assert self._batch is not None
        spectrum = Spectrum(*self._batch.eigh(), self._batch.trace)
        size = spectrum.vectors.shape[0]
        factor, held = spectrum.truncate(self.ranks.batch, self._input_dtype, self._batch.gram.device)
        if factor is None:  # the whole mode; of its columns none is needed
            factor = torch.eye(size, dtype=self._input_dtype, device=self._batch.gram.device)
        rule = LearnedBatch(self.ranks.batch, False, 0.0, factor)
        return PublishedSubspace(
            rule, found.channel, found.spatial, {"batch": held, **found.energy}, found.any_size, found.bits
        )


def trained_directions(gram: Tensor, protected: Tensor, threshold: float) -> Tensor:
    """Directions that an experience of a stream may change: the leading ones outside of what is protected.

    They are so many that, with the protected ones, they hold more than the threshold of the energy (the rule of Saha,
    Garg & Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021, section 5, that LANCE takes over).

    Args:
        gram: second moments of the layer's input features in this experience, ``(K, K)``.
        protected: orthonormal basis of what earlier experiences need, ``(K, m)``.
        threshold: fraction of the energy in (0, 1].

    Returns:
        ``(K, r)`` of the dtype of ``gram``, with orthonormal columns, orthogonal to ``protected`` to machine precision;
        no column where the protected ones hold enough.

    Raises:
        ConfigError: the threshold is not in (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(f"threshold={threshold!r} is not allowed. Allowed: a fraction in (0, 1], such as 0.97.")
    size, taken = protected.shape
    moments, basis = gram.detach().cpu().double(), orthonormalize(protected.detach().cpu().double())
    total = float(moments.diagonal().sum())
    held = float((basis * (moments @ basis)).sum())
    free = size - taken
    if free == 0 or total <= 0.0 or (held > threshold * total and threshold < 1.0):
        return gram.new_zeros(size, 0)
    outside = moments - basis @ (basis.T @ moments)
    outside = outside - (outside @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((outside + outside.T) / 2)
    values, vectors = values.flip(0).clamp_(min=0.0)[:free], vectors.flip(1)[:, :free]
    reached = held + torch.cumsum(values, 0) > threshold * total
    rank = int(reached.to(torch.int8).argmax()) + 1 if threshold < 1.0 and bool(reached.any()) else free
    return orthonormalize(vectors[:, :rank], basis).to(gram.device, gram.dtype)


def select_published(model: nn.Module, last: int, classifier: str | None = None) -> list[str]:
    """Names of the last ``n`` layers to train and to compress, as the paper counts them.

    Counted are convolutions that are not depthwise, and linear layers; not the classifier, which trains plainly, nor
    the output projection inside of :class:`torch.nn.MultiheadAttention`, which is never called.

    Args:
        model: any module.
        last: how many.
        classifier: name of the classifier; by default the last of all of these layers.

    Returns:
        Names, in the order of the model.

    Raises:
        ConfigError: the number is not allowed, there are not so many layers, or no layer has that name.
    """
    if isinstance(last, bool) or last < 1:
        raise ConfigError(f"last={last!r} is not allowed. Allowed: an int of at least 1.")
    counted = [name for name, module in model.named_modules() if _counts(module)]
    if classifier is None:
        found = counted[:-1]
    elif any(name == classifier for name, _ in model.named_modules()):
        found = [name for name in counted if not f"{name}.".startswith(f"{classifier}.")]
    else:
        raise ConfigError(
            f"classifier={classifier!r} is not the name of a module. Allowed: such as "
            f"{', '.join(counted[-2:]) or 'fc'}."
        )
    if last > len(found):
        raise ConfigError(
            f"last={last} is not allowed: {type(model).__name__} has {len(found)} convolutions and linear layers "
            "beside its classifier and depthwise convolutions. Allowed: at most that many."
        )
    return found[-last:]


def _counts(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and (module.groups == 1 or module.groups < module.in_channels)
    return isinstance(module, nn.Linear)
