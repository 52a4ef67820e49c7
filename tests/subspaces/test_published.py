"""The published rules against tensorly's HOSVD of the stacked calibration batches, and gradients by plain autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition._tucker import initialize_tucker
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lance.errors import CalibrationError, ConfigError, StateError
from lightning_lance.ops.conv import geometry, low_rank_conv
from lightning_lance.ops.factors import Factors
from lightning_lance.ops.linear import low_rank_linear
from lightning_lance.subspaces.published import (
    LearnedBatch,
    PublishedStatistics,
    PublishedSubspace,
    published_ranks,
    select_published,
    trained_directions,
)
from lightning_lance.subspaces.ranks import ModeRanks
from tests.oracles import gradients, orthonormal, relative_error

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12}
CPU = torch.device("cpu")


def batches(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs whose spectra fall in every mode, with energy in the mean, as after a ReLU."""
    mixes = [orthonormal(n, n) * torch.logspace(0, -1.5, n, dtype=torch.float64) @ orthonormal(n, n).T for n in shape]
    found = []
    for _ in range(count):
        x = torch.randn(shape, dtype=torch.float64) + 0.3
        for axis, mix in enumerate(mixes):
            x = torch.tensordot(x, mix, ([axis], [1])).movedim(-1, axis)
        found.append(x.to(dtype))
    return found


def hosvd(inputs: list[Tensor], energy: float) -> list[np.ndarray]:
    """Factors of every mode of the batches stacked along one more axis: ranks by the squared singular values."""
    stack = torch.stack(inputs, -1).double().numpy()
    modes = list(range(stack.ndim - 1))
    ranks = []
    for mode in modes:
        values = np.linalg.svd(tensorly.base.unfold(stack, mode), compute_uv=False) ** 2
        share = np.cumsum(values) / values.sum()
        ranks.append(int(np.argmax(share > energy)) + 1)
    return list(initialize_tucker(stack, ranks, modes, None)[1])


def statistics(inputs: list[Tensor], energy: float, channel_axis: int) -> PublishedStatistics:
    found = PublishedStatistics(ModeRanks(energy, energy, energy), channel_axis, "layer")
    for input in inputs:
        found.update(input)
    return found


def ours(subspace: PublishedSubspace, sizes: tuple[int, ...], channel_axis: int) -> list[Tensor | None]:
    """Factors in the order of the axes."""
    assert isinstance(subspace.batch, LearnedBatch)
    spatial = list(subspace.spatial[sizes])
    rest = [subspace.channel, *spatial] if channel_axis == 1 else [*spatial, subspace.channel]
    return [subspace.batch.factor, *rest]


def projected(input: Tensor, bases: list[np.ndarray]) -> Tensor:
    """``X ×₀ U₀U₀ᵀ ×₁ U₁U₁ᵀ …`` in float64."""
    product = tensorly.tenalg.multi_mode_dot(input.double().numpy(), [basis @ basis.T for basis in bases])
    return torch.from_numpy(np.ascontiguousarray(product))


def factors_of(subspace: PublishedSubspace, sizes: tuple[int, ...], size: int, dtype: torch.dtype) -> Factors:
    assert isinstance(subspace.batch, LearnedBatch)
    scale = subspace.batch.contrast_scale(size)
    return Factors(
        subspace.batch.projection(size, dtype, CPU), None, scale, subspace.channel, subspace.spatial[sizes], None
    )


def check_same_subspaces(found: list[Tensor | None], bases: list[np.ndarray], tolerance: float) -> None:
    for factor, basis in zip(found, bases, strict=True):
        assert factor is not None
        assert tuple(factor.shape) == basis.shape  # the rank
        projector = (factor.double() @ factor.double().T).numpy()
        assert np.abs(projector - basis @ basis.T).max() < 50 * tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("energy", [0.6, 0.7, 0.9])
def test_convolution_has_the_factors_ranks_and_gradients_of_a_hosvd(dtype: torch.dtype, energy: float) -> None:
    shape = (8, 6, 7, 5)
    inputs = batches(shape, 5, dtype)
    bases = hosvd(inputs, energy)
    subspace = statistics(inputs, energy, 1).published()
    check_same_subspaces(ours(subspace, shape[2:], 1), bases, DTYPES[dtype])
    weight, x = torch.randn(4, 6, 3, 3, dtype=dtype), inputs[0]
    form = geometry((3, 3), (2, 1), (1, 1), (1, 1), 1, "zeros")
    factors = factors_of(subspace, shape[2:], 8, dtype)
    grad = torch.randn(8, 4, 4, 5, dtype=dtype)
    found = gradients(lambda i, w, b: low_rank_conv(i, w, b, form, factors), x, weight, None, grad)
    conv = lambda i, w, b: F.conv2d(i, w, b, (2, 1), 1)  # noqa: E731
    plain = gradients(conv, x, weight, None, grad)
    expected = gradients(conv, projected(x, bases), weight.double(), None, grad.double())
    assert torch.equal(found[0], plain[0])
    assert relative_error(found[1], plain[1]) < DTYPES[dtype]
    assert relative_error(found[2], expected[2]) < DTYPES[dtype]
    assert relative_error(plain[2], expected[2]) > 0.05  # what it differs from


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layer_with_tokens_has_them_too(dtype: torch.dtype) -> None:
    shape = (6, 5, 9)
    inputs = batches(shape, 4, dtype)
    bases = hosvd(inputs, 0.8)
    subspace = statistics(inputs, 0.8, -1).published()
    check_same_subspaces(ours(subspace, (5,), -1), bases, DTYPES[dtype])
    weight, grad = torch.randn(3, 9, dtype=dtype), torch.randn(6, 5, 3, dtype=dtype)
    factors = factors_of(subspace, (5,), 6, dtype)
    found = gradients(lambda i, w, b: low_rank_linear(i, w, b, factors), inputs[1], weight, None, grad)
    expected = gradients(F.linear, projected(inputs[1], bases), weight.double(), None, grad.double())
    assert relative_error(found[2], expected[2]) < DTYPES[dtype]


@given(st.integers(2, 9), st.floats(0.2, 0.95), st.integers(0, 1000))
def test_batch_rank_is_the_smallest_strictly_above_the_energy(size: int, energy: float, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(size, 3, 2, 2, dtype=torch.float64) + 0.5 for _ in range(3)]
    subspace = statistics(inputs, energy, 1).published()
    values = np.linalg.svd(torch.cat([x.flatten(1) for x in inputs], 1).numpy(), compute_uv=False) ** 2
    rank = subspace.batch.columns(size)
    share = values.cumsum() / values.sum()
    assert share[rank - 1] > energy
    assert rank == 1 or share[rank - 2] <= energy
    assert math.isclose(subspace.energy["batch"], share[rank - 1], rel_tol=1e-9)


def test_a_batch_of_another_size_is_kept_whole_and_learned_nothing_from() -> None:
    inputs = batches((8, 4, 3, 3), 3, torch.float64)
    found, plus = (statistics(given, 0.7, 1) for given in (inputs, [*inputs, inputs[0][:5]]))
    one, other = found.published(), plus.published()
    assert isinstance(one.batch, LearnedBatch)
    assert isinstance(other.batch, LearnedBatch)
    assert torch.equal(one.batch.factor, other.batch.factor)
    assert one.batch.columns(8) < 8
    assert one.batch.columns(5) == 5
    assert one.batch.projection(5, torch.float64, CPU) is None
    assert one.core_shape(5, 4, (3, 3))[0] == 5


def test_formula_counts_the_batch_factor() -> None:
    subspace = statistics(batches((8, 6, 5, 4), 3, torch.float32), 0.7, 1).published()
    core = math.prod(subspace.core_shape(8, 6, (5, 4)))
    factors = sum(factor.numel() for factor in subspace.factors())
    assert subspace.formula_bytes(8, 6, (5, 4), 4) == 4 * (core + factors)
    assert factors >= 8 * subspace.batch.columns(8)
    assert all(factor.is_contiguous() for factor in subspace.factors())


def test_state_round_trip() -> None:
    subspace = statistics(batches((8, 6, 5, 4), 3, torch.float64), 0.7, 1).published()
    loaded = PublishedSubspace.from_state_dict(subspace.state_dict())
    for one, other in zip(subspace.factors(), loaded.factors(), strict=True):
        assert torch.equal(one, other)
    assert loaded.batch.columns(8) == subspace.batch.columns(8)
    half = subspace.to(CPU, torch.float32)
    assert {factor.dtype for factor in half.factors()} == {torch.float32}
    with pytest.raises(StateError, match="no batch factor"):
        PublishedSubspace.from_state_dict({k: v for k, v in subspace.state_dict().items() if k != "batch_factor"})


def test_statistics_go_on_from_their_state_and_sum_over_processes() -> None:
    inputs = batches((6, 4, 3, 3), 4, torch.float64)
    whole = statistics(inputs, 0.7, 1)
    part = statistics(inputs[:2], 0.7, 1)
    resumed = PublishedStatistics(part.ranks, 1, "layer")
    resumed.load_state_dict(part.state_dict(), CPU)
    for input in inputs[2:]:
        resumed.update(input)
    summed = statistics(inputs[:2], 0.7, 1)
    other = statistics(inputs[2:], 0.7, 1)
    for mine, theirs in zip(summed.tensors(), other.tensors(), strict=True):
        mine.add_(theirs)
    for found in (resumed, summed):
        for one, expected in zip(found.published().factors(), whole.published().factors(), strict=True):
            assert relative_error(one @ one.T, expected @ expected.T) < 1e-12
    with pytest.raises(CalibrationError, match=r"batches of 6 samples here and of 5 on another"):
        summed.extend(statistics([inputs[0][:5]], 0.7, 1).signature(), CPU)


def test_nan_is_refused() -> None:
    found = statistics([torch.full((4, 3, 2, 2), math.nan)], 0.7, 1)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        found.published()


def test_rules_of_fine_tuning_and_of_a_stream() -> None:
    assert published_ranks() == ModeRanks(0.7, 0.7, 0.7)
    assert published_ranks(0) is None
    assert published_ranks(3) == ModeRanks(0.98, "full", 0.98)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 1.0])
def test_trained_directions_hold_the_energy_that_is_missing_to_the_threshold(threshold: float) -> None:
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    gram, protected = x.T @ x, orthonormal(12, 3)
    found = trained_directions(gram, protected, threshold)
    assert float((found.T @ protected).abs().max()) < 1e-14
    assert float((found.T @ found - torch.eye(found.shape[1], dtype=torch.float64)).abs().max()) < 1e-13
    total = float(gram.trace())

    def held(basis: Tensor) -> float:
        return float((x @ basis).square().sum()) / total

    outside = x - x @ protected @ protected.T
    values = np.linalg.svd(outside.numpy(), compute_uv=False) ** 2 / total
    needed = [r for r in range(10) if held(protected) + values[:r].sum() > threshold]
    assert found.shape[1] == (needed[0] if needed else 9)
    assert math.isclose(held(found), values[: found.shape[1]].sum(), rel_tol=1e-9)


def test_no_direction_where_the_protected_ones_hold_enough() -> None:
    gram = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
    assert trained_directions(gram, torch.eye(3)[:, :1], 0.9).shape == (3, 0)
    assert trained_directions(gram, torch.eye(3)[:, :0], 0.9).shape == (3, 1)
    assert trained_directions(gram, torch.eye(3), 1.0).shape == (3, 0)
    assert trained_directions(torch.zeros(3, 3), torch.eye(3)[:, :1], 0.9).shape == (3, 0)
    with pytest.raises(ConfigError, match=r"threshold=0\.0 is not allowed"):
        trained_directions(gram, torch.eye(3)[:, :1], 0.0)


def test_last_layers_of_networks() -> None:
    assert select_published(torchvision.models.resnet18(), 2) == ["layer4.1.conv1", "layer4.1.conv2"]
    # The depthwise convolution features.17.conv.1.0 does not count.
    assert select_published(torchvision.models.mobilenet_v2(), 4) == [
        "features.16.conv.2",
        "features.17.conv.0.0",
        "features.17.conv.2",
        "features.18.0",
    ]
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16)
    assert select_published(vit, 2) == [
        "encoder.layers.encoder_layer_1.mlp.0",
        "encoder.layers.encoder_layer_1.mlp.3",
    ]
    assert not any("out_proj" in name for name in select_published(vit, 5))


def test_the_classifier_can_be_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))
    assert select_published(model, 2) == ["0", "2"]
    assert select_published(model, 2, classifier="2") == ["0", "3"]
    with pytest.raises(ConfigError, match=r"classifier='fc' is not the name of a module"):
        select_published(model, 2, classifier="fc")
    with pytest.raises(ConfigError, match=r"last=3 is not allowed: Sequential has 2 convolutions"):
        select_published(model, 3)
    with pytest.raises(ConfigError, match=r"last=0 is not allowed"):
        select_published(model, 0)
