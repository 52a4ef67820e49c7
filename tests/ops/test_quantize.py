from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lance.ops.codes import codes_per_byte, pack_codes, unpack_codes, unpacking_table
from lightning_lance.ops.quantize import GROUP, dequantize, quantize


@given(count=st.sampled_from([1, 2, 3, 4, 5, 9, 16, 17, 256]), size=st.integers(0, 70), seed=st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_codes_come_back(count: int, size: int, seed: int) -> None:
    codes = torch.randint(0, count, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    per_byte = codes_per_byte(count)
    assert 256 >= count > 1 or per_byte == 4
    packed = pack_codes(codes.clone(), per_byte)
    assert packed.shape == (-(-size // per_byte),)
    values = torch.randn(count, dtype=torch.float64)
    assert torch.equal(unpack_codes(packed, unpacking_table(values, per_byte))[:size], values[codes.long()])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_error_is_at_most_half_a_level(bits: int, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) * 5
    quantized = quantize(values.clone(), bits, torch.float32)
    found = dequantize(quantized, bits, values.shape, values.stride(), dtype)
    # The oracle: the range of every 64 elements, in memory order, filled up with zeros.
    flat = torch.zeros(-(-values.numel() // GROUP) * GROUP, dtype=torch.float64)
    flat[: values.numel()] = values.flatten()
    groups = flat.view(-1, GROUP)
    level = (groups.max(-1).values - groups.min(-1).values) / (2**bits - 1) if groups.numel() else groups.sum(-1)
    allowed = level.repeat_interleave(GROUP)[: values.numel()].view(shape) * 0.5001 + 1e-6
    assert found.dtype == dtype
    assert bool(((found.double() - values.double()).abs() <= allowed).all())
    assert quantized.codes.numel() == groups.numel() * bits // 8
    assert quantized.low.numel() == groups.shape[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_range_in_half_precision(bits: int) -> None:
    values = torch.randn(10, 200) * 3 + 1
    quantized = quantize(values.clone(), bits)
    assert quantized.low.dtype == quantized.step.dtype == torch.float16
    found = dequantize(quantized, bits, values.shape, values.stride(), torch.float32)
    # Half a level, and the rounding of both ends of the range.
    assert (found - values).abs().max() <= 0.5 * quantized.step.max() + 2**-10 * values.abs().max() * 2


def test_constant_groups_and_other_layouts() -> None:
    values = torch.full((2, 64), 3.25)
    values[1] = -1.0
    found = dequantize(quantize(values.clone(), 4), 4, values.shape, values.stride(), torch.float32)
    assert torch.allclose(found, values, atol=1e-3)
    last = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    found = dequantize(quantize(last.clone(), 8), 8, last.shape, last.stride(), torch.bfloat16)
    assert found.stride() == last.stride()
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), last, atol=0.05)
