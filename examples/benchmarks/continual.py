"""Continual-learning methods on offline streams: same network, seeds, epochs and optimiser for each.

    python -m examples.benchmarks.continual --streams glyphs --methods naive joint gpm lance --seeds 0 1 2
    python -m examples.benchmarks.continual --optimizers sgd adamw --threads 1 --output runs.json --resume \
        --document docs/continual_results.md

Prints a table per stream and optimiser, mean ± standard deviation over the seeds, and writes every run as JSON. With
`--resume` an interrupted benchmark goes on with what is not yet in that file; with `--document` all runs in it are
written as a page.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.benchmarks.methods import LABELS, METHODS, OPTIMIZERS, Settings, make_optimizer, make_strategy
from examples.benchmarks.probes import AccuracyMatrix, MemoryProbe, StepEnd, StepStart, tensor_bytes
from examples.benchmarks.recipes import MODELS, RECIPES
from lightning_lance.tensors.units import format_bytes
from lightning_lance.trainer.metrics import ContinualMetrics

Run = dict[str, Any]
"""One method on one stream with one seed."""


def seed_everything(seed: int) -> None:
    """Seed the generators that Avalanche and the methods draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - A-GEM and others use the global one
    torch.manual_seed(seed)


def third_means(matrix: torch.Tensor) -> tuple[float, float]:
    """Learning accuracy over the first and over the last third of the experiences, NaN where one is unknown."""
    learned = matrix.diagonal()
    third = max(1, len(learned) // 3)
    unknown = learned.sum() * 0
    return float(learned[:third].mean() + unknown), float(learned[-third:].mean() + unknown)


def run(
    method: str, scenario: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[Run, ContinualMetrics]:
    """Train and evaluate one method on one stream.

    Where one test set serves all experiences, `ACC` is the accuracy on it at the end; the other metrics are unknown.

    Args:
        method: a key of :data:`examples.benchmarks.methods.METHODS`.
        scenario: an Avalanche benchmark with a train and a test stream.
        model: the network, fresh.
        optimizer: of its parameters.
        settings: what the methods share.

    Returns:
        Numbers of the run, and the accuracies.
    """
    experiences = list(scenario.train_stream)
    joint = method == "joint"
    accuracies = AccuracyMatrix(len(experiences))
    start = StepStart()
    end = StepEnd(start)
    memory = MemoryProbe(0 if joint else len(experiences) - 1)
    strategy, holder = make_strategy(
        method, model, optimizer, settings, before=[accuracies, memory, start], after=[end]
    )
    memory.method = [e.dataset for e in experiences] if joint else holder

    if not joint:  # which has no heads yet, and no forward transfer
        strategy.eval(scenario.test_stream, num_workers=settings.workers)
    steps: list[float] = []
    epochs: list[float] = []
    boundaries: list[float] = []
    began_all = time.perf_counter()
    for index, experience in enumerate([experiences] if joint else experiences):
        began = time.perf_counter()
        strategy.train(experience, num_workers=settings.workers)
        found, training, boundary = end.seconds(began, time.perf_counter())
        steps += found
        epochs.append(training / settings.epochs)
        boundaries.append(boundary)
        accuracies.trained = len(experiences) - 1 if joint else index
        strategy.eval(scenario.test_stream, num_workers=settings.workers)
    matrix = accuracies.metrics.matrix
    summary = {name: _known(float(value)) for name, value in accuracies.metrics.compute().items()}
    if len(scenario.test_stream) < len(experiences):
        summary = {**dict.fromkeys(summary), "ACC": _known(float(matrix[-1, 0]))}
    first, last = third_means(matrix)
    # Between experiences and inside of one, whichever is more.
    state = max(memory.state, tensor_bytes(holder, strategy.model) if not joint else 0)
    numbers = {
        **summary,
        "learning_accuracy_first_third": _known(first),
        "learning_accuracy_last_third": _known(last),
        "state_bytes": state,
        "kept_bytes": memory.kept,
        "step_seconds": statistics.median(steps),
        "epoch_seconds": statistics.mean(epochs),
        "boundary_seconds": statistics.mean(boundaries),
        "seconds": time.perf_counter() - began_all,
        "matrix": [[_known(value) for value in row] for row in matrix.tolist()],
    }
    return numbers, accuracies.metrics


def boundary_epochs(found: Run, runs: Iterable[Run]) -> float | None:
    """Time of a boundary in epochs of naive training with the same seed; `None` where that has not been run."""
    for one in runs:
        if one["method"] == "naive" and all(one[key] == found[key] for key in ("stream", "optimizer", "seed")):
            return float(found["boundary_seconds"] / one["epoch_seconds"])
    return None


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


COLUMNS = (
    ("ACC", "ACC", 100.0, 1),
    ("BWT", "BWT", 100.0, 1),
    ("FWT", "FWT", 100.0, 1),
    ("LA", "learning_accuracy", 100.0, 1),
    ("LA first ⅓", "learning_accuracy_first_third", 100.0, 1),
    ("LA last ⅓", "learning_accuracy_last_third", 100.0, 1),
    ("state", "state_bytes", None, 0),
    ("kept", "kept_bytes", None, 0),
    ("step ms", "step_seconds", 1000.0, 1),
    ("boundary s", "boundary_seconds", 1.0, 2),
    ("naive epochs", "boundary_epochs", 1.0, 1),
)

TIMES = ("step_seconds", "boundary_seconds", "boundary_epochs")
"""Columns that depend on the machine."""


def cell(values: Sequence[float | None], factor: float | None, digits: int) -> str:
    """`mean ± standard deviation`, bytes without the deviation, a dash where nothing is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.mean(known)
    if factor is None:
        return format_bytes(mean)
    text = f"{mean * factor:.{digits}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known) * factor:.{digits}f}"
    return text


def table(runs: Iterable[Run], columns: Sequence[tuple[str, str, float | None, int]] = COLUMNS) -> str:
    """Markdown table, a row per method, over the runs of one stream and optimiser."""
    by_method: dict[str, list[Run]] = {}
    for found in runs:
        by_method.setdefault(found["method"], []).append(found)
    rows = [["method", *(title for title, *_ in columns)]]
    for method, found in by_method.items():
        cells = [cell([one.get(key) for one in found], factor, digits) for _, key, factor, digits in columns]
        rows.append([LABELS[method], *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines)


def page(runs: Sequence[Run]) -> str:
    """Markdown page with a table for each stream and optimiser; times are left out, which a busy machine makes."""
    parts = [
        "# Continual learning: all methods on all streams",
        "Written by `python -m examples.benchmarks.continual --optimizers sgd adamw --threads 1 --output runs.json "
        "--resume --document docs/continual_results.md`. Mean ± standard deviation over the seeds; LA is the accuracy "
        "on an experience right after it; *state* is the most that a method holds within an experience or between two, "
        "*kept* what autograd keeps in the last one. Joint training sees all experiences at once. A-GEM, GEM and "
        "replay keep 20 samples of an experience. GPM, scaled GPM, TRGP and CODE-CL promise what they promise for "
        "plain SGD alone.",
    ]
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one["stream"], one["optimizer"]), []).append(one)
    for (stream, optimizer), found in groups.items():
        found = sorted(found, key=lambda one: METHODS.index(one["method"]))
        seeds = {one["method"]: sum(1 for other in found if other["method"] == one["method"]) for one in found}
        few = ", ".join(f"{LABELS[method]} {count}" for method, count in seeds.items() if count != max(seeds.values()))
        parts.append(f"## {stream}, {optimizer}")
        parts.append(f"{max(seeds.values())} seeds{f'; {few}' if few else ''}.")
        parts.append(table(found, [column for column in COLUMNS if column[1] not in TIMES]))
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def draw(metrics: ContinualMetrics, title: str, path: Path) -> None:
    """Write the heat map of an accuracy matrix."""
    import matplotlib.pyplot as plt

    figure, axis = metrics.plot()
    axis.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["ewc.ewc_lambda=50", "lance.reserved=8"]` as options per method."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        method, dot, name = key.partition(".")
        if not equals or not dot or method not in METHODS:
            raise SystemExit(f"--option {text!r}: write METHOD.NAME=VALUE, METHOD one of {', '.join(METHODS)}.")
        try:
            found.setdefault(method, {})[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found.setdefault(method, {})[name] = value
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices, default in (
        ("stream", list(RECIPES), list(RECIPES)),
        ("method", list(METHODS), list(METHODS)),
        ("optimizer", list(OPTIMIZERS), ["sgd"]),
    ):
        found.add_argument(
            f"--{name}s", nargs="+", choices=choices, default=default, metavar=name.upper(), help=", ".join(choices)
        )
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of data order, weights and methods")
    found.add_argument("--model", choices=MODELS, help="instead of the stream's own")
    found.add_argument("--epochs", type=int, help="over each experience, instead of the stream's own")
    found.add_argument("--lr", type=float, help="of plain SGD, instead of the stream's own")
    found.add_argument("--threshold", type=float, help="energy protected after an experience, instead of the stream's")
    found.add_argument("--threshold-growth", type=float, default=0.003, help="added to it after each experience")
    found.add_argument("--memory", type=int, default=20, help="samples kept per experience by replay, A-GEM and GEM")
    found.add_argument("--option", action="append", default=[], metavar="METHOD.NAME=VALUE", help="of a single method")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--device", default="cpu")
    found.add_argument("--output", type=Path, default=Path("continual.json"), help="where the runs go as JSON")
    found.add_argument("--resume", action="store_true", help="keep the runs in --output, and add those not yet there")
    found.add_argument("--document", type=Path, help="Markdown page with the tables of all runs in --output")
    found.add_argument("--plots", type=Path, help="folder for a heat map of each run's accuracy matrix")
    return found


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    # Avalanche says so for each strategy: evaluation is the probes' work here.
    warnings.filterwarnings("ignore", message="No loggers specified")
    given = options(args.option)
    runs: list[Run] = json.loads(args.output.read_text()) if args.resume and args.output.exists() else []
    for name in args.streams:
        recipe = RECIPES[name]
        for optimizer_name in args.optimizers:
            own: dict[str, dict[str, Any]] = {key: dict(recipe.method.get(key, {})) for key in METHODS}
            if args.threshold is not None:
                own["lance"]["threshold"] = args.threshold
            for seed in args.seeds:
                scenario = recipe.stream(seed)
                for method in args.methods:
                    settings = Settings(
                        epochs=args.epochs or recipe.epochs,
                        batch_size=recipe.batch_size,
                        threshold=recipe.threshold if args.threshold is None else args.threshold,
                        threshold_growth=args.threshold_growth,
                        memory_per_experience=args.memory,
                        experiences=len(scenario.train_stream),
                        seed=seed,
                        device=args.device,
                        method={key: {**own[key], **given.get(key, {})} for key in METHODS},
                    )
                    found: Run = {
                        "stream": name,
                        "optimizer": optimizer_name,
                        "method": method,
                        "seed": seed,
                        "model": args.model or recipe.model,
                        "epochs": settings.epochs,
                        "lr": args.lr or recipe.lr,
                        "threshold": settings.threshold,
                        "threshold_growth": args.threshold_growth,
                        "memory_per_experience": args.memory,
                        "options": settings.method[method],
                        "threads": args.threads,
                        "torch": torch.__version__,
                    }
                    if args.resume and any(all(one.get(key) == found[key] for key in found) for one in runs):
                        continue
                    seed_everything(seed)
                    model = MODELS[args.model or recipe.model]()
                    optimizer = make_optimizer(optimizer_name, model, args.lr or recipe.lr)
                    numbers, metrics = run(method, scenario, model, optimizer, settings)
                    found.update(numbers)
                    runs.append(found)
                    found["boundary_epochs"] = boundary_epochs(found, runs)
                    # After each run, so that an interrupted benchmark loses nothing.
                    _write(args.output, json.dumps(runs, indent=1))
                    if args.plots is not None:
                        path = args.plots / f"{name}-{optimizer_name}-{method}-{seed}.png"
                        draw(metrics, f"{LABELS[method]}, {name}", path)
                    print(
                        f"{name} {optimizer_name} seed {seed} {LABELS[method]}: ACC {cell([found['ACC']], 100, 1)}, "
                        f"BWT {cell([found['BWT']], 100, 1)}, {found['seconds']:.0f} s",
                        flush=True,
                    )
            chosen = [one for one in runs if (one["stream"], one["optimizer"]) == (name, optimizer_name)]
            print(f"\n{name}, {optimizer_name}, {len(args.seeds)} seeds\n\n{table(chosen)}\n", flush=True)
            if args.document is not None:
                _write(args.document, page(runs))
    return runs


if __name__ == "__main__":
    main()
