"""How long a training step takes, next to plain training in the same process.

    python -m examples.benchmarks.speed                                     # the usual cases
    python -m examples.benchmarks.speed --cases resnet18/every-all/b32/train --methods default
    python -m examples.benchmarks.speed --format contiguous                 # channels last is the default
    python -m examples.benchmarks.speed --quick                             # a small case, to try it out

Two copies of the network take steps (forward, backward, SGD) in turn on the same batches: one trains plainly, one with
the method. The ratio is the median over these pairs, once of elapsed time and once of processor time of the process,
which other programs on the machine disturb less. Only the ratios mean anything.

Calibration is given in plain steps, without its own forward passes: what the statistics and the eigenvectors cost. So
is a refresh, whose statistics come from ordinary steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.benchmarks.cases import Case, select
from examples.benchmarks.memory import RESULTS, write
from examples.benchmarks.table import show
from examples.benchmarks.training_methods import METHODS, TITLES, Lance, Method, find

CALIBRATION_BATCHES = 4
LEARNING_RATE = 0.01
DIFFERENT_BATCHES = 4

CASES = [
    "resnet18/every-all/b32/train",
    "mobilenet_v2/every-all/b32/train",
    "vit_tiny/every-all/b32",
    "swin_t/every-all/b16",
    "resnet18/conv-4/b32/eval",
    "resnet18/conv-all/b32/eval",
    "mobilenet_v2/pointwise-4/b32/eval",
    "efficientnet_lite0/pointwise-4/b64/112px/eval",
    "deit_tiny/linear-4/b32",
    "deit_tiny/linear-all/b32",
]


@dataclass
class Row:
    """One case with one method; ratios to plain training.

    Attributes:
        case: name of the case.
        method: name of the method.
        ratio: of elapsed time per step, median over pairs.
        quartiles: of the same.
        processor_ratio: of processor time per step, median over pairs.
        forward_ratio: of processor time of the forward passes.
        backward_ratio: of processor time of the backward passes.
        calibration_steps: processor time of calibration beyond its forward passes, in plain steps.
        refresh_steps: processor time that a refresh of the subspaces adds, in plain steps.
        plain_seconds: elapsed time of a plain step on this machine, median.
        pairs: number of pairs.
    """

    case: str
    method: str
    ratio: float
    quartiles: tuple[float, float]
    processor_ratio: float
    forward_ratio: float
    backward_ratio: float
    calibration_steps: float | None
    refresh_steps: float | None
    plain_seconds: float
    pairs: int


@dataclass(frozen=True)
class Clock:
    """Elapsed and processor seconds."""

    elapsed: float
    processor: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.elapsed - other.elapsed, self.processor - other.processor)


class Trainer:
    """Takes timed steps with one network."""

    def __init__(self, method: Method, model: nn.Module, case: Case) -> None:
        self.method, self.model, self.case = method, model, case
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Clock, Clock, Clock]:
        """Time of the whole step, of its forward and of its backward pass."""
        start = Clock.now()
        self.optimizer.zero_grad()
        loss = self.method.loss(self.case, self.model, batch)
        middle = Clock.now()
        loss.backward()
        end = Clock.now()
        self.optimizer.step()
        return Clock.now() - start, middle - start, end - middle


def seconds(function: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def refresh_seconds(method: Lance, ours: Trainer, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Processor time of a refresh: what observing adds to the forward pass of each step, and the new subspaces."""
    session = method.session

    def passes() -> list[float]:
        chosen = [batches[index % len(batches)] for index in range(session.config.batches)]
        return [seconds(lambda batch=batch: method.loss(ours.case, ours.model, batch)) for batch in chosen]  # type: ignore[misc]

    alone = passes()
    session.observe()
    added = [observed - before for observed, before in zip(passes(), alone, strict=True)]
    return statistics.median(added) * len(added) + seconds(session.refresh)


def measure(case: Case, name: str, pairs: int, contiguous: bool = False) -> Row:
    """One case with one method."""
    method = METHODS[name]()
    model = case.build()
    plain = Trainer(Method(), copy.deepcopy(model), case)
    method.install(model, case)
    beyond = None
    if method.calibrates:
        batches = case.batches(CALIBRATION_BATCHES, 100, contiguous)
        passes = [lambda batch=batch: case.loss(model, batch) for batch in batches]
        with torch.no_grad():
            passes[0]()  # the first pass sets up the kernels
            forward = sum(map(seconds, passes))
        beyond = seconds(lambda: method.calibrate(passes)) - forward
        del batches, passes
    ours = Trainer(method, model, case)
    batches = case.batches(min(DIFFERENT_BATCHES, pairs), contiguous=contiguous)
    for trainer in (plain, ours):
        trainer.step(batches[0])
    refreshes = isinstance(method, Lance) and method.calibrates and bool(method.session.layers)
    refresh = refresh_seconds(method, ours, batches) if refreshes else None
    found = []
    for index in range(pairs):
        batch = batches[index % len(batches)]
        if index % 2:  # whichever goes second finds warmer caches
            second = ours.step(batch)
            found.append((plain.step(batch), second))
        else:
            found.append((plain.step(batch), ours.step(batch)))
    ratios = [after[0].elapsed / before[0].elapsed for before, after in found]

    def processor(part: int) -> float:
        return statistics.median(after[part].processor / before[part].processor for before, after in found)

    low, middle, high = statistics.quantiles(ratios, n=4)
    plain_step = statistics.median(before[0].processor for before, _ in found)
    return Row(
        case.name,
        name,
        middle,
        (low, high),
        processor(0),
        processor(1),
        processor(2),
        None if beyond is None else beyond / plain_step,
        None if refresh is None else refresh / plain_step,
        statistics.median(before[0].elapsed for before, _ in found),
        pairs,
    )


HEADER = ["method", "step", "quartiles", "processor", "forward", "backward", "calibration", "refresh"]
NOTE = "Ratios to plain training; calibration, beyond its forward passes, and refresh in plain steps."


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a method, for the rows of one case."""
    return [
        HEADER,
        *(
            [
                TITLES[row.method],
                f"{row.ratio:.3f}",
                f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}",
                *(f"{value:.3f}" for value in (row.processor_ratio, row.forward_ratio, row.backward_ratio)),
                *("" if n is None else f"{n:.2f}" for n in (row.calibration_steps, row.refresh_steps)),
            ]
            for row in rows
        ),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [name for name in METHODS if name != "plain"]
    result = argparse.ArgumentParser(description="Step time next to plain training.")
    result.add_argument("--cases", nargs="+", default=CASES, help="names or patterns, or all")
    result.add_argument("--methods", default=",".join(names), help=f"comma-separated, from {', '.join(names)}")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--pairs", type=int, default=12, help="steps of each copy")
    result.add_argument(
        "--format", choices=["channels-last", "contiguous"], default="channels-last", help="memory format of the images"
    )
    result.add_argument("--quick", action="store_true", help="one small case, few steps")
    result.add_argument("--json", type=Path, default=RESULTS / "speed.json")
    return result


QUICK = ["resnet18/conv-all/b4/64px/eval"]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Entry point."""
    options = parser().parse_args(arguments)
    if options.quick:
        options.cases, options.methods, options.pairs = QUICK, "default", 4
    methods = find(options.methods.split(","))
    torch.set_num_threads(options.threads)
    rows = []
    for case in select(options.cases):
        found = []
        for name in methods:
            print(f"{case.name}  {name}", file=sys.stderr, flush=True)
            found.append(measure(case, name, options.pairs, options.format == "contiguous"))
        show(f"{case.name}, {options.format}", table(found), NOTE)
        rows += found
        if not options.quick:
            write(options.json, rows, {"threads": options.threads, "format": options.format})
    return rows


if __name__ == "__main__":
    main()
