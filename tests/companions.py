"""Compare a companion with the stock module that it stands in for, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance import measure_saved_bytes
from lightning_lance.layers.registry import find, install

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(module: nn.Module, approximate: bool = False) -> nn.Module:
    """A swapped copy of a module."""
    swapped = copy.deepcopy(module)
    chosen = [variant for variant in find(swapped) if not variant.compresses and variant.approximate == approximate]
    install(swapped, chosen[0])
    return swapped


def same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal shape, dtype and bits: 0 and -0 differ, a NaN equals itself."""
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    kind = _BITS[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def run(module: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None, seed: int = 0) -> tuple[Tensor, ...]:
    """Output, input gradient and parameter gradients; the input is a copy in the same memory layout."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    output = module(leaf * 1)  # not a leaf, so that in-place modules may write on it
    grad = torch.ones_like(output) if grad is None else grad
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    return (output.detach(), *torch.autograd.grad(output, [leaf, *parameters], grad))


def assert_same(stock: Any, ours: Any, x: Tensor, grad: Tensor | None = None) -> None:
    """Outputs, all gradients and the layout of both are those of the stock module, from the same random state."""
    expected, state = run(stock, x, grad), torch.get_rng_state()
    found = run(ours, x, grad)
    assert torch.equal(torch.get_rng_state(), state), "the random state differs afterwards"
    for name, left, right in zip(
        ("output", "input gradient", *["parameter gradient"] * 9), found, expected, strict=False
    ):
        assert same_bits(left, right), f"{name} differs"
        assert _layout(left) == _layout(right), f"{name} has another layout: {left.stride()}, stock {right.stride()}"
    assert len(found) == len(expected)


def _layout(tensor: Tensor) -> list[int]:
    # The stride of an axis of one element means nothing, nor does any in an empty tensor.
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def kept(module: Any, x: Tensor) -> int:
    """Bytes that a module keeps, without those that the input needs by itself."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    owner = module if isinstance(module, nn.Module) else None
    return measure_saved_bytes(lambda: module(leaf + 0), owner).total


def special(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers with zeros of both signs, infinities, NaN, ties and the usual thresholds among them."""
    x = torch.randn(shape, dtype=torch.float64) * 4
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -3.0, 3.0, 6.0, -1.0, 1.0]
    chosen = torch.randint(0, 4 * len(values), shape)
    for index, value in enumerate(values):
        x[chosen == index] = value
    return x.to(dtype)


def layouts(
    *shape: int, dtype: torch.dtype = torch.float32, make: Callable[..., Tensor] = special
) -> dict[str, Tensor]:
    """One random tensor of a shape in several memory layouts."""
    found = {"contiguous": make(*shape, dtype=dtype)}
    if len(shape) == 4:
        found["channels_last"] = make(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if len(shape) == 5:
        found["channels_last"] = make(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    found["transposed"] = make(*shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
    found["strided"] = make(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    found["expanded"] = make(1, *shape[1:], dtype=dtype).expand(shape)
    return found
