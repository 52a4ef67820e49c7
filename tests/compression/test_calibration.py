"""Calibration leaves no trace, finds what it should, and refuses what defines no subspace."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lance import (
    CalibrationError,
    ConfigError,
    LanceConfig,
    LanceWarning,
    StateError,
    calibrate,
    is_swapped,
    restore,
    swap,
)
from lightning_lance.compression.calibration import Calibration
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.processes import Processes
from lightning_lance.compression.surgery import compressed_layers
from tests.oracles import relative_error


class Noisy(nn.Module):
    """Everything that a forward pass in training mode may change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(2, 4))
        self.register_buffer("unset", None)
        self.register_buffer("grid", torch.arange(5.0).expand(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # in place
        self.queue = torch.cat([self.queue[1:], torch.full((1, 4), float(self.calls))])  # a new tensor
        random.random()
        np.random.rand()  # noqa: NPY002
        x = self.norm(self.conv(x + 0.1 * torch.randn_like(x)))
        return self.head(self.drop(self.spectral(x)).mean((2, 3)))


def trace(model: nn.Module) -> dict[str, Any]:
    """What calibration must leave as it was."""
    layers = compressed_layers(model)
    return {
        "buffers": {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()},
        "parameters": {name: parameter.clone() for name, parameter in model.named_parameters()},
        "grads": [parameter.grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "orders": [layer._lance.order.state.tolist() for layer in layers.values()],
        "observers": [layer._lance.observer for layer in layers.values()],
    }


def assert_same_trace(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, (identity, value) in one["buffers"].items():
        assert other["buffers"][name][0] == identity, name
        assert torch.equal(other["buffers"][name][1], value), name
    for name, value in one["parameters"].items():
        assert torch.equal(other["parameters"][name], value), name
    assert torch.equal(one["torch"], other["torch"])
    assert one["numpy"][1].tolist() == other["numpy"][1].tolist()
    assert one["numpy"][2:] == other["numpy"][2:]
    for key in ("grads", "training", "python", "grad mode", "orders", "observers"):
        assert one[key] == other[key], key


def noisy() -> Noisy:
    model = Noisy()
    with torch.no_grad():
        model(torch.randn(4, 3, 6, 6))  # spectral norm and running statistics are under way
    swap(model, LanceConfig(rank={"batch": 4, "channel": 0.8, "spatial": 0.8}))
    return model


def test_nothing_changes_but_the_subspaces() -> None:
    model = noisy()
    model.drop.eval()
    before = trace(model)
    with calibrate(model):
        for _ in range(3):
            model(torch.randn(8, 3, 6, 6))
    assert_same_trace(before, trace(model))
    assert all(layer._lance.subspace is not None for layer in compressed_layers(model).values())


def test_the_passes_inside_run_in_training_mode_without_gradients() -> None:
    model = noisy()
    with calibrate(model):
        assert model.training
        assert not model(torch.randn(8, 3, 6, 6)).requires_grad
        model.eval()  # a forward function of the user may do so
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_when_a_pass_fails(error: type[BaseException]) -> None:
    model = noisy()
    before = trace(model)

    def run() -> None:
        with calibrate(model):
            model(torch.randn(8, 3, 6, 6))
            model.eval()
            raise error("boom")

    with pytest.raises(error, match="boom"):
        run()
    assert_same_trace(before, trace(model))
    assert is_swapped(model)
    assert all(layer._lance.subspace is None for layer in compressed_layers(model).values())
    model(torch.randn(8, 3, 6, 6)).sum().backward()  # the stock path
    with calibrate(model):
        model(torch.randn(8, 3, 6, 6))


def test_two_parts_of_a_model_that_were_swapped_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for part in model:
        swap(part, LanceConfig(rank={"batch": 2}))
        with calibrate(part):
            part(torch.randn(8, 6))
    orders = [part._lance.order.state for part in model]
    with isolated(model):
        model(torch.randn(8, 6))
        assert [order[1].item() for order in orders] == [1, 1]
    assert [order[1].item() for order in orders] == [0, 0]


# --- what is seen -----------------------------------------------------------------------------------------------------


def spatial_factor(layer: Any) -> Tensor:
    factor = next(iter(layer._lance.subspace.spatial.values()))[0]
    assert factor is not None
    return factor


def leading(inputs: list[Tensor], axis: int, columns: int) -> Tensor:
    unfolding = torch.cat([input.movedim(axis, 0).flatten(1) for input in inputs], 1)
    return torch.linalg.svd(unfolding, full_matrices=False).U[:, :columns]


def test_statistics_accumulate_over_batches_of_every_size() -> None:
    scale = torch.exp(-torch.arange(7, dtype=torch.float64))
    inputs = [torch.randn(size, 3, 7, dtype=torch.float64) * scale for size in (8, 8, 5, 1)]
    model = nn.Sequential(nn.Conv1d(3, 4, 3).double())
    swap(model, LanceConfig(rank={"batch": 4, "spatial": 3}))
    with calibrate(model) as calibration:
        for input in inputs:
            model(input)
    assert calibration.statistics["0"].calls == 4
    factor, expected = spatial_factor(model[0]), leading(inputs, 2, 3)
    assert relative_error(factor @ factor.T, expected @ expected.T) < 1e-8


def test_a_module_called_twice_in_a_pass_accumulates_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6).double()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [x, torch.tanh(self.layer(x))]
            return self.layer(self.seen[1])

    model = Twice()
    swap(model, LanceConfig(rank={"channel": 3}))
    with calibrate(model) as calibration:
        model(torch.randn(8, 6, dtype=torch.float64))
    assert calibration.statistics["layer"].calls == 2
    factor = model.layer._lance.subspace.channel
    expected = leading(model.seen, 1, 3)
    assert relative_error(factor @ factor.T, expected @ expected.T) < 1e-8


def test_every_spatial_size_gets_factors_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    swap(model, LanceConfig(rank={"spatial": 2}))
    with calibrate(model):
        for sizes in ((6, 6), (8, 5), (6, 6)):
            model(torch.randn(8, 3, *sizes))
    subspace = model[0]._lance.subspace
    assert set(subspace.spatial) == {(6, 6), (8, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sizes in ((6, 6), (8, 5)):
            model(torch.randn(8, 3, *sizes)).sum().backward()
    model(torch.randn(8, 3, 7, 7)).sum().backward()  # another size runs the stock path


@pytest.mark.parametrize("rank", ["compact", 0.7, 2, 10**6, {"channel": 0.5}], ids=str)
@pytest.mark.parametrize("batch", ["unbiased", "projected"])
def test_batches_of_one_calibrate_and_train(rank: Any, batch: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    swap(model, LanceConfig(rank=rank, batch=batch))
    with calibrate(model):
        model(torch.randn(1, 3, 4, 4))
    for size in (1, 2, 8):
        model(torch.randn(size, 3, 4, 4)).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("rank", ["compact", 0.7, 8], ids=str)
def test_an_epoch_with_a_smaller_last_batch_trains(rank: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    data = torch.randn(35, 3, 6, 6)
    swap(model, LanceConfig(rank=rank))
    batches = data.split(16)
    assert len(batches[-1]) == 3
    with calibrate(model):
        for batch in batches:
            model(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches:
            model(batch).sum().backward()


def test_a_second_calibration_replaces_the_subspaces_by_new_tensors() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    swap(model, LanceConfig(rank={"channel": 2}))
    found = []
    for input in torch.randn(2, 16, 6):  # drawn outside: the random state inside is put back
        with calibrate(model):
            model(input)
        found.append(model[0]._lance.subspace.channel)
    assert found[0] is not found[1]
    assert not torch.equal(found[0], found[1])
    # A backward pass between the two still uses what its forward pass kept.
    loss = model(torch.randn(16, 6)).sum()
    with calibrate(model):
        model(torch.randn(16, 6))
    loss.backward()


@pytest.mark.parametrize("width", [6, 1100])
@pytest.mark.parametrize("place", ["around", "inside", "one pass"])
def test_inference_mode_leaves_nothing_that_training_cannot_use(place: str, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4))
    swap(model, LanceConfig(rank={"batch": 4, "channel": 2}))
    inputs = torch.randn(3, 16, width)
    with torch.inference_mode(place == "around"), calibrate(model):
        for index, input in enumerate(inputs):
            with torch.inference_mode(place == "inside" or (place == "one pass" and index == 0)):
                model(input.clone())
    for layer in compressed_layers(model).values():
        assert layer._lance.subspace is not None
        assert not any(factor.is_inference() for factor in layer._lance.subspace.factors())
    model(inputs[0]).sum().backward()


def test_only_some_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    swap(model, LanceConfig(rank=2))
    with calibrate(model, only={"1"}):
        model(torch.randn(16, 6))
    assert model[0]._lance.subspace is None
    assert model[1]._lance.subspace is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_calibrates(when: str) -> None:
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    model: Any = torch.compile(inner, backend="aot_eager")
    if when == "after":
        model(torch.randn(16, 6)).sum().backward()
    swap(inner, LanceConfig(rank={"batch": 4, "channel": 2}))
    if when == "before":
        model(torch.randn(16, 6)).sum().backward()  # compiled with the swapped, uncalibrated layers
    with calibrate(inner) as calibration:
        model(torch.randn(16, 6))
        model(torch.randn(16, 6))
    assert {statistics.calls for statistics in calibration.statistics.values()} == {2}
    input = torch.randn(16, 6)
    order = compressed_layers(inner)["0"]._lance.order.state
    found, drawn = [], order.clone()
    for run in (model, inner):
        order.copy_(drawn)
        inner.zero_grad()
        run(input).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in inner.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_processes_sum_what_they_saw() -> None:
    whole = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double()
    other = copy.deepcopy(whole)
    for model in (whole, other):
        swap(model, LanceConfig(rank={"channel": 3}))
    inputs = torch.randn(2, 16, 6, dtype=torch.float64)
    with calibrate(whole):
        for input in inputs:
            whole(input)
    remote = Calibration(other)
    remote.observe()
    with torch.no_grad():
        other(inputs[1])
    remote.stop()

    class WithRemote(Processes):
        """The second of two processes has seen its batch already."""

        def gather(self, found: Any) -> list[Any]:
            return [found, {name: statistics.signature() for name, statistics in remote.statistics.items()}]

        def sum(self, tensors: Iterable[Tensor]) -> None:
            statistics = next(waiting)
            for target, part in zip(tensors, statistics.tensors(), strict=True):
                target += part

    waiting = iter(remote.statistics[name] for name in sorted(remote.statistics))
    with calibrate(other, WithRemote(count=2)):
        other(inputs[0])
    for one, two in zip(whole, other, strict=True):
        projectors = [layer._lance.subspace.channel @ layer._lance.subspace.channel.T for layer in (one, two)]
        assert relative_error(projectors[0], projectors[1]) < 1e-8


# --- what cannot be calibrated ----------------------------------------------------------------------------------------


def pair(**options: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    swap(model, LanceConfig(**{"rank": "compact", **options}))
    return model


def calibrated_on(model: nn.Module, *inputs: Tensor) -> Calibration:
    with calibrate(model) as calibration:
        for input in inputs:
            model(input)
    return calibration


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", ["compact", 0.7, 2, 10**6], ids=str)
def test_values_that_are_not_finite_are_an_error_that_names_the_layer(value: float, rank: Any) -> None:
    model = pair(rank=rank)
    broken = torch.randn(8, 6)
    broken[2, 3] = value
    with pytest.raises(CalibrationError, match=r"0 received NaN or Inf.*check the data, its normalisation"):
        calibrated_on(model, torch.randn(8, 6), broken)
    assert all(layer._lance.subspace is None for layer in compressed_layers(model).values())
    model(torch.randn(8, 6)).sum().backward()
    restore(model)
    assert type(model[0]) is nn.Linear


def test_weights_that_are_not_finite_are_seen_at_the_layer_behind() -> None:
    model = pair()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="2 received NaN or Inf"):
        calibrated_on(model, torch.randn(8, 6))


def test_a_layer_of_zeros_is_left_alone_with_a_warning() -> None:
    model = pair()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # nothing passes the ReLU
    with pytest.warns(LanceWarning, match=r"2: all calibration inputs were zero.*left alone.*Check the layers before"):
        calibration = calibrated_on(model, torch.randn(8, 6))
    assert [(item.name, item.type) for item in calibration.left] == [("2", "Linear")]
    assert type(model[2]) is nn.Linear
    assert list(compressed_layers(model)) == ["0"]
    model(torch.randn(8, 6)).sum().backward()


@pytest.mark.parametrize("given", ["zeros", "empty", "nothing"])
def test_no_usable_input_at_all_is_an_error(given: str) -> None:
    model = pair()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    inputs = {"zeros": [torch.zeros(8, 6)], "empty": [torch.zeros(0, 6)], "nothing": []}[given]
    with pytest.raises(CalibrationError, match=r"no swapped layer saw a usable input.*0: .*Run the forward pass"):
        calibrated_on(model, *inputs)
    assert is_swapped(model)
    model(torch.randn(8, 6)).sum().backward()


def test_a_layer_that_is_never_called_is_swapped_back() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    swap(model, LanceConfig(rank="compact"))
    with calibrate(model) as calibration:
        model["used"](torch.randn(8, 6))
    assert type(model["unused"]) is nn.Linear
    assert [str(item) for item in calibration.left] == ["unused (Linear): calibration never saw an input of it"]


def test_calibrating_what_is_not_swapped_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(StateError, match=r"no swapped layer to calibrate. Call swap\(model\) first"), calibrate(model):
        pass
    swap(model, LanceConfig(rank="compact"))
    with pytest.raises(StateError, match=r"no swapped layer to calibrate"), calibrate(model, only={"7"}):
        pass


def test_a_budget_below_the_floor_is_an_error_that_names_it() -> None:
    model = pair()

    def run() -> None:
        with calibrate(model, budget=10):
            model(torch.randn(8, 6))

    with pytest.raises(ConfigError, match=r"memory_budget=10 bytes cannot be met: .* the 2 layers .* need \d+ B"):
        run()
    assert all(layer._lance.subspace is None for layer in compressed_layers(model).values())


def test_the_budget_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    swap(model, LanceConfig(rank="compact"))
    input = torch.randn(32, 8, 12, 12)
    budget = 20_000
    with calibrate(model, budget=budget):
        model(input)
    shapes = [(8, (12, 12)), (8, (12, 12))]
    layers = compressed_layers(model).values()
    kept = sum(
        layer._lance.subspace.formula_bytes(32, channels, sizes, 4)  # type: ignore[union-attr]
        for layer, (channels, sizes) in zip(layers, shapes, strict=True)
    )
    assert budget / 4 < kept <= budget
