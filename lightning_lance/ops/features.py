"""The feature side of a layer: the vectors that its weight multiplies, as rows of its weight and of its input.

A linear layer multiplies feature vectors. A convolution multiplies unfolded patches, ``C / groups * kh * kw`` long, in
each of its groups; or, seen more cheaply, channel vectors, one for each position of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lance.ops.conv import Geometry, pad_input

_CHUNK = 1 << 22


class FeatureSide(NamedTuple):
    """How a weight, and the inputs it meets, are cut into feature vectors.

    Attributes:
        groups: channel groups, each with feature vectors of its own; 1 for a linear layer.
        channels: channels of one group, or features.
        kernel: kernel sizes; empty for a linear layer.
        patch: whether a feature vector is a whole patch; otherwise it is the channels at one kernel position.
    """

    groups: int
    channels: int
    kernel: tuple[int, ...] = ()
    patch: bool = True

    @property
    def width(self) -> int:
        """Length ``K`` of a feature vector."""
        return self.channels * (math.prod(self.kernel) if self.patch else 1)

    def rows(self, weight: Tensor) -> Tensor:
        """Weight ``(O, C / groups, *kernel)`` as ``(groups, rows, K)``; a view where the layout allows it."""
        rows = weight.reshape(self.groups, -1, self.channels, math.prod(self.kernel))
        if self.patch:
            return rows.reshape(self.groups, -1, self.width)
        return rows.transpose(2, 3).reshape(self.groups, -1, self.width)

    def weight(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of :meth:`rows`."""
        if self.patch:
            return rows.reshape(shape)
        kernel = math.prod(self.kernel)
        return rows.reshape(self.groups, -1, kernel, self.channels).transpose(2, 3).reshape(shape)


def feature_rows(
    input: Tensor,
    side: FeatureSide,
    geometry: Geometry | None,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The feature vectors of an input, about 16 MiB at a time, so that no input is ever unfolded whole.

    Args:
        input: ``(B, *tokens, K)``, or ``(B, C, *sizes)`` where a geometry is given.
        side: how to cut it.
        geometry: of a convolution; ``None`` for a linear layer.
        max_rows: upper bound on the vectors; above it, a random subset of that many.
        generator: draws the subset; a generator on the CPU.

    Yields:
        Pieces of shape ``(groups, n, K)``.
    """
    if input.numel() == 0:
        return
    where: tuple[int, ...]
    if geometry is None:
        source, where = input.reshape(-1, input.shape[-1]), (input.numel() // input.shape[-1],)
    elif side.patch:
        source = _windows(pad_input(input, geometry), geometry)
        where = source.shape[: source.dim() - 1 - len(geometry.kernel)]
    else:
        source = input.movedim(1, -1)
        where = source.shape[:-1]
    total, size = math.prod(where), max(1, _CHUNK // (side.width * side.groups))
    everything = max_rows is None or total <= max_rows
    if everything and total // where[0] <= size:  # whole samples at a time, which needs no gathering
        samples = size // (total // where[0])
        for start in range(0, where[0], samples):
            yield source[start : start + samples].reshape(-1, side.groups, side.width).transpose(0, 1)
        return
    if everything:
        chosen = torch.arange(total)
    else:
        chosen = torch.randperm(total, generator=generator)[:max_rows].sort().values
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size].to(input.device)
        vectors = source[torch.unravel_index(part, where)] if len(where) > 1 else source[part]
        yield vectors.reshape(part.numel(), side.groups, side.width).transpose(0, 1)


def _windows(padded: Tensor, geometry: Geometry) -> Tensor:
    """Strided view ``(B, *out, C, *kernel)`` of the patches that a convolution reads; nothing is copied."""
    if any(geometry.padding):
        pairs = [n for pad in reversed(geometry.padding) for n in (pad, pad)]
        padded = torch.nn.functional.pad(padded, pairs)
    axes = list(zip(padded.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True))
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]
    batch, channel, *spatial = padded.stride()
    strides = [stride * s for stride, s in zip(spatial, geometry.stride, strict=True)]
    steps = [stride * d for stride, d in zip(spatial, geometry.dilation, strict=True)]
    return padded.as_strided(
        (padded.shape[0], *out, padded.shape[1], *geometry.kernel),
        (batch, *strides, channel, *steps),
        padded.storage_offset(),
    )
