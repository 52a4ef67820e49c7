"""Normalisation layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops.norm import fixed_batch_norm
from lightning_lance.ops.rounded_norm import groupable, rounded_batch_norm, rounded_group_norm, rounded_layer_norm
from lightning_lance.ops.tracking import tracked


class _BatchNorm(Variant):
    """Attributes of :class:`torch.nn.BatchNorm1d`, 2d and 3d."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool
    track_running_stats: bool
    _check_input_dim: Any

    def lance_fixed(self, input: Tensor) -> Tensor | None:
        """Output of the exact companion where it applies."""
        mean, var = self.running_mean, self.running_var
        frozen = self.weight is None or not self.weight.requires_grad
        if self.training or mean is None or var is None or not frozen or not tracked(input, self.bias):
            return None
        self._check_input_dim(input)
        return fixed_batch_norm(input, self.weight, self.bias, mean, var, self.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class RoundedBatchNorm(_BatchNorm):
    """:class:`torch.nn.BatchNorm1d`, 2d and 3d that keep 4 bits per element, or nothing where that is exact.

    Output and running statistics are exact in every case.
    """

    # Registered before the exact variant: the first one that the options allow is taken.
    approximate: ClassVar[bool] = True

    def forward(self, input: Tensor) -> Tensor:
        output = self.lance_fixed(input)
        if output is not None:
            return output
        channels = input.shape[1] if input.dim() > 1 else 0
        if (
            not tracked(input, self.weight, self.bias) or input.numel() <= channels or self.eps <= 0
        ):  # the latter are errors where training
            stock: Any = super()
            return stock.forward(input)  # type: ignore[no-any-return]
        self._check_input_dim(input)
        momentum = self.momentum or 0.0
        mean, var = self.running_mean, self.running_var
        training = self.training or (mean is None and var is None)
        if self.training:
            if not self.track_running_stats:
                mean = var = None
            elif self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:  # the mean over all batches
                    momentum = 1.0 / float(self.num_batches_tracked)
        return rounded_batch_norm(input, self.weight, self.bias, mean, var, training, momentum, self.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class CompactBatchNorm(_BatchNorm):
    """:class:`torch.nn.BatchNorm1d`, 2d and 3d that keep nothing in eval mode with a frozen weight.

    With a trainable weight the stock operator runs: its gradient needs the input. So it does with batch statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        output = self.lance_fixed(input)
        if output is not None:
            return output
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.LayerNorm)
class RoundedLayerNorm(Variant):
    """:class:`torch.nn.LayerNorm` that keeps 4 bits per element."""

    approximate: ClassVar[bool] = True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input, self.weight, self.bias):
            return rounded_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.GroupNorm)
class RoundedGroupNorm(Variant):
    """:class:`torch.nn.GroupNorm` that keeps 4 bits per element."""

    approximate: ClassVar[bool] = True
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input, self.weight, self.bias) and groupable(input, self.num_groups):
            return rounded_group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]
