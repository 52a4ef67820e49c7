"""The Lightning callback: hooks and checkpoint keys; the work is done by a
:class:`~lightning_lance.compression.session.LanceSession`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import fields
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.report import Report
from lightning_lance.compression.session import LanceSession
from lightning_lance.errors import CalibrationError
from lightning_lance.subspaces.subspace import LayerStatistics
from lightning_lance.trainer.passes import bare, passes


class LanceCallback(Callback):
    """Train with compressed activations: ``Trainer(callbacks=[LanceCallback()])``.

    Around every ``training_step`` what autograd saves is kept in few bits, whichever operator saves it; what an
    operator reads in part only, such as the sign of an activation, is kept in that part, exactly. Where ``rank`` asks
    for it, layers are swapped in place at fit start for variants that keep a low-rank core of their input, in subspaces
    that the first steps define; these are ordinary steps. At the end, on an exception and on Ctrl-C the model gets its
    own layers back. Layers that a fine-tuning schedule unfreezes join. Method: LANCE (Apolinario & Roy, arXiv
    2509.21617), with a batch mode that is unbiased.

    The subspaces are part of the checkpoint: a resumed run continues with them, bit for bit.

    Args:
        rank: on what the inputs of linear layers and convolutions are projected. ``"auto"``: nothing is projected
            unless a ``memory_budget`` asks for it. ``None``: nothing is. ``"compact"``, for fine-tuning: batch rank
            ``max(4, B / 6)`` without bias, spatial and token energy .9 where that pays. An int: that rank in every
            mode, clipped to its size. A float in (0, 1]: that energy in every mode (the published rule). A mapping of
            the modes ``batch``, ``channel`` (or ``feature``) and ``spatial`` (or ``token``) to an int, an energy,
            ``"compact"`` or ``"full"``; or a mapping of layer patterns to any of these.
        bits: of each element of what is kept: ``"auto"`` (4), 8, 4, 2 (for what gradients of weights alone need; 4 for
            the rest), or ``None``: nothing is rounded, and gradients are exact.
        batch: ``"unbiased"``: the weight gradient has no bias from the batch mode; ``"projected"``: without the weights
            that this takes; ``"learned"``: as published, see :class:`~lightning_lance.LanceConfig`.
        layers: where to project: ``"trainable"`` (every supported layer whose weight requires grad), an int (the last n
            of them), or shell-style name patterns; the name of a container means all layers in it.
        freeze_norms: run batch-norm layers whose affine parameters are frozen in eval mode while training.
        memory_budget: bytes, or a string such as ``"4MiB"``, for the cores and factors of all projected layers.
        refresh: ``"epoch"`` or a number of training steps between two updates of the subspaces; ``None``: once.
        calibration_batches: number of batches that define the subspaces; ``None``: 8, or what the preset says.
        verbose: print the table of what is kept once per fit, and again when layers join.
        seed: seed of the random sample orders.
        skip: kinds of layers that are neither projected nor counted by ``layers``: ``"depthwise"``, ``"classifier"``.
        calibration: ``"training"``: the first training steps define the subspaces. ``"eval"``: forward passes in eval
            mode do, before the first step, on batches of a training epoch of their own, which leave no trace.
        preset: ``"published"``: the method as its authors have it, see :class:`~lightning_lance.LanceConfig`.
        forward_fn: ``forward_fn(module, batch)``, the forward pass of ``calibration="eval"``. By default
            ``module(inputs)`` for batches ``[inputs, ...]``.

    Raises:
        ConfigError: an option has a value that is not allowed.
        PlanError: at fit start, something is to be projected and nothing can be, or a pattern matches nothing.
        CalibrationError: the steps that should define the subspaces saw NaN or Inf. The model is restored.
    """

    def __init__(
        self,
        rank: int | float | str | dict[str, int | float | str | dict[str, int | float | str]] | None = "auto",
        bits: int | Literal["auto"] | None = "auto",
        batch: Literal["unbiased", "projected", "learned"] = "unbiased",
        layers: int | str | list[str] = "trainable",
        freeze_norms: bool = False,
        memory_budget: int | str | None = None,
        refresh: int | Literal["epoch"] | None = None,
        calibration_batches: int | None = None,
        verbose: bool = True,
        seed: int = 0,
        skip: str | list[str] | None = None,
        calibration: Literal["training", "eval"] = "training",
        preset: Literal["published"] | None = None,
        forward_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
    ) -> None:
        given = locals()
        self.config = LanceConfig(**{field.name: given[field.name] for field in fields(LanceConfig)})
        self.forward_fn = forward_fn or bare
        self.verbose = verbose
        self.session: LanceSession | None = None
        self._loaded: dict[str, Any] | None = None
        self._saved: dict[str, Any] = {}
        self._ready = False
        self._published: Report | None = None
        self._own_step: Any = None
        self._wrapped_step: Any = None

    @property
    def report(self) -> Report | None:
        """Ranks, energies and measured bytes of the last fit; ``None`` before the end of its first step."""
        return None if self.session is None else self.session.report

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A state that an earlier test or validation run has loaded must not leak into this fit.
        self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = False
        self._saved = {}
        session = self.session = LanceSession(pl_module, self.config)
        session.reduce, session.share = _reduce(trainer), _share(trainer)
        session.start()
        self._wrap_training_step(pl_module, session)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        session = self.session
        assert session is not None
        first, self._ready = not self._ready, True
        stored, self._loaded = self._loaded, None
        if first:
            self._published = None
            session.spread(trainer.global_rank)
        if stored is not None:
            session.load_state_dict(stored)
        if self.config.calibration == "eval":
            self._calibrate(trainer, pl_module, session)
        if batch_idx == 0:
            session.begin_epoch()

    def _calibrate(self, trainer: pl.Trainer, module: pl.LightningModule, session: LanceSession) -> None:
        """Before the first step, and for layers that join later."""
        session.join()
        if not session.uncalibrated:
            return
        with closing(passes(trainer, module, self._forward, self.config.batches)) as found:
            session.calibrate(found, session.reduce, session.share, session.uncalibrated)

    def _forward(self, module: pl.LightningModule, batch: Any) -> Any:
        try:
            return self.forward_fn(module, batch)
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
            raise CalibrationError(
                f"calibration='eval' runs forward passes before the first step; one failed ({type(error).__name__}: "
                f"{error}). Give forward_fn=..., a function of the module and a batch."
            ) from error

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.session is not None
        if self.session.reported and self.session.report is not self._published:
            self._publish(trainer, self.session)

    def _publish(self, trainer: pl.Trainer, session: LanceSession) -> None:
        report = self._published = session.report
        if report is None:
            return
        metrics = report.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.verbose:
            _show(report)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.session is not None and self._published is None:  # a fit of fewer steps than define the subspaces
            self._publish(trainer, self.session)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._finish(pl_module)

    def _wrap_training_step(self, module: pl.LightningModule, session: LanceSession) -> None:
        """Run ``training_step`` as one step of the session."""
        self._unwrap_training_step(module)
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with session.step():
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
            if self.session is not None:
                self.session.stop()

    def state_dict(self) -> dict[str, Any]:
        """Subspaces, sample orders and a running observation; empty before the first step, the last fit's after it."""
        if self.session is None or not self._ready:
            return self._loaded or self._saved
        return self.session.state_dict()

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


@rank_zero_only
def _show(report: Report) -> None:
    sys.stdout.write(f"\n{report.render()}\n")
    sys.stdout.flush()


__all__ = ["LanceCallback"]
