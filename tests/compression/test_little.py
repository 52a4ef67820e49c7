"""Steps of which plain training keeps little are left alone, unless somebody asks for more."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.compression.session import LITTLE
from lightning_lance.compression.truncation import WATCH

FEW, MANY = 16, 2048
"""Rows of which a step keeps less, and more, than what counts as little."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 8))


def batch(step: int, rows: int) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(step))


def session_of(model: nn.Module, **options: Any) -> LanceSession:
    session = LanceSession(model, LanceConfig(**options))
    session.start()
    return session


def train(model: nn.Module, session: LanceSession | None, rows: Sequence[int], first: int = 0) -> list[Tensor]:
    """Gradients of all parameters, step by step; without a session those of plain training."""
    found = []
    for step, count in enumerate(rows, first):
        model.zero_grad()
        if session is None:
            loss = model(batch(step, count)).square().mean()
        else:
            with session.step():
                loss = model(batch(step, count)).square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    return found


def test_the_networks_are_on_both_sides_of_the_limit() -> None:
    few, many = (
        measure_saved_bytes(lambda n=rows: network()(batch(0, n)).square().mean()).total for rows in (FEW, MANY)
    )
    assert few < LITTLE < many


def test_from_the_second_step_on_gradients_are_those_of_plain_training() -> None:
    model, twin = network(), network()
    session = session_of(model)
    train(model, session, [FEW])
    twin.load_state_dict(model.state_dict())
    steps = [FEW] * (2 * WATCH)  # some of which look whether that is still so
    for ours, plain in zip(train(model, session, steps, 1), train(twin, None, steps, 1), strict=True):
        assert torch.equal(ours, plain)
    report = session.report
    assert report is not None
    assert report.ratio == 1
    assert any("bits=4" in note for note in report.notes)
    assert report.render().count("little to gain") == 1


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"rank": 2}, {"rank": "compact"}], ids=str)
def test_what_is_asked_for_is_done(options: dict[str, Any]) -> None:
    model, twin = network(), network()
    session = session_of(model, calibration_batches=1, **options)
    train(model, session, [FEW] * 3)
    twin.load_state_dict(model.state_dict())
    [ours], [plain] = train(model, session, [FEW], 3), train(twin, None, [FEW], 3)
    assert not torch.equal(ours, plain)
    assert session.report is not None
    assert session.report.ratio > 1.5


def test_steps_that_grow_are_rounded_again() -> None:
    model = network()
    session = session_of(model)
    train(model, session, [FEW] * 3)
    first = session.report
    rows = [MANY] * (WATCH + 2)
    train(model, session, rows, 3)
    report = session.report
    assert report is not first
    assert report is not None
    assert report.ratio > 5
    assert report.plain is not None
    assert report.plain.total > LITTLE
    twin = network()
    twin.load_state_dict(model.state_dict())
    [ours], [plain] = train(model, session, [MANY], 99), train(twin, None, [MANY], 99)
    assert not torch.equal(ours, plain)
    train(model, session, [FEW] * 3)
    assert session.report is report  # what was once worth its while stays rounded


def test_networks_that_train_in_turn() -> None:
    """The first step is of a small part, as where two losses are optimised batch by batch."""
    small, large = nn.Linear(64, 8), network()
    model = nn.ModuleDict({"small": small, "large": large})
    session = session_of(model)
    for step in range(9):
        second = step % 3 == 2
        model.zero_grad()
        with session.step():
            loss = (large if second else small)(batch(step, MANY if second else FEW)).square().mean()
        loss.backward()
    twin = network()
    twin.load_state_dict(large.state_dict())
    twin(batch(8, MANY)).square().mean().backward()
    assert not all(torch.equal(p.grad, q.grad) for p, q in zip(large.parameters(), twin.parameters(), strict=True))


def test_layers_that_train_later_are_looked_at_at_once() -> None:
    model = network()
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    session = session_of(model)
    train_last = [MANY // 4] * 2
    for step, count in enumerate(train_last):
        with session.step():
            loss = model(batch(step, count)).square().mean()
        loss.backward()
    assert session.report is not None
    assert session.report.ratio == 1
    model.requires_grad_(True)
    train(model, session, [MANY], 2)
    assert session.report.ratio > 5


@pytest.mark.parametrize("stop", [0, 1, 2, WATCH, WATCH + 1, WATCH + 2, WATCH + 5])
def test_resume_is_bit_equal(stop: int) -> None:
    rows = [FEW] * WATCH + [MANY] * 8
    whole = session_of(model := network())
    expected = train(model, whole, rows)
    first = session_of(model := network())
    train(model, first, rows[:stop])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "lance": first.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = network(1)
    resumed.load_state_dict(stored["model"])
    session = session_of(resumed)
    session.load_state_dict(stored["lance"])
    found = train(resumed, session, rows[stop:], stop)
    assert all(torch.equal(one, other) for one, other in zip(expected[stop:], found, strict=True))


def test_a_step_without_a_graph_says_nothing() -> None:
    model = network()
    session = session_of(model)
    with session.step(), torch.no_grad():
        model(batch(0, FEW))
    assert session.report is None
    train(model, session, [MANY])
    assert session.report is not None
    assert session.report.ratio > 5
