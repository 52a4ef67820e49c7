"""What training keeps in memory: bytes that autograd holds, by count and by formula, and the peak of the process.

    python -m examples.benchmarks.memory                                    # the usual cases
    python -m examples.benchmarks.memory --cases 'resnet18/*/b32/*' --methods plain,default
    python -m examples.benchmarks.memory --cases all                        # hours
    python -m examples.benchmarks.memory --quick                            # a small case, to try it out
    python -m examples.benchmarks.memory --write docs/memory.md             # all rows measured so far, as a document

Every method runs in a process of its own. "Above idle" is the peak of resident memory during calibration and a few
training steps (forward, backward, SGD) minus what was resident once the model and the inputs were there. It includes
gradients, what the optimiser allocates, and scratch memory of the kernels, for all methods alike.

Freed memory goes back to the system at once, for all methods (docs/allocators.md); `--allocator stock` measures what a
process does unasked.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmarks.cases import HEADLINE, NETWORKS, Case, select
from examples.benchmarks.table import show, size, times
from examples.benchmarks.training_methods import METHODS, TITLES, Method, find
from lightning_lance import freed_memory

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
CALIBRATION_BATCHES = 4
LEARNING_RATE = 0.01

ALLOCATORS: dict[str, Callable[[], AbstractContextManager[None]]] = {"returned": freed_memory, "stock": nullcontext}


@dataclass
class Row:
    """One case with one method; bytes.

    Attributes:
        case: name of the case.
        method: name of the method.
        kept: what autograd keeps for one training step, measured.
        formula: what is kept of the trained layers' inputs, by formula; `None` where no formula applies.
        peak: peak of the process above the idle model, over calibration and training steps.
        peak_calibration: that of calibration alone.
        peak_steps: that of the training steps alone.
        cosine: cosine of the gradient of all trained parameters to that of plain training, mean over batches.
        cosine_mean: the same for the mean gradient of several passes over one batch, which shows the bias alone.
        allocator: key of `ALLOCATORS`.
        error: what went wrong, instead of numbers.
    """

    case: str
    method: str
    allocator: str
    kept: int | None = None
    formula: int | None = None
    peak: int | None = None
    peak_calibration: int | None = None
    peak_steps: int | None = None
    cosine: float | None = None
    cosine_mean: float | None = None
    error: str | None = None


def reset_peak() -> int:
    """Start to measure anew; returns what is resident now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator has kept is not the model's
    with contextlib.suppress(OSError):  # not Linux: the peak so far is the baseline
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """The most that was resident at once since `reset_peak`, where the system can tell, else ever."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(method: Method, model: nn.Module, case: Case, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One SGD step on each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for batch in batches:
        optimizer.zero_grad()
        method.loss(case, model, batch).backward()
        optimizer.step()


def gradient(method: Method, model: nn.Module, case: Case, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Gradient of all trained parameters, flat. Dropout draws the same mask every time."""
    torch.manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(method.loss(case, model, batch), trained)])


def cosines(
    method: Method, model: nn.Module, case: Case, batches: Sequence[tuple[Tensor, Tensor]], passes: int
) -> tuple[float, float]:
    """Cosine to plain training: mean over batches, and that of the mean gradient of one batch over several passes."""
    plain = case.build()
    with torch.no_grad():  # both at the initial weights; the method may have put the modules into others
        for own, initial in zip(_tensors(model), _tensors(plain), strict=True):
            own.copy_(initial)
    found = []
    expected = torch.empty(0)
    for batch in batches:
        expected = gradient(Method(), plain, case, batch)
        found.append(cosine(gradient(method, model, case, batch), expected))
    total = torch.zeros_like(expected)
    for _ in range(passes):
        total += gradient(method, model, case, batches[-1])
    return statistics.fmean(found), cosine(total, expected)


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two vectors; in float32, ten million terms are good for two digits."""
    one, other = one.double(), other.double()
    return float(one @ other / (one.norm() * other.norm()))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def measure(case: Case, name: str, steps: int, passes: int, allocator: str = "stock") -> Row:
    """One case with one method, in this process."""
    row = Row(case.name, name, allocator)
    method = METHODS[name]()
    model = case.build()
    calibration = case.batches(CALIBRATION_BATCHES if method.calibrates else 0, first=100)
    batches = case.batches(steps)
    method.install(model, case)
    idle = reset_peak()
    if method.calibrates:
        method.calibrate([lambda batch=batch: case.loss(model, batch) for batch in calibration])
    row.peak_calibration = peak() - idle
    reset_peak()
    train(method, model, case, batches)
    row.peak_steps = peak() - idle
    row.peak = max(row.peak_calibration, row.peak_steps)

    def run() -> Tensor:
        return method.loss(case, model, batches[0])

    model.zero_grad()
    row.kept = method.kept_bytes(run, model)
    row.formula = method.formula_bytes(run, model, case)
    row.cosine, row.cosine_mean = cosines(method, model, case, batches, passes)
    return row


def in_own_process(case: Case, name: str, options: argparse.Namespace) -> Row:
    """One row, measured in a process of its own."""
    command = [sys.executable, "-m", "examples.benchmarks.memory", "--worker", "--cases", case.name, "--methods", name]
    command += ["--threads", str(options.threads), "--steps", str(options.steps), "--passes", str(options.passes)]
    command += ["--allocator", options.allocator]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that wait must not spin
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    return Row(case.name, name, options.allocator, error=reason[:300])


HEADER = ["method", "kept", "ratio", "formula", "peak", "of plain", "cosine", "of the mean"]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a method, for the rows of one case."""
    plain = next((row for row in rows if row.method == "plain"), Row("", "", ""))
    lines = [HEADER]
    for row in rows:
        line = [TITLES[row.method]]
        if row.error is not None:
            lines.append([*line, row.error, *[""] * (len(HEADER) - 2)])
            continue
        line += [size(row.kept), times(plain.kept, row.kept), size(row.formula), size(row.peak)]
        line.append("" if not plain.peak or row.peak is None else f"{row.peak / plain.peak:.0%}")
        line += ["" if cosine is None else f"{cosine:.4f}" for cosine in (row.cosine, row.cosine_mean)]
        lines.append(line)
    return lines


def write(path: Path, rows: Sequence[Any], settings: dict[str, Any]) -> None:
    """Write rows as JSON, in place of those that an earlier run wrote for the same case and method."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    if path.exists():
        new = {_key(asdict(row)) for row in rows}
        kept = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if _key(row) not in new]
    found = {"settings": {"torch": torch.__version__, **settings}, "rows": [*kept, *map(asdict, rows)]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["method"], row.get("allocator")


INTRODUCTION = """\
# Memory, case by case

Made by `python -m examples.benchmarks.memory --write docs/memory.md` from what runs of the same command with `--threads
1 --steps 2 --passes 1` have measured. A case names the network, kind and number of the layers that train, counted from
the end, the batch size, the size of the images where it is not 224 px, and the mode of the batch norms. *Kept* is what
autograd keeps for a training step, *by formula* what of it are the inputs of the trained layers, *peak* that of the
process above the idle model over calibration and training steps, *cosine* that of one batch's gradient to plain
training's. [benchmarks.md](benchmarks.md) says what to make of it.
"""


def document(rows: Sequence[Row]) -> str:
    """All rows as Markdown, in the order of the cases and methods."""
    lines = [INTRODUCTION]
    lines.append("| case | method | kept | ratio | by formula | peak | of plain's | cosine |")
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    order = {name: index for index, name in enumerate(METHODS)}
    for case in sorted({row.case for row in rows}, key=_rank):
        found = sorted((row for row in rows if row.case == case), key=lambda row: order[row.method])
        lines += [f"| {case} | {' | '.join(line[:-1])} |" for line in table(found)[1:]]
    return "\n".join(lines) + "\n"


def _rank(name: str) -> tuple[Any, ...]:
    case = Case.parse(name)
    kinds = (case.kind, case.last or math.inf)
    return list(NETWORKS).index(case.network), case.size, *kinds, case.norms, case.batch


def read(path: Path) -> list[Row]:
    """Rows of earlier runs."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Memory of training, method by method.")
    result.add_argument("--cases", nargs="+", default=HEADLINE, help="names or patterns, or all")
    result.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated, from {', '.join(METHODS)}")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--steps", type=int, default=3, help="training steps, and batches for the cosine")
    result.add_argument("--passes", type=int, default=8, help="passes over one batch for the mean gradient")
    result.add_argument("--allocator", choices=list(ALLOCATORS), default="returned")
    result.add_argument("--quick", action="store_true", help="one small case, two steps")
    result.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    result.add_argument("--write", type=Path, help="measure nothing, write the rows of --json as Markdown")
    result.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return result


QUICK = ["resnet18/conv-all/b4/64px/eval"]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Entry point."""
    options = parser().parse_args(arguments)
    if options.quick:
        options.cases, options.methods, options.steps, options.passes = QUICK, "plain,checkpointing,default", 2, 2
    if options.write:
        rows = read(options.json)
        options.write.write_text(document(rows), encoding="utf-8")
        return rows
    cases, methods = select(options.cases), find(options.methods.split(","))
    if options.worker:
        torch.set_num_threads(options.threads)
        with ALLOCATORS[options.allocator]():
            row = measure(cases[0], methods[0], options.steps, options.passes, options.allocator)
        print(json.dumps(asdict(row)))
        return []
    rows = []
    for case in cases:
        found = []
        for name in methods:
            print(f"{case.name}  {name}", file=sys.stderr, flush=True)
            found.append(in_own_process(case, name, options))
        show(case.name, table(found), f"allocator: {options.allocator}")
        rows += found
        if not options.quick:
            write(options.json, rows, {"threads": options.threads, "steps": options.steps})
    return rows


if __name__ == "__main__":
    main()
