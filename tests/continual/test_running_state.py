"""An experience that is interrupted and resumed ends as if it had not been, bit for bit."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
from torch import nn

from lightning_lance import LanceConfig, StateError, is_swapped
from tests.continual.streams import OPTIMIZERS, Stream
from tests.mutations import same

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_norm() -> nn.Module:
    return nn.BatchNorm2d(6)


def shared(optimizer: str = "momentum", reserved: Any = "full") -> Stream:
    """All is shared by the experiences, and inputs are compressed."""
    config = LanceConfig(rank={"batch": 4, "spatial": 0.9}, calibration_batches=2)
    return Stream(optimizer, batch_norm, config, named=False, threshold=0.6, reserved=reserved)


SETUPS: dict[str, Any] = {
    "reserved full": shared,
    "reserved 3": lambda optimizer: shared(optimizer, 3),
    "reserved 0.5": lambda optimizer: shared(optimizer, 0.5),
    "columns": Stream,
    "damped columns": lambda optimizer: Stream(optimizer, damping=0.5),
    "columns, reserved 12": lambda optimizer: Stream(optimizer, reserved=12),
    "columns and a norm": lambda optimizer: Stream(optimizer, batch_norm),
}


@pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning")
@pytest.mark.parametrize(
    ("setup", "optimizer", "interrupted"),
    [
        *product(["reserved full", "reserved 3", "reserved 0.5"], ["momentum", "adamw"], [0, 1, 2]),
        *product(["columns", "damped columns", "columns, reserved 12"], OPTIMIZERS, [2]),
        ("columns and a norm", "adamw", 2),
    ],
)
def test_resumed_equals_uninterrupted(setup: str, optimizer: str, interrupted: int) -> None:
    one, other = SETUPS[setup](optimizer), SETUPS[setup](optimizer)
    one.learn(*range(interrupted))
    one.begin(interrupted)
    one.model.train()  # as trainers do
    one.train(interrupted, 0, 3)
    other.model.train()
    other.resume(one.state())
    for stream in (one, other):
        stream.train(interrupted, 3, 6)
        stream.end(interrupted)
        stream.learn(interrupted + 1)
        assert not is_swapped(stream.model)
    assert same(one.state(), other.state())
    if one.named:
        for stream in (one, other):
            stream.session.select(stream.model, f"task {interrupted}")
        assert same(one.model.state_dict(), other.model.state_dict())


def test_what_is_protected_does_not_move_after_a_resume() -> None:
    one, other = shared("adamw"), shared("adamw")
    one.learn(0)
    one.begin(1)
    before = copy.deepcopy(one.model.state_dict())
    one.train(1, 0, 3)
    other.resume(one.state())
    other.train(1, 3, 9)
    protected = {name: memory.protected for name, memory in other.session.memories.items()}
    other.end(1)
    change = (other.model.body[6].weight - before["body.6.weight"]).detach()
    assert change.norm() > 1e-3
    assert (change @ protected["body.6"][0]).norm() <= 1e-5 * change.norm()


def test_outside_of_an_experience_there_is_no_running_state() -> None:
    stream = shared()
    assert stream.session.running_state() is None
    stream.begin(0)
    assert stream.session.running_state() is not None
    with pytest.raises(StateError, match="while one is running"):
        stream.session.resume_experience(stream.model, {})
    stream.session.abandon()
    assert stream.session.running_state() is None


def test_another_model_is_refused_and_restored() -> None:
    stream, other = shared(), shared()
    stream.begin(0)
    other.model.body[3].weight.requires_grad_(False)
    with pytest.raises(StateError, match=r"body\.3 differ"):
        other.resume(stream.state())
    assert not is_swapped(other.model)
    assert not other.session.running
