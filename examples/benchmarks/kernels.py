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
from lightning_lance.ops import conv
from lightning_lance.ops.conv import conv_input_grad, conv_weight_grad, geometry
from lightning_lance.ops.factors import Factors
from lightning_lance.tensors import bits as mask
from lightning_lance.tensors import linalg
from lightning_lance.tensors import rounding as stretches
from lightning_lance.tensors.linalg import mode_products
from lightning_lance.tensors.rounding import expand, round_to_bits

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
    """Rounding a tensor and the way back: a dozen operators, and torch's kernels for rows."""
    for shape in MAPS:
        values = torch.randn(shape).relu_()

        for bits in (4, 8):

            def there_and_back(values: Tensor = values, bits: int = bits) -> Tensor:
                rounded = round_to_bits(values.view(-1), bits)
                assert rounded is not None
                return expand(rounded, values.dtype)

            composed = without(there_and_back, stretches, "_kernels", lambda _: None)
            yield f"rounding to {bits} bits and back", _sizes(shape), composed, there_and_back


def flags() -> Iterator[Pair]:
    """Eight flags in a byte and back: with torch's operators, and with NumPy's."""
    for shape in MAPS:
        positive = torch.randn(shape) > 0
        bits = mask.pack_bits(positive.clone())

        def pack(positive: Tensor = positive) -> Tensor:
            return mask.pack_bits(positive.clone())  # one of the ways overwrites it

        def expand(bits: Tensor = bits, positive: Tensor = positive) -> Tensor:
            return mask.expand_bits(bits, tuple(positive.shape), positive.stride(), 0, 1, torch.float32)

        for name, function in (("packing", pack), ("expanding", expand)):
            yield f"{name} flags", _sizes(shape), without(function, mask, "_one_pass", lambda *_: False), function


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
    for group in (rounding, flags, pointwise, small_maps):
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
