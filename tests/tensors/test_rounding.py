from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lance.tensors import rounding as module
from lightning_lance.tensors.codes import codes_per_byte, pack_codes, unpack_codes, unpacking_table
from lightning_lance.tensors.precision import rounded_bytes
from lightning_lance.tensors.rounding import GROUP, Quantized, dequantize, quantize
from tests.oracles import relative_error


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


def kept_bytes(quantized: Quantized) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in quantized if tensor is not None)


@pytest.fixture(params=["fused", "composed"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the same number of bytes: torch's kernels for rows, and operators that every device has."""
    found: str = request.param
    if found == "composed":
        monkeypatch.setattr(module, "_kernels", lambda bits: None)
    elif module._kernels(4) is None:
        pytest.skip("this build of torch has no vectorised kernels for rows")
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    exponent=st.integers(-9, 9),
    offset=st.sampled_from([0.0, 0.3, 100.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_error_is_at_most_half_a_level(
    kernels: str, bits: int, dtype: torch.dtype, shape: tuple[int, ...], exponent: int, offset: float, seed: int
) -> None:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = ((values + offset) * 10.0**exponent).to(dtype)
    before = values.clone()
    quantized = quantize(values, bits, owned=False)
    assert torch.equal(values, before)
    found = dequantize(quantized, bits, values.shape, values.stride(), dtype)
    # The oracle: the range of every 64 elements, in memory order, filled up with zeros.
    flat = torch.zeros(-(-values.numel() // GROUP) * GROUP, dtype=torch.float64)
    flat[: values.numel()] = values.flatten()
    groups = flat.view(-1, GROUP)
    if not groups.numel():
        assert found.shape == values.shape
        return
    spread = groups.max(-1).values - groups.min(-1).values
    # Half a level, and what rounding does to the ends of the range: those of all groups, where the present one is
    # small next to the rest.
    half = 0.5 * spread / (2**bits - 1)
    largest = groups.abs().max(-1).values
    slack = largest * 2**-9 + spread * 2**-9 if bits == 4 else largest * 1e-5
    allowed = half * 1.01 + slack + 1e-4 * groups.abs().max() * (bits == 4)
    wrong = (found.double() - values.double()).abs().flatten()
    assert found.dtype == dtype
    assert bool((wrong <= allowed.repeat_interleave(GROUP)[: values.numel()]).all())
    assert kept_bytes(quantized) == rounded_bytes(values.numel(), bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_kernels_agree_with_composed_ones(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if module._kernels(bits) is None:
        pytest.skip("this build of torch has no vectorised kernels for rows")
    values = torch.randn(5, 300).relu_()
    values[1] = 0
    fused = quantize(values, bits, owned=False)
    assert fused.low is None
    monkeypatch.setattr(module, "_rows", lambda *_: None)
    composed = quantize(values, bits, owned=False)
    assert composed.low is not None
    found = [dequantize(each, bits, values.shape, values.stride(), values.dtype) for each in (fused, composed)]
    # The nearest level of either, or its neighbour.
    assert (found[0] - found[1]).abs().max() <= 1.1 * values.max() / (2**bits - 1)
    assert relative_error(*found) < {4: 0.03, 8: 0.002}[bits]


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_magnitude(bits: int, scale: float) -> None:
    """Steps and offsets in float16 would be 0 or infinite for some of these."""
    values = torch.rand(40, 64) * scale
    values[3] = 0  # a group without a spread
    found = dequantize(quantize(values, bits, owned=False), bits, values.shape, values.stride(), values.dtype)
    assert relative_error(found, values) < {4: 0.05, 8: 0.003}[bits]
    assert not found[3].any()


def test_constant_groups_and_other_layouts(kernels: str) -> None:
    values = torch.full((2, 64), 3.25)
    values[1] = -1.0
    found = dequantize(quantize(values.clone(), 4), 4, values.shape, values.stride(), torch.float32)
    assert torch.allclose(found, values, atol=1e-3)
    last = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    found = dequantize(quantize(last.clone(), 8), 8, last.shape, last.stride(), torch.bfloat16)
    assert found.stride() == last.stride()
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), last, atol=0.05)
