"""The strategy: Avalanche's supervised template with the plugin in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from avalanche.core import BasePlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from lightning_lance.avalanche.plugin import LancePlugin, PluginOptions
from lightning_lance.compression.options import also_takes


class LanceStrategy(SupervisedTemplate):  # type: ignore[misc]
    """Learn a stream without forgetting, with compressed activations: ``LanceStrategy(model=..., optimizer=...)``.

    Takes the arguments of Avalanche's own strategies (``criterion``, ``train_mb_size``, ``train_epochs``,
    ``eval_mb_size``, ``device``, ``plugins``, ``evaluator``, ``eval_every``, ``peval_mode``) and those of
    :class:`~lightning_lance.avalanche.LancePlugin`. After an error in :meth:`train` the model has its own layers back.

    Args:
        model: the model.
        optimizer: any optimiser of the model's parameters.
        plugins: further plugins, which come after ours; the list is not changed.
        kwargs: the options of the plugin, and all other arguments of
            :class:`avalanche.training.templates.SupervisedTemplate`.

    Attributes:
        lance: the plugin.
    """

    @also_takes(PluginOptions)
    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        plugins: Sequence[BasePlugin] | None = None,
        **kwargs: Any,
    ) -> None:
        ours = {field.name for field in fields(PluginOptions)}
        lance = LancePlugin(**{name: kwargs.pop(name) for name in ours & kwargs.keys()})
        super().__init__(model=model, optimizer=optimizer, plugins=[lance, *(plugins or ())], **kwargs)

    @property
    def lance(self) -> LancePlugin:
        """The plugin."""
        return next(plugin for plugin in self.plugins if isinstance(plugin, LancePlugin))

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """See :meth:`avalanche.training.templates.SupervisedTemplate.train`."""
        try:
            return super().train(experiences, eval_streams, **kwargs)
        finally:
            self.lance.restore()
