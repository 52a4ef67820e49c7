"""Feature vectors of inputs and weights: together they must make the layer's output."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.ops import features
from lightning_lance.ops.features import FeatureSide, feature_rows
from tests.ops.table import Case, cases


def all_rows(*args: object, **kwargs: object) -> Tensor:
    return torch.cat(list(feature_rows(*args, **kwargs)), 1)  # type: ignore[arg-type]


@given(cases(st.integers(1, 4)), st.booleans())
def test_patches_times_weight_rows_are_the_convolution(case: Case, channels_last: bool) -> None:
    module, side = case.module(), case.side(True)
    module.bias = None
    input = torch.randn(case.shape, dtype=torch.float64)
    if channels_last and input.dim() == 4:
        input = input.to(memory_format=torch.channels_last)
    expected = module(input)
    rows = all_rows(input, side, case.geometry())
    output = torch.einsum("gnk,grk->ngr", rows, side.rows(module.weight)).reshape(rows.shape[1], case.out)
    assert torch.allclose(output, expected.movedim(1, -1).reshape(-1, case.out))


@given(cases(st.integers(1, 4)))
def test_channel_vectors_are_the_positions_of_the_input(case: Case) -> None:
    input = torch.randn(case.shape, dtype=torch.float64)
    rows = all_rows(input, case.side(False), case.geometry())
    expected = input.movedim(1, -1).reshape(-1, case.groups, case.shape[1] // case.groups).transpose(0, 1)
    assert torch.equal(rows, expected)


@given(cases(), st.booleans())
def test_weight_rows_come_back(case: Case, patch: bool) -> None:
    weight, side = case.module().weight.detach(), case.side(patch)
    rows = side.rows(weight)
    assert rows.shape == (case.groups, weight.numel() // case.groups // side.width, side.width)
    assert torch.equal(side.weight(rows, weight.shape), weight)


def test_a_channel_projection_of_weight_rows_is_the_one_on_the_channel_axis() -> None:
    weight, basis = torch.randn(6, 4, 3, 3), torch.randn(4, 4)
    side = FeatureSide(1, 4, (3, 3), False)
    expected = torch.einsum("ocxy,cd->odxy", weight, basis)
    assert torch.allclose(side.weight(side.rows(weight) @ basis, weight.shape), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 12), (2, 3, 4, 12), (12,)])
def test_linear_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    input = torch.randn(shape)
    assert torch.equal(all_rows(input, FeatureSide(1, 12), None)[0], input.reshape(-1, 12))


def test_pieces_are_bounded_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((3, 4, 9, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 2, "zeros", False)
    input = torch.randn(case.shape, dtype=torch.float64)
    whole = all_rows(input, case.side(True), case.geometry())
    monkeypatch.setattr(features, "_CHUNK", 300)
    pieces = list(feature_rows(input, case.side(True), case.geometry()))
    assert max(piece.numel() for piece in pieces) <= 300
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_no_copy_of_the_whole_unfolded_input_is_made() -> None:
    case = Case((2, 16, 32, 32), 4, (5, 5), (1, 1), (0, 0), (1, 1), 1, "zeros", False)
    source = features._windows(torch.randn(case.shape), case.geometry())
    assert source.shape == (2, 28, 28, 16, 5, 5)
    assert source.untyped_storage().nbytes() == math.prod(case.shape) * 4


def test_a_subset_is_random_repeatable_and_leaves_the_global_generator() -> None:
    case = Case((4, 3, 20, 20), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros", False)
    input = torch.randn(case.shape)
    everything = F.unfold(input, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    shape = case.geometry()
    before = torch.get_rng_state()
    first, again, other = (
        all_rows(input, case.side(True), shape, 100, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    distances = torch.cdist(first.double(), everything.double())
    assert first.shape == (100, 27)
    assert float(distances.min(1).values.max()) < 1e-6
    assert distances.argmin(1).unique().numel() == 100


def test_an_empty_batch_has_no_vectors() -> None:
    assert list(feature_rows(torch.zeros(0, 12), FeatureSide(1, 12), None)) == []
