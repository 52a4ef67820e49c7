"""The session without a Trainer: steps, subspaces out of them, report, layers that join, state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import (
    CalibrationError,
    LanceConfig,
    LanceSession,
    LanceWarning,
    PlanError,
    StateError,
    is_swapped,
    measure_saved_bytes,
)
from lightning_lance.compression.session import Stage
from tests.oracles import parameter_gradients
from tests.swapped import COMPACT_MODES
from tests.trainers import assert_restored, small_net, snapshot, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 6) -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(count)]


def started(net: nn.Module, **options: Any) -> LanceSession:
    session = LanceSession(net, LanceConfig(**{"rank": COMPACT_MODES, "calibration_batches": 2, **options}))
    session.start()
    return session


def calibrated(net: nn.Module, only: set[str] | None = None, **options: Any) -> LanceSession:
    session = started(net, **options)
    session.calibrate([lambda x=x: net(x) for x in images(2)], only=only)
    return session


def train(session: LanceSession, batches: list[Tensor]) -> None:
    for x in batches:
        with session.step():
            loss = session.model(x).square().mean()
        loss.backward()


def factors(session: LanceSession) -> dict[str, list[Tensor]]:
    return {
        name: list(layer._lance.subspace.factors())
        for name, layer in session.layers.items()
        if layer._lance.subspace is not None
    }


# --- stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["auto", "compact"])
def test_start_and_stop_are_inverse_and_repeatable(rank: str) -> None:
    net = small_net()
    before = snapshot(net)
    session = LanceSession(net, LanceConfig(rank=rank))
    for _ in range(2):
        session.start()
        session.start()  # as after a run that could not be restored
        assert is_swapped(net) == (rank == "compact")
        session.begin_step()
        session.stop()  # in the middle of a step
        session.stop()
        assert_restored(net, before)
        assert session.stage is Stage.IDLE
        measure_saved_bytes(lambda: net(images(1)[0]), net)  # no hooks of ours are left


def test_first_steps_define_the_subspaces() -> None:
    """They equal those of a calibration on the same inputs; what runs between the steps is not looked at."""
    net, batches = small_net(), images(3)
    net[6].p = 0.0
    expected = calibrated(net, rank=3)
    expected.calibrate([lambda x=x: net(x) for x in batches[:2]])
    bases = factors(expected)
    expected.stop()

    session = started(net, rank=3)
    assert session.stage is Stage.OBSERVING
    assert session.uncalibrated == set()
    net(images(1)[0] + 5)  # before a step, as in a validation
    train(session, batches[:2])
    net(images(1)[0] * 3)
    assert not session.calibrated
    assert session.observed == 2
    train(session, batches[2:])
    assert session.calibrated
    assert session.stage is Stage.STEADY
    for name, found in factors(session).items():
        for one, other in zip(found, bases[name], strict=True):
            torch.testing.assert_close(one @ one.T, other @ other.T, rtol=1e-4, atol=1e-4)


def test_observed_steps_are_plain_ones_without_rounding() -> None:
    net, x = small_net().double(), torch.randn(16, 3, 8, 8).double()
    net[6].p = 0.0
    plain = parameter_gradients(net, x)
    net.zero_grad()
    session = started(net, bits=None)
    with session.step():
        loss = net(x).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in net.named_parameters())


def test_observed_steps_are_kept_in_few_bits() -> None:
    """A run that fits with its projection must fit in its first steps too."""
    net = small_net()
    session = started(net, bits=8)
    train(session, images(1))
    assert session.report is not None
    assert session.report.ratio > 5
    assert not session.reported
    train(session, images(2))
    assert session.reported


def test_calibration_on_given_batches_leaves_no_trace() -> None:
    net = small_net()
    before = weights(net)
    session = started(net)
    order = next(iter(session.layers.values()))._lance.order.state.clone()
    batches = images(2)
    state = torch.get_rng_state()
    session.calibrate([lambda x=x: net(x) for x in batches])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(next(iter(session.layers.values()))._lance.order.state, order)
    assert session.stage is Stage.STEADY
    session.stop()
    for name, value in weights(net).items():
        assert torch.equal(value, before[name])


def test_a_failing_pass_leaves_the_model_uncalibrated_and_quiet() -> None:
    net = small_net()
    session = started(net)
    before = weights(net)

    def fail() -> None:
        net(images(1)[0])
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        session.calibrate([fail])
    assert session.uncalibrated == {"0", "3", "9"}
    assert all(layer._lance.observer is None for layer in session.layers.values())
    for name, value in weights(net).items():
        assert torch.equal(value, before[name])
    train(session, images(3))  # the next steps define them
    assert session.calibrated


def test_a_step_that_fails_is_left() -> None:
    net = small_net()
    session = started(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"), session.step():
            raise RuntimeError("boom")
    assert all(layer._lance.observer is None for layer in session.layers.values())
    with pytest.raises(CalibrationError, match="no swapped layer saw a usable input"), session.step():
        pass  # two steps have passed, and no layer has seen anything


def test_refresh_does_not_disturb_a_graph_that_is_still_open() -> None:
    """Bases are re-assigned, never written: backward uses those of its own forward pass."""
    net, x = small_net(), images(1)[0]
    net[6].p = 0.0
    session = calibrated(net, rank=2)
    order = session.layers["3"]._lance.order.state
    drawn = order.clone()
    expected = parameter_gradients(net, x)
    order.copy_(drawn)
    net.zero_grad()
    loss = net(x).square().sum()
    bases = factors(session)["3"]
    session.observe()
    with session.step(), torch.no_grad():
        net(x.roll(1, 1) * torch.rand(8, 8))
    session.refresh()
    assert not torch.allclose(bases[0], factors(session)["3"][0])
    loss.backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_layer_that_a_refresh_does_not_see_keeps_its_subspace() -> None:
    net = small_net()
    session = calibrated(net, rank=2)
    before = factors(session)
    session.observe()
    with session.step():
        net[:4](images(1)[0])
    session.refresh()
    after = factors(session)
    assert before.keys() == after.keys()
    assert all(one is other for one, other in zip(before["9"], after["9"], strict=True))
    assert not any(one is other for one, other in zip(before["3"], after["3"], strict=True))
    session.observe()
    with pytest.warns(LanceWarning, match=r"not refreshed: no step was observed. Run training steps"):
        session.refresh()  # nothing changes
    assert all(one is other for one, other in zip(after["3"], factors(session)["3"], strict=True))
    with pytest.raises(StateError, match=r"refresh\(\) without observe\(\): call observe\(\)"):
        session.refresh()


@pytest.mark.parametrize(("refresh", "seen"), [(3, [2, 5]), ("epoch", [4, 8]), (None, [])])
def test_refresh_in_a_plain_loop(refresh: Any, seen: list[int]) -> None:
    net = small_net()
    session = started(net, refresh=refresh, calibration_batches=1)
    found, before = [], None
    for count, x in enumerate(images(9)):
        if count % 4 == 0:
            session.begin_epoch()
        train(session, [x])
        base = factors(session).get("3")
        if before is not None and base is not None and base[0] is not before:
            found.append(count)
        before = None if base is None else base[0]
    expected = {3: [4, 7], "epoch": [5], None: []}[refresh]
    assert found == expected


# --- report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["auto", COMPACT_MODES, 2], ids=str)
def test_the_report_is_that_of_a_step(rank: Any) -> None:
    net, x = small_net(), images(1)[0]
    plain = measure_saved_bytes(lambda: net(x).square().mean(), net)
    session = started(net, rank=rank, bits=4)
    train(session, images(2))
    train(session, [x])
    report = session.report
    assert report is not None
    assert report.plain is not None
    assert report.compressed is not None
    assert report.plain.total == plain.total
    assert report.plain.by_module().keys() >= {"1", "4"}
    assert report.compressed.total < plain.total / 5
    assert [layer.name for layer in report.layers] == ([] if rank == "auto" else ["0", "3", "9"])
    assert all(layer._lance.observer is None for layer in session.layers.values())
    train(session, [x])
    assert session.report is report  # once


def test_nothing_rounded_is_exact_and_keeps_less() -> None:
    net, x = small_net(), images(1)[0]
    torch.manual_seed(0)
    plain = parameter_gradients(net, x)
    net.zero_grad()
    session = started(net, rank=None, bits=None)
    torch.manual_seed(0)
    with session.step():
        loss = net(x).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in net.named_parameters())
    assert session.report is not None
    assert session.report.ratio > 1.2


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_stock_network(how: str) -> None:
    net, x = small_net(), images(1)[0]
    session = calibrated(net)
    made = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    session.stop()
    assert [type(module) for module in made.modules()] == [type(module) for module in net.modules()]
    assert not any("_lance" in vars(module) for module in made.modules())
    for one in (net, made):
        one.eval()
    assert torch.equal(net(x), made(x))
    torch.jit.script(made)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_in_the_step_that_is_reported(how: str) -> None:
    """Modules have hooks then, which say what runs; those of a copy do nothing, to it or to the step."""
    net, x = small_net(), images(1)[0]
    session = LanceSession(net, LanceConfig(bits=4))
    session.start()
    with session.step():
        made = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        made.eval()(x)
        loss = net(x).square().mean()
    loss.backward()
    session.stop()
    assert session.report is not None
    assert session.report.compressed is not None
    assert set(session.report.compressed.by_module()) <= {name for name, _ in net.named_modules()}
    assert made.training is False


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_session_trains_as_the_session_does(how: str) -> None:
    def copied(session: LanceSession) -> LanceSession:
        return copy.deepcopy(session) if how == "deepcopy" else pickle.loads(pickle.dumps(session))  # type: ignore[no-any-return]

    batches = images(4)
    sessions = [LanceSession(small_net(), LanceConfig(bits=4, calibration_batches=2))]
    for _ in range(2):  # before it has ever started, and when it has stopped
        sessions = [sessions[0], copied(sessions[0])]
        gradients = []
        for session in sessions:
            torch.manual_seed(0)  # of the dropout
            session.model.zero_grad()
            session.start()
            train(session, batches)
            gradients.append([p.grad for p in session.model.parameters()])
            with pytest.raises(StateError, match=r"cannot be copied between start\(\) and stop\(\)"):
                copied(session)
            with session.step(), pytest.raises(StateError, match="cannot be copied"):
                copied(session)
            session.stop()
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
        assert not is_swapped(sessions[1].model)


def test_a_copy_inside_of_the_module_trains_and_is_restored() -> None:
    net = nn.ModuleDict({"own": small_net()})
    session = LanceSession(net, LanceConfig(rank=2, calibration_batches=1))
    session.start()
    net["ema"] = copy.deepcopy(net["own"])
    for x in images(4):
        with session.step():
            loss = (net["own"](x) - net["ema"](x)).square().mean()
        loss.backward()
    assert set(session.layers) >= {"own.0", "own.3"}
    session.stop()
    assert not is_swapped(net)


# --- layers that join ----------------------------------------------------------------------------------------------


def frozen_net() -> nn.Sequential:
    net = small_net()
    net.append(nn.Linear(5, 5))
    for layer in (net[0], net[3], net[9]):
        layer.requires_grad_(False)
    return net


def test_join_swaps_what_became_trainable() -> None:
    net = frozen_net()
    before = snapshot(net)
    session = calibrated(net, rank=2)
    assert set(session.layers) == {"10"}
    assert session.join() == []
    net[3].requires_grad_(True)
    net[9].requires_grad_(True)
    own = factors(session)["10"][0]
    assert session.join() == ["3", "9"]
    assert session.join() == []
    assert session.uncalibrated == {"3", "9"}
    train(session, images(3))  # two define the new ones
    assert session.calibrated
    assert factors(session)["10"][0] is own
    assert session.layers["3"]._lance.order is session.layers["10"]._lance.order
    assert all(factor.shape[1] == 2 for factor in factors(session)["3"])
    session.stop()
    assert_restored(net, before)


def test_join_where_nothing_was_swapped_yet() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    net.requires_grad_(False)
    with pytest.raises(PlanError, match="2 supported layers are frozen"):
        LanceSession(net, LanceConfig(rank=2)).start()
    session = LanceSession(net)
    session.start()
    net.requires_grad_(True)
    with session.step():
        net(torch.randn(32, 64)).sum()


def test_join_with_a_budget_shares_it_among_all() -> None:
    net = frozen_net()
    session = calibrated(net, rank="auto", memory_budget=16_000)
    net[3].requires_grad_(True)
    train(session, images(3))
    report = session.report
    assert report is not None
    assert {layer.name for layer in report.layers} == {"3", "10"}
    assert report.compressed is not None
    assert 8000 < report.compressed.total <= 16_000


def test_join_leaves_alone_what_calibration_never_saw() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.late = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.used(x))

    net = Branch()
    session = started(net)
    session.calibrate([lambda: net(torch.randn(8, 4))])
    net.late.requires_grad_(True)
    assert session.join() == ["late"]
    assert set(session.layers) == {"used", "late"}
    assert [item.name for item in session.left] == ["unused"]


def test_join_when_everything_is_frozen_changes_nothing() -> None:
    net = small_net()
    session = calibrated(net)
    net.requires_grad_(False)
    assert session.join() == []
    assert session.calibrated
    net.requires_grad_(True)
    assert session.join() == []
    assert set(session.layers) == {"0", "3", "9"}


def test_join_respects_patterns() -> None:
    net = frozen_net()
    session = calibrated(net, layers=["3", "10"])
    net.requires_grad_(True)
    assert session.join() == ["3"]
    other = frozen_net()
    session = calibrated(other, layers=1)
    other.requires_grad_(True)
    assert session.join() == []


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 0.8, "bits": 2}, {"rank": None, "bits": 2}])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_state_continues_in_another_model(options: dict[str, Any], steps: int, tmp_path: Any) -> None:
    net, batches = small_net(), images(8)
    session = started(net, **options)
    train(session, batches[:steps])
    net.zero_grad()
    torch.save(session.state_dict(), tmp_path / "state.pt")
    other = small_net()
    other.load_state_dict(net.state_dict())
    continued = started(other, **options)
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (session, continued):
        torch.manual_seed(3)
        train(one, batches[steps:])
    for (name, left), right in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_state_remembers_what_was_dropped() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    session = started(net)
    session.calibrate([lambda: net["used"](torch.randn(8, 4))])
    state = session.state_dict()
    session.stop()
    session.start()
    session.load_state_dict(state)
    assert set(session.layers) == {"used"}
    assert session.uncalibrated == set()
    assert [item.name for item in session.left] == ["unused"]


def test_states_that_do_not_fit() -> None:
    net = small_net()
    session = calibrated(net)
    state = session.state_dict()
    for bad in ({**state, "version": 1}, {}, None, [], 3):
        with pytest.raises(StateError, match=r"Allowed: version 5|without 'version'|Allowed: a dict"):
            session.load_state_dict(bad)
    with pytest.raises(StateError, match="options that this package does not read"):
        session.load_state_dict({**state, "config": {"rank": "low"}})
    session.stop()
    with pytest.raises(StateError, match=r"before start\(\): call start\(\) first"):
        session.load_state_dict(state)
    session.start()
    broken = {**state, "subspaces": {"0": {"batch": ["auto"]}}}
    with pytest.raises(StateError, match="stored subspace"):
        session.load_state_dict(broken)


def test_stored_options_win_also_in_a_refresh() -> None:
    session = calibrated(small_net(), rank=2)
    session.observe()
    train(session, images(1))
    state = session.state_dict()
    other = LanceSession(small_net(), LanceConfig(rank={"9": {"spatial": 0.5}}, batch="projected"))
    other.start()
    with pytest.warns(
        LanceWarning, match=r"continues with its stored options \(rank=2, batch='unbiased', bits='auto'\)"
    ):
        other.load_state_dict(state)
    other.refresh()
    assert {factor.shape[1] for found in factors(other).values() for factor in found} == {2}
    assert all(layer._lance.subspace.batch.unbiased for layer in other.layers.values())
    assert other.state_dict()["config"] == state["config"]


def test_no_supported_layer() -> None:
    net = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(PlanError, match=r"Supported, with a weight that requires grad: Conv1d, Conv2d, Conv3d, Linear"):
        LanceSession(net, LanceConfig(rank=2)).start()
    assert not is_swapped(net)
    session = LanceSession(net)
    session.start()  # what it keeps is rounded all the same
    session.stop()
