"""The batch mode by sums over groups next to a product with cosines: how long it takes, how noisy a gradient it gives.

    python -m examples.benchmarks.batch_mode

Times are medians of alternating calls in one process. The noise is that of the weight gradient of pointwise
convolutions of EfficientNet-Lite0 with its ImageNet weights on digits: the relative error of one step, root mean square
over random orders of the samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.benchmarks.fidelity import network
from examples.benchmarks.table import show
from lightning_lance.ops.factors import group_sums
from lightning_lance.subspaces.ranks import compact_batch_rank
from lightning_lance.tensors.linalg import contrast_scale, group_rotation, sample_groups

CPU = torch.device("cpu")
MAP = (96, 56, 56)
BATCHES = (16, 32, 64, 128)
LAYERS = ("blocks.2.project.0", "blocks.8.expand.0", "blocks.15.project.0")


def cosines(size: int, rank: int) -> Tensor:
    """First columns of the orthonormal DCT-II basis, `(B, r)`."""
    position, frequency = torch.arange(size, dtype=torch.float64) + 0.5, torch.arange(rank, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi / size * torch.outer(position, frequency))
    basis[:, 0] = size**-0.5
    return basis


def groups(size: int, rank: int) -> Tensor:
    """The basis that this package uses, `(B, r)`."""
    return group_rotation(size, rank, torch.float64, CPU).T[sample_groups(size, rank, CPU).long()]


def seconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each function, called in turn."""
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 2):
        for function, times in zip(functions, found, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[2:]) for times in found]


def speed(size: int, repeats: int) -> float:
    """How many times as long the product takes as the sums and their rotation."""
    rank = compact_batch_rank(size)
    values = torch.randn(size, *MAP)
    basis = cosines(size, rank).float().T.contiguous()
    labels, rotation = (
        sample_groups(size, rank, CPU)[torch.randperm(size)],
        group_rotation(size, rank, values.dtype, CPU),
    )

    def product() -> Tensor:
        return basis @ values.view(size, -1)

    def sums() -> Tensor:
        return rotation @ group_sums(values, labels, rank).view(rank, -1)

    times = seconds([product, sums], repeats)
    return times[0] / times[1]


def captured(model: nn.Module, name: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a pointwise convolution, `(B, channels, positions)` in float64."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        found.extend([inputs[0].detach(), output])

    hook = model.get_submodule(name).register_forward_hook(keep)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    hook.remove()
    assert found[1].grad is not None
    return found[0].flatten(2).double(), found[1].grad.flatten(2).double()


def noise(input: Tensor, grad: Tensor, basis: Tensor, orders: Sequence[Tensor]) -> float:
    """Relative error of the estimated weight gradient, root mean square over orders of the samples."""
    exact = torch.einsum("bol,bcl->oc", grad, input)
    weights = torch.full((basis.shape[1],), contrast_scale(*basis.shape), dtype=torch.float64)
    weights[0] = 1.0
    squares = []
    for order in orders:
        rows = basis[order]
        projected = torch.einsum("br,bcl->rcl", rows, input), torch.einsum("br,bol->rol", rows * weights, grad)
        estimate = torch.einsum("rol,rcl->oc", projected[1], projected[0])
        squares.append(float((estimate - exact).square().sum() / exact.square().sum()))
    return math.sqrt(statistics.fmean(squares))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--orders", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    times = {size: speed(size, options.repeats) for size in BATCHES}
    rows = [[str(size), f"{ratio:.1f}"] for size, ratio in times.items()]
    show("A map of 96 x 56 x 56", [["batch", "product / sums"], *rows])
    model, batches = network()
    size = len(batches[0][1])
    rank = compact_batch_rank(size)
    errors = {}
    for name in LAYERS:
        pair = captured(model, name, batches[0])
        orders = [torch.randperm(size) for _ in range(options.orders)]
        errors[name] = [noise(*pair, basis(size, rank), orders) for basis in (cosines, groups)]
    header = ["layer", "noise, cosines", "noise, groups"]
    rows = [[name, *[f"{error:.2f}" for error in pair]] for name, pair in errors.items()]
    show(f"Batch {size}, rank {rank}, one step", [header, *rows])
    if options.json is not None:
        options.json.write_text(json.dumps({"speed": times, "noise": errors}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
