"""Any Avalanche benchmark as a LightningDataModule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_lance.errors import ConfigError
from lightning_lance.streams.loader import ResumableLoader


class AvalancheDataModule(pl.LightningDataModule):
    """The experiences of an Avalanche benchmark, one after the other.

    Batches are ``[inputs, classes, task labels]``. The order of an epoch, and what a transform draws at random, depend
    on ``seed``, the experience, the epoch and the batch alone, and the position in an epoch is part of Lightning's
    checkpoints: a resumed run goes on with the batch that an uninterrupted one would draw.

    Args:
        benchmark: a benchmark with a train and a test stream, such as ``avalanche.benchmarks.SplitMNIST(5)``, or the
            function that makes it, such as ``avalanche.benchmarks.SplitMNIST``.
        arguments: of that function.
        batch_size: training samples per batch and process.
        eval_batch_size: the same in evaluation; ``batch_size`` by default.
        num_workers: processes that draw batches; 0 draws them in the training process.
        drop_last: leave out the last, smaller batch of a training epoch.
        pin_memory: copy batches into pinned memory, for a GPU.
        seed: of the order of the samples and of random transforms.

    Attributes:
        experience: index of the experience that the training loader reads.
        evaluated: indices of the test sets that the test loaders read; ``None``: all.

    Raises:
        ConfigError: an argument is not one of the function's, or what it returns is no benchmark.

    Example::

        data = AvalancheDataModule(SplitMNIST(n_experiences=5), batch_size=64)
        data.experience = 2
        trainer.fit(model, data)
    """

    def __init__(
        self,
        benchmark: Callable[..., Any],
        arguments: dict[str, Any] | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name}={value!r} is not allowed. Allowed: an int of at least {least}.")
        self.benchmark = _benchmark(benchmark, arguments or {})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.seed = seed
        self.experience = 0
        self.evaluated: Sequence[int] | None = None

    @property
    def num_experiences(self) -> int:
        """Length of the stream."""
        return len(self.benchmark.train_stream)

    def train_experience(self, index: int) -> Any:
        """An experience to train on."""
        return self.benchmark.train_stream[index]

    def test_experience(self, index: int) -> Any:
        """A test set."""
        return self.benchmark.test_stream[index]

    @property
    def test_experiences(self) -> list[int]:
        """For each experience, the index of its test set; ``ni_benchmark`` has one test set for all of them."""
        count = len(self.benchmark.test_stream)
        return [min(index, count - 1) for index in range(self.num_experiences)]

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the current experience."""
        found = self.train_experience(self.experience)
        # The experiences must not share an order.
        seed = self.seed * len(self.benchmark.train_stream) + self.experience
        return self._loader(found, found.dataset.train(), self.batch_size, True, seed)

    def val_dataloader(self) -> list[ResumableLoader]:
        """The current experience of the benchmark's validation stream, where it has one."""
        stream = getattr(self.benchmark, "valid_stream", None)
        if stream is None:
            return []
        found = stream[self.experience]
        return [self._loader(found, found.dataset.eval(), self.eval_batch_size)]

    def test_dataloader(self) -> list[ResumableLoader]:
        """A loader for each of the test sets asked for."""
        wanted = range(len(self.benchmark.test_stream)) if self.evaluated is None else self.evaluated
        found = [self.test_experience(index) for index in wanted]
        return [self._loader(experience, experience.dataset.eval(), self.eval_batch_size) for experience in found]

    def _loader(
        self, experience: Any, dataset: Any, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            dataset,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=shuffle and self.drop_last,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate=_Collate(getattr(dataset, "collate_fn", None), _task_label(experience)),
        )


class _Collate:
    """Collates as the dataset does, and adds the task label where samples have none."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None, task_label: int) -> None:
        self.collate = collate or default_collate
        self.task_label = task_label

    def __call__(self, samples: list[Any]) -> list[Tensor]:
        batch = list(self.collate(samples))
        if len(batch) == 2:
            batch.append(torch.full((len(samples),), self.task_label, dtype=torch.int64))
        return batch


def _task_label(experience: Any) -> int:
    labels = getattr(experience, "task_labels", None)
    return int(labels[0]) if labels is not None and len(labels) == 1 else 0


def _benchmark(given: Any, arguments: Mapping[str, Any]) -> Any:
    found = given
    if callable(given) and not hasattr(given, "train_stream"):
        name = getattr(given, "__qualname__", repr(given))
        try:
            inspect.signature(given).bind(**arguments)
        except TypeError as error:
            allowed = ", ".join(inspect.signature(given).parameters) or "none"
            raise ConfigError(f"arguments={dict(arguments)!r}: {error} of {name}. Allowed: {allowed}.") from None
        found = given(**arguments)
    elif arguments:
        raise ConfigError("arguments are those of a function that makes the benchmark, and a benchmark was given.")
    if not (hasattr(found, "train_stream") and hasattr(found, "test_stream")):
        raise ConfigError(
            f"benchmark is a {type(found).__name__}, not a benchmark with a train_stream and a test_stream. Allowed: "
            "such as avalanche.benchmarks.SplitMNIST(5), or the function that makes it."
        )
    trained, tested = len(found.train_stream), len(found.test_stream)
    if not trained or tested not in (1, trained):
        raise ConfigError(
            f"the benchmark has {trained} train and {tested} test experiences. Allowed: at least one to train on, and "
            "as many to test on, or a single test set for all."
        )
    return _with_classes(found)


def _with_classes(benchmark: Any) -> Any:
    """A benchmark whose experiences know their classes, which dynamic modules need; some functions drop them."""
    if getattr(benchmark.train_stream[0], "classes_in_this_experience", None) is not None:
        return benchmark
    if getattr(benchmark.train_stream[0].dataset, "targets", None) is None:
        return benchmark
    from avalanche.benchmarks import with_classes_timeline

    return with_classes_timeline(benchmark)
