"""Measure what autograd keeps for backward, without keeping it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lightning_lance.tensors.units import format_bytes


@dataclass(frozen=True)
class Holder:
    """One storage that autograd keeps.

    Attributes:
        op: the operation that saved it first, such as ``ConvolutionBackward0``; ``"elsewhere"`` where that is not in
            the graph of the result, such as the input of a checkpointed segment.
        module: name of the innermost module that ran it, ``""`` outside of any.
        shape: shape of the saved tensor.
        dtype: dtype of the saved tensor.
        bytes: size of the whole storage behind it.
    """

    op: str
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps after a forward pass.

    Attributes:
        total: bytes of all unique storages, parameters and buffers left out.
        holders: the storages, largest first.
    """

    total: int
    holders: list[Holder] = field(default_factory=list)

    def by_module(self) -> dict[str, int]:
        """Bytes by the module that saved them first."""
        found: dict[str, int] = {}
        for holder in self.holders:
            found[holder.module] = found.get(holder.module, 0) + holder.bytes
        return found

    def by_op(self) -> dict[str, int]:
        """Bytes by operation, largest first."""
        found: dict[str, int] = {}
        for holder in self.holders:
            found[holder.op] = found.get(holder.op, 0) + holder.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        lines = [f"autograd keeps {format_bytes(self.total)} in {len(self.holders)} storages"]
        lines += [
            f"  {format_bytes(h.bytes):>10}  {h.op}  {'x'.join(map(str, h.shape))}  {h.module}" for h in self.holders
        ]
        return "\n".join(lines)


class _Packed:
    """Stands in the graph for a saved tensor; alive as long as autograd keeps it."""

    __slots__ = ("__weakref__", "bytes", "dtype", "module", "op", "shape", "storage")

    def __init__(self, tensor: Tensor, module: str) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.module = module
        self.op = "elsewhere"
        storage = tensor.untyped_storage()
        self.bytes = storage.nbytes()
        # A weak reference keeps the identity of the storage unique without keeping its memory.
        self.storage: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def measure_saved_bytes(
    function: Callable[[], Any], module: nn.Module | None = None, keep: Callable[[Any], None] | None = None
) -> SavedBytes:
    """Bytes that autograd keeps for the backward pass of what a function returns.

    Counts unique storages with saved-tensor hooks, and leaves out those of parameters and buffers. The hooks drop
    each tensor after counting it, so that measuring needs no more memory than a pass without gradients; the graph
    is useless for backward afterwards. What was saved but let go before the function returned does not count; what
    is kept beside the graph of the result, as by activation checkpointing, does.

    Args:
        function: runs a forward pass with gradients on and returns the loss or outputs.
        module: the model, so that its buffers are left out and holders are named by module. A bound method or a
            module given as ``function`` is found by itself.
        keep: called with the result while the graph is alive.

    Returns:
        The total and its holders.
    """
    owner = module if module is not None else _owner(function)
    excluded: dict[int, Any] = {}
    if owner is not None:
        for tensor in [*owner.parameters(), *owner.buffers()]:
            _exclude(tensor, excluded)
    packed: list[weakref.ref[_Packed]] = []
    stack: list[str] = [""]

    def pack(tensor: Tensor) -> _Packed:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter):
            _exclude(base, excluded)
        item = _Packed(tensor, stack[-1])
        packed.append(weakref.ref(item))
        return item

    def unpack(item: _Packed) -> Tensor:
        # Only asked where the walk over the graph cannot look at the item itself; it reads no values.
        asked.append(item)
        return torch.empty(item.shape, dtype=item.dtype, device="meta")

    asked: list[_Packed] = []
    with ExitStack() as context:
        if owner is not None:
            context.enter_context(_module_stack(owner, stack))
        context.enter_context(torch.enable_grad())
        context.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        result = function()
    reached = _name_operations(result, asked)
    if any(reference() not in reached for reference in packed if reference() is not None):
        gc.collect()  # a graph in a dead reference cycle is not kept
    kept = [item for reference in packed if (item := reference()) is not None]
    if keep is not None:
        keep(result)
    holders: dict[int, Holder] = {}
    for item in kept:
        key = item.storage.cdata
        if key not in excluded and key not in holders and item.bytes:
            holders[key] = Holder(item.op, item.module, item.shape, item.dtype, item.bytes)
    ordered = sorted(holders.values(), key=lambda holder: -holder.bytes)
    return SavedBytes(sum(holder.bytes for holder in ordered), ordered)


def _exclude(tensor: Tensor, excluded: dict[int, Any]) -> None:
    reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    excluded[reference.cdata] = reference


def _owner(function: Any) -> nn.Module | None:
    for candidate in (function, getattr(function, "__self__", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    return None


@contextmanager
def _module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            stack.pop()

        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_operations(result: Any, asked: list[_Packed]) -> set[_Packed]:
    """Give each item in the graph of the result the name of its operation; the items."""
    roots: list[Any] = [leaf.grad_fn for leaf in _tensors(result)]
    seen: set[Any] = set()
    found: set[_Packed] = set()
    while roots:
        node = roots.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for item in _items(node, asked):
            item.op = node.name()
            found.add(item)
        roots += [following for following, _ in node.next_functions]
    return found


def _tensors(result: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif is_dataclass(leaf):
            yield from _tensors([getattr(leaf, part.name) for part in fields(leaf)])


def _items(node: Any, asked: list[_Packed]) -> Iterator[_Packed]:
    """What a node saved. A tensor that other hooks hold is not unpacked: that may run a forward pass again."""
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        with suppress(RuntimeError):  # an optional tensor that was not saved
            raw = getattr(node, name)
            for saved in raw if isinstance(raw, (tuple, list)) else (raw,):
                if not hasattr(saved, "data"):  # older torch shows what was saved by unpacking it only
                    yield from _unpacked(node, name, asked)
                    break
                if isinstance(saved.data, _Packed):
                    yield saved.data


def _unpacked(node: Any, name: str, asked: list[_Packed]) -> list[_Packed]:
    asked.clear()
    # The hooks of others fail on stand-ins; what they hold needs no name.
    with suppress(Exception), _no_recomputation():
        getattr(node, "saved_tensors" if name == "_raw_saved_tensors" else name.removeprefix("_raw"))
    return list(asked)


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Asked for what they saved, the nodes of a checkpointed segment fail, and do not run the segment again."""
    module: Any = torch.utils.checkpoint
    stock = module._recomputation_hook

    def refuse(*_: Any) -> None:
        raise RuntimeError

    module._recomputation_hook = refuse
    try:
        yield
    finally:
        module._recomputation_hook = stock
