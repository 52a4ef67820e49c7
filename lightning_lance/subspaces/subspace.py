"""The subspaces of one layer: statistics of its input, their spectra, and the factors kept for training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lance.errors import CalibrationError
from lightning_lance.subspaces.batch import ROUNDING, BatchRule, LearnedBatch, stored_factor, stored_rule
from lightning_lance.subspaces.ranks import ModeRank, ModeRanks, worthwhile
from lightning_lance.tensors.checked import FLOATS, Stored
from lightning_lance.tensors.gram import GramMatrix, NystromSketch, mode_statistics
from lightning_lance.tensors.linalg import energy_rank, mode_product, orthonormalize
from lightning_lance.tensors.rounding import GROUP, kept_bytes

CORE_BITS = (2, 4, 8)
"""Bits that an element of a core may be kept in."""

Sizes = tuple[int, ...]
"""Lengths of the spatial (or token) axes of an input."""


@dataclass
class LayerSubspace:
    """Factors of one layer, contiguous and shared by all training steps.

    Attributes:
        batch: rule of axis 0.
        channel: ``(C, r)`` with orthonormal columns, or ``None`` for the whole mode.
        spatial: for each combination of spatial sizes seen, one ``(n, r)`` factor or ``None`` per axis.
        energy: fraction of the calibration energy that each learned mode holds.
        any_size: the spatial modes are kept whole, so that inputs of every size are served.
        bits: of an element of the core; ``None``: as it is.
    """

    batch: BatchRule
    channel: Tensor | None = None
    spatial: dict[Sizes, tuple[Tensor | None, ...]] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    any_size: bool = False
    bits: int | None = None

    def spatial_factors(self, sizes: Sizes) -> tuple[Tensor | None, ...] | None:
        """Factors for spatial sizes, or ``None`` where none were made for them."""
        found = self.spatial.get(sizes)
        return (None,) * len(sizes) if found is None and self.any_size else found

    def factors(self) -> Iterator[Tensor]:
        """Every factor tensor."""
        yield from self.batch.factors()
        if self.channel is not None:
            yield self.channel
        for group in self.spatial.values():
            yield from (factor for factor in group if factor is not None)

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerSubspace:
        """A copy whose factors are on a device and in a dtype."""

        def move(factor: Tensor | None) -> Tensor | None:
            return None if factor is None else factor.to(device, dtype).contiguous()

        spatial = {sizes: tuple(map(move, group)) for sizes, group in self.spatial.items()}
        return replace(self, batch=self.batch.to(device, dtype), channel=move(self.channel), spatial=spatial)

    def core_shape(self, batch: int, channels: int, sizes: Sizes) -> tuple[int, ...]:
        """``(r_batch, r_channel, r_spatial...)`` of what is kept of an input: its own shape for unknown sizes."""
        group = self.spatial_factors(sizes)
        if group is None:
            return (batch, channels, *sizes)
        spatial = [size if factor is None else factor.shape[1] for size, factor in zip(sizes, group, strict=True)]
        return (self.batch.columns(batch), channels if self.channel is None else self.channel.shape[1], *spatial)

    def formula_bytes(self, batch: int, channels: int, sizes: Sizes, itemsize: int, rounded_by: int = GROUP) -> int:
        """Bytes kept for one call by formula: core (in its bits), factors, and the group of each sample (int32).

        The rotation of the batch mode is not in it: one copy per batch size serves all layers, and where the groups are
        not random so do they. An input of sizes without factors is
        kept whole.

        Args:
            batch: size of the batch.
            channels: channels of the input.
            sizes: of its spatial axes.
            itemsize: bytes of an element as it is.
            rounded_by: elements that share a range where the core is rounded.
        """
        elements = math.prod(self.core_shape(batch, channels, sizes))
        core = kept_bytes(elements, itemsize, self.bits, rounded_by)
        group = self.spatial_factors(sizes)
        if group is None:
            return core
        factors = sum(factor.numel() for factor in (self.channel, *group) if factor is not None)
        return core + factors * itemsize + self.batch.formula_bytes(batch, itemsize)

    def shrinks(self, batch: int, channels: int, sizes: Sizes) -> bool:
        """Whether core, factors and groups of an input are smaller than the input itself (in float32), both rounded.

        They are not where the batch is tiny or a factor is as large as the input; then the input is better kept, unless
        the batch mode is one that is projected in any case.
        """
        if self.batch.unconditional:
            return True
        whole = kept_bytes(batch * channels * math.prod(sizes), 4, self.bits)
        return self.formula_bytes(batch, channels, sizes, 4) <= whole

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and detached CPU tensors, safe for ``torch.load(weights_only=True)``."""
        return {
            "batch": self.batch.state(),
            "channel": None if self.channel is None else self.channel.detach().cpu(),
            "spatial": [
                [list(sizes), [None if f is None else f.detach().cpu() for f in group]]
                for sizes, group in self.spatial.items()
            ],
            "energy": dict(self.energy),
            "any_size": self.any_size,
            "bits": self.bits,
        }

    @classmethod
    def from_state_dict(
        cls, state: Any, place: str = "a stored subspace", channels: int | None = None
    ) -> LayerSubspace:
        """What :meth:`state_dict` returned, checked.

        Args:
            state: plain containers and tensors.
            place: names it in messages.
            channels: of the layer's input, if known.

        Raises:
            StateError: a value is missing, of another type, shape or dtype, not finite, out of range, or a factor's
                columns are not orthonormal.
        """
        advice = (
            f"{place} cannot be read; it was damaged, or not written by this version of the package for this model. "
            "Resume without the callback's state to calibrate anew."
        )
        batch, channel, spatial, energy, any_size, bits = Stored(state, place, advice).fields(
            "batch", "channel", "spatial", "energy", "any_size", "bits"
        )
        rule = stored_rule(batch)
        factor = stored_factor(channel, channels)
        groups: dict[Sizes, tuple[Tensor | None, ...]] = {}
        for item in spatial.items():
            lengths, group = item.items(2)
            sizes = lengths.integers(0)
            if sizes in groups:
                lengths.refuse("sizes that differ from one another", f"{list(sizes)} for the second time")
            factors = zip(group.items(len(sizes)), sizes, strict=True)
            groups[sizes] = tuple(stored_factor(found, size) for found, size in factors)
        held = {name: value.number(0.0, 1.0 + ROUNDING) for name, value in energy.named()}
        if bits.value is not None and not (isinstance(bits.value, int) and bits.value in CORE_BITS):
            bits.refuse(f"None, {', '.join(map(str, CORE_BITS))}")
        found = cls(rule, factor, groups, held, any_size.flag(), bits.value)
        if len({factor.dtype for factor in found.factors()}) > 1:
            spatial.refuse("factors of one dtype", "a list with factors of several dtypes")
        return found


@dataclass(frozen=True)
class Spectrum:
    """Leading eigenpairs of one mode's Gram matrix.

    Attributes:
        values: ``(k,)`` descending.
        vectors: ``(n, k)``.
        total: the trace, exact even where only leading eigenpairs are known.
    """

    values: Tensor
    vectors: Tensor
    total: float

    def truncate(self, rank: ModeRank, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, float]:
        """The factor for a rank rule (``None``: the whole mode) and the energy that it holds."""
        size = self.vectors.shape[0]
        if isinstance(rank, int):
            columns = rank
        elif isinstance(rank, float):
            columns = energy_rank(self.values, self.total, rank) if rank < 1.0 else size
        else:
            columns = size
        columns = min(columns, size)
        if columns == size:
            return None, 1.0
        columns = min(columns, self.values.numel())
        held = float(self.values[:columns].sum()) / self.total
        factor = self.vectors[:, :columns]
        if factor.dtype == torch.float32 and dtype == torch.float64:
            factor = orthonormalize(factor.double())
        # A copy: a slice of one column may count as contiguous, and holds the storage of all of them.
        return factor.to(device, dtype, copy=True, memory_format=torch.contiguous_format), min(held, 1.0)


@dataclass(frozen=True)
class LayerSpectra:
    """Spectra of every mode that may be truncated, from which a subspace of any rank can be cut.

    Attributes:
        work: multiply-adds of the layer's forward pass on each element of its input.
        batch: spectrum of the batch positions, where that mode is learned.
    """

    channels: int
    channel: Spectrum | None
    spatial: dict[Sizes, tuple[Spectrum | None, ...]]
    constant_energy: float
    dtype: torch.dtype
    device: torch.device
    work: float = math.inf
    batch: Spectrum | None = None

    @property
    def totals(self) -> tuple[Any, ...]:
        """What layers that read the same inputs have in common: the energy in every mode."""
        spatial = ((sizes, *(s and s.total for s in spectra)) for sizes, spectra in sorted(self.spatial.items()))
        return (self.channels, *spatial)

    def subspace(self, ranks: ModeRanks, unbiased: bool, bits: int | None = None) -> LayerSubspace:
        """Factors of the given rank rules, and the bits of an element of the core."""
        energy: dict[str, float] = {}
        channel = None
        if self.channel is not None:
            channel, energy["channel"] = self.channel.truncate(ranks.channel, self.dtype, self.device)
        spatial: dict[Sizes, tuple[Tensor | None, ...]] = {}
        for sizes, spectra in self.spatial.items():
            group: list[Tensor | None] = []
            for axis, spectrum in enumerate(spectra):
                factor, held = None, 1.0
                if spectrum is not None:
                    factor, held = spectrum.truncate(ranks.spatial_rank, self.dtype, self.device)
                if factor is not None and ranks.spatial == "compact":
                    size, rank = factor.shape
                    if not worthwhile(size, rank, self.work):
                        factor, held = None, 1.0
                group.append(factor)
                key = f"spatial_{axis}"
                energy[key] = min(held, energy.get(key, 1.0))
            spatial[sizes] = tuple(group)
        # One row a sample is little to keep, and its gradient has no sum over positions that would even out the noise.
        rows = ranks.batch == "compact" and not any(self.spatial)
        rule = BatchRule("full" if rows else ranks.batch, unbiased, self.constant_energy)
        if self.batch is not None:
            size = self.batch.vectors.shape[0]
            factor, energy["batch"] = self.batch.truncate(ranks.batch_rank(size), self.dtype, self.device)
            rule = LearnedBatch(ranks.batch, False, self.constant_energy, factor)
        return LayerSubspace(rule, channel, spatial, energy, _whole(ranks.spatial_rank), bits)


class LayerStatistics:
    """Streaming second moments of the inputs of one layer, mode by mode.

    Args:
        ranks: rank rules; a mode that is kept whole costs nothing here.
        channel_axis: 1 for convolutions, -1 for linear layers.
        label: names the layer in messages.
        work: multiply-adds of the layer's forward pass on each element of its input.
        learned: collect what a learned batch mode needs, from the inputs of the batch size that comes first; others,
            such as the last batch of an epoch, add to the other modes only.
    """

    def __init__(
        self, ranks: ModeRanks, channel_axis: int, label: str, work: float = math.inf, learned: bool = False
    ) -> None:
        self.ranks = ranks
        self.channel_axis = channel_axis
        self.label = label
        self.work = work
        self.learned = learned and not _whole(ranks.batch)
        self.calls = 0
        self.channels = 0
        self.shape: tuple[int, ...] = ()
        self._channel: GramMatrix | NystromSketch | None = None
        self._spatial: dict[Sizes, list[GramMatrix | NystromSketch] | None] = {}
        self._energy: Tensor | None = None
        self._batch: GramMatrix | NystromSketch | None = None
        self._batch_size = 0
        self._input_dtype = torch.float32

    def _accumulators(self, channels: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        """Create what a shape needs; a process that saw no such shape then adds zeros."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        if self._energy is None:
            self._energy = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
            self.channels, self._input_dtype = channels, dtype
            if not _whole(self.ranks.channel):
                rank = self.ranks.channel
                assert not isinstance(rank, str)
                self._channel = mode_statistics(channels, rank, accumulate, device, f"{self.label}, channel mode")
        if channels != self.channels:
            raise CalibrationError(f"{self.label}: inputs with {self.channels} and with {channels} channels.")
        if sizes not in self._spatial:
            rank = self.ranks.spatial_rank
            self._spatial[sizes] = (
                None
                if isinstance(rank, str) or _whole(rank)
                else [mode_statistics(n, rank, accumulate, device, f"{self.label}, spatial mode") for n in sizes]
            )

    def _batch_accumulator(self, size: int, device: torch.device) -> None:
        rank = self.ranks.batch_rank(size)
        assert not isinstance(rank, str)
        self._batch_size = size
        self._batch = mode_statistics(size, rank, self._accumulation_dtype, device, f"{self.label}, batch mode")

    @torch.inference_mode(False)  # accumulators made under inference mode could not be added to outside of it
    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        """Add one input, shape ``(B, C, *sizes)`` or ``(B, *sizes, C)``."""
        input = input.detach()
        axis = self.channel_axis % input.dim()
        sizes = tuple(n for dim, n in enumerate(input.shape) if dim not in (0, axis))
        self._accumulators(input.shape[axis], sizes, input.dtype, input.device)
        self.calls += 1
        self.shape = tuple(input.shape)
        if input.numel() == 0:
            return
        assert self._energy is not None
        total = torch.linalg.vector_norm(input, dtype=self._accumulation_dtype).double().square()
        constant = total.new_zeros(())
        if isinstance(self.ranks.batch, float):
            mean = input.mean(0, dtype=self._accumulation_dtype)
            constant = torch.linalg.vector_norm(mean).double().square() * input.shape[0]
        self._energy += torch.stack([total, constant]).to(self._energy)
        if self._channel is not None:
            self._channel.update(input, axis)
        spatial = self._spatial[sizes]
        if spatial is not None:
            axes = [dim for dim in range(1, input.dim()) if dim != axis]
            for statistics, dim in zip(spatial, axes, strict=True):
                statistics.update(input, dim)
        if self.learned and self._batch is None:
            self._batch_accumulator(input.shape[0], input.device)
        if self._batch is not None and input.shape[0] == self._batch_size:
            self._batch.update(input, 0)

    @property
    def channels_first_shape(self) -> tuple[int, ...]:
        """``(B, C, *sizes)`` of the last input."""
        sizes = [n for axis, n in enumerate(self.shape) if axis not in (0, self.channel_axis % len(self.shape))]
        return (self.shape[0], self.channels, *sizes)

    @property
    def _accumulation_dtype(self) -> torch.dtype:
        return torch.float64 if self._input_dtype == torch.float64 else torch.float32

    def signature(self) -> list[Any]:
        """What was seen, as plain data to exchange between processes."""
        widths = [sketch.width for sketch in self._sketches()]
        dtype = str(self._input_dtype).removeprefix("torch.")
        return [self.channels, sorted(self._spatial), dtype, widths, self._batch_size]

    def extend(self, signature: list[Any], device: torch.device) -> None:
        """Make accumulators for what another process saw, in the widths of its sketches.

        Raises:
            CalibrationError: the other process learned the batch mode of another batch size.
        """
        channels, every, dtype, widths, size = signature
        for sizes in every:
            self._accumulators(channels, tuple(sizes), getattr(torch, dtype), device)
        if size and self._batch is None:
            self._batch_accumulator(size, device)
        if size and size != self._batch_size:
            raise CalibrationError(
                f"{self.label}: batches of {self._batch_size} samples here and of {size} on another process. "
                "A learned batch mode needs one size: give all processes the same batch_size, and drop_last=True."
            )
        for sketch, width in zip(self._sketches(every), widths, strict=True):
            sketch.agree(width)

    def _sketches(self, every: Iterable[Sequence[int]] | None = None) -> Iterator[NystromSketch]:
        """Sketches of the channel mode, and of the spatial modes of the given sizes; all by default."""
        modes: list[GramMatrix | NystromSketch | None] = [self._channel]
        for sizes in sorted(self._spatial) if every is None else every:
            modes += self._spatial[tuple(sizes)] or ()
        modes.append(self._batch)
        yield from (statistics for statistics in modes if isinstance(statistics, NystromSketch))

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated, as plain containers and CPU tensors."""
        tensors = [tensor.detach().cpu().clone() for tensor in self.tensors()]
        return {"signature": self.signature(), "calls": self.calls, "shape": list(self.shape), "tensors": tensors}

    def load_state_dict(self, state: Any, device: torch.device, channels: int | None = None) -> None:
        """Continue from what :meth:`state_dict` returned, before any update; nothing is changed on an error.

        What was accumulated may hold NaN: so did the run that stored it.

        Args:
            state: plain containers and tensors.
            device: device of the accumulators.
            channels: of the layer's input, if known.

        Raises:
            StateError: the state is damaged, or of other rank rules or another layer.
        """
        advice = (
            f"{self.label}: the stored statistics do not fit its rank rules or its inputs, or are damaged. "
            "Resume with the model and options of the stored run."
        )
        signature, calls, shape, tensors = Stored(state, f"{self.label}: the stored statistics", advice).fields(
            "signature", "calls", "shape", "tensors"
        )
        called, lengths, saved = calls.integer(0), shape.integers(0), tensors.items()
        if not saved:
            return
        made = self._made_for(signature, [item.value for item in saved], device, channels)
        own = made.tensors()
        if len(own) != len(saved):
            tensors.refuse(f"a list of {len(own)}")
        for target, item in zip(own, saved, strict=True):
            target.copy_(item.tensor(tuple(target.shape), (target.dtype,), finite=False))
        _check_energies(own, tensors)
        axis = self.channel_axis % len(lengths) if len(lengths) > 1 else 1
        sizes = tuple(size for dim, size in enumerate(lengths) if dim not in (0, axis))
        if len(lengths) < 2 or lengths[axis] != made.channels or sizes not in made._spatial:
            shape.refuse(f"the shape of a batch with {made.channels} channels and sizes of the signature")
        made.calls, made.shape = called, lengths
        self.__dict__.update(made.__dict__)

    def _made_for(
        self, signature: Stored, tensors: list[Any], device: torch.device, channels: int | None
    ) -> LayerStatistics:
        """New accumulators for a stored signature, which is checked against the stored tensors before any is made."""
        width, every, dtype, widths, batch = signature.items(5)
        seen = [item.integers(0) for item in every.items()]
        if len(set(seen)) != len(seen):
            every.refuse("sizes that differ from one another")
        width.integer(1)
        if channels is not None and width.value != channels:
            width.refuse(f"{channels}, the channels of the layer")
        name = dtype.text(FLOATS)
        learned = set() if _whole(self.ranks.channel) else {width.value}
        spatial = self.ranks.spatial_rank
        if not isinstance(spatial, str) and not _whole(spatial):
            learned |= {size for sizes in seen for size in sizes}
        size = batch.integer(0)
        if size and not self.learned:
            batch.refuse("0, for its batch mode is not learned")
        learned |= {size} - {0}
        present = {found.shape[0] for found in tensors if isinstance(found, Tensor) and found.dim() == 2}
        if learned - present:  # a damaged size must not make a matrix that does not fit into memory
            signature.refuse("widths of the stored tensors", f"one of modes {sorted(learned - present)} wide")
        made = LayerStatistics(self.ranks, self.channel_axis, self.label, self.work, self.learned)
        for sizes in seen:
            made._accumulators(width.value, sizes, getattr(torch, name), device)
        if size:
            made._batch_accumulator(size, device)
        sketches = list(made._sketches(seen))
        for sketch, columns in zip(sketches, widths.items(len(sketches)), strict=True):
            sketch.agree(columns.integer(1, sketch.sample.shape[0]))
        return made

    def tensors(self) -> list[Tensor]:
        """Every accumulator, in an order that is equal on all processes, for a sum in place."""
        found = [] if self._energy is None else [self._energy]
        if self._channel is not None:
            found += self._channel.tensors()
        for sizes in sorted(self._spatial):
            for statistics in self._spatial[sizes] or ():
                found += statistics.tensors()
        return found if self._batch is None else [*found, *self._batch.tensors()]

    def spectra(self) -> LayerSpectra:
        """Eigen-decompose what was accumulated.

        Raises:
            CalibrationError: nothing was seen, or the inputs hold NaN, Inf, or nothing but zeros.
        """
        if self._energy is None:
            raise CalibrationError(f"{self.label} saw no input during calibration. Run a forward pass through it.")
        total, constant = self._energy.tolist()
        if not math.isfinite(total) or not all(bool(tensor.isfinite().all()) for tensor in self.tensors()):
            raise CalibrationError(
                f"{self.label} received NaN or Inf during calibration (sum of squares {total}). "
                "Finite inputs are needed: check the data, its normalisation, and the weights before this layer."
            )
        if total == 0.0:
            raise ZeroInputError(f"{self.label} received only zeros during calibration")
        device = self._energy.device
        channel = None
        if self._channel is not None:
            channel = Spectrum(*self._channel.eigh(), self._channel.trace)
        spatial: dict[Sizes, tuple[Spectrum | None, ...]] = {}
        for sizes, group in self._spatial.items():
            spatial[sizes] = (
                (None,) * len(sizes)
                if group is None
                else tuple(Spectrum(*statistics.eigh(), statistics.trace) for statistics in group)
            )
        batch = None if self._batch is None else Spectrum(*self._batch.eigh(), self._batch.trace)
        return LayerSpectra(
            self.channels, channel, spatial, constant / total, self._input_dtype, device, self.work, batch
        )


def _check_energies(accumulated: list[Tensor], stored: Stored) -> None:
    """Refuse sums of squares that no inputs have; NaN and Inf are found when they are used."""
    if not all(bool(tensor.isfinite().all()) for tensor in accumulated):
        return
    total, constant = accumulated[0].tolist()
    most = total * (1.0 + ROUNDING)
    if not 0.0 <= constant <= most:
        stored.refuse("energies of at least 0, of the mean no more than of all", f"a list that begins with {total:g}")
    for tensor in accumulated[1:]:
        diagonal = tensor.diagonal().double() if tensor.dim() == 2 and len(tensor) == tensor.shape[1] else None
        # A sketch says nothing by itself; its trace is the next one.
        trace = float(tensor) if tensor.dim() == 0 else 0.0 if diagonal is None else float(diagonal.sum())
        if not 0.0 <= trace <= most or (diagonal is not None and bool((diagonal < 0.0).any())):
            stored.refuse(
                f"modes with energies from 0 to {total:g}, that of the input", f"a list with one of {trace:g}"
            )


class ZeroInputError(CalibrationError):
    """A layer's calibration inputs were all zero: it has no direction to keep and is left alone."""


class CapturedEnergy:
    """Energy that the learned modes of a subspace hold of the inputs given to :meth:`update`.

    The batch mode is left out: it is represented without bias, not truncated for good.

    Attributes:
        shapes: ``(B, C, *sizes)`` of every input.
        itemsize: bytes of an input element.
    """

    def __init__(self, subspace: LayerSubspace, channel_axis: int) -> None:
        self.subspace = subspace
        self.channel_axis = channel_axis
        self.kept = 0.0
        self.total = 0.0
        self.shapes: list[tuple[int, ...]] = []
        self.itemsize = 4

    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        axis = self.channel_axis % input.dim()
        axes = [dim for dim in range(1, input.dim()) if dim != axis]
        sizes = tuple(input.shape[dim] for dim in axes)
        self.shapes.append((input.shape[0], input.shape[axis], *sizes))
        self.itemsize = input.element_size()
        core = input.detach()
        total = _energy(core)
        for dim, factor in [
            (axis, self.subspace.channel),
            *zip(axes, self.subspace.spatial_factors(sizes) or (), strict=False),
        ]:
            if factor is not None:
                core = mode_product(core, factor.to(core).T, dim)
        self.total += total
        self.kept += total if core is input else _energy(core)

    @property
    def fraction(self) -> float:
        return self.kept / self.total if self.total else 1.0


def _whole(rank: ModeRank) -> bool:
    return rank == "full" or (isinstance(rank, float) and rank >= 1.0)


def _energy(tensor: Tensor) -> float:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(tensor, dtype=dtype)) ** 2
