"""What one layer must not forget: its protected basis, the basis reserved for the experience, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lightning_lance.continual.basis import (
    Moments,
    UpTo,
    as_double,
    complement,
    grow_and_rest,
    lead,
    reserve,
    sharpen,
    shrink,
)
from lightning_lance.continual.leftover import LEFT_OUT, Leftover, energy_along, inside, outside, step_sizes
from lightning_lance.continual.moments import FeatureMoments
from lightning_lance.continual.stored_memory import ADVICE, StoredMemory, read_memory
from lightning_lance.errors import StateError
from lightning_lance.tensors.checked import FLOATS, Stored
from lightning_lance.tensors.linalg import orthonormalize


class Stage(str, Enum):
    """Where a layer is in the life of an experience."""

    EMPTY = "empty"
    CALIBRATED = "calibrated"
    TRAINING = "training"
    CONSOLIDATED = "consolidated"


@dataclass(frozen=True)
class Capacity:
    """How much of a layer's feature side is taken, over all its groups.

    Attributes:
        width: directions in all.
        protected: directions that earlier experiences need.
        bytes: size of what is stored: the protected basis, or that of the free directions, and what is beside it.
    """

    width: int
    protected: int
    bytes: int

    @property
    def free(self) -> int:
        """Directions left to learn in."""
        return self.width - self.protected

    @property
    def fraction(self) -> float:
        """Fraction that is protected."""
        return self.protected / self.width


class LayerMemory:
    """Protected basis ``M`` and reserved basis ``U`` of one layer.

    One experience is ``reserve -> start -> protect``; the states are empty, calibrated, training, consolidated, and
    then calibrated again. What ``M`` spans only grows. As soon as fewer directions are free than stored, an
    orthonormal basis of the free ones is stored in its place, with the energies that earlier experiences have in
    them: a layer takes less the fuller it is, and never more than half of ``K x K`` numbers. Where steps are damped,
    the directions outside of ``M`` in which earlier experiences have energy are stored beside it, in ``K x K`` at most.

    Args:
        width: length ``K`` of a feature vector.
        groups: channel groups, each with bases of its own.
        label: names the layer in messages.
        dtype: dtype of the bases.
        device: device of the bases.
        compact: store the free directions where they are fewer; ``False``: always ``M``, whose columns then never
            change.
        stored: dtype that ``M`` and what is beside it are stored in, where it is not compact; ``None``: ``dtype``. What
            is protected is the span of the stored numbers, made orthonormal wherever it is used, so that few bits leave
            out a little of an experience's energy and nothing of the promise.

    Attributes:
        stage: the state.
        compact: as given.
        counts: directions protected in each group.
        opened: columns of ``M`` in each group that the running experience may move all the same; ``None``: none.
        importance: how far each column of ``M`` is closed, in [0, 1], shape ``(groups, m)``; ``None``: altogether.
        reserved: ``U``, shape ``(groups, K, r)``, zero columns alike; ``None``: everything outside of ``M``, and what
            is opened.
        steps: where steps are damped, their sizes in [0, 1] along the columns of ``U``; with everything outside of
            ``M`` along the stored directions outside of it, shape ``(groups, r)``. Else ``None``.

    Example:
        >>> import torch
        >>> from lightning_lance.continual import LayerMemory
        >>> memory = LayerMemory(8)
        >>> for experience in range(3):
        ...     inputs = torch.randn(100, 2) @ torch.randn(2, 8)
        ...     _ = memory.reserve()
        ...     memory.start()
        ...     # ... training, with weight changes in the complement of memory.protected ...
        ...     added = memory.protect(inputs.T @ inputs, threshold=0.97)
        >>> memory.capacity().protected <= 6
        True
    """

    def __init__(
        self,
        width: int,
        groups: int = 1,
        label: str = "layer",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compact: bool = True,
        stored: torch.dtype | None = None,
    ) -> None:
        self.width = width
        self.groups = groups
        self.label = label
        self.stage = Stage.EMPTY
        self.compact = compact
        self._dtype = dtype
        self._basis = torch.empty(groups, width, 0, dtype=dtype if compact else stored or dtype, device=device)
        self._is_free = False
        self.opened: list[list[int]] | None = None
        self.importance: Tensor | None = None
        self.counts = [0] * groups
        # What is left of earlier experiences outside of M: beside a stored M some directions of their own, beside the
        # free ones nothing but the energies along them.
        self._soft = torch.empty(groups, width, 0, dtype=self._basis.dtype, device=device)
        self._stored = self._basis
        self._energies = torch.empty(groups, 0, dtype=torch.float64)
        self._rest = [0.0] * groups
        self.reserved: Tensor | None = None
        self.steps: Tensor | None = None

    @property
    def protected(self) -> Tensor:
        """``M``, shape ``(groups, K, m)``; a group with fewer directions than ``m`` ends in zero columns.

        Written out anew where the free directions are stored.
        """
        if self._is_free:
            return self._stack([complement(basis) for basis in self._bases()])
        return self._basis if self._basis.dtype == self._dtype else self._stack(self._bases())

    @property
    def free(self) -> Tensor | None:
        """Orthonormal basis of everything outside of ``M``, ``(groups, K, K - m)``, where that is what is stored."""
        return self._basis if self._is_free else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bases."""
        return self._dtype

    @property
    def has_columns(self) -> bool:
        """Whether the columns of ``M`` are what is stored, so that single ones can be named."""
        return not self._is_free and any(self.counts)

    def to(self, device: torch.device) -> None:
        """Move the bases."""
        self._hold(self._stored.to(device), self._basis.shape[2])

    def _require(self, action: str, *allowed: Stage) -> None:
        if self.stage not in allowed:
            names = " or ".join(repr(stage.value) for stage in allowed)
            raise StateError(
                f"{self.label}: {action}() is not allowed in state {self.stage.value!r}, only in {names}. "
                "An experience is reserve() -> start() -> protect(); abandon() ends one that failed."
            )

    def reserve(
        self, gram: Tensor | FeatureMoments | None = None, rank: int | float | UpTo | str = "full", damping: float = 0.0
    ) -> Tensor | None:
        """Choose the directions that the coming experience may change, and how long a step is in them.

        Args:
            gram: second moments of the experience's feature vectors, ``(K, K)`` or ``(groups, K, K)``; not needed for
                ``"full"`` without damping.
            rank: ``"full"``: everything outside of ``M``; an int: that many leading directions outside of ``M``; a
                float in (0, 1]: those that hold that fraction of the energy outside of ``M``; ``UpTo(threshold)``:
                those that together with ``M`` hold the threshold.
            damping: see :func:`~lightning_lance.continual.leftover.step_sizes`; 0 for steps of full length.

        Returns:
            ``U``, shape ``(groups, K, r)``, or ``None`` for everything outside of ``M``.

        Raises:
            StateError: the state is neither empty nor consolidated, or a rank or damping is given without moments.
        """
        self._require("reserve", Stage.EMPTY, Stage.CONSOLIDATED)
        self.reserved = self.steps = self.opened = self.importance = None
        damped = damping > 0.0 and any(self.counts)
        if gram is None and (damped or not isinstance(rank, str)):
            given = f"damping={damping!r}" if damped else f"rank={rank!r}"
            raise StateError(f"{self.label}: reserve({given}) needs the Gram matrix of the experience.")
        moments = [] if gram is None else [Moments.of(found) for found in self._moments(gram)]
        if not isinstance(rank, str):
            find = lead if self._is_free else reserve
            self.reserved = self._stack([find(*pair, rank) for pair in zip(self._bases(), moments, strict=True)])
        if damped:
            sizes = []
            for group, (left, seen) in enumerate(zip(self._leftovers(), moments, strict=True)):
                if self.reserved is None:  # along its own directions, whose energies are stored
                    basis, past = left.directions, left.energies
                else:
                    basis = self.reserved[group]
                    past = left.along(basis)
                sizes.append(step_sizes(past, energy_along(seen, basis), damping if seen.total > 0.0 else 0.0))
            self.steps = torch.stack(sizes).to(self._basis.device, self._dtype)
        self.stage = Stage.CALIBRATED
        return self.reserved

    def open(self, columns: list[list[int]]) -> None:
        """Let the coming experience move some columns of ``M`` too, in steps of full length.

        Args:
            columns: their indices, in each group.

        Raises:
            StateError: the state is not calibrated, or ``M`` is not what is stored.
        """
        self._require("open", Stage.CALIBRATED)
        if not any(columns):
            return
        if self._is_free:
            raise StateError(f"{self.label}: its free directions are stored, so that no column of M can be opened.")
        self.opened = [list(found) for found in columns]
        if self.reserved is not None:
            extra = self._stack([orthonormalize(found).to(self._basis.device) for found in self.duals(self.opened)])
            self.reserved = torch.cat([extra, self.reserved], 2)
            if self.steps is not None:
                self.steps = torch.cat([self.steps.new_ones(self.groups, extra.shape[2]), self.steps], 1)

    def scale(self, importance: Tensor) -> None:
        """Close the columns of ``M`` in part: a step along one is multiplied with 1 minus its importance.

        Args:
            importance: in [0, 1], shape ``(groups, m)``.

        Raises:
            StateError: the state is not calibrated.
        """
        self._require("scale", Stage.CALIBRATED)
        self.importance = importance

    @property
    def scaled(self) -> bool:
        """Whether some directions are closed in part."""
        return self.steps is not None or self.importance is not None

    @property
    def rounded(self) -> bool:
        """Whether the stored columns span ``M`` and are orthonormal but for their rounding."""
        return not self._is_free and self._basis.dtype != self._dtype

    @property
    def stored(self) -> Tensor:
        """What is stored of ``M`` and, where steps are damped, of what is beside it: ``(groups, K, m)``.

        To be worked with as it is, together with :meth:`closing`.
        """
        return self._stored if self.steps is not None else self._basis

    @property
    def beside(self) -> int:
        """How many directions beside ``M`` are stored in each group."""
        return self._soft.shape[2]

    def closing(self) -> Tensor:
        """How far each stored column is closed to the running experience, ``(groups, m)``: in [0, 1]."""
        flags = self.is_closed()
        return flags if self.steps is None else torch.cat([flags, 1.0 - self.steps], 1)

    def is_closed(self) -> Tensor:
        """1 for each column of ``M`` that the running experience may not move, else 0; shape ``(groups, m)``."""
        flags = torch.ones(self.groups, self._basis.shape[2], dtype=self._dtype, device=self._basis.device)
        for group, found in enumerate(self.opened or []):
            flags[group, found] = 0.0
        return flags

    def columns(self, indices: list[list[int]]) -> list[Tensor]:
        """Some stored columns of ``M``, for each group ``(K, j)`` in float64 on the CPU."""
        return [as_double(basis[:, found]) for basis, found in zip(self._basis, indices, strict=True)]

    def duals(self, indices: list[list[int]], counts: Sequence[int] | None = None) -> list[Tensor]:
        """For some columns of ``M`` the vectors ``D`` in its span with ``Dᵀ M`` the rows of the identity.

        With an orthonormal ``M`` they are the columns themselves.

        Args:
            indices: of the columns, in each group.
            counts: of the leading columns that ``M`` is taken to have; ``None``: all.

        Returns:
            For each group ``(K, j)`` in float64 on the CPU.
        """
        result = []
        for basis, found, count in zip(self._basis, indices, counts or self.counts, strict=True):
            exact = as_double(basis[:, :count])
            chosen = torch.eye(count, dtype=torch.float64)[:, found]
            if found:
                chosen = torch.cholesky_solve(chosen, torch.linalg.cholesky(exact.T @ exact))
            result.append(exact @ chosen)
        return result

    def closed(self) -> Tensor:
        """``B`` such that the change of a weight is one in all directions times ``I - B Bᵀ``, ``(groups, K, m)``.

        ``M`` without what is opened, and where steps are damped the stored directions outside of it times
        ``sqrt(1 - s)``.
        """
        closed = self.protected
        if self.opened is not None:
            parts = []
            for basis, count, flags in zip(self._basis, self.counts, self.is_closed(), strict=True):
                parts.append(sharpen(basis[:, :count][:, flags[:count] > 0]).to(basis.device))
            closed = self._stack(parts)
        if self.importance is not None:
            closed = closed * self.importance.to(closed).sqrt().unsqueeze(1)
        if self.steps is None:
            return closed
        return torch.cat([closed, self._open() * (1.0 - self.steps).sqrt().unsqueeze(1)], 2)

    def directions(self) -> Tensor:
        """``U``, times the step sizes where steps are damped, ``(groups, K, r)``."""
        assert self.reserved is not None
        return self.reserved if self.steps is None else self.reserved * self.steps.unsqueeze(1)

    def start(self) -> None:
        """Begin training.

        Raises:
            StateError: the state is not calibrated.
        """
        self._require("start", Stage.CALIBRATED)
        self.stage = Stage.TRAINING

    def protect(
        self,
        gram: Tensor | FeatureMoments,
        threshold: float,
        soft: bool = False,
        left_out: float = LEFT_OUT,
        most: int | None = None,
    ) -> int:
        """Enlarge ``M`` until it holds more than a fraction of the experience's energy, in each group.

        Args:
            gram: second moments of the feature vectors after training, ``(K, K)`` or ``(groups, K, K)``.
            threshold: the fraction, in (0, 1].
            soft: store the directions of what is not protected beside ``M``, to damp steps along them.
            left_out: energy of an experience, of 1 in all, that directions may hold which are not stored then.
            most: directions that are stored so in each group, at most; ``None``: no limit.

        Returns:
            Directions added, over all groups.

        Raises:
            StateError: the state is not training.
            CalibrationError: the moments hold NaN or Inf.
        """
        self._require("protect", Stage.TRAINING)
        before = sum(self.counts)
        moments = [Moments.of(found) for found in self._moments(gram)]
        groups = list(zip(self._bases(), moments, self._leftovers(), strict=True))
        if self._is_free:
            self._store_free([inside(left, shrink(free, seen, threshold), seen) for free, seen, left in groups])
        else:
            grown, lefts = [], []
            for basis, seen, left in groups:
                larger, rest = grow_and_rest(basis, seen, threshold)
                grown.append(larger)
                lefts.append(outside(left, seen, rest, larger, basis.shape[1], soft, left_out, most))
            stored = max(basis.shape[1] for basis in grown) + max(left.directions.shape[1] for left in lefts)
            if self.compact and self.width - min(basis.shape[1] for basis in grown) < stored:
                self._is_free = True
                self._store_free([inside(left, complement(b)) for b, left in zip(grown, lefts, strict=True)])
            else:
                self._append(grown, [left.directions for left in lefts])
                self._store_energies(lefts)
        self.reserved = self.steps = self.opened = self.importance = None
        self.stage = Stage.CONSOLIDATED
        return sum(self.counts) - before

    def _append(self, grown: list[Tensor], beside: list[Tensor]) -> None:
        """Store what is new of ``M``, whose other columns stay bit for bit, and what is beside it."""
        raw = [basis[:, :count] for basis, count in zip(self._basis, self.counts, strict=True)]
        bases = [torch.cat([old, new[:, old.shape[1] :].to(old)], 1) for old, new in zip(raw, grown, strict=True)]
        self.counts = [basis.shape[1] for basis in bases]
        parts = [self._stack(found, self._basis.dtype) for found in (bases, beside)]
        self._hold(torch.cat(parts, 2), parts[0].shape[2])

    def _hold(self, stored: Tensor, count: int) -> None:
        """Store ``M``, or the free directions, and behind its columns what is beside it, in one tensor."""
        self._stored, self._basis, self._soft = stored, stored[:, :, :count], stored[:, :, count:]

    def _store_free(self, lefts: list[Leftover]) -> None:
        """Store the free directions, turned into eigenvectors of what earlier experiences have in them."""
        self.counts = [self.width - left.directions.shape[1] for left in lefts]
        stored = self._stack([left.directions for left in lefts])
        self._hold(stored, stored.shape[2])
        self._store_energies(lefts)

    def _store_energies(self, lefts: list[Leftover]) -> None:
        widest = max(left.energies.numel() for left in lefts)
        self._energies = torch.zeros(self.groups, widest, dtype=torch.float64)
        for target, left in zip(self._energies, lefts, strict=True):
            target[: left.energies.numel()] = left.energies
        self._rest = [left.rest for left in lefts]

    def _open(self) -> Tensor:
        """The stored directions outside of ``M``."""
        if self._is_free or self._basis.dtype == self._dtype:
            return self._basis if self._is_free else self._soft
        protected, soft = self.protected, self._soft.to(self._dtype)
        return soft - protected @ (protected.mT @ soft)  # rounding has turned both a little

    def _leftovers(self) -> list[Leftover]:
        """What is left of earlier experiences outside of ``M``, in each group."""
        return [Leftover(*found) for found in zip(self._open(), self._energies, self._rest, strict=True)]

    def abandon(self) -> None:
        """End an experience that failed: ``M`` stays as it was. Does nothing outside of one."""
        if self.stage in (Stage.CALIBRATED, Stage.TRAINING):
            self.reserved = self.steps = self.opened = self.importance = None
            self.stage = Stage.CONSOLIDATED if any(self.counts) else Stage.EMPTY

    def basis(self) -> Tensor:
        """``U`` written out, also where it is everything outside of ``M``: ``(groups, K, r)``."""
        if self.reserved is not None:
            return self.reserved
        return self._basis if self._is_free else self._stack([complement(basis) for basis in self._bases()])

    def capacity(self) -> Capacity:
        """Directions taken and free."""
        return Capacity(self.width * self.groups, sum(self.counts), self.bytes)

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return self._basis.nbytes + self._soft.nbytes + self._energies.nbytes

    def _bases(self) -> list[Tensor]:
        """The stored basis of each group."""
        counts = [self.width - count for count in self.counts] if self._is_free else self.counts
        bases = [basis[:, :count] for basis, count in zip(self._basis, counts, strict=True)]
        if self._basis.dtype != self._dtype:
            bases = [sharpen(basis).to(self._basis.device, self._dtype) for basis in bases]
        return bases

    def _moments(self, gram: Tensor | FeatureMoments) -> Sequence[Tensor | Moments]:
        if isinstance(gram, FeatureMoments):
            return gram.groups()
        if gram.shape not in ((self.width, self.width), (self.groups, self.width, self.width)):
            raise StateError(
                f"{self.label}: a Gram matrix of shape {tuple(gram.shape)} was given; ({self.width}, {self.width}) in "
                f"each of {self.groups} groups is needed."
            )
        return list(gram.reshape(self.groups, self.width, self.width))

    def _stack(self, bases: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        widest = max(basis.shape[1] for basis in bases)
        stacked = self._basis.new_zeros(self.groups, self.width, widest, dtype=dtype or self._dtype)
        for target, basis in zip(stacked, bases, strict=True):
            target[:, : basis.shape[1]] = basis
        return stacked

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors, safe for ``torch.load(weights_only=True)``."""
        return {
            "stage": self.stage.value,
            "basis": self._basis.detach().cpu().contiguous(),
            "is_free": self._is_free,
            "compact": self.compact,
            "counts": list(self.counts),
            "soft": self._soft.detach().cpu().contiguous(),
            "energies": self._energies.clone(),
            "rest": list(self._rest),
            "reserved": None if self.reserved is None else self.reserved.detach().cpu(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Continue from a stored state; nothing is changed on an error.

        Raises:
            StateError: it is damaged, or of a layer with another feature side.
        """
        stored = Stored(state, f"{self.label}: the stored memory", ADVICE)
        self._assign(read_memory(stored, self.groups, self.width, self._dtype))

    @classmethod
    def read(cls, stored: Stored, label: str) -> LayerMemory:
        """The memory that a stored stream has of a layer: width, groups, name of the dtype, and a state.

        Raises:
            StateError: it is damaged, or of the middle of an experience.
        """
        width, groups, dtype, state = stored.items(4)
        sizes = width.integer(1, 1 << 31), groups.integer(1, 1 << 31)
        kind = FLOATS[dtype.text(FLOATS)]
        # Before anything is made of such a size.
        found = read_memory(state, sizes[1], sizes[0], kind, (Stage.EMPTY.value, Stage.CONSOLIDATED.value))
        memory = cls(*sizes, label, kind)
        memory._assign(found)
        return memory

    def _assign(self, found: StoredMemory) -> None:
        device = self._basis.device
        self.stage, self.counts, self._rest = Stage(found.stage), found.counts, found.rest
        self._is_free, self.compact, self._energies = found.is_free, found.compact, found.energies
        self._hold(torch.cat([found.basis, found.soft.to(found.basis)], 2).to(device), found.basis.shape[2])
        self.reserved = None if found.reserved is None else found.reserved.to(device)
        self.steps = self.opened = self.importance = None
