"""Swapped and calibrated layers: which path runs when, what is kept, and that the gradient is the projected one."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, measure_saved_bytes, restore, swap
from lightning_lance.compression.saved_bytes import ModuleNames
from lightning_lance.compression.store import Bits
from lightning_lance.compression.surgery import compressed_layers
from lightning_lance.ops.factors import Factors
from lightning_lance.tensors.linalg import contrast_scale
from tests.oracles import batch_mode, projected_input, relative_error
from tests.stock import make_store
from tests.swapped import ready

CPU = torch.device("cpu")


def backward(model: nn.Module, input: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the parameters, and of the input where it asks for one."""
    for leaf in [*model.parameters(), input]:
        leaf.grad = None
    output = model(input)
    output.backward(torch.ones_like(output) if grad is None else grad)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found if input.grad is None else {**found, "input": input.grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    assert one.keys() == other.keys()
    return all(relative_error(one[name], other[name]) <= tolerance for name in one)


LINEAR_INPUTS = {"rows": (16, 12), "tokens": (16, 5, 12), "grid": (16, 5, 3, 12)}
CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, 2, 1), (16, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, 1, "same", bias=False), (16, 6, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2), groups=2), (16, 4, 3, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6, padding_mode="reflect"), (16, 6, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (16, 6, 7, 5)),
}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{name: (lambda: nn.Linear(12, 9), shape) for name, shape in LINEAR_INPUTS.items()},
    **CONVOLUTIONS,
}
EVERYWHERE = {"batch": 4, "channel": 3, "spatial": 2}


@pytest.mark.parametrize("batch", ["unbiased", "projected"])
@pytest.mark.parametrize("rank", ["compact", 3, 0.6, EVERYWHERE, {"channel": 0.5}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_kept_bytes_equal_the_formula(name: str, rank: Any, batch: Any) -> None:
    make, shape = LAYERS[name]
    model = ready(make(), torch.randn(shape), rank=rank, batch=batch)
    input = torch.randn(shape, requires_grad=True)
    subspace = model._lance.subspace
    channels = shape[-1] if isinstance(model, nn.Linear) else shape[1]
    sizes = shape[1:-1] if isinstance(model, nn.Linear) else shape[2:]
    formula = subspace.formula_bytes(shape[0], channels, sizes, 4)
    columns = subspace.batch.columns(shape[0])
    random = batch == "unbiased" and columns < shape[0]
    shared = 4 * columns * columns + (0 if random else 4 * shape[0]) if columns < shape[0] else 0
    kept = measure_saved_bytes(lambda: model(input * 1.0), model)
    assert kept.total == formula + shared
    assert formula < input.nbytes or (name, rank) == ("rows", "compact")
    # The parts, by hand.
    core = torch.Size(subspace.core_shape(shape[0], channels, sizes)).numel()
    factors = sum(factor.numel() for factor in subspace.factors())
    assert formula == 4 * (core + factors + (shape[0] if random else 0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_store_rounds_the_core_alone(bits: int) -> None:
    """Factors and groups are counted as they are; the core takes its bits, and its gradient is off by little."""
    x = torch.randn(300, 6, 16, 16)
    model = ready(nn.Conv2d(6, 8, 3), x, rank={"batch": 64, "channel": 5, "spatial": 8})
    store = make_store(Bits(bits, 4), model.parameters())
    store.ledger, store.names = [], ModuleNames()
    input, state = x.clone().requires_grad_(), model._lance.order.state.clone()
    with store:
        output = model(input * 1.0)
    alive = [(saved, held) for saved in store.ledger if saved.kept is not None and (held := saved.kept()) is not None]
    assert all(saved.ours for saved, _ in alive)
    found = sum({key: size for _, held in alive for key, size in held.parts()}.values())
    core = 64 * 5 * 8 * 8
    groups = [group for group in range(64, 257, 4) if 64 % group == 0 or group == 128]
    rounded = {-(-core // group) * (group * bits // 8 + (8 if bits == 8 else 4)) for group in groups}
    beside = 4 * (6 * 5 + 2 * 16 * 8 + 300 + 64 * 64)  # factors, groups of samples, rotation
    assert found - beside in rounded
    (grad,) = torch.autograd.grad(output.sum(), model.weight)
    model._lance.order.state.copy_(state)
    (exact,) = torch.autograd.grad(model(x).sum(), model.weight)
    assert 0 < relative_error(grad, exact) < {2: 0.5, 4: 0.1, 8: 0.01}[bits]


def test_a_network_keeps_the_formula_of_its_layers_and_one_rotation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    input = torch.randn(32, 3, 8, 8)
    ready(model, input, rank=EVERYWHERE)
    layers = compressed_layers(model)
    shapes = [(3, (8, 8)), (6, (6, 6)), (128, ())]
    formula = sum(
        layer._lance.subspace.formula_bytes(32, channels, sizes, 4)  # type: ignore[union-attr]
        for layer, (channels, sizes) in zip(layers.values(), shapes, strict=True)
    )
    assert measure_saved_bytes(lambda: model(input), model).total == formula + 4 * 4 * 4


@pytest.mark.parametrize("batch", ["unbiased", "projected"])
@pytest.mark.parametrize("rank", [3, 0.6, EVERYWHERE], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_gradient_is_that_of_the_projected_input(name: str, rank: Any, batch: Any) -> None:
    make, shape = LAYERS[name]
    plain = make().double()
    model = ready(copy.deepcopy(plain), torch.randn(shape, dtype=torch.float64), rank=rank, batch=batch)
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    drawn = copy.deepcopy(model._lance.order)
    ours = backward(model, input)
    subspace = model._lance.subspace
    columns = subspace.batch.columns(16)
    unbiased = batch == "unbiased" and columns < 16
    factors = Factors(
        *(batch_mode(16, columns, drawn.draw(16, CPU) if unbiased else None) if columns < 16 else (None, None)),
        contrast_scale(16, columns) if unbiased else 1.0,
        subspace.channel,
        next(iter(subspace.spatial.values())),
    )
    linear = isinstance(plain, nn.Linear)
    rebuilt = projected_input(input, factors, input.dim() - 1 if linear else 1, 1 if linear else 2)
    assert relative_error(ours["weight"], backward(plain, rebuilt)["weight"]) < 1e-10
    exact = backward(plain, input)
    assert relative_error(ours["input"], exact["input"]) < 1e-12
    if "bias" in ours:
        assert relative_error(ours["bias"], exact["bias"]) < 1e-12
    assert relative_error(ours["weight"], exact["weight"]) > 1e-6  # something was truncated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_bit_for_bit_the_stock_one(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    model = make().to(dtype)
    input = torch.randn(shape).to(dtype)
    expected = model(input)
    ready(model, input, rank=EVERYWHERE)
    assert torch.equal(model(input), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        assert torch.equal(model(input), plain_of(model)(input))


def plain_of(model: Any) -> Any:
    """A copy, which is a stock module."""
    plain = copy.deepcopy(model)
    assert not hasattr(plain, "_lance")
    return plain


@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_stock_modules(name: str) -> None:
    make, shape = LAYERS[name]
    plain = make()
    model = ready(copy.deepcopy(plain), torch.randn(shape), rank=EVERYWHERE)
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(plain)
        assert vars(copied).keys() == vars(plain).keys()
        assert torch.equal(copied.weight, plain.weight)
    assert type(model) is not type(plain)
    restore(model)
    assert type(model) is type(plain)


def twin(model: Any, plain: Any, input: Tensor, **options: Any) -> Any:
    """Another swapped model with the factors and the sample orders of one."""
    other = ready(plain, input, **options)
    state = None
    for one, two in zip(compressed_layers(model).values(), compressed_layers(other).values(), strict=True):
        two._lance.subspace = one._lance.subspace
        if state is None:
            state = two._lance.order.state
            state.copy_(one._lance.order.state)
    return other


@pytest.mark.parametrize("rank", [1.0, 1000], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_stock_gradient(name: str, rank: Any) -> None:
    make, shape = LAYERS[name]
    plain = make().double()
    model = ready(copy.deepcopy(plain), torch.randn(shape, dtype=torch.float64), rank=rank)
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert same(backward(model, input), backward(plain, input), 1e-12)


# --- which path runs --------------------------------------------------------------------------------------------------


def takes_the_plain_path(model: Any, input: Tensor) -> bool:
    """Whether as much is kept as by the stock layer."""
    plain = plain_of(model)
    kept = measure_saved_bytes(lambda: model(input), model).total
    assert kept <= measure_saved_bytes(lambda: plain(input), plain).total
    return kept == measure_saved_bytes(lambda: plain(input), plain).total


@pytest.mark.parametrize("name", LAYERS)
def test_an_uncalibrated_layer_runs_the_stock_path(name: str) -> None:
    make, shape = LAYERS[name]
    plain = make()
    model = copy.deepcopy(plain)
    swap(model, LanceConfig(rank="compact"))
    input = torch.randn(shape, requires_grad=True)
    assert takes_the_plain_path(model, input)
    assert same(backward(model, input), backward(plain, input))


@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients_nothing_is_drawn_or_kept(name: str) -> None:
    make, shape = LAYERS[name]
    model = ready(make(), torch.randn(shape), rank=EVERYWHERE)
    drawn = model._lance.order.state.clone()
    with torch.no_grad():
        assert model(torch.randn(shape)).grad_fn is None
    with torch.inference_mode():
        model(torch.randn(shape))
    assert torch.equal(model._lance.order.state, drawn)
    model(torch.randn(shape))
    assert not torch.equal(model._lance.order.state, drawn)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5])
def test_other_batch_sizes_than_the_calibrated_one_train(name: str, batch: int) -> None:
    make, shape = LAYERS[name]
    model = ready(make(), torch.randn(shape), rank={"batch": 4})
    input = torch.randn(batch, *shape[1:], requires_grad=True)
    found = backward(model, input)
    expected = backward(plain_of(model), input)
    assert same(found, expected, 1e-5) or batch == 5  # up to the rank, the batch is kept whole
    assert all(bool(grad.isfinite().all()) for grad in found.values())


@pytest.mark.parametrize("name", ["rows", "tokens", "grid", *CONVOLUTIONS])
def test_sizes_that_calibration_did_not_see_run_plain_and_silently(name: str) -> None:
    make, shape = LAYERS[name]
    model = ready(make(), torch.randn(shape), rank={"batch": 4, "spatial": 2} if name != "rows" else {"batch": 4})
    axis = 1 if isinstance(model, nn.Linear) else 2
    other = [*shape[:axis], 5, *shape[axis:]] if name == "rows" else list(shape)
    other[axis] += 2
    if name == "rows":
        model._lance.subspace.any_size = False
    input = torch.randn(other, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = backward(model, input)
        assert takes_the_plain_path(model, input)
        assert not takes_the_plain_path(model, torch.randn(shape, requires_grad=True))
    assert same(found, backward(plain_of(model), input))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_whole_spatial_modes_serve_every_size_without_warning(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    model = ready(make(), torch.randn(shape), rank={"batch": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for extra in (1, 3):
            input = torch.randn(*shape[:-1], shape[-1] + extra, requires_grad=True)
            assert not takes_the_plain_path(model, input)
            backward(model, input)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_unbatched_input_runs_the_stock_path(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    model = ready(make(), torch.randn(shape), rank=EVERYWHERE)
    input = torch.randn(shape[1:], requires_grad=True)
    assert same(backward(model, input), backward(plain_of(model), input))


def test_a_single_vector_runs_the_stock_path() -> None:
    model = ready(nn.Linear(12, 9), torch.randn(16, 12), rank=EVERYWHERE)
    input = torch.randn(12, requires_grad=True)
    assert same(backward(model, input), backward(plain_of(model), input))


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_frozen_after_the_swap_gets_no_gradient_and_the_input_an_exact_one(name: str) -> None:
    make, shape = LAYERS[name]
    model = ready(make(), torch.randn(shape), rank=EVERYWHERE)
    model.weight.requires_grad_(False)
    input = torch.randn(shape, requires_grad=True)
    found = backward(model, input)
    assert "weight" not in found
    assert same(found, backward(plain_of(model), input))
    assert takes_the_plain_path(model, input)


# --- precisions, layouts, wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_trains_float32_weights(name: str) -> None:
    make, shape = LAYERS[name]
    plain = make()
    model = copy.deepcopy(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ready(model, torch.randn(shape), rank=EVERYWHERE, batch="projected")
        input = torch.randn(shape, requires_grad=True)
        output = model(input)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    reference = ready(copy.deepcopy(plain), torch.randn(shape), rank=EVERYWHERE, batch="projected")
    reference._lance.subspace = model._lance.subspace
    expected = backward(reference, input.detach())
    assert relative_error(model.weight.grad, expected["weight"]) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_whole_models_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    model = ready(make().to(dtype), torch.randn(shape).to(dtype), rank=EVERYWHERE, batch="projected")
    input = torch.randn(shape, dtype=dtype)
    exact = ready(plain_of(model).double(), input.double(), rank=EVERYWHERE, batch="projected")
    exact._lance.subspace = model._lance.subspace.to(CPU, torch.float64)
    found, expected = backward(model, input), backward(exact, input.double())
    assert {grad.dtype for grad in found.values()} == {dtype}
    assert same(found, expected, 4e-2 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "pointwise"])
def test_channels_last_models(name: str) -> None:
    make, shape = LAYERS[name]
    plain = make().double()
    input = torch.randn(shape, dtype=torch.float64)
    model = ready(copy.deepcopy(plain), input, rank=EVERYWHERE, batch="projected")
    last = twin(model, copy.deepcopy(plain), input, rank=EVERYWHERE, batch="projected")
    last = last.to(memory_format=torch.channels_last)
    nhwc = input.to(memory_format=torch.channels_last)
    assert last(nhwc).is_contiguous(memory_format=torch.channels_last)
    assert same(backward(last, nhwc), backward(model, input), 1e-12)
    kept = [measure_saved_bytes(lambda m=m, x=x: m(x), m).total for m, x in ((last, nhwc), (model, input))]
    assert kept[0] == kept[1]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).double()


@pytest.mark.parametrize("batch", ["unbiased", "projected"])
def test_a_compiled_network_is_one_graph_with_the_same_gradients_and_keeps_as_little(batch: Any) -> None:
    torch._dynamo.reset()
    input = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    model = ready(network(), input, rank=EVERYWHERE, batch=batch)
    eager = twin(model, plain_of(model), input, rank=EVERYWHERE, batch=batch)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):  # the random orders advance in step
        compiled(input).square().sum().backward()
        eager(input).square().sum().backward()
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert relative_error(one.grad, other.grad) < 1e-10
    assert counter.frame_count == 1
    drawn = next(iter(compressed_layers(model).values()))._lance.order.state.tolist()
    assert drawn == next(iter(compressed_layers(eager).values()))._lance.order.state.tolist()
    assert drawn[1] == (12 if batch == "unbiased" else 0)
    kept = measure_saved_bytes(lambda: compiled(input), model).total
    plain = plain_of(model)
    assert kept < 1.2 * measure_saved_bytes(lambda: eager(input), eager).total
    assert kept < 0.7 * measure_saved_bytes(lambda: plain(input), plain).total


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("batch", ["unbiased", "projected"])
def test_activation_checkpointing(reentrant: bool, batch: Any) -> None:
    input = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    model = ready(network(), input, rank=EVERYWHERE, batch=batch)
    through = twin(model, plain_of(model), input, rank=EVERYWHERE, batch=batch)
    leaf = input.clone().requires_grad_()
    plain = backward(model, leaf)
    if batch == "unbiased" and not reentrant:
        # The recomputed pass draws new orders, and the gradient is that of those.
        for layer in (compressed_layers(model), compressed_layers(through)):
            next(iter(layer.values()))._lance.order.state[1] = 0
        backward(model, leaf)
        plain = backward(model, leaf)
    output = checkpoint(through, leaf, use_reentrant=reentrant)
    output.backward(torch.ones_like(output))
    found = {name: parameter.grad for name, parameter in through.named_parameters()}
    assert all(relative_error(found[name], plain[name]) < 1e-12 for name in found)


def test_one_layer_called_twice_in_a_pass_gets_both_gradients() -> None:
    layer = nn.Linear(6, 6).double()
    input = torch.randn(16, 6, dtype=torch.float64, requires_grad=True)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    plain = backward(copy.deepcopy(twice), input)
    ready(twice, input.detach(), rank=1000)
    assert same(backward(twice, input), plain, 1e-12)


def test_fake_tensors_do_not_leak_into_training() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ready(nn.Linear(12, 9), torch.randn(16, 12), rank={"batch": 4})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(48, 12))
    backward(model, torch.randn(48, 12))


def test_gradients_accumulate_over_micro_batches() -> None:
    model = ready(nn.Linear(12, 9).double(), torch.randn(16, 12, dtype=torch.float64), rank=3, batch="projected")
    inputs = torch.randn(2, 16, 12, dtype=torch.float64)
    apart = [backward(model, input)["weight"].clone() for input in inputs]
    model.zero_grad()
    for input in inputs:
        model(input).sum().backward()
    assert relative_error(model.weight.grad, apart[0] + apart[1]) < 1e-12
