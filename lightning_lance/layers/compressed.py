"""What every layer that compresses its input shares: its state, and the factors of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, overrides

from lightning_lance.layers.registry import Variant
from lightning_lance.layers.sharing import SharedCores
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.saving import saving
from lightning_lance.ops.tracking import refuse_transforms
from lightning_lance.ops.watching import WatchingMode
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.subspace import LayerSubspace, Sizes
from lightning_lance.tensors.orders import SampleOrder

_modes: Any = overrides

P = ParamSpec("P")
R = TypeVar("R")


def unwatched(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the mode is off while the method runs, where it is the innermost one."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not isinstance(_modes._get_current_function_mode(), WatchingMode):
            return method(*args, **kwargs)
        mode = _modes._pop_mode()
        try:
            return method(*args, **kwargs)
        finally:
            _modes._push_mode(mode)

    return run


class Observer(Protocol):
    """Sees every input of a layer in a forward pass."""

    def update(self, input: Tensor, /) -> None: ...


class Plan(NamedTuple):
    """What calls with equal inputs have in common; a steady training step looks it up and runs.

    Attributes:
        shape: of the input.
        dtype: of the input.
        device: of the input.
        subspace: that of the layer then.
        factors: with groups that are in order; ``None`` where the stock path must run.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    subspace: LayerSubspace
    factors: Factors | None


@dataclass
class LayerState:
    """State of one compressed layer, in the module's ``__dict__`` and never in its buffers.

    Attributes:
        name: qualified name of the module.
        selected: whether its input is to be projected.
        ranks: rank rules.
        unbiased: whether the batch mode is estimated without bias.
        order: source of sample orders, shared by the layers of a model.
        subspace: factors; ``None`` until calibrated, and the stock path runs.
        observer: collects statistics of the inputs, during calibration or refresh.
        shared: cores of living inputs, where other layers may read the same one.
        learned: whether the batch mode gets a factor of its own.
        plan: of the last call.
    """

    name: str
    selected: bool
    ranks: ModeRanks
    unbiased: bool
    order: SampleOrder
    subspace: LayerSubspace | None = None
    observer: Observer | None = None
    shared: SharedCores | None = None
    learned: bool = False
    plan: Plan | None = None


class Compressed(Variant):
    """Base of the variants that keep a core of their input.

    Attributes:
        channel_axis: 1 for convolutions, -1 for linear layers.
    """

    channel_axis: ClassVar[int]
    _lance: LayerState

    @staticmethod
    def sizes(input: Tensor) -> Sizes:
        """Spatial or token sizes of an input."""
        raise NotImplementedError

    def lance_work(self) -> float:
        """Multiply-adds of the forward pass on each element of an input."""
        raise NotImplementedError

    def lance_outputs(self) -> float:
        """Elements of an output for each one of the input."""
        raise NotImplementedError

    def lance_pointwise(self) -> bool:
        """Whether every output position reads one input position, of all channels."""
        raise NotImplementedError

    def lance_observe(self, input: Tensor) -> None:
        """Show an input to the observer, if there is one."""
        if self._lance.observer is not None:
            self._lance.observer.update(input)

    def lance_factors(self, input: Tensor) -> Factors | None:
        """Factors for a call, or ``None`` where the stock path must run."""
        state, shape = self._lance, input.shape
        subspace = state.subspace
        if subspace is None:
            return None
        # A tracer's tensors must not be kept for real calls.
        keeps = type(input) is Tensor and not torch.compiler.is_compiling()
        plan = state.plan if keeps else None
        if (
            plan is None
            or plan[:2] != (shape, input.dtype)
            or plan.device != input.device
            or plan.subspace is not subspace
        ):
            factors = _factors(subspace, input, self.sizes(input), shape[self.channel_axis])
            plan = Plan(shape, input.dtype, input.device, subspace, factors)
            state.plan = plan if keeps else None
        factors = plan.factors
        if factors is None or factors.groups is None or not subspace.batch.unbiased:
            return factors
        order = state.order.draw(shape[0], input.device)
        # Compilers up to torch 2.6 take neither slices nor _replace() of a named tuple.
        rotation, groups, scale, channel, spatial = factors
        return Factors(rotation, None if groups is None else groups.index_select(0, order), scale, channel, spatial)

    def lance_core(self, input: Tensor) -> tuple[Tensor, Factors] | None:
        """Core of an input and the factors that made it, which other layers of the same input share; or ``None``."""
        shared = None if torch.compiler.is_compiling() else self._lance.shared
        axis = self.channel_axis % input.dim()
        subspace = self._lance.subspace
        found = None if shared is None or subspace is None else shared.recall(input, subspace, axis)
        if found is not None:
            return found
        factors = self.lance_factors(input)
        if factors is None:
            return None
        with torch.no_grad():
            core = compress(input, factors, axis, 2 if axis == 1 and self.channel_axis == 1 else 1)
        if shared is not None and subspace is not None:
            shared.remember(input, subspace, axis, core, factors)
        return core, factors

    @unwatched
    def lance_output(
        self, function: type[torch.autograd.Function], input: Tensor, weight: Tensor, bias: Tensor | None, *static: Any
    ) -> Tensor | None:
        """Output of a call that keeps the core of its input, or ``None`` where the stock path must run.

        Args:
            function: of :mod:`lightning_lance.ops`.
            input: of the call; one without a batch axis takes the stock path.
            weight: as the function takes it.
            bias: likewise.
            static: what the function takes between the bias and the core.
        """
        state = self._lance
        if not torch.compiler.is_compiling() and saving.store is not None and saving.pending is not None:
            saving.store.settle()  # this layer is what comes after a normalisation
        if (input.dim() != weight.dim()) if self.channel_axis == 1 else (input.dim() == 1):
            return None
        self.lance_observe(input)
        if state.subspace is None or not (torch.is_grad_enabled() and weight.requires_grad):
            return None
        if torch._C._are_functorch_transforms_active():
            refuse_transforms(state.name)
        kept = self.lance_core(input)
        if kept is None:
            return None
        core, factors = kept
        rotation, groups, scale, channel, spatial = factors
        flat = (rotation, groups, scale, channel, *spatial)
        arguments = (input, weight, bias, *static, core, *flat)
        return self.lance_run(function.apply, function.__name__, input, (weight, *flat), *arguments)

    @unwatched
    def lance_run(
        self, operator: Callable[..., Tensor], name: str, input: Tensor, whole: Iterable[Any], *arguments: Any
    ) -> Tensor:
        """Run an operator that keeps less than its input, rounded where a store keeps what is saved.

        Args:
            operator: what to run.
            name: of it, for a report.
            input: which it does not keep.
            whole: the tensors among these are kept as they are.
            arguments: of the operator.
        """
        store = saving.store
        if torch.compiler.is_compiling() or store is None:
            return operator(*arguments)
        if store.ledger is not None:
            store.instead_of(input, self._lance.name)
        if not store.is_on_top():
            return operator(*arguments)
        factors = {tensor.untyped_storage()._cdata for tensor in whole if type(tensor) is Tensor}

        def pack(saved: Tensor) -> Any:
            rounds = type(saved) is Tensor and saved.is_floating_point()
            rounds = rounds and saved.untyped_storage()._cdata not in factors
            if not rounds and store.ledger is None:
                return saved.detach()
            return store.pack_ours(saved, rounds, name)

        with torch.autograd.graph.saved_tensors_hooks(pack, store.unpack):
            return operator(*arguments)


def _factors(subspace: LayerSubspace, input: Tensor, sizes: Sizes, channels: int) -> Factors | None:
    """Factors for inputs like this one, but for the order of samples; ``None`` where they are better kept whole."""
    spatial = subspace.spatial_factors(sizes)
    size = input.shape[0]
    if spatial is None or not subspace.shrinks(size, channels, sizes):
        return None
    rotation, groups = subspace.batch.projection(size, input.dtype, input.device)
    scale = 1.0 if rotation is None else subspace.batch.contrast_scale(size)
    return Factors(rotation, groups, scale, subspace.channel, spatial)
