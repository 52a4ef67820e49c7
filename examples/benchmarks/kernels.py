"""How long the kernels of this package take next to what stands for them on other devices, or to the stock ones.

    python -m examples.benchmarks.kernels --threads 1

Ratios of medians of alternating calls in one process: 2.0 means twice as fast. Each pair computes the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.batch_mode import seconds
from examples.benchmarks.memory import RESULTS
from examples.benchmarks.table import show
from lightning_lance.compression.recipes import affine
from lightning_lance.ops import conv
from lightning_lance.ops.conv import conv_input_grad, conv_weight_grad, geometry
from lightning_lance.ops.factors import Factors
from lightning_lance.tensors import bits as mask
from lightning_lance.tensors import linalg, native
from lightning_lance.tensors.linalg import mode_products
from lightning_lance.tensors.native import Affine
from lightning_lance.tensors.rounding import Rounded, expand, expand_changed, round_to_bits

Pair = tuple[str, str, Callable[[], object], Callable[[], object]]
MAPS = ((32, 100), (32, 32, 14, 14), (32, 64, 28, 28), (32, 64, 56, 56))
SQUARES = ((96, 4), (96, 7), (96, 8), (96, 14))
POINTWISE = ((192, 7), (96, 14), (48, 28), (24, 56))


@contextmanager
def setting(module: Any, name: str, value: object) -> Iterator[None]:
    """A module's global for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def without(function: Callable[[], object], module: Any, name: str, value: object) -> Callable[[], object]:
    """A function that runs with another global."""

    def run() -> object:
        with setting(module, name, value):
            return function()

    return run


def rounding() -> Iterator[Pair]:
    """Rounding a tensor and the way back: torch's kernels for rows, and a pass in C each."""
    for shape in MAPS:
        values = torch.randn(shape).relu_()

        for bits in (4, 8):

            def there_and_back(values: Tensor = values, bits: int = bits) -> Tensor:
                rounded = round_to_bits(values.view(-1), bits)
                assert rounded is not None
                return expand(rounded, values.dtype)

            yield f"rounding to {bits} bits and back", _sizes(shape), _without_c(there_and_back), there_and_back


def computed() -> Iterator[Pair]:
    """What a layer behind a batch norm and a ReLU reads, from what the norm keeps: in three passes, and in one."""
    for shape in MAPS[1:]:
        input, factor, term = torch.randn(shape), torch.rand(shape[1]), torch.rand(shape[1])
        rounded = round_to_bits(input.view(-1), 4)
        assert rounded is not None
        by_channel = Affine.of(factor, term, input.stride())

        def three(
            rounded: Rounded = rounded, shape: tuple[int, ...] = shape, factor: Tensor = factor, term: Tensor = term
        ) -> Tensor:
            return affine(expand(rounded, torch.float32).view(shape), factor, term).clamp_(0.0, math.inf)

        def one(
            rounded: Rounded = rounded, shape: tuple[int, ...] = shape, by_channel: Affine = by_channel
        ) -> Tensor | None:
            flat = expand_changed(rounded, torch.float32, by_channel, (0.0, math.inf))
            return None if flat is None else flat.view(shape)

        if one() is not None:
            yield "norm and ReLU of what is kept", _sizes(shape), _without_c(three), one


def flags() -> Iterator[Pair]:
    """Eight flags in a byte and back: with NumPy's and torch's kernels, and in C."""
    for shape in MAPS:
        values = torch.randn(shape).relu_()
        bits = mask.pack_bits(values.bool())

        def pack(values: Tensor = values) -> Tensor:
            return mask.pack_bits_of(values, Tensor.bool, (0.0, math.nan))

        def expand(bits: Tensor = bits, values: Tensor = values) -> Tensor:
            return mask.expand_bits(bits, tuple(values.shape), values.stride(), 0, 1, torch.float32)

        for name, function in (("packing", pack), ("expanding", expand)):
            yield f"{name} flags", _sizes(shape), _without_c(function), function


def _without_c(function: Callable[[], object]) -> Callable[[], object]:
    return without(function, native, "_native", None)


def pointwise() -> Iterator[Pair]:
    """Gradients of a 1x1 convolution: what convolutions run, and one matrix product for each sample."""
    frame = geometry((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")
    for channels, side in POINTWISE:
        shape = (32, channels, side, side)
        input, weight = torch.randn(shape), torch.randn(channels, channels, 1, 1)
        grad = torch.randn(shape)
        whole = Factors(None, None, 1.0, None, (None, None))

        def to_input(grad: Tensor = grad, weight: Tensor = weight) -> Tensor:
            return conv_input_grad(grad, weight, frame, tuple(grad.shape))

        def to_weight(
            grad: Tensor = grad, input: Tensor = input, weight: Tensor = weight, whole: Factors = whole
        ) -> Tensor:
            return conv_weight_grad(grad, input, weight, frame, whole)

        for name, function, value in (("input", to_input, 0), ("weight", to_weight, math.inf)):
            limit = {"input": "_MANY_POSITIONS", "weight": "_PRODUCTS"}[name]
            other = math.inf if value == 0 else 0
            yield (
                f"{name} gradient, pointwise",
                _sizes(shape),
                without(function, conv, limit, other),
                without(function, conv, limit, value),
            )


def small_maps() -> Iterator[Pair]:
    """Both spatial modes of a map: one after the other, and as one with the Kronecker product of their matrices."""
    for channels, side in SQUARES:
        core, factor = torch.randn(16, channels, side, side), torch.randn(max(1, side // 2), side)

        def both(core: Tensor = core, factor: Tensor = factor) -> Tensor:
            return mode_products(core, [factor, factor], 2)

        yield (
            "projecting both spatial modes",
            _sizes(core.shape),
            without(both, linalg, "SMALL_MAP", 0),
            without(both, linalg, "SMALL_MAP", math.inf),
        )


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for group in (rounding, computed, flags, pointwise, small_maps):
        for name, shape, other, ours in group():
            slow, fast = seconds([other, ours], options.repeats)
            found.setdefault(name, {})[shape] = slow / fast
    rows = [[name, shape, f"{ratio:.1f}"] for name, ratios in found.items() for shape, ratio in ratios.items()]
    show(f"Kernels, {options.threads} threads", [["kernel", "tensor", "times as fast"], *rows])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
