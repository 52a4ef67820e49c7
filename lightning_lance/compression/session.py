"""One training run with compressed activations, without a Trainer: what the callback drives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lance.compression.calibration import Calibration, Reduce, calibrate, eager
from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.frozen_norms import frozen_norms
from lightning_lance.compression.functional import compact_functional
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.redundancy import kept_anyway
from lightning_lance.compression.report import LayerReport, Report
from lightning_lance.compression.saved_bytes import SavedBytes, measure_saved_bytes
from lightning_lance.compression.surgery import (
    LeftAlone,
    Plan,
    bypassed,
    compressed_layers,
    is_swapped,
    join,
    plan,
    restore,
    swap,
)
from lightning_lance.errors import CalibrationError, LanceWarning, PlanError, StateError
from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import base_class, uninstall
from lightning_lance.layers.sharing import link
from lightning_lance.subspaces.subspace import CapturedEnergy, LayerSubspace

STATE_VERSION = 1

Pass = Callable[[], Any]
"""Runs one forward pass in training mode and returns the loss or the outputs."""

Share = Callable[[Any], Any]
"""Returns process 0's object on every process."""


class LanceSession:
    """Swap, calibrate, refresh, measure, save, restore.

    Args:
        model: the model to train.
        config: the options.

    Attributes:
        report: ranks, energies and bytes, once measured.
        left: layers with trainable parameters that are left alone.
        observed: ordinary training steps in the current observation.

    Example:
        >>> import torch
        >>> from lightning_lance.compression.session import LanceSession
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [torch.randn(32, 16) for _ in range(4)]
        >>> session = LanceSession(model)
        >>> plan = session.start()
        >>> session.calibrate([lambda x=x: model(x) for x in batches])
        >>> for x in batches:
        ...     with session.functional():
        ...         loss = model(x).sum()
        ...     loss.backward()
        >>> session.stop()
    """

    def __init__(self, model: nn.Module, config: LanceConfig | None = None) -> None:
        self.model = model
        self.config = config or LanceConfig()
        self.report: Report | None = None
        self.left: list[LeftAlone] = []
        self.observed = 0
        self._checked = False
        self._dropped: dict[str, LeftAlone] = {}
        self._observing: Calibration | None = None
        self._plain = False
        self._trainable: list[bool] = []
        self._waiting: Plan | None = None
        self._accompanied = False

    def start(self) -> Plan:
        """Plan, and swap what is to be compressed; its companions follow once it is calibrated.

        Until then every layer runs the stock path. A model that an interrupted run left swapped is restored first.

        Raises:
            PlanError: nothing can be compressed, or a pattern matches nothing. The model is as it was.
        """
        restore(self.model)
        made = plan(self.model, self.config)
        self.left = list(made.left)
        self._dropped = {}
        self._checked = False
        self._observing = None
        self._trainable = self._flags()
        self._accompanied = False
        self._waiting = made
        swap(self.model, replace(made, entries=made.compressed))
        return made

    def _accompany(self) -> None:
        """Swap the companions too."""
        waiting, self._waiting, self._accompanied = self._waiting, None, True
        if waiting is not None:
            join(self.model, replace(waiting, entries=[entry for entry in waiting.entries if not entry.compress]))

    def join(self) -> list[str]:
        """Swap layers that have become trainable since, as fine-tuning schedules do. Cheap where nothing has.

        Returns:
            Names of the new layers; they run the stock path until calibrated.
        """
        flags = self._flags()
        if flags == self._trainable or not is_swapped(self.model):
            return []
        self._trainable = flags
        try:
            made = plan(self.model, self.config)
        except PlanError:  # nothing is trainable now, or nothing that the patterns name
            return []
        self.left = [*made.left, *self._dropped.values()]
        made = replace(made, entries=[entry for entry in made.entries if entry.name not in self._dropped])
        if self._accompanied:
            joined = join(self.model, made)
        else:
            self._waiting = made
            joined = join(self.model, replace(made, entries=made.compressed))
        self._checked = self._checked and not joined
        return joined

    def _flags(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.model.parameters()]

    def stop(self) -> None:
        """Give the model its own classes back; does nothing the second time."""
        self._observing = None
        restore(self.model)

    @property
    def layers(self) -> dict[str, Compressed]:
        """Name -> compressed layer."""
        return compressed_layers(self.model)

    @property
    def uncalibrated(self) -> set[str]:
        """Names of compressed layers that have no subspace, and are not being observed to get one."""
        watched: set[str] = set() if self._observing is None else set(self._observing.layers)
        return {name for name, layer in self.layers.items() if layer._lance.subspace is None} - watched

    @property
    def calibrated(self) -> bool:
        """Whether every compressed layer has its subspace."""
        layers = self.layers
        return bool(layers) and all(layer._lance.subspace is not None for layer in layers.values())

    def calibrate(
        self,
        passes: Sequence[Pass],
        reduce: Reduce | None = None,
        share: Share | None = None,
        only: set[str] | None = None,
    ) -> None:
        """Find the subspaces from forward passes that leave no trace.

        Args:
            passes: forward passes, one for each calibration batch.
            reduce: sums accumulators over the processes of a distributed run.
            share: hands process 0's factors to all.
            only: names of the layers; all by default, and always where a memory budget is to be shared by all.

        Raises:
            CalibrationError: see :func:`~lightning_lance.calibrate`.
        """
        only = None if self.config.budget is not None else only
        with calibrate(self.model, reduce, only, self.config.budget) as calibration:
            for run in passes:
                run()
        self._settle(calibration, share)

    def observe(self, only: set[str] | None = None) -> None:
        """Collect statistics in the training steps between :meth:`begin_step` and :meth:`end_step`, from now on.

        Args:
            only: names of the layers; all by default, and always where a memory budget is to be shared by all.
        """
        self._observing = Calibration(self.model, None if self.config.budget is not None else only, self.config.budget)
        self.observed = 0

    @property
    def observing(self) -> bool:
        """Whether statistics are being collected in ordinary training steps."""
        return self._observing is not None

    def begin_step(self) -> None:
        """Collect, if observing, until :meth:`end_step`; a validation pass in between must not be collected."""
        if self._observing is not None:
            self._observing.observe()
            self.observed += 1

    def end_step(self) -> None:
        """Stop collecting until the next step."""
        if self._observing is not None:
            self._observing.stop()

    def refresh(self, reduce: Reduce | None = None, share: Share | None = None) -> None:
        """Assign new subspaces from what was observed since :meth:`observe`.

        On NaN or Inf, or where nothing was observed, the present ones stay, with a warning.

        Raises:
            StateError: nothing is being observed.
            CalibrationError: a layer that has no subspace yet saw NaN or Inf.
        """
        calibration = self._observing
        if calibration is None:
            raise StateError("refresh() without observe(): call observe(), run a few training steps, then refresh().")
        calibration.stop()
        self._observing = None
        if self.observed == 0:
            warnings.warn(
                "the subspaces were not refreshed: no step was observed. Call begin_step() before and end_step() after "
                "some training steps between observe() and refresh().",
                LanceWarning,
                stacklevel=2,
            )
            return
        try:
            calibration.finish(reduce)
        except CalibrationError as error:
            if not self.calibrated:
                raise
            warnings.warn(f"the subspaces were not refreshed: {error}", LanceWarning, stacklevel=2)
            return
        self._settle(calibration, share)

    def _settle(self, calibration: Calibration, share: Share | None) -> None:
        self._dropped |= {item.name: item for item in calibration.left}
        self.left += calibration.left
        if share is not None:
            self._assign(share(self._subspaces()))
        self._accompany()

    @property
    def checked(self) -> bool:
        """Whether :meth:`drop_redundant` has looked at the calibrated layers as they are now."""
        return self._checked

    def drop_redundant(self, run: Pass, share: Share | None = None) -> list[str]:
        """Swap back the layers whose input autograd keeps anyway, for another operation; their gradient is exact then.

        Needs no more memory than a pass without gradients, and leaves no trace.

        Args:
            run: a forward pass with gradients.
            share: hands process 0's decision to all.

        Returns:
            Their names.
        """
        self._checked = True
        self.end_step()
        with isolated(self.model), eager():
            found = kept_anyway(run, {n: x for n, x in self.layers.items() if x._lance.subspace is not None})
        found = found if share is None else share(found)
        layers: dict[str, Any] = dict(self.layers)
        for name in found:
            reason = "its input is kept for another operation anyway"
            self._dropped[name] = LeftAlone(name, base_class(layers[name]).__name__, reason)
            self.left.append(self._dropped[name])
            uninstall(layers[name])
        link(self.layers.values())
        return found

    def functional(self) -> AbstractContextManager[Any]:
        """Context for a forward pass in which functional calls (``F.relu(x)``) keep less for backward too."""
        if not self.config.companions or self._plain or not self._accompanied:
            return nullcontext()
        return compact_functional(self.config.companions == "approximate")

    def measure(self, run: Pass) -> Report:
        """Measure what autograd keeps for one forward pass, with and without compression.

        Needs no more memory than a pass without gradients, and leaves no trace.

        Args:
            run: a forward pass with gradients.
        """
        self.end_step()
        self.report = self._measured(run)
        return self.report

    def _measured(self, run: Pass) -> Report:
        energies: dict[str, _Measured] = {}
        self._plain = True
        try:
            with isolated(self.model), eager(), self._trainable_weights(), bypassed(self.model):
                before = measure_saved_bytes(run, self.model)
        finally:
            self._plain = False
        with isolated(self.model), eager():
            after = measure_saved_bytes(run, self.model)
            for name, layer in self.layers.items():
                assert layer._lance.subspace is not None
                energies[name] = layer._lance.observer = _Measured(layer._lance.subspace, layer.channel_axis)
            try:
                with torch.no_grad():
                    run()
            finally:
                for layer in self.layers.values():
                    layer._lance.observer = None
        return self._report(before, after, energies)

    @contextmanager
    def _trainable_weights(self) -> Iterator[None]:
        """Context in which weights train that a smaller parameter stands in for."""
        frozen = [layer.weight for layer in self.layers.values() if not layer.weight.requires_grad]  # type: ignore[attr-defined]
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)

    def _report(self, before: SavedBytes, after: SavedBytes, energies: dict[str, _Measured]) -> Report:
        measured = after.by_module()
        counted: set[int] = set()
        rows = []
        for name, layer in self.layers.items():
            seen, subspace = energies[name], layer._lance.subspace
            assert subspace is not None
            plain = formula = 0
            core: tuple[int, ...] = ()
            for shape, storage in zip(seen.shapes, seen.storages, strict=True):
                whole = torch.Size(shape).numel() * seen.itemsize
                first, shared = storage.cdata not in counted, layer._lance.shared is not None
                counted.add(storage.cdata)
                shrinks = subspace.shrinks(shape[0], shape[1], shape[2:])
                core = core or (subspace.core_shape(shape[0], shape[1], shape[2:]) if shrinks else shape)
                plain += whole * first
                if first or (shrinks and not shared):
                    formula += (
                        subspace.formula_bytes(shape[0], shape[1], shape[2:], seen.itemsize) if shrinks else whole
                    )
            kind = base_class(layer).__name__  # type: ignore[arg-type]
            shape = seen.shapes[0] if seen.shapes else ()
            row = LayerReport(name, kind, shape, core, dict(subspace.energy), plain, formula, measured.get(name, 0))
            rows.append(row)
        kept, total = sum(e.kept for e in energies.values()), sum(e.total for e in energies.values())
        captured = kept / total if total else None
        return Report(rows, list(self.left), before, after, captured, self._notes(after))

    def _notes(self, after: SavedBytes) -> list[str]:
        norms = [name for name, module in frozen_norms(self.model).items() if module.training]
        by_module = after.by_module()
        held = sum(by_module.get(name, 0) for name in norms)
        if not held:
            return []
        return [
            f"{len(norms)} batch-norm layers in training mode hold {held / 1e6:.3g} MB although their affine "
            "parameters are frozen; freeze_norms=True runs them in eval mode and frees it."
        ]

    def _subspaces(self) -> dict[str, Any]:
        return {
            name: layer._lance.subspace.state_dict()
            for name, layer in self.layers.items()
            if layer._lance.subspace is not None
        }

    def _assign(self, subspaces: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            if name in subspaces:
                module: Any = layer
                found = LayerSubspace.from_state_dict(subspaces[name])
                factor = next(found.factors(), None)
                dtype = module.weight.dtype if factor is None else factor.dtype
                layer._lance.subspace = found.to(module.weight.device, dtype)
        link(self.layers.values())

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {"rank": _plain(config.rank), "batch": config.batch, "core_bits": config.core_bits}

    def state_dict(self) -> dict[str, Any]:
        """Subspaces and the state of the sample orders, in plain containers and CPU tensors."""
        layers = self.layers
        order = next(iter(layers.values()))._lance.order.state.tolist() if layers else []
        observing = self._observing
        return {
            "version": STATE_VERSION,
            "config": self._options(),
            "subspaces": self._subspaces(),
            "order": order,
            "dropped": [[item.name, item.type, item.reason] for item in self._dropped.values()],
            "checked": self._checked,
            "observed": self.observed,
            "observing": None
            if observing is None
            else {name: statistics.state_dict() for name, statistics in observing.statistics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with stored subspaces in a swapped model. The stored ones win over other options asked for.

        Layers that are swapped but were not part of the stored run are then in :attr:`uncalibrated`.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            StateError: the state is of another version, or does not fit the model.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"the stored state has version {state.get('version')!r}; this package reads version {STATE_VERSION}. "
                "Resume without the callback's state to calibrate anew."
            )
        if not is_swapped(self.model):
            raise StateError("load_state_dict() needs a swapped model: call start() first.")
        stored, asked = state["config"], self._options()
        if stored != asked:
            warnings.warn(
                f"the resumed run continues with its stored subspaces ({_text(stored)}); {_text(asked)} was asked for "
                "and is ignored. Start a new fit to use it.",
                LanceWarning,
                stacklevel=2,
            )
            self.config = replace(self.config, **stored)
            rules = self.config.rules()
            for name, layer in self.layers.items():
                layer._lance.ranks = rules.for_layer(name)
                layer._lance.unbiased = self.config.batch == "unbiased"
                layer._lance.bits = self.config.bits(layer._lance.ranks)
        layers = self.layers
        self._dropped = {item[0]: LeftAlone(*item) for item in state["dropped"]}
        self.left += self._dropped.values()
        for name in self._dropped:
            if name in layers:
                module: Any = layers.pop(name)
                uninstall(module)
        missing = sorted(set(state["subspaces"]) - set(layers))
        if missing:
            warnings.warn(
                f"stored subspaces of {', '.join(missing)} are not used: these layers are not swapped in this run.",
                LanceWarning,
                stacklevel=2,
            )
        self._checked = state["checked"]
        self._assign(state["subspaces"])
        if state["subspaces"]:
            self._accompany()
        if layers:
            next(iter(layers.values()))._lance.order.state.copy_(torch.tensor(state["order"], dtype=torch.int64))
        watched = set(state["observing"] or ()) & set(layers)
        if watched:
            self.observe(watched)
            assert self._observing is not None
            for name, statistics in self._observing.statistics.items():
                if name in state["observing"]:
                    device = self._observing.layers[name].weight.device  # type: ignore[attr-defined]
                    statistics.load_state_dict(state["observing"][name], device)
        self.observed = state["observed"]


class _Measured(CapturedEnergy):
    """Also identifies the storages of the inputs: layers that read one input keep it once."""

    def __init__(self, subspace: LayerSubspace, channel_axis: int) -> None:
        super().__init__(subspace, channel_axis)
        self.storages: list[Any] = []

    def update(self, input: Tensor) -> None:
        self.storages.append(StorageWeakRef(input.untyped_storage()))  # type: ignore[no-untyped-call]
        super().update(input)


def _text(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.items())


def _plain(rank: Any) -> Any:
    return {key: _plain(value) for key, value in rank.items()} if isinstance(rank, Mapping) else rank
