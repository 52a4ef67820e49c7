"""Pooling: the place of a maximum in its window; of an averaged input only the shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops.pool import adaptive_avg_pool, avg_pool, max_pool, window
from lightning_lance.ops.tracking import tracked


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
class CompactMaxPool(Variant):
    """:class:`torch.nn.MaxPool1d`, 2d and 3d that keep 1 byte per output element, 2 above 256 places in a window."""

    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    return_indices: bool

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return "return_indices=True asks for the indices themselves" if module.return_indices else None

    def forward(self, input: Tensor) -> Tensor:
        axes = _axes(self, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        if tracked(input) and not self.return_indices and input.dim() in (axes + 1, axes + 2):
            static = window(axes, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
            return max_pool(input, static)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
class CompactAvgPool(Variant):
    """:class:`torch.nn.AvgPool1d`, 2d and 3d that keep nothing."""

    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool

    def forward(self, input: Tensor) -> Tensor:
        axes = _axes(self, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
        if tracked(input) and input.dim() in (axes + 1, axes + 2):
            divisor: int | None = getattr(self, "divisor_override", None)
            static = window(
                axes, self.kernel_size, self.stride, self.padding, 1, self.ceil_mode, self.count_include_pad, divisor
            )
            return avg_pool(input, static)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
class CompactAdaptiveAvgPool(Variant):
    """:class:`torch.nn.AdaptiveAvgPool1d`, 2d and 3d that keep nothing."""

    output_size: Any

    def forward(self, input: Tensor) -> Tensor:
        axes = _axes(self, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
        if tracked(input) and input.dim() in (axes + 1, axes + 2):
            return adaptive_avg_pool(input, self.output_size, axes)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


def _axes(module: object, *by_axes: type[nn.Module]) -> int:
    return next(axes for axes, cls in enumerate(by_axes, start=1) if isinstance(module, cls))
