"""The strategy: Avalanche's supervised template with the plugin in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from avalanche.core import BasePlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from lightning_lance.avalanche.plugin import LancePlugin
from lightning_lance.compression.config import Layers, Rank


class LanceStrategy(SupervisedTemplate):  # type: ignore[misc]
    """Learn a stream without forgetting, with compressed activations: ``LanceStrategy(model=..., optimizer=...)``.

    Takes the arguments of Avalanche's own strategies (``criterion``, ``train_mb_size``, ``train_epochs``,
    ``eval_mb_size``, ``device``, ``plugins``, ``evaluator``, ``eval_every``, ``peval_mode``) and those of
    :class:`~lightning_lance.avalanche.LancePlugin`. After an error in :meth:`train` the model has its own layers back.

    Args:
        model: the model.
        optimizer: any optimiser of the model's parameters.
        plugins: further plugins, which come after ours; the list is not changed.
        rank: see :class:`~lightning_lance.avalanche.LancePlugin`, as all that follow.
        batch: ``"unbiased"``, ``"projected"`` or ``"learned"``.
        bits: of each element of what is kept.
        layers: which layers keep a compressed input.
        memory_budget: bytes for the cores and factors of all compressed layers.
        calibration_batches: batches that define the subspaces of an experience.
        seed: seed of the random sample orders.
        rule: which directions an experience may move and what is stored afterwards.
        threshold: fraction of an experience's input energy that is protected after it, or ``"auto"``.
        threshold_growth: added to the threshold after each experience.
        columns: fraction of the protected weights that an experience may have as columns of its own.
        reserved: directions that an experience may change: ``"full"``, ``"threshold"``, an int or a float.
        damping: of steps in directions that are not protected: ``"auto"``, or a number, 0 for none.
        freeze_above: fraction of a layer's directions from which on its weight is frozen.
        feature_side: ``"patch"`` or ``"channel"``.
        heads: name patterns of modules that train freely and are not protected.
        verbose: print a table of the layers after each experience.
        skip: kinds of layers whose input is not projected, see :class:`~lightning_lance.LanceConfig`.
        calibration: mode of the forward passes that define the subspaces, see :class:`~lightning_lance.LanceConfig`.
        compress_first: whether inputs are projected in the first experience too.
        preset: ``"published"``: the method as its authors have it.
        base_kwargs: all other arguments of :class:`avalanche.training.templates.SupervisedTemplate`.

    Attributes:
        lance: the plugin.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        plugins: Sequence[BasePlugin] | None = None,
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
        **base_kwargs: Any,
    ) -> None:
        lance = LancePlugin(
            rank=rank,
            batch=batch,
            bits=bits,
            layers=layers,
            memory_budget=memory_budget,
            calibration_batches=calibration_batches,
            seed=seed,
            rule=rule,
            threshold=threshold,
            threshold_growth=threshold_growth,
            columns=columns,
            reserved=reserved,
            damping=damping,
            freeze_above=freeze_above,
            feature_side=feature_side,
            heads=heads,
            verbose=verbose,
            skip=skip,
            calibration=calibration,
            compress_first=compress_first,
            preset=preset,
        )
        super().__init__(model=model, optimizer=optimizer, plugins=[lance, *(plugins or ())], **base_kwargs)

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
