"""The plugin: which Avalanche hook calls which step of :class:`~lightning_lance.continual.ContinualSession`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import MIRPlugin, RARPlugin, ReplayPlugin
from torch import Tensor

from lightning_lance.avalanche.heads import find_heads, own_name, task_names
from lightning_lance.compression.config import LanceConfig, Layers, Rank
from lightning_lance.compression.isolation import isolated
from lightning_lance.continual import Capacity, ContinualConfig, ContinualSession
from lightning_lance.errors import LanceWarning, StateError

_REHEARSING = (ReplayPlugin, MIRPlugin, RARPlugin)
"""They train samples of earlier experiences beside new ones. The last two also differentiate every parameter, and most
of the model is frozen."""


class LancePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Learn a stream without forgetting, with compressed activations, in any Avalanche strategy and with any optimiser.

    Before an experience the layers are calibrated on a few of its batches and swapped in place for variants that keep
    a low-rank core of their input; after it the model gets its own layers back, and the input directions that they need
    are protected. From the second experience on the weights of shared layers change only outside of them, and what
    cannot be protected in this way is frozen: biases, norms, layers of other types. Heads that Avalanche adapts
    (``MultiHeadClassifier``, ``IncrementalClassifier``) are found by themselves; name other heads in ``heads``.

    Method: LANCE (Apolinario & Roy, arXiv 2509.21617). Give it as the first plugin, so that others see the model as it
    is between experiences. Where training fails, call :meth:`restore`, or use
    :class:`~lightning_lance.avalanche.LanceStrategy`, which does it for you.

    Args:
        rank: see :class:`~lightning_lance.LanceConfig`, as ``batch``, ``layers``, ``memory_budget``,
            ``calibration_batches`` and ``seed``.
        batch: ``"unbiased"``, ``"projected"`` or ``"learned"``.
        bits: of each element of what is kept: ``"auto"`` is 8, since noise in the gradient costs more experience by
            experience than in fine-tuning; 4, 2, or ``None``.
        layers: which layers keep a compressed input. Which are protected does not depend on it.
        memory_budget: bytes for the cores and factors of all compressed layers.
        calibration_batches: batches of the experience that define the subspaces, before and after it.
        seed: seed of the random sample orders.
        rule: see :class:`~lightning_lance.continual.ContinualConfig`, as all that follow. Where the model has a head
            for each task, each has columns of its own, and is evaluated with them.
        threshold: fraction of an experience's input energy that is protected after it, or ``"auto"``.
        threshold_growth: added to the threshold after each experience.
        columns: fraction of the protected weights that an experience may have as columns of its own.
        reserved: directions that an experience may change: ``"full"``, ``"threshold"``, an int or a float.
        damping: of steps in directions that are not protected: ``"auto"``, or a number, 0 for none.
        freeze_above: fraction of a layer's directions from which on its weight is frozen.
        feature_side: ``"patch"`` or ``"channel"``.
        heads: name patterns of modules that train freely and are not protected.
        verbose: print a table of the layers after each experience: what is protected, free, its own, and frozen.
        skip: kinds of layers whose input is not projected, see :class:`~lightning_lance.LanceConfig`.
        calibration: mode of the forward passes that define the subspaces, see :class:`~lightning_lance.LanceConfig`.
        compress_first: whether inputs are projected in the first experience too.
        preset: ``"published"``: the method as its authors have it.

    Attributes:
        session: the bases and the state of the stream.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """

    def __init__(
        self,
        *,
        rank: Rank = "auto",
        batch: Literal["unbiased", "projected", "learned"] = "unbiased",
        bits: int | Literal["auto"] | None = "auto",
        layers: Layers = "trainable",
        memory_budget: int | str | None = None,
        calibration_batches: int | None = None,
        seed: int = 0,
        rule: str = "columns",
        threshold: float | Literal["auto"] = "auto",
        threshold_growth: float = 0.003,
        columns: float = 1 / 64,
        reserved: int | float | Literal["full", "threshold"] = "full",
        damping: float | Literal["auto"] = "auto",
        freeze_above: float = 0.95,
        feature_side: Literal["patch", "channel"] = "patch",
        heads: str | Sequence[str] = (),
        verbose: bool = True,
        skip: str | Sequence[str] = (),
        calibration: Literal["training", "eval"] = "training",
        compress_first: bool = True,
        preset: str | None = None,
    ) -> None:
        super().__init__()
        self.verbose = verbose
        config = LanceConfig(
            rank=rank,
            batch=batch,
            bits=bits,
            layers=layers,
            memory_budget=memory_budget,
            calibration_batches=calibration_batches,
            seed=seed,
            skip=skip,
            calibration=calibration,
            preset=preset,
        )
        options = ContinualConfig(
            rule=rule,
            threshold=threshold,
            threshold_growth=threshold_growth,
            columns=columns,
            reserved=reserved,
            damping=damping,
            freeze_above=freeze_above,
            feature_side=feature_side,
            heads=heads,
            compress_first=compress_first,
            preset=preset,
        )
        self.session = ContinualSession(config, options)
        self._said: set[str] = set()
        self._mixed: _Mixed | None = None

    @property
    def capacity(self) -> dict[str, Capacity]:
        """Layer name -> directions taken and free."""
        return self.session.capacity()

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Swap, calibrate, freeze and reserve. The model is adapted to the experience already."""
        self.restore()  # what an interrupted run has left
        self._end_evaluation(strategy.model)
        _refuse_replay(strategy)
        own, shared = find_heads(strategy.model)
        self._say_unprotected(shared)
        self.session.begin_experience(
            strategy.model,
            self._passes(strategy),
            [strategy.optimizer],
            heads=[*own, *shared],
            own=own_name(strategy.model, strategy.experience, bool(self.session.options.heads)),
        )

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begin a step: what autograd saves from here on is compressed."""
        self.session.begin_step()

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """End it; the loss has been computed."""
        self.session.end_step()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restore the model and protect what the experience needs."""
        self.session.end_experience(strategy.model, self._passes(strategy))
        if self.verbose:
            print(self.session.table())  # noqa: T201 - what verbose is for

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Evaluate with what the experience has for itself."""
        names = task_names(strategy.experience)
        self._mixed = _Mixed(strategy, self.session) if len(names) > 1 and self.session.rule.names else None
        if len(names) == 1:
            self.session.select(strategy.model, names[0])

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Back to what all experiences share, or to the one in training."""
        self._end_evaluation(strategy.model)

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """What an evaluation that failed has left."""
        self._end_evaluation(strategy.model)

    def _end_evaluation(self, model: Any) -> None:
        mixed, self._mixed = self._mixed, None
        if mixed is not None:
            mixed.end()
        self.session.select(model, None)

    def restore(self) -> None:
        """Give the model its own layers back after an error in training. Does nothing where there is nothing to do.

        What the failed experience has learned so far stays in the weights, and earlier ones are still protected.
        """
        if self.session.running:
            self.session.abandon()

    def _passes(self, strategy: Any) -> list[Callable[[], Any]]:
        """Forward passes of the strategy on the first batches of its loader, drawn without a trace."""
        with isolated(strategy.model):
            batches = list(islice(strategy.dataloader, self.session.config.batches))

        def run(batch: Any) -> Any:
            current = strategy.mbatch
            strategy.mbatch = list(batch)
            try:
                strategy._unpack_minibatch()
                return strategy.forward()
            finally:
                strategy.mbatch = current

        return [lambda batch=batch: run(batch) for batch in batches]  # type: ignore[misc]

    def _say_unprotected(self, shared: list[str]) -> None:
        fresh = [name for name in shared if name not in self._said]
        self._said.update(fresh)
        if fresh:
            warnings.warn(
                f"{', '.join(name or 'the model' for name in fresh)}: one classifier for all experiences, which is not "
                "protected; it forgets as without LANCE. A MultiHeadClassifier has a head for each task, and a plain "
                "linear classifier is protected.",
                LanceWarning,
                stacklevel=2,
            )


class _Mixed:
    """Batches of several tasks, evaluated task by task: as many forward passes as a batch has tasks."""

    def __init__(self, strategy: Any, session: ContinualSession) -> None:
        self._strategy = strategy
        self._session = session
        self._forward = strategy.forward
        strategy.forward = self.forward

    def forward(self) -> Any:
        strategy = self._strategy
        labels = strategy.mb_task_id
        result: Tensor | None = None
        batch = strategy.mbatch
        try:
            for label in labels.unique():
                rows = (labels == label).nonzero().flatten()
                strategy.mbatch = [part[rows] for part in batch]
                self._session.select(strategy.model, str(int(label)))
                found = self._forward()
                if result is None:
                    result = found.new_zeros(len(labels), *found.shape[1:])
                result[rows] = found
        finally:
            strategy.mbatch = batch
            self._session.select(strategy.model, None)
        return result

    def end(self) -> None:
        del self._strategy.forward


def _refuse_replay(strategy: Any) -> None:
    """Replay and protection work against each other.

    Old samples would have to move the directions that they need, and these are what is protected; what they do move,
    heads and free directions, fits them to features that they are not evaluated with.
    """
    for plugin in strategy.plugins:
        if isinstance(plugin, _REHEARSING):
            raise StateError(
                f"{type(plugin).__name__} beside LANCE is not supported: the directions that replayed samples train "
                "are those that are protected, and the heads of earlier tasks would follow features of the present "
                "one. Use one of the two."
            )
