"""What a stream leaves on disk, so that it can go on after a crash at any moment."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lance.errors import LanceWarning, StateError

START = "start.ckpt"
INSIDE = "inside"


class StreamStore:
    """The files of one stream.

    ``start.ckpt`` and ``experience_000.ckpt``, ``experience_001.ckpt``, ... hold the model and all state before the
    first and after each experience; ``inside/`` the checkpoints within the running one. A file that is there is whole;
    one that is not readable is passed over.

    Args:
        root: folder of the stream.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def boundary(self, experience: int) -> Path:
        """Checkpoint after an experience, -1 for the one before the first."""
        return self.root / (START if experience < 0 else f"experience_{experience:03d}.ckpt")

    def trained(self) -> bool:
        """Whether there is a checkpoint with any training in it."""
        found = (self.root.glob("experience_[0-9]*.ckpt"), self.root.glob(f"{INSIDE}/*/*/step=*.ckpt"))
        return any(True for paths in found for _ in paths)

    def clear(self) -> None:
        """Remove the checkpoints, to begin anew."""
        for path in (self.root / START, *self.root.glob("experience_*.ckpt")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.root / INSIDE, ignore_errors=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest readable checkpoint between two experiences."""
        done = [int(path.stem.rpartition("_")[2]) for path in self.root.glob("experience_[0-9]*.ckpt")]
        for experience in [*sorted(done, reverse=True), -1]:
            found = _read(self.boundary(experience))
            if found is not None:
                return found
        return None

    def save(self, experience: int, checkpoint: dict[str, Any]) -> None:
        """Write the checkpoint after an experience, and drop those from within it."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.boundary(experience)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        shutil.rmtree(self.root / INSIDE, ignore_errors=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of results, whole or not at all."""
        self.root.mkdir(parents=True, exist_ok=True)
        part = self.root / f"{name}.part"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.root / name)

    def inside(self, experience: int) -> Path | None:
        """The newest readable checkpoint within an experience."""
        folder = self.root / INSIDE / f"experience_{experience:03d}"
        found = sorted(folder.glob("*/step=*.ckpt"), key=_step, reverse=True)
        return next((path for path in found if _read(path) is not None), None)

    def attempt(self, experience: int) -> Path:
        """A new folder for the checkpoints within an experience."""
        folder = self.root / INSIDE / f"experience_{experience:03d}"
        count = len(list(folder.glob("*"))) if folder.is_dir() else 0
        return folder / f"attempt_{count:03d}"


def _step(path: Path) -> int:
    number = re.search(r"step=(\d+)", path.name)
    return int(number[1]) if number else -1


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        warnings.warn(f"{path} cannot be read ({type(error).__name__}); an earlier one is used.", LanceWarning, 2)
        return None
    return found


class InsideCheckpoint(ModelCheckpoint):
    """Checkpoints every so many optimiser steps, never at the last batch of an epoch.

    There the epoch's end is still to come, and a run resumed from there would leave it out.

    Args:
        folder: for the files; the newest one is kept.
        every: optimiser steps between two of them.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="{step}",
            save_top_k=1,
            every_n_train_steps=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every = every
        self._saved_at = 0
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients that are being accumulated are not part of a checkpoint.
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        if not stepped or trainer.is_last_batch or trainer.should_stop:
            return
        if self._seen - self._saved_at < self.every or self._seen == trainer.max_steps:
            return
        self._saved_at = self._seen
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The files of an earlier attempt are not this one's."""


def check_same(stored: dict[str, Any], asked: dict[str, Any], root: Path) -> None:
    """Refuse to continue another stream.

    Raises:
        StateError: the stored description differs.
    """
    differing = [name for name in asked if stored.get(name) != asked[name]]
    if differing:
        told = ", ".join(f"{name} {stored.get(name)!r} there, {asked[name]!r} asked for" for name in differing)
        raise StateError(
            f"{root} holds a stream that was begun with other settings: {told}. Give the same ones, another root, or "
            "restart=True to begin anew."
        )


@contextlib.contextmanager
def said_once() -> Any:
    """Leave out what a Trainer for each experience would say again and again."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(logging.WARNING, level))
    try:
        with warnings.catch_warnings():
            for text in (
                ".*does not have many workers.*",
                ".*smaller than the logging interval.*",
                ".*Total length of `list` across ranks is zero.*",  # a stream without a validation stream
                ".*You defined a `validation_step` but have no `val_dataloader`.*",
                ".*You passed in a `val_dataloader` but have no `validation_step`.*",
            ):
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        logger.setLevel(level)
