"""The passes in C write the bytes that torch's kernels and NumPy's write, and what they change on the way is right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_lance.tensors import native, rounding
from lightning_lance.tensors.bits import expand_bits, pack_bits, pack_bits_of
from lightning_lance.tensors.rounding import expand, expand_changed, group_size, round_to_bits

pytestmark = [pytest.mark.skipif(native._native is None, reason="nothing was compiled")]

drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
GROUPS = st.sampled_from([64, 66, 98, 100, 112, 128, 196, 254, 256])
NUMBERS = [0.0, -0.0, 1e-8, 1.0, -3.0, 6.0, 100.0, 1e4]


@pytest.fixture(params=["wide", "plain"], autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """The widest ones that the processor has, and those of any other."""
    before = native._native.widen(request.param == "wide")
    yield
    native._native.widen(before)


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are shared out among threads, also where they are few."""
    monkeypatch.setattr(native, "_threads", lambda _: request.param)


def values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of several sizes, some of them equal."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(count, generator=draw) * 10 ** torch.randint(-2, 3, (count,), generator=draw)
    special = torch.rand(count, generator=draw) < 0.2
    found[special] = torch.tensor(NUMBERS)[torch.randint(0, len(NUMBERS), (int(special.sum()),), generator=draw)]
    return found.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@given(
    count=st.integers(1, 1500), group=GROUPS, exponent=st.integers(-4, 0), half=st.booleans(), seed=st.integers(0, 99)
)
@drawn
def test_rows_are_those_of_torch(bits: int, count: int, group: int, exponent: int, half: bool, seed: int) -> None:
    pack = {4: torch.ops.quantized.embedding_bag_4bit_prepack, 8: torch.ops.quantized.embedding_bag_byte_prepack}[bits]
    back = {4: torch.ops.quantized.embedding_bag_4bit_unpack, 8: torch.ops.quantized.embedding_bag_byte_unpack}[bits]
    flat = (values(count, seed) * 10.0**exponent + 0.0).to(torch.bfloat16 if half else torch.float32)
    found = native.pack_rows(flat, bits, group)
    assert found is not None
    rows = torch.cat([flat, flat[-1:].expand(-count % group)]).view(-1, group).float()
    assert torch.equal(found.codes, pack(rows))
    expected = back(found.codes).view(-1)[:count]
    again = native.expand_rows(found.codes, count, bits, group, flat.dtype)
    # One rounding less or more, where a product and a sum are one instruction.
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[flat.dtype]
    size = float(expected.abs().max())
    torch.testing.assert_close(again.float(), expected, rtol=close, atol=size * 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@given(half=st.integers(0, 2**15 - 1))
@drawn
def test_ranges_are_float16s(bits: int, half: int) -> None:
    """Every number of a float16, as both ends of a group, small and infinite ones too."""
    number = torch.tensor([half], dtype=torch.int16).view(torch.float16).float()
    flat = torch.stack([number, -number, number * (1 + 2**-11), number * (1 + 2**-12)], 1).view(-1).repeat(16)
    expected = round_without(flat, bits)
    found = round_to_bits(flat, bits, 64)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert torch.equal(found.codes, expected.codes)
        assert found.scale == expected.scale


def round_without(flat: Tensor, bits: int) -> Any:
    """By torch's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_native", None)
        return round_to_bits(flat, bits, 64)


LAYOUTS = st.sampled_from([None, (0, 2, 3, 1), (0, 3, 1, 2), (1, 0, 2, 3)])


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)),
    layout=LAYOUTS,
    bits=st.sampled_from([4, 8]),
    half=st.booleans(),
    seed=st.integers(0, 99),
    bounds=st.sampled_from([None, (0.0, math.inf), (0.0, 6.0), (-0.5, 0.25)]),
)
@drawn
def test_changes_are_of_the_channel(
    shape: tuple[int, ...], layout: Any, bits: int, half: bool, seed: int, bounds: Any
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    draw = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=draw).to(dtype)
    if layout is not None:  # the axes as they lie in memory
        tensor = tensor.permute(layout).contiguous().permute([layout.index(axis) for axis in range(4)])
    factor, term = torch.randn(2, shape[1], generator=draw)
    affine = native.Affine.of(factor, term, tensor.stride())
    flat = tensor.as_strided((tensor.numel(),), (1,))
    by_channel = (slice(None), None, None)
    expected = torch.empty_like(tensor, dtype=torch.float64)
    expected.copy_(tensor.double() * factor.double()[by_channel] + term.double()[by_channel])
    expected = expected.as_strided((tensor.numel(),), (1,))
    group = group_size(shape, tensor.stride())

    # On the way in ...
    changed = round_to_bits(flat, bits, group, affine)
    assert changed is not None
    level = float(expected.max() - expected.min()) / (2**bits - 1)
    slack = float(expected.abs().max()) * 2**-9 + 1e-6
    back = expand(changed, torch.float32).double()
    assert float((back - expected).abs().max()) <= 0.51 * level + slack

    # ... and on the way out.
    rounded = round_to_bits(flat, bits, group)
    assert rounded is not None
    plain = torch.empty_like(tensor, dtype=torch.float64)
    plain.as_strided((tensor.numel(),), (1,)).copy_(expand(rounded, torch.float32))
    expected = torch.empty_like(plain).copy_(plain * factor.double()[by_channel] + term.double()[by_channel])
    expected = expected.as_strided((tensor.numel(),), (1,))
    if bounds is not None:
        expected = expected.clamp(*bounds)
    found = expand_changed(rounded, dtype, affine, bounds)
    assert found is not None
    assert found.dtype == dtype
    close = 2**-8 if half else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=1e-5)


@given(
    count=st.integers(0, 700),
    bounds=st.sampled_from([(0.0, 6.0), (0.0, math.nan), (-1.0, 1.0), (math.nan, math.nan), (-math.inf, 0.0)]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
@drawn
def test_flags_are_those_of_numpy(count: int, bounds: tuple[float, float], half: bool, seed: int) -> None:
    flat = values(count, seed, torch.bfloat16 if half else torch.float32)
    for place, number in enumerate((math.nan, math.inf, -math.inf, *bounds)):
        flat[place * 11 : place * 11 + 1] = number
    low, high = bounds
    expected = ~(flat <= low) & ~(flat >= high)
    assert np.array_equal(native.pack_flags(flat, low, high).numpy(), np.packbits(expected.numpy()))


@given(count=st.integers(0, 700), seed=st.integers(0, 99))
@drawn
def test_values_of_flags(count: int, seed: int) -> None:
    flags = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(flags.clone())
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8):
        off, on = (0, 1) if dtype is torch.bool else (3, 200) if dtype is torch.uint8 else (-0.25, 1.7)
        expected = torch.where(flags, torch.tensor(on, dtype=dtype), torch.tensor(off, dtype=dtype))
        assert torch.equal(native.expand_flags(bits, count, off, on, dtype), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_native", None)
            without = expand_bits(bits, (count,), (1,), off, on, dtype)
        torch.testing.assert_close(without, expected)


def test_flags_of_the_derivatives() -> None:
    """The two ways to say where a ReLU or a hardtanh passes gradients on."""
    flat = values(5000, 0)
    relu = flat.relu()
    assert torch.equal(pack_bits_of(relu, Tensor.bool, (0.0, math.nan)), pack_bits(relu.bool()))
    inside = torch.ops.aten.hardtanh_backward(torch.ones(5000), flat, -1.0, 1.0).bool()
    assert torch.equal(
        pack_bits_of(flat, lambda _: pytest.fail("another way was there"), (-1.0, 1.0)), pack_bits(inside)
    )


def test_what_lies_otherwise_than_it_says_is_left_alone() -> None:
    negative = torch.complex(torch.randn(600), torch.randn(600)).conj().imag
    assert negative.is_neg()
    assert not native.takes(negative)
    assert not native.takes(torch._efficientzerotensor(600))
    assert not native.takes(torch.randn(600, dtype=torch.float64))
    assert not native.takes(torch.randn(600, device="meta"))
    assert native.takes(nn.Parameter(torch.randn(600)))
    found = round_to_bits(negative.resolve_neg(), 8)
    assert found is not None
    assert float((expand(found, torch.float32) - negative).abs().max()) < 0.05


@pytest.mark.parametrize("group", [8, 63])
def test_groups_that_are_too_short_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="16 to 256 elements"):
        native.pack_rows(torch.randn(1000), 4, group)


def test_groups_that_no_buffer_holds_take_another_way() -> None:
    flat = torch.randn(1000)
    assert native.pack_rows(flat, 4, 258) is None
    found = round_to_bits(flat, 4, 258)
    assert found is not None
    assert float((expand(found, torch.float32) - flat).abs().max()) < 0.5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_not_asked(device: str) -> None:
    flat = torch.randn(1000)
    expected = native.pack_rows(flat, 4, 128)
    assert expected is not None
    native._two.cache_clear()
    with torch.device(device):
        found = native.pack_rows(flat, 4, 128)
        assert found is not None
        assert torch.equal(found.codes, expected.codes)
        assert not native.expand_rows(found.codes, 1000, 4, 128, torch.float32).is_meta
        flags = native.pack_flags(flat, 0.0, math.nan)
        assert torch.equal(native.expand_flags(flags, 1000, 0.0, 1.0, torch.float32), (flat > 0).float())


def test_what_was_written_can_be_read_whoever_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch has no kernels for rows, as on some processors."""
    flat = torch.randn(1000)
    found = round_to_bits(flat, 8)
    assert found is not None
    monkeypatch.setattr(rounding, "_kernels", lambda _: None)
    with FlopCounterMode(display=False):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            back = expand(found, dtype)
            assert back.dtype == dtype
            assert float((back - flat).abs().max()) < 0.05


def test_nothing_is_changed_by_channel_in_another_way() -> None:
    """Those who ask for a change get it, or hear that it was not done."""
    flat, affine = torch.randn(1000), native.Affine(torch.ones(4), torch.ones(4), 250)
    with FlopCounterMode(display=False):
        assert round_to_bits(flat, 4, 128, affine) is None
    assert round_to_bits(flat, 2, 128, affine) is None


def test_a_mode_that_sees_operators_sees_them_all() -> None:
    with FlopCounterMode(display=False):
        assert not native.takes(torch.randn(600))


@pytest.mark.parametrize("bits", [4, 8])
def test_not_a_number_does_not_reach_its_neighbours(bits: int) -> None:
    flat = torch.randn(1280)
    flat[300] = math.nan
    found = round_to_bits(flat, bits)
    if found is not None:
        back = expand(found, torch.float32)
        others = torch.arange(1280) != 300
        assert float((back - flat)[others].abs().max()) < 0.5


def gated(x: Tensor, gradient: Tensor) -> Tensor:
    found = torch.empty_like(gradient)
    native.gate(pack_bits(x > 0), gradient, found)
    return found


@given(count=st.integers(1, 1500), half=st.booleans(), seed=st.integers(0, 99))
@drawn
def test_a_gradient_passes_where_a_flag_is_set(count: int, half: bool, seed: int) -> None:
    """Bit for bit, whatever number it is, and not beyond the last element."""
    dtype = torch.bfloat16 if half else torch.float32
    draw = torch.Generator().manual_seed(seed)
    x = values(count, seed)
    gradient = torch.randn(count, generator=draw).to(dtype)
    gradient[torch.rand(count, generator=draw) < 0.1] = math.nan
    gradient[torch.rand(count, generator=draw) < 0.1] = math.inf
    gradient[torch.rand(count, generator=draw) < 0.1] = -0.0
    found = gated(x, gradient)
    expected = torch.where(x > 0, gradient, torch.zeros((), dtype=dtype))
    kind = torch.int16 if half else torch.int32
    assert found.dtype == dtype
    assert torch.equal(found.view(kind), expected.view(kind))


@pytest.mark.parametrize("size", [1, 7, 8, 15, 63, 64, 65, 4099])
def test_a_gate_reads_gradients_at_any_address(size: int) -> None:
    """As of a view that begins somewhere."""
    x, gradient = torch.randn(size), torch.randn(size + 3)
    for start in range(4):
        part = gradient[start : start + size]
        assert torch.equal(gated(x, part), torch.where(x > 0, part, 0.0))
        half = gradient.bfloat16()[start : start + size]
        assert torch.equal(gated(x, half), torch.where(x > 0, half, 0.0))


SHAPES = (
    st.tuples(st.integers(1, 60), st.integers(1, 40))
    | st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 40))
    | st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 18), st.integers(1, 18))
    | st.tuples(*(st.integers(1, 6) for _ in range(5)))
)


def laid_out(tensor: Tensor, order: int) -> Tensor:
    """The same elements with the axes in another order in memory."""
    axes = list(range(tensor.dim()))
    axes = [axes, [0, *axes[2:], 1], axes[::-1], [1, 0, *axes[2:]]][order]
    return tensor.permute(axes).contiguous().permute([axes.index(axis) for axis in range(tensor.dim())])


@given(
    shape=SHAPES,
    order=st.integers(0, 3),
    bits=st.sampled_from([4, 8]),
    group=GROUPS,
    half=st.booleans(),
    changed=st.booleans(),
    fixed=st.booleans(),
    needs_input=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 99),
)
@drawn
def test_a_norm_goes_back_from_its_rows(
    shape: tuple[int, ...],
    order: int,
    bits: int,
    group: int,
    half: bool,
    changed: bool,
    fixed: bool,
    needs_input: bool,
    scale: float,
    seed: int,
) -> None:
    """The formula in float64, of the values that torch's own kernel or a pass tested above reads from the rows."""
    dtype = torch.bfloat16 if half else torch.float32
    draw = torch.Generator().manual_seed(seed)
    x = laid_out(torch.randn(shape, generator=draw), order)
    gradient = laid_out(torch.randn(shape, generator=draw) + 0.3, order).to(dtype)
    flat, channels = x.as_strided((x.numel(),), (1,)), shape[1]
    weight, factor, term = torch.randn(3, channels, generator=draw)
    affine = native.Affine.of(factor, term, x.stride()) if changed else None
    rows = native.pack_rows(flat, bits, group)
    assert rows is not None
    found = torch.empty_like(gradient) if needs_input else None
    sums = native.norm_backward(
        *(rows.codes, bits, group, scale, affine, max(1, x.stride()[1])),
        *(gradient.as_strided((x.numel(),), (1,)), weight, found, fixed),
    )

    back = {4: torch.ops.quantized.embedding_bag_4bit_unpack, 8: torch.ops.quantized.embedding_bag_byte_unpack}[bits]
    read = (back(rows.codes).view(-1)[: x.numel()].double() * scale).as_strided(x.shape, x.stride())
    by_channel = (slice(None), *[None] * (len(shape) - 2))
    if changed:
        read = read * factor.double()[by_channel] + term.double()[by_channel]
    axes, g = [axis for axis in range(len(shape)) if axis != 1], gradient.double()
    sum_g, sum_product = g.sum(axes), (g * read).sum(axes)
    size = (g.abs() * (1 + read.abs())).sum(axes).max()
    torch.testing.assert_close(sums.double(), torch.stack([sum_g, sum_product]), rtol=1e-5, atol=float(size) * 1e-6)
    if found is None:
        return
    count = x.numel() // channels
    expected = g if fixed else g - (sum_g / count)[by_channel] - read * (sum_product / count)[by_channel]
    expected = weight.double()[by_channel] * expected
    close, largest = (2**-8 if half else 1e-5), float(expected.abs().max()) + float(weight.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=2e-6 * largest)


@given(
    count=st.integers(1, 1500),
    group=GROUPS,
    half=st.booleans(),
    by_gradient=st.booleans(),
    exponent=st.sampled_from([-30, 0, 30]),
    seed=st.integers(0, 99),
)
@drawn
def test_functions_are_those_of_every_element(
    count: int, group: int, half: bool, by_gradient: bool, exponent: int, seed: int
) -> None:
    """In float64, of what the rows stand for."""
    size = 2.0**exponent
    rounded = round_to_bits(values(count, seed).clamp(-30, 30) * size, 4, group=group)
    assert rounded is not None
    dtype = torch.bfloat16 if half else torch.float32
    found = torch.full((count + 1,), 7.0, dtype=dtype)
    gradient = torch.randn(count).to(dtype) if by_gradient else None
    assert rounding.map_elements(rounded, lambda x: torch.sin(x / size), found[:count], gradient)
    expected = torch.sin(expand(rounded, torch.float32).double() / size)
    expected = expected if gradient is None else expected * gradient.double()
    torch.testing.assert_close(found[:count].double(), expected, rtol=2**-8 if half else 1e-5, atol=1e-5)
    assert found[count] == 7


def test_functions_are_asked_for_a_stretch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "STRETCH", 16 * 3)
    rounded = round_to_bits(torch.randn(1000), 4, group=128)
    assert rounded is not None
    asked = []

    def function(levels: Tensor) -> Tensor:
        asked.append(levels.shape)
        return levels.exp()

    found = torch.empty(1000)
    assert rounding.map_elements(rounded, function, found)
    assert asked == [(3, 16), (3, 16), (2, 16)]
    torch.testing.assert_close(found, expand(rounded, torch.float32).exp())


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_other_bits_have_no_table(bits: int) -> None:
    rounded = round_to_bits(torch.randn(1000), bits)
    assert rounded is not None
    assert not rounding.map_elements(rounded, torch.exp, torch.empty(1000))


def test_what_is_not_finite_stays_in_its_channel() -> None:
    x, gradient = torch.randn(4, 6, 8, 8), torch.randn(4, 6, 8, 8)
    gradient[1, 2, 3, 4], gradient[1, 4, 3, 4] = math.nan, math.inf
    rows = native.pack_rows(x.view(-1), 4, 64)
    assert rows is not None
    found = torch.empty_like(gradient)
    sums = native.norm_backward(rows.codes, 4, 64, 1.0, None, 64, gradient.view(-1), torch.ones(6), found, False)
    finite = torch.tensor([True, True, False, True, False, True])
    assert torch.equal(sums.isfinite().all(0), finite)
    assert torch.equal(found.view(4, 6, 64).isfinite().all(2).all(0), finite)


def test_what_no_pass_reads_is_refused() -> None:
    rows = native.pack_rows(torch.randn(640), 4, 64)
    assert rows is not None
    for bits, group in ((2, 64), (4, 63), (4, 258), (8, 8)):
        with pytest.raises(ValueError, match="groups have"):
            native.norm_backward(rows.codes, bits, group, 1.0, None, 1, torch.randn(640), torch.ones(10), None, False)
    assert not native.gates(torch.randn(8).double())
    assert native.gates(torch.randn(8).half())
