"""DDP on two processes of the CPU.

Run it with `python -m examples.two_processes`.

The statistics that define subspaces are summed over the processes, so that all of them work in the same ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.own_module import Digits
from lightning_lance import LanceCallback


def main(arguments: Sequence[str] | None = None) -> L.Trainer:
    """Returns the Trainer of this process."""
    options = parser().parse_args(arguments)
    L.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
    trainer = L.Trainer(
        max_steps=options.steps,
        limit_val_batches=0,  # random data is nothing to validate on
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[LanceCallback(rank={"batch": "compact", "spatial": "compact"}, calibration_batches=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=32))
    print(f"process {trainer.global_rank} of {trainer.world_size} took {trainer.global_step} steps")
    return trainer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train with LANCE on two processes.")
    result.add_argument("--steps", type=int, default=8)
    return result


if __name__ == "__main__":
    main()
