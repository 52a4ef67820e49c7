"""Measure what autograd keeps for backward, without keeping it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.compression.store import Saved
from lightning_lance.ops.saving import saving
from lightning_lance.ops.watching import WatchingMode
from lightning_lance.tensors.units import format_bytes


@dataclass(frozen=True)
class Holder:
    """One storage that autograd keeps.

    Attributes:
        op: the torch function that saved it first, such as ``conv2d``; ``"elsewhere"`` for one that is none, such as a
            checkpointed segment.
        module: name of the innermost module that ran it, ``""`` outside of any.
        shape: shape of the saved tensor.
        dtype: dtype of the saved tensor.
        bytes: size of the whole storage behind it, or of what is kept in its place.
        bits: of an element of what is kept; ``None``: it is not rounded.
        for_weight: whether gradients of weights alone are computed from it.
        shared: whether another module keeps it too.
    """

    op: str
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    bits: int | None = None
    for_weight: bool = False
    shared: bool = False

    @classmethod
    def of(cls, saved: Saved) -> Holder:
        """What a line of a ledger tells of it."""
        operator = saved.operator or "elsewhere"
        return cls(
            operator, saved.module, saved.shape, saved.dtype, saved.nbytes, saved.bits, saved.for_weight, saved.shared
        )


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps after a forward pass.

    Attributes:
        total: bytes of all unique storages, parameters and buffers left out.
        holders: the storages, largest first.
    """

    total: int
    holders: list[Holder] = field(default_factory=list)

    @classmethod
    def of(cls, ledger: Iterable[Saved]) -> SavedBytes:
        """Unique storages of tensors that were saved, each counted once by the first who saved it."""
        unique: dict[int, Saved] = {}
        for saved in ledger:
            if saved.nbytes:
                unique.setdefault(saved.reference.cdata, saved)
        return cls.listed(unique.values())

    @classmethod
    def listed(cls, parts: Iterable[Saved]) -> SavedBytes:
        """Parts that are known to be different, whatever they stand for."""
        holders = sorted(map(Holder.of, parts), key=lambda holder: -holder.bytes)
        return cls(sum(holder.bytes for holder in holders), holders)

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


def measure_saved_bytes(
    function: Callable[[], Any], module: nn.Module | None = None, keep: Callable[[Any], None] | None = None
) -> SavedBytes:
    """Bytes that autograd keeps for the backward pass of what a function returns.

    Counts unique storages with saved-tensor hooks, and leaves out those of parameters and buffers. The hooks drop
    each tensor after counting it, so that measuring needs no more memory than a pass without gradients; the graph
    is useless for backward afterwards. What was saved but let go before the function returned does not count; what
    is kept beside the graph of the result, as by activation checkpointing, does. Other hooks inside of the function
    hide from it what they keep.

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
    ledger: list[Saved] = []
    names = ModuleNames()

    def pack(tensor: Tensor) -> _Gone:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter):
            _exclude(base, excluded)
        gone = _Gone(tensor)
        reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        name = saving.name or (tensor.grad_fn.name() if tensor.grad_fn is not None else "")
        ledger.append(
            Saved(
                weakref.ref(gone),
                False,
                reference,
                tensor.untyped_storage().nbytes(),
                name,
                names.current,
                tuple(tensor.shape),
                tensor.dtype,
            )
        )
        return gone

    def unpack(gone: _Gone) -> Tensor:
        return torch.empty(gone.shape, dtype=gone.dtype, device="meta")

    with ExitStack() as context:
        if owner is not None:
            context.enter_context(names.of(owner))
        context.enter_context(torch.enable_grad())
        context.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        context.enter_context(_Named())
        result = function()
    gc.collect()  # a graph in a dead reference cycle is not kept
    alive = [(saved, kept) for saved in ledger if (kept := saved.kept()) is not None]
    if keep is not None:
        keep(result)
    return SavedBytes.of([saved for saved, _ in alive if saved.reference.cdata not in excluded])


class _Gone:
    """Stands in the graph for a saved tensor; alive as long as autograd keeps it."""

    __slots__ = ("__weakref__", "dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


class _Named(WatchingMode):
    """Names the function that runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        before, saving.name = saving.name, getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            saving.name = before


class ModuleNames:
    """Which module runs.

    Attributes:
        current: name of the innermost module that runs, ``""`` outside of any.
    """

    def __init__(self) -> None:
        self._stack: list[str] = [""]

    @property
    def current(self) -> str:
        return self._stack[-1]

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Follow the modules of a model inside the block; not those that are compiled, whose code would hold it."""
        handles = []
        compiled: list[str] = []
        for name, module in model.named_modules():
            if _is_compiled(module):
                compiled.append(name)
            elif not isinstance(module, torch.jit.ScriptModule) and not any(
                name.startswith(f"{outer}.") or not outer for outer in compiled
            ):
                handles.append(module.register_forward_pre_hook(_Hook(self._stack, name)))
                handles.append(module.register_forward_hook(_Hook(self._stack), always_call=True))
        try:
            yield
        finally:
            del self._stack[1:]
            for handle in handles:
                handle.remove()


class _Hook:
    """Says that a module begins, or that one ends; of a copy of the module it does nothing."""

    def __init__(self, stack: list[str], name: str | None = None) -> None:
        self.stack, self.name = stack, name

    def __call__(self, *_: Any) -> None:
        if self.name is None:
            self.stack.pop()
        else:
            self.stack.append(self.name)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Any:
    return _nothing


def _nothing(*_: Any) -> None:
    pass


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _exclude(tensor: Tensor, excluded: dict[int, Any]) -> None:
    reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    excluded[reference.cdata] = reference


def _owner(function: Any) -> nn.Module | None:
    for candidate in (function, getattr(function, "__self__", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    return None
