"""One training run with compressed activations, whoever drives it: a Trainer, Avalanche, or a loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_lance.compression.allocator import hold, let_go
from lightning_lance.compression.calibration import Calibration, calibrate, eager
from lightning_lance.compression.config import BITS, LanceConfig
from lightning_lance.compression.frozen_norms import FrozenNorms
from lightning_lance.compression.ledger import Ledger
from lightning_lance.compression.operators import Watch
from lightning_lance.compression.processes import Processes
from lightning_lance.compression.report import LITTLE, Report
from lightning_lance.compression.saved_bytes import SavedBytes
from lightning_lance.compression.steps import Steps
from lightning_lance.compression.store import Store
from lightning_lance.compression.surgery import (
    LeftAlone,
    Plan,
    Planned,
    compressed_layers,
    is_swapped,
    join,
    plan,
    restore,
    swap,
    walk,
)
from lightning_lance.compression.truncation import (
    KEPT_ANYWAY,
    WATCH,
    Watched,
    saves_little,
    tell,
    worth_looking,
)
from lightning_lance.errors import CalibrationError, ConfigError, LanceWarning, PlanError, StateError
from lightning_lance.layers.compressed import Compressed
from lightning_lance.layers.registry import find, uninstall
from lightning_lance.layers.sharing import link
from lightning_lance.subspaces.budget import gathering_ranks
from lightning_lance.subspaces.stored import StoredRun, check_session_state
from lightning_lance.subspaces.subspace import LayerStatistics, LayerSubspace

STATE_VERSION = 5

FIRST_BITS = BITS[2]
"""Of what is kept in the steps that define the subspaces: a run that fits with them shall fit at first too."""

Pass = Callable[[], Any]
"""Runs one forward pass in training mode and returns the loss or the outputs."""


class Stage(Enum):
    """Where a session stands."""

    IDLE = "idle"
    OBSERVING = "observing"
    STEADY = "steady"


class LanceSession(Steps):
    """Compress what autograd keeps of each training step, and report it.

    Around a step everything that autograd saves is kept rounded, as ``bits`` says. Where ``rank`` asks for it, inputs
    of linear layers and convolutions are projected before: those of the first steps, which are ordinary ones but for
    their fewer bits, define the subspaces. With ``rank="auto"`` the first step says whether any are worth to be looked
    at, and layers whose inputs leave their subspaces later are looked at again. Where plain training keeps less than
    250 KB of a step, and neither ``bits`` nor a rank or budget was given, steps after the first one run plainly.

    Args:
        model: the model to train.
        config: the options.
        heads: names of modules that ``skip`` of the options takes for classifiers.

    Attributes:
        stage: where the session stands.
        report: what autograd keeps, by layer and by operator, from the first step that was complete; from the first one
            with subspaces where there are any.
        left: layers with trainable parameters that are not projected, where others are.
        observed: training steps in the current observation.
        steps: training steps so far.
        may_rest: whether steps that keep little may run plainly.
        processes: those of a distributed run. All see the same subspaces, and each draws sample orders of its own:
            averaging over processes then averages them too.

    Example:
        >>> import torch
        >>> from lightning_lance import LanceSession
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> session = LanceSession(model)
        >>> plan = session.start()
        >>> for _ in range(4):
        ...     with session.step():
        ...         loss = model(torch.randn(4096, 64)).sum()
        ...     loss.backward()
        >>> session.report.ratio > 5
        True
        >>> session.stop()
    """

    def __init__(self, model: nn.Module, config: LanceConfig | None = None, heads: Collection[str] = ()) -> None:
        if not isinstance(config, LanceConfig | None):
            raise TypeError(
                f"config={config!r} is not allowed. Give a LanceConfig, such as LanceConfig(rank='compact')."
            )
        self.model = model
        self.config = config or LanceConfig()
        self.heads = frozenset(heads)
        self.stage = Stage.IDLE
        self.report: Report | None = None
        self.left: list[LeftAlone] = []
        self.observed = 0
        self.steps = 0
        self.processes = Processes()
        self._store = Store(self.config.kept_bits)
        self._store.mode = Watch(self._store)
        self._dropped: dict[str, LeftAlone] = {}
        self._observing: Calibration | None = None
        self._trainable: list[bool] = []
        self._trained: list[bool] = []
        self._automatic: dict[str, Planned] = {}
        self._looked = False
        self._chosen: set[str] = set()
        self._watched: Watched | None = None
        self._norms = FrozenNorms(model)
        self._ledger: Ledger | None = None
        self._fixed = 0
        self._evidence: tuple[list[str], int, int] = [], 0, 0
        self._reported = False
        self._most = 0
        self._little = False
        self.may_rest = True
        self._inside: ExitStack | None = None
        self._memory: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self.stage is not Stage.IDLE:  # the copy of its model is a stock one
            raise StateError(
                "a session cannot be copied between start() and stop(). Copy it before or after, or take state_dict() "
                "and load it into another one that has started."
            )
        return self.__dict__

    def start(self, observe: bool = True) -> Plan:
        """Plan, and swap what is to be projected. A model that an interrupted run left swapped is restored first.

        Args:
            observe: let the first steps define the subspaces, where ``calibration`` of the options does not say
                otherwise; else the stock layers run until :meth:`calibrate`.

        Raises:
            PlanError: something is to be projected and nothing can be, or a pattern matches nothing. The model is as it
                was.
        """
        restore(self.model)
        made = plan(self.model, self.config, self.heads)
        self.left = list(made.left)
        self._dropped = {}
        self._observing = None
        self._reported = self._little = False
        self._most = 0
        self._trainable = self._trained = self._flags()
        self._automatic, self._looked = {}, False
        self._consider(made)
        self._store.unusual = False
        swap(self.model, made)
        if self.config.release_memory and self._memory is None:
            self._memory = hold("returned")
        self._spread()
        self.stage = Stage.STEADY
        if observe and made.entries and self.config.calibration == "training":
            self.observe()
        return made

    def stop(self) -> None:
        """Give the model its own classes and flags back; does nothing the second time."""
        memory, self._memory = self._memory, None
        if memory is not None:
            let_go(memory)
        if self._inside is not None:
            self.end_step()
        self._observing = None
        self.stage = Stage.IDLE
        self._norms.release()
        restore(self.model)

    def _spread(self) -> None:
        for layer in self.layers.values():
            layer._lance.order.offset = self.processes.rank

    def join(self) -> list[str]:
        """Swap layers that have become trainable since, as fine-tuning schedules do. Cheap where nothing has.

        Returns:
            Names of the new layers, whose subspaces the next steps define.
        """
        flags = self._flags()
        if flags == self._trainable:
            return []
        self._trainable = flags
        self._notice(flags)
        try:
            made = plan(self.model, self.config, self.heads)
        except PlanError:  # nothing is trainable now, or nothing that the patterns name
            return []
        self._consider(made)
        self.left = [*made.left, *self._dropped.values()]
        made = replace(made, entries=[entry for entry in made.entries if entry.name not in self._dropped])
        if not made.entries:
            return []
        joined = join(self.model, made) if is_swapped(self.model) else [e.name for e in swap(self.model, made).entries]
        self._spread()
        self._reported = self._reported and not joined
        return joined

    def _consider(self, made: Plan) -> None:
        """Layers for the next step to say whether they are worth to be looked at."""
        self._automatic = {entry.name: entry for entry in made.automatic}

    def _notice(self, flags: list[bool]) -> None:
        """What trains that never did before makes the next step as good as a first one."""
        before = self._trained if len(self._trained) == len(flags) else [False] * len(flags)
        self._trained = [one or other for one, other in zip(before, flags, strict=True)]
        if self._trained != before:
            self._looked = self._reported = self._little = False
            self._most = 0

    def _install(self, names: set[str]) -> None:
        """Swap layers that may be truncated, to be observed."""
        made = Plan([self._automatic[name] for name in sorted(names)], [], self.config)
        if is_swapped(self.model):
            join(self.model, made)
        else:
            swap(self.model, made)

    def _choose(self) -> None:
        """At the end of a first step: which layers to look at."""
        ledger = self._store.ledger
        self._looked = bool(ledger)
        # Fine-tuning only; and processes that see different batches would have to agree.
        tuned = not all(self._trainable)
        if ledger and tuned and self.processes.count == 1 and not self._store.unusual:
            self._chosen = worth_looking(ledger, self._automatic.keys() - self.layers.keys())

    def _flags(self) -> list[bool]:
        owners = (module._parameters for module in walk(self.model) if module._parameters)
        return [p.requires_grad for parameters in owners for p in parameters.values() if p is not None]

    @property
    def layers(self) -> dict[str, Compressed]:
        """Name -> layer whose input is projected, or will be."""
        return compressed_layers(self.model)

    @property
    def uncalibrated(self) -> set[str]:
        """Names of layers that have no subspace, and are not being observed to get one."""
        watched: set[str] = set() if self._observing is None else set(self._observing.layers)
        return {name for name, layer in self.layers.items() if layer._lance.subspace is None} - watched

    @property
    def calibrated(self) -> bool:
        """Whether every layer that is to be projected has its subspace."""
        return all(layer._lance.subspace is not None for layer in self.layers.values())

    # Steps ------------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """The first half of :meth:`step`.

        Raises:
            StateError: the session was not started, a step is running already, or with ``calibration="eval"`` the first
                one begins before :meth:`calibrate`.
            CalibrationError: the steps that should define the subspaces saw NaN or Inf.
            ConfigError: the memory budget is below what the lowest ranks need.
        """
        if self._inside is not None:
            raise StateError("begin_step() inside of a step: call end_step() first.")
        if self.stage is Stage.IDLE:
            raise StateError("a step before start(), or after stop(): call start() first.")
        self._prepare()
        store = self._store
        if self._rests:
            self._inside = ExitStack()
            self._inside.enter_context(store.resting())
            return
        store.bits = FIRST_BITS if self._first_bits else self.config.kept_bits
        store.counting = self._little
        self._protect()
        with ExitStack() as inside:
            if self._observing is not None:
                self._observing.observe()
                inside.callback(self._observing.stop)
                inside.enter_context(eager())  # a compiled graph would hold the observers
                self.observed += 1
            if not self._reported or (self._observing is not None and self.config.budget is not None):
                self._ledger = Ledger(self)
                inside.enter_context(self._ledger.open())
                if self._ledger.energies:
                    inside.enter_context(eager())  # likewise
                if self._automatic and not self._looked:
                    inside.callback(self._choose)
            if self._observing is None and self.steps % WATCH == 0 and self._truncated:
                self._watched = Watched(self._truncated)
                inside.callback(self._watched.stop)
                inside.enter_context(eager())
            inside.enter_context(store)
            self._inside = inside.pop_all()

    def end_step(self) -> None:
        """The second half of :meth:`step`. Does nothing outside of one."""
        inside, self._inside = self._inside, None
        if inside is None:
            return
        inside.close()
        self.steps += 1
        self._weigh(self._store.most if self._ledger is None else self._ledger.plain)
        chosen, self._chosen = self._chosen, set()
        if chosen and not self._little:
            self._install(chosen)
            chosen &= self.layers.keys()  # not those that continual learning has swapped
            if chosen:
                self.observe(None if self._observing is not None else chosen)
        watched, self._watched = self._watched, None
        if watched is not None:
            self._look_at(watched.drifted())
        if self._ledger is not None:
            steady = self.stage is Stage.STEADY
            self._fixed = max(self._fixed, self._ledger.fixed)
            if self._observing is not None and self._ledger.total:
                self._evidence = sorted(self._ledger.spared), self._ledger.inputs, self._ledger.total
                if self.processes.count == 1:  # others may be elsewhere in the step: they decide when all refresh
                    self._spare(self._observing)
                    if not self._observing.layers:
                        self._observing, self.stage = None, Stage.STEADY
            if not self._reported:
                self.report = self._ledger.report(resting=self._little)
            self._reported = self.report is not None and steady
            self._ledger = None

    def _weigh(self, plain: int) -> None:
        """Whether the next steps run plainly, for nobody asks for more and no step has kept enough to gain from."""
        self._most = max(self._most, plain)
        if self._little and self._most >= LITTLE:
            self._looked = self._reported = False  # the next step is as good as a first one
        config = self.config
        asked = config.bits != "auto" or config.rank not in ("auto", None) or config.budget is not None
        alone = self.processes.count == 1  # others may keep more, and what is resumed from is of one alone
        little = self.may_rest and alone and not asked and 0 < self._most < LITTLE
        self._little = little and (self._little or not self.layers)

    @property
    def _rests(self) -> bool:
        """Whether nobody looks at a step, as at three of four where there is little to gain, whatever their period."""
        steady = self._little and self._reported and self._observing is None
        return steady and crc32(self.steps.to_bytes(8, "little")) % 4 != 0

    def _protect(self) -> None:
        self._store.protect(_tensors(self.model))

    @property
    def _truncated(self) -> dict[str, Compressed]:
        """Layers that are projected because that costs nothing."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if layer._lance.ranks.automatic and layer._lance.subspace is not None
        }

    def _look_at(self, drifted: Mapping[str, float]) -> None:
        """Round the whole inputs of these layers, until the next steps have found their subspaces anew."""
        if not drifted:
            return
        tell(drifted)
        for name in drifted:
            self.layers[name]._lance.subspace = None
        link(self.layers.values())
        self.observe(set(drifted))

    @property
    def reported(self) -> bool:
        """Whether the report is final: that of a steady step."""
        return self._reported

    @property
    def _first_bits(self) -> bool:
        if self.stage is not Stage.OBSERVING or self.config.bits is None:
            return False
        states = [layer._lance for layer in self.layers.values()]
        return any(state.subspace is None and not state.ranks.automatic for state in states)

    def _prepare(self) -> None:
        """What may change between two steps."""
        self.join()
        if self.config.freeze_norms:
            self._norms.find()
            self._norms.apply()
        if self._observing is not None and self.observed >= self.config.batches:
            self.refresh()
        if not self._little and self.uncalibrated:  # where little is kept no layer is projected
            if self.config.calibration == "eval" and not self.steps:
                raise StateError(
                    "the first step before calibrate(): calibration='eval' defines the subspaces before training. Call "
                    f"calibrate(passes) with {self.config.batches} forward passes first, or give "
                    "calibration='training'."
                )
            self.observe(None if self._observing is not None else self.uncalibrated)
        elif isinstance(self.config.refresh, int) and self.steps and self.steps % self.config.refresh == 0:
            self._look_again()

    def begin_epoch(self) -> None:
        """Say that an epoch begins, for ``refresh="epoch"``."""
        if self.config.refresh == "epoch" and self.steps:
            self._look_again()

    def _look_again(self) -> None:
        if self._observing is None and self.layers and self.calibrated:
            self.observe()

    # Subspaces --------------------------------------------------------------------------------------------------------

    def calibrate(
        self,
        passes: Iterable[Pass],
        only: set[str] | None = None,
    ) -> None:
        """Find the subspaces from forward passes that leave no trace, in place of the first training steps.

        With ``calibration="eval"`` of the options they run in eval mode, otherwise in the mode that the model is in.

        Args:
            passes: forward passes, one for each calibration batch; a generator is read one by one.
            only: names of the layers; all by default, and always where a memory budget is to be shared by all.

        Raises:
            CalibrationError: see :func:`~lightning_lance.calibrate`.
        """
        self._observing = None
        if self.layers:
            only = None if self.config.budget is not None else only
            bits = self.config.kept_bits.weight
            evaluating = self.config.calibration == "eval"
            sparing = not evaluating and any(ranks.sparing for ranks in self.config.rules().all_rules())
            with calibrate(self.model, self.processes, only, self.config.budget, bits, evaluating) as calibration:
                for index, run in enumerate(passes):
                    if index or not (sparing or self.config.budget is not None):
                        run()
                        continue
                    ledger = self._ledger_of_pass(run)
                    calibration.fixed = ledger.fixed
                    self._evidence = sorted(ledger.spared), ledger.inputs, ledger.total
                if sparing:  # in eval mode norms keep less than in training
                    self._spare(calibration)
            self._settle(calibration)
        self.stage = Stage.STEADY

    def _ledger_of_pass(self, run: Pass) -> Ledger:
        """Run a pass with gradients, and look at what it keeps."""
        ledger = Ledger(self)
        self._store.bits, self._store.counting = self.config.kept_bits, False
        self._protect()
        with ledger.open():
            with torch.enable_grad(), self._store:
                kept = run()
            ledger.look()
        del kept
        return ledger

    def observe(self, only: set[str] | None = None) -> None:
        """Let the next ``calibration_batches`` steps define the subspaces.

        Args:
            only: names of the layers; all by default, and always where a memory budget is to be shared by all.
        """
        only = None if self.config.budget is not None else only
        self._observing = Calibration(self.model, only, self.config.budget, self.config.kept_bits.weight)
        self.observed = self._fixed = 0
        self._evidence = [], 0, 0
        self.stage = Stage.OBSERVING

    @property
    def observing(self) -> bool:
        """Whether training steps are being observed."""
        return self._observing is not None

    def refresh(self) -> None:
        """Assign subspaces from what was observed since :meth:`observe`, before as many steps have passed as asked for.

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
        self.stage = Stage.STEADY
        if self._store.unusual:
            calibration.release()
        if self.observed == 0:
            _warn("the subspaces were not refreshed: no step was observed. Run training steps after observe().")
            return
        calibration.fixed = self._fixed
        self._spare(calibration)
        try:
            calibration.finish(self.processes)
        except ConfigError as error:
            notes = [] if self.report is None else self.report.notes
            raise ConfigError("\n".join([str(error), *notes])) from None
        except CalibrationError as error:
            if not self.calibrated:
                raise
            _warn(f"the subspaces were not refreshed: {error}")
            return
        self._settle(calibration)

    def _spare(self, calibration: Calibration) -> None:
        """Leave those layers alone whose projection ``"compact"`` asks for and that would save too little."""
        if self.config.budget is not None or not any(
            layer._lance.ranks.sparing for layer in calibration.layers.values()
        ):
            return
        everywhere = self.processes.gather(self._evidence)
        reasons = dict.fromkeys(set.intersection(*(set(spared) for spared, _, _ in everywhere)), KEPT_ANYWAY)
        inputs, total = (sum(found[index] for found in everywhere) for index in (1, 2))
        if self.config.rank == "compact" and saves_little(inputs, total, self.config):
            part = f"the inputs that it could make smaller are {inputs / total:.0%} of what is kept"
            reasons = {name: reasons.get(name, part) for name in calibration.layers}
        calibration.spare(reasons)
        self._note_left(calibration)

    def _note_left(self, calibration: Calibration) -> None:
        self._dropped |= {item.name: item for item in calibration.left}
        self.left += calibration.left
        calibration.left = []

    def _settle(self, calibration: Calibration) -> None:
        self._note_left(calibration)
        if self.processes.count > 1:
            shared = self.processes.first(self._subspaces())
            self._assign({name: LayerSubspace.from_state_dict(found) for name, found in shared.items()})

    def _subspaces(self) -> dict[str, Any]:
        return {
            name: layer._lance.subspace.state_dict()
            for name, layer in self.layers.items()
            if layer._lance.subspace is not None
        }

    def _assign(self, subspaces: Mapping[str, LayerSubspace]) -> None:
        for name, layer in self.layers.items():
            if name in subspaces:
                module: Any = layer
                found = subspaces[name]
                factor = next(found.factors(), None)
                dtype = module.weight.dtype if factor is None else factor.dtype
                layer._lance.subspace = found.to(module.weight.device, dtype)
        link(self.layers.values())

    # State ------------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {"rank": _plain(self.config.rank), "batch": self.config.batch, "bits": self.config.bits}

    def state_dict(self) -> dict[str, Any]:
        """Subspaces, sample orders and a running observation, in plain containers and CPU tensors."""
        layers = self.layers
        order = next(iter(layers.values()))._lance.order.state.tolist() if layers else []
        observing = self._observing
        return {
            "version": STATE_VERSION,
            "config": self._options(),
            "subspaces": self._subspaces(),
            "order": order,
            "dropped": [[item.name, item.type, item.reason] for item in self._dropped.values()],
            "observed": self.observed,
            "steps": self.steps,
            "looked": self._looked,
            "most": self._most,
            "trained": list(self._trained),
            "fixed": self._fixed,
            "evidence": list(self._evidence),
            "observing": None
            if observing is None
            else {name: statistics.state_dict() for name, statistics in observing.statistics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with stored subspaces after :meth:`start`. The stored ones win over other options asked for.

        Layers that are to be projected but were not part of the stored run are observed in the next steps.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            StateError: the state is of another version, or does not fit the model.
        """
        if self.stage is Stage.IDLE:
            raise StateError("load_state_dict() before start(): call start() first.")
        stored, config = self._checked(state)
        if stored.config != self._options():
            _warn(
                f"the resumed run continues with its stored options ({_text(stored.config)}); "
                f"{_text(self._options())} was asked for and is ignored. Start a new fit to use it."
            )
            self.config = config
            self.start()
        self._looked, self._most, self._trained = stored.looked, stored.most, stored.trained
        self._reported = self._little = False
        self._notice(self._flags())
        self.join()
        found = (stored.subspaces.keys() | (stored.observing or {}).keys()) & self._automatic.keys()
        if found:
            self._install(found)
        layers = self.layers
        self._dropped = {item[0]: LeftAlone(*item) for item in stored.dropped}
        self.left += self._dropped.values()
        for name in self._dropped:
            if name in layers:
                module: Any = layers.pop(name)
                uninstall(module)
        missing = sorted(set(stored.subspaces) - set(layers))
        if missing:
            _warn(f"stored subspaces of {', '.join(missing)} are not used: these layers are not projected in this run.")
        self._observing, self.stage = None, Stage.STEADY
        self._assign(stored.subspaces)
        if layers and stored.order is not None:
            next(iter(layers.values()))._lance.order.state.copy_(torch.tensor(stored.order, dtype=torch.int64))
        observed = stored.observing or {}
        watched = set(observed) & set(layers)
        if watched:
            self.observe(watched)
            observing: Any = self._observing
            for name, statistics in observing.statistics.items():
                if name in observed:
                    statistics.load_state_dict(observed[name], observing.layers[name].weight.device)
        self.observed, self.steps = stored.observed, stored.steps
        self._fixed, self._evidence = stored.fixed, stored.evidence
        self._weigh(0)
        if self._little:
            self.report, self._reported = Report.of_little(SavedBytes(self._most, [])), True

    def _checked(self, state: Any) -> tuple[StoredRun, LanceConfig]:
        """A stored state that is whole and fits the model, and the options that it asks for; nothing is changed."""
        modules = {
            name: (module, variant)
            for name, module in self.model.named_modules()
            if (variant := find(module)) is not None and issubclass(variant, Compressed)
        }
        widths = {name: _width(module) for name, (module, _) in modules.items()}
        stored = check_session_state(state, STATE_VERSION, widths)
        try:
            config = replace(self.config, preset=None, **stored.config)  # whose values the stored ones may contradict
            rules = config.rules()
        except (TypeError, ConfigError) as error:
            one_line = " ".join(str(error).split())  # a tensor in the place of a number has many
            raise StateError(
                f"the stored state has options that this package does not read ({one_line}). "
                "Resume without the callback's state to begin anew."
            ) from error
        statistics = {}
        for name in stored.observing or ():
            if name in modules:
                ranks = rules.for_layer(name)
                ranks = ranks if config.budget is None else gathering_ranks(ranks)
                axis, learned = modules[name][1].channel_axis, config.batch == "learned"
                statistics[name] = LayerStatistics(ranks, axis, name, learned=learned)
        check_session_state(state, STATE_VERSION, widths, statistics)
        return stored, config


def _width(module: Any) -> int:
    """Channels or features of the input of a supported layer."""
    return int(module.in_channels if hasattr(module, "in_channels") else module.in_features)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and factors of a model, some of them twice."""
    found: list[Tensor | None] = []
    for module in walk(model):
        if module._parameters:
            found += module._parameters.values()
        if module._buffers:
            found += module._buffers.values()
        if isinstance(module, Compressed) and module._lance.subspace is not None:
            found += module._lance.subspace.factors()
    return [tensor for tensor in found if tensor is not None]


def _warn(text: str) -> None:
    warnings.warn(text, LanceWarning, stacklevel=3)


def _text(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.items())


def _plain(rank: Any) -> Any:
    return {key: _plain(value) for key, value in rank.items()} if isinstance(rank, Mapping) else rank
