"""The plugin: which Avalanche hook calls which step of :class:`~lightning_lance.continual.ContinualSession`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import MIRPlugin, RARPlugin, ReplayPlugin
from torch import Tensor

from lightning_lance.avalanche.heads import find_heads, own_name, task_names
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.options import made, takes
from lightning_lance.continual import Capacity, ContinualOptions, ContinualSession
from lightning_lance.errors import LanceWarning, StateError

_REHEARSING = (ReplayPlugin, MIRPlugin, RARPlugin)
"""They train samples of earlier experiences beside new ones. The last two also differentiate every parameter, and most
of the model is frozen."""


@dataclass(frozen=True)
class PluginOptions(ContinualOptions):
    """The options of :class:`LancePlugin`.

    Attributes:
        verbose: print a table of the layers after each experience: what is protected, free, its own, and frozen.
    """

    verbose: bool = True


class LancePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Learn a stream without forgetting, with compressed activations, in any Avalanche strategy and with any optimiser.

    Before an experience the layers are calibrated on a few of its batches and swapped in place for variants that keep
    a low-rank core of their input; after it the model gets its own layers back, and the input directions that they need
    are protected. From the second experience on the weights of shared layers change only outside of them, and what
    cannot be protected in this way is frozen, such as layers of other types. Heads that Avalanche adapts
    (``MultiHeadClassifier``, ``IncrementalClassifier``) are found by themselves; name other heads in ``heads``.

    Method: LANCE (Apolinario & Roy, arXiv 2509.21617). Give it as the first plugin, so that others see the model as it
    is between experiences. Where training fails, call :meth:`restore`, or use
    :class:`~lightning_lance.avalanche.LanceStrategy`, which does it for you.

    Takes the options of :class:`PluginOptions`. Where the model has a head for each task, each has columns,
    biases and norms of its own, and is evaluated with them; elsewhere biases and norms are frozen too.

    Attributes:
        session: the bases and the state of the stream.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """

    @takes(PluginOptions)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        given = made(self, PluginOptions, args, options)
        self.verbose = given.verbose
        self.session = ContinualSession(given, given)
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
