"""Smooth activations with a derivative of 4 bits: the output is exact, the gradient is not."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lance.layers.registry import Variant, register
from lightning_lance.ops.smooth import GELU, HARDSWISH, MISH, SIGMOID, SILU, TANH, Smooth, few_bit
from lightning_lance.ops.tracking import tracked


class FewBit(Variant):
    """Base of the mixins below.

    Attributes:
        function: the activation.
        arguments: attributes of the module that its function takes.
    """

    approximate: ClassVar[bool] = True
    function: ClassVar[Smooth]
    arguments: ClassVar[tuple[str, ...]] = ()

    def forward(self, input: Tensor) -> Tensor:
        if tracked(input):
            arguments = {name: getattr(self, name) for name in self.arguments}
            return few_bit(self.function, input, getattr(self, "inplace", False), **arguments)
        stock: Any = super()
        return stock.forward(input)  # type: ignore[no-any-return]


@register(nn.GELU)
class FewBitGELU(FewBit):
    """:class:`torch.nn.GELU`."""

    function = GELU
    arguments = ("approximate",)  # "none" or "tanh" on the module; not what the class says of its gradient


@register(nn.SiLU)
class FewBitSiLU(FewBit):
    """:class:`torch.nn.SiLU`."""

    function = SILU


@register(nn.Mish)
class FewBitMish(FewBit):
    """:class:`torch.nn.Mish`."""

    function = MISH


@register(nn.Hardswish)
class FewBitHardswish(FewBit):
    """:class:`torch.nn.Hardswish`."""

    function = HARDSWISH


@register(nn.Sigmoid)
class FewBitSigmoid(FewBit):
    """:class:`torch.nn.Sigmoid`."""

    function = SIGMOID


@register(nn.Tanh)
class FewBitTanh(FewBit):
    """:class:`torch.nn.Tanh`."""

    function = TANH
