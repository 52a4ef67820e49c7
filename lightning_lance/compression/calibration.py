"""Find the subspaces of the swapped layers from a few forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.processes import Processes
from lightning_lance.compression.surgery import LeftAlone, compressed_layers
from lightning_lance.compression.truncation import pays
from lightning_lance.errors import CalibrationError, LanceWarning, StateError
from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import base_class, uninstall
from lightning_lance.layers.sharing import link
from lightning_lance.subspaces.budget import BudgetedLayer, allocate, gathering_ranks
from lightning_lance.subspaces.subspace import LayerSpectra, LayerStatistics, LayerSubspace, ZeroInputError


def _with_joint_work(spectra: dict[str, LayerSpectra]) -> dict[str, LayerSpectra]:
    """The same, where layers of equal statistics count the work of the one that does most.

    They read one input, and can share its core if none of them keeps a mode whole that another one truncates.
    """
    most: dict[Any, float] = {}
    for found in spectra.values():
        most[found.totals] = max(found.work, most.get(found.totals, 0.0))
    return {name: replace(found, work=most[found.totals]) for name, found in spectra.items()}


class Calibration:
    """Statistics of the swapped layers' inputs, and the subspaces made from them.

    Args:
        model: a swapped model.
        only: names of the layers to calibrate; all by default.
        budget: bytes for all that is kept; ``None`` for the ranks as asked for.
        bits: in which an element of a core will be kept; ``None``: as it is.

    Attributes:
        statistics: layer name -> what was seen.
        left: layers that were swapped back, and why.
        fixed: bytes of the budget that are kept whatever the ranks.
    """

    def __init__(
        self, model: nn.Module, only: set[str] | None = None, budget: int | None = None, bits: int | None = None
    ) -> None:
        found = compressed_layers(model)
        self.model = model
        self.layers: dict[str, Compressed] = {n: layer for n, layer in found.items() if only is None or n in only}
        if not self.layers:
            raise StateError("the model has no swapped layer to calibrate. Call swap(model) first.")
        self.budget = budget
        self.fixed = 0
        self.bits = bits
        self.statistics = {
            name: LayerStatistics(
                layer._lance.ranks if budget is None else gathering_ranks(layer._lance.ranks),
                layer.channel_axis,
                name,
                layer.lance_work(),
                layer._lance.learned,
            )
            for name, layer in self.layers.items()
        }
        self.left: list[LeftAlone] = []

    def observe(self) -> None:
        """Start collecting in every forward pass."""
        for name, layer in self.layers.items():
            layer._lance.observer = self.statistics[name]

    def stop(self) -> None:
        """Stop collecting."""
        for layer in self.layers.values():
            layer._lance.observer = None

    def spare(self, reasons: Mapping[str, str]) -> None:
        """Swap back layers that projecting would cost learning for little memory, and say why.

        Args:
            reasons: by the name of the layer. Those whose modes were asked for one by one stay.
        """
        for name in sorted(reasons.keys() & self.layers.keys()):
            if self.layers[name]._lance.ranks.sparing and self.layers[name]._lance.subspace is None:
                del self.statistics[name]
                module: Any = self.layers.pop(name)
                uninstall(module)
                self.left.append(LeftAlone(name, base_class(module).__name__, reasons[name]))

    def release(self) -> None:
        """Swap back the layers that are truncated only where that costs nothing."""
        for name in [name for name, found in self.statistics.items() if found.ranks.automatic]:
            del self.statistics[name]
            module: Any = self.layers.pop(name)
            uninstall(module)

    def _sum_over(self, processes: Processes) -> None:
        local = {name: found.signature() for name, found in self.statistics.items() if found.tensors()}
        gathered = processes.gather(local)
        for name in sorted(self.statistics):
            for signatures in gathered:
                if name in signatures:
                    module: Any = self.layers[name]
                    self.statistics[name].extend(signatures[name], module.weight.device)
            processes.sum(self.statistics[name].tensors())

    def finish(self, processes: Processes | None = None) -> None:
        """Assign the subspaces. A layer that saw nothing, or only zeros, keeps the one it has, or is swapped back.

        One that is to be truncated only where that costs nothing is swapped back where it would cost something.

        Args:
            processes: those of a distributed run, over which to sum what was seen.

        Raises:
            CalibrationError: a layer's inputs hold NaN or Inf, or no layer saw any input. No subspace is assigned.
        """
        if processes is not None and processes.count > 1:
            self._sum_over(processes)
        spectra: dict[str, LayerSpectra] = {}
        gone: dict[str, str] = {}
        for name, statistics in self.statistics.items():
            if statistics.ranks.automatic:
                with suppress(CalibrationError):  # NaN, zeros: nothing that would be safe
                    spectra[name] = statistics.spectra()
                continue
            known = self.layers[name]._lance.subspace is not None
            if not statistics.tensors():
                if not known:
                    gone[name] = "calibration never saw an input of it"
                continue
            try:
                spectra[name] = statistics.spectra()
            except ZeroInputError:
                if not known:
                    gone[name] = "its calibration inputs were all zero"
        if not spectra and gone:
            raise CalibrationError(
                "no swapped layer saw a usable input during calibration: "
                + "; ".join(f"{name}: {reason}" for name, reason in gone.items())
                + ". Run the forward pass that training runs, on real batches."
            )
        found = self._cut(_with_joint_work(spectra)) if spectra else {}
        for name, layer in self.layers.items():
            if not layer._lance.ranks.automatic:
                layer._lance.subspace = found.get(name, layer._lance.subspace)
            elif name in found and pays(layer, found[name]):
                layer._lance.subspace = found[name]
            else:
                released: Any = layer
                uninstall(released)
        link(compressed_layers(self.model).values())
        for name, reason in gone.items():
            module: Any = self.layers[name]
            self.left.append(LeftAlone(name, base_class(module).__name__, reason))
            uninstall(module)
        zeros = [item.name for item in self.left if "zero" in item.reason]
        if zeros:
            warnings.warn(
                f"{', '.join(zeros)}: all calibration inputs were zero, so there is no direction to keep; left alone. "
                "Check the layers before, or calibrate on other batches.",
                LanceWarning,
                stacklevel=3,
            )

    @torch.inference_mode(False)  # factors made under inference mode could not be saved for backward
    @torch.no_grad()
    def _cut(self, spectra: dict[str, LayerSpectra]) -> dict[str, LayerSubspace]:
        states = {name: self.layers[name]._lance for name in spectra}
        if self.budget is None:
            return {
                name: found.subspace(states[name].ranks, states[name].unbiased, self.bits)
                for name, found in spectra.items()
            }
        budgeted = {
            name: BudgetedLayer(
                found,
                states[name].ranks,
                self.statistics[name].channels_first_shape,
                found.dtype.itemsize,
            )
            for name, found in spectra.items()
        }
        state = next(iter(states.values()))
        return allocate(budgeted, self.budget, state.unbiased, self.bits, self.fixed)


@contextmanager
def calibrate(
    model: nn.Module,
    processes: Processes | None = None,
    only: set[str] | None = None,
    budget: int | None = None,
    bits: int | None = None,
    evaluating: bool = False,
) -> Iterator[Calibration]:
    """Calibrate a swapped model on the forward passes inside the block.

    The block runs without gradients and without compiled graphs; buffers, training flags and random states are as
    before when it ends. No optimiser step is done.

    Args:
        model: a swapped model.
        processes: those of a distributed run, over which to sum what was seen.
        only: names of the layers to calibrate.
        budget: bytes for all that is kept.
        bits: in which an element of a core will be kept; ``None``: as it is.
        evaluating: run the passes in eval mode; otherwise in the mode that the model is in.

    Raises:
        ConfigError: the budget is below what the lowest ranks need.
        CalibrationError: see :meth:`Calibration.finish`; the model stays swapped and runs the stock path.

    Example:
        >>> import torch
        >>> from lightning_lance import LanceConfig, calibrate, restore, swap
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = swap(model, LanceConfig(rank=0.9))
        >>> with calibrate(model):
        ...     _ = model(torch.randn(32, 16))
        >>> model(torch.randn(32, 16)).sum().backward()
        >>> restore(model)
    """
    calibration = Calibration(model, only, budget, bits)
    with isolated(model), torch.no_grad(), eager():
        if evaluating:
            model.eval()
        calibration.observe()
        try:
            yield calibration
        finally:
            calibration.stop()
    calibration.finish(processes)


def eager() -> Any:
    """Context in which compiled modules run eagerly, so that observers see their inputs."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
