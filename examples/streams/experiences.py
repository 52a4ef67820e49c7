"""From tensors to an Avalanche benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

Experience = tuple[Tensor, Tensor]
"""Inputs `(n, *shape)` and labels `(n,)`."""


def benchmark(train: Sequence[Experience], test: Sequence[Experience], multi_head: bool = True) -> Any:
    """An Avalanche benchmark with a train and a test stream.

    Args:
        train: training data of each experience.
        test: test data of each experience.
        multi_head: experience `t` has task label `t`, and its labels are counted from 0; otherwise every experience
            has task label 0 and keeps its labels.

    Returns:
        A scenario whose experiences know their classes, as dynamic modules want it.
    """
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

    if len(train) != len(test):
        raise ValueError(f"{len(train)} training and {len(test)} test experiences; give one of each per experience.")
    streams: dict[str, list[Any]] = {"train": [], "test": []}
    for task, parts in enumerate(zip(train, test, strict=True)):
        classes = parts[0][1].unique()
        for name, (inputs, labels) in zip(streams, parts, strict=True):
            if not set(labels.tolist()) <= set(classes.tolist()):
                raise ValueError(f"experience {task} has classes in its {name} set that its training set lacks")
            known = (labels[:, None] == classes).int().argmax(1) if multi_head else labels
            # as_taskaware_classification_dataset takes no task labels.
            streams[name].append(
                _make_taskaware_classification_dataset(
                    TensorDataset(inputs, known), task_labels=task if multi_head else 0, targets=known.tolist()
                )
            )
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))
