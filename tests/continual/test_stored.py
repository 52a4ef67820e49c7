"""The stored state of a stream: every change to it is refused with nothing changed, or harmless."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import LanceConfig, StateError
from lightning_lance.continual import ContinualConfig, ContinualSession, LayerMemory, Stage
from tests.mutations import DELETED, changed, mutated, refusal, same

pytestmark = pytest.mark.usefixtures("one_thread")


def gram(groups: int, width: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, 4 * rank, rank, generator=generator) @ torch.randn(
        groups, rank, width, generator=generator
    )
    return rows.mT @ rows


@functools.cache
def memory(kind: str) -> LayerMemory:
    """After an experience, soft directions beside; nearly full; and in the middle of an experience."""
    found = LayerMemory(12, 2, "conv1")
    for seed in range(4 if kind == "full" else 1):
        found.reserve()
        found.start()
        found.protect(gram(2, 12, 3, seed), 0.9, soft=True)
    if kind == "running":
        found.reserve(gram(2, 12, 5, 9), 3)
        found.start()
    assert (found.free is not None) == (kind == "full")
    return found


KINDS = ["soft", "full", "running"]


def assert_sound(found: LayerMemory) -> None:
    """It protects orthonormal directions, and an experience more than it did."""
    for _ in range(2):
        for group, count in zip(found.protected, found.counts, strict=True):
            wide = group[:, :count].double()
            torch.testing.assert_close(wide.T @ wide, torch.eye(count).double(), atol=1e-3, rtol=0)
        before, counts = found.protected, list(found.counts)
        found.abandon()
        found.reserve(gram(2, 12, 4, 20), 2, damping=0.5 if any(found.counts) else 0.0)
        assert found.reserved is not None
        assert found.reserved.isfinite().all()
        assert found.steps is None or bool(((found.steps >= 0.0) & (found.steps <= 1.0)).all())
        found.start()
        found.protect(gram(2, 12, 4, 20), 0.95, soft=True)
        assert all(new >= old for new, old in zip(found.counts, counts, strict=True))
        both = [basis.double() @ basis.double().mT for basis in (found.protected, before)]
        torch.testing.assert_close(both[0] @ both[1], both[1], atol=1e-3, rtol=0)


@given(st.sampled_from(KINDS).flatmap(lambda kind: mutated(memory(kind).state_dict())))
@settings(max_examples=600)
def test_a_changed_memory_is_refused_with_nothing_changed_or_harmless(change: tuple[str, Any]) -> None:
    what, state = change
    note(what)
    target = copy.deepcopy(memory("soft"))
    before = target.state_dict()
    text = refusal(target.load_state_dict, state)
    if text is not None:
        assert text.startswith("conv1: ")
        assert same(target.state_dict(), before)
        return
    assert_sound(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_stored_loads(kind: str, dtype: torch.dtype) -> None:
    target = LayerMemory(12, 2, "conv1")
    target.load_state_dict(memory(kind).state_dict())
    assert same(target.state_dict(), memory(kind).state_dict())
    assert_sound(target)
    other = LayerMemory(12, 2, "conv1", dtype=torch.float64)
    with pytest.raises(StateError, match=r"conv1: the stored memory\['basis'\].*of dtype float64"):
        other.load_state_dict(memory(kind).state_dict())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 4, generator=generator) @ torch.randn(4, 16, generator=generator)


def stream() -> ContinualSession:
    return ContinualSession(LanceConfig(rank="full"), ContinualConfig(heads=["4"], warn_above=1.0))


def experience(session: ContinualSession, model: nn.Module, seed: int) -> None:
    session.begin_experience(model, [lambda: model(inputs(seed))])
    session.end_experience(model, [lambda: model(inputs(seed))])


@functools.cache
def stored() -> dict[str, Any]:
    session, model = stream(), network()
    experience(session, model, 0)
    experience(session, model, 1)
    return session.state_dict()


@given(st.deferred(lambda: mutated(stored())))
@settings(max_examples=600)
@pytest.mark.filterwarnings("ignore::lightning_lance.errors.LanceWarning")
def test_a_changed_stream_is_refused_with_nothing_changed_or_harmless(change: tuple[str, Any]) -> None:
    what, state = change
    note(what)
    session, model = stream(), network()
    experience(session, model, 2)
    before = session.state_dict()
    if refusal(session.load_state_dict, state) is not None:
        assert same(session.state_dict(), before)
        return
    refusal(experience, session, model, 3)
    for found in session.memories.values():
        assert found.protected.isfinite().all()


CASES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("memories", "0", 3, "counts"), DELETED, "0: the stored memory is a dict without 'counts'"),
    (("memories", "2", 3, "stage"), "bogus", r"2: the stored memory\['stage'\] is 'bogus'\. Allowed: 'empty', 'calib"),
    (("memories", "0", 2), "randn", r"\['memories'\]\['0'\]\[2\] is 'randn'\. Allowed: 'float16', 'bfloat16'"),
    (("memories", "0", 1), 10**12, r"is a tensor of shape .* Allowed: a tensor for 1000000000000 groups"),
    (("experience",), -1, r"\['experience'\] is -1\. Allowed: an int of at least 0"),
    (("known",), "0", r"\['known'\] is '0'\. Allowed: a list"),
    (("version",), 1, "the stored state has version 1; this package reads 2.*continue with the version that wrote it"),
    (("feature_side",), "channel", "protects feature_side='channel'"),
    (("feature_side",), 3, r"\['feature_side'\] is 3"),
    ((), None, "the stored stream is None"),
    ((), [], "the stored stream is a list of 0"),
]


@pytest.mark.parametrize(("path", "value", "text"), CASES, ids=[str(index) for index in range(len(CASES))])
def test_the_place_is_named(path: tuple[Any, ...], value: Any, text: str) -> None:
    session = stream()
    with pytest.raises(StateError, match=text):
        session.load_state_dict(changed(stored(), path, value))
    assert session.memories == {}
    assert session.experience == 0


def test_a_model_of_other_widths_is_refused_by_name() -> None:
    session = stream()
    session.load_state_dict(stored())
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    model[2] = nn.Linear(13, 9)
    model[0] = nn.Linear(16, 13)
    with pytest.raises(StateError, match="2: its memory is for 1 groups of width 12, the layer has 1 of width 13"):
        session.begin_experience(model, [lambda: model(inputs(0))])
    assert not session.running
    assert session.memories["2"].stage is Stage.CONSOLIDATED
