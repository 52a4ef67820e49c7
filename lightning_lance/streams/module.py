"""A LightningModule for classification streams, and how task labels reach a network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_lance.errors import ConfigError


def takes_task_labels(module: nn.Module) -> bool:
    """Whether ``forward`` wants task labels beside the inputs: a second argument without a default, or so named."""
    if isinstance(module, MultiTaskModule):
        return True
    function = getattr(module.forward, "__func__", None)
    return _wants_two(module.forward, 0) if function is None else _wants_two(function, 1)


@functools.cache
def _wants_two(function: Callable[..., Any], own: int) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds][own:]
    return len(found) > 1 and (found[1].default is inspect.Parameter.empty or "task" in found[1].name)


def call_network(network: nn.Module, inputs: Tensor, task_labels: Tensor) -> Tensor:
    """Outputs of a network that may or may not take task labels, shape ``(B, C)``."""
    if not takes_task_labels(network):
        return network(inputs)  # type: ignore[no-any-return]
    labels: Tensor | int = task_labels
    if isinstance(network, MultiTaskModule) and torch.is_autocast_enabled(inputs.device.type):
        # Avalanche collects the outputs of several tasks in float32, which fails under autocast; one task is direct.
        tasks = set(task_labels.tolist())
        if len(tasks) == 1:
            labels = int(tasks.pop())
    return network(inputs, labels)  # type: ignore[no-any-return]


class TaskHeads(MultiTaskModule):  # type: ignore[misc]
    """A network whose classifier becomes one linear head for each task, made as the tasks arrive.

    Args:
        network: any network.
        classifier: name of its last linear layer, such as ``"fc"`` or ``"classifier.1"``.

    Raises:
        ConfigError: there is no linear layer of that name.
    """

    def __init__(self, network: nn.Module, classifier: str) -> None:
        super().__init__()
        found = dict(network.named_modules()).get(classifier)
        if not isinstance(found, nn.Linear):
            linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
            what = "is not there" if found is None else f"is a {type(found).__name__}"
            raise ConfigError(
                f"task_heads={classifier!r} {what} in {type(network).__name__}. Allowed: the name of its last linear "
                f"layer, one of {', '.join(linear) or 'none'}."
            )
        parent, _, name = classifier.rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
        self.trunk = network
        # Masking fails on classes given as sets. A head has an output for each class up to the highest of its task.
        self.classifier = MultiHeadClassifier(found.in_features, masking=False)

    def forward(self, inputs: Tensor, task_labels: Tensor | int) -> Tensor:
        return self.classifier(self.trunk(inputs), task_labels)  # type: ignore[no-any-return]


class ContinualClassifier(pl.LightningModule):
    """Classification by cross-entropy, of batches ``[inputs, classes, task labels]``.

    Args:
        network: maps inputs, or inputs and task labels, to one score for each class. Avalanche's dynamic modules are
            adapted to each experience.
        task_heads: name of the network's last linear layer, which then becomes one head for each task; by default the
            network is used as it is.
        optimizer: makes the optimiser of each experience from the parameters; SGD with a learning rate of 0.05 by
            default.
        lr_scheduler: makes a scheduler from the optimiser, stepped after each epoch; one of the kind of
            ``ReduceLROnPlateau`` is given the value of ``monitor``.
        monitor: what such a scheduler looks at: ``"epoch_loss"``, the mean over the training batches, or
            ``"val_loss"``, where there are validation batches.

    Raises:
        ConfigError: ``task_heads`` names no linear layer.
    """

    def __init__(
        self,
        network: nn.Module,
        task_heads: str | None = None,
        # No optimiser as the default: the command line would keep its arguments for any other one that is asked for.
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        monitor: str = "epoch_loss",
    ) -> None:
        super().__init__()
        self.network = network if task_heads is None else TaskHeads(network, task_heads)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.monitor = monitor
        self._plateau = False

    def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
        return call_network(self.network, inputs, task_labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss, prog_bar=True)
        if self._plateau:
            self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def _loss(self, batch: list[Tensor]) -> Tensor:
        inputs, classes, task_labels = batch
        return F.cross_entropy(self(inputs, task_labels), classes)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05) if self.optimizer is None else self.optimizer(trained)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._plateau = isinstance(scheduler, ReduceLROnPlateau)
        if self._plateau:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}
        return [optimizer], [scheduler]
