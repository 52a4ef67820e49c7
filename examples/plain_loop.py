"""A loop without a Trainer, with a checkpoint in the middle.

Run it with `python -m examples.plain_loop`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lightning_lance import LanceConfig, LanceSession


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))


def main(arguments: Sequence[str] | None = None) -> float:
    """Returns the last loss."""
    options = parser().parse_args(arguments)
    torch.manual_seed(0)
    inputs, labels = torch.randn(512, 64), torch.randint(0, 8, (512,))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    path = Path(tempfile.mkdtemp()) / "half_way.pt"
    for step in range(options.steps):
        batch = torch.randperm(512)[:64]
        with session.step():  # the forward pass and the loss
            loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == options.steps // 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lance": session.state_dict()}
            torch.save(state, path)
    session.stop()  # the model has its own classes again
    print(session.report)
    print(f"loss {float(loss):.3f}")

    model = network()
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    stored = torch.load(path, weights_only=True)
    model.load_state_dict(stored["model"])
    session.load_state_dict(stored["lance"])  # goes on bit for bit
    session.stop()
    return float(loss)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="A training loop of one's own with LANCE.")
    result.add_argument("--steps", type=int, default=200)
    return result


if __name__ == "__main__":
    main()
