from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance.layers.registry import is_variant, uninstall
from tests.companions import assert_same, compact, kept, layouts, run, same_bits, special

MODULES = {
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(),
    "Hardtanh, thresholds that half precision cannot hold": nn.Hardtanh(-0.3, 1.7),
    "LeakyReLU": nn.LeakyReLU(),
    "LeakyReLU, slope .3": nn.LeakyReLU(0.3),
    "LeakyReLU, slope -.5": nn.LeakyReLU(-0.5),
    "LeakyReLU, slope 0": nn.LeakyReLU(0.0),
    "Hardsigmoid": nn.Hardsigmoid(),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=5).map(tuple)


def in_place(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module.inplace = True  # type: ignore[assignment]
    return module


def numbers(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # For a NaN the stock hardtanh kernel answers differently in its vectorised and in its scalar part.
    x = special(*shape, dtype=dtype)
    return x.nan_to_num(nan=0.5) if "tanh" in name or name == "ReLU6" else x


@pytest.mark.parametrize("name", MODULES)
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), inplace=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_bit_for_bit_the_stock_one(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, inplace: bool, seed: int
) -> None:
    if inplace and "-.5" in name:
        return
    torch.manual_seed(seed)
    module = in_place(MODULES[name]) if inplace else MODULES[name]
    assert_same(module, compact(module), numbers(name, *shape, dtype=dtype), special(*shape, dtype=dtype))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 3)])
def test_every_memory_layout(name: str, shape: tuple[int, ...]) -> None:
    module = MODULES[name]
    ours = compact(module)
    grads = layouts(*shape)
    for x in layouts(*shape, make=lambda *s, dtype: numbers(name, *s, dtype=dtype)).values():
        for grad in grads.values():
            assert_same(module, ours, x, grad)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("limits", [(0.0, 6.0), (-0.3, 1.7), (-1e-40, 0.0), (1.0, 1.0000002), (-math.inf, 2.0)])
def test_hardtanh_of_more_than_one_piece(limits: tuple[float, float], channels_last: bool) -> None:
    """Long inputs are flagged in pieces; the last one is no multiple of eight. Many elements lie on the thresholds."""
    x = numbers("ReLU6", 2, 5, 131, 311)
    x.view(-1)[::7], x.view(-1)[1::7] = limits
    x.view(-1)[2::7] = torch.nextafter(torch.tensor(limits[1]), torch.tensor(-math.inf))
    x.view(-1)[3::7] = torch.nextafter(torch.tensor(limits[0]), torch.tensor(math.inf))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for inplace in (False, True):
        module = nn.Hardtanh(*limits, inplace=inplace)
        assert_same(module, compact(module), x, torch.randn_like(x))
    assert kept(compact(nn.Hardtanh(*limits)), x) == -(-x.numel() // 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for module in [*MODULES.values(), nn.Hardtanh(0.2998046875, 0.30078125), nn.Hardtanh(-65504.0, 1e-6)]:
        finite = x.nan_to_num(nan=0.5) if isinstance(module, nn.Hardtanh) else x
        assert_same(module, compact(module), finite, torch.randn(x.shape).to(dtype))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("inplace", [False, True])
def test_one_bit_per_element(name: str, inplace: bool) -> None:
    if inplace and "-.5" in name:
        pytest.skip("its stock backward is an error")
    module = in_place(MODULES[name]) if inplace else MODULES[name]
    x = torch.randn(4, 3, 10, 11)
    assert kept(module, x) >= 4 * x.numel()
    assert kept(compact(module), x) == -(-x.numel() // 8)


def test_negative_slope_in_place_is_the_stock_error() -> None:
    module = in_place(nn.LeakyReLU(-0.5))
    for candidate in (module, compact(module)):
        with pytest.raises(RuntimeError, match="negative slope"):
            run(candidate, torch.randn(5), None)


def test_thresholds_that_cross_are_the_stock_error() -> None:
    module = nn.Hardtanh()
    module.min_val, module.max_val = 2.0, 1.0
    with pytest.raises(ValueError, match="min_val cannot be greater"):
        run(compact(module), torch.randn(5), None)


def test_in_place_on_a_leaf_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="leaf Variable"):
        compact(nn.ReLU(inplace=True))(torch.randn(3, requires_grad=True))


def test_in_place_on_a_view() -> None:
    def forward(relu: nn.Module, x: Tensor) -> Tensor:
        y = x * 1
        relu(y[:, 1:3])
        return y * y

    module = nn.ReLU(inplace=True)
    assert_same(lambda x: forward(module, x), lambda x: forward(compact(module), x), special(4, 5), torch.randn(4, 5))


def test_in_place_change_of_the_output_afterwards() -> None:
    def forward(relu: nn.Module, x: Tensor) -> Tensor:
        y = relu(x)
        return y.mul_(2)

    # Stock needs its output; ours does not, so that the result is what it would be without the change.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(lambda x: forward(nn.ReLU(), x), torch.randn(9), None)
    found = run(lambda x: forward(compact(nn.ReLU()), x), torch.arange(-4.0, 5.0), None)
    assert torch.equal(found[1], torch.tensor([0.0] * 5 + [2.0] * 4))


class Twice(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.second(self.act(self.first(x))))
        return y + self.act(y + x)  # a shared output, and the module a third time


@pytest.mark.parametrize("inplace", [False, True])
def test_called_several_times(inplace: bool) -> None:
    model = Twice(inplace)
    ours = copy.deepcopy(model)
    ours.act = compact(ours.act)
    assert_same(model, ours, torch.randn(6, 5), torch.randn(6, 5))


@pytest.mark.parametrize("name", MODULES)
def test_stock_path_without_gradient(name: str) -> None:
    ours = compact(MODULES[name])
    x = special(5, 6)
    with torch.no_grad():
        assert ours(x.clone().requires_grad_()).grad_fn is None
    assert ours(x).grad_fn is None
    assert same_bits(ours(x), MODULES[name](x))
    with torch.inference_mode():
        assert same_bits(ours(x), MODULES[name](x))


def test_functorch_takes_the_stock_path() -> None:
    ours = compact(nn.ReLU())
    x = torch.randn(3, 4)
    found = torch.func.vmap(torch.func.grad(lambda row: (ours(row) ** 2).sum()))(x)
    assert torch.equal(found, 2 * x.relu())


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(reentrant: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    ours = copy.deepcopy(module)
    ours[1] = compact(ours[1])
    x, gradients = torch.randn(3, 4), []
    for model in (module, ours):
        leaf = x.clone().requires_grad_()
        checkpoint(model, leaf, use_reentrant=reentrant).square().sum().backward()
        gradients.append([leaf.grad, *[p.grad for p in model.parameters()]])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_under_saved_tensor_hooks() -> None:
    with torch.autograd.graph.save_on_cpu():
        assert_same(nn.ReLU(), compact(nn.ReLU()), torch.randn(3, 4), torch.randn(3, 4))


def test_autocast() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 4))
    ours = copy.deepcopy(module)
    ours[1], ours[3] = compact(ours[1]), compact(ours[3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(module, ours, torch.randn(3, 4), torch.randn(3, 4).bfloat16())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(name: str, inplace: bool) -> None:
    if inplace and "-.5" in name:
        pytest.skip("its stock backward is an error")
    torch._dynamo.reset()
    module = in_place(MODULES[name]) if inplace else MODULES[name]
    x, grad = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    ours = torch.compile(compact(module), backend="aot_eager", fullgraph=True)
    for left, right in zip(run(ours, x, grad), run(MODULES[name], x, grad), strict=True):
        assert torch.equal(left, right)


def test_copies_and_pickles() -> None:
    ours = compact(nn.ReLU(inplace=True))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert is_variant(other)
        assert isinstance(other, nn.ReLU)
        assert other.inplace
        uninstall(other)
        assert type(other) is nn.ReLU
        assert F.relu(torch.ones(1)).equal(other(torch.ones(1)))


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Mine(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1

    from lightning_lance.layers.registry import find

    assert find(Mine()) == []
