"""Two progress bars: one of the stream, one of the running experience."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm


class StreamBars:
    """The bars, which outlive the Trainers of the experiences.

    Args:
        total: length of the stream.
        done: experiences that are finished already.
        enabled: draw them.
    """

    def __init__(self, total: int, done: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
        self.total = total
        self._stream: Any = None
        self._running: Any = None
        if enabled:
            self._stream = tqdm(total=total, initial=done, desc="stream", unit="experience", position=0, leave=True)

    def clear(self) -> None:
        """Take the bars off the terminal until the next batch, for a table to be printed there."""
        if self._stream is not None:
            self._stream.clear()

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begin the lower bar."""
        self.stop()
        if self.enabled:
            self._stream.refresh()
            self._running = tqdm(total=total or None, initial=done, desc=title, unit="batch", position=1, leave=False)

    def step(self, values: dict[str, Any] | None = None) -> None:
        """One batch."""
        if self._running is not None:
            if values:
                self._running.set_postfix(values, refresh=False)
            self._running.update()

    def stop(self) -> None:
        """End the lower bar."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def advance(self, values: dict[str, str]) -> None:
        """One experience."""
        if self._stream is not None:
            self._stream.set_postfix(values, refresh=False)
            self._stream.update()

    def close(self) -> None:
        """End both."""
        self.stop()
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class ExperienceProgress(ProgressBar):
    """Moves the lower bar in the place of Lightning's own.

    Args:
        bars: the bars.
        title: what the Trainer does.
    """

    def __init__(self, bars: StreamBars, title: str) -> None:
        super().__init__()
        self.bars = bars
        self.title = title
        self._on = True
        self._begun = False

    def disable(self) -> None:
        self._on = False

    def enable(self) -> None:
        self._on = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._begun:  # at the first batch, callbacks may print tables before this one
            return
        self._begun = True
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        known = batches != float("inf") and epochs is not None and epochs > 0
        if self._on:
            total = int(batches) * int(epochs or 0) if known else 0
            self.bars.start(self.title, total, trainer.fit_loop.total_batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._on:
            metrics = self.get_metrics(trainer, pl_module)
            self.bars.step({name: value for name, value in metrics.items() if name != "v_num"})

    def on_train_end(self, *_: Any) -> None:
        self.bars.stop()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._on:
            batches = sum(trainer.num_test_batches)
            self.bars.start(self.title, int(batches) if batches != float("inf") else 0)

    def on_test_batch_end(self, *_: Any) -> None:
        if self._on:
            self.bars.step()

    def on_test_end(self, *_: Any) -> None:
        self.bars.stop()

    def on_exception(self, *_: Any) -> None:
        self.bars.close()
