"""The options of a run, left in its folder; a file of the user's is never written to."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_lance.errors import LanceWarning
from lightning_lance.tensors.files import write_whole

CONFIG = "config.yaml"
CONFIG_BESIDE = "config_as_run.yaml"
"""Where ``config.yaml`` is a file of the user's."""

HEAD = "# the options as they were run, written anew by each run in this folder unless edited: "
"""First line of both, before a checksum of the rest."""


def save_config(folder: Path, text: str) -> None:
    """Leave the options in a folder; a file that was not written by this function, or was edited, stays."""
    content = _with_head(text.encode())
    for path in (folder / CONFIG, folder / CONFIG_BESIDE):
        if not path.exists() or _is_as_written(path):
            if not path.exists() or path.read_bytes() != content:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            return
    warnings.warn(
        f"{folder} holds {CONFIG} and {CONFIG_BESIDE}, which are not as this command wrote them. They are left, and "
        "the options of this run are not written there. Move one of them away to have that.",
        LanceWarning,
        stacklevel=2,
    )


def saved_config(folder: Path) -> Path | None:
    """The file with the options of the run in a folder; where none is as it was written, the user's."""
    paths = [path for path in (folder / CONFIG, folder / CONFIG_BESIDE) if path.is_file()]
    return next(filter(_is_as_written, paths), paths[0] if paths else None)


def _is_as_written(path: Path) -> bool:
    found = path.read_bytes()
    return found == _with_head(found.partition(b"\n")[2])


def _with_head(text: bytes) -> bytes:
    return f"{HEAD}{hashlib.blake2b(text, digest_size=8).hexdigest()}\n".encode() + text


class SaveConfig(SaveConfigCallback):
    """Saves the options where the logger writes, or in a ``default_root_dir`` that is given."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # asked of all processes, since it is the first one's
        if folder is None:  # a logger without one
            return
        if "://" in folder:  # no folder of this machine
            super().setup(trainer, pl_module, stage)
        elif trainer.is_global_zero and not (trainer.logger is None and Path(folder).resolve() == Path.cwd()):
            save_config(Path(folder), self.parser.dump(self.config, skip_none=False))
