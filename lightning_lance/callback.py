"""The Lightning callback: hooks and checkpoint keys; the work is :class:`~lightning_lance.session.LanceSession`."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_lance.config import LanceConfig
from lightning_lance.errors import CalibrationError, LanceWarning
from lightning_lance.peeking import copied, peek, prepare, quiet, run_step
from lightning_lance.report import Report
from lightning_lance.session import LanceSession
from lightning_lance.subspace import LayerStatistics


class LanceCallback(Callback):
    """Train with compressed activations: ``Trainer(callbacks=[LanceCallback()])``.

    At fit start, layers are swapped in place for variants that keep a low-rank core of their input; on the first
    batch the subspaces are computed from the next ``calibration_batches`` batches, which are trained on as usual; at
    the end, on an exception and on Ctrl-C the model gets its own layers back. Method: LANCE (Apolinario & Roy, arXiv
    2509.21617), with a batch mode that is unbiased.

    The subspaces are part of the checkpoint: a resumed run continues with them.

    Args:
        rank: ``"auto"``; an int, that rank in every mode, clipped to its size; a float in (0, 1], that energy in
            every mode (the published rule); a mapping of the modes ``batch``, ``channel`` (or ``feature``) and
            ``spatial`` (or ``token``) to an int, an energy or ``"full"``; or a mapping of layer patterns to any of
            these. ``"auto"`` is batch rank ``max(4, B / 8)``, channels whole, spatial and token energy 0.9.
        batch: ``"unbiased"``: the weight gradient has no bias from the batch mode; ``"projected"``: as published.
        layers: ``"trainable"`` (every supported layer whose weight requires grad), an int (the last n of them), or
            shell-style name patterns; the name of a container means all layers in it.
        companions: also swap the layers beside them for exact variants that keep less for backward;
            ``"approximate"`` adds inexact ones; ``False`` compresses inputs only, as published.
        freeze_norms: run batch-norm layers whose affine parameters are frozen in eval mode while training.
        memory_budget: bytes, or a string such as ``"4MiB"``, for the cores and factors of all compressed layers.
        refresh: ``"epoch"`` or a number of training batches between two updates of the subspaces; ``None``: once.
        calibration_batches: number of batches that define the subspaces.
        measure: measure what autograd keeps for one batch, with and without compression (three forward passes).
        verbose: print the table of layers once per fit.
        forward_fn: ``forward_fn(module, batch)``, the forward pass to calibrate and measure on. By default
            ``training_step``, or the module's own call on the inputs under manual optimisation.
        seed: seed of the random sample orders.

    Raises:
        ConfigError: an option has a value that is not allowed.
        PlanError: at fit start, nothing can be compressed or a pattern matches nothing.
        CalibrationError: at the first batch, inputs hold NaN or Inf. The model is restored.
    """

    def __init__(
        self,
        rank: int | float | str | dict[str, int | float | str | dict[str, int | float | str]] = "auto",
        batch: Literal["unbiased", "projected"] = "unbiased",
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
    ) -> None:
        self.config = LanceConfig(
            rank=rank,
            batch=batch,
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
        self._batches = 0
        self._observed = 0
        self._ready = False
        self._norms: list[nn.Module] = []

    @property
    def report(self) -> Report | None:
        """Ranks, energies and measured bytes of the last fit; ``None`` before its first batch."""
        return None if self.session is None else self.session.report

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A state that an earlier test or validation run has loaded must not leak into this fit.
        self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = False
        self._batches = self._observed = 0
        self._saved = {}
        self.session = LanceSession(pl_module, self.config)
        self.session.start()
        self._norms = _frozen_norms(pl_module) if self.config.freeze_norms else []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.session is not None
        for norm in self._norms:
            norm.training = False
        if not self._ready:
            self._prepare(trainer, pl_module, self.session, batch, batch_idx)
        elif self._refresh_due(batch_idx) and not self.session.observing:
            self.session.observe()

    def _prepare(
        self, trainer: pl.Trainer, module: pl.LightningModule, session: LanceSession, batch: Any, batch_idx: int
    ) -> None:
        self._ready = True
        if self._loaded is not None:
            self._batches, self._observed = self._loaded["batches"], self._loaded["observed"]
            missing = session.load_state_dict(self._loaded["session"])
            self._loaded = None
            if (missing or self._refresh_due(batch_idx)) and not session.observing:
                session.observe()
        else:
            following = peek(trainer, self.config.calibration_batches - 1)
            if following is None:
                session.observe()  # the first training steps run plain and define the subspaces
                return
            self._calibrate(trainer, module, session, [copied(batch), *following])
        if self.measure and session.calibrated:
            with quiet(module):
                session.measure(lambda: self._forward(trainer, module, copied(batch)))
            self._publish(trainer, session)

    def _calibrate(
        self, trainer: pl.Trainer, module: pl.LightningModule, session: LanceSession, batches: list[Any]
    ) -> None:
        if len(batches) < self.config.calibration_batches:
            warnings.warn(
                f"calibration_batches={self.config.calibration_batches}, but the epoch has only {len(batches)} "
                "batches; the subspaces are computed from those.",
                LanceWarning,
                stacklevel=2,
            )

        def run(index: int) -> Any:
            ready = batches[0] if index == 0 else prepare(trainer, module, batches[index])
            return self._forward(trainer, module, ready)

        passes = [functools.partial(run, index) for index in range(len(batches))]
        with quiet(module):
            session.calibrate(passes, _reduce(trainer), _share(trainer))

    def _forward(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
        if self.forward_fn is None:
            try:
                return run_step(trainer, module, batch)
            except Exception as error:
                if module.automatic_optimization:
                    raise
                raise CalibrationError(
                    f"calling {type(module).__name__} on the first element of the batch failed ({error}). Under manual "
                    "optimisation, give LanceCallback(forward_fn=lambda module, batch: ...) the forward pass to "
                    "calibrate on."
                ) from error
        with trainer.precision_plugin.train_step_context():
            return self.forward_fn(module, batch)

    def _refresh_due(self, batch_idx: int) -> bool:
        refresh = self.config.refresh
        if refresh == "epoch":
            return batch_idx == 0
        return isinstance(refresh, int) and self._batches % refresh == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.session is not None
        self._batches += 1
        if self.session.observing:
            self._observed += 1
            if self._observed >= self.config.calibration_batches:
                self._observed = 0
                self.session.refresh(_reduce(trainer), _share(trainer))

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

    def _finish(self, module: pl.LightningModule) -> None:
        if self.session is not None and self._ready:
            self._saved = self.state_dict()
        self._ready = False
        if self.session is not None:
            self.session.stop()

    def state_dict(self) -> dict[str, Any]:
        """Subspaces, sample orders and counters; empty before calibration, the last fit's after it."""
        if self.session is None or not self._ready:
            return self._saved
        return {"session": self.session.state_dict(), "batches": self._batches, "observed": self._observed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a stored state for the first batch of the fit that follows."""
        self._loaded = state_dict


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


def _frozen_norms(module: nn.Module) -> list[nn.Module]:
    return [
        norm
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.track_running_stats
        and not any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
    ]


@rank_zero_only
def _show(report: Report) -> None:
    sys.stdout.write(f"\n{report.render()}\n")
    sys.stdout.flush()


__all__: Sequence[str] = ["LanceCallback"]
