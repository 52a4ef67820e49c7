"""Fused attention of which queries, keys and values alone are kept: its result is computed from them again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_lance.compression.kept import Kept, View, storage_part
from lightning_lance.compression.recipes import Operator, Step
from lightning_lance.compression.store import Store

AFFORDABLE = 2
"""Up to so many keys for each feature of a token, running attention again is little next to a block's linear layers."""

_NODE = "ScaledDotProductFlashAttentionForCpuBackward0"


class Attended:
    """The stretch of memory of a result ``(B, heads, L, E)``, and its log-sum-exps ``(B, heads, L)``.

    Both come from the same rounded queries and keys, so that probabilities add up to one in the backward pass: the
    kernel takes products of them to the power of e again, and subtracts what it finds from what is kept of the result.

    Args:
        query: ``(B, heads, L, E)``.
        key: ``(B, heads, S, E)``.
        value: ``(B, heads, S, E)``.
        causal: whether a query sees no later keys.
        scale: of products; ``None``: the usual one.
    """

    __slots__ = ("__weakref__", "_found", "arguments", "causal", "scale")

    def __init__(self, query: View, key: View, value: View, causal: bool, scale: float | None) -> None:
        self.arguments, self.causal, self.scale = (query, key, value), causal, scale
        self._found: list[Tensor | None] = [None, None]

    def compute(self) -> list[Tensor | None]:
        """Result and log-sum-exps; held until the attention itself has read both, which comes last."""
        if self._found[0] is None:
            with torch.no_grad():
                arguments = [argument.restore() for argument in self.arguments]
                run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                self._found = [*run(*arguments, 0.0, self.causal, scale=self.scale)]
        return self._found

    def take(self, which: int) -> Tensor:
        """The result (0) or the log-sum-exps (1), for the backward pass of the attention."""
        if self._found[which] is None:
            self._found = [None, None]
        found = self.compute()[which]
        assert found is not None
        self._found[which] = None
        return found

    def restore(self) -> Tensor:
        """The result in memory order, on one axis."""
        found = self.compute()[0]
        assert found is not None
        return found.as_strided((found.numel(),), (1,))

    def halved(self) -> Tensor:
        """The same in bfloat16."""
        return self.restore().bfloat16()

    def parts(self) -> list[tuple[int, int]]:
        """As those of a :class:`Kept`."""
        return [part for argument in self.arguments for part in argument.parts()]


class _Result(Kept):
    """Stands in the graph of the attention for its result."""

    __slots__ = ("attended",)

    def __init__(self, attended: Attended) -> None:
        self.attended = attended

    def restore(self) -> Tensor:
        return self.attended.take(0)

    def parts(self) -> list[tuple[int, int]]:
        return self.attended.parts()


class _Sums(Kept):
    """Likewise for its log-sum-exps, which are saved before the result, and stay whole where that is not computed."""

    __slots__ = ("attended", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.attended: Attended | None = None

    def restore(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        assert self.attended is not None
        return self.attended.take(1)

    def parts(self) -> list[tuple[int, int]]:
        return [] if self.tensor is None else [storage_part(self.tensor)]


class _Again(Step):
    """Of a result that others read too; there is nothing to compute once the attention's own graph is gone."""

    __slots__ = ()

    def operator(self) -> Operator | None:
        return None


class Attention:
    """How to keep what one call of fused attention saves.

    The kernel takes the product of queries and keys to the power of e again: where attention is peaked, 4 bits leave
    nothing of the gradient, so that these tensors have twice as many.
    """

    __slots__ = ("arguments", "sums")

    def __init__(self) -> None:
        self.arguments: list[Any] = []
        self.sums: _Sums | None = None

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if not saved.is_floating_point() or store.finer is None:
            return NotImplemented
        if saved.dim() == 4:
            attended = self._attended(saved, store)
            if attended is not None:
                return _Result(attended)
            kept = store.rounded(saved, store.finer)
            self.arguments.append(kept)
            return kept
        if saved.dim() == 3 and saved.is_cpu and len(self.arguments) == 3:
            self.sums = _Sums(saved)
            return self.sums
        return NotImplemented

    def _attended(self, result: Tensor, store: Store) -> Attended | None:
        """What computes the result again, where that is affordable and nothing else went into it."""
        node: Any = result.grad_fn
        if self.sums is None or node is None or node.name() != _NODE or not all(map(_is_view, self.arguments)):
            return None
        query, key, value = (self.arguments[place] for place in _order())
        _, heads, length, features = result.shape
        if (
            query.shape != result.shape
            or key.shape != value.shape
            or key.shape[2] > AFFORDABLE * heads * features
            or self.sums.tensor is None
            or self.sums.tensor.shape != (result.shape[0], heads, length)
            or node._saved_dropout_p
            or node._saved_attn_mask is not None
        ):
            return None
        attended = Attended(query, key, value, node._saved_is_causal, node._saved_scale)
        self.sums.attended, self.sums.tensor = attended, None
        store.recipes.add(result, query, (_Again(),), attended)
        return attended


def _is_view(kept: Any) -> bool:
    return isinstance(kept, View)


@cache
def _order() -> list[int]:
    """At which places the kernel's graph saves query, key and value, which it does in an order of its own."""
    seen: list[int] = []
    tensors = [torch.zeros(1, 1, 1, 1, requires_grad=True) for _ in range(3)]
    addresses = [tensor.data_ptr() for tensor in tensors]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in addresses:
            seen.append(addresses.index(tensor.data_ptr()))
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors)
    return [seen.index(which) for which in range(3)]
