"""Measured bytes against sums done by hand, for what torch keeps and for what ours keep."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, SavedBytes, calibrate, measure_saved_bytes, swap
from lightning_lance.compression.saved_bytes import Holder
from tests.live_bytes import LiveBytes

FLOAT = 4


def measured(model: nn.Module, *inputs: Tensor) -> SavedBytes:
    return measure_saved_bytes(lambda: model(*inputs), model)


# --- sums by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_keeps_its_input(bias: bool) -> None:
    assert measured(nn.Linear(10, 20, bias), torch.randn(8, 10)).total == 8 * 10 * FLOAT


def test_a_frozen_linear_keeps_nothing() -> None:
    model = nn.Linear(10, 20).requires_grad_(False)
    assert measured(model, torch.randn(8, 10, requires_grad=True)).total == 0


def test_two_linear_layers_and_an_activation() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    # The input, and the output of the ReLU, which the second linear layer keeps as well: counted once.
    assert measured(model, torch.randn(8, 10)).total == (8 * 10 + 8 * 20) * FLOAT


def test_convolution_batch_norm_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    kept = measured(model, torch.randn(4, 3, 8, 8))
    image, maps = 4 * 3 * 64 * FLOAT, 4 * 6 * 64 * FLOAT
    # The convolution's input, the norm's input and its two vectors, the ReLU's output; running statistics are buffers.
    assert kept.total == image + maps + 2 * 6 * FLOAT + maps
    assert kept.by_module() == {"0": image, "1": maps + 2 * 6 * FLOAT, "2": maps}
    assert kept.by_op() == {
        "batch_norm": maps + 2 * 6 * FLOAT,
        "relu": maps,
        "conv2d": image,
    }


def test_dropout_keeps_its_mask() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Dropout(0.5))
    kept = measured(model, torch.randn(8, 10))
    mask = {torch.float32: 4, torch.bool: 1}
    (holder,) = [holder for holder in kept.holders if holder.module == "1"]
    assert holder.shape == (8, 20)
    assert holder.bytes == 8 * 20 * mask[holder.dtype]
    assert kept.total == 8 * 10 * FLOAT + holder.bytes


def test_max_pool_keeps_its_input_and_eight_byte_indices() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.MaxPool2d(2))
    kept = measured(model, torch.randn(4, 3, 8, 8))
    assert kept.by_module() == {"0": 4 * 3 * 64 * FLOAT, "1": 4 * 6 * 64 * FLOAT + 4 * 6 * 16 * 8}


def test_a_residual_network_keeps_each_storage_once() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.one(x)))

    model = nn.Sequential(Residual(), Residual())
    # For each block its input and the ReLU's output; the first input is the given one.
    assert measured(model, torch.randn(8, 6)).total == 4 * 8 * 6 * FLOAT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    kept = measured(nn.Linear(10, 20).to(dtype), torch.randn(8, 10).to(dtype))
    assert kept.total == 8 * 10 * dtype.itemsize
    assert kept.holders[0].dtype == dtype


def test_weights_that_autocast_casts_are_kept_and_counted() -> None:
    model = nn.Linear(10, 20)
    input = torch.randn(8, 10, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input)

    # The cast input for the weight gradient, the cast weight for the input gradient.
    assert measure_saved_bytes(run, model).total == (8 * 10 + 20 * 10) * 2


# --- storages ---------------------------------------------------------------------------------------------------------


def test_views_and_aliases_count_once_and_as_the_whole_storage() -> None:
    whole = torch.randn(100, 10)
    weights = [nn.Parameter(torch.randn(4, 10)) for _ in range(4)]
    views = [whole[:8], whole[:8].clone()[:2], whole[50:58], whole.view(10, 100).view(100, 10)[:8]]

    def run() -> list[Tensor]:
        return [F.linear(view, weight) for view, weight in zip(views, weights, strict=True)]

    # Three views of one storage keep all of it; the clone of eight rows is kept whole for its two.
    assert measure_saved_bytes(run).total == whole.nbytes + 8 * 10 * FLOAT


def test_a_truncated_factor_that_is_a_view_would_be_seen() -> None:
    factor = torch.randn(64, 64)
    weight = nn.Parameter(torch.randn(3, 2))
    assert measure_saved_bytes(lambda: F.linear(factor[:, :2], weight)).total == 64 * 64 * FLOAT
    assert measure_saved_bytes(lambda: F.linear(factor[:, :2].contiguous(), weight)).total == 64 * 2 * FLOAT


def test_parameters_and_buffers_are_left_out_also_as_views_and_detached() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 10))
            self.register_buffer("scale", torch.randn(12))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight[2:8].view(6, 10)) * self.scale[:6]
            return y * self.weight.detach()[:6, 0]

    model = Odd()
    input = torch.randn(8, 10, requires_grad=True)
    assert measured(model, input).total == 8 * 10 * FLOAT
    # Without the model, what a Parameter backs is still left out; buffers and what was detached cannot be known.
    assert measure_saved_bytes(lambda: F.linear(input, model.weight[:4])).total == 8 * 10 * FLOAT


def test_a_model_given_as_function_is_found() -> None:
    class NoInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))
            self.register_buffer("scale", torch.randn(6))

        def forward(self) -> Tensor:
            return (self.weight * self.scale).exp()

    model = NoInput()
    for function in (model, model.forward):
        kept = measure_saved_bytes(function)
        assert kept.total == 6 * FLOAT  # the result of exp
    assert kept.holders[0].op == "exp"


def test_empty_tensors_count_nothing() -> None:
    kept = measured(nn.Linear(10, 20), torch.randn(0, 10))
    assert (kept.total, kept.holders) == (0, [])


def test_what_was_saved_but_let_go_is_not_kept() -> None:
    model = nn.Linear(10, 20)

    def run() -> Tensor:
        model(torch.randn(64, 10))  # its graph dies at once
        return model(torch.randn(8, 10))

    assert measure_saved_bytes(run, model).total == 8 * 10 * FLOAT


def test_what_a_dead_reference_cycle_holds_is_not_kept() -> None:
    model = nn.Linear(10, 20)

    def run() -> Tensor:
        cycle: list[Any] = [model(torch.randn(64, 10))]
        cycle.append(cycle)
        return model(torch.randn(8, 10))

    assert measure_saved_bytes(run, model).total == 8 * 10 * FLOAT


def test_a_graph_that_the_model_keeps_beside_its_result_is_kept() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(10, 20), nn.Linear(10, 3)
            self.loss: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.loss = self.other(x * 2.0)
            return self.layer(x)

    kept = measured(Auxiliary(), torch.randn(8, 10))
    assert kept.by_module() == {"layer": 8 * 10 * FLOAT, "other": 8 * 10 * FLOAT}
    assert kept.by_op() == {"linear": 2 * 8 * 10 * FLOAT}


def test_a_result_without_a_graph_keeps_nothing() -> None:
    model = nn.Linear(10, 20)

    def run() -> Tensor:
        with torch.no_grad():
            return model(torch.randn(8, 10))

    for function in (run, lambda: None, lambda: 3.0, lambda: {"loss": torch.ones(2)}):
        assert measure_saved_bytes(function, model).total == 0


@pytest.mark.parametrize("wrap", [lambda y: {"loss": y, "n": 3}, lambda y: [y, (y.sum(), None)], lambda y: y.sum()])
def test_results_in_containers(wrap: Any) -> None:
    model = nn.Linear(10, 20)
    assert measure_saved_bytes(lambda: wrap(model(torch.randn(8, 10))), model).total == 8 * 10 * FLOAT


def test_results_that_are_dataclasses_are_followed() -> None:
    @dataclasses.dataclass
    class Output:
        loss: Tensor
        name: str = "output"

    model = nn.Linear(10, 20)
    kept = measure_saved_bytes(lambda: Output(model(torch.randn(8, 10))), model)
    assert kept.total == 8 * 10 * FLOAT


def test_gradients_are_on_inside_whatever_they_are_outside() -> None:
    model = nn.Linear(10, 20)
    with torch.no_grad():
        assert measured(model, torch.randn(8, 10)).total == 8 * 10 * FLOAT


# --- who holds --------------------------------------------------------------------------------------------------------


def test_holders_name_the_operation_the_module_and_the_shape() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.body(x).mean((2, 3)), -1).log()

    kept = measured(Net(), torch.randn(4, 3, 8, 8))
    found = [(holder.op, holder.module, holder.shape) for holder in kept.holders]
    # The softmax keeps its result, which log keeps as well: it counts for whoever saved it first.
    assert found == [
        ("relu", "body.1", (4, 6, 8, 8)),
        ("conv2d", "body.0", (4, 3, 8, 8)),
        ("softmax", "", (4, 6)),
    ]
    assert [holder.bytes for holder in kept.holders] == sorted([h.bytes for h in kept.holders], reverse=True)
    assert sum(holder.bytes for holder in kept.holders) == kept.total
    text = str(kept)
    assert "autograd keeps 9.31 KB in 3 storages" in text
    for part in ("6.14 KB  relu  4x6x8x8  body.1", "3.07 KB", "96 B  softmax"):
        assert part in text


def test_the_innermost_module_is_named_also_when_one_is_called_in_a_loop_or_fails() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            with contextlib.suppress(RuntimeError):
                self.cell(torch.randn(2, 7))
            return x.exp()

    kept = measured(Looping(), torch.randn(4, 6))
    # The cell saves the first input; the three results of tanh, and that of exp, are saved outside of it.
    assert kept.by_module() == {"cell": 4 * 6 * FLOAT, "": 4 * 4 * 6 * FLOAT}


def test_no_hook_stays_behind_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    measured(model, torch.randn(2, 6))
    with pytest.raises(RuntimeError):
        measured(model, torch.randn(2, 7))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    # A hook that had stayed would hand the backward pass a stand-in.
    input = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(input.square().sum(), input)
    assert grad.equal(2 * input)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_model_with_a_scripted_part() -> None:
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 4)))
    # A scripted graph decides by itself what it keeps; at least the first layer's input is there.
    assert measured(model, torch.randn(4, 6)).total >= 4 * 6 * FLOAT


# --- checkpointed segments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_segment_keeps_its_input_only(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh())
    input = torch.randn(8, 10)

    def run() -> Tensor:
        first = checkpoint(model[:2], input.clone().requires_grad_(), use_reentrant=reentrant)
        return checkpoint(model[2:], first, use_reentrant=reentrant)

    assert measure_saved_bytes(run, model).total == (8 * 10 + 8 * 20) * FLOAT


@pytest.mark.parametrize("reentrant", [True, False])
def test_measuring_a_checkpointed_segment_does_not_run_it_again(reentrant: bool) -> None:
    calls: list[str] = []

    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.device.type)
            assert x.device.type == "cpu"
            return self.layer(self.norm(x))

    model = Segment()
    leaf = torch.randn(8, 10, requires_grad=True)
    kept = measure_saved_bytes(lambda: checkpoint(model, leaf * 1.0, use_reentrant=reentrant), model)
    assert kept.total == 8 * 10 * FLOAT
    assert int(model.norm.num_batches_tracked) == 1
    assert calls == ["cpu"]


def test_checkpointed_and_plain_segments_together() -> None:
    plain, segment = nn.Linear(10, 20), nn.Sequential(nn.Tanh(), nn.Linear(20, 20), nn.Tanh())
    model = nn.ModuleList([plain, segment])
    kept = measure_saved_bytes(lambda: checkpoint(segment, plain(torch.randn(8, 10)), use_reentrant=False).exp(), model)
    # The plain layer's input, the segment's input, the result of exp.
    assert kept.total == (8 * 10 + 8 * 20 + 8 * 20) * FLOAT


# --- the measuring itself ---------------------------------------------------------------------------------------------


def deep(layers: int = 12) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Dropout(0.1)) for _ in range(layers)]
    return nn.Sequential(*blocks)


def test_measuring_takes_no_more_memory_than_a_pass_without_gradients() -> None:
    model, input = deep(), torch.randn(1024, 64)
    known = [input, *model.parameters(), *model.buffers()]
    with torch.no_grad(), LiveBytes(*known) as plain:
        model(input)
    with LiveBytes(*known) as training:
        model(input)
    with LiveBytes(*known) as measuring:
        kept = measured(model, input)
    assert training.peak > kept.total - input.nbytes > 20 * input.nbytes  # what keeping everything takes
    assert measuring.peak <= plain.peak + input.nbytes


def test_what_is_counted_is_freed_while_the_graph_lives() -> None:
    model = deep(4)
    storages: list[StorageWeakRef] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _, __, output: storages.append(StorageWeakRef(output.untyped_storage()))
            )
    alive: list[int] = []
    input = torch.randn(32, 64)
    kept = measure_saved_bytes(
        lambda: model(input), model, keep=lambda _: alive.append(sum(not storage.expired() for storage in storages))
    )
    assert kept.total > 8 * input.nbytes
    assert alive == [1]  # the result


def test_keep_sees_the_result() -> None:
    model, seen = nn.Linear(3, 2), []
    measure_saved_bytes(lambda: model(torch.ones(1, 3)), model, keep=seen.append)
    assert seen[0].shape == (1, 2)


def test_measuring_twice_gives_the_same() -> None:
    model, input = deep(), torch.randn(16, 64)
    assert measured(model, input) == measured(model, input)


def test_a_swapped_network_against_the_sum_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    input = torch.randn(16, 4, 6, 6)
    swap(model, LanceConfig(rank={"batch": 4, "channel": 3, "spatial": 2}, bits=None))
    with calibrate(model):
        model(input)
    groups, rotation = 16 * 4, 4 * 4 * FLOAT
    convolution = (4 * 3 * 2 * 2 + 4 * 3 + 6 * 2 + 6 * 2) * FLOAT + groups
    linear = (4 * 3 + 288 * 3) * FLOAT + groups
    mask = 16 * 8 * 36 * FLOAT  # without a store the stock ReLU keeps its output
    kept = measured(model, input)
    assert kept.total == convolution + linear + rotation + mask
    assert {holder.module for holder in kept.holders} == {"0", "1", "3"}


def test_a_report_of_nothing() -> None:
    assert str(SavedBytes(0)) == "autograd keeps 0 B in 0 storages"
    holder = Holder("Op", "layer", (), torch.float32, 4)
    assert str(SavedBytes(4, [holder])).splitlines()[1].split() == ["4", "B", "Op", "layer"]
