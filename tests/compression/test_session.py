"""The session without a Trainer: swap, calibrate, observe, refresh, measure, join, save, restore."""

from __future__ import annotations

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
from lightning_lance.layers.registry import Variant
from tests.trainers import assert_restored, small_net, snapshot, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 6) -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(count)]


def calibrated(net: nn.Module, only: set[str] | None = None, **options: Any) -> LanceSession:
    session = LanceSession(net, LanceConfig(**options))
    session.start()
    session.calibrate([lambda x=x: net(x) for x in images(2)], only=only)
    return session


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one training step."""
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def factors(session: LanceSession) -> dict[str, list[Tensor]]:
    return {
        name: list(layer._lance.subspace.factors())
        for name, layer in session.layers.items()
        if layer._lance.subspace is not None
    }


def test_start_and_stop_are_inverse_and_repeatable() -> None:
    net = small_net()
    before = snapshot(net)
    session = LanceSession(net)
    for _ in range(2):
        session.start()
        session.start()  # as after a run that could not be restored
        assert is_swapped(net)
        session.stop()
        session.stop()
        assert_restored(net, before)


def test_uncalibrated_layers_run_the_stock_path() -> None:
    net, x = small_net().double(), torch.randn(16, 3, 8, 8).double()
    net[6].p = 0.0
    plain = step(net, x)
    kept = measure_saved_bytes(lambda: net(x), net).total
    session = LanceSession(net, LanceConfig(companions=False))
    session.start()
    assert session.uncalibrated == {"0", "3", "9"}
    assert not session.calibrated
    assert measure_saved_bytes(lambda: net(x), net).total == kept
    for name, grad in step(net, x).items():
        assert torch.equal(grad, plain[name])


def test_calibration_leaves_no_trace() -> None:
    net = small_net()
    before, state = weights(net), torch.get_rng_state()
    session = LanceSession(net)
    session.start()
    order = next(iter(session.layers.values()))._lance.order.state.clone()
    batches = images(2)
    state = torch.get_rng_state()
    session.calibrate([lambda x=x: net(x) for x in batches])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(next(iter(session.layers.values()))._lance.order.state, order)
    session.stop()
    for name, value in weights(net).items():
        assert torch.equal(value, before[name])


def test_a_failing_pass_leaves_the_model_uncalibrated_and_quiet() -> None:
    net = small_net()
    session = LanceSession(net)
    session.start()
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
    session.calibrate([lambda: net(images(1)[0])])
    assert session.calibrated


def test_observation_sees_training_steps_only() -> None:
    """Bases of an observation equal those of a calibration on the batches of the steps, and no others."""
    net, batches = small_net(), images(2)
    net[6].p = 0.0
    expected = calibrated(net, rank=3, companions=False)
    expected.calibrate([lambda x=x: net(x) for x in batches])
    bases = factors(expected)
    expected.stop()

    session = LanceSession(net, LanceConfig(rank=3, companions=False))
    session.start()
    session.observe()
    assert session.uncalibrated == set()
    net(images(1)[0] + 5)  # before a step, as in a validation
    for x in batches:
        session.begin_step()
        net(x).sum().backward()
        session.end_step()
        net(x * 3 + 7)
    assert session.observed == 2
    session.refresh()
    assert not session.observing
    for name, found in factors(session).items():
        for one, other in zip(found, bases[name], strict=True):
            torch.testing.assert_close(one @ one.T, other @ other.T, rtol=1e-4, atol=1e-4)


def test_refresh_does_not_disturb_a_graph_that_is_still_open() -> None:
    """Bases are re-assigned, never written: backward uses those of its own forward pass."""
    net, x = small_net(), images(1)[0]
    net[6].p = 0.0
    session = calibrated(net, rank=2)
    order = session.layers["3"]._lance.order.state
    drawn = order.clone()
    expected = step(net, x)
    order.copy_(drawn)
    net.zero_grad()
    loss = net(x).square().sum()
    bases = factors(session)["3"]
    session.observe()
    session.begin_step()
    with torch.no_grad():
        net(x.roll(1, 1) * torch.rand(8, 8))
    session.end_step()
    session.refresh()
    assert not torch.allclose(bases[0], factors(session)["3"][0])
    loss.backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def small_copy(net: nn.Module) -> nn.Module:
    copy = small_net()
    copy.load_state_dict(net.state_dict())
    return copy


def test_a_layer_that_a_refresh_does_not_see_keeps_its_subspace() -> None:
    net = small_net()
    session = calibrated(net, rank=2)
    before = factors(session)
    session.observe()
    session.begin_step()
    net[:4](images(1)[0])
    session.end_step()
    session.refresh()
    after = factors(session)
    assert before.keys() == after.keys()
    assert all(one is other for one, other in zip(before["9"], after["9"], strict=True))
    assert not any(one is other for one, other in zip(before["3"], after["3"], strict=True))
    session.observe()
    with pytest.warns(LanceWarning, match=r"not refreshed: no step was observed. Call begin_step\(\)"):
        session.refresh()  # nothing changes
    assert all(one is other for one, other in zip(after["3"], factors(session)["3"], strict=True))


def test_refresh_without_observation() -> None:
    session = calibrated(small_net())
    with pytest.raises(StateError, match=r"refresh\(\) without observe\(\): call observe\(\)"):
        session.refresh()


def test_measure() -> None:
    net, x = small_net(), images(1)[0]
    plain = measure_saved_bytes(lambda: net(x), net).total
    session = calibrated(net)
    before = weights(net)
    report = session.measure(lambda: net(x))
    for name, value in weights(net).items():
        assert torch.equal(value, before[name]), name
    assert all(layer._lance.observer is None for layer in session.layers.values())
    assert session.report is report
    assert report.plain is not None
    assert report.compressed is not None
    assert report.plain.total == plain
    assert report.compressed.total == measure_saved_bytes(lambda: net(x), net).total


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
    net[3].requires_grad_(True)  # a frozen convolution was a companion
    net[9].requires_grad_(True)  # a frozen linear layer was not swapped
    own = factors(session)["10"][0]
    assert session.join() == ["3", "9"]
    assert session.join() == []
    assert session.uncalibrated == {"3", "9"}
    session.calibrate([lambda x=x: net(x) for x in images(2)], only=session.uncalibrated)
    assert session.calibrated
    assert factors(session)["10"][0] is own
    assert session.layers["3"]._lance.order is session.layers["10"]._lance.order
    assert all(factor.shape[1] == 2 for factor in factors(session)["3"])
    session.stop()
    assert_restored(net, before)


def test_join_with_a_budget_shares_it_among_all() -> None:
    net = frozen_net()
    session = calibrated(net, memory_budget=2000)
    net[3].requires_grad_(True)
    session.join()
    session.calibrate([lambda x=x: net(x) for x in images(2)], only=session.uncalibrated)
    report = session.measure(lambda: net(images(1)[0]))
    assert {layer.name for layer in report.layers} == {"3", "10"}
    assert sum(layer.formula_bytes for layer in report.layers) <= 2000


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
    session = LanceSession(net)
    session.start()
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


def test_before_calibration_everything_runs_the_stock_path() -> None:
    net, plain, x = small_net(), small_net(), images(1)[0]
    plain.load_state_dict(net.state_dict())

    def kept(model: nn.Module) -> int:
        with session.functional():
            return measure_saved_bytes(lambda: torch.relu(model(x)), model).total

    session = LanceSession(net)
    session.start()
    companions = [module for module in net if isinstance(module, Variant) and not module.compresses]
    assert not companions
    torch.manual_seed(0)
    before = kept(plain)
    torch.manual_seed(0)
    assert kept(net) == before
    session.calibrate([lambda: net(x)])
    assert any(isinstance(module, Variant) and not module.compresses for module in net)
    assert kept(net) < before


def test_state_continues_in_another_model(tmp_path: Any) -> None:
    net, x = small_net(), images(1)[0]
    net[6].p = 0.0
    session = calibrated(net, rank=3)
    net(x)
    torch.save(session.state_dict(), tmp_path / "state.pt")
    other = small_copy(net)
    other[6].p = 0.0
    continued = LanceSession(other, LanceConfig(rank=3))
    continued.start()
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert continued.uncalibrated == set()
    one, two = step(net, x), step(other, x)
    for name, grad in one.items():
        assert torch.equal(grad, two[name]), name


def test_state_before_calibration() -> None:
    session = LanceSession(small_net())
    session.start()
    state = session.state_dict()
    other = LanceSession(small_net())
    other.start()
    other.load_state_dict(state)
    assert other.uncalibrated == {"0", "3", "9"}


def test_state_remembers_what_was_dropped() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    session = LanceSession(net)
    session.start()
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
    with pytest.raises(StateError, match="version 2; this package reads version 1"):
        session.load_state_dict({**state, "version": 2})
    session.stop()
    with pytest.raises(StateError, match=r"needs a swapped model: call start\(\) first"):
        session.load_state_dict(state)
    session.start()
    broken = {**state, "subspaces": {"0": {"batch": ["auto"]}}}
    with pytest.raises(StateError, match="a stored subspace cannot be read"):
        session.load_state_dict(broken)


def test_stored_options_win_also_in_a_refresh() -> None:
    session = calibrated(small_net(), rank=2)
    session.observe()
    session.begin_step()
    session.model(images(1)[0])
    session.end_step()
    state = session.state_dict()
    other = LanceSession(small_net(), LanceConfig(rank={"9": {"spatial": 0.5}}, batch="projected"))
    other.start()
    with pytest.warns(
        LanceWarning, match=r"continues with its stored subspaces \(rank=2, batch='unbiased', core_bits='auto'\)"
    ):
        other.load_state_dict(state)
    other.refresh()
    assert {factor.shape[1] for found in factors(other).values() for factor in found} == {2}
    assert all(layer._lance.subspace.batch.unbiased for layer in other.layers.values())
    assert other.state_dict()["config"] == state["config"]


def test_nothing_seen_is_an_error() -> None:
    session = LanceSession(small_net())
    session.start()
    with pytest.raises(CalibrationError, match="no swapped layer saw a usable input"):
        session.calibrate([lambda: None])


def test_no_supported_layer() -> None:
    net = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(PlanError, match=r"Supported, with a weight that requires grad: Conv1d, Conv2d, Conv3d, Linear"):
        LanceSession(net).start()
    assert not is_swapped(net)
