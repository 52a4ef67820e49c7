"""The Lightning callback for streams of experiences, around :class:`~lightning_lance.continual.ContinualSession`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as stock
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from lightning_lance.compression.frozen_norms import FrozenNorms
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.options import takes
from lightning_lance.compression.processes import Processes
from lightning_lance.continual import Capacity, ContinualOptions, ContinualSession
from lightning_lance.continual.stored_memory import ADVICE
from lightning_lance.errors import CalibrationError, ConfigError, StateError
from lightning_lance.tensors.checked import Stored
from lightning_lance.trainer.callback import CallbackOptions, LanceCallback
from lightning_lance.trainer.passes import bare, one_pass
from lightning_lance.trainer.peeking import copied, peek, prepare, rewind_loaders

_AVERAGING: tuple[type, ...] = tuple(
    getattr(stock, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(stock, name)
)
"""Callbacks that put averages of the weights into the model; the first one is there from Lightning 2.6 on."""


@dataclass(frozen=True)
class StreamOptions(ContinualOptions, CallbackOptions):
    """The options of :class:`ContinualCallback`."""


class ContinualCallback(LanceCallback):
    """Learn one experience after another without forgetting, with compressed activations; each fit is an experience.

    On the first batch the layers are calibrated on the next ``calibration_batches`` batches and swapped in place; at
    the end of the fit the model gets its own layers back, and the input directions that they need are protected. From
    the second fit on, the weights of shared layers change only outside of them, whatever the optimiser, and what cannot
    be protected in this way is frozen, such as layers of other types; biases and norms are too, or with ``own`` each
    experience has its own. Give the same callback to the Trainer of each experience.

    Method: LANCE (Apolinario & Roy, arXiv 2509.21617).

    The state is part of the checkpoints: a run that was interrupted within an experience goes on bit for bit.

    Takes the options of :class:`~lightning_lance.continual.ContinualOptions`, ``verbose`` (see
    :class:`~lightning_lance.LanceCallback`), and ``forward_fn``: ``forward_fn(module, batch)``, the forward pass on
    which the inputs of layers are looked at before and after an experience, without gradients. By default
    ``module(inputs)``, or ``module(inputs, task labels)`` where its ``forward`` takes two arguments, for batches
    ``[inputs, classes, task labels ...]``.

    Attributes:
        stream: what is protected.
        own_heads: names of further modules that are not protected.
        own: name of the experience of the next fit, such as the label of its task, where it is known when the model is
            evaluated and has a head of its own: it gets columns, biases and norms of its own.
            ``None``: it shares everything.
            After the fit the model is that of this experience; ``stream.select(model, name)`` makes it another's.

    Raises:
        ConfigError: an option has a value that is not allowed; at fit start, the module has no ``forward`` to look at.
        StateError: at fit start, the strategy cannot train a model of which parts are frozen.
    """

    _options = StreamOptions

    @takes(StreamOptions)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        given = self.config
        assert isinstance(given, StreamOptions)
        self._norms: FrozenNorms | None = None
        self.stream = ContinualSession(given, given)
        self.config = self.stream.config
        self.own_heads: Sequence[str] = ()
        self.own: str | None = None
        self._averaged = False

    @property
    def capacity(self) -> dict[str, Capacity]:
        """Layer name -> directions taken and free."""
        return self.stream.capacity()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_strategy(trainer)
        forward = getattr(pl_module.forward, "__func__", None)
        if self.forward_fn is bare and forward in (pl.LightningModule.forward, nn.Module.forward):
            raise ConfigError(
                f"{type(pl_module).__name__} has no forward(), and {type(self).__name__} looks at the inputs of its "
                "layers in forward passes before and after an experience. Give it one, or forward_fn=..., a function "
                "of the module and a batch."
            )
        self._averaged = self._go_after_averaging(trainer)
        if self.stream.running:  # an interrupted fit has left it
            self.stream.abandon()
        self.stream.processes = Processes(trainer.world_size, trainer.global_rank)
        self.session = None
        self._ready = False
        self._norms = FrozenNorms(pl_module) if self.config.freeze_norms else None

    def _go_after_averaging(self, trainer: pl.Trainer) -> bool:
        """End after callbacks that put averages of the weights into the model; returns whether there are any."""
        given: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        last = max((i for i, found in enumerate(given) if isinstance(found, _AVERAGING)), default=-1)
        averaging, own = given[last], given.index(self)
        if own < last:
            given.insert(last, given.pop(own))
            trainer.callbacks = given  # type: ignore[attr-defined]
        if last >= 0 and self.stream.options.reserved != "full":
            raise StateError(
                f"{type(averaging).__name__} averages the weights of the model, and reserved="
                f"{self.stream.options.reserved!r} trains other parameters. Allowed with averages: 'full'."
            )
        return last >= 0

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        if trainer.world_size == 1:
            return
        if not isinstance(trainer.strategy, DDPStrategy):
            raise StateError(
                f"{type(trainer.strategy).__name__} is not supported in continual learning. Allowed: a single device, "
                "or strategy='ddp_find_unused_parameters_true'."
            )
        if not trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
            raise StateError(
                "from the second experience on parts of the model are frozen, which plain DDP waits for. Give "
                "strategy='ddp_find_unused_parameters_true'."
            )
        if self.stream.options.reserved != "full":
            raise StateError(
                f"reserved={self.stream.options.reserved!r} trains parameters that DDP does not know. Allowed with "
                "several processes: 'full'."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first, self._ready = not self._ready, True
        if self._norms is not None:
            if first or batch_idx == 0:
                self._norms.find()
            self._norms.apply()
        if first:
            self._begin(trainer, pl_module, batch, batch_idx)

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        running = self._load()
        if running is not None:
            before, stored = running
            try:
                self.stream.resume_experience(module, stored, trainer.optimizers, self.own_heads, self._averaged)
            except BaseException:
                self.stream.load_state_dict(before)
                raise
        else:
            following = peek(trainer, self.config.batches - 1, batch_idx)
            if following is None:
                raise CalibrationError(
                    "continual learning reads batches before the first step, and this model takes them from the loader "
                    "itself (dataloader_iter). Give it a training_step(self, batch, batch_idx)."
                )
            ready = [copied(batch), *(prepare(trainer, module, raw) for raw in following)]
            passes = [functools.partial(one_pass, trainer, module, self.forward_fn, found) for found in ready]
            # DDP reduces the gradients of parameters that it knows: then the weights themselves are trained.
            self.stream.begin_experience(
                module,
                passes,
                trainer.optimizers,
                self.own_heads,
                whole=trainer.world_size > 1 or self._averaged,
                own=self.own,
                flat=self._averaged,
            )
        self.session = self.stream.compression
        if self.session is None:
            return
        self._published = None
        self._wrap_training_step(module, self.session)

    def _load(self) -> tuple[dict[str, Any], Any] | None:
        """Load the stored state there is; where it is of a running experience, the state before and that one's."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return None
        stream, running = Stored(loaded, "the callback's stored state", ADVICE).fields("stream", "running")
        before = self.stream.state_dict()
        self.stream.load_state_dict(stream.value)
        return None if running.value is None else (before, running.value)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.session is not None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rewind_loaders(trainer, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.stream.running:
            return
        super().on_train_end(trainer, pl_module)
        self._unwrap_training_step(pl_module)
        loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
        with isolated(pl_module):
            batches = [batch for batch, _, _ in islice(loader, self.config.batches)]
        ready = [prepare(trainer, pl_module, raw) for raw in batches]
        passes = [functools.partial(one_pass, trainer, pl_module, self.forward_fn, found) for found in ready]
        if self._averaged:
            self.stream.adopt(pl_module)
        self.stream.end_experience(pl_module, passes)
        if trainer.world_size > 1:  # other processors may round an eigenvector in another way
            self.stream.load_state_dict(self.stream.processes.first(self.stream.state_dict()))
        taken = {f"lance/protected/{name}": found.fraction for name, found in self.capacity.items()}
        if self.verbose and trainer.is_global_zero:
            print(f"\n{self.stream.table()}")  # noqa: T201 - what verbose is for
        for logger in trainer.loggers:
            logger.log_metrics({**taken, "lance/protected_bytes": self.stream.bytes}, step=trainer.global_step)
        self.stream.select(pl_module, self.own)

    def _finish(self, module: pl.LightningModule) -> None:
        self._unwrap_training_step(module)
        self._ready = False
        self._loaded = None
        if self._norms is not None:
            self._norms.release()
        if self.stream.running:
            self.stream.abandon()

    def state_dict(self) -> dict[str, Any]:
        """What is protected and, within an experience, what it needs to go on."""
        if self._loaded is not None:
            return self._loaded
        return {"stream": self.stream.state_dict(), "running": self.stream.running_state()}
