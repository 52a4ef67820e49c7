"""A stream of experiences through a Lightning Trainer: fit, evaluate, log, save; and go on after a crash."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from avalanche.models.dynamic_modules import DynamicModule, avalanche_model_adaptation
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_lance.avalanche.heads import find_heads, own_name, task_names
from lightning_lance.errors import ConfigError, LanceWarning, StateError
from lightning_lance.streams.datamodule import AvalancheDataModule
from lightning_lance.streams.evaluation import Evaluation, Predict
from lightning_lance.streams.progress import ExperienceProgress, StreamBars
from lightning_lance.streams.randomness import random_state, set_random_state
from lightning_lance.streams.result import StreamResult
from lightning_lance.streams.store import (
    RESULTS,
    STREAM_STATE_VERSION,
    InsideCheckpoint,
    StreamStore,
    check_same,
    check_version,
    said_once,
)
from lightning_lance.trainer.callback import LanceCallback
from lightning_lance.trainer.continual import ContinualCallback
from lightning_lance.trainer.metrics import ContinualMetrics, continual_metrics

OWN = ("enable_progress_bar", "enable_checkpointing", "fast_dev_run", "default_root_dir")
"""Trainer arguments that the runner sets."""

_SHARED = ("logger", "callbacks")
_KEPT = ("lance/saved_bytes_plain", "lance/saved_bytes")


class StreamRunner:
    """Train a LightningModule on one experience after another, each with a Trainer of its own.

    Before the first experience and after each one the model is evaluated on the test sets, and the accuracy matrix,
    ACC, BWT and FWT go to the Trainer's logger. A checkpoint is written after each experience, and within it every
    ``checkpoint_every`` steps. Where the process is killed, at any moment, the same call goes on from the last
    checkpoint and ends with the numbers of an uninterrupted run, on a CPU bit for bit.

    The model takes batches ``[inputs, classes, task labels]`` in ``training_step``, and is called as ``model(inputs)``
    or ``model(inputs, task labels)``, whichever its ``forward`` takes, to predict. Avalanche's dynamic modules in it
    (growing classifiers, a head for each task) are adapted before each experience.

    Args:
        model: any such LightningModule, for example :class:`~lightning_lance.streams.ContinualClassifier`.
        data: the stream.
        root: folder for checkpoints, logs, results and plots; one for each stream.
        trainer: arguments of the Trainer, such as ``{"max_epochs": 5, "precision": "bf16-mixed"}``. Callbacks,
            plugins, strategies and profilers given as objects are copied for each experience; a logger is shared.
        lance: the callback to train with: :class:`~lightning_lance.ContinualCallback` so that nothing is forgotten,
            :class:`~lightning_lance.LanceCallback` to compress only; ``None`` trains plainly. Heads that Avalanche
            adapts are not protected.
        forward_transfer: also evaluate before the first experience and on experiences to come, which FWT needs.
        checkpoint_every: optimiser steps between two checkpoints within an experience.
        restart: begin anew, whatever the folder holds.
        progress: draw the progress bars.
        predict: ``predict(model, inputs, task_labels)``: scores or class indices, where calling the model is not what
            it takes.
        trainer_class: the Trainer.

    Attributes:
        metrics: the accuracy matrix so far.
        described: plain containers that say what else the stream depends on; stored in its checkpoints.
        differing: ``differing(stored)``: why a stream described so cannot go on here, or ``None``. Where nothing is
            trained yet, it begins anew instead.

    Raises:
        ConfigError: ``trainer`` holds an argument that the runner sets.

    Example::

        data = AvalancheDataModule(SplitMNIST, {"n_experiences": 5}, batch_size=64)
        model = ContinualClassifier(SimpleMLP(num_classes=10))
        result = StreamRunner(model, data, "runs/split_mnist", trainer={"max_epochs": 2}).run()
        print(result)
    """

    def __init__(
        self,
        model: pl.LightningModule,
        data: AvalancheDataModule,
        root: str | Path,
        trainer: Mapping[str, Any] | None = None,
        lance: LanceCallback | None = None,
        forward_transfer: bool = True,
        checkpoint_every: int = 100,
        restart: bool = False,
        progress: bool = True,
        predict: Predict | None = None,
        trainer_class: type[pl.Trainer] = pl.Trainer,
    ) -> None:
        self.options = dict(trainer or {})
        refused = [name for name in OWN if name in self.options]
        if refused:
            raise ConfigError(
                f"trainer has {', '.join(refused)}, which the stream sets itself. Allowed: every other argument of "
                "lightning.pytorch.Trainer."
            )
        if checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={checkpoint_every!r} is not allowed. Allowed: an int of at least 1.")
        self.model = model
        self.data = data
        self.lance = lance
        self.forward_transfer = forward_transfer
        self.checkpoint_every = checkpoint_every
        self.restart = restart
        self.progress = progress
        self.predict = predict
        self.trainer_class = trainer_class
        self.store = StreamStore(root)
        self.metrics = ContinualMetrics(data.num_experiences)
        self.described: Any = None
        self.differing: Callable[[Any], str | None] = lambda stored: None
        self._logger: Any = None
        self._bars: StreamBars | None = None
        self._launched = False
        self._steps = 0
        self._ends: list[int] = []
        self._kept: list[list[float]] = []

    def run(self) -> StreamResult:
        """Run the stream, or what is left of it.

        Returns:
            The accuracy matrix and its summaries.

        Raises:
            StateError: the folder holds a stream with other settings or of another version, or files that no stream
                has written and this one would overwrite; or the Trainer's strategy starts its processes anew for each
                fit.
        """
        if _rank() == 0:
            self.store.claim()
            if self.restart:
                self.store.clear()
        self._logger = self._shared_logger()
        first = self._resume()
        enabled = self.progress and _rank() == 0
        self._bars = StreamBars(self.data.num_experiences, max(first, 0), enabled)
        try:
            with said_once():
                if first < 0:
                    self._begin()
                    first = 0
                for experience in range(first):  # a logger may have begun a new version
                    self._log(experience)
                for experience in range(first, self.data.num_experiences):
                    self._learn(experience)
        finally:
            self._bars.close()
        if _rank() == 0:  # also where a finished stream has lost them
            self.store.write_json(RESULTS, self.result().as_dict())
            self.store.clear_inside()  # what a process left that was ended right behind the last boundary
        return self.result()

    def _resume(self) -> int:
        """Load the last state between two experiences; the index of the next one, -1 where there is no state."""
        found = None if self.restart and _rank() else self.store.latest()
        if found is None:
            return -1
        state: Any = found.get("stream")
        check_version(state, self.store.root)
        other = self.differing(state["described"])
        if other is not None:
            if self.store.trained():
                raise StateError(other)
            return -1
        check_same(state["settings"], self._settings(), self.store.root)
        following = state["experience"] + 1
        self._replay(following)
        self.model.load_state_dict(found["state_dict"])
        self.metrics.correct.copy_(state["correct"])
        self.metrics.total.copy_(state["total"])
        self._steps, self._ends, self._kept = state["steps"], list(state["ends"]), list(state["kept"])
        if isinstance(self.lance, ContinualCallback) and state["lance"] is not None:
            self.lance.stream.load_state_dict(state["lance"]["stream"])
        ranks = state["random"]
        set_random_state(ranks[min(_rank(), len(ranks) - 1)])
        return int(following)

    def _replay(self, experiences: int) -> None:
        """Make the model grow as it did, so that the stored weights fit."""
        if self.forward_transfer:
            self._grow_for_test()
        for experience in range(experiences):
            self._grow(experience)
            self._grow_for_test(experience)

    def _begin(self) -> None:
        if self.forward_transfer:
            self._evaluate(None)
        self._save(-1, None)

    def _learn(self, experience: int) -> None:
        self._grow(experience)
        self.data.experience = experience
        state = _StreamState(experience)
        callbacks: list[Callback] = [state]
        if self.lance is not None:
            callbacks.append(self.lance)
        if isinstance(self.lance, ContinualCallback):
            own, shared = find_heads(self.model)
            self.lance.own_heads = [*own, *shared]
            named = bool(self.lance.stream.options.heads)
            self.lance.own = own_name(self.model, self.data.train_experience(experience), named)
            if shared and experience == 0:
                warnings.warn(
                    f"{', '.join(shared)}: one classifier that grows with the classes, which is not protected; it "
                    "forgets as without LANCE. A head for each task, or a classifier of fixed size, does not.",
                    LanceWarning,
                    stacklevel=2,
                )
        inside = InsideCheckpoint(self.store.within(experience), self.checkpoint_every)
        title = f"experience {experience}"
        trainer = self._trainer(title, callbacks, [inside])
        _continue_steps(trainer, self._steps)
        self.model.train()
        path = self.store.inside(experience)
        assert self._bars is not None
        if experience == 0 or (self.lance is not None and self.lance.verbose):
            self._bars.clear()
        trainer.fit(self.model, datamodule=self.data, ckpt_path=None if path is None else str(path))
        self._steps = _steps(trainer)
        self._ends.append(self._steps)
        if self.lance is not None and self.lance.report is not None:
            found = self.lance.report.metrics()
            self._kept.append([found[name] for name in _KEPT if name in found])
        self._evaluate(experience)
        self._save(experience, trainer)
        summary = self._log(experience)
        self._bars.advance({name: f"{summary[name]:.3f}" for name in ("ACC", "BWT", "FWT") if name in summary})

    def _log(self, experience: int) -> dict[str, float]:
        """Give a row of the accuracy matrix and the summaries up to it to the loggers."""
        matrix = self.metrics.matrix
        seen = torch.full_like(matrix, torch.nan)
        seen[: experience + 1] = matrix[: experience + 1]
        summary = _finite(continual_metrics(seen, self.metrics.baseline))
        row = {f"accuracy_{column}": float(value) for column, value in enumerate(matrix[experience])}
        values = {f"stream/{name}": value for name, value in {**summary, **row}.items() if value == value}
        given = self._logger if isinstance(self._logger, Sequence) else [self._logger]
        for logger in given:
            if isinstance(logger, Logger) and _rank() == 0:
                logger.log_metrics({**values, "stream/experience": experience}, step=self._ends[experience])
                logger.save()
        return summary

    def result(self) -> StreamResult:
        """The accuracy matrix so far and its summaries."""
        summary = _finite(continual_metrics(self.metrics.matrix, self.metrics.baseline))
        return StreamResult(self.metrics, summary, list(self._kept), self.store.root)

    def _evaluate(self, trained: int | None) -> None:
        """Fill a row of the accuracy matrix."""
        self._grow_for_test(trained)
        columns = self._columns(trained)
        self.data.evaluated = columns
        evaluation = Evaluation(self.model, len(columns), self.predict, self._select(columns))
        title = "evaluation" if trained is None else f"evaluation after experience {trained}"
        trainer = self._trainer(title, [], [])
        try:
            trainer.test(evaluation, datamodule=self.data, verbose=False)
        finally:
            if isinstance(self.lance, ContinualCallback):
                self.lance.stream.select(self.model, None)
        row = 0 if trained is None else trained + 1
        for experience, column in enumerate(self.data.test_experiences):
            if column in columns and (self.forward_transfer or trained is None or experience <= trained):
                self.metrics.correct[row, experience] = evaluation.correct[columns.index(column)]
                self.metrics.total[row, experience] = evaluation.total[columns.index(column)]

    def _select(self, columns: list[int]) -> Callable[[int], None] | None:
        """Makes the model that of the experience of a test set, where experiences have something of their own."""
        if not isinstance(self.lance, ContinualCallback):
            return None
        stream = self.lance.stream

        def select(index: int) -> None:
            names = task_names(self.data.test_experience(columns[index]))
            if len(names) > 1 and stream.rule.names:
                raise StateError(
                    f"a test set holds samples of the tasks {', '.join(names)}, and each has columns of its own. Give "
                    "a test set for each task, or lance with columns=0."
                )
            stream.select(self.model, names[0] if len(names) == 1 else None)

        return select

    def _columns(self, trained: int | None) -> list[int]:
        """Test sets to evaluate on."""
        count = self.data.num_experiences if self.forward_transfer or trained is None else trained + 1
        return list(dict.fromkeys(self.data.test_experiences[:count]))

    def _grow(self, experience: int) -> None:
        self._adapt(self.data.train_experience(experience), True)

    def _grow_for_test(self, trained: int | None = None) -> None:
        for column in self._columns(trained):
            self._adapt(self.data.test_experience(column), False)

    def _adapt(self, experience: Any, training: bool) -> None:
        if any(isinstance(module, DynamicModule) for module in self.model.modules()):
            self.model.train(training)
            avalanche_model_adaptation(self.model, experience)

    def _trainer(self, title: str, first: list[Callback], last: list[Callback]) -> pl.Trainer:
        """A Trainer for one experience, or, without callbacks of ours, for an evaluation."""
        options = copy.deepcopy({name: self.options[name] for name in self.options if name not in _SHARED})
        given = self.options.get("callbacks") or []
        training = bool(last)
        assert self._bars is not None
        if not self._launched:  # the first Trainer may say how it starts its processes
            self._launched = True
            self._bars.clear()
        progress = ExperienceProgress(self._bars, title)
        if training:
            own = copy.deepcopy(list(given) if isinstance(given, Sequence) else [given])
            options["callbacks"] = [*first, *own, progress, *last]
            options.setdefault("num_sanity_val_steps", 0)
        else:
            options["callbacks"] = [progress]
            # What a forward pass makes, such as the mask of a growing head, must still be trainable afterwards.
            options["inference_mode"] = False
        if not training or first[0].experience:  # type: ignore[attr-defined]
            options["enable_model_summary"] = False
        trainer = self.trainer_class(
            **options,
            logger=self._logger if training else False,
            enable_checkpointing=training,
            default_root_dir=str(self.store.root),
        )
        if isinstance(self.lance, ContinualCallback) and isinstance(trainer.strategy, DDPStrategy):
            # Parts of the model are frozen from the second experience on, which DDP must not wait for.
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise StateError(
                f"strategy={self.options.get('strategy')!r} starts its processes anew for each fit, and what they have "
                "learned to protect is lost with them. Allowed: a single device, or 'ddp'."
            )
        return trainer

    def _shared_logger(self) -> Any:
        """One logger for all Trainers: each would begin a version of its own."""
        given = self.options.get("logger", True)
        if given is None or given is True:
            root = str(self.store.root)
            try:
                return TensorBoardLogger(root, name="logs")
            except ModuleNotFoundError:
                return CSVLogger(root, name="logs")
        return given

    def _settings(self) -> dict[str, Any]:
        streams = self.data.benchmark
        return {
            "train": [len(found.dataset) for found in streams.train_stream],
            "test": [len(found.dataset) for found in streams.test_stream],
            "batch_size": self.data.batch_size,
            "seed": self.data.seed,
            "forward_transfer": self.forward_transfer,
        }

    def _save(self, experience: int, trainer: pl.Trainer | None) -> None:
        ranks = _gathered(random_state())
        weights = self.model.state_dict()
        if _rank() == 0:
            checkpoint = {
                "state_dict": weights,
                "pytorch-lightning_version": lightning.__version__,
                "epoch": 0 if trainer is None else trainer.current_epoch,
                "global_step": self._steps,
                "stream": {
                    "version": STREAM_STATE_VERSION,
                    "experience": experience,
                    "correct": self.metrics.correct.clone(),
                    "total": self.metrics.total.clone(),
                    "steps": self._steps,
                    "ends": list(self._ends),
                    "kept": list(self._kept),
                    "lance": None if self.lance is None else self.lance.state_dict(),
                    "random": ranks,
                    "settings": self._settings(),
                    "described": self.described,
                },
            }
            if self.model.hparams:
                checkpoint[self.model.CHECKPOINT_HYPER_PARAMS_KEY] = dict(self.model.hparams)
            self.store.save(experience, checkpoint)
            self.store.write_json(RESULTS, self.result().as_dict())
        _barrier()


class _StreamState(Callback):
    """Random states in the checkpoints within an experience; set again before the first batch of a resumed run."""

    def __init__(self, experience: int) -> None:
        self.experience = experience
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"experience": self.experience, "random": _gathered(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict["random"]
        self._random = ranks[min(_rank(), len(ranks) - 1)]

    def on_train_batch_start(self, *_: Any) -> None:
        if self._random is not None:
            set_random_state(self._random)
            self._random = None


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))


def _gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _finite(summary: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in summary.items() if not bool(value.isnan())}


def _steps(trainer: pl.Trainer) -> int:
    """Steps as the logger counts them, over all Trainers."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _continue_steps(trainer: pl.Trainer, steps: int) -> None:
    """Let the logger of a new Trainer count on; Lightning has no public way."""
    if hasattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped"):
        trainer.fit_loop.epoch_loop._batches_that_stepped = steps
