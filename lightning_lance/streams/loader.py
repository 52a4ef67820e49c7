"""Batches that depend on a seed, the epoch and their index alone: a loader that can go on in the middle of an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

_WORD = 2**63


class _Indices(list[int]):
    """Indices of one batch, and the seed of what is random in its samples."""

    seed = 0


class _Seeded(Dataset[Any]):
    """Draws the samples of a batch under the batch's own random state."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: _Indices) -> list[Any]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            random.seed(indices.seed)
            np.random.seed(indices.seed % 2**32)  # noqa: NPY002 - what a user's transform draws from
            torch.manual_seed(indices.seed)
            return [self.dataset[index] for index in indices]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


class _Epoch:
    """What Lightning tells the number of the epoch."""

    def __init__(self) -> None:
        self.value = 0

    def set_epoch(self, epoch: int) -> None:
        self.value = epoch


class ResumableLoader:
    """A data loader whose position is part of Lightning's checkpoints.

    The order of the samples and the random numbers of their transforms are functions of the seed, the epoch and the
    index of the batch, whatever is drawn elsewhere and however many workers there are. No global random state changes.

    Args:
        dataset: a map-style dataset.
        batch_size: samples per batch and process.
        shuffle: draw a new order for each epoch; then each process gets as many batches, the first samples of the
            order filling up. Without, the samples are dealt out and none is seen twice.
        seed: of the order and the transforms.
        drop_last: leave out the last, smaller batch.
        rank: number of this process.
        world_size: number of processes.
        num_workers: processes that draw batches.
        pin_memory: copy batches into pinned memory.
        collate: makes a batch of a list of samples.

    Attributes:
        sampler: takes the number of the epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": collate}
        self.sampler = _Epoch()
        self.batch_sampler = None  # Lightning asks for it where there is a sampler
        self._epoch = 0
        self._batch = 0
        self._start: tuple[int, int] | None = None

    def __len__(self) -> int:
        share = self._share()
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def _share(self) -> int:
        count = len(self.dataset)
        if self.shuffle:
            return -(-count // self.world_size)
        return len(range(self.rank, count, self.world_size))

    def __iter__(self) -> Iterator[Any]:
        # Nothing runs before the first batch is asked for: the epoch is set after the iterator is made.
        self._epoch, self._batch = self.sampler.value, 0
        if self._start is not None:
            epoch, batch = self._start
            self._start = None
            self._batch = batch if epoch == self._epoch else 0
        batches = self._batches(self._epoch)[self._batch :]
        for batch in DataLoader(
            _Seeded(self.dataset),
            batch_sampler=batches,
            generator=torch.Generator().manual_seed(self._mixed(self._epoch, 1)),
            **self.options,
        ):
            self._batch += 1
            yield batch

    def _mixed(self, epoch: int, stream: int) -> int:
        """A seed for each epoch, and for each of its streams of random numbers."""
        words = np.random.SeedSequence([self.seed % _WORD, epoch, stream]).generate_state(1, np.uint64)
        return int(words[0]) % _WORD

    def _batches(self, epoch: int) -> Sequence[_Indices]:
        count = len(self.dataset)
        order = list(range(count))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self._mixed(epoch, 0))
            order = torch.randperm(count, generator=generator).tolist()
            order += [order[index % count] for index in range(-count % self.world_size)]
        mine = order[self.rank :: self.world_size]
        first = self._mixed(epoch, 2 + self.rank)
        batches = []
        for number in range(len(self)):
            indices = _Indices(mine[number * self.batch_size : (number + 1) * self.batch_size])
            indices.seed = (first + number) % _WORD
            batches.append(indices)
        return batches

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches drawn from it."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where the stored one was, if it is of the same epoch."""
        self._start = (state["epoch"], state["batch"])
