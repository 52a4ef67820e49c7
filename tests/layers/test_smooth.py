from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceError, restore, swap
from lightning_lance.layers.registry import find
from tests.companions import compact, kept, layouts, run, same_bits

MODULES: dict[str, nn.Module] = {
    "GELU": nn.GELU(),
    "GELU, tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "Hardswish": nn.Hardswish(),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
}
LEVEL = {"GELU": 1 / 11, "SiLU": 1 / 11, "Mish": 1 / 11, "Hardswish": 1 / 7, "Sigmoid": 1 / 60, "Tanh": 1 / 15}
COSINE = {"Tanh": 0.995, "Sigmoid": 0.998, "Hardswish": 0.998}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(shape=st.lists(st.integers(0, 7), max_size=4).map(tuple), scale=st.floats(0.01, 100), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_exact_output_and_a_derivative_within_half_a_level(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    module = MODULES[name]
    x = (torch.randn(shape) * scale).to(dtype)
    (output, derivative), (expected, exact) = run(compact(module, True), x, None), run(module, x, None)
    assert same_bits(output, expected)
    slack = 0.01 if dtype == torch.bfloat16 else 1e-5
    assert bool(((derivative - exact).abs() <= LEVEL[name.split(",")[0]] / 2 + slack).all())


@pytest.mark.parametrize("name", MODULES)
def test_all_of_the_line(name: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.tensor([torch.inf, -torch.inf, -1e30, 1e30])])
    derivative = run(compact(MODULES[name], True), x, None)[1]
    exact = run(MODULES[name], x, None)[1]
    finite = exact.isfinite()
    assert (derivative - exact)[finite].abs().max() <= LEVEL[name.split(",")[0]] / 2 + 1e-5
    # Where the activation saturates the gradient stops or passes whole, as in the stock one.
    if name not in ("Sigmoid", "Tanh"):
        assert derivative[finite & (x < -8)].eq(0).all()
        assert derivative[finite & (x > 8)].eq(1).all()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 6)])
def test_gradient_cosine_in_every_layout(name: str, shape: tuple[int, ...]) -> None:
    module = MODULES[name]
    scaled = tuple(8 * n if i == 0 else n for i, n in enumerate(shape))
    grads = layouts(*scaled, make=lambda *s, dtype: torch.randn(s, dtype=dtype))
    for x in layouts(*scaled, make=lambda *s, dtype: 1.5 * torch.randn(s, dtype=dtype)).values():
        for grad in grads.values():
            left, right = run(compact(module, True), x, grad), run(module, x, grad)
            assert same_bits(left[0], right[0])
            cosine = torch.cosine_similarity(left[1].flatten(), right[1].flatten(), dim=0)
            assert cosine > COSINE.get(name, 0.999) - 0.003
            assert left[1].stride() == right[1].stride()


@pytest.mark.parametrize("name", MODULES)
def test_four_bits_per_element(name: str) -> None:
    x = torch.randn(3, 5, 7)
    assert kept(MODULES[name], x) == 4 * x.numel()
    assert kept(compact(MODULES[name], True), x) == -(-x.numel() // 2)


@pytest.mark.parametrize("cls", [nn.SiLU, nn.Mish, nn.Hardswish])
def test_in_place(cls: Any) -> None:
    x = torch.randn(4, 5)
    module, ours = cls(inplace=True), compact(cls(inplace=True), True)
    left, right = run(ours, x, None), run(module, x, None)
    assert same_bits(left[0], right[0])
    assert torch.allclose(left[1], right[1], atol=0.08)
    y = x.clone().requires_grad_() + 0
    assert ours(y).data_ptr() == y.data_ptr()


def test_stock_path_without_gradient() -> None:
    x = torch.randn(5)
    for module in MODULES.values():
        with torch.no_grad():
            assert same_bits(compact(module, True)(x.clone().requires_grad_()), module(x))
        assert compact(module, True)(x).grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(5, requires_grad=True)
    output = compact(nn.GELU(), True)(x)
    with pytest.raises(LanceError, match="create_graph"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


def test_only_where_approximate_ones_are_wanted() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.ReLU())

    exact, approximate = model(), model()
    swap(exact)
    swap(approximate, LanceConfig(companions="approximate"))
    assert [type(m).__name__ for m in exact] == ["LanceLinear", "GELU", "LayerNorm", "LanceReLU"]
    assert [type(m).__name__ for m in approximate] == ["LanceLinear", "LanceGELU", "LanceLayerNorm", "LanceReLU"]
    restore(approximate)
    assert [type(m) for m in approximate] == [nn.Linear, nn.GELU, nn.LayerNorm, nn.ReLU]
    assert approximate[1].approximate == "none"


@pytest.mark.parametrize("name", MODULES)
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    x, grad = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    ours = torch.compile(compact(MODULES[name], True), backend="aot_eager", fullgraph=True)
    left, right = run(ours, x, grad), run(compact(MODULES[name], True), x, grad)
    assert torch.allclose(left[0], right[0])
    assert torch.allclose(left[1], right[1], atol=1e-5)


def test_compiles_in_place() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    ours = torch.compile(compact(nn.SiLU(inplace=True), True), backend="aot_eager", fullgraph=True)
    left, right = run(ours, x, None), run(compact(nn.SiLU(), True), x, None)
    assert torch.allclose(left[0], right[0])
    assert torch.allclose(left[1], right[1])


def test_copies_and_pickles() -> None:
    ours = compact(nn.GELU("tanh"), True)
    x, grad = torch.randn(50), torch.randn(50)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(same_bits(a, b) for a, b in zip(run(other, x, grad), run(ours, x, grad), strict=True))


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Mine(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return input

    assert find(Mine()) == []
