"""Operators of which the arguments alone are kept: what they made of them is computed again, by one more call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_lance.compression.kept import Kept, View, storage_part
from lightning_lance.compression.recipes import Operator, Step
from lightning_lance.compression.store import Store
from lightning_lance.ops.saving import saving


class Again:
    """The stretch of memory of a result, and what else its operator made.

    All of it comes from the same rounded arguments, so that it goes together in the backward pass.

    Args:
        run: the operator, which makes the result first.
        arguments: what it reads of what is kept.
    """

    __slots__ = ("__weakref__", "_found", "arguments", "own", "run")

    def __init__(self, run: Callable[..., Sequence[Tensor]], arguments: Sequence[Kept]) -> None:
        self.run, self.arguments = run, arguments
        self.own: Any = None  # weak: the result in the graph of the operator
        self._found: list[Tensor | None] = []

    def take(self, which: int) -> Tensor:
        """One of the things, for the backward pass of the operator, which reads each once."""
        found = self._find(which)
        if which < len(self._found):
            self._found[which] = None
        return found

    def restore(self) -> Tensor:
        """The result in memory order, on one axis."""
        found = self._find(0)
        return found.as_strided((found.numel(),), (1,))

    def _find(self, which: int) -> Tensor:
        """What the operator makes is held until its own backward pass has taken it, which comes last, if it comes."""
        found = self._found[which] if which < len(self._found) else None
        if found is None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                made: list[Tensor | None] = [*self.run(*(argument.restore() for argument in self.arguments))]
            found = made[which]
            self._found = made if self.own is not None and self.own() is not None else []
        assert found is not None
        return found

    def halved(self) -> Tensor:
        """The same in bfloat16."""
        return self.restore().bfloat16()

    def parts(self) -> list[tuple[int, int]]:
        """As those of a :class:`Kept`."""
        return [part for argument in self.arguments for part in argument.parts()]


class Part(Kept):
    """Stands in the graph of the operator for one of the things that it made.

    Args:
        which: its place.
        tensor: the thing itself, as long as it is not known whether it can be made again.
        again: what makes it.
    """

    __slots__ = ("again", "tensor", "which")

    def __init__(self, which: int, tensor: Tensor | None = None, again: Again | None = None) -> None:
        self.which, self.tensor, self.again = which, tensor, again

    def restore(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        assert self.again is not None
        return self.again.take(self.which)

    def parts(self) -> list[tuple[int, int]]:
        if self.tensor is not None:
            return [storage_part(self.tensor)]
        return [] if self.again is None else self.again.parts()


class _Elsewhere(Step):
    """Of a result that others read too; there is nothing to compute once the graph of its operator is gone."""

    __slots__ = ()

    def operator(self) -> Operator | None:
        return None


def _result(again: Again) -> Part:
    part = Part(0, again=again)
    again.own = weakref.ref(part)
    return part


# Attention ------------------------------------------------------------------------------------------------------------


AFFORDABLE = 2
"""Up to so many keys for each feature of a token, running attention again is little next to a block's linear layers."""

_ATTENTION = "ScaledDotProductFlashAttentionForCpuBackward0"


class Attention:
    """How to keep what one call of fused attention saves: queries, keys and values ``(B, heads, L, E)``, in finer bits.

    The kernel takes the product of queries and keys to the power of e again: where attention is peaked, 4 bits leave
    nothing of the gradient. Then it subtracts what it finds from the result, which goes together if both, and the
    log-sum-exps that it divides by, are made of the same rounded numbers.

    Args:
        mask: what is added to the products, or says which of them count; it stays whole.
        unknown: whether there is a mask of a shape that nobody has told us.
    """

    __slots__ = ("arguments", "mask", "sums", "unknown")

    def __init__(self, mask: Any = None, unknown: bool = False) -> None:
        self.arguments: list[Any] = []
        self.mask = mask.shape if isinstance(mask, Tensor) else None
        self.unknown = unknown
        self.sums: Part | None = None

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if not saved.is_floating_point() or store.finer is None:
            return NotImplemented
        if saved.dim() == 4:
            again = self._again(saved)
            if again is not None:
                store.recipes.add(saved, again.arguments[0], (_Elsewhere(),), again)
                return _result(again)
            if self._is_mask(saved):
                self.arguments.append(None)
                return store.whole(saved)
            kept = store.rounded(saved, store.finer)
            self.arguments.append(kept)
            return kept
        if saved.dim() == 3 and saved.is_cpu and len(self.arguments) == 3 + (None in self.arguments):
            self.sums = Part(1, saved.detach())
            return self.sums
        return store.whole(saved) if saved.shape == self.mask else NotImplemented

    def _is_mask(self, saved: Tensor) -> bool:
        if len(self.arguments) != (_order(True)[3] if saved.is_cpu else 0):
            return False
        # A key of which no gradient is asked for may be taken for one, and stay whole.
        return saved.shape == self.mask or (self.unknown and not saved.requires_grad)

    def _again(self, result: Tensor) -> Again | None:
        """What computes the result again, where that is affordable and nothing else went into it."""
        node, sums = result.grad_fn, self.sums
        if sums is None or sums.tensor is None or not _made_by(node, _ATTENTION):
            return None
        query, key, value = (self.arguments[place] for place in _order(None in self.arguments)[:3])
        mask = _of(node, "attn_mask")
        batch, heads, length, features = result.shape
        if (
            not all(isinstance(kept, View) for kept in (query, key, value))
            or query.shape != result.shape
            or key.shape != value.shape
            or key.shape[2] > AFFORDABLE * heads * features
            or sums.tensor.shape != (batch, heads, length)
            or (mask is not None and self.mask is None and not self.unknown)
            or _of(node, "dropout_p")
        ):
            return None
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        options = {"attn_mask": mask, "scale": _of(node, "scale")}
        causal = _of(node, "is_causal")
        sums.again = Again(lambda q, k, v: run(q, k, v, 0.0, causal, **options), (query, key, value))
        sums.tensor = None
        return sums.again


@cache
def _order(masked: bool) -> list[int]:
    """At which places the kernel's graph saves query, key, value, and a mask if there is one."""
    seen: list[int] = []
    tensors = [torch.zeros(1, 1, 1, 1, requires_grad=place < 3) for place in range(3 + masked)]
    addresses = [tensor.data_ptr() for tensor in tensors]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in addresses:
            seen.append(addresses.index(tensor.data_ptr()))
        return tensor.detach()

    options = {"attn_mask": tensors[3]} if masked else {}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors[:3], **options)
    return [seen.index(which) for which in range(len(tensors))]


# Recurrent layers -----------------------------------------------------------------------------------------------------


_LAYER = "MkldnnRnnLayerBackward0"
_WEIGHTS = ("weight0", "weight1", "weight2", "weight3", "hx_", "cx_")
_OPTIONS = (
    *("reverse", "batch_sizes", "mode", "hidden_size", "num_layers"),
    *("has_biases", "bidirectional", "batch_first", "train"),
)


class Recurrent:
    """How to keep what an LSTM on the CPU saves, layer by layer: its input ``(T, B, F)``.

    What the kernel leaves for its backward pass, gates and states of all steps, is one stretch of bytes of some fifteen
    numbers for each of a state, whose layout is its own. Weights are those of the moment when it is computed again, so
    that others who read the result keep it in bits of their own: an optimizer may have moved the weights by then.

    Args:
        input: that of the call, of which the first layer reads.
    """

    __slots__ = ("again", "first", "input", "nodes", "which")

    def __init__(self, input: Tensor) -> None:
        self.first = input.untyped_storage()._cdata
        self.input: Kept | None = None
        self.again: Again | None = None
        self.nodes: list[Any] = []
        self.which = 0

    def __call__(self, saved: Tensor, store: Store) -> Any:
        if store.bits.other is None or not saved.is_cpu:
            return NotImplemented
        node = saved.grad_fn
        made = _made_by(node, _LAYER)
        if saved.dtype is torch.uint8:
            last, self.again = self._part(3), None
            return last
        if not saved.is_floating_point() or saved.dim() not in (2, 3):
            return NotImplemented
        if saved.dim() == 2:  # states at the end, else those at the beginning
            if made and self.nodes and node is self.nodes[-1]:
                return self._part(self.which + 1)
            return store.whole(saved) if made or node is None else NotImplemented
        if made and node not in self.nodes and saved.untyped_storage()._cdata != self.first:
            self.nodes.append(node)
            self.again, self.which, self.input = self._layer(node), 0, None
            return _result(self.again)
        kept = store.rounded(saved, store.bits.other)  # of an input, which may be the result of the layer before
        self.input = kept if isinstance(kept, View) else None
        return kept

    def _part(self, which: int) -> Any:
        self.which = which
        return NotImplemented if self.again is None else Part(which, again=self.again)

    def _layer(self, node: Any) -> Again:
        weights, options = ([_of(node, name) for name in names] for names in (_WEIGHTS, _OPTIONS))
        weights = [weight.detach() for weight in weights]
        whole = _of(node, "input").detach() if self.input is None else None  # a weight, or too small to be rounded

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            with torch.enable_grad():  # else the kernel leaves nothing for its backward pass
                input = inputs[0] if whole is None else whole
                made: Sequence[Tensor] = torch.ops.aten.mkldnn_rnn_layer(input, *weights, *options)
            return made

        return Again(run, () if self.input is None else (self.input,))


def _made_by(node: Any, name: str) -> bool:
    return node is not None and node.name() == name


def _of(node: Any, name: str) -> Any:
    """What a node of a graph has saved under this name."""
    saving.looking = True
    try:
        return getattr(node, f"_saved_{name}")
    finally:
        saving.looking = False
