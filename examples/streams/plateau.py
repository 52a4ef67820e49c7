"""Training until a validation loss falls no more, and with the best weights: how the paper learns an experience."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_lance.streams import ContinualClassifier


class PlateauClassifier(ContinualClassifier):
    """A classifier whose learning rate is cut where the validation loss has stopped to fall.

    It logs the learning rate as `lr`: `EarlyStopping(monitor="lr", stopping_threshold=…)` ends an experience.

    Args:
        network: maps inputs and task labels to scores.
        optimizer: makes the optimiser of each experience; SGD with a learning rate of 0.05 by default.
        factor: of the learning rate at each cut.
        patience: epochs without a lower loss before a cut.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        factor: float = 0.5,
        patience: int = 6,
    ) -> None:
        super().__init__(network, None, optimizer)
        self.factor, self.patience = factor, patience

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy of a batch of inputs, classes and task labels."""
        return self._loss(batch)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.optimizers:
            self.log("lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = ReduceLROnPlateau(optimizer, factor=self.factor, patience=self.patience)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class BestWeights(Callback):
    """Ends each fit with the weights of the epoch whose monitored value was lowest.

    It acts at the end of the last epoch, before anything is done with the trained model. List it after an
    `EarlyStopping`, which decides there whether it is the last; a fit that `max_steps` ends keeps its last weights.

    Args:
        monitor: name of the value.

    Attributes:
        best: the lowest value so far.
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self.best = float("inf")
        self._tensors: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            self.best, self._tensors = float("inf"), []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"monitor={self.monitor!r} is not logged. Allowed: one of what is: {known}.")
        trained = self._trained(trainer)
        if float(value) < self.best:
            self.best = float(value)
            self._tensors = [tensor.detach().clone() for tensor in trained]
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if last and len(self._tensors) == len(trained):
            with torch.no_grad():
                for tensor, best in zip(trained, self._tensors, strict=True):
                    tensor.copy_(best)

    @staticmethod
    def _trained(trainer: L.Trainer) -> list[Tensor]:
        """What the optimisers train, which may be parameters that stand in for weights."""
        return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "tensors": [tensor.cpu() for tensor in self._tensors]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self._tensors = state_dict["best"], list(state_dict["tensors"])
