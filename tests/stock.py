"""Compare operators inside of a store with the stock ones, bit by bit, and count what the store keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.compression.operators import Watch
from lightning_lance.compression.saved_bytes import ModuleNames
from lightning_lance.compression.store import Bits, Store

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EXACT = Bits(None, None)


def make_store(bits: Bits = EXACT, weights: Iterable[Tensor] = ()) -> Store:
    """A store with its mode."""
    store = Store(bits)
    store.mode = Watch(store)
    store.protect(weights)
    return store


def same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal shape, dtype and bits: 0 and -0 differ, a NaN equals itself."""
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    kind = _BITS[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def names(*roots: Tensor) -> set[str]:
    """Of all nodes behind these tensors."""
    todo, seen = [root.grad_fn for root in roots], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def run(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None, store: Store | None = None, seed: int = 0
) -> tuple[Tensor, ...]:
    """Output, input gradient and parameter gradients; the input is a copy in the same memory layout."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    parameters = [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []
    torch.manual_seed(seed)
    if store is None:
        output = function(leaf * 1)  # not a leaf, so that operators in place may write on it
    else:
        store.protect([*parameters, *(function.buffers() if isinstance(function, nn.Module) else [])])
        with store:
            output = function(leaf * 1)
    grad = torch.ones_like(output) if grad is None else grad
    return (output.detach(), *torch.autograd.grad(output, [leaf, *parameters], grad))


def assert_same(function: Any, x: Tensor, grad: Tensor | None = None) -> None:
    """Outputs and all gradients are those of plain training, from the same random state."""
    expected, state = run(function, x, grad), torch.get_rng_state()
    found = run(function, x, grad, make_store())
    assert torch.equal(torch.get_rng_state(), state), "the random state differs afterwards"
    assert len(found) == len(expected)
    for name, left, right in zip(
        ("output", "input gradient", *["parameter gradient"] * 9), found, expected, strict=False
    ):
        assert same_bits(left, right), f"{name} differs"


def kept(function: Any, x: Tensor, bits: Bits = EXACT) -> tuple[int, int]:
    """Bytes that plain training and a store keep for one call, without those that the input needs by itself."""
    store = make_store(bits, function.parameters() if isinstance(function, nn.Module) else ())
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    store.ledger, store.names = [], ModuleNames()
    with store:
        output = function(leaf + 0)
    alive = [(saved, held) for saved in store.ledger if (held := saved.kept()) is not None]
    del output
    plain = {saved.reference.cdata: saved.nbytes for saved, _ in alive}
    return sum(plain.values()), sum({key: size for _, held in alive for key, size in held.parts()}.values())


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
