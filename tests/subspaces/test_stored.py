"""Stored subspaces and statistics: every change to one is refused with nothing changed, or harmless."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lance import CalibrationError, LanceConfig, LanceSession, StateError
from lightning_lance.subspaces.ranks import ModeRanks
from lightning_lance.subspaces.stored import check_session_state
from lightning_lance.subspaces.subspace import LayerStatistics, LayerSubspace
from lightning_lance.tensors.checked import Stored
from tests.mutations import DELETED, EXAMPLES, changed, mutated, refusal, same

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RANKS = [ModeRanks(4, 0.7, 0.7), ModeRanks("compact", "full", "compact"), ModeRanks(0.9, 3, 2)]


@functools.cache
def statistics(index: int, dtype: torch.dtype = torch.float32) -> LayerStatistics:
    found = LayerStatistics(RANKS[index], 1, "layer")
    generator = torch.Generator().manual_seed(index)
    for sizes in ((5, 7), (4, 4), (5, 7)):
        found.update(torch.randn(6, 8, *sizes, generator=generator).cumsum(1).to(dtype))
    return found


@functools.cache
def subspace(index: int) -> dict[str, Any]:
    return statistics(index).spectra().subspace(RANKS[index], index != 1, 4 if index else None).state_dict()


def assert_sound(found: LayerSubspace) -> None:
    """Whatever was loaded, training with it multiplies with finite, orthonormal numbers only."""
    for factor in found.factors():
        assert factor.isfinite().all()
        wide = factor.double()
        torch.testing.assert_close(wide.T @ wide, torch.eye(wide.shape[1]).double(), atol=0.05, rtol=0)
    for size in (1, 2, 16, 100):
        assert 1 <= found.batch.columns(size) <= size
        assert math.isfinite(found.batch.contrast_scale(size))
    for sizes, group in found.spatial.items():
        assert len(sizes) == len(group)
        assert all(length >= 1 for length in found.core_shape(16, 8, sizes) if 0 not in sizes)
        assert found.formula_bytes(16, 8, sizes, 4) >= 0
    assert found.bits in (None, 2, 4, 8)
    assert found.any_size in (True, False)


@given(st.integers(0, 2).flatmap(lambda index: mutated(subspace(index))))
@settings(max_examples=EXAMPLES)
def test_a_changed_subspace_is_refused_or_harmless(change: tuple[str, Any]) -> None:
    what, state = change
    note(what)
    place = "conv1: the stored subspace"
    text = refusal(LayerSubspace.from_state_dict, state, place, 8)
    if text is None:
        assert_sound(LayerSubspace.from_state_dict(state, place, 8))
    else:
        assert text.startswith(place)


@given(st.integers(0, 2).flatmap(lambda index: st.tuples(st.just(index), mutated(statistics(index).state_dict()))))
@settings(max_examples=EXAMPLES)
def test_changed_statistics_are_refused_with_nothing_changed_or_harmless(change: tuple[int, tuple[str, Any]]) -> None:
    index, (what, state) = change
    note(what)
    target = LayerStatistics(RANKS[index], 1, "layer")
    before = target.state_dict()
    text = refusal(target.load_state_dict, state, CPU, 8)
    if text is not None:
        assert text.startswith("layer: the stored statistics")
        assert same(target.state_dict(), before)
        return
    target.update(torch.randn(6, 8, 5, 7))
    try:
        found = target.spectra().subspace(RANKS[index], True)
    except CalibrationError:  # NaN was accumulated, which the run that stored it would have found too
        return
    assert_sound(found)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_what_is_stored_loads(index: int, dtype: torch.dtype) -> None:
    one = statistics(index, dtype)
    other = LayerStatistics(RANKS[index], 1, "layer")
    other.load_state_dict(one.state_dict(), CPU, 8)
    assert same(one.state_dict(), other.state_dict())
    state = one.spectra().subspace(RANKS[index], True).to(CPU, dtype).state_dict()
    assert same(LayerSubspace.from_state_dict(state, channels=8).state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_factors_of_low_precision_load(dtype: torch.dtype) -> None:
    found = LayerStatistics(ModeRanks("full", 200, "full"), -1, "layer")
    found.update(torch.randn(500, 1500))
    state = found.spectra().subspace(ModeRanks("full", 200, "full"), True).to(CPU, dtype).state_dict()
    LayerSubspace.from_state_dict(state, channels=1500)


def test_statistics_with_nan_go_on_as_the_run_that_stored_them() -> None:
    one = LayerStatistics(RANKS[0], 1, "layer")
    one.update(torch.full((2, 8, 5, 7), float("nan")))
    other = LayerStatistics(RANKS[0], 1, "layer")
    other.load_state_dict(one.state_dict(), CPU)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        other.spectra()


CASES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("channel",), None, ""),
    (("channel",), [1, 2], r"\['channel'\] is a list of 2\. Allowed: a dense tensor of shape \(8, any\)"),
    (("bits",), 3, r"\['bits'\] is 3\. Allowed: None, 2, 4, 8"),
    (("bits",), DELETED, "is a dict without 'bits'"),
    (("batch", 0), "bogus", r"\['batch'\]\[0\] is 'bogus'\. Allowed: 'compact', 'full', an int of at least 1"),
    (("batch", 0), -1, r"\['batch'\]\[0\] is -1"),
    (("spatial", 0, 0), ["a", -3], r"\['spatial'\]\[0\]\[0\]\[0\] is 'a'\. Allowed: an int of at least 0"),
    (("energy", "channel"), float("nan"), r"\['energy'\]\['channel'\] is nan\. Allowed: a number from 0 to 1\.01"),
]


@pytest.mark.parametrize(("path", "value", "text"), CASES, ids=[str(index) for index in range(len(CASES))])
def test_the_place_is_named(path: tuple[Any, ...], value: Any, text: str) -> None:
    state = changed(subspace(0), path, value)
    if not text:
        LayerSubspace.from_state_dict(state)
        return
    with pytest.raises(StateError, match=f"^fc: the stored subspace.*{text}.*Resume without"):
        LayerSubspace.from_state_dict(state, "fc: the stored subspace", 8)


# --- the state of a whole session -------------------------------------------------------------------------------------


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.Flatten())


CHANNELS = {"0": 3, "2": 8}


@functools.cache
def session_state() -> dict[str, Any]:
    model = net()
    session = LanceSession(model, LanceConfig(rank=0.8))
    session.start()
    x = torch.randn(12, 3, 8, 8)
    session.calibrate([lambda: model(x)])
    session.observe()
    session.begin_step()
    model(x)
    session.end_step()
    return session.state_dict()


def fresh_statistics() -> dict[str, LayerStatistics]:
    return {name: LayerStatistics(ModeRanks(0.8, 0.8, 0.8), 1, name) for name in CHANNELS}


def test_the_state_of_a_session_is_read() -> None:
    state = session_state()
    found = check_session_state(state, state["version"], CHANNELS, fresh_statistics())
    assert found.subspaces.keys() == state["subspaces"].keys() == CHANNELS.keys()
    assert list(found.order or ()) == state["order"]
    assert (found.observed, found.steps) == (state["observed"], state["steps"]) == (1, 1)
    assert found.observing is not None
    assert found.config == state["config"]


@given(st.deferred(lambda: mutated(session_state())))
@settings(max_examples=EXAMPLES)
def test_a_changed_state_of_a_session_is_refused_or_whole(change: tuple[str, Any]) -> None:
    what, state = change
    note(what)
    args = (state, session_state()["version"], CHANNELS, fresh_statistics())
    if refusal(check_session_state, *args) is not None:
        return
    found = check_session_state(*args)
    for one in found.subspaces.values():
        assert_sound(one)
    for name, stored in (found.observing or {}).items():
        if name in CHANNELS:
            LayerStatistics(ModeRanks(0.8, 0.8, 0.8), 1, name).load_state_dict(stored, CPU, CHANNELS[name])


@pytest.mark.parametrize("state", [None, [], 3, {}, {"version": True}, {"version": "1"}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(StateError, match=r"^the stored state.*Allowed: .*Resume without the callback's state"):
        check_session_state(state, 1, CHANNELS)


def test_a_model_of_other_widths_is_named() -> None:
    state = session_state()
    text = r"2: the stored subspace\['channel'\] is a tensor of shape \(8, \d\).*Allowed: .* shape \(9, any\)"
    with pytest.raises(StateError, match=text):
        check_session_state(state, state["version"], {"0": 3, "2": 9})
    bare = {**state, "subspaces": {}}
    with pytest.raises(StateError, match=r"2: the stored statistics\['signature'\]\[0\] is 8\. Allowed: 9"):
        check_session_state(bare, state["version"], {"0": 3, "2": 9}, fresh_statistics())


@pytest.mark.parametrize("version", [0, 2, 99, None])
def test_another_version_is_named(version: Any) -> None:
    with pytest.raises(
        StateError, match=rf"\['version'\] is {version}\. Allowed: version 1, the one that this package"
    ):
        check_session_state({**session_state(), "version": version}, 1, CHANNELS)


def test_a_sketch_of_another_width_is_refused_before_it_is_made() -> None:
    ranks = ModeRanks("full", 0.8, "full")
    one = LayerStatistics(ranks, -1, "layer")
    one.update(torch.randn(40, 1100) @ torch.diag(torch.arange(1100) < 30).float())
    state = one.state_dict()
    for wrong in ([10**9], [0], [65], [64, 64], []):
        other = LayerStatistics(ranks, -1, "layer")
        with pytest.raises(StateError):
            other.load_state_dict(changed(state, ("signature", 3), wrong), CPU)
        assert other.calls == 0
        assert not other.tensors()


def test_descriptions_stay_short() -> None:
    with pytest.raises(StateError) as caught:
        Stored("x" * 10_000, "state").integer(0)
    assert str(caught.value) == "state is a str. Allowed: an int of at least 0."
