"""Steps of which plain training keeps little are left alone, unless somebody asks for more."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession, StateError, measure_saved_bytes
from lightning_lance.compression.report import LITTLE
from lightning_lance.ops.saving import saving

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
    steps = [FEW] * 60
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


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 12, 3), lambda: nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh())])
def test_where_little_is_fine_tuned_nothing_is_truncated(make: Any) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("weight" in name)
    session = session_of(model)
    for _ in range(5):
        with session.step():
            loss = model(torch.randn(4, 8, 12, 13)).square().mean()
        loss.backward()
    assert not session.layers
    assert session.report is not None
    assert session.report.ratio == 1


def test_steps_that_grow_are_rounded_again() -> None:
    model = network()
    session = session_of(model)
    train(model, session, [FEW] * 3)
    first = session.report
    train(model, session, [MANY] * 12, 3)  # some of which the session looks at
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


@pytest.mark.parametrize(("period", "index"), [(2, 1), (3, 2), (4, 3), (7, 0), (16, 15), (23, 5)])
def test_large_steps_now_and_then_are_rounded_before_long(period: int, index: int) -> None:
    """Whatever their period: one of four steps is looked at, and another one each time."""
    model = network()
    session = session_of(model)
    rows = [MANY if step % period == index else FEW for step in range(12 * period)]
    train(model, session, rows)
    large = [step for step, count in enumerate(rows) if count == MANY]
    twin = network()
    twin.load_state_dict(model.state_dict())
    [ours], [plain] = train(model, session, [MANY], large[-1]), train(twin, None, [MANY], large[-1])
    assert not torch.equal(ours, plain)


def test_what_several_steps_keep_for_one_backward_pass_counts_together() -> None:
    model, rows = network(), MANY // 32
    session = session_of(model)
    total = torch.zeros(())
    for step in range(40):
        with session.step():
            total = total + model(batch(step, rows)).square().mean()
    total.backward()
    assert session.report is not None
    assert session.report.ratio > 5
    # One by one they are small.
    session = session_of(network())
    train(session.model, session, [rows] * 40)
    assert session.report is not None
    assert session.report.ratio == 1


def test_a_backward_pass_inside_of_a_step_does_not_hide_what_was_kept() -> None:
    model = network()
    session = session_of(model)
    train(model, session, [FEW] * 2)
    assert session.report is not None
    assert session.report.ratio == 1
    for step in range(2):
        with session.step():
            for rows in (MANY, FEW):
                model(batch(step, rows)).square().mean().backward()
    assert session.report.ratio > 2


def test_a_step_that_fails_leaves_no_hooks() -> None:
    model = network()
    session = session_of(model)
    train(model, session, [FEW] * 2)
    with pytest.raises(RuntimeError, match="shapes"), session.step():
        model(torch.zeros(FEW, 3))
    assert saving.store is None
    train(model, session, [FEW])
    session.stop()


def test_a_state_can_be_loaded_into_a_session_that_has_run() -> None:
    rows = {"little": [FEW] * 4, "much": [MANY] * 4}
    states = {}
    for name, steps in rows.items():
        session = session_of(network())
        train(session.model, session, steps)
        states[name] = session.state_dict()
    for before, after in (("little", "much"), ("much", "little")):
        used, fresh = session_of(network()), session_of(network())
        train(used.model, used, rows[before])
        used.model.load_state_dict(fresh.model.state_dict())
        for one in (used, fresh):
            one.load_state_dict(states[after])
        assert used.state_dict() == fresh.state_dict()
        ours, theirs = (train(one.model, one, [FEW, MANY, FEW], 4) for one in (used, fresh))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_that_train_in_turn_rest() -> None:
    """Flags that go to and fro, as in adversarial training."""
    model = nn.ModuleDict({"one": network(), "other": network(1)})
    session = session_of(model)
    reports = set()
    for step in range(12):
        turn, rest = ("one", "other") if step % 2 else ("other", "one")
        model[turn].requires_grad_(True)
        model[rest].requires_grad_(False)
        twin = copy.deepcopy(model[turn])
        model.zero_grad()
        with session.step():
            loss = model[turn](batch(step, FEW)).square().mean()
        loss.backward()
        reports.add(id(session.report))
        if step > 2:
            twin(batch(step, FEW)).square().mean().backward()
            for ours, plain in zip(model[turn].parameters(), twin.parameters(), strict=True):
                assert torch.equal(ours.grad, plain.grad)
    assert len(reports) <= 3


@pytest.mark.parametrize("rank", ["auto", None])
@pytest.mark.parametrize("what", ["weights", "biases"])
def test_whatever_trains_later_is_looked_at_at_once(rank: Any, what: str) -> None:
    model = network()
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    session = session_of(model, rank=rank)
    train_last = [FEW] * 3
    for step, count in enumerate(train_last):
        with session.step():
            loss = model(batch(step, count)).square().mean()
        loss.backward()
    assert session.report is not None
    assert session.report.ratio == 1
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "weights" or name.endswith("bias"))
    with session.step():
        loss = model(batch(3, MANY)).square().mean()
    loss.backward()
    assert session.report.ratio > 2


def test_a_step_inside_of_a_step_is_an_error() -> None:
    sessions = [session_of(network()) for _ in range(2)]
    for session in sessions:
        train(session.model, session, [FEW] * 3)
    with sessions[0].step(), pytest.raises(StateError, match="inside of another"), sessions[1].step():
        pass


def test_a_compiled_network_is_compiled_a_few_times() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = network()
    run = torch.compile(model, backend=backend, fullgraph=True)
    session = session_of(model)
    for step in range(60):
        with session.step():
            loss = run(batch(step, FEW)).square().mean()
        loss.backward()
    assert len(graphs) <= 3
    torch._dynamo.reset()


def ragged(kind: str) -> list[int]:
    return {
        "grows": [FEW] * 6 + [MANY] * 6,
        "once": [FEW] * 6 + [MANY] + [FEW] * 5,
        "small": [FEW, 3 * FEW] * 6,
        "large": [MANY] * 4 + [FEW] * 8,
        "from the second on": [FEW] + [MANY] * 11,
    }[kind]


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 6, 7, 9])
@pytest.mark.parametrize("kind", ["grows", "once", "small", "large", "from the second on"])
@pytest.mark.parametrize("unfreezes", [None, 6])
def test_resume_is_bit_equal(stop: int, kind: str, unfreezes: int | None) -> None:
    rows = ragged(kind)

    def flags(model: nn.Sequential, step: int) -> None:
        model[0].requires_grad_(unfreezes is None or step >= unfreezes)

    def steps(model: nn.Sequential, session: LanceSession, first: int, last: int) -> list[Tensor]:
        found = []
        for step in range(first, last):
            flags(model, step)
            model.zero_grad()
            with session.step():
                loss = model(batch(step, rows[step])).square().mean()
            loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        return found

    whole, first, resumed = network(), network(), network(1)
    flags(whole, 0)
    expected = steps(whole, session_of(whole), 0, len(rows))
    flags(first, 0)
    session = session_of(first)
    steps(first, session, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "lance": session.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed.load_state_dict(stored["model"])
    flags(resumed, stop)
    session = session_of(resumed)
    session.load_state_dict(stored["lance"])
    found = steps(resumed, session, stop, len(rows))
    assert all(torch.equal(one, other) for one, other in zip(expected[stop:], found, strict=True))
    assert session.report is not None


def test_a_step_without_a_graph_says_nothing() -> None:
    model = network()
    session = session_of(model)
    with session.step(), torch.no_grad():
        model(batch(0, FEW))
    assert session.report is None
    train(model, session, [MANY])
    assert session.report is not None
    assert session.report.ratio > 5
