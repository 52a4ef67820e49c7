"""What autograd keeps of a training step: every stretch of memory once, in few bits, whichever operator saves it.

A pair of saved-tensor hooks sees each tensor that autograd saves between :meth:`Store.__enter__` and
:meth:`Store.__exit__`. Weights stay as they are, in any guise; so do integers, row statistics and what is tiny. Of what
the stock operator reads in part only, such as the sign of an activation, that part is kept, and the stock backward
kernel runs on a stand-in: the gradient is exact (:mod:`lightning_lance.compression.operators`). All else is rounded, in
memory order, with a range for about every 128 neighbours.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.compression import transforms
from lightning_lance.compression.kept import Booleans, Flags, Kept, Stretch, View, Whole, dense
from lightning_lance.compression.recipes import NormInput, Recipes, affine
from lightning_lance.errors import StateError
from lightning_lance.ops.saving import saving
from lightning_lance.tensors.bits import pack_bits_of
from lightning_lance.tensors.native import Affine
from lightning_lance.tensors.rounding import FEWEST, group_size, round_to_bits, rounds_in_one_pass
from lightning_lance.tensors.tracing import recorded

STATISTICS = 8
"""So much smaller than the largest argument of its operator, a tensor holds row statistics, and stays whole."""

VIEWED = 4
"""A view of at least one element in so many of its storage is rounded with all of it, which other views share."""

_CASTS = ("ToCopyBackward0", "TBackward0", "ViewBackward0", "TransposeBackward0", "UnsafeViewBackward0")


class Bits(NamedTuple):
    """Bits of an element of what is rounded; ``None``: nothing is.

    Attributes:
        weight: of what is kept for the gradient of a weight alone, which no other gradient depends on.
        other: of all else.
    """

    weight: int | None
    other: int | None


class Saved(NamedTuple):
    """One line of a ledger.

    Attributes:
        kept: weak reference to what stands in the graph; ``None`` for what plain training alone would keep.
        ours: whether an operator of ours saved it, which plain training would not run.
        reference: weak reference to the storage of the tensor.
        nbytes: size of that storage.
        operator: name of the operator that saved it.
        module: name of the module that ran it.
        shape: shape of the tensor.
        dtype: its dtype.
        for_weight: whether the gradient of a weight alone is computed from it.
        bits: of an element of what is kept; ``None``: it is not rounded.
        shared: whether another module keeps it too.
    """

    kept: Any
    ours: bool
    reference: Any
    nbytes: int
    operator: str
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    for_weight: bool = False
    bits: int | None = None
    shared: bool = False


class Store:
    """Hooks for the forward passes of one model.

    Args:
        bits: of what is rounded.

    Attributes:
        ledger: what was saved since it was set to an empty list; ``None``: nobody asks.
        names: says which module runs, while a ledger is written.
        unusual: whether second derivatives or transforms were seen, which layers that keep a core refuse.
        recipes: of tensors that are computed from what is kept of others.
        derived: storages of tensors that were computed from weights alone.
        counting: everything is kept as it is, and only counted.
        most: bytes that were kept so at a time in the last step, with those of steps before that no backward pass read.
    """

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self.ledger: list[Saved] | None = None
        self.names: Any = None
        self.unusual = False
        self._weights: dict[int, Any] = {}
        self.derived: dict[int, Any] = {}
        self._stretches: dict[Any, Any] = {}
        self._flags: dict[Any, Any] = {}
        self.recipes = Recipes()
        self.on_backward: Any = None
        self.mode: Any = nullcontext()
        self.counting = False
        self.most = self._counted = 0
        self._counts: dict[int, Any] = {}
        self._read = False
        self._contexts = threading.local()
        self._asked: int | None = None

    def __reduce__(self) -> Any:
        # A copy has hooks in no thread yet, and none of the weak references, of which torch frees copies twice.
        return Store, (self.bits,), {"mode": self.mode}

    def __enter__(self) -> Store:
        _refuse_nested()
        self._open()
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def _open(self) -> None:
        saving.store, saving.rule, saving.arguments = self, None, ()
        self._contexts.pack = self.count if self.counting else self.pack
        self._contexts.mode = nullcontext() if self.counting else self.mode
        self.most = 0
        self._enter_hooks()
        self._contexts.mode.__enter__()
        transforms.allow(self)

    def _close(self) -> None:
        self.settle()
        self.recipes.clear()
        transforms.refuse(self)
        saving.store = None
        self._contexts.mode.__exit__(None, None, None)
        self._contexts.hooks.__exit__(None, None, None)

    def _enter_hooks(self) -> None:
        hooks = self._contexts.hooks = torch.autograd.graph.saved_tensors_hooks(self._contexts.pack, self.unpack)
        hooks.__enter__()

    def is_on_top(self) -> bool:
        """Whether hooks of nobody else lie on ours in this thread."""
        find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        if find is not None:
            top = find(False)
            return top is not None and top[0] == self._contexts.pack
        # Before torch 2.7 nobody can tell: save something, and see whose hook is called. Checkpointed segments count.
        if any(name == "torch.utils.checkpoint" for name in _callers()):
            return False
        self._asked = threading.get_ident()
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            torch.zeros((), requires_grad=True).exp()
        reached, self._asked = self._asked is None, None
        return reached

    @staticmethod
    @contextmanager
    def resting() -> Iterator[None]:
        """A step that nobody looks at."""
        _refuse_nested()
        saving.resting = True
        try:
            yield
        finally:
            saving.resting = False

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside the block this thread saves tensors as they are. Nothing changes where hooks of others lie on ours."""
        if not self.is_on_top():
            yield
            return
        saving.store = None
        self.unusual = True
        self._contexts.hooks.__exit__(None, None, None)
        try:
            yield
        finally:
            saving.store = self
            self._enter_hooks()

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Leave these tensors, and views of them, as they are: parameters, buffers, factors of subspaces."""
        self._weights = {t.untyped_storage()._cdata: t for t in tensors if type(t) in _PLAIN}
        self.derived = {}

    def derive(self, tensor: Tensor) -> None:
        """Leave a tensor that was computed from weights alone as it is, until :meth:`protect` is called again."""
        if type(tensor) is Tensor:
            reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self.derived[reference.cdata] = reference

    def is_derived(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from weights alone."""
        return bool(self.derived) and tensor.untyped_storage()._cdata in self.derived

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight, a view of one, or computed from weights alone."""
        if type(tensor) is nn.Parameter or tensor.layout is not torch.strided:
            return True
        key = tensor.untyped_storage()._cdata
        return key in self._weights or key in self.derived

    def pack(self, tensor: Tensor) -> Any:
        """The hook that autograd calls for each tensor it saves."""
        if self._asked == threading.get_ident():
            self._asked = None
            return tensor.detach()
        with torch._C.DisableTorchFunction():
            if _dispatch_modes() and recorded():
                transforms.tell()
                return tensor.detach()
            kept = self._keep(tensor)
            if self.ledger is not None and kept is not tensor and not self.is_weight(tensor):
                name = saving.name or (tensor.grad_fn.name() if tensor.grad_fn is not None else "")
                return self._note(tensor, kept, name, False, getattr(saving.rule, "for_weight", False))
            return kept

    def count(self, tensor: Tensor) -> Tensor:
        """The hook in the place of :meth:`pack` that keeps each tensor as it is."""
        if self._asked == threading.get_ident():
            self._asked = None
            return tensor.detach()
        if self._read:
            self._counts, self._counted, self._read = {}, 0, False
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or self.is_weight(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counts:
            # A weak reference, so that no other storage gets this address.
            self._counts[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._counted += storage.nbytes()
            self.most = max(self.most, self._counted)
        return tensor.detach()  # an output would keep its own node alive

    def pack_ours(self, tensor: Tensor, rounds: bool, operator: str) -> Any:
        """Keep what an operator of ours saves, which plain training would not run.

        Args:
            tensor: as it is saved.
            rounds: whether it is kept for the gradient of the weight alone; factors stay as they are.
            operator: names it in a report.
        """
        with torch._C.DisableTorchFunction():
            weight = self.is_weight(tensor)
            rounds = rounds and not weight and tensor.numel() >= FEWEST and not tensor.is_meta
            kept = self.rounded(tensor, self.bits.weight) if rounds else tensor.detach()
            return kept if self.ledger is None or weight else self._note(tensor, kept, operator, True, True)

    def unpack(self, kept: Any) -> Tensor:
        """The hook that autograd calls for each saved tensor that a backward pass reads."""
        self._read = True
        if self.on_backward is not None and not saving.looking:
            self.on_backward()
        if torch.is_grad_enabled() and not saving.looking:
            self.unusual = True
        if isinstance(kept, Tensor):
            return kept
        with torch._C.DisableTorchFunction():
            if saving.lent is not None and saving.asked in kept.lends:
                saving.lent.append(kept)
                return torch.empty(0)
            return kept.restore()  # type: ignore[no-any-return]

    def instead_of(self, input: Tensor, module: str) -> None:
        """A layer of ours keeps less than an input, which plain training would keep."""
        if self.ledger is not None:
            storage = input.untyped_storage()
            reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            shape = tuple(input.shape)
            self.ledger.append(Saved(None, False, reference, storage.nbytes(), "input", module, shape, input.dtype))

    def _note(self, tensor: Tensor, kept: Any, name: str, ours: bool, for_weight: bool) -> Kept:
        assert self.ledger is not None
        held: Kept = Whole(kept) if isinstance(kept, Tensor) else kept
        plain = getattr(saving.rule, "plain", None)
        tensor = tensor if plain is None else plain(tensor)
        storage = tensor.untyped_storage()
        reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        shape, module = tuple(tensor.shape), self.names.current
        self.ledger.append(
            Saved(weakref.ref(held), ours, reference, storage.nbytes(), name, module, shape, tensor.dtype, for_weight)
        )
        return held

    def _keep(self, tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
            return tensor
        count = tensor.numel()
        if count < FEWEST or self.is_derived(tensor):
            return tensor.detach()
        if self.is_weight(tensor):
            return tensor
        rule = saving.rule
        if rule is not None:
            kept = rule(tensor, self)
            if kept is not NotImplemented:
                return kept
        if tensor.dtype is torch.bool:
            return self.booleans(tensor)
        if not tensor.is_floating_point():
            return tensor.detach()
        if _cast_of_weight(tensor) or _for_recomputation() or self._is_statistics(count):
            return self.whole(tensor)
        return self.rounded(tensor, self.bits.other)

    def _is_statistics(self, count: int) -> bool:
        """Whether so few elements are row statistics of what the operator works on."""
        return any(
            count * STATISTICS <= other.numel() and not self.is_weight(other)
            for other in saving.arguments
            if isinstance(other, Tensor)
        )

    def whole(self, tensor: Tensor) -> Any:
        """Keep a tensor as it is; flags of it are not needed beside it."""
        key = _key(tensor)
        flags = self._flags.get(key)
        flags = None if flags is None else flags()
        if flags is not None:
            flags.read_from(tensor.detach())
        return tensor.detach()  # an output would keep its own node alive

    def booleans(self, tensor: Tensor) -> Any:
        """Keep a tensor of booleans."""
        return Booleans(tensor.clone(), tensor.stride())

    def flags(
        self,
        tensor: Tensor,
        find: Callable[[Tensor], Tensor],
        off: float,
        on: float,
        between: tuple[float, float] | None = None,
    ) -> Any:
        """Keep one bit an element of a tensor.

        Args:
            tensor: as it was saved.
            find: makes a new tensor of booleans of some elements of it, on one axis.
            off: value that the backward kernel gets where the flag is not set.
            on: value where it is.
            between: two numbers, where a flag is set if neither ``x <= low`` nor ``x >= high``; NaN: no bound. The same
                as ``find``, in one pass where there is one.
        """
        plain = tensor.detach() if dense(tensor) else tensor.detach().clone()
        kept = Flags(pack_bits_of(plain, find, between), plain, tensor.stride(), off, on)
        if self.bits.other is None:
            key = _key(tensor)
            kept.reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._flags[key] = weakref.ref(kept, lambda _: self._flags.pop(key, None))
        return kept

    def rounded(self, tensor: Tensor, bits: int | None) -> Any:
        """Keep a tensor in few bits, in the stretch of memory that others save too."""
        if bits is None or (_dispatch_modes() and recorded()):
            return self.whole(tensor)
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        if tensor.numel() * VIEWED >= size and _base(tensor).numel() >= size:
            stretch = self._stretch(tensor, storage, 0, size, bits)
            if stretch is not None:
                return View(stretch, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        elif dense(tensor):
            stretch = self._stretch(tensor, storage, int(tensor.storage_offset()), tensor.numel(), bits)
            if stretch is not None:
                return View(stretch, tensor.shape, tensor.stride(), 0)
        rounded = round_to_bits(
            tensor.reshape(-1).contiguous(),
            bits,
            group_size(tensor.shape, _contiguous(tensor.shape)),
        )
        if rounded is None or rounded.nbytes >= storage.nbytes():
            return self.whole(tensor)
        return View(Stretch(rounded, bits, tensor.dtype, None), tensor.shape, _contiguous(tensor.shape), 0)

    def rounded_changed(self, tensor: Tensor, bits: int | None, factor: Tensor, term: Tensor) -> Any:
        """Keep ``tensor * factor[c] + term[c]`` of each channel in few bits."""
        if bits is not None and rounds_in_one_pass(tensor, bits) and dense(tensor):
            shape, stride = tensor.shape, tensor.stride()
            flat, group = tensor.as_strided((tensor.numel(),), (1,)), group_size(shape, stride)
            found = round_to_bits(flat, bits, group, Affine.of(factor, term, stride))
            if found is not None and found.nbytes < tensor.nbytes:
                return View(Stretch(found, bits, tensor.dtype, None), shape, stride, 0)
        return self.rounded(affine(tensor, factor, term), bits)

    def relatively(self, tensor: Tensor) -> Any:
        """Keep a tensor whose small elements count as much as its large ones, since a gradient is divided by them."""
        single = tensor.dtype is torch.float32 and self.bits.other is not None
        return self.rounded(tensor, 16) if single else self.whole(tensor)

    @property
    def finer(self) -> int | None:
        """Bits of what an operator is more sensitive to than to most."""
        return None if self.bits.other is None else min(8, 2 * self.bits.other)

    def for_weight(self, tensor: Tensor) -> Any:
        """Keep a tensor for the gradient of a weight alone; computed from another one where that is kept anyway."""
        bits = self.bits.weight
        if bits is not None:
            recipe = self.recipes.find(tensor)
            found = None if recipe is None else self.recipes.view(recipe, tensor)
            if found is not None:
                return found
        return self.rounded(tensor, bits)

    def norm_input(self, tensor: Tensor) -> Any:
        """Keep the input ``(B, C, ...)`` of a normalisation of channels."""
        return self.whole(tensor) if self.bits.other is None else NormInput(tensor, self)

    @staticmethod
    def settle() -> None:
        """The operator after a normalisation is known, and reads no more than any other."""
        pending, saving.pending = saving.pending, None
        if pending is not None:
            pending.settle()

    def _stretch(self, tensor: Tensor, storage: Any, offset: int, size: int, bits: int) -> Stretch | None:
        key = (storage._cdata, offset, size, tensor.dtype, tensor._version)
        found: Stretch | None = self._stretches[key]() if key in self._stretches else None
        if found is not None and found.bits >= bits:
            return found
        group = group_size(tensor.shape, tensor.stride())
        rounded = round_to_bits(tensor.as_strided((size,), (1,), offset), bits, group)
        if rounded is None:
            return None
        if found is not None:
            found.rounded, found.bits = rounded, bits
            return found
        made = Stretch(rounded, bits, tensor.dtype, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self._stretches[key] = weakref.ref(made, lambda _: self._stretches.pop(key, None))
        return made


def _refuse_nested() -> None:
    if saving.store is not None or saving.resting:
        raise StateError("a step began inside of another one in the same thread: end the first one before.")


_PLAIN = (Tensor, nn.Parameter)
_dispatch_modes: Any = torch._C._len_torch_dispatch_stack


def _base(tensor: Tensor) -> Tensor:
    """The tensor whose version a view has. Of chunks that share memory and no version one may change unseen."""
    return tensor._base if tensor._is_view() and tensor._base is not None else tensor


def _key(tensor: Tensor) -> Any:
    return (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor._version)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _cast_of_weight(tensor: Tensor) -> bool:
    """Whether autocast has made a tensor from a parameter: a cast, perhaps transposed, of a leaf."""
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return False
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _CASTS:
        node = node.next_functions[0][0] if node.next_functions else None
    return (
        node is not None
        and node.name() == "torch::autograd::AccumulateGrad"
        and isinstance(node.variable, nn.Parameter)
    )


def _callers() -> Iterator[str]:
    frame: Any = sys._getframe(2)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


def _for_recomputation() -> bool:
    """Whether a checkpointed segment saves its inputs, from which it computes everything again."""
    frame = sys._getframe(3)  # pack's caller
    module = frame.f_globals.get("__name__", "")
    if module == "torch.autograd.function":  # in between, with some versions of torch
        module = getattr(frame.f_locals.get("cls"), "__module__", "")
    return "checkpoint" in module
