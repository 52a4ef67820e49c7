"""Streams of experiences on a small network with columns of one's own, and what their checkpoints hold."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import LanceConfig
from lightning_lance.continual import ContinualConfig, ContinualSession

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
EVERY_OPTIMIZER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}
"""Every kind of optimiser; those of the streams below take larger steps."""
EXACT = LanceConfig(rank=None, bits=None)
COLUMNS: dict[str, Any] = {"threshold": 0.8, "columns": 0.05, "freeze_above": 1.0}


class Net(nn.Module):
    """Convolutions, one of them in groups, a norm where one is asked for, and a head for each experience."""

    def __init__(self, norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            *([] if norm is None else [norm()]),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(150, 16),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(4))

    def forward(self, inputs: Tensor, experience: int) -> Tensor:
        result: Tensor = self.heads[experience](self.body(inputs))
        return result


def batch(experience: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * experience + step)
    planes = torch.randn(4, 50, generator=torch.Generator().manual_seed(experience))
    common = torch.randn(3, 50, generator=torch.Generator().manual_seed(77))  # directions that all share
    found = torch.randn(24, 7, generator=generator) @ torch.cat([planes, common])
    return found.view(24, 2, 5, 5), torch.randint(3, (24,), generator=generator)


class Stream:
    """A model, its optimiser and its session."""

    def __init__(
        self,
        optimizer: str = "sgd",
        norm: Callable[[], nn.Module] | None = None,
        config: LanceConfig | None = None,
        named: bool = True,
        **options: Any,
    ) -> None:
        self.named = named  # each experience has columns of its own
        self.model = Net(norm)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        options = {"heads": ["heads"], **(COLUMNS if named else {}), **options}
        self.session = ContinualSession(EXACT if config is None else config, ContinualConfig(**options))

    def passes(self, experience: int) -> list[Callable[[], Any]]:
        return [lambda step=step: self.model(batch(experience, step)[0], experience) for step in range(3)]

    def begin(self, experience: int, own: str | None = None, **more: Any) -> None:
        own = f"task {experience}" if own is None and self.named else own
        self.session.begin_experience(self.model, self.passes(experience), [self.optimizer], own=own, **more)

    def train(self, experience: int, start: int = 0, stop: int = 6) -> None:
        for step in range(start, stop):
            inputs, labels = batch(experience, step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs, experience), labels).backward()
            self.optimizer.step()

    def end(self, experience: int) -> None:
        self.session.end_experience(self.model, self.passes(experience))

    def learn(self, *experiences: int) -> None:
        for experience in experiences:
            self.begin(experience)
            self.train(experience)
            self.end(experience)

    def weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_submodule(name).weight.detach().clone() for name in self.session.memories}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, through safe loading."""
        file = io.BytesIO()
        found = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state_dict(),
            "running": self.session.running_state(),
        }
        torch.save(found, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])

    def resume(self, state: dict[str, Any]) -> None:
        """Load, and go on within the experience that was running."""
        self.load(state)
        self.session.resume_experience(self.model, state["running"], [self.optimizer])
