"""What a stream leaves on disk, so that it can go on after a crash at any moment."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_lance.errors import LanceWarning, StateError
from lightning_lance.tensors.files import DamagedFileError, aside_of, is_sealed, load_sealed, save_sealed, write_whole

START = "start.ckpt"
INSIDE = "inside"
MARK = "stream.json"
RESULTS = "results.json"
WRITER = "lightning_lance.streams"

STREAM_STATE_VERSION = 2

_BOUNDARY = re.compile(r"experience_(\d{3,})\.ckpt")
_WITHIN = re.compile(r"step=(\d+)\.ckpt")


class StreamStore:
    """The files of one stream.

    ``start.ckpt`` and ``experience_000.ckpt``, ``experience_001.ckpt``, ... hold the model and all state before the
    first and after each experience; ``inside/`` the newest checkpoint within the running one. Each carries a checksum;
    one that is damaged is passed over, with a warning. ``stream.json`` marks the folder as that of a stream: in a
    folder without it nothing is overwritten or removed, and in one with it nothing but files of these names.

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
        return bool(self._boundaries() or list(self._within()))

    def claim(self) -> None:
        """Mark the folder as that of a stream; made where it is not there.

        Raises:
            StateError: it holds files of the names above that no stream has written. They are left as they are.
        """
        mark = self.root / MARK
        if mark.is_file() and WRITER.encode() in mark.read_bytes():
            return
        names = [START, MARK, RESULTS, "plots/matrix.png", "plots/accuracy.png"]
        found = [path for name in names if (path := self.root / name).exists()]
        found += [*self._boundaries().values(), *self._within()]
        checkpoints = [path for path in found if path.suffix == ".ckpt"]
        if found and not any(_sealed(path) for path in checkpoints):
            for path in checkpoints:
                _refuse_older(path)
            told = ", ".join(str(path.relative_to(self.root)) for path in found[:4])
            raise StateError(
                f"{self.root} holds {told}, which this stream has not written and would overwrite. Give an empty "
                "folder, or one that a stream has made, as root; or move these files away."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps({"written by": WRITER, "version": STREAM_STATE_VERSION}) + "\n")

    def clear(self) -> None:
        """Remove the checkpoints, to begin anew."""
        for path in (self.root / START, *self._boundaries().values()):
            path.unlink(missing_ok=True)
            aside_of(path).unlink(missing_ok=True)
        self.clear_inside()

    def latest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint between two experiences.

        Raises:
            StateError: it is of a version before checksums.
        """
        found = self._boundaries()
        for path in [*(found[experience] for experience in sorted(found, reverse=True)), self.root / START]:
            checkpoint = _read(path)
            if checkpoint is not None:
                return checkpoint
        return None

    def save(self, experience: int, checkpoint: dict[str, Any]) -> None:
        """Write the checkpoint after an experience, and drop those from within it."""
        self.claim()
        save_sealed(self.boundary(experience), checkpoint)
        self.clear_inside()

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of results, whole or not at all; one that says the same stays."""
        text = json.dumps(content, indent=2) + "\n"
        path = self.root / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_whole(path, text)

    def within(self, experience: int) -> Path:
        """The folder of the checkpoints within an experience."""
        return self.root / INSIDE / f"experience_{experience:03d}"

    def inside(self, experience: int) -> Path | None:
        """The newest whole checkpoint within an experience."""
        found = sorted(_steps(self.within(experience)), key=_step, reverse=True)
        return next((path for path in found if _read(path) is not None), None)

    def _boundaries(self) -> dict[int, Path]:
        """Experience -> checkpoint after it."""
        found = {path: _BOUNDARY.fullmatch(path.name) for path in self.root.glob("experience_*.ckpt")}
        return {int(number[1]): path for path, number in found.items() if number is not None}

    def _within(self) -> Iterator[Path]:
        """All checkpoints within experiences."""
        for folder in sorted(self.root.glob(f"{INSIDE}/experience_*")):
            yield from _steps(folder)

    def clear_inside(self) -> None:
        """Remove the checkpoints within experiences, and the folders that are empty then."""
        folders = sorted(self.root.glob(f"{INSIDE}/experience_*"))
        for folder in folders:
            for path in [*_steps(folder), *folder.glob(".step=*.ckpt.part")]:
                path.unlink(missing_ok=True)
        for folder in (*folders, self.root / INSIDE):
            with contextlib.suppress(OSError):  # not there, or it holds something else
                folder.rmdir()


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step=*.ckpt") if _WITHIN.fullmatch(path.name)]


def _step(path: Path) -> int:
    number = _WITHIN.fullmatch(path.name)
    return int(number[1]) if number else -1


def _sealed(path: Path) -> bool:
    try:
        return is_sealed(path)
    except OSError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = load_sealed(path)
    except Exception as error:
        if isinstance(error, DamagedFileError):
            _refuse_older(path)
        warnings.warn(f"{path} is damaged ({_why(error)}); an earlier checkpoint is used.", LanceWarning, 2)
        return None
    return found


def _why(error: Exception) -> str:
    return "its checksum differs" if isinstance(error, DamagedFileError) else f"{type(error).__name__}"


def _refuse_older(path: Path) -> None:
    """Refuse a whole checkpoint of a stream that a version before checksums has written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment or archive.testzip() is not None:
                return
        found = torch.load(path, map_location="cpu", weights_only=True)
        version = found["stream"]["version"]
    except Exception:
        return
    if isinstance(version, int) and version < STREAM_STATE_VERSION:
        check_version(found["stream"], path.parent)


def check_version(stream: Any, root: Path) -> None:
    """Refuse what a stream of another version has stored of itself.

    Raises:
        StateError: its version is another, or it has none.
    """
    version = stream.get("version") if isinstance(stream, dict) else None
    if version != STREAM_STATE_VERSION:
        raise StateError(
            f"{root} holds a stream of version {version!r}; this package reads version {STREAM_STATE_VERSION}. Go on "
            "with the version of the package that wrote it, or give another root."
        )


class InsideCheckpoint(Checkpoint):
    """Checkpoints every so many optimiser steps, never at the last batch of an epoch.

    There the epoch's end is still to come, and a run resumed from there would leave it out.

    Args:
        folder: for the files; the newest one is kept.
        every: optimiser steps between two of them.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every
        self._saved_at = 0
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # Gradients that are being accumulated are not part of a checkpoint.
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        if not stepped or trainer.is_last_batch or trainer.should_stop:
            return
        if self._seen - self._saved_at < self.every or self._seen == trainer.max_steps:
            return
        self._saved_at = self._seen
        path = self.folder / f"step={self._seen}.ckpt"
        with _sealing(trainer):
            trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for other in _steps(self.folder):
                if other != path:
                    other.unlink(missing_ok=True)


class _SealedIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, with a checksum."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_sealed(path, checkpoint)


@contextlib.contextmanager
def _sealing(trainer: pl.Trainer) -> Iterator[None]:
    """Context in which checkpoints are ours: a plugin of the user's may write later, or in another form."""
    strategy = trainer.strategy
    own, strategy.checkpoint_io = strategy.checkpoint_io, _SealedIO()
    try:
        yield
    finally:
        strategy.checkpoint_io = own


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
