"""Export after training: a torch.export program and a checkpoint that need no lightning_lance.

Run it with `python -m examples.export`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from examples.own_module import Digits, loaders
from lightning_lance import LanceCallback, is_swapped


def main(arguments: Sequence[str] | None = None) -> Path:
    """Returns the folder with `digits.pt2` and `digits.pt`."""
    options = parser().parse_args(arguments)
    L.seed_everything(0, verbose=False)
    module = Digits()
    trainer = L.Trainer(
        max_steps=options.steps,
        callbacks=[
            LanceCallback(rank={"batch": "compact", "spatial": "compact"}, calibration_batches=2, verbose=False)
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(module, *loaders())
    network = module.net.eval()
    assert not is_swapped(network)  # stock layers again
    options.folder.mkdir(parents=True, exist_ok=True)
    images = torch.randn(4, 1, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, options.folder / "digits.pt2")
    torch.save(network.state_dict(), options.folder / "digits.pt")
    loaded = torch.export.load(options.folder / "digits.pt2").module()
    torch.testing.assert_close(loaded(images), network(images))
    print(f"{options.folder / 'digits.pt2'} computes the same as the network")
    return options.folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train with LANCE and export the network.")
    result.add_argument("--steps", type=int, default=50)
    result.add_argument("--folder", type=Path, default=Path("runs/export"))
    return result


if __name__ == "__main__":
    main()
