"""An experience that is interrupted and resumed ends as if it had not been, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, StateError, is_swapped
from lightning_lance.continual import ContinualConfig, ContinualSession

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 25, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def batch(experience: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * experience + step)
    low_rank = torch.randn(16, 4, generator=generator) @ torch.randn(
        4, 50, generator=torch.Generator().manual_seed(experience)
    )
    return low_rank.view(16, 2, 5, 5), torch.randint(3, (16,), generator=generator)


class Stream:
    """A model, its optimiser and its session."""

    def __init__(self, optimizer: str, reserved: Any) -> None:
        self.model = net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        config = LanceConfig(rank={"batch": 4, "spatial": 0.9}, calibration_batches=2)
        self.session = ContinualSession(config, ContinualConfig(threshold=0.6, reserved=reserved, heads=["8"]))

    def passes(self, experience: int) -> list[Callable[[], Any]]:
        return [lambda step=step: self.model(batch(experience, step)[0]) for step in range(2)]

    def begin(self, experience: int) -> None:
        self.session.begin_experience(self.model, self.passes(experience), [self.optimizer])

    def end(self, experience: int) -> None:
        self.session.end_experience(self.model, self.passes(experience))

    def train(self, experience: int, start: int, stop: int) -> None:
        for step in range(start, stop):
            inputs, labels = batch(experience, step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, through safe loading."""
        found = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state_dict(),
            "running": self.session.running_state(),
        }
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("reserved", ["full", 3, 0.5])
@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_resumed_equals_uninterrupted(optimizer: str, reserved: Any, interrupted: int) -> None:
    one = Stream(optimizer, reserved)
    for experience in range(interrupted):
        one.begin(experience)
        one.train(experience, 0, 5)
        one.end(experience)
    one.begin(interrupted)
    one.train(interrupted, 0, 3)
    state = one.state()

    other = Stream(optimizer, reserved)
    other.load(state)
    other.session.resume_experience(other.model, state["running"], [other.optimizer])
    for stream in (one, other):
        stream.train(interrupted, 3, 7)
        stream.end(interrupted)
        stream.begin(interrupted + 1)
        stream.train(interrupted + 1, 0, 2)
        stream.end(interrupted + 1)
        assert not is_swapped(stream.model)
    assert equal(one.model.state_dict(), other.model.state_dict())
    assert equal(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert equal(one.session.state_dict(), other.session.state_dict())


def test_what_is_protected_does_not_move_after_a_resume() -> None:
    one = Stream("AdamW", "full")
    one.begin(0)
    one.train(0, 0, 5)
    one.end(0)
    one.begin(1)
    before = copy.deepcopy(one.model.state_dict())
    one.train(1, 0, 3)
    state = one.state()
    other = Stream("AdamW", "full")
    other.load(state)
    other.session.resume_experience(other.model, state["running"], [other.optimizer])
    other.train(1, 3, 9)
    protected = {name: memory.protected for name, memory in other.session.memories.items()}
    other.end(1)
    change = (other.model[6].weight - before["6.weight"]).detach()
    assert change.norm() > 1e-3
    assert (change @ protected["6"][0]).norm() <= 1e-5 * change.norm()


def test_outside_of_an_experience_there_is_no_running_state() -> None:
    stream = Stream("SGD", "full")
    assert stream.session.running_state() is None
    stream.begin(0)
    assert stream.session.running_state() is not None
    with pytest.raises(StateError, match="while one is running"):
        stream.session.resume_experience(stream.model, {})
    stream.session.abandon()
    assert stream.session.running_state() is None


def test_another_model_is_refused_and_restored() -> None:
    stream = Stream("SGD", "full")
    stream.begin(0)
    state = stream.state()
    other = Stream("SGD", "full")
    other.model[3].weight.requires_grad_(False)
    other.load(state)
    with pytest.raises(StateError, match="3 differ"):
        other.session.resume_experience(other.model, state["running"], [other.optimizer])
    assert not is_swapped(other.model)
    assert not other.session.running
