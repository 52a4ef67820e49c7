"""Norms and biases of one's own: each experience is evaluated with those it trained, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import StateError
from tests.continual.streams import OPTIMIZERS, Stream
from tests.mutations import same

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning"),
]

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "layer": lambda: nn.LayerNorm([6, 5, 5]),
}


def normed(kind: str = "batch", optimizer: str = "momentum") -> Stream:
    return Stream(optimizer, NORMS[kind])


def values(stream: Stream) -> dict[str, Tensor]:
    """Everything of the norm, and the biases outside of heads."""
    state = stream.model.state_dict()
    biases = ("body.0.bias", "body.3.bias", "body.6.bias")
    return {n: t.clone() for n, t in state.items() if n.startswith("body.1.") or n in biases}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_experience_gets_back_the_norms_and_biases_that_it_trained(kind: str, optimizer: str) -> None:
    stream, trained = normed(kind, optimizer), []
    for experience in range(3):
        stream.begin(experience)
        if trained:  # goes on from those of the one before
            assert same(values(stream), trained[-1])
        stream.model.train()
        stream.train(experience)
        trained.append(values(stream))
        stream.end(experience)
        assert same(values(stream), trained[0])  # what all share is what the first one had
    for name in ("body.1.weight", "body.1.bias", "body.3.bias", "body.6.bias"):
        assert not torch.equal(trained[0][name], trained[1][name])
    for experience in (2, 0, 1):
        stream.session.select(stream.model, f"task {experience}")
        assert same(values(stream), trained[experience])
        exported = stream.session.export(stream.model, "task 1")
        assert all(torch.equal(exported.state_dict()[name], trained[1][name]) for name in trained[1])
        assert same(values(stream), trained[experience])
    stream.session.select(stream.model, None)
    assert same(values(stream), trained[0])


def test_an_experience_of_a_known_name_leaves_what_the_name_has() -> None:
    stream = normed()
    stream.learn(0, 1)
    stream.session.select(stream.model, "task 1")
    had = values(stream)
    stream.begin(0, own="task 1")
    stream.model.train()
    stream.train(0)
    assert same(values(stream), had)
    stream.end(0)
    stream.session.select(stream.model, "task 1")
    assert same(values(stream), had)


def test_without_names_norms_and_biases_stay_as_the_first_experience_left_them() -> None:
    stream = normed()
    stream.learn(0)
    before = values(stream)
    stream.session.begin_experience(stream.model, stream.passes(1), [stream.optimizer])
    stream.model.train()
    stream.train(1)
    stream.end(1)
    assert same(values(stream), before)
    assert stream.session.state_dict()["own"] == {}


def test_while_one_is_running_another_is_shown_and_hidden_again() -> None:
    stream = normed()
    stream.learn(0)
    first = values(stream)
    stream.learn(1)
    stream.session.select(stream.model, "task 1")
    second = values(stream)
    stream.begin(2)
    stream.model.train()
    stream.train(2)
    running = values(stream)
    for own, wanted in (("task 1", second), ("task 0", first), ("task 2", running), ("task 0", first)):
        stream.session.select(stream.model, own)
        assert same(values(stream), wanted)
    stream.session.select(stream.model, None)
    assert same(values(stream), running)
    stream.end(2)


@pytest.mark.parametrize("again", ["abandon", "load"])
def test_of_an_experience_that_did_not_end_nothing_is_left(again: str) -> None:
    stream = normed()
    stream.learn(0, 1)
    before = values(stream)
    stream.begin(2)
    stream.train(2)
    assert not same(values(stream), before)
    if again == "abandon":
        stream.session.abandon()
        assert same(values(stream), before)
    else:
        other = normed()
        other.load(stream.state())
        other.begin(2)
        other.session.abandon()
        assert same(values(other), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("body.1.running_var", torch.full((6,), -1.0), "variances of at least 0"),
        ("body.1.weight", torch.full((6,), torch.nan), "finite numbers"),
        ("body.1.weight", "text", "a dense tensor"),
        ("body.1.weight", torch.zeros(6, dtype=torch.bool), "a dense tensor"),
    ],
)
def test_damaged_values_are_refused_by_name(key: str, value: Any, message: str) -> None:
    stream, other = normed(), normed()
    stream.learn(0, 1)
    state = stream.state()["session"]
    state["own"]["task 1"][key] = value
    with pytest.raises(StateError, match=rf"\['own'\]\['task 1'\]\['{key}'\].*{message}"):
        other.session.load_state_dict(state)
    assert other.session.experience == 0


def test_values_of_another_model_are_refused_by_name() -> None:
    stream, other = normed("batch"), normed("layer")
    stream.learn(0, 1)
    other.session.load_state_dict(stream.state()["session"])
    with pytest.raises(StateError, match=r"body\.1\.\w+: the stored"):
        other.session.begin_experience(other.model, other.passes(2), [other.optimizer], own="task 2")


@pytest.mark.parametrize("place", ["running", "pending"])
def test_shared_values_that_do_not_fit_are_refused_by_name(place: str) -> None:
    stream, other = normed(), normed()
    stream.learn(0, 1)
    stream.begin(2)
    state = stream.state()
    held = state["running"] if place == "running" else state["session"]["pending"]
    held["shared"]["body.1.bias"] = torch.zeros(5)
    other.load(state)
    before = values(other)
    again: dict[str, Callable[[], None]] = {
        "running": lambda: other.session.resume_experience(other.model, state["running"], [other.optimizer]),
        "pending": lambda: other.begin(2),
    }
    with pytest.raises(StateError, match=r"body\.1\.bias: the stored .*\(5,\)"):
        again[place]()
    assert same(values(other), before)
