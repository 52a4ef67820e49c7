"""The memory budget: kept in bytes, lowered in the stated order, refused below its floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import ConfigError, LanceConfig, LanceSession, Report, measure_saved_bytes
from lightning_lance.compression.report import LayerReport
from tests.trainers import Classifier, assert_restored, fit, lance, loader, small_net, snapshot

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
]

BATCH = 64


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 4, 1))


def inputs() -> Tensor:
    """Smooth images plus noise, so that energies differ from mode to mode."""
    coarse = torch.randn(BATCH, 6, 3, 3)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.3 * torch.randn(BATCH, 6, 16, 16)


def reported(budget: int | str | None, **options: Any) -> tuple[Report, int]:
    """The report, and the bytes that the compressed layers keep by measurement."""
    torch.manual_seed(0)
    net, x = convolutions(), inputs()
    session = LanceSession(net, LanceConfig(memory_budget=budget, **{"rank": "compact", "bits": None, **options}))
    session.start()
    session.calibrate([lambda: net(x)])
    with session.step():
        output = net(x)
    del output
    report = session.report
    assert report is not None
    holders = measure_saved_bytes(lambda: net(x), net).holders
    measured = sum(holder.bytes for holder in holders if holder.shape != (6, 16, 16))
    session.stop()
    return report, measured


def formula(report: Report) -> int:
    """Bytes of the layers, and the rotation of the batch mode, one copy for all."""
    columns = report.layers[0].core_shape[0]
    assert all(layer.core_shape[0] == columns for layer in report.layers)
    return sum(layer.formula_bytes for layer in report.layers) + (4 * columns**2 if columns < BATCH else 0)


AUTO = 11  # batch rank of 64 samples


def state(layer: LayerReport) -> tuple[bool, bool, bool]:
    """Which of spatial energy, batch rank and channel energy are lowered."""
    spatial = min(layer.energy.get("spatial_0", 1.0), layer.energy.get("spatial_1", 1.0))
    return spatial < 0.9, layer.core_shape[0] < AUTO, layer.core_shape[1] < layer.input_shape[1]


def test_budget_is_kept_in_measured_bytes_and_order() -> None:
    free, _ = reported(None)
    last: list[tuple[bool, bool, bool]] | None = None
    kept = formula(free)
    for budget in [*range(formula(free), 2400, -1700), 2200]:
        report, measured = reported(budget)
        assert formula(report) <= budget
        assert measured <= budget
        assert formula(report) <= kept
        kept = formula(report)
        states = [state(layer) for layer in report.layers]
        # Nothing of a later kind is lowered before the earlier kind is at its end.
        for spatial, batch, channel in states:
            assert spatial or not batch
            assert batch or not channel
        if any(channel for _, _, channel in states):
            assert all(layer.core_shape[0] == 2 for layer in report.layers)
        last = states
    assert last is not None
    assert all(any(found[kind] for found in last) for kind in range(3)), "the smallest budget lowers every kind"


def test_a_budget_that_is_met_exactly_is_enough_and_one_byte_less_is_not() -> None:
    free, measured = reported(None)
    exact, measured_exact = reported(formula(free))
    assert [layer.core_shape for layer in exact.layers] == [layer.core_shape for layer in free.layers]
    assert measured_exact == measured == formula(free)
    less, _ = reported(formula(free) - 1)
    assert formula(less) < formula(free)


def test_a_large_budget_changes_nothing() -> None:
    free, _ = reported(None)
    large, _ = reported("1GiB")
    assert [layer.core_shape for layer in large.layers] == [layer.core_shape for layer in free.layers]


def least(caught: pytest.ExceptionInfo[ConfigError]) -> int:
    """The budget that a message names."""
    return int(str(caught.value).split("at least ")[1].split(".")[0])


def test_the_floor_is_named_and_is_reachable() -> None:
    with pytest.raises(ConfigError, match=r"memory_budget=100 bytes cannot be met: 0 B are kept whatever") as caught:
        reported(100)
    floor = least(caught)
    report, _ = reported(floor)
    assert formula(report) == floor
    with pytest.raises(ConfigError, match=f"at least {floor}"):
        reported(floor - 1)


def mixed() -> nn.Sequential:
    """Much of what it keeps is not the input of a layer that can be projected."""
    first = [nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.GELU()]
    return nn.Sequential(*first, nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU())


def total(budget: int | None, rehearsed: bool, **options: Any) -> int:
    """All that a step keeps with a budget."""
    torch.manual_seed(0)
    net, x = mixed(), inputs()
    session = LanceSession(net, LanceConfig(memory_budget=budget, **{"calibration_batches": 2, **options}))
    session.start(observe=not rehearsed)
    if rehearsed:
        session.calibrate([lambda: net(x)] * 2)
    for _ in range(1 if rehearsed else 3):
        with session.step():
            output = net(x)
        output.sum().backward()
    session.stop()
    assert session.report is not None
    assert session.report.compressed is not None
    return session.report.compressed.total


@pytest.mark.parametrize("bits", ["auto", 2, 8, None])
@pytest.mark.parametrize("rehearsed", [False, True], ids=["steps", "rehearsed"])
def test_all_that_is_kept_counts(bits: Any, rehearsed: bool) -> None:
    free = total(None, rehearsed, bits=bits)
    with pytest.raises(ConfigError, match="cannot be met") as caught:
        total(1000, rehearsed, bits=bits)
    floor = least(caught)
    assert free / 4 < floor < free
    for budget in (floor, (floor + free) // 2):
        assert free / 4 < total(budget, rehearsed, bits=bits) <= budget


def test_a_budget_that_cannot_be_met_names_what_would_help() -> None:
    with pytest.raises(ConfigError, match=r"(?s)to keep less:.*half the batch, accumulate_grad_batches=2"):
        total(1000, False)


def test_layers_that_read_one_input_share_its_core_in_the_budget() -> None:
    floors = []
    for count in (1, 3):
        torch.manual_seed(0)
        x = torch.randn(16, 12, 64)
        layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))
        session = LanceSession(layers, LanceConfig(memory_budget=10))
        session.start(observe=False)
        with pytest.raises(ConfigError) as caught:
            session.calibrate([lambda layers=layers, x=x: sum(layer(x) for layer in layers)])
        floors.append(least(caught))
    assert floors[0] == floors[1]


def test_ranks_asked_for_are_never_raised() -> None:
    report, _ = reported("1GiB", rank=0.5)
    free, _ = reported(None, rank=0.5)
    assert [layer.core_shape for layer in report.layers] == [layer.core_shape for layer in free.layers]


def test_int_ranks_stay() -> None:
    report, _ = reported(9000, rank={"batch": "compact", "channel": 5, "spatial": 4})
    assert {layer.core_shape[1:] for layer in report.layers} == {(5, 4, 4)}
    assert {layer.core_shape[0] for layer in report.layers} < {2, 3, 4, 5, 6, 7}


def test_budget_in_a_trainer() -> None:
    callback = lance(memory_budget="14kB")
    fit(Classifier(), [callback], loader(64, 16), max_epochs=1)
    assert callback.report is not None
    assert callback.report.compressed is not None
    assert 7000 < callback.report.compressed.total <= 14_000


def test_budget_below_the_floor_in_a_trainer_leaves_the_model_as_it_was() -> None:
    module = Classifier(small_net())
    before = snapshot(module)
    with pytest.raises(ConfigError, match=r"Allowed for this batch size: at least \d+"):
        fit(module, [lance(memory_budget=10)], max_epochs=1)
    assert_restored(module, before)
