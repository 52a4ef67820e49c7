"""Convolutions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import register
from lightning_lance.ops.conv import Geometry, LowRankConv, geometry
from lightning_lance.subspaces.subspace import Sizes


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class CompressedConv(Compressed):
    """:class:`torch.nn.Conv1d`, 2d and 3d on batched inputs; an unbatched one takes the stock path."""

    channel_axis: ClassVar[int] = 1
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @staticmethod
    def sizes(input: Tensor) -> Sizes:
        return tuple(input.shape[2:])

    def lance_work(self) -> float:
        return self.out_channels * math.prod(self.kernel_size) / self.groups / math.prod(self.stride)

    def lance_outputs(self) -> float:
        return self.out_channels / self.in_channels / math.prod(self.stride)

    def lance_pointwise(self) -> bool:
        return self.lance_geometry().is_pointwise()

    def lance_geometry(self) -> Geometry:
        return geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where = None if self._lance.subspace is None else self.lance_geometry()
        output = self.lance_output(LowRankConv, input, weight, bias, where)
        if output is None:
            stock: Any = super()
            output = stock._conv_forward(input, weight, bias)
        return output
