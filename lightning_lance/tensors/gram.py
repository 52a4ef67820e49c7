"""Streaming second moments of one mode: an exact Gram matrix, or a one-pass sketch of a wide one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_lance.errors import LanceWarning
from lightning_lance.tensors.linalg import energy_rank, symmetric_eigh, unfold

SKETCH_ABOVE = 1024
"""A mode wider than this is sketched instead of accumulated exactly."""

OVERSAMPLING = 16
"""Directions a sketch holds beyond those it is asked for (Halko, Martinsson & Tropp, 2011, section 4.2)."""

SKETCH_WIDTH = 64
"""First width ``k`` of a sketch: test, sample and eigenvectors together stay within 256 floats per row."""

_CHUNK = 1 << 22
_SKETCH_CHUNK = 64
_BLOCK = 16


def _chunks(tensor: Tensor, mode: int, dtype: torch.dtype, limit: int = _CHUNK) -> Iterator[Tensor]:
    """Pieces of the mode-n unfolding of at most ``limit`` elements, so that no copy of a whole activation is made.

    A single column of the unfolding is never cut.
    """
    if tensor.numel() == 0:
        return
    others = [axis for axis, size in enumerate(tensor.shape) if axis != mode % tensor.dim() and size > 1]
    if tensor.numel() <= limit or not others:
        yield unfold(tensor, mode).to(dtype)
        return
    rows = max(1, limit * tensor.shape[others[0]] // tensor.numel())
    for piece in torch.split(tensor, rows, dim=others[0]):
        yield from _chunks(piece, mode, dtype, limit)


class GramMatrix:
    """Sum of ``X_(n) X_(n)^T`` over the tensors given to :meth:`update`.

    Args:
        size: width ``n`` of the mode.
        dtype: accumulation dtype, float32 or float64.
        device: device of the accumulator.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.gram = torch.zeros(size, size, dtype=dtype, device=device)

    def update(self, tensor: Tensor, mode: int) -> None:
        for matrix in _chunks(tensor, mode, self.gram.dtype):
            self.gram.addmm_(matrix, matrix.T)
            del matrix  # before the next piece is made

    def tensors(self) -> list[Tensor]:
        """The accumulators, to be summed in place over the processes of a distributed run."""
        return [self.gram]

    @property
    def trace(self) -> float:
        """Energy of what was accumulated."""
        return float(self.gram.diagonal().double().sum())

    def eigh(self) -> tuple[Tensor, Tensor]:
        """``(eigenvalues (n,), eigenvectors (n, n))``, descending, float64 on the CPU."""
        return symmetric_eigh(self.gram)


class NystromSketch:
    """One-pass sketch ``Y = S Ω`` of ``S = Σ X_(n) X_(n)^T`` and its Nyström eigen-decomposition.

    Holds ``2 n k`` floats instead of ``n²``. Method: Tropp, Yurtsever, Udell & Cevher, *Fixed-rank
    approximation of a positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3. An
    energy rule that needs more directions than the sketch holds widens it on the first update, where the
    data is still at hand, and says so.

    Args:
        size: width ``n`` of the mode.
        rank: the rank rule of the mode: an int, or the energy as a float.
        dtype: accumulation dtype.
        device: device of the accumulators.
        label: names the mode in messages.
    """

    def __init__(
        self, size: int, rank: int | float, dtype: torch.dtype, device: torch.device, label: str = "mode"
    ) -> None:
        self.rank = rank
        self.label = label
        self._started = self._agreed = False
        width = rank + OVERSAMPLING if isinstance(rank, int) else SKETCH_WIDTH
        self._allocate(size, min(width, size), dtype, device)

    @property
    def width(self) -> int:
        """Number ``k`` of columns."""
        return self.sample.shape[1]

    def _allocate(self, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # Blocks with seeds of their own: a narrower test matrix is the first columns of a wider one.
        test = torch.empty(size, width, dtype=dtype, device="cpu")
        for block, columns in enumerate(torch.split(test, _BLOCK, dim=1)):
            generator = torch.Generator("cpu").manual_seed(size * 1_000_003 + block)
            drawn = torch.randn(size, _BLOCK, generator=generator, dtype=dtype, device="cpu")
            columns.copy_(drawn[:, : columns.shape[1]])
        self.test = test.to(device)
        self.sample = torch.zeros_like(self.test)
        self._trace = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")

    def agree(self, width: int) -> None:
        """Take the width of another process's sketch, or of a stored one, before the sums are exchanged.

        A sketch that holds data can only become narrower, which keeps its leading columns; so that all processes
        arrive at the least width, each calls this with the widths of all.
        """
        fresh = not (self._started or self._agreed)
        self._agreed = True
        if fresh and width != self.width:
            self._allocate(self.sample.shape[0], width, self.sample.dtype, self.sample.device)
        elif width < self.width:
            self.test, self.sample = self.test[:, :width].contiguous(), self.sample[:, :width].contiguous()

    def _accumulate(self, tensor: Tensor, mode: int) -> None:
        size, dtype = self.sample.shape[0], self.sample.dtype
        # Where the unfolding is a view of the input, only the product with the test matrix takes memory.
        free = tensor.dtype == dtype and tensor.movedim(mode, -1).is_contiguous()
        for matrix in _chunks(tensor, mode, dtype, size * (size // 2 if free else _SKETCH_CHUNK)):
            self.sample.addmm_(matrix, matrix.T @ self.test)
            self._trace += torch.linalg.vector_norm(matrix).to(self._trace).square()
            del matrix  # before the next piece is made

    def update(self, tensor: Tensor, mode: int) -> None:
        self._accumulate(tensor, mode)
        grows = isinstance(self.rank, float) and not (self._started or self._agreed)
        self._started = True
        if not grows:
            return
        size, first = self.sample.shape
        while self.width < size and 0.0 < self.trace < math.inf:
            values, _, _ = self._solve()
            if energy_rank(values, self.trace, self.rank) <= self.width - OVERSAMPLING:
                break
            self._allocate(size, min(2 * self.width, size), self.sample.dtype, self.sample.device)
            self._accumulate(tensor, mode)
        if self.width != first:
            warnings.warn(
                f"{self.label}: energy {self.rank} of a mode {size} wide needs more than {first - OVERSAMPLING} "
                f"directions, so its sketch now holds {2 * self.width} floats per row instead of "
                f"{2 * first}. A lower energy or an int rank keeps it small.",
                LanceWarning,
                stacklevel=2,
            )

    def tensors(self) -> list[Tensor]:
        """The accumulators, to be summed in place over the processes of a distributed run."""
        return [self.sample, self._trace]

    @property
    def trace(self) -> float:
        """Energy of what was accumulated, exact."""
        return float(self._trace)

    def _solve(self) -> tuple[Tensor, Tensor, float]:
        """Eigenvalues, the ``k x k`` map from samples to eigenvectors, and the stabilising shift."""
        sample, test = self.sample, self.test
        shift = float(torch.finfo(sample.dtype).eps * torch.linalg.matrix_norm(sample)) or 1e-30
        cross = (test.T @ sample).double().cpu()
        cross = (cross + cross.T) / 2
        tests = (test.T @ test).double().cpu()
        values, basis = torch.linalg.eigh(cross + shift * tests)
        keep = values > values[-1] * torch.finfo(torch.float64).eps * values.numel()
        half = basis[:, keep] / values[keep].sqrt()
        squared = (sample.T @ sample).double().cpu() + 2 * shift * cross + shift**2 * tests
        squares, rotation = symmetric_eigh(half.T @ squared @ half)
        return (squares - shift).clamp_(min=0.0), half @ (rotation / squares.clamp(min=1e-300).sqrt()), shift

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Leading eigenpairs ``(eigenvalues (r,), eigenvectors (n, r))``, descending, on the CPU.

        ``r`` leaves out the oversampled directions, and those that the accumulation dtype cannot tell from nothing.
        Only ``k x k`` problems are solved, in float64; the ``n x k`` work stays in the accumulation dtype.
        """
        values, mapping, shift = self._solve()
        usable = max(min(int((values > 0.0).sum()), self.width - OVERSAMPLING), 1)
        columns = mapping[:, :usable].to(self.sample)
        found = self.sample @ columns
        found.addmm_(self.test, columns, alpha=shift)
        # Orthonormal already where the sketch resolves them well; Householder QR makes the rest so as well.
        return values[:usable], torch.linalg.qr(found.cpu()).Q


def mode_statistics(
    size: int, rank: int | float, dtype: torch.dtype, device: torch.device, label: str = "mode"
) -> GramMatrix | NystromSketch:
    """The accumulator that fits a mode: exact up to :data:`SKETCH_ABOVE`, sketched above it.

    A sketch that would be as large as the exact matrix is not made.
    """
    width = rank + OVERSAMPLING if isinstance(rank, int) else SKETCH_WIDTH
    if size <= SKETCH_ABOVE or 2 * width >= size:
        return GramMatrix(size, dtype, device)
    return NystromSketch(size, rank, dtype, device, label)
