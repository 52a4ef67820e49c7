"""A stream of experiences, without a Trainer: what the Avalanche plugin and the Lightning callback drive."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.compression.calibration import eager
from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.processes import Processes
from lightning_lance.compression.session import LanceSession, Pass
from lightning_lance.compression.steps import Steps
from lightning_lance.continual.account import Account, LayerAccount, account_table, plot_capacity
from lightning_lance.continual.config import ContinualConfig
from lightning_lance.continual.layers import Reserved, install_reservation, reserved_variant
from lightning_lance.continual.memory import Capacity, LayerMemory, Stage
from lightning_lance.continual.moments import SKETCH_ENERGY, FeatureMoments
from lightning_lance.continual.own_values import (
    NORMS,
    OwnValues,
    Values,
    exchange,
    misfit,
    names_of,
    tensor_of,
    weight_of,
)
from lightning_lance.continual.reservation import Reservation, exact, fingerprint
from lightning_lance.continual.rules import RULES, Layer, Now
from lightning_lance.continual.run import Run
from lightning_lance.continual.steps import steps_are_known, steps_are_sums
from lightning_lance.continual.stored import CONTINUAL_STATE_VERSION, read_experience, read_stream
from lightning_lance.errors import LanceWarning, PlanError, StateError
from lightning_lance.layers import registry
from lightning_lance.layers.compressed import Compressed
from lightning_lance.subspaces.ranks import closest, matches
from lightning_lance.tensors.orders import SampleOrder

NARROW = 32
"""Layers of so few inputs are full soon."""


class ContinualSession(Steps):
    """Train a model on one experience after another without forgetting, with any optimiser.

    The first experience trains in all directions. After each one the input directions that its layers need are
    protected; from then on the weight of a layer changes only outside of them, and everything of the shared layers that
    cannot be protected in this way is frozen: biases, affine parameters and running statistics of norms, and layers of
    other types. Heads train freely. A module that was not there before trains as in a first experience.

    An experience that is given a name, ``own``, has a few columns, and biases and norms, of its own in addition, with
    which it is evaluated: :meth:`select` makes the model that of one experience, :meth:`export` copies it.

    Args:
        config: what to compress, and how far.
        options: what to protect.

    Attributes:
        processes: those of a distributed run, over which what layers see is summed.
        experience: number of experiences that have ended.
        memories: layer name -> what it protects.
        history: what each experience that has ended had taken of each layer, see :meth:`table`.

    Example:
        >>> import torch
        >>> from lightning_lance.continual import ContinualConfig, ContinualSession
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> session = ContinualSession(options=ContinualConfig(heads=["2"]))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        >>> for experience in range(2):
        ...     x = torch.randn(64, 2) @ torch.randn(2, 16)
        ...     session.begin_experience(model, [lambda: model(x)])
        ...     for step in range(3):
        ...         optimizer.zero_grad()
        ...         with session.step():
        ...             loss = model(x).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...     capacity = session.end_experience(model, [lambda: model(x)])
        >>> capacity["0"].width, capacity["0"].protected <= 4
        (16, True)
    """

    def __init__(self, config: LanceConfig | None = None, options: ContinualConfig | None = None) -> None:
        self.config = (config or LanceConfig()).in_stream()
        self.options = options or ContinualConfig()
        self.processes = Processes()
        self.experience = 0
        self.memories: dict[str, LayerMemory] = {}
        self.history: list[Account] = []
        self.rule = RULES[self.options.rule](self.options)
        self._known: set[str] = set()
        self._said: set[str] = set()
        self._run: Run | None = None
        self._own = OwnValues()
        # The experience that the model is of, and what all share of the tensors that are its own.
        self._selected: str | None = None
        self._shared: Values = {}
        self._merged: dict[str, float] = {}
        # Of a state that was taken within an experience: what its weights have that is not shared.
        self._pending: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._run is not None:  # the copy of its model is a stock one
            raise StateError(
                "a session cannot be copied while an experience is running. Copy it before or after, or take "
                "state_dict() and running_state(), from which another one resumes."
            )
        return self.__dict__

    @property
    def running(self) -> bool:
        """Whether an experience has begun and not ended."""
        return self._run is not None

    @property
    def compression(self) -> LanceSession | None:
        """The compression of the running experience; ``None`` outside of one, or where nothing could be compressed."""
        return None if self._run is None else self._run.compression

    def begin_step(self) -> None:
        """The first half of :meth:`step`. Nothing is compressed outside of an experience."""
        if self.compression is not None:
            self.compression.begin_step()

    def end_step(self) -> None:
        """The second half of :meth:`step`."""
        if self.compression is not None:
            self.compression.end_step()

    def begin_experience(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        optimizers: Iterable[torch.optim.Optimizer] = (),
        heads: Iterable[str] = (),
        whole: bool = False,
        own: str | None = None,
        flat: bool = False,
    ) -> None:
        """Swap, calibrate, freeze and reserve; then train.

        Args:
            model: the model, adapted to the experience already.
            passes: forward passes on batches of the experience, run without a trace; in training mode, or in eval mode
                where ``calibration`` of the options is that.
            optimizers: hold the model's parameters. Where less than the weight of a layer is to be trained, a smaller
                parameter takes its place in them until the experience ends; needed where ``reserved`` is not
                ``"full"``. What they are decides about ``damping="auto"``.
            heads: names of modules that are not protected, beside those that match ``heads`` of the options.
            whole: train the weights themselves in any case, as DDP needs, which knows no other parameters.
            own: name of what this experience alone is evaluated with, such as the label of its task: it gets columns of
                its own under it. ``None``: it is evaluated as all others are.
            flat: after every step of the optimisers the weights are what the layers work with, as averages of weights
                need; with ``whole``.

        Raises:
            StateError: an experience is running, or an optimiser does not hold a weight that it should train.
            PlanError: nothing can be compressed in the first experience, or a pattern matches nothing.
            CalibrationError: the inputs hold NaN or Inf, or no layer saw any.
        """
        if self._run is not None:
            raise StateError("begin_experience() while one is running: call end_experience() or abandon() first.")
        self._check_heads(model)
        self._check_fits(model)
        self.select(model, None)
        self._drop_pending(model)
        run = self._run = Run(model, self._known, _matching(model, [*self.options.heads, *heads]))
        try:
            optimizers = list(optimizers)
            run.optimizers, run.flat = optimizers, flat
            run.now = Now(self.experience, own, self.options.damping_of(optimizers))
            self._begin(run, passes, [] if whole else optimizers)
        except BaseException:
            self.abandon()
            raise

    def _begin(
        self,
        run: Run,
        passes: Sequence[Pass],
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        layers = self._protectable(run.model, run.heads)
        if not layers and self.experience == 0:
            raise PlanError(
                f"no layer of {type(run.model).__name__} can be protected. Supported, with a weight that requires grad "
                f"and is no other layer's, and outside of heads: {', '.join(registry.supported())}."
            )
        trained = self._freeze(run, layers)
        self._enter(run)
        self._add_memories(trained, run.now)
        moments = {}
        if self.rule.needs_moments(run.now):
            moments = self._moments({name: layer for name, layer in trained.items() if name in self._reservable()})
        compression = self._compression(run)
        try:
            compression.start(observe=False)
        except PlanError:
            if self.experience == 0:
                raise
            self._say("compress", "no layer that still trains can be compressed; the experience trains uncompressed.")
        else:
            run.compression = compression
        handles = _observe(run.model, moments)
        try:
            if run.compression is not None and run.compression.layers:
                run.compression.calibrate(passes)
            elif moments:
                _run_passes(run.model, passes, training=self.config.calibration == "training")
        finally:
            for handle in handles:
                handle.remove()
        self._sum(moments)
        order = _order(run.model, self.config.seed)
        run.views = {
            name: self._view(
                name, layer, moments.get(name), any(self.memories[name].counts) and _holds(optimizers, layer.weight)
            )
            for name, layer in trained.items()
        }
        self.rule.directions(run.views, run.now)
        run.views = {name: view._replace(moments=None) for name, view in run.views.items()}
        for name, layer in trained.items():
            if self.rule.freezes(run.views[name], run.now):
                self._say_full([(name, self.memories[name].capacity())])
                run.freeze(layer.weight)
            made = self._reservation(run, name, layer)
            self._train(run, name, layer, order, optimizers, None if made is None else (made, None))
        run.watch_steps()
        self._check_something_trains(run)

    def _check_something_trains(self, run: Run) -> None:
        reservations = [layer.reservation for layer in run.layers.values() if isinstance(layer, Reserved)]
        if any(p.requires_grad for p in run.model.parameters()) or any(r.update is not None for r in reservations):
            return
        full = ", ".join(f"{name} ({found.protected} of {found.width})" for name, found in self.capacity().items())
        raise StateError(
            f"nothing is left to train in experience {self.experience}: the protected layers are full ({full}), and "
            "everything else is frozen. Protect less from the start (a lower threshold, or freeze_above=1.0), name a "
            "head in heads, or add a module that is new to the stream."
        )

    def _compression(self, run: Run) -> LanceSession:
        first = self.experience == 0 and not self.options.compress_first
        made = LanceSession(run.model, self.config.uncompressed() if first else self.config, run.heads)
        made.may_rest = False  # layers that protect run their own operators in any case
        made.processes = self.processes
        return made

    def _reservation(self, run: Run, name: str, layer: Any) -> Reservation | None:
        """What a layer is to train in; ``None``: it trains in all directions, or in none."""
        memory = self.memories[name]
        if not any(memory.counts) or not layer.weight.requires_grad:
            return None
        if memory.reserved is not None and memory.reserved.shape[2] == 0:
            return None
        side, _ = _side(layer, self.options)
        weight, optimizers = layer.weight, run.optimizers
        sums, known = steps_are_sums(optimizers, weight), steps_are_known(optimizers, weight)
        return Reservation(weight, memory, side, sums, run.flat, known)

    def _train(
        self,
        run: Run,
        name: str,
        layer: Any,
        order: SampleOrder,
        optimizers: list[torch.optim.Optimizer],
        made: tuple[Reservation, dict[str, Any] | None] | None,
    ) -> None:
        """Let a layer train in a reservation, from its start or from a stored moment."""
        memory = self.memories[name]
        memory.start()
        run.layers[name] = layer
        if made is None:
            if memory.reserved is not None and memory.reserved.shape[2] == 0 and layer.weight.requires_grad:
                run.freeze(layer.weight)
            return
        reservation, stored = made
        if stored is not None:
            reservation.load_state_dict(stored, layer.weight)
        install_reservation(layer, name, reservation, order)
        if reservation.update is not None:
            run.replace(layer.weight, reservation.update, optimizers, name, keep_state=stored is not None)

    def running_state(self) -> dict[str, Any] | None:
        """What a running experience has beside :meth:`state_dict`, in plain containers; ``None`` outside of one.

        It belongs to the weights of a ``model.state_dict()`` taken just before. With both, and the state of the
        optimiser, :meth:`resume_experience` goes on from here.
        """
        run = self._run
        if run is None:
            return None
        layers: dict[str, Any] = {}
        for name, layer in run.layers.items():
            memory = self.memories[name]
            steps = memory.steps if memory.has_columns and memory.reserved is None else None
            layers[name] = {
                "opened": memory.opened,
                "reserved": None if memory.reserved is None else memory.reserved.detach().cpu(),
                "steps": None if steps is None else steps.detach().cpu(),
                "reservation": layer.reservation.state_dict(layer.weight) if isinstance(layer, Reserved) else None,
            }
        compression = None if run.compression is None else run.compression.state_dict()
        return {
            "layers": layers,
            "compression": compression,
            "before": dict(run.before),
            "now": list(run.now),
            "rule": self.rule.running_state(),
            "shared": _on_cpu(run.shared),
        }

    def resume_experience(
        self,
        model: nn.Module,
        state: dict[str, Any],
        optimizers: Iterable[torch.optim.Optimizer] = (),
        heads: Iterable[str] = (),
        flat: bool = False,
    ) -> None:
        """Go on in the middle of an experience, as if it had not been interrupted.

        Args:
            model: the model, with the weights that were saved with the state.
            state: what :meth:`running_state` returned, while this session had the state that it has now.
            optimizers: hold the model's parameters and the stored state, see :meth:`begin_experience`.
            heads: see :meth:`begin_experience`.
            flat: likewise, as it began.

        Raises:
            StateError: an experience is running, or the state does not fit the model.
        """
        if self._run is not None:
            raise StateError("resume_experience() while one is running: call end_experience() or abandon() first.")
        self._check_heads(model)
        self._check_fits(model)
        run = self._run = Run(model, self._known, _matching(model, [*self.options.heads, *heads]))
        run.optimizers, run.flat = list(optimizers), flat
        pending, self._pending = self._pending, None
        try:
            self._resume(run, state, list(optimizers))
        except BaseException:
            self.abandon()
            self._pending = pending
            raise

    def _resume(self, run: Run, state: dict[str, Any], optimizers: list[torch.optim.Optimizer]) -> None:
        """Check everything, then give the model anything of it."""
        found = read_experience(state, self.experience, self.memories, self.rule)
        lacking = misfit(run.model, found.shared)
        if lacking is not None:
            raise StateError(f"{lacking}. Resume with the model that the experience began with.")
        run.before, run.now = found.before, found.now
        layers = self._protectable(run.model, run.heads)
        trained = self._freeze(run, layers)
        if set(trained) != set(found.layers):
            differing = sorted(set(trained) ^ set(found.layers))
            raise StateError(
                f"the stored experience trains other layers than the model would: {', '.join(differing)} differ. "
                "Resume with the model, heads and trainable parameters that it began with."
            )
        self._add_memories(trained, run.now)
        if found.compression is not None:
            run.compression = self._compression(run)
            run.compression.start(observe=False)
            run.compression.load_state_dict(found.compression)
        order = _order(run.model, self.config.seed)
        reservations: dict[str, tuple[Reservation, dict[str, Any]] | None] = {}
        for name, layer in trained.items():
            memory, stored = self.memories[name], found.layers[name]
            memory.reserve()
            memory.reserved = None if stored.reserved is None else stored.reserved.to(layer.weight.device)
            memory.opened = stored.opened
            memory.steps = None if stored.steps is None else stored.steps.to(layer.weight.device)
            run.views[name] = self._view(name, layer)
            if self.rule.freezes(run.views[name], run.now):
                run.freeze(layer.weight)
            reservation = self._reservation(run, name, layer)
            if reservation is None:
                if stored.reservation.value is not None:
                    stored.reservation.refuse("None for a layer that trains in all directions or none")
                reservations[name] = None
            else:
                reservations[name] = reservation, reservation.check(stored.reservation, layer.weight)
        for name, layer in trained.items():
            self._train(run, name, layer, order, optimizers, reservations[name])
        self.rule.resume(run.views, found.rule)
        run.shared = found.shared
        run.watch_steps()

    def end_experience(self, model: nn.Module, passes: Sequence[Pass]) -> dict[str, Capacity]:
        """Restore the model, then protect what the experience needs.

        Args:
            model: the model of :meth:`begin_experience`.
            passes: forward passes on batches of the experience, run in evaluation mode and without a trace.

        Returns:
            Layer name -> capacity.

        Raises:
            StateError: no experience is running, or the model is another one.
            CalibrationError: the inputs hold NaN or Inf.

        Whatever fails here, the model is restored and what was protected before stays as it was.
        """
        run = self._run
        if run is None:
            raise StateError("end_experience() without begin_experience().")
        if run.model is not model:
            raise StateError("end_experience() got another model than begin_experience().")
        run.hide()
        frozen = {name for name in self.memories if name not in run.layers or not run.views[name].weight.requires_grad}
        run.restore()
        threshold = self.rule.threshold(run.now)
        # A sketch has to see a little more than what is to be protected.
        moments = self._moments(run.layers, (1.0 + threshold) / 2)
        called: set[str] = set()
        handles = [*_observe(model, moments), *_note_calls(model, called)]
        try:
            _run_passes(model, passes, training=False)
            self._sum(moments)
            for found in moments.values():
                found.check()
        except BaseException:
            self.abandon()
            raise
        finally:
            for handle in handles:
                handle.remove()
        self._consolidate(run, moments)
        self._known |= called | run.changed()
        self.history.append(self._account(frozen, run.now.own))
        self.experience += 1
        self._run = None
        capacity = self.capacity()
        self._warn_of_little(capacity)
        return capacity

    def _consolidate(self, run: Run, moments: dict[str, FeatureMoments]) -> None:
        """All layers, or none."""
        rule = self.rule.state_dict()
        memories = {name: copy.copy(memory) for name, memory in self.memories.items()}
        try:
            self.rule.detach(run.views, run.now)
            for name, found in moments.items():
                memory = self.memories[name]
                if found.count:
                    self.rule.consolidate(name, run.views[name]._replace(moments=found), run.now)
                elif any(memory.counts):
                    memory.abandon()
                else:
                    # Its forward never ran. Where its weight has changed, a function that we do not see uses it.
                    del self.memories[name]
            if run.now.own is not None and run.own:
                self._own.store(run.now.own, run.model, run.shared)
            run.leave()
        except BaseException:
            self.memories = memories
            self.abandon()
            self.rule.load_state_dict(rule)
            raise

    def _account(self, frozen: set[str], own: str | None) -> Account:
        columns = self.rule.own_columns(own)
        account = []
        for name, found in self.capacity().items():
            count, size = columns.get(name, (0, 0))
            account.append(LayerAccount(name, found.width, found.protected, count, found.bytes + size, name in frozen))
        return account

    def table(self) -> str:
        """What the last experience that has ended left: a row for each layer; empty before the first one."""
        if not self.history:
            return ""
        return account_table(self.history[-1], len(self.history) - 1, self._own.last_bytes)

    def plot_capacity(self, ax: Any = None) -> tuple[Any, Any]:
        """Protected share of each layer over the experiences.

        Args:
            ax: a matplotlib axis to draw into; a new figure by default.

        Returns:
            ``(figure, axis)``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return plot_capacity(self.history, ax)

    def abandon(self) -> None:
        """End a failed experience: the model is restored, what it learned stays in it, nothing more is protected."""
        run, self._run = self._run, None
        if run is not None:
            run.hide()
            run.restore()
            run.leave()
            self.rule.abandon(run.views)
        for name, memory in list(self.memories.items()):
            memory.abandon()
            if memory.stage is Stage.EMPTY and name not in self._known:
                del self.memories[name]

    def capacity(self) -> dict[str, Capacity]:
        """Layer name -> directions taken and free."""
        return {name: memory.capacity() for name, memory in self.memories.items()}

    @property
    def bytes(self) -> int:
        """Size of all protected bases, and of what experiences have for themselves."""
        return sum(capacity.bytes for capacity in self.capacity().values()) + self.rule.bytes + self._own.bytes

    @torch.no_grad()
    def select(self, model: nn.Module, own: str | None) -> None:
        """Make a model the one that an experience is evaluated with, until another is selected.

        Between experiences its columns are merged into the weights, whose values without them are kept and come back
        bit for bit. While one is running, the layers work with other weights than those in training.

        Args:
            model: the model.
            own: name of the experience. One that has nothing of its own, and between experiences ``None``, stands for
                what all experiences share; ``None`` while one is running for the running one.

        Raises:
            StateError: the weights have been changed since an experience was selected.
        """
        if self._run is not None:
            self._run.hide()
            if own is not None and own != self._run.now.own:
                self._show(self._run, own)
            return
        if own == self._selected:
            return
        self._check_fits(model)
        self._leave(model)
        if own is None:
            return
        values = dict(self._own.of(own))
        for name, layer in self._views(model).items():
            change = self.rule.own_change(name, layer, own)
            if change is not None:
                weight = layer.weight
                rows = layer.side.weight(change.to(weight.device), weight.shape)
                values[weight_of(name)] = exact(weight) + rows
        self._shared = exchange(model, values)
        self._merged = {name: fingerprint(tensor_of(model, name)) for name in values}
        self._selected = own

    @property
    def selected(self) -> str | None:
        """Name of the experience that the model is of, between experiences."""
        return self._selected

    def _leave(self, model: nn.Module) -> None:
        """Between experiences: back to what all of them share."""
        for name in self._shared:
            if fingerprint(tensor_of(model, name)) != self._merged[name]:
                raise StateError(
                    f"{name} was changed while the model was that of {self._selected!r}. Call "
                    "select(model, None) before loading or changing weights between two experiences."
                )
        exchange(model, self._shared)
        self._selected, self._shared, self._merged = None, {}, {}

    def _enter(self, run: Run) -> None:
        """Give the model the norms and biases that the experience begins with."""
        own = run.now.own
        if own is None:
            return
        values = self._own.first() if run.own else self._own.of(own)
        shared = {name: tensor_of(run.model, name).detach().clone() for name in run.own or values}
        exchange(run.model, {name: value for name, value in values.items() if name in shared})
        run.shared = shared

    def _show(self, run: Run, own: str) -> None:
        """While one is running: let the layers work with the weights of another experience."""
        for name, layer in self._views(run.model).items():
            module, weight = layer.module, layer.weight
            reservation = module.reservation if isinstance(module, Reserved) else None
            held = weight if reservation is None else reservation.effective(weight)
            rows = layer.side.rows(exact(held)).cpu()
            other, change = self.rule.not_shared(name, layer, rows), self.rule.own_change(name, layer, own)
            if other is None and change is None:
                continue
            rows = rows - (0.0 if other is None else other) + (0.0 if change is None else change)
            run.show(module, layer.side.weight(rows, weight.shape).to(weight))
        run.hidden = exchange(run.model, {**run.shared, **self._own.of(own)})

    def export(self, model: nn.Module, own: str | None = None) -> nn.Module:
        """A copy of the model as an experience is evaluated with, without anything of this package in it.

        Args:
            model: the model, between two experiences.
            own: name of the experience; ``None``: what all share.

        Raises:
            StateError: an experience is running, or none of that name has ended.
        """
        if self._run is not None:
            raise StateError("export() while an experience is running: call end_experience() or abandon() first.")
        if own is not None and own not in self.rule.names:
            known = ", ".join(map(repr, self.rule.names)) or "none"
            raise StateError(f"export(own={own!r}): no experience of that name has ended. Those that have: {known}.")
        before = self._selected
        self.select(model, own)
        try:
            return copy.deepcopy(model)
        finally:
            self.select(model, before)

    def adopt(self, model: nn.Module) -> None:
        """Go on from weights that were put in the place of those in training, such as an average of them.

        For layers that train their weights themselves (``whole``); the others have theirs from ``load_state_dict``.
        """
        for module in model.modules():
            if isinstance(module, Reserved) and module.reservation.update is None:
                module.reservation.adopt(module.weight, module.weight)

    def _view(
        self, name: str, module: nn.Module, moments: FeatureMoments | None = None, smaller: bool = False
    ) -> Layer:
        return Layer(module, _side(module, self.options)[0], self.memories[name], moments, smaller)

    def _views(self, model: nn.Module) -> dict[str, Layer]:
        modules = dict(model.named_modules())
        return {name: self._view(name, modules[name]) for name in self.memories if name in modules}

    def _drop_pending(self, model: nn.Module) -> None:
        """Take out of the weights what an experience had for itself when the state was stored."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        views = self._views(model)
        for name, opened in pending["opened"].items():
            self.memories[name].opened = opened
        self.rule.resume(views, pending["rule"])
        self.rule.abandon(views)
        exchange(model, pending["shared"])
        for name in pending["opened"]:
            self.memories[name].opened = None

    def _reservable(self) -> set[str]:
        return {name for name, memory in self.memories.items() if any(memory.counts)}

    def _check_heads(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules() if name]
        for pattern in self.options.heads:
            if not _matching(model, [pattern]):
                raise PlanError(
                    f"heads={pattern!r} matches no module or parameter. There are {len(names)} modules, such as "
                    f"{closest(pattern, names)}. Patterns are shell-style ('heads.*') or the name of a container."
                )

    def _check_fits(self, model: nn.Module) -> None:
        """Refuse a model of other widths than those of what is stored for its weights."""
        modules = dict(model.named_modules())
        opened = {} if self._pending is None else self._pending["opened"]
        for name, memory in self.memories.items():
            rows, needed = self.rule.rows(name), weight_of(name) in self._shared or name in opened
            module: Any = modules.get(name)
            if module is None or reserved_variant(module) is None:
                if needed:
                    raise StateError(
                        f"{name}: the stored stream has something for its weight, and the model has no such layer. "
                        "Give the model that the stream was stored with."
                    )
                continue
            if rows is None and not needed:
                continue
            side, _ = _side(module, self.options)
            shape = (side.groups, module.weight.numel() // (side.groups * side.width), side.width)
            wanted = (memory.groups, shape[1] if rows is None else rows, memory.width)
            held = self._shared.get(weight_of(name), module.weight)
            if shape != wanted or held.shape != module.weight.shape:
                raise StateError(
                    f"{name}: what is stored for its weight is of {wanted} groups, rows and width, the layer "
                    f"has {shape}. Give the model that the stream was stored with."
                )
        before = {} if self._pending is None else self._pending["shared"]
        found = self._own.misfit(model) or misfit(model, before) or misfit(model, self._shared)
        if found is not None:
            raise StateError(f"{found}. Give the model that the stream was stored with.")

    def _protectable(self, model: nn.Module, heads: set[str]) -> dict[str, nn.Module]:
        """Layers that have, or may get, a memory."""
        uses: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        found = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if (
                name in heads
                or weight_of(name) in heads
                or weight is None
                or reserved_variant(module) is None
                or registry.refusal(module)
            ):
                continue
            if not weight.requires_grad or uses.get(id(weight), 0) > 1:
                continue
            if name in self._known and name not in self.memories:
                continue
            found[name] = module
        return found

    def _freeze(self, run: Run, layers: dict[str, nn.Module]) -> dict[str, Any]:
        """Freeze what earlier experiences share and no basis protects; returns the layers that train."""
        unprotected, full = [], []
        known = [(n, m) for n, m in run.model.named_modules() if n not in run.heads and n in self._known]
        if self.rule.owns(run.now):
            weights = [tensor_of(run.model, weight_of(name)) for name, _ in known if name in self.memories]
            budget = self.options.columns * sum(weight.numel() for weight in weights)
            run.own = [name for name in names_of(known, self.memories, budget) if name not in run.heads]
        own = set(run.own)
        for name, module in known:
            if not own and isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                run.keep_statistics(module)
            for key, parameter in module.named_parameters(recurse=False):
                full_name = f"{name}.{key}" if name else key
                if not parameter.requires_grad or full_name in own or full_name in run.heads:
                    continue
                if name in layers and key == "weight":
                    if not self.rule.freezes(self._view(name, module), run.now):
                        continue
                    full.append((name, self.memories[name].capacity()))
                elif name not in layers and not isinstance(module, NORMS):
                    unprotected.append(full_name)
                run.freeze(parameter)
        self._say_full(full)
        named = [
            name for name in unprotected if not name.endswith("bias") or name.rpartition(".")[0] not in self.memories
        ]
        if named:
            self._say(
                "unprotected",
                f"frozen from the second experience on, since no basis can protect them: {', '.join(unprotected)}. "
                "Name them in heads to train them unprotected.",
            )
        return {name: layer for name, layer in layers.items() if layer.weight.requires_grad}

    def _say_full(self, full: list[tuple[str, Capacity]]) -> None:
        for name, found in full:
            self._say(
                f"full {name}",
                f"{name}: {found.protected} of {found.width} directions are protected; its weight is frozen.",
            )

    def _add_memories(self, layers: dict[str, nn.Module], now: Now) -> None:
        for name, layer in layers.items():
            weight: Any = layer.weight
            side, _ = _side(layer, self.options)
            memory = self.memories.get(name)
            if memory is None:
                dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
                memory = self.memories[name] = self.rule.memory(side, name, dtype, weight.device, now.own is not None)
            if (memory.groups, memory.width) != (side.groups, side.width):
                raise StateError(
                    f"{name}: its memory is for {memory.groups} groups of width {memory.width}, the layer has "
                    f"{side.groups} of width {side.width}. A layer that grows between experiences cannot be protected: "
                    "name it in heads."
                )
            memory.to(weight.device)

    def _sum(self, moments: dict[str, FeatureMoments]) -> None:
        if self.processes.count == 1:
            return  # vectors that are kept as they are stay so: fewer than they are long, they are quickly decomposed
        for name in sorted(moments):
            self.processes.sum(moments[name].tensors())

    def _moments(self, layers: dict[str, nn.Module], energy: float = SKETCH_ENERGY) -> dict[str, FeatureMoments]:
        found = {}
        for name, layer in layers.items():
            side, shape = _side(layer, self.options)
            found[name] = FeatureMoments(side, shape, name, self.options.max_rows, energy)
        return found

    def _warn_of_little(self, capacity: dict[str, Capacity]) -> None:
        little = {name: found for name, found in capacity.items() if found.fraction > self.options.warn_above}
        # The first layers of a network, of few inputs, fill up early and lose nothing.
        if len(little) < len(capacity) and self.options.feature_side == "patch":
            little = {name: found for name, found in little.items() if found.width > NARROW}
        fresh = [name for name in little if f"little {name}" not in self._said]
        self._said |= {f"little {name}" for name in fresh}
        if fresh:
            told = ", ".join(f"{name} ({little[name].free} of {little[name].width} directions free)" for name in fresh)
            warnings.warn(
                f"nearly full after {self.experience} experiences: {told}. A lower threshold leaves more to learn in, "
                "and keeps less of what was learned.",
                LanceWarning,
                stacklevel=3,
            )

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warnings.warn(text, LanceWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors, safe for ``torch.load(weights_only=True)``.

        In the middle of an experience it holds the state at its beginning: load it together with the model's weights
        of the same moment and begin the experience again.
        """
        memories = {}
        for name, memory in self.memories.items():
            state = memory.state_dict()
            if memory.stage in (Stage.CALIBRATED, Stage.TRAINING):
                state["stage"] = (Stage.CONSOLIDATED if any(memory.counts) else Stage.EMPTY).value
                state["reserved"] = None
            memories[name] = [memory.width, memory.groups, str(memory.dtype).removeprefix("torch."), state]
        return {
            "version": CONTINUAL_STATE_VERSION,
            "feature_side": self.options.feature_side,
            "experience": self.experience,
            "history": [[list(row) for row in account] for account in self.history],
            "memories": memories,
            "known": sorted(self._known),
            "said": sorted(self._said),
            "rule": [self.options.rule, self.rule.state_dict()],
            "own": self._own.state_dict(),
            "selected": None if self._selected is None else [self._selected, _on_cpu(self._shared), self._merged],
            "pending": self._pending if self._run is None else self._not_shared(self._run),
        }

    def _not_shared(self, run: Run) -> dict[str, Any]:
        opened = {name: self.memories[name].opened for name in run.views}
        opened = {name: found for name, found in opened.items() if found is not None}
        return {"opened": opened, "rule": self.rule.running_state(), "shared": _on_cpu(run.shared)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stored stream between two experiences.

        Raises:
            StateError: an experience is running, or the state is damaged, of another version, feature side or rule:
                what differs is named, and nothing is changed.
        """
        if self._run is not None:
            raise StateError(
                "load_state_dict() while an experience is running: call end_experience() or abandon() first."
            )
        found = read_stream(state, self.options, self.rule)
        self.memories, self.experience, self.rule = found.memories, found.experience, found.rule
        self.history, self._own = found.history, found.own
        self._known, self._said, self._pending = found.known, found.said, found.pending
        self._selected, self._shared, self._merged = found.selected, found.shared, found.merged


def _holds(optimizers: list[torch.optim.Optimizer], weight: Any) -> bool:
    return any(weight is held for found in optimizers for group in found.param_groups for held in group["params"])


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the modules and parameters that match a pattern, or are in a module that does."""
    named = [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]
    return {name for name, _ in named if any(matches(name, pattern) for pattern in patterns)}


def _side(layer: nn.Module, options: ContinualConfig) -> Any:
    variant = reserved_variant(layer)
    assert variant is not None
    return variant.side(layer, options.feature_side == "patch")


def _order(model: nn.Module, seed: int) -> SampleOrder:
    for module in model.modules():
        if isinstance(module, Compressed):
            return module._lance.order
    return SampleOrder(seed)


def _observe(model: nn.Module, moments: dict[str, FeatureMoments]) -> list[Any]:
    modules = dict(model.named_modules())

    def see(found: FeatureMoments) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.update(args[0])

        return hook

    return [modules[name].register_forward_pre_hook(see(found)) for name, found in moments.items()]


def _note_calls(model: nn.Module, called: set[str]) -> list[Any]:
    def note(name: str) -> Any:
        return lambda _, __: called.add(name)

    return [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]


def _run_passes(model: nn.Module, passes: Sequence[Pass], training: bool) -> None:
    with isolated(model), torch.no_grad(), eager():
        model.train(training)
        for run in passes:
            run()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
