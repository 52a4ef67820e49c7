"""Tiny streams, networks and strategies for the tests."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark, tensors_benchmark, with_classes_timeline
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

CLASSES = 6
EPOCHS = 8
BATCHES = 2


def images(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of six prototypes."""
    prototypes = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % CLASSES
    return prototypes[targets] + 0.3 * torch.randn(size, 3, 8, 8, generator=generator), targets


def class_stream(task_labels: bool = True) -> Any:
    """Three experiences of two classes each."""
    train, test = (_make_taskaware_tensor_classification_dataset(*images(size, size)) for size in (120, 60))
    return nc_benchmark(
        train,
        test,
        n_experiences=3,
        task_labels=task_labels,
        shuffle=False,
        class_ids_from_zero_in_each_exp=task_labels,
    )


def domain_stream() -> Any:
    """Three experiences of the same classes, with permuted pixels."""
    parts: dict[str, list[Any]] = {"train_tensors": [], "test_tensors": []}
    for experience in range(3):
        order = torch.randperm(3 * 8 * 8, generator=torch.Generator().manual_seed(experience))
        for key, size in (("train_tensors", 120), ("test_tensors", 60)):
            inputs, targets = images(size, size)
            parts[key].append((inputs.flatten(1)[:, order].reshape(inputs.shape), targets))
    return with_classes_timeline(tensors_benchmark(**parts, task_labels=[0, 0, 0]))


def body() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Dropout(0.1),
    )


class MultiHead(MultiTaskModule):  # type: ignore[misc]
    """A shared body and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = body(), MultiHeadClassifier(32)

    def forward(self, inputs: Tensor, task_labels: Any) -> Tensor:
        return self.classifier(self.body(inputs), task_labels)


class Growing(nn.Module):
    """One classifier that grows with the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = body(), IncrementalClassifier(32)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.body(inputs))


class Plain(nn.Module):
    """A plain linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = body(), nn.Linear(32, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.body(inputs))


def evaluator(*loggers: Any) -> EvaluationPlugin:
    return EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=list(loggers))


def settings(model: nn.Module, **more: Any) -> dict[str, Any]:
    """Arguments that every strategy takes."""
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05),
        "train_mb_size": 20,
        "eval_mb_size": 30,
        "train_epochs": EPOCHS,
        "evaluator": evaluator(),
        **more,
    }


def accuracies(metrics: dict[str, float]) -> list[float]:
    """Accuracy of each experience of the test stream."""
    return [value for key, value in sorted(metrics.items()) if "Acc_Exp/eval" in key and "test_stream" in key]
