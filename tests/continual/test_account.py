"""What a person sees at a boundary, and boundaries that fail."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import StateError
from lightning_lance.continual import ContinualConfig, ContinualSession, LayerAccount, LayerMemory, plot_capacity
from lightning_lance.continual.rules.columns import Columns
from lightning_lance.tensors.units import format_bytes
from tests.continual.streams import Stream, batch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning"),
]


def test_each_boundary_is_one_table_whose_sums_are_those_of_the_session() -> None:
    stream = Stream()
    assert stream.session.table() == ""
    stream.learn(0, 1, 2)
    assert [len(account) for account in stream.session.history] == [3, 3, 3]
    for row in stream.session.history[-1]:
        memory = stream.session.memories[row.layer]
        assert (row.protected, row.width) == (sum(memory.counts), memory.width * memory.groups)
        assert row.free == row.width - row.protected
    last = stream.session.history[-1]
    columns = stream.session.rule.own_columns("task 2")
    assert {row.layer: row.own for row in last if row.own} == {name: count for name, (count, _) in columns.items()}
    assert sum(row.own for row in last) > 0
    assert all(row.own == 0 for row in stream.session.history[0])
    of_others = sum(size for own in ("task 0", "task 1") for _, size in stream.session.rule.own_columns(own).values())
    values = stream.session.state_dict()["own"]
    sizes = {own: sum(value.nbytes for value in found.values()) for own, found in values.items()}
    assert sizes.keys() == {"task 1", "task 2"}  # what the first one has is what all share
    assert sum(row.bytes for row in last) + of_others + sum(sizes.values()) == stream.session.bytes
    lines = stream.session.table().splitlines()
    assert lines[0] == "LANCE, after experience 2"
    assert lines[1].split() == ["layer", "trained", "protected", "free", "own", "columns", "state"]
    assert [line.split()[0] for line in lines[3:]] == [*(row.layer for row in last), "norms,", "all"]
    shown = sum(row.bytes for row in last) + sizes["task 2"]
    assert lines[-1].endswith(format_bytes(shown))
    assert lines[-2].endswith(format_bytes(sizes["task 2"]))
    body = next(line for line in lines if line.startswith("body.5")).split()
    row = next(row for row in last if row.layer == "body.5")
    assert body[1:5] == ["yes", str(row.protected), "of", "150"]
    assert body[6:8] == [str(row.free), str(row.own)]


def test_a_layer_that_was_too_full_to_train_is_said_to_be_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    session = ContinualSession(options=ContinualConfig(heads=["4"], threshold=0.9999))
    x = torch.randn(64, 4)
    for _ in range(2):
        session.begin_experience(model, [lambda: model(x)])
        session.end_experience(model, [lambda: model(x)])
    assert [row.frozen for row in session.history[0]] == [False, False]
    assert next(row for row in session.history[1] if row.layer == "0").frozen
    assert "frozen" in session.table()


def test_the_history_goes_on_after_a_stored_stream() -> None:
    stream, other = Stream(), Stream()
    stream.learn(0, 1)
    other.session.load_state_dict(stream.state()["session"])
    assert other.session.history == stream.session.history
    assert isinstance(other.session.history[0][0], LayerAccount)
    older = {key: value for key, value in stream.session.state_dict().items() if key != "history"}
    other.session.load_state_dict(older)
    assert other.session.history == []
    assert other.session.experience == 2


def test_capacity_is_drawn_over_the_experiences(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    mpl.use("Agg")
    stream = Stream()
    stream.learn(0, 1)
    history = stream.session.history
    history[1][0] = history[1][0]._replace(frozen=True)
    _, axis = stream.session.plot_capacity()
    lines = {line.get_label(): line for line in axis.get_lines() if line.get_label() != "_frozen"}
    assert list(lines) == [row.layer for row in history[0]]
    wanted = [100.0 * account[2].protected / account[2].width for account in history]
    assert lines[history[0][2].layer].get_ydata().tolist() == pytest.approx(wanted)
    crosses = [line.get_xdata() for line in axis.get_lines() if line.get_label() == "_frozen"]
    assert [len(found) for found in crosses] == [1, 0, 0]
    again = plot_capacity(history, axis)[1]
    assert again is axis
    kept = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return kept(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-lance\[plot\]'"):
        stream.session.plot_capacity()


def test_nothing_left_to_train_is_said_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    session = ContinualSession(options=ContinualConfig(threshold=0.9999, freeze_above=0.5))
    x = torch.randn(64, 4)
    session.begin_experience(model, [lambda: model(x)])
    session.end_experience(model, [lambda: model(x)])
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(StateError, match=r"nothing is left to train in experience 1: .*0 \(4 of 4\).*lower threshold"):
        session.begin_experience(model, [lambda: model(x)])
    assert not session.running
    assert [p.requires_grad for p in model.parameters()] == flags == [True] * 3
    assert session.experience == 1


def failing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Fail at the second layer of a boundary."""
    owner: Any = LayerMemory if where == "protect" else Columns
    name = "protect" if where == "protect" else "detach"
    original, calls = getattr(owner, name), []

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if where == "detach":
            first = next(iter(self._anchors))
            kept = self._anchors
            self._anchors = {first: kept[first]}
            original(self, *args, **kwargs)
            self._anchors = kept
            raise MemoryError("no room")
        if len(calls) == 2:
            raise MemoryError("no room")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("rule", "where", "damping"),
    [
        *((rule, "protect", damping) for rule in ("columns", "threshold") for damping in (0.0, 0.5)),
        *(("columns", "detach", damping) for damping in (0.0, 0.5)),
        ("scaled", "protect", 0.0),
    ],
)
def test_a_boundary_that_fails_half_way_leaves_what_was_protected(
    rule: str, where: str, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(rule=rule, damping=damping)
    stream.learn(0, 1)
    session = stream.session
    before, weights = session.state_dict(), stream.weights()
    bases = {name: memory.protected.double() for name, memory in session.memories.items()}
    stream.begin(2)
    stream.train(2)
    with monkeypatch.context() as context:
        failing(context, where)
        with pytest.raises(MemoryError):
            stream.end(2)
    assert not session.running
    after = session.state_dict()
    for name, (*_, stored) in before["memories"].items():
        found = after["memories"][name][-1]
        assert found["counts"] == stored["counts"]
        assert found["stage"] == stored["stage"] == "consolidated"
        assert found["basis"].equal(stored["basis"])
        assert found["soft"].equal(stored["soft"])
    assert after["experience"] == before["experience"]
    assert len(after["history"]) == 2
    assert session.rule.names == (["task 0", "task 1"] if rule == "columns" else [])
    for name, basis in bases.items() if rule != "scaled" else ():
        groups = basis.shape[0]
        moved = (stream.model.get_submodule(name).weight.detach() - weights[name]).double()
        leak = moved.reshape(groups, -1, basis.shape[1]) @ basis
        assert float(leak.norm()) <= 1e-5 * float(weights[name].norm()), name
    # The stream goes on, under the same name too.
    stream.learn(2)
    assert session.experience == 3
    assert stream.model(batch(2)[0], 2).isfinite().all()


def test_outputs_of_an_earlier_experience_survive_a_failed_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(threshold=0.9999)
    stream.learn(0, 1)

    def outputs() -> Tensor:
        stream.session.select(stream.model, "task 1")
        with torch.no_grad():
            found: Tensor = stream.model(batch(1)[0], 1)
        stream.session.select(stream.model, None)
        return found

    before = outputs()
    stream.begin(2)
    stream.train(2)
    with monkeypatch.context() as context:
        failing(context, "protect")
        with pytest.raises(MemoryError):
            stream.end(2)
    assert float((outputs() - before).norm()) < 0.02 * float(before.norm())
