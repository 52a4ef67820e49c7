"""A stored stream with one thing changed somewhere is loaded as a whole, or refused by name with nothing changed."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import PlanError, StateError, is_swapped
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.stored import CONTINUAL_STATE_VERSION
from tests.mutations import DELETED, EXAMPLES, changed, mutated, refusal, same

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.errors.LanceWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold", "threshold": 0.6},
    "damped": {"rule": "threshold", "threshold": 0.6, "damping": 0.5},
    "reserved": {"rule": "threshold", "threshold": 0.6, "reserved": 2},
    "scaled": {"rule": "scaled", "threshold": 0.6},
    "columns": {"rule": "columns", "threshold": 0.6, "columns": 0.2},
}


def net(wide: int = 10, out: int = 9) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, wide), nn.ReLU(), nn.Linear(wide, out), nn.ReLU(), nn.Linear(out, 3))


class Stream:
    """A model, its optimiser and its session."""

    def __init__(self, kind: str, model: nn.Module | None = None) -> None:
        self.kind = kind
        self.model = model or net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.session = ContinualSession(options=ContinualConfig(heads=["4"], **KINDS[kind]))

    def passes(self, experience: int) -> list[Any]:
        x = inputs(experience)
        return [lambda: self.model(x)]

    def begin(self, experience: int) -> None:
        own = f"task {experience}" if self.kind == "columns" else None
        self.session.begin_experience(self.model, self.passes(experience), [self.optimizer], own=own)

    def train(self, experience: int, steps: int = 2) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            with self.session.step():
                loss = self.model(inputs(experience)).square().mean()
            loss.backward()
            self.optimizer.step()

    def learn(self, experience: int) -> None:
        self.begin(experience)
        self.train(experience)
        self.session.end_experience(self.model, self.passes(experience))

    def assert_finite(self) -> None:
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())


def inputs(experience: int) -> Tensor:
    generator = torch.Generator().manual_seed(experience)
    return torch.randn(32, 4, generator=generator) @ torch.randn(4, 12, generator=generator)


class Taken(NamedTuple):
    weights: dict[str, Tensor]
    stream: dict[str, Any]
    running: Any


@functools.cache
def taken(kind: str, moment: str) -> Taken:
    """A state after two experiences: between them, with one selected, or within the third."""
    made = Stream(kind)
    for experience in range(2):
        made.learn(experience)
    if moment == "selected":
        made.session.select(made.model, "task 1")
    if moment == "within":
        made.begin(2)
        made.train(2)
    weights = copy.deepcopy(made.model.state_dict())
    return Taken(weights, copy.deepcopy(made.session.state_dict()), copy.deepcopy(made.session.running_state()))


MOMENTS = [(kind, moment) for kind in KINDS for moment in ("between", "within")] + [("columns", "selected")]


def loaded(kind: str, moment: str) -> Stream:
    made, state = Stream(kind), taken(kind, moment)
    made.model.load_state_dict(state.weights)
    made.session.load_state_dict(state.stream)
    return made


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_a_changed_stream_is_refused_or_goes_on(data: Any) -> None:
    kind, moment = data.draw(st.sampled_from(MOMENTS))
    state = taken(kind, moment)
    what, mutation = data.draw(mutated(state.stream))
    note(what)
    made = Stream(kind)
    made.model.load_state_dict(state.weights)
    before = copy.deepcopy(made.session.state_dict())
    text = refusal(made.session.load_state_dict, mutation)
    if text is not None:
        assert text.startswith("the stored stream")
        assert "Allowed: " in text
        assert same(made.session.state_dict(), before)
        return
    for memory in made.session.memories.values():
        assert_orthonormal(memory.protected, memory.counts)
    try:
        made.learn(2)
    except (StateError, PlanError):  # it says that the model has no such layer
        assert not is_swapped(made.model)
    made.assert_finite()


def assert_orthonormal(bases: Tensor, counts: list[int]) -> None:
    for basis, count in zip(bases.double(), counts, strict=True):
        torch.testing.assert_close(basis[:, :count].T @ basis[:, :count], torch.eye(count).double(), atol=1e-3, rtol=0)


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_a_changed_experience_is_refused_or_goes_on(data: Any) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    state, made = taken(kind, "within"), loaded(kind, "within")
    what, mutation = data.draw(mutated(state.running))
    note(what)
    before = copy.deepcopy(made.session.state_dict())
    text = refusal(made.session.resume_experience, made.model, mutation, [made.optimizer])
    if text is not None:
        assert same(made.model.state_dict(), state.weights)
        assert same(made.session.state_dict(), before)
        assert not is_swapped(made.model)
        assert not made.session.running
        assert all(parameter.requires_grad for parameter in made.model.parameters())
        return
    if not any(name in what for name in ("update", "weight", "anchor")):  # trained numbers are taken as they are
        made.train(2)
        made.session.end_experience(made.model, made.passes(2))
        made.assert_finite()


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
def test_what_is_stored_loads(kind: str, moment: str) -> None:
    made, state = loaded(kind, moment), taken(kind, moment)
    assert same(made.session.state_dict(), state.stream)
    if state.running is not None:
        made.session.resume_experience(made.model, state.running, [made.optimizer])
        assert same(made.session.running_state(), state.running)


MEMORY = ("memories", "0", 3)
CASES: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("threshold", (), [], r"the stored stream is a list of 0\. Allowed: a dict with version"),
    ("threshold", ("version",), DELETED, "is a dict without 'version'"),
    ("threshold", ("feature_side",), "channel", r"\['feature_side'\] is 'channel'\. Allowed: feature_side='patch'"),
    ("threshold", ("experience",), -1, r"\['experience'\] is -1\. Allowed: an int of at least 0"),
    ("threshold", ("memories", "0", 0), 13, r"\['memories'\]\['0'\]\[3\]\['basis'\] is a tensor of shape \(1, 12, "),
    ("threshold", ("memories", "0", 2), "int64", r"\['0'\]\[2\] is 'int64'\. Allowed: 'float16', "),
    ("threshold", (*MEMORY, "counts"), [99], r"\['counts'\]\[0\] is 99\. Allowed: an int from 0 to 12"),
    ("threshold", (*MEMORY, "stage"), "training", r"\['stage'\] is 'training'\. Allowed: 'empty', 'consolidated'"),
    ("damped", (*MEMORY, "energies"), torch.full((1, 9), -1.0).double(), r"\['energies'\] is a tensor"),
    ("scaled", ("rule", 0), "threshold", r"\['rule'\]\[0\] is 'threshold'\. Allowed: rule='scaled', as asked for"),
    ("scaled", ("rule", 1, "importance", "0"), torch.ones(1, 2), r"\['importance'\]\['0'\] is a tensor of shape"),
    ("columns", ("rule", 1, "last"), "task 7", r"\['last'\] is 'task 7'\. Allowed: None or one of 'task 0', 'task 1'"),
]


@pytest.mark.parametrize(("kind", "path", "value", "text"), CASES, ids=[str(index) for index in range(len(CASES))])
def test_the_place_is_named(kind: str, path: tuple[Any, ...], value: Any, text: str) -> None:
    with pytest.raises(StateError, match=f"{text}.*(load another checkpoint|Allowed)"):
        Stream(kind).session.load_state_dict(changed(taken(kind, "between").stream, path, value))


@pytest.mark.parametrize("damage", ["nan", "turned", "dtype"])
def test_a_damaged_basis_is_named(damage: str) -> None:
    state = taken("threshold", "between").stream
    basis = state["memories"]["0"][3]["basis"].clone()
    if damage == "nan":
        basis[0, 3, 0], text = float("nan"), r"with NaN or Inf\. Allowed: finite numbers"
    elif damage == "turned":
        basis[0, :, 0], text = basis[0, :, 1], r"with columns 1 off orthonormal ones\. Allowed: orthonormal columns"
    else:
        basis, text = basis.to(torch.bfloat16), r"dtype bfloat16\. Allowed: .* and of dtype float32"
    with pytest.raises(StateError, match=rf"^the stored stream\['memories'\]\['0'\]\[3\]\['basis'\] is .*{text}"):
        Stream("threshold").session.load_state_dict(changed(state, (*MEMORY, "basis"), basis))


@pytest.mark.parametrize("version", [0, 1, 2, 99, True, None, "3"])
def test_another_version_is_named(version: Any) -> None:
    """Versions 1 and 2 were this package's before; they held other parts and are not read."""
    with pytest.raises(
        StateError, match=rf"\['version'\] is {version!r}\. Allowed: version {CONTINUAL_STATE_VERSION}, "
    ):
        Stream("scaled").session.load_state_dict({**taken("scaled", "between").stream, "version": version})


@pytest.mark.parametrize("wide", [(11, 9), (10, 8)])
@pytest.mark.parametrize(
    ("kind", "moment"), [("threshold", "between"), ("columns", "between"), ("columns", "selected")]
)
def test_a_model_of_other_widths_is_named(kind: str, moment: str, wide: tuple[int, int]) -> None:
    made = Stream(kind, net(*wide))
    made.session.load_state_dict(taken(kind, moment).stream)
    before = copy.deepcopy(made.model.state_dict())
    if kind == "threshold" and wide[0] == 10:  # a memory of inputs does not depend on how many outputs there are
        made.learn(2)
        return
    with pytest.raises(StateError, match=r"^[02]: .* layer has"):
        made.begin(2)
    if moment == "selected":
        with pytest.raises(StateError, match=r"^[02]: .* the layer has"):
            made.session.select(made.model, "task 0")
    assert same(made.model.state_dict(), before)
    assert not is_swapped(made.model)
