"""Whether training with compressed activations learns what plain training learns: small trainings, many seeds.

    python -m examples.benchmarks.learning                                   # what is not measured yet, two at a time
    python -m examples.benchmarks.learning --tasks vit text --settings plain default --seeds 0 1 2
    python -m examples.benchmarks.learning --settings default two-bits --again     # measure these anew
    python -m examples.benchmarks.learning --write docs/learning.md          # table and figure of what was measured
    python -m examples.benchmarks.learning --quick                           # one seed, a fifth of the steps

Each run has a process of its own, and a line of the results file when it ends, so that a run of this command can be
cut, goes on where it was, and can be split. Memory is measured in short runs, where the C library gives freed memory
back to the system; a step is timed in the long ones. Checkpointing has to end with the weights of plain training, bit
for bit, or the command fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.benchmarks.memory import ALLOCATORS, RESULTS, ROOT, peak, reset_peak
from examples.benchmarks.table import show, size, times
from examples.benchmarks.tasks import TASKS
from examples.benchmarks.tasks.task import Task
from lightning_lance import LanceConfig, LanceSession, LanceWarning, measure_saved_bytes

SETTINGS: dict[str, LanceConfig | None] = {
    "plain": None,
    "default": LanceConfig(),
    "two-bits": LanceConfig(bits=2),
    "compact": LanceConfig(rank="compact"),
    "published": LanceConfig(preset="published"),
    "checkpointing": None,
}

TITLES = {
    "plain": "plain",
    "default": "default",
    "two-bits": "bits=2",
    "compact": "compact",
    "published": "published",
    "checkpointing": "checkpointing",
}

COLOURS = {"default": "tab:blue", "two-bits": "tab:cyan", "compact": "tab:orange", "published": "tab:red"}

MEMORY_STEPS = 12
"""Of a run that measures memory: more than the steps that define subspaces."""

QUICK = 5
"""``--quick`` takes one of so many steps."""

FIRST_TIMED = 10
"""Steps before this one are not timed, where there are more."""

EVALUATED = 250
"""Samples of a forward pass over the test set."""


@dataclass(frozen=True)
class Item:
    """One process.

    Attributes:
        task: key of `TASKS`.
        setting: key of `SETTINGS`.
        seed: of weights, sample order and compression; `None`: memory is measured.
        steps: length of the run; `None`: that of the task.
    """

    task: str
    setting: str
    seed: int | None
    steps: int | None = None


@dataclass(frozen=True)
class Result:
    """What one process measured.

    Attributes:
        item: what it ran.
        score: on the test samples, in per cent.
        step: median time of a step in seconds.
        weights: digest of all parameters and buffers at the end.
        kept: bytes that autograd keeps of a step.
        peak: bytes of the process above the idle model.
    """

    item: Item
    score: float | None = None
    step: float | None = None
    weights: str | None = None
    kept: int | None = None
    peak: int | None = None


# One process ----------------------------------------------------------------------------------------------------------


def _build(task: Task, item: Item) -> nn.Module:
    torch.manual_seed(item.seed or 0)
    model = task.build().train(task.trains_norms)
    if item.setting == "checkpointing":
        for name in task.segments:
            _recompute(model.get_submodule(name))
    return model


def _recompute(module: nn.Module) -> None:
    """Let a module keep its input alone, and run once more in the backward pass."""
    context = functools.partial(_contexts, module)
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, context_fn=context)  # type: ignore[method-assign]


def _contexts(module: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _same_buffers(module)


@contextlib.contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """The second forward pass shall not count twice in running statistics."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def run(item: Item) -> Result:
    """Train once, in this process."""
    task, config = TASKS[item.task], SETTINGS[item.setting]
    data = task.data()
    inputs, targets = data.train
    per_epoch = math.ceil(len(targets) / task.batch)
    steps = min(item.steps or task.epochs * per_epoch, task.epochs * per_epoch)
    kept = None
    if item.seed is None and config is None:
        spare = _build(task, item)
        first = torch.arange(task.batch)  # copies, as the batches of training are: a slice keeps all samples alive
        x, y = inputs[first], targets[first]
        kept = measure_saved_bytes(lambda: task.measure.loss(spare(x), y), spare).total
        del spare
    model = _build(task, item)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = task.optimizer(trained)
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    layers = task.layers if isinstance(task.layers, str) else list(task.layers)
    session = None
    if config is not None:
        session = LanceSession(model, replace(config, seed=item.seed or 0, layers=layers))
        session.start()
    if session is not None and session.config.calibration == "eval":
        drawn = torch.Generator().manual_seed(1000 + (item.seed or 0))
        rows = torch.randint(len(targets), (session.config.batches, task.batch), generator=drawn)
        session.calibrate(functools.partial(model, inputs[row]) for row in rows)
    inside: Callable[[], Any] = contextlib.nullcontext if session is None else session.step
    order = torch.Generator().manual_seed(item.seed or 0)
    seconds: list[float] = []
    idle = reset_peak()
    while len(seconds) < steps:
        for index in torch.randperm(len(targets), generator=order).split(task.batch)[: steps - len(seconds)]:
            x, y = inputs[index], targets[index]
            start = time.perf_counter()
            optimizer.zero_grad()
            with inside():
                loss = task.measure.loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
    if item.seed is None:
        if session is not None and session.report is not None and session.report.compressed is not None:
            kept = session.report.compressed.total
        return Result(item, kept=kept, peak=peak() - idle)
    if session is not None:
        session.stop()
    timed = seconds[FIRST_TIMED:] or seconds
    return Result(item, _score(task, model, *data.test), statistics.median(timed), _digest(model))


@torch.no_grad()
def _score(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    return task.measure.score(torch.cat([model(part) for part in inputs.split(EVALUATED)]), targets)


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


# Many processes -------------------------------------------------------------------------------------------------------


def items(tasks: Sequence[str], settings: Sequence[str], seeds: Sequence[int] | None, quick: bool) -> list[Item]:
    """What is to be run: all settings of a seed before the next seed, so that a cut run can be compared."""

    def of(task: str) -> list[str]:
        return [setting for setting in settings if setting != "published" or TASKS[task].published]

    found = [Item(task, setting, None, MEMORY_STEPS) for task in tasks for setting in of(task)]
    for seed in range(max(TASKS[task].seeds for task in tasks)) if seeds is None else seeds:
        for task in tasks:
            if seeds is not None or seed < TASKS[task].seeds:
                found += [Item(task, setting, seed, _quick_steps(task) if quick else None) for setting in of(task)]
    return found


def _quick_steps(name: str) -> int:
    task = TASKS[name]
    return math.ceil(task.epochs * len(task.data().train[1]) / task.batch / QUICK)


def in_own_process(item: Item, threads: int) -> Result:
    """One result, measured in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "examples.benchmarks.learning", "--threads", str(threads)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    worker = ["--worker", json.dumps(asdict(item))]
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{item} failed:\n{done.stderr.strip()}")
    return _result(done.stdout.splitlines()[-1])


def _result(line: str) -> Result:
    fields = json.loads(line)
    return Result(Item(**fields.pop("item")), **fields)


def read(path: Path) -> dict[Item, Result]:
    """Results of earlier runs; of the same item the last one."""
    if not path.exists():
        return {}
    found = map(_result, path.read_text(encoding="utf-8").splitlines())
    return {result.item: result for result in found}


def check_checkpointing(results: dict[Item, Result]) -> None:
    """Recomputing must not change what is learned.

    Raises:
        RuntimeError: weights differ from those of plain training.
    """
    for item, result in results.items():
        plain = results.get(replace(item, setting="plain"))
        if item.setting == "checkpointing" and plain is not None and plain.weights != result.weights:
            raise RuntimeError(
                f"{item}: checkpointing ended with other weights than plain training. If the code, torch or the "
                "machine changed in between, run both with --again."
            )


# What was found -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A task in a setting.

    Attributes:
        scores: by seed, in per cent.
        plain: those of plain training.
    """

    task: str
    setting: str
    scores: dict[int, float]
    plain: dict[int, float]
    kept: int | None
    plain_kept: int | None
    peak: int | None
    plain_peak: int | None
    step: float | None

    @property
    def differences(self) -> list[float]:
        """Score less that of plain training with the same seed, in points."""
        return [score - self.plain[seed] for seed, score in self.scores.items() if seed in self.plain]

    @property
    def allowed(self) -> float:
        """Points that a setting may lose: .3 or a standard error of plain training; .5 for the compact one."""
        return 0.5 if self.setting == "compact" else max(0.3, _error(list(self.plain.values())))

    @property
    def misses(self) -> bool:
        """Whether a setting that is to learn as plain training does loses more."""
        held = self.setting in ("default", "two-bits")
        held = held or (self.setting == "compact" and TASKS[self.task].fine_tuning)
        return held and bool(self.differences) and statistics.mean(self.differences) < -self.allowed


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def rows(results: dict[Item, Result]) -> list[Row]:
    """One row a task and setting, in their order."""

    def learned(task: str, setting: str) -> dict[int, Result]:
        found = [r for i, r in results.items() if (i.task, i.setting) == (task, setting) and i.seed is not None]
        return {result.item.seed: result for result in sorted(found, key=lambda r: r.item.seed or 0)}  # type: ignore[misc]

    found = []
    for task in TASKS:
        base = learned(task, "plain")
        memory = {i.setting: r for i, r in results.items() if i.task == task and i.seed is None}
        empty = Result(Item(task, "", None))
        for setting in SETTINGS:
            runs, held, plain = learned(task, setting), memory.get(setting, empty), memory.get("plain", empty)
            if not runs:
                continue
            timed = [(r.step, base[seed].step) for seed, r in runs.items() if seed in base]
            ratios = [ours / theirs for ours, theirs in timed if ours and theirs]
            scores, reference = ({seed: r.score or 0.0 for seed, r in kind.items()} for kind in (runs, base))
            step = statistics.median(ratios) if ratios else None
            sizes = (held.kept, plain.kept, held.peak, plain.peak)
            found.append(Row(task, setting, scores, reference, *sizes, step))
    return found


HEADER = ["setting", "score", "± std", "to plain", "± error", "kept", "less", "peak", "step"]


def cells(row: Row) -> list[str]:
    """A row as text."""
    scores, differences = list(row.scores.values()), row.differences
    spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    compared = [""] * 2
    if row.setting != "plain" and differences:
        compared = [f"{statistics.mean(differences):+.2f}{' ✗' if row.misses else ''}"]
        compared.append(f"{_error(differences):.2f}" if len(differences) > 1 else "")
    return [
        TITLES[row.setting],
        f"{statistics.mean(scores):.2f}",
        spread,
        *compared,
        size(row.kept),
        times(row.plain_kept, row.kept) if row.setting != "plain" else "",
        size(row.peak),
        f"{row.step:.2f}" if row.step is not None and row.setting != "plain" else "",
    ]


INTRODUCTION = """\
# Does it learn as plain training does?

Small trainings that need no download; `python -m examples.benchmarks.learning` runs what is not measured yet, with more
seeds too, and `--write docs/learning.md` writes this page of what is. *Score* is the mean over seeds, in per cent,
*to plain* its difference to plain training with the same seeds, in points, with its standard error; *kept* is what
autograd keeps of a step, *peak* that of the process above the idle model, *step* the time of a step next to plain
training's, roughly, for several runs share the machine, and left out where it was under another load. Peaks are those
of short runs of small networks, in which the method's own scratch memory shows. Checkpointing recomputes every block,
and ends with the weights of plain training, bit for bit.

A ✗ marks a loss of more than .3 point, or than the standard error of plain training where that is larger; for `compact`
one of more than .5 point where a trained network is fine-tuned. Where it would save little, as in all tasks but the two
that train the last 4 layers, it is the default but for a first step in fewer bits. One seed says little about a point.
"""


def document(found: Sequence[Row], figure: str) -> str:
    """Table as Markdown."""
    lines = [INTRODUCTION, f"![Score and kept bytes next to plain training]({figure})\n", _verdict(found)]
    for task in dict.fromkeys(row.task for row in found):
        group = [row for row in found if row.task == task]
        seeds = max(len(row.scores) for row in group)
        made = TASKS[task]
        kind = "fine-tuned" if made.fine_tuning else "from scratch"
        lines += [f"**{made.title}** ({kind}; {made.measure.name}, {seeds} seed{'s' if seeds > 1 else ''}):\n"]
        lines += [f"| {' | '.join(HEADER)} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in group]
        lines.append("")
    return "\n".join(lines)


def _verdict(found: Sequence[Row]) -> str:
    text = []
    for setting in ("default", "two-bits", "compact"):
        group = [row for row in found if row.setting == setting and row.differences]
        group = [row for row in group if setting != "compact" or TASKS[row.task].fine_tuning]
        if not group:
            continue
        worst = min(group, key=lambda row: statistics.mean(row.differences))
        mean = statistics.mean(statistics.mean(row.differences) for row in group)
        marked = [TASKS[row.task].title for row in group if row.misses]
        tasks = "fine-tuning tasks" if setting == "compact" else "tasks"
        text.append(
            f"- `{TITLES[setting]}`: {mean:+.2f} points on average over {len(group)} {tasks}, at worst "
            f"{statistics.mean(worst.differences):+.2f} ({TASKS[worst.task].title}); "
            + (f"✗: {'; '.join(marked)}." if marked else "no ✗.")
        )
    return "\n".join(text) + "\n"


def plot(found: Sequence[Row], path: Path) -> None:
    """Points lost and bytes kept, task by task."""
    from matplotlib.axis import XAxis
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    def plain_ticks(axis: XAxis, values: Sequence[float], unit: str = "") -> None:
        low, high = sorted(axis.get_view_interval())
        axis.set_ticks([value for value in values if low <= value <= high])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}".replace("-", "\N{MINUS SIGN}")))
        axis.set_minor_locator(NullLocator())

    names = list(dict.fromkeys(row.task for row in found))
    drawn = [row for row in found if row.setting in COLOURS and row.differences]
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    left.axvspan(-0.3, 0.3, color="0.92", zorder=0)
    left.axvline(0.0, color="0.5", linewidth=1)
    for row in drawn:
        height = names.index(row.task) + 0.18 * (list(COLOURS).index(row.setting) - 1.5)
        error = _error(row.differences)
        style = {"color": COLOURS[row.setting], "markersize": 5, "capsize": 2}
        left.errorbar(
            statistics.mean(row.differences), height, xerr=None if math.isnan(error) else error, fmt="o", **style
        )
        if row.kept and row.plain_kept:
            right.plot(row.plain_kept / row.kept, height, "o", color=COLOURS[row.setting], markersize=5)
    for setting, colour in COLOURS.items():
        right.plot([], [], "o", color=colour, label=TITLES[setting])
    left.set_xscale("symlog", linthresh=1.0)
    left.set(xlabel="points to plain training, with standard error (grey: ± .3)", yticks=range(len(names)))
    left.set_yticklabels([TASKS[name].title for name in names], fontsize=8)
    left.invert_yaxis()
    right.set(xscale="log", xlabel="times less kept than plain")
    right.axvline(1.0, color="0.5", linewidth=1)
    right.legend(fontsize=8)
    plain_ticks(left.xaxis, [-30, -10, -3, -1, -0.3, 0, 0.3, 1, 3, 10])
    plain_ticks(right.xaxis, [1, 2, 5, 10, 20, 50, 100], "×")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    result.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    result.add_argument("--seeds", nargs="+", type=int, help="default: by task")
    result.add_argument("--threads", type=int, default=1, help="of a run")
    result.add_argument("--jobs", type=int, default=2, help="runs at a time")
    result.add_argument("--again", action="store_true", help="measure what was measured before, too")
    result.add_argument("--quick", action="store_true", help="one seed, a fifth of the steps, results of their own")
    result.add_argument("--json", type=Path, help="results, a line each")
    result.add_argument("--write", type=Path, help="measure nothing, write table and figure")
    result.add_argument("--worker", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Entry point."""
    options = parser().parse_args(arguments)
    path = options.json or RESULTS / ("learning_quick.jsonl" if options.quick else "learning.jsonl")
    if options.worker:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore", LanceWarning)
        item = Item(**json.loads(options.worker))
        with ALLOCATORS["returned" if item.seed is None else "stock"]():
            print(json.dumps(asdict(run(item))))
        return []
    if not options.write:
        seeds = [0] if options.quick and options.seeds is None else options.seeds
        wanted, done = items(options.tasks, options.settings, seeds, options.quick), read(path)
        waiting = [item for item in wanted if options.again or item not in done]
        path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            ran = pool.map(lambda item: in_own_process(item, options.threads), waiting)
            for count, result in enumerate(ran, start=1):
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                told = f"{result.score:.2f}" if result.score is not None else size(result.kept)
                where = f"{result.item.task} {result.item.setting} {result.item.seed}"
                print(f"{count}/{len(waiting)}  {where}  {told}", file=sys.stderr, flush=True)
    results = read(path)
    check_checkpointing(results)
    found = rows(results)
    for task in dict.fromkeys(row.task for row in found):
        show(TASKS[task].title, [HEADER, *(cells(row) for row in found if row.task == task)])
    if options.write:
        image = Path("img") / f"{options.write.stem}.png"
        options.write.write_text(document(found, image.as_posix()), encoding="utf-8")
        plot(found, options.write.parent / image)
    return found


if __name__ == "__main__":
    main()
