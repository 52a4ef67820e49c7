"""Look at the next batches of a running fit and put them back."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class _Replay:
    """Gives back what was taken, then hands the original iterator back to its owner.

    ``itertools.chain`` would call ``iter`` on Lightning's combined loader and restart it.

    Attributes:
        positions: for each batch that waits here, the states of stateful loaders before it was taken.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._original = owner.iterator
        self._taken: list[Any] = []
        self._exhausted = False
        self.positions: list[Any] = []

    def take(self, position: Any) -> bool:
        """Take one batch from the original iterator; whether there was one."""
        try:
            self._taken.append(next(self._original))
        except StopIteration:
            self._exhausted = True
            return False
        self.positions.append(position)
        return True

    @property
    def waiting(self) -> list[Any]:
        """What was taken and not given back yet."""
        return list(self._taken)

    def __iter__(self) -> _Replay:
        return self

    def __next__(self) -> Any:
        if self._taken:
            self.positions.pop(0)
            return self._taken.pop(0)
        if self._owner.iterator is self:
            self._owner.iterator = self._original
        if self._exhausted:
            raise StopIteration
        return next(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def peek(trainer: pl.Trainer, count: int, batch_idx: int) -> list[Any] | None:
    """The next batches of the running epoch, as the loader gave them; none is lost.

    Args:
        trainer: inside ``on_train_batch_start``.
        count: how many; fewer where the epoch ends before.
        batch_idx: index of the current batch in its epoch.

    Returns:
        The batches, not moved to a device, or ``None`` where this Trainer does not allow it.
    """
    fetcher: Any = getattr(trainer.fit_loop, "_data_fetcher", None)
    if getattr(fetcher, "iterator", None) is None or uses_dataloader_iter(trainer):
        return None
    waiting = list(getattr(fetcher, "batches", []))
    count = int(min(count, trainer.num_training_batches - batch_idx - 1))
    replay = fetcher.iterator if isinstance(fetcher.iterator, _Replay) else _Replay(fetcher)
    waiting += replay.waiting
    while len(waiting) < count and replay.take(_loader_states(trainer)):
        waiting.append(replay.waiting[-1])
    if replay.waiting:
        fetcher.iterator = replay
    return [item[0] for item in waiting[: max(count, 0)]]


def uses_dataloader_iter(trainer: pl.Trainer) -> bool:
    """Whether ``training_step`` pulls its batches itself (``dataloader_iter``)."""
    return type(getattr(trainer.fit_loop, "_data_fetcher", None)).__name__ == "_DataLoaderIterDataFetcher"


def rewind_loaders(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Correct the states of stateful loaders in a checkpoint, which are ahead by the batches taken.

    Args:
        trainer: the running Trainer.
        checkpoint: as ``on_save_checkpoint`` gets it.
    """
    iterator = getattr(getattr(trainer.fit_loop, "_data_fetcher", None), "iterator", None)
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    if isinstance(iterator, _Replay) and iterator.positions and "combined_loader" in loop:
        loop["combined_loader"] = iterator.positions[0]


def _loader_states(trainer: pl.Trainer) -> Any:
    loader: Any = getattr(trainer.fit_loop, "_combined_loader", None)
    return loader._state_dicts() if hasattr(loader, "_state_dicts") else []


def prepare(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A raw batch as ``training_step`` gets it: converted, transferred, and a copy."""
    batch = copied(batch)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def copied(batch: Any) -> Any:
    """A batch whose tensors may be edited in place without harm."""
    return apply_to_collection(batch, Tensor, torch.clone)
