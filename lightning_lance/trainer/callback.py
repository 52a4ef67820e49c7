"""The Lightning callback: hooks and checkpoint keys; the work is done by a
:class:`~lightning_lance.compression.session.LanceSession`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.frozen_norms import FrozenNorms
from lightning_lance.compression.report import Report
from lightning_lance.compression.session import LanceSession
from lightning_lance.errors import LanceError, LanceWarning
from lightning_lance.subspaces.subspace import LayerStatistics
from lightning_lance.trainer.peeking import copied, peek, prepare, rewind_loaders, uses_dataloader_iter
from lightning_lance.trainer.rehearsal import rehearsal


class LanceCallback(Callback):
    """Train with compressed activations: ``Trainer(callbacks=[LanceCallback()])``.

    At fit start, layers are swapped in place for variants that keep a low-rank core of their input; on the first
    batch the subspaces are computed from the next ``calibration_batches`` batches, which are trained on as usual; at
    the end, on an exception and on Ctrl-C the model gets its own layers back. Layers that a fine-tuning schedule
    unfreezes join at the start of an epoch. Method: LANCE (Apolinario & Roy, arXiv 2509.21617), with a batch mode that
    is unbiased.

    The subspaces are part of the checkpoint: a resumed run continues with them.

    Args:
        rank: ``"auto"``; an int, that rank in every mode, clipped to its size; a float in (0, 1], that energy in
            every mode (the published rule); a mapping of the modes ``batch``, ``channel`` (or ``feature``) and
            ``spatial`` (or ``token``) to an int, an energy or ``"full"``; or a mapping of layer patterns to any of
            these. ``"auto"`` is batch rank ``max(4, B / 6)``, the whole batch where a sample is one row; channels
            whole; spatial and token energy 0.9, where that halves the mode or costs little next to the layer.
        batch: ``"unbiased"``: the weight gradient has no bias from the batch mode; ``"projected"``: as published.
        core_bits: bits in which each element of a core is kept: 4, 8, or ``None`` for its own dtype. ``"auto"`` is 4,
            and ``None`` with ``batch="projected"``, as published, and in layers with full ranks.
        layers: ``"trainable"`` (every supported layer whose weight requires grad), an int (the last n of them), or
            shell-style name patterns; the name of a container means all layers in it.
        companions: also swap the layers beside them for exact variants that keep less for backward;
            ``"approximate"`` adds inexact ones; ``False`` compresses inputs only, as published.
        freeze_norms: run batch-norm layers whose affine parameters are frozen in eval mode while training.
        memory_budget: bytes, or a string such as ``"4MiB"``, for the cores and factors of all compressed layers.
        refresh: ``"epoch"`` or a number of training batches between two updates of the subspaces; ``None``: once.
        calibration_batches: number of batches that define the subspaces.
        measure: measure what autograd keeps for one batch, with and without compression (three forward passes).
        verbose: print the table of layers once per fit, and again when layers join.
        forward_fn: ``forward_fn(module, batch)``, the forward pass to calibrate and measure on. By default
            ``training_step``, with optimisers that take no step under manual optimisation. Where that cannot run
            without gradients, the first ordinary training steps run uncompressed and define the subspaces.
        seed: seed of the random sample orders.
        continual: each fit is an experience that is not forgotten: the callback becomes a
            :class:`~lightning_lance.ContinualCallback`, which has further options of its own.

    Raises:
        ConfigError: an option has a value that is not allowed.
        PlanError: at fit start, nothing can be compressed or a pattern matches nothing.
        CalibrationError: at the first batch, inputs hold NaN or Inf. The model is restored.
    """

    def __init__(
        self,
        rank: int | float | str | dict[str, int | float | str | dict[str, int | float | str]] = "auto",
        batch: Literal["unbiased", "projected"] = "unbiased",
        core_bits: int | Literal["auto"] | None = "auto",
        layers: int | str | list[str] = "trainable",
        companions: bool | Literal["approximate"] = True,
        freeze_norms: bool = False,
        memory_budget: int | str | None = None,
        refresh: int | Literal["epoch"] | None = None,
        calibration_batches: int = 8,
        measure: bool = True,
        verbose: bool = True,
        forward_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        seed: int = 0,
        continual: bool = False,
    ) -> None:
        if continual and type(self) is LanceCallback:
            self._become_continual(locals())
            return
        self.config = LanceConfig(
            rank=rank,
            batch=batch,
            core_bits=core_bits,
            layers=layers,
            companions=companions,
            freeze_norms=freeze_norms,
            memory_budget=memory_budget,
            refresh=refresh,
            calibration_batches=calibration_batches,
            seed=seed,
        )
        self.measure = measure
        self.verbose = verbose
        self.forward_fn = forward_fn
        self.session: LanceSession | None = None
        self._loaded: dict[str, Any] | None = None
        self._saved: dict[str, Any] = {}
        self._norms: FrozenNorms | None = None
        self._ready = False
        self._measured = False
        self._own_step: Any = None
        self._wrapped_step: Any = None

    def _become_continual(self, given: dict[str, Any]) -> None:
        from lightning_lance.trainer.continual import ContinualCallback

        names = inspect.signature(LanceCallback).parameters
        # What is "auto" is left to the defaults of continual learning.
        options = {name: given[name] for name in names if name != "continual" and given[name] != "auto"}
        self.__class__ = ContinualCallback
        ContinualCallback.__init__(self, **options)  # type: ignore[arg-type]

    @property
    def report(self) -> Report | None:
        """Ranks, energies and measured bytes of the last fit; ``None`` before its first batch."""
        return None if self.session is None else self.session.report

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A state that an earlier test or validation run has loaded must not leak into this fit.
        self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = False
        self._measured = not self.measure
        self._saved = {}
        self.session = LanceSession(pl_module, self.config)
        self.session.start()
        self._wrap_training_step(pl_module, self.session)
        self._norms = FrozenNorms(pl_module) if self.config.freeze_norms else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        session = self.session
        assert session is not None
        first, self._ready = not self._ready, True
        if (first or batch_idx == 0) and session.join():
            self._measured = not self.measure
        if self._norms is not None:
            if first or batch_idx == 0:
                self._norms.find()
            self._norms.apply()
        if first and self._loaded is not None:
            session.load_state_dict(self._loaded)
            fresh, self._loaded = False, None
        else:
            fresh = first
        if session.observing and session.observed >= self.config.calibration_batches:
            session.refresh(_reduce(trainer), _share(trainer))
        missing = session.uncalibrated
        if missing:
            self._calibrate(trainer, pl_module, session, missing, batch, batch_idx)
        if not fresh and session.calibrated and not session.observing and self._refresh_due(trainer, batch_idx):
            session.observe()
        if session.calibrated and not (session.checked and self._measured):
            self._look(trainer, pl_module, session, batch)
        session.begin_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.session is not None
        self.session.end_step()

    def _refresh_due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        refresh = self.config.refresh
        if refresh == "epoch":
            return batch_idx == 0
        return isinstance(refresh, int) and trainer.fit_loop.total_batch_idx % refresh == 0

    def _calibrate(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        session: LanceSession,
        missing: set[str],
        batch: Any,
        batch_idx: int,
    ) -> None:
        following = peek(trainer, self.config.calibration_batches - 1, batch_idx)
        if following is None:
            session.observe(None if session.observing else missing)
            return
        batches = [copied(batch), *following]
        if len(batches) < self.config.calibration_batches:
            warnings.warn(
                f"calibration_batches={self.config.calibration_batches}, but the epoch has only {len(batches)} more "
                "batches; the subspaces are computed from those.",
                LanceWarning,
                stacklevel=2,
            )

        def forward(run: Callable[[Any], Any], index: int) -> None:
            ready = batches[0] if index == 0 else prepare(trainer, module, batches[index])
            try:
                run(ready)
            except LanceError:
                raise
            except Exception as error:
                raise _NotRehearsed(f"{type(error).__name__}: {error}") from error

        try:
            with rehearsal(trainer, module, self.forward_fn) as run:
                passes = [functools.partial(forward, run, index) for index in range(len(batches))]
                session.calibrate(passes, _reduce(trainer), _share(trainer), missing)
        except _NotRehearsed as error:
            warnings.warn(
                f"{_called(self.forward_fn, module)} failed without gradients ({error}). The next "
                f"{self.config.calibration_batches} training steps keep whole activations and define the subspaces. "
                "Give LanceCallback(forward_fn=lambda module, batch: ...) the forward pass to calibrate on.",
                LanceWarning,
                stacklevel=2,
            )
            session.observe(None if session.observing else missing)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule, session: LanceSession, batch: Any) -> None:
        """Look at what autograd keeps for one batch: leave alone what cannot gain, and report the rest."""
        if uses_dataloader_iter(trainer) and self.forward_fn is None:
            self._measured = True
            return  # the batch is the module's to fetch
        try:
            with rehearsal(trainer, module, self.forward_fn) as run:
                if not session.checked:
                    session.drop_redundant(lambda: run(copied(batch)), _share(trainer))
                if not self._measured:
                    self._measured = True
                    session.measure(lambda: run(copied(batch)))
        except Exception as error:
            self._measured = True
            warnings.warn(
                f"what autograd keeps could not be measured ({type(error).__name__}: {error}); training goes on. "
                "Give LanceCallback(forward_fn=lambda module, batch: ...) a forward pass to measure, or measure=False.",
                LanceWarning,
                stacklevel=2,
            )
            return
        if self.measure:
            self._publish(trainer, session)

    def _publish(self, trainer: pl.Trainer, session: LanceSession) -> None:
        report = session.report
        assert report is not None
        metrics = report.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.verbose:
            _show(report)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._finish(pl_module)

    def _wrap_training_step(self, module: pl.LightningModule, session: LanceSession) -> None:
        """Run ``training_step`` so that functional calls in it keep less too."""
        self._unwrap_training_step(module)
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with session.functional():
                return step(*args, **kwargs)

        self._own_step = module.__dict__.get("training_step")
        self._wrapped_step = module.__dict__["training_step"] = training_step

    def _unwrap_training_step(self, module: pl.LightningModule) -> None:
        wrapped, self._wrapped_step = self._wrapped_step, None
        if wrapped is None or module.__dict__.get("training_step") is not wrapped:
            return
        del module.__dict__["training_step"]
        if self._own_step is not None:
            module.__dict__["training_step"] = self._own_step

    def _finish(self, module: pl.LightningModule) -> None:
        self._unwrap_training_step(module)
        try:
            self._saved = self.state_dict()
        finally:
            self._ready = False
            if self._norms is not None:
                self._norms.release()
            if self.session is not None:
                self.session.stop()

    def state_dict(self) -> dict[str, Any]:
        """Subspaces, sample orders and a running observation; empty before calibration, the last fit's after it."""
        if self.session is None or not self._ready:
            return self._loaded or self._saved
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a stored state for the first batch of the fit that follows."""
        self._loaded = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rewind_loaders(trainer, checkpoint)


class _NotRehearsed(Exception):
    """A training step failed outside of training, where it runs without gradients."""


def _called(forward_fn: Any, module: pl.LightningModule) -> str:
    return f"{type(module).__name__}.training_step" if forward_fn is None else "forward_fn"


def _reduce(trainer: pl.Trainer) -> Callable[[Mapping[str, LayerStatistics]], None] | None:
    if trainer.world_size == 1:
        return None

    def reduce(statistics: Mapping[str, LayerStatistics]) -> None:
        local = {name: found.signature() for name, found in statistics.items() if found.tensors()}
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, local)
        for name in sorted(statistics):
            for signatures in gathered:
                if name in signatures:
                    statistics[name].extend(signatures[name], trainer.strategy.root_device)
            for tensor in statistics[name].tensors():
                trainer.strategy.reduce(tensor, reduce_op="sum")

    return reduce


def _share(trainer: pl.Trainer) -> Callable[[Any], Any] | None:
    return None if trainer.world_size == 1 else trainer.strategy.broadcast


@rank_zero_only
def _show(report: Report) -> None:
    sys.stdout.write(f"\n{report.render()}\n")
    sys.stdout.flush()


__all__: Sequence[str] = ["LanceCallback"]
