"""Memory and time of training on an accelerator, and its operators against those of the CPU: one command, one table.

    python -m examples.benchmarks.accelerator                      # on a GPU, 8 minutes by estimate
    python -m examples.benchmarks.accelerator --device cpu --tiny  # small networks, to try it out

"Kept" is what the device's allocator holds more after a forward pass than before it, "peak" the most that it held in a
step above the network alone, "step" the median by the events of the device, after warming up. On the CPU, where there
are none of these, kept is what the hooks count, peak that of the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.benchmarks import memory
from examples.benchmarks.memory import RESULTS
from examples.benchmarks.table import show, size, times
from examples.benchmarks.ways import WAYS, Training, find
from examples.benchmarks.workloads import LARGE, WORKLOADS, Batch, Workload
from lightning_lance import LanceConfig, LanceSession

METHODS = ("plain", "checkpointing", "bf16", "default", "two-bits")
TINY = {
    "resnet18": WORKLOADS["resnet18"].scaled(4, 32),
    "vit_tiny": WORKLOADS["vit_tiny"].scaled(4, 32),
    "text": WORKLOADS["text"].scaled(2, 32),
}
WARM_STEPS = 2


@dataclass
class Row:
    """One network with one method; bytes and seconds.

    Attributes:
        network: key of the workloads.
        method: key of `WAYS`.
        kept: after the forward pass.
        peak: of a step, above the network.
        seconds: of a step.
        cosine: of the gradient of one batch to that of plain training on the same device.
        error: why there are no numbers.
    """

    network: str
    method: str
    kept: int | None = None
    peak: int | None = None
    seconds: float | None = None
    cosine: float | None = None
    error: str | None = None


class Meter:
    """Memory and time of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def reset(self) -> int:
        """Begin to measure a peak; bytes in use now."""
        if not self.cuda:
            return memory.reset_peak()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Most bytes in use since then."""
        if not self.cuda:
            return memory.peak()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def seconds(self, function: Callable[[], object]) -> float:
        """How long a call takes on the device."""
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(name: str, method: str, workload: Workload, batches: Sequence[Batch], meter: Meter, steps: int) -> Row:
    """One row."""
    row, way = Row(name, method), WAYS[method]
    training = Training(workload, way, meter.device)
    training.warm(batches[0])
    idle = meter.reset()
    training.install()
    for index in range(way.settling + WARM_STEPS):
        training.step(batches[index % 2])
    row.kept = _kept(training, batches[0], meter)
    meter.reset()
    row.seconds = statistics.median(meter.seconds(lambda i=i: training.step(batches[i % 2])) for i in range(steps))  # type: ignore[misc]
    row.peak = meter.peak() - idle
    row.cosine = training.cosine(batches[0])
    return row


def _kept(training: Training, batch: Batch, meter: Meter) -> int:
    training.forget()
    if not meter.cuda:
        return training.kept(batch)
    before = meter.reset()
    with training.around():
        found = training.loss(batch)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    found.backward()
    training.forget()
    return after - before


HEADER = ["method", "kept", "less", "peak", "of plain's", "step, ms", "of plain's", "cosine"]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a method, for the rows of one network, plain training among them."""
    plain = next((row for row in rows if row.method == "plain"), Row("", ""))
    lines = [HEADER]
    for row in rows:
        line = [WAYS[row.method].title]
        if row.peak is None or row.seconds is None or row.cosine is None:
            lines.append([*line, row.error or "", *[""] * (len(HEADER) - 2)])
            continue
        peak = f"{row.peak / plain.peak:.0%}" if plain.peak else ""
        step = f"{row.seconds / plain.seconds:.2f}" if plain.seconds else ""
        line += [size(row.kept), times(plain.kept, row.kept), size(row.peak), peak]
        lines.append([*line, f"{row.seconds * 1e3:.1f}", step, f"{row.cosine:.4f}"])
    return lines


# Operators against those of the CPU -----------------------------------------------------------------------------------


class Call(nn.Module):
    """A function of one tensor as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def attention(x: Tensor) -> Tensor:
    """Of four heads, to the neighbours."""
    heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads.roll(1, 2), heads.roll(2, 2))


MAPS, ROWS = (8, 16, 12, 12), (8, 24, 32)

# What is rounded, kept in part, or kept in another form: name -> shape of the input, and what makes the network.
OPERATORS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "relu": (MAPS, nn.ReLU),
    "relu6": (MAPS, nn.ReLU6),
    "hardtanh": (MAPS, lambda: nn.Hardtanh(-0.5, 0.25)),
    "leaky_relu": (MAPS, nn.LeakyReLU),
    "hardsigmoid": (MAPS, nn.Hardsigmoid),
    "silu": (MAPS, nn.SiLU),
    "gelu": (ROWS, nn.GELU),
    "softmax": (ROWS, lambda: nn.Softmax(-1)),
    "log_softmax": (ROWS, lambda: nn.LogSoftmax(-1)),
    "max_pool2d": (MAPS, lambda: nn.MaxPool2d(3, 2, 1)),
    "max_pool1d": ((8, 16, 40), lambda: nn.MaxPool1d(2)),
    "avg_pool2d": (MAPS, lambda: nn.AvgPool2d(2)),
    "adaptive_avg_pool2d": (MAPS, lambda: nn.AdaptiveAvgPool2d(3)),
    "adaptive_max_pool2d": (MAPS, lambda: nn.AdaptiveMaxPool2d(3)),
    "reflect pad": (MAPS, lambda: nn.ReflectionPad2d(1)),
    "product": (MAPS, lambda: Call(lambda x: x * x.roll(1, 0))),
    "gate": (MAPS, lambda: Call(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid())),
    "matmul": (ROWS, lambda: Call(lambda x: x @ x.transpose(1, 2))),
    "attention": (ROWS, lambda: Call(attention)),
    "linear": (ROWS, lambda: nn.Linear(32, 48)),
    "conv1d": ((8, 16, 40), lambda: nn.Conv1d(16, 24, 3)),
    "conv2d": (MAPS, lambda: nn.Conv2d(16, 24, 3, 2, 1)),
    "conv2d, groups": (MAPS, lambda: nn.Conv2d(16, 32, 3, groups=4, padding="same")),
    "conv2d, 1x1": (MAPS, lambda: nn.Conv2d(16, 24, 1)),
    "conv3d": ((4, 4, 6, 8, 8), lambda: nn.Conv3d(4, 8, 3)),
    "conv_transpose2d": (MAPS, lambda: nn.ConvTranspose2d(16, 8, 2, 2)),
    "batch_norm": (MAPS, lambda: nn.BatchNorm2d(16)),
    "batch_norm, eval": (MAPS, lambda: nn.BatchNorm2d(16).eval().requires_grad_(False)),
    "group_norm": (MAPS, lambda: nn.GroupNorm(4, 16)),
    "layer_norm": (ROWS, lambda: nn.LayerNorm(32)),
}
PROJECTED = ("linear", "conv1d", "conv2d", "conv2d, groups", "conv2d, 1x1", "conv3d")
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"bits": None},
    "4 bits": {},
    "2 bits": {"bits": 2},
    "projected": {"rank": 0.9, "bits": None, "calibration_batches": 1},
    "projected, 4 bits": {"rank": {"batch": 4, "spatial": "full"}, "calibration_batches": 1},
}
EXACT = 2e-4  # relative difference that another order of summation makes in float32


def gradients(name: str, options: dict[str, Any] | None, device: torch.device) -> Tensor:
    """Gradients of input and parameters of an operator, flat, on the CPU; plainly without options."""
    shape, make = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(device)
    # Without a plain axis, spectra of different devices would be the same up to rotations of it.
    scale = torch.linspace(0.2, 2.0, shape[-1])
    x = (torch.randn(shape, generator=generator) * scale).to(device).requires_grad_()
    session = None
    if options is not None:
        session = LanceSession(model, LanceConfig(**options))
        session.start()
    for _ in range(2 if options is not None and "rank" in options else 1):  # the first defines the subspaces
        model.zero_grad()
        x.grad = None
        inner = x.clone()  # saved by no name that the caller holds
        with nullcontext() if session is None else session.step():
            output = model(inner)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device))
    if session is not None:
        session.stop()
    found = [tensor.grad for tensor in (x, *model.parameters()) if tensor.grad is not None]
    return torch.cat([grad.detach().flatten().cpu() for grad in found])


def difference(one: Tensor, other: Tensor) -> float:
    """Of two gradients, relative to the second."""
    return float((one - other).double().norm() / other.double().norm())


@dataclass
class Agreement:
    """One operator with one setting.

    Attributes:
        operator: key of `OPERATORS`.
        setting: key of `SETTINGS`.
        device: relative difference of the device's gradient to the plain one of the CPU.
        cpu: that of the CPU's own gradient with the setting.
        between: of the two.
    """

    operator: str
    setting: str
    device: float
    cpu: float
    between: float

    @property
    def holds(self) -> bool:
        """Equal; or, where kernels round in other ways, as near to plain training as on the CPU."""
        return self.between < EXACT or ("bits" in self.setting and self.device < 1.25 * self.cpu + EXACT)


def agreements(device: torch.device) -> list[Agreement]:
    """Every operator with every setting that concerns it."""
    cpu, found = torch.device("cpu"), []
    for name in OPERATORS:
        plain = gradients(name, None, cpu)
        for setting, options in SETTINGS.items():
            if "rank" in options and name not in PROJECTED:
                continue
            own, other = gradients(name, options, device), gradients(name, options, cpu)
            found.append(
                Agreement(name, setting, difference(own, plain), difference(other, plain), difference(own, other))
            )
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Memory, time and correctness on an accelerator.")
    result.add_argument("--device", default="cuda")
    result.add_argument("--networks", nargs="+", help="default: all")
    result.add_argument("--methods", nargs="+", default=list(METHODS), help=f"from {', '.join(WAYS)}")
    result.add_argument("--steps", type=int, default=8, help="timed steps")
    result.add_argument("--tiny", action="store_true", help="small networks")
    result.add_argument("--json", type=Path, default=RESULTS / "accelerator.json")
    return result


def main(arguments: Sequence[str] | None = None) -> tuple[list[Row], list[Agreement]]:
    """Entry point."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    meter = Meter(device)
    # Sums of products in full precision, as on the CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    workloads = TINY if options.tiny else LARGE
    methods = find(options.methods, WAYS, "methods")
    card = torch.cuda.get_device_name(device) if meter.cuda else device.type
    checked = agreements(device)
    wrong = [found for found in checked if not found.holds]
    lines = [[f.operator, f.setting, f"{f.device:.1e}", f"{f.cpu:.1e}", f"{f.between:.1e}"] for f in wrong]
    title = f"{card}: {len(checked) - len(wrong)} of {len(checked)} gradients are those of the CPU"
    show(title, [["operator", "setting", "to plain", "the CPU's to plain", "between"], *lines])
    rows: list[Row] = []
    for name in find(options.networks or list(workloads), workloads, "networks"):
        workload, found = workloads[name], []
        batches = [(inputs.to(device), labels.to(device)) for inputs, labels in workload.batches(2)]
        for method in methods:
            print(f"{name}  {method}", file=sys.stderr, flush=True)
            try:
                found.append(measure(name, method, workload, batches, meter, options.steps))
            except RuntimeError as error:  # out of memory, or an operator that the device lacks
                found.append(Row(name, method, error=str(error).splitlines()[0][:200]))
            gc.collect()
            if meter.cuda:
                torch.cuda.empty_cache()
        show(f"{workload.label}, {card}", table(found))
        rows += found
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": card,
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
        "operators": [asdict(found) | {"holds": found.holds} for found in checked],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return rows, checked


if __name__ == "__main__":
    _, operators = main()
    sys.exit(0 if all(found.holds for found in operators) else 1)
