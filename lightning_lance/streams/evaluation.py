"""Accuracy of a model on the test sets of a stream, with any Trainer."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_lance.streams.module import call_network

Predict = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(module, inputs, task labels) -> scores (B, C) or class indices (B,)``."""


class Evaluation(pl.LightningModule):
    """Counts the correct predictions of a model on each test set: ``Trainer().test(Evaluation(model, n), loaders)``.

    Args:
        model: the model.
        sets: number of test sets.
        predict: how the model predicts; by default it is called on the inputs, and on the task labels where its
            ``forward`` takes them.
        select: called with the index of a test set before its first batch.

    Attributes:
        correct: correct predictions on each test set over all processes, shape ``(sets,)``, int64.
        total: samples of each.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: int,
        predict: Predict | None = None,
        select: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.select = select
        self.model = model
        self.predict = predict or call_network
        self.correct = torch.zeros(sets, dtype=torch.int64)
        self.total = torch.zeros(sets, dtype=torch.int64)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            if isinstance(model, pl.LightningModule) and is_overridden(name, model):
                setattr(self, name, getattr(model, name))

    def setup(self, stage: str) -> None:
        if isinstance(self.model, pl.LightningModule):
            self.model.setup(stage)

    def configure_model(self) -> None:
        if isinstance(self.model, pl.LightningModule):
            self.model.configure_model()

    def on_test_start(self) -> None:
        self.correct = torch.zeros_like(self.correct, device=self.device)
        self.total = torch.zeros_like(self.total, device=self.device)

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.select is not None and batch_idx == 0:
            self.select(dataloader_idx)
        inputs, classes, task_labels = batch
        found = self.predict(self.model, inputs, task_labels)
        predicted = found.argmax(1) if found.dim() == 2 else found
        self.correct[dataloader_idx] += (predicted == classes).sum()
        self.total[dataloader_idx] += classes.numel()

    def on_test_end(self) -> None:
        self.correct = self.trainer.strategy.reduce(self.correct, reduce_op="sum").cpu()
        self.total = self.trainer.strategy.reduce(self.total, reduce_op="sum").cpu()
