"""A loop without a Trainer, with a checkpoint in the middle from which the second half is trained again.

Run it with `python -m examples.plain_loop`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lance import LanceConfig, LanceSession


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))


class Training:
    """What a run consists of: a model, its optimiser, and a session of LANCE."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.session = LanceSession(self.model, LanceConfig(bits=4))
        self.session.start()

    def steps(self, numbers: Iterable[int], inputs: Tensor, labels: Tensor) -> float:
        """Take these steps; the last loss."""
        loss = torch.tensor(torch.nan)
        for number in numbers:
            batch = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(number))[:64]
            with self.session.step():  # the forward pass and the loss
                loss = F.cross_entropy(self.model(inputs[batch]), labels[batch])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def save(self, path: Path) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "lance": self.session}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    def load(self, path: Path) -> None:
        stored = torch.load(path, weights_only=True)
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.session.load_state_dict(stored["lance"])


def main(arguments: Sequence[str] | None = None) -> float:
    """Returns the last loss."""
    options = parser().parse_args(arguments)
    torch.manual_seed(0)
    inputs, labels = torch.randn(512, 64), torch.randint(0, 8, (512,))
    half = options.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "half_way.pt")
        whole = Training()
        whole.steps(range(half), inputs, labels)
        whole.save(path)
        loss = whole.steps(range(half, options.steps), inputs, labels)
        whole.session.stop()  # the model has its own classes again
        print(whole.session.report)
        print(f"loss {loss:.3f}")

        resumed = Training()
        resumed.load(path)
    again = resumed.steps(range(half, options.steps), inputs, labels)
    resumed.session.stop()
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print(f"loss {again:.3f} from the checkpoint, weights {'bit for bit the same' if same else 'are others'}")
    return loss


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="A training loop of one's own with LANCE.")
    result.add_argument("--steps", type=int, default=200)
    return result


if __name__ == "__main__":
    main()
