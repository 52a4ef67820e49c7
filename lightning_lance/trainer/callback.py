"""The Lightning callback: hooks and checkpoint keys; the work is done by a
:class:`~lightning_lance.compression.session.LanceSession`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.options import made, takes
from lightning_lance.compression.processes import Processes
from lightning_lance.compression.report import Report
from lightning_lance.compression.session import LanceSession
from lightning_lance.errors import CalibrationError, ConfigError, LanceWarning
from lightning_lance.trainer.passes import bare, passes


@dataclass(frozen=True)
class CallbackOptions(LanceConfig):
    """The options of :class:`LanceCallback`.

    Attributes:
        verbose: print the table of what is kept once per fit, and again when layers join.
        forward_fn: ``forward_fn(module, batch)``, the forward pass of ``calibration="eval"``, and in a stream that on
            which the inputs of layers are looked at before and after an experience. By default ``module(inputs)``, or
            ``module(inputs, task labels)`` where its ``forward`` takes two arguments, for batches ``[inputs, classes,
            task labels ...]``.
    """

    verbose: bool = True
    forward_fn: Callable[[pl.LightningModule, Any], Any] | None = None


class LanceCallback(Callback):
    """Train with compressed activations: ``Trainer(callbacks=[LanceCallback()])``.

    Around every ``training_step`` what autograd saves is kept in few bits, whichever operator saves it; what an
    operator reads in part only, such as the sign of an activation, is kept in that part, exactly. Where ``rank`` asks
    for it, layers are swapped in place at fit start for variants that keep a low-rank core of their input, in subspaces
    that the first steps define; these are ordinary steps. At the end, on an exception and on Ctrl-C the model gets its
    own layers back. Layers that a fine-tuning schedule unfreezes join. Method: LANCE (Apolinario & Roy, arXiv
    2509.21617), with a batch mode that is unbiased.

    One serves a Trainer. Parts of a network are told apart by ``rank={"layer3.*": "compact", "fc": 8}``.

    The subspaces are part of the checkpoint: a resumed run continues with them, bit for bit.

    Takes the options of :class:`~lightning_lance.LanceConfig`, ``verbose`` (``True``): print the table of what is kept
    once per fit, and again when layers join; and ``forward_fn``, the forward pass of ``calibration="eval"``.

    Raises:
        ConfigError: an option has a value that is not allowed.
        PlanError: at fit start, something is to be projected and nothing can be, or a pattern matches nothing.
        CalibrationError: the steps that should define the subspaces saw NaN or Inf. The model is restored.
    """

    _options: type[CallbackOptions] = CallbackOptions

    @takes(CallbackOptions)
    def __init__(self, *args: Any, **options: Any) -> None:
        given = made(self, self._options, args, options)
        self.config: LanceConfig = given
        self.verbose = given.verbose
        self.forward_fn = given.forward_fn or bare
        self.session: LanceSession | None = None
        self._loaded: dict[str, Any] | None = None
        self._saved: dict[str, Any] = {}
        self._ready = False
        self._set_up = False
        self._published: Report | None = None
        self._own_step: Any = None
        self._wrapped_step: Any = None

    @property
    def report(self) -> Report | None:
        """Ranks, energies and measured bytes of the last fit; ``None`` before the end of its first step."""
        return None if self.session is None else self.session.report

    @property
    def state_key(self) -> str:
        # The constructor of a Trainer refuses equal keys, in words that name no option of ours; setup has better ones.
        return super().state_key if self._set_up else f"{super().state_key}.{id(self)}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A state that an earlier test or validation run has loaded must not leak into this fit.
        self._loaded = None
        self._set_up = True
        others = [type(c).__name__ for c in trainer.callbacks if isinstance(c, LanceCallback) and c is not self]  # type: ignore[attr-defined]
        if stage == "fit" and others:
            raise ConfigError(
                f"{type(self).__name__} and {', '.join(others)} in one Trainer: what autograd saves is kept by one of "
                "them. Give one; ContinualCallback compresses as well, and takes the same options. Single layers have "
                "ranks of their own in one callback's rank={'layer3.*': 'compact', 'fc': 8}."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = False
        self._saved = {}
        session = self.session = LanceSession(pl_module, self.config)
        session.processes = Processes(trainer.world_size, trainer.global_rank)
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
            session.calibrate(found, session.uncalibrated)

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
            asked = self.config.memory_budget is not None or self.config.rank not in ("auto", None)
            if asked and not self.session.calibrated:
                warnings.warn(
                    f"the fit ended within the {self.config.batches} steps that define the subspaces: nothing was "
                    "projected, and a memory_budget not applied. The table below is of those first steps, in the "
                    "fewest bits. Give a smaller calibration_batches, or train longer.",
                    LanceWarning,
                    stacklevel=2,
                )
            elif self.session.report is None and self.session.steps:
                frozen = not any(parameter.requires_grad for parameter in pl_module.parameters())
                why = f", since no parameter of {type(pl_module).__name__} requires grad" if frozen else ""
                warnings.warn(
                    f"LANCE had nothing to do: autograd kept nothing in the training steps of this fit{why}. Set "
                    "requires_grad on what is to train, and compute its loss in training_step.",
                    LanceWarning,
                    stacklevel=2,
                )
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


@rank_zero_only
def _show(report: Report) -> None:
    sys.stdout.write(f"\n{report.render(layers=False)}\n")
    sys.stdout.flush()


__all__ = ["LanceCallback"]
