"""Avalanche's training loop with LanceStrategy, next to one that forgets.

Run it with `python -m examples.continual_strategy`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from examples.models.multi_head import MultiHead
from examples.models.small import mlp_trunk
from examples.streams.digits import rotated_digits
from lightning_lance.avalanche import LanceStrategy

STRATEGIES = {"naive": Naive, "LANCE": LanceStrategy}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the accuracy over all experiences at the end, for each strategy."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="No loggers specified")
    accuracies = {}
    for name, strategy_class in STRATEGIES.items():
        torch.manual_seed(0)
        # The ten digits, turned further in each experience; a head for each.
        benchmark = rotated_digits(options.experiences, train_size=options.images, test_size=500)
        model = MultiHead(mlp_trunk(), features=100)
        strategy = strategy_class(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=32,
            train_epochs=options.epochs,
            evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
        )
        for experience in benchmark.train_stream:
            strategy.train(experience)
        metrics = strategy.eval(benchmark.test_stream)
        accuracies[name] = next(value for key, value in metrics.items() if key.startswith("Top1_Acc_Stream"))
    for name, accuracy in accuracies.items():
        print(f"{name}: accuracy over all experiences {accuracy:.3f}")
    return accuracies


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Learn one task after another with Avalanche.")
    result.add_argument("--experiences", type=int, default=6)
    result.add_argument("--epochs", type=int, default=4)
    result.add_argument("--images", type=int, default=2000, help="of each experience")
    return result


if __name__ == "__main__":
    main()
