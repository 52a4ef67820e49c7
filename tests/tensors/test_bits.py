from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lance.tensors import bits as mask
from lightning_lance.tensors.bits import STRETCH, expand_bits, pack_bits, pack_bits_of


@given(size=st.integers(0, 200), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_bits_come_back(size: int, seed: int) -> None:
    flags = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(flags.clone())
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-size // 8),)
    back = expand_bits(bits, (size,), (1,), 0, 1, torch.bool)
    assert torch.equal(back, flags)


@given(size=st.integers(0, 200), one=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_both_ways_write_the_same_bytes(size: int, one: bool, seed: int) -> None:
    """Packed in one way and unpacked in the other: the number of threads may change in between."""
    flags = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask, "_one_pass", lambda *_: one)
        bits = pack_bits(flags.clone())
        patch.setattr(mask, "_one_pass", lambda *_: not one)
        assert torch.equal(bits, pack_bits(flags.clone()))
        assert torch.equal(expand_bits(bits, (size,), (1,), 0, 1, torch.float32), flags.float())


def test_each_bit_has_its_place() -> None:
    for place in range(8):
        flags = torch.zeros(8, dtype=torch.bool)
        flags[place] = True
        assert pack_bits(flags).item() == 2 ** (7 - place)


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_memory_order_is_kept(permutation: tuple[int, ...]) -> None:
    flags = (torch.rand(3, 5, 7, 2) < 0.5).permute(permutation)
    expected = flags.clone(memory_format=torch.preserve_format)
    back = expand_bits(pack_bits(flags), expected.shape, expected.stride(), 0, 1, torch.bool)
    assert back.stride() == expected.stride()
    assert torch.equal(back, expected)


@pytest.mark.parametrize("more", [-1, 0, 1, 7, 8, STRETCH, STRETCH + 3])
def test_stretch_by_stretch_is_the_same(more: int) -> None:
    tensor = torch.randn(3, STRETCH + more)[1]  # begins behind others
    sizes = []

    def find(stretch: torch.Tensor) -> torch.Tensor:
        sizes.append(stretch.numel())
        return stretch > 0

    assert torch.equal(pack_bits_of(tensor, find), pack_bits(tensor > 0))
    assert max(sizes) <= STRETCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_of_the_flags(dtype: torch.dtype) -> None:
    flags = torch.tensor([True, False, False, True, True])
    values = expand_bits(pack_bits(flags.clone()), (5,), (1,), -128, 127, dtype)
    assert torch.equal(values, torch.where(flags, torch.tensor(127, dtype=dtype), torch.tensor(-128, dtype=dtype)))
