from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance.tensors.rounding import GROUP
from tests.companions import compact, kept, layouts, run, same_bits


def randomised(module: Any) -> Any:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if name == "weight" else 0.0)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.normal_() if name == "running_mean" else buffer.uniform_(0.5, 4.0)
    return module


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


IMAGE, TOKENS = (16, 8, 6, 6), (16, 9, 32)
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: nn.BatchNorm2d(8), IMAGE),
    "batch, frozen": (lambda: frozen(nn.BatchNorm2d(8)), IMAGE),
    "batch, no affine": (lambda: nn.BatchNorm2d(8, affine=False), IMAGE),
    "batch, no running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), IMAGE),
    "batch, mean of all batches": (lambda: nn.BatchNorm2d(8, momentum=None), IMAGE),
    "batch, eval": (lambda: nn.BatchNorm2d(8).eval(), IMAGE),
    "batch, eval, no running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False).eval(), IMAGE),
    "batch 1d": (lambda: nn.BatchNorm1d(32), (128, 32)),
    "batch 1d, sequence": (lambda: nn.BatchNorm1d(9), TOKENS),
    "batch 3d": (lambda: nn.BatchNorm3d(8), (8, 8, 3, 4, 5)),
    "layer": (lambda: nn.LayerNorm(32), TOKENS),
    "layer, two axes": (lambda: nn.LayerNorm((9, 32)), TOKENS),
    "layer, no affine": (lambda: nn.LayerNorm(32, elementwise_affine=False), TOKENS),
    "layer, no bias": (lambda: nn.LayerNorm(32, bias=False), TOKENS),
    "layer, frozen": (lambda: frozen(nn.LayerNorm(32)), TOKENS),
    "group": (lambda: nn.GroupNorm(2, 8), IMAGE),
    "group, one channel each": (lambda: nn.GroupNorm(8, 8), IMAGE),
    "group, no affine": (lambda: nn.GroupNorm(1, 8, affine=False), IMAGE),
    "group, sequence": (lambda: nn.GroupNorm(3, 9), TOKENS),
}


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    stock = randomised(NORMS[name][0]())
    return stock, compact(stock, True)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2])
def test_exact_output_and_state_and_a_close_gradient(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    stock, ours = (module.to(dtypes[1]) for module in pair(name))
    shape = NORMS[name][1]
    for index, (label, x) in enumerate(layouts(*shape, make=lambda *s, dtype: torch.randn(s) * 2 + 1).items()):
        if label == "expanded" and "batch" in name:
            continue  # no variance over the batch
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(dtypes[0])
        left, right = run(ours, x.to(dtypes[0]), grad), run(stock, x.to(dtypes[0]), grad)
        assert same_bits(left[0], right[0]), label
        for key, value in stock.state_dict().items():
            assert same_bits(ours.state_dict()[key], value), key
        assert cosine(left[1], right[1]) > 0.998, label
        assert left[1].dtype == right[1].dtype
        if len(left) > 2:
            assert cosine(left[2], right[2]) > 0.97, label
        if len(left) > 3:
            assert cosine(left[3], right[3]) > 0.99999, label


@pytest.mark.parametrize("name", ["batch", "batch, frozen", "group", "group, one channel each"])
def test_memory_format(name: str) -> None:
    stock, ours = pair(name)
    x = torch.randn(IMAGE).contiguous(memory_format=torch.channels_last)
    for grad in (torch.randn(IMAGE), torch.randn(IMAGE).contiguous(memory_format=torch.channels_last)):
        left, right = run(ours, x, grad), run(stock, x, grad)
        assert [a.stride() for a in left] == [a.stride() for a in right]


@pytest.mark.parametrize("name", NORMS)
def test_half_a_byte_and_a_range(name: str) -> None:
    stock, ours = pair(name)
    shape = NORMS[name][1]
    x = torch.randn(shape)
    groups = -(-x.numel() // GROUP)
    statistics = {"batch": shape[1], "layer": shape[0] * shape[1], "group": 0}[name.split(",")[0].split()[0]]
    if name == "layer, two axes":
        statistics = shape[0]
    if name.startswith("group"):
        statistics = shape[0] * stock.num_groups  # type: ignore[operator]
    assert kept(stock, x) >= 4 * x.numel()
    assert kept(ours, x) == groups * (GROUP // 2 + 4) + 4 * statistics


def test_the_formula_on_the_rounded_input() -> None:
    stock, ours = pair("batch")
    x, grad = torch.randn(IMAGE) * 3 - 1, torch.randn(IMAGE)
    found = run(ours, x, grad)
    reduce = (0, 2, 3)
    x64, g64 = x.double(), grad.double()
    deviation = x64.var(reduce, unbiased=False, keepdim=True).add(1e-5).sqrt()
    normalised = (x64 - x64.mean(reduce, keepdim=True)) / deviation
    groups = normalised.flatten().view(-1, GROUP)
    low = groups.amin(-1, keepdim=True).half().double()
    step = ((groups.amax(-1, keepdim=True) - low) / 15).half().double()
    rounded = (((groups - low) / step + 0.5).floor().clamp(0, 15) * step + low).view(IMAGE)
    weight: Any = stock.weight
    expected = g64 - g64.mean(reduce, keepdim=True) - rounded * (g64 * rounded).mean(reduce, keepdim=True)
    expected = expected * weight.double().view(1, -1, 1, 1) / deviation
    # A few elements lie on the border between two levels.
    assert (found[1].double() - expected).abs().median() < 1e-6
    assert (found[1].double() - expected).norm() < 1e-3 * expected.norm()
    assert torch.allclose(found[2].double(), (g64 * rounded).sum(reduce), atol=0.05)


def test_exact_and_free_where_it_can_be() -> None:
    module = frozen(randomised(nn.BatchNorm2d(8))).eval()
    ours = compact(module, True)
    x, grad = torch.randn(IMAGE), torch.randn(IMAGE)
    assert kept(ours, x) == 0
    assert all(same_bits(a, b) for a, b in zip(run(ours, x, grad), run(module, x, grad), strict=True))


def test_an_input_without_a_gradient() -> None:
    for name in ("batch", "layer", "group"):
        stock, ours = pair(name)
        x = torch.randn(NORMS[name][1])
        for module in (stock, ours):
            module(x).square().sum().backward()
        assert ours(x).grad_fn is not None
        for left, right in zip(ours.parameters(), stock.parameters(), strict=True):
            assert left.grad is not None
            assert right.grad is not None
            assert cosine(left.grad, right.grad) > 0.97


def test_stock_errors() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        compact(nn.BatchNorm1d(3), True)(torch.randn(1, 3, requires_grad=True))
    with pytest.raises(ValueError, match="expected 4D input"):
        compact(nn.BatchNorm2d(3), True)(torch.randn(4, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        compact(nn.LayerNorm(3), True)(torch.randn(4, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        compact(nn.GroupNorm(2, 4), True)(torch.randn(4, 5, requires_grad=True))


def test_running_statistics_over_several_steps() -> None:
    for name in ("batch", "batch, mean of all batches"):
        stock, ours = pair(name)
        for _ in range(3):
            x = torch.randn(IMAGE).requires_grad_()
            assert same_bits(stock(x), ours(x))
        for key, value in stock.state_dict().items():
            assert same_bits(ours.state_dict()[key], value), key


def test_stock_path_without_gradient() -> None:
    for name in ("batch", "layer", "group"):
        stock, ours = pair(name)
        x = torch.randn(NORMS[name][1])
        with torch.no_grad():
            assert same_bits(ours(x), stock(x))
        for key, value in stock.state_dict().items():
            assert same_bits(ours.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    _, ours = pair(name)
    shape = NORMS[name][1]
    x, grad = torch.randn(shape), torch.randn(shape)
    expected = run(ours, x, grad)
    found = run(torch.compile(ours, backend="aot_eager", fullgraph=True), x, grad)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert cosine(found[1], expected[1]) > 0.9999


def test_copies_and_pickles() -> None:
    for name in ("batch", "layer", "group"):
        _, ours = pair(name)
        x, grad = torch.randn(NORMS[name][1]), torch.randn(NORMS[name][1])
        others = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)))
        expected = run(ours, x, grad)
        for other in others:
            assert all(same_bits(a, b) for a, b in zip(run(other, x, grad), expected, strict=True))
