"""How long a training step of LANCE takes on a stream, next to naive training in the same process.

    python -m examples.benchmarks.continual_speed --threads 1                 # every stream with its own network
    python -m examples.benchmarks.continual_speed --threads 1 --cases glyphs/alexnet
    python -m examples.benchmarks.continual_speed --cases rotated-digits --option reserved=0.95

A case is a stream of `recipes.py`, or one with another network of that file. LANCE trains one epoch of each experience,
and in each but the first, where nothing is protected yet, a copy of the network takes naive steps in turn with it, on
the same batches with plain SGD. The ratio is the median over these pairs. Only the ratios mean anything.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.memory import RESULTS
from examples.benchmarks.recipes import MODELS, RECIPES
from examples.benchmarks.table import show
from lightning_lance import LanceConfig, measure_saved_bytes
from lightning_lance.continual import ContinualConfig, ContinualSession

CALIBRATION_BATCHES = 8
CASES = [*(name for name, recipe in RECIPES.items() if not recipe.model.endswith("one-head")), "glyphs/alexnet"]

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Row:
    """One case.

    Attributes:
        case: its name.
        batch: samples of a step.
        naive_seconds: of a naive step, median.
        ratio: of the times of paired steps, median.
        quartiles: of the same.
        by_experience: median of each experience from the second on.
        kept_ratio: of the bytes that autograd keeps, mean over experiences.
    """

    case: str
    batch: int
    naive_seconds: float
    ratio: float
    quartiles: tuple[float, float]
    by_experience: list[float]
    kept_ratio: float


def measure(case: str, experiences: int, pairs: int, options: Mapping[str, Any], batch_size: int | None = None) -> Row:
    """Train on the first experiences of a stream, and time pairs of steps in each but the first.

    Args:
        case: `stream` or `stream/network`.
        experiences: how many of the stream's.
        pairs: of steps in each.
        options: of `LanceConfig` and `ContinualConfig`.
        batch_size: samples of a step, instead of the stream's own.
    """
    own = {field.name for field in fields(ContinualConfig)}
    compression = {name: value for name, value in options.items() if name not in own}
    protection = {name: value for name, value in options.items() if name in own}
    stream, _, network = case.partition("/")
    recipe = RECIPES[stream]
    size = batch_size or recipe.batch_size
    torch.manual_seed(0)
    model = MODELS[network or recipe.model]()
    session = ContinualSession(
        LanceConfig(**compression),
        ContinualConfig(**{"heads": ["classifier"], **protection}),
    )
    naive_times, ratios, by_experience, kept = [], [], [], []
    for index, experience in enumerate(islice(recipe.stream(0).train_stream, experiences)):
        classifier: Any = model.classifier
        classifier.adaptation(experience)
        batches = _batches(experience.dataset, size)
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr)
        naive = copy.deepcopy(model)
        naive_optimizer = torch.optim.SGD(naive.parameters(), recipe.lr)
        passes = [_forward(model, batch) for batch in batches[:CALIBRATION_BATCHES]]
        # As strategies do where heads are per task.
        session.begin_experience(model, passes, [optimizer], own=str(index))
        found = []
        for number, batch in enumerate(islice(cycle(batches), pairs + 2) if index else ()):
            before = _timed(naive, naive_optimizer, batch, nullcontext())
            after = _timed(model, optimizer, batch, session.step())
            if number >= 2:  # the first ones make what later ones reuse
                naive_times.append(before)
                found.append(after / before)
        for batch in batches:
            _step(model, optimizer, batch, session.step())
        if index:
            assert session.compression is not None
            report = session.compression.report
            assert report is not None
            assert report.compressed is not None
            plain = measure_saved_bytes(_loss(naive, batches[0]))
            kept.append(report.compressed.total / plain.total)
            by_experience.append(statistics.median(found))
            ratios += found
        session.end_experience(model, passes)
    lower, _, upper = statistics.quantiles(ratios, n=4)
    return Row(
        case,
        size,
        statistics.median(naive_times),
        statistics.median(ratios),
        (lower, upper),
        by_experience,
        statistics.fmean(kept),
    )


def _batches(dataset: Any, size: int) -> list[Batch]:
    images, labels, tasks = zip(*dataset, strict=True)
    stacked = torch.stack(images), torch.tensor(labels), torch.tensor(tasks)
    parts = torch.randperm(len(images)).split(size)
    return [(stacked[0][part], stacked[1][part], stacked[2][part]) for part in parts if len(part) == size]


def _forward(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    return lambda: model(batch[0], batch[2])


def _loss(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(batch[0], batch[2]), batch[1])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: AbstractContextManager[Any]) -> None:
    optimizer.zero_grad()
    with step:
        loss = _loss(model, batch)()
    loss.backward()
    optimizer.step()


def _timed(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: AbstractContextManager[Any]
) -> float:
    began = time.perf_counter()
    _step(model, optimizer, batch, step)
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help="streams, or STREAM/NETWORK")
    parser.add_argument("--experiences", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs of steps in each experience")
    parser.add_argument("--batch-size", type=int, help="samples of a step, instead of the stream's own")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of either config")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "continual_speed.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*directions (are protected|free)")
    given = {name: ast.literal_eval(value) for name, _, value in (text.partition("=") for text in options.option)}
    rows = [measure(case, options.experiences, options.pairs, given, options.batch_size) for case in options.cases]
    header = ("case", "batch", "naive step", "step", "quartiles", "experiences", "kept")
    show(
        f"Steps of LANCE next to naive ones, {options.threads} threads",
        [
            header,
            *(
                (
                    row.case,
                    str(row.batch),
                    f"{row.naive_seconds * 1e3:.1f} ms",
                    f"{row.ratio:.2f}",
                    f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}",
                    f"{min(row.by_experience):.2f} to {max(row.by_experience):.2f}",
                    f"{row.kept_ratio:.1%}",
                )
                for row in rows
            ),
        ],
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"threads": options.threads, "rows": [asdict(row) for row in rows]}, indent=1))
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
