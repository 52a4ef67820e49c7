"""Rounding to few bits: how far off an element may be, in each of the ways that it is done."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance.tensors import native
from lightning_lance.tensors import rounding as module
from lightning_lance.tensors.bits import STRETCH
from lightning_lance.tensors.codes import codes_per_byte, pack_codes, unpack_codes, unpacking_table
from lightning_lance.tensors.rounding import GROUP, expand, group_size, kept_bytes, round_to_bits
from tests.oracles import relative_error


@given(count=st.sampled_from([1, 2, 3, 4, 5, 9, 16, 17, 256]), size=st.integers(0, 70), seed=st.integers(0, 2**16))
def test_codes_come_back(count: int, size: int, seed: int) -> None:
    codes = torch.randint(0, count, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    per_byte = codes_per_byte(count)
    packed = pack_codes(codes.clone(), per_byte)
    assert packed.shape == (-(-size // per_byte),)
    values = torch.randn(count, dtype=torch.float64)
    assert torch.equal(unpack_codes(packed, unpacking_table(values, per_byte))[:size], values[codes.long()])


@pytest.fixture(params=["native", "kernels", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to the same number of bytes: a pass in C, torch's kernels for rows, operators that every device has."""
    found: str = request.param
    take(found, monkeypatch)
    return found


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go one of the ways."""
    if way == "native":
        if native._native is None:
            pytest.skip("nothing was compiled")
        return
    monkeypatch.setattr(native, "_native", None)
    if way == "operators":
        monkeypatch.setattr(module, "_kernels", lambda bits: None)
    elif module._kernels(4) is None:
        pytest.skip("this build of torch has no vectorised kernels for rows")


def rounded(values: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """What a tensor of one axis becomes again."""
    found = round_to_bits(values, bits, group)
    assert found is not None
    assert found.nbytes == -(-values.numel() // group) * (group * bits // 8 + (8 if bits == 8 else 4))
    back = expand(found, values.dtype)
    assert (back.shape, back.dtype) == (values.shape, values.dtype)
    return back


def by_group(values: Tensor, group: int) -> Tensor:
    """Groups in float64, the last one filled up with its last element."""
    missing = -values.numel() % group
    return torch.cat([values.double(), values[-1:].double().expand(missing)]).view(-1, group)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(
    count=st.integers(1, 700),
    group=st.sampled_from([64, 100, 128, 196, 256]),
    exponent=st.integers(-30, 30),
    offset=st.sampled_from([0.0, 0.3, -5.0, 100.0]),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_element_is_further_off_than_its_level(
    way: str, bits: int, count: int, group: int, exponent: int, offset: float, half: bool, seed: int
) -> None:
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = ((values + offset) * 10.0**exponent).to(torch.bfloat16 if half else torch.float32)
    before = values.clone()
    found = by_group(rounded(values, bits, group), group)
    assert torch.equal(values, before)
    groups = by_group(values, group)
    low, high = groups.amin(1, True), groups.amax(1, True)
    if bits == 2:  # what is beyond 1.5 deviations is cut
        deviation, mean = groups.std(1, keepdim=True, correction=0), groups.mean(1, True)
        low, high = torch.maximum(low, mean - 1.5 * deviation), torch.minimum(high, mean + 1.5 * deviation)
    target = torch.minimum(torch.maximum(groups, low), high)
    level = (high - low) / (2**bits - 1)
    # What the ends of a range lose: two bytes hold each with 2 and 4 bits, and float16 those of all groups together.
    size = groups.abs().amax(1, True)
    slack = size * 2**-6 + 2e-4 * size.amax() if bits < 8 else size * 1e-5 + 1e-5 * size.amax()
    slack = slack / (2**bits - 1) + size * (2**-7 if bits < 8 else 1e-6) + half * size * 2**-8
    assert bool(((found - target).abs() <= level * 0.51 + slack).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_both_ways_agree(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if module._kernels(bits) is None and native._native is None:
        pytest.skip("this build of torch has no vectorised kernels for rows")
    values = torch.randn(1500).relu_()
    values[300:600] = 0
    assert round_to_bits(values, bits).low is None  # type: ignore[union-attr]
    fused = rounded(values, bits)
    take("operators", monkeypatch)
    assert round_to_bits(values, bits).low is not None  # type: ignore[union-attr]
    composed = rounded(values, bits)
    # The nearest level of either, or its neighbour.
    assert (fused - composed).abs().max() <= 1.1 * values.max() / (2**bits - 1)
    assert relative_error(fused, composed) < {4: 0.03, 8: 0.002}[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 3.25, -1e-30, 1e30])
def test_equal_elements_stay_as_they_are(way: str, bits: int, value: float) -> None:
    values = torch.full((300,), value)
    values[:128] = 0.0
    found = rounded(values, bits)
    assert not found[:128].any()
    assert torch.allclose(found[256:], values[256:], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_what_no_range_holds_is_refused(way: str, bits: int, value: float) -> None:
    values = torch.randn(300)
    values[200] = value
    assert round_to_bits(values, bits) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_another_precision_is_rounded_as_float32_is(way: str, bits: int, dtype: torch.dtype) -> None:
    flat = torch.randn(2 * STRETCH + 130).to(dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # as Trainer(precision="bf16-true") does
        rounded, expected = round_to_bits(flat, bits), round_to_bits(flat.float(), bits)
    finally:
        torch.set_default_dtype(before)
    assert rounded is not None
    assert expected is not None
    assert torch.equal(rounded.codes, expected.codes)
    back = expand(rounded, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, expand(expected, torch.float32).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_float32_cannot_hold_is_refused(bits: int) -> None:
    assert round_to_bits(torch.linspace(-1e300, 1e300, 512, dtype=torch.float64), bits) is None


def test_two_bits_have_the_least_error_that_even_levels_can_have() -> None:
    """For normal numbers .1188 of their variance (Max, 1960, table II), and as much as groups of 128 add."""
    values = torch.randn(1 << 16)
    error = float((rounded(values, 2) - values).square().mean())
    assert 0.115 < error < 0.125


@given(
    last=st.integers(1, 3000),
    leading=st.lists(st.integers(1, 5), max_size=3),
)
@settings(max_examples=200)
def test_groups_hold_whole_parts_of_rows_where_they_can(last: int, leading: list[int]) -> None:
    shape = (*leading, last)
    strides = torch.empty(shape, device="meta").stride()
    found = group_size(shape, strides)
    allowed = range(64, 257, 2)
    assert found in allowed
    if last >= 64:
        fits = [group for group in allowed if last % group == 0]
        assert found == (max((g for g in fits if g <= 128), default=0) or min(fits, default=GROUP))


@pytest.mark.parametrize(
    ("shape", "last", "expected"),
    [
        ((8, 512, 7, 7), False, 98),  # two maps
        ((8, 3, 8, 8), False, 64),  # one map
        ((8, 512, 7, 7), True, 128),  # channels of one position
        ((8, 64, 14, 14), False, 98),
        ((8, 64, 56, 56), False, 112),
        ((8, 96, 14, 14), True, 96),
        ((8, 12, 197, 64), False, 64),
        ((4, 10), False, 80),
    ],
)
def test_groups_of_maps_and_tokens(shape: tuple[int, ...], last: bool, expected: int) -> None:
    tensor = torch.empty(shape, device="meta")
    if last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    assert group_size(tensor.shape, tensor.stride()) == expected


def test_rows_of_another_size_do_not_spoil_their_neighbours() -> None:
    values = torch.randn(32, 100)
    values[::2] *= 1000
    group = group_size(values.shape, values.stride())
    off = [(rounded(values.view(-1), 4, group=size).view_as(values) - values)[1::2].norm() for size in (group, GROUP)]
    assert off[0] < 0.1 * values[1::2].norm()
    assert off[1] > 5 * off[0]


@pytest.mark.parametrize(("bits", "row"), [(2, 36), (4, 68), (8, 136)])
def test_bytes_by_formula(bits: int, row: int) -> None:
    assert [kept_bytes(count, 4, bits) for count in (255, 256, 257, 1280)] == [1020, 2 * row, 3 * row, 10 * row]
    assert kept_bytes(256, 1, bits) == min(256, 2 * row)  # as it is, where that is less
    assert kept_bytes(1280, 2, None) == 2560
