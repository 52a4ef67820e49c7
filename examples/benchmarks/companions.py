"""What each companion keeps for the backward pass, how close its gradient is, and what it costs.

    python -m examples.benchmarks.companions                 # one layer after the other, then whole networks
    python -m examples.benchmarks.companions --only layers

Layers get inputs that spread as activations do; bytes are per element of the input. The cosine is that of the gradient
with respect to the input, and to the weight where there is one. Time is processor time of forward and backward
pass together, as the median ratio of pairs that alternate with the stock layer.

Networks run with companions only, nothing else compressed and everything trained, batch-norm layers in training mode:
the first column is what they keep at all, and the cosine is over all parameters, in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.benchmarks.cases import deit_tiny, resnet18
from examples.benchmarks.table import show, size, times
from examples.data.photographs import photograph_batch
from examples.models.efficientnet_lite0 import efficientnet_lite0
from lightning_lance import measure_saved_bytes
from lightning_lance.compression.functional import compact_functional

RESULTS = Path(__file__).resolve().parent / "results" / "companions.json"
IMAGE = (16, 64, 56, 56)
TOKENS = (16, 197, 192)
HEADS = (16, 3, 197, 64)
Forward = Callable[[Tensor], Tensor]


@dataclass
class LayerRow:
    """One companion.

    Attributes:
        layer: name of the stock layer.
        exact: whether the gradient is bit for bit the stock one.
        stock_bytes: kept per element by the stock layer.
        bytes: kept per element by the companion.
        input_cosine: of the input gradient to the stock one.
        weight_cosine: of the weight gradient.
        time_ratio: of processor time to the stock layer.
    """

    layer: str
    exact: bool
    stock_bytes: float
    bytes: float
    input_cosine: float
    weight_cosine: float | None
    time_ratio: float


@dataclass
class NetworkRow:
    """One network with companions.

    Attributes:
        network: name.
        companions: ``"exact"`` or ``"approximate"``.
        stock_bytes: kept without them.
        bytes: kept with them.
        cosine: of the gradient of all parameters to the stock one.
        worst_cosine: of the worst weight of a convolution or linear layer.
    """

    network: str
    companions: str
    stock_bytes: int
    bytes: int
    cosine: float
    worst_cosine: float


def _norm(module: Any, spread: bool = True) -> Any:
    if spread and module.weight is not None:
        nn.init.uniform_(module.weight, 0.5, 1.5)
    return module


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _attention(x: Tensor) -> Tensor:
    query, key, value = x.unbind(1)
    return F.scaled_dot_product_attention(query, key, value)


def layers() -> dict[str, tuple[Forward, tuple[int, ...], bool]]:
    """Name -> layer, shape of its input, whether its companion is exact."""
    return {
        "ReLU": (nn.ReLU(), IMAGE, True),
        "ReLU6": (nn.ReLU6(), IMAGE, True),
        "Hardtanh": (nn.Hardtanh(), IMAGE, True),
        "LeakyReLU": (nn.LeakyReLU(), IMAGE, True),
        "Hardsigmoid": (nn.Hardsigmoid(), IMAGE, True),
        "Dropout": (nn.Dropout(0.1), IMAGE, True),
        "MaxPool2d(3, 2, 1)": (nn.MaxPool2d(3, 2, 1), IMAGE, True),
        "MaxPool2d(2)": (nn.MaxPool2d(2), IMAGE, True),
        "AvgPool2d(2)": (nn.AvgPool2d(2), IMAGE, True),
        "AdaptiveAvgPool2d(7)": (nn.AdaptiveAvgPool2d(7), IMAGE, True),
        "BatchNorm2d, eval, frozen": (_frozen(_norm(nn.BatchNorm2d(64))), IMAGE, True),
        "BatchNorm2d, eval, weight trains": (_norm(nn.BatchNorm2d(64)).eval(), IMAGE, False),
        "BatchNorm2d, training": (_norm(nn.BatchNorm2d(64)), IMAGE, False),
        "GroupNorm(8)": (_norm(nn.GroupNorm(8, 64)), IMAGE, False),
        "LayerNorm": (_norm(nn.LayerNorm(192)), TOKENS, False),
        "GELU": (nn.GELU(), TOKENS, False),
        "SiLU": (nn.SiLU(), IMAGE, False),
        "Mish": (nn.Mish(), IMAGE, False),
        "Hardswish": (nn.Hardswish(), IMAGE, False),
        "Sigmoid": (nn.Sigmoid(), IMAGE, False),
        "Tanh": (nn.Tanh(), IMAGE, False),
        "scaled_dot_product_attention": (_attention, (HEADS[0], 3, *HEADS[1:]), False),
    }


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    a, b = (torch.cat([tensor.double().flatten() for tensor in side]) for side in (left, right))
    return float(a @ b / (a.norm() * b.norm()))


def _spread(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers with a scale and an offset of their own in every channel."""
    generator = torch.Generator().manual_seed(seed)
    axis = 1 if len(shape) == 4 else -1
    channels = [1] * len(shape)
    channels[axis] = shape[axis]
    scale = torch.rand(channels, generator=generator) + 0.75
    offset = torch.randn(channels, generator=generator) * 0.5
    return torch.randn(shape, generator=generator) * scale + offset


def measure_layer(name: str, forward: Forward, shape: tuple[int, ...], exact: bool, pairs: int) -> LayerRow:
    """Bytes, cosines and time of one companion next to its stock layer."""
    x = _spread(shape, 0).requires_grad_()
    module = forward if isinstance(forward, nn.Module) else nn.Module()
    weight = getattr(module, "weight", None)
    wanted = [x, weight] if weight is not None and weight.requires_grad else [x]

    def ours(x: Tensor) -> Tensor:
        with compact_functional(approximate=not exact):
            return forward(x)

    def kept(run: Forward) -> float:
        return measure_saved_bytes(lambda: run(x + 0), module).total / x.numel()

    def step(run: Forward, grad: Tensor | None) -> tuple[float, Tensor, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        start = time.process_time()
        output = run(x)
        grads = torch.autograd.grad(output, wanted, torch.ones_like(output) if grad is None else grad)
        return time.process_time() - start, output.detach(), grads

    grad = torch.randn(step(forward, None)[1].shape, generator=torch.Generator().manual_seed(1))
    ratios = []
    for _ in range(pairs):
        (stock_time, output, expected), (our_time, found_output, found) = step(forward, grad), step(ours, grad)
        ratios.append(our_time / max(stock_time, 1e-9))
    assert torch.equal(output, found_output), f"{name}: another output"
    if exact:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{name}: another gradient"
    return LayerRow(
        name,
        exact,
        kept(forward),
        kept(ours),
        _cosine(found[:1], expected[:1]),
        _cosine(found[1:], expected[1:]) if len(found) > 1 else None,
        statistics.median(ratios),
    )


def networks() -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """Name -> network, batch size, image size."""
    return {
        "EfficientNet-Lite0, ImageNet weights": (lambda: efficientnet_lite0(pretrained=True, drop_rate=0.0), 16, 112),
        "ResNet-18, random weights": (resnet18, 16, 112),
        "DeiT-Tiny, random weights": (deit_tiny, 8, 224),
    }


def measure_network(name: str, make: Callable[[], nn.Module], batch: int, pixels: int) -> list[NetworkRow]:
    """Bytes and cosines of a whole network in training mode with exact, then with approximate companions."""
    torch.manual_seed(0)
    model = make().train().requires_grad_(True)
    images, labels = photograph_batch(batch, pixels, seed=0)
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1]

    def gradients(approximate: bool | None) -> tuple[dict[str, Tensor], int]:
        twin = copy.deepcopy(model)

        def loss() -> Tensor:
            if approximate is None:
                return F.cross_entropy(twin(images), labels)
            with compact_functional(approximate):
                return F.cross_entropy(twin(images), labels)

        loss().backward()
        found = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return found, measure_saved_bytes(loss, twin).total

    expected, before = gradients(None)
    rows = []
    for approximate in (False, True):
        found, after = gradients(approximate)
        worst = min(_cosine([found[n]], [expected[n]]) for n in matrices)
        total = _cosine([found[n] for n in expected], list(expected.values()))
        rows.append(NetworkRow(name, "approximate" if approximate else "exact", before, after, total, worst))
    return rows


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(prog="companions", description=(__doc__ or "").partition("\n")[0])
    result.add_argument("--only", choices=("layers", "networks"), help="one of the two tables")
    result.add_argument("--pairs", type=int, default=15, help="timed pairs of passes per layer")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--json", type=Path, default=RESULTS)
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Entry point."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, list[Any]] = {}
    if options.only != "networks":
        found["layers"] = [measure_layer(name, *layer, options.pairs) for name, layer in layers().items()]
        show_layers(found["layers"])
    if options.only != "layers":
        found["networks"] = [row for name, entry in networks().items() for row in measure_network(name, *entry)]
        show_networks(found["networks"])
    stored = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    stored |= {"torch": torch.__version__} | {key: [asdict(row) for row in rows] for key, rows in found.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return found


def show_layers(rows: Sequence[LayerRow]) -> None:
    """Print the first table."""
    cells = [["layer", "stock keeps", "companion keeps", "times less", "cosine, input", "cosine, weight", "time"]]
    for row in rows:
        less = f"{row.stock_bytes / row.bytes:.1f}" if row.bytes else "all"
        weight = "" if row.weight_cosine is None else "equal" if row.exact else f"{row.weight_cosine:.5f}"
        close = "equal" if row.exact else f"{row.input_cosine:.5f}"
        kept = [f"{row.stock_bytes:.2f} B", f"{row.bytes:.3f} B"]
        cells.append([row.layer, *kept, less, close, weight, f"{row.time_ratio:.2f}"])
    show("Companions, bytes per element of the input", cells)


def show_networks(rows: Sequence[NetworkRow]) -> None:
    """Print the second table."""
    cells = [["network", "companions", "stock keeps", "kept", "less", "cosine", "worst weight"]]
    for row in rows:
        kept = [size(row.stock_bytes), size(row.bytes), times(row.stock_bytes, row.bytes)]
        cells.append([row.network, row.companions, *kept, f"{row.cosine:.5f}", f"{row.worst_cosine:.5f}"])
    show("Companions alone in a network that trains as a whole", cells)


if __name__ == "__main__":
    main()
