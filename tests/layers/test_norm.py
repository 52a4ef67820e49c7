from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lance.layers.registry import find
from tests.companions import assert_same, compact, kept, layouts, run, same_bits, special

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def frozen(dims: int, channels: int, affine: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A batch norm in eval mode with uneven statistics, its parameters without a gradient."""
    module = NORMS[dims](channels, affine=affine)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean.normal_()
    module.running_var.uniform_(0.01, 4.0)
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    return module.eval().requires_grad_(False).to(dtype)


@given(
    shape=st.integers(2, 5).flatmap(lambda n: st.lists(st.integers(1, 9), min_size=n, max_size=n)),
    affine=st.booleans(),
    bias_trains=st.booleans(),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ]
    ),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_bit_for_bit_the_stock_one(
    shape: list[int], affine: bool, bias_trains: bool, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> None:
    torch.manual_seed(seed)
    module = frozen(len(shape), shape[1], affine, dtypes[1])
    if affine:
        module.bias.requires_grad_(bias_trains)
    assert_same(module, compact(module), special(*shape, dtype=dtypes[0]), special(*shape, dtype=dtypes[0]))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(5, 7), (4, 6, 5), (4, 6, 7, 5), (2, 6, 3, 4, 5)])
def test_every_memory_layout(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    module = frozen(len(shape), shape[1], dtype=dtypes[1])
    grads = layouts(*shape, dtype=dtypes[0])
    for label, x in layouts(*shape, dtype=dtypes[0]).items():
        for grad_label, grad in grads.items():
            left, right = run(module, x, grad), run(compact(module), x, grad)
            assert all(same_bits(a, b) for a, b in zip(left, right, strict=True)), (label, grad_label)


def test_memory_format_of_the_gradient() -> None:
    module = frozen(4, 3)
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    assert_same(module, compact(module), x, torch.randn(2, 3, 5, 6))
    assert_same(module, compact(module), x, torch.randn_like(x))


@pytest.mark.parametrize("affine", [False, True])
def test_keeps_nothing(affine: bool) -> None:
    module = frozen(4, 3, affine)
    x = torch.randn(4, 3, 8, 8)
    assert kept(module, x) >= 4 * x.numel()
    assert kept(compact(module), x) == 0


def test_other_states_run_the_stock_operator() -> None:
    x = torch.randn(4, 3, 8, 8)
    for prepare in (
        lambda m: m.train(),
        lambda m: m.requires_grad_(True),
        lambda m: m.weight.requires_grad_(True),
    ):
        module = frozen(4, 3)
        prepare(module)
        reference = copy.deepcopy(module)
        ours = compact(module)
        assert_same(reference, ours, x, torch.randn_like(x))
        assert kept(ours, x) == kept(reference, x)
        for key, value in reference.state_dict().items():
            assert same_bits(ours.state_dict()[key], value)
    untracked = nn.BatchNorm2d(3, track_running_stats=False).eval()
    assert_same(untracked, compact(untracked), x, torch.randn_like(x))


def test_the_mode_is_looked_up_at_each_call() -> None:
    ours = compact(frozen(2, 5))
    x = torch.randn(16, 5)
    assert kept(ours, x) == 0
    ours.train()
    assert kept(ours, x) >= 4 * x.numel()
    ours.eval()
    assert kept(ours, x) == 0


def test_wrong_inputs_get_the_stock_message() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        compact(frozen(4, 3))(torch.randn(4, 3, requires_grad=True))


def test_a_bias_alone_that_trains() -> None:
    module = frozen(4, 3)
    module.bias.requires_grad_(True)
    ours = compact(module)
    x = torch.randn(2, 3, 4, 4)
    for candidate in (module, ours):
        candidate(x).square().sum().backward()
    assert same_bits(ours.bias.grad, module.bias.grad)


def test_synchronised_and_lazy_ones_are_left_alone() -> None:
    assert find(nn.SyncBatchNorm(3)) == []
    assert find(nn.LazyBatchNorm2d()) == [] or nn.LazyBatchNorm2d().has_uninitialized_params()


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    module = frozen(4, 3)
    x, grad = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    ours = torch.compile(compact(module), backend="aot_eager", fullgraph=True)
    for left, right in zip(run(ours, x, grad), run(module, x, grad), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_copies_and_pickles() -> None:
    ours = compact(frozen(4, 3))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(ours, other, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
