"""Memory against time: what this package does next to what one would do without it, network by network.

    python -m examples.benchmarks.pareto                              # everything that has not been measured yet
    python -m examples.benchmarks.pareto --networks resnet18 --methods plain quarter default ours-quarter
    python -m examples.benchmarks.pareto --quick                      # small batches, to try it out
    python -m examples.benchmarks.pareto --write docs/pareto.md       # page and figure, of what has been measured

Every method has a process of its own, forked from one that has loaded the libraries. There the network is built, a
plain pass over two samples loads what kernels load, and from then on the most that was resident counts: "peak" is that
of all steps (forward, backward, SGD) above what was resident before the first. Freed memory goes back to the
system, and large blocks are mapped in huge pages where there are any, for all methods alike (docs/allocators.md). Of
`torch.compile` the peak is that of the steps after it has compiled, for the compiler itself takes more. "Step" is the
median of the steps after these.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.memory import ALLOCATORS, RESULTS, peak, reset_peak
from examples.benchmarks.table import show, size
from examples.benchmarks.ways import WAYS, Training, find
from examples.benchmarks.workloads import WORKLOADS

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it with its first allocation
SLOWEST = 1.33  # times a plain step: what checkpointing costs
AS_FAST = 1.05
QUICK = {name: (8, 32 if name == "text" else 64) for name in WORKLOADS}
ENOUGH_SECONDS = 15.0  # of timed steps, after at least two


@dataclass
class Row:
    """One network with one method.

    Attributes:
        network: key of `WORKLOADS`.
        method: key of `WAYS`.
        batch: samples of a batch.
        size: pixels or tokens.
        threads: of torch.
        allocator: key of `memory.ALLOCATORS`.
        kept: bytes that autograd keeps between the forward and the backward pass.
        peak: most bytes resident in any step, above idle.
        first: the same of the first steps alone.
        seconds: of a step, median.
        steps: how many were timed.
        cosine: of the gradient of one batch to that of plain training.
        error: why there are no numbers.
    """

    network: str
    method: str
    batch: int
    size: int
    threads: int
    allocator: str
    kept: int | None = None
    peak: int | None = None
    first: int | None = None
    seconds: float | None = None
    steps: int = 0
    cosine: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured."""
        return self.network, self.method, self.batch, self.size, self.threads, self.allocator


def measure(row: Row, steps: int) -> Row:
    """Fill a row, in this process."""
    torch.set_num_threads(row.threads)
    with ALLOCATORS[row.allocator]():
        way = WAYS[row.method]
        training = Training(WORKLOADS[row.network].scaled(row.batch, row.size), way)
        batches = training.batches(2)
        training.warm(batches[0])
        idle = reset_peak()
        training.install()
        for index in range(way.settling):
            training.step(batches[index % 2])
        row.first = peak() - idle
        training.forget()
        found = reset_peak()
        if way.compiled is not None:
            idle = found
        times: list[float] = []
        while len(times) < 2 or (len(times) < steps and sum(times) < ENOUGH_SECONDS):
            start = time.perf_counter()
            training.step(batches[len(times) % 2])
            times.append(time.perf_counter() - start)
        later = peak() - idle
        row.peak = later if way.compiled is not None else max(row.first, later)
        row.seconds, row.steps = statistics.median(times), len(times)
        training.forget()
        row.kept = training.kept(batches[0])
        row.cosine = training.cosine(batches[0])
    return row


def _work(row: Row, steps: int, connection: Connection) -> None:
    try:
        connection.send(asdict(measure(row, steps)))
    except Exception as error:  # whatever a method dies of is its result
        lines = str(error).strip().splitlines() or [""]
        connection.send(asdict(row) | {"error": f"{type(error).__name__}: {lines[0]}"[:200]})


def in_own_process(row: Row, steps: int, seconds: float) -> Row:
    """A row, measured in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["examples.benchmarks.memory", "examples.benchmarks.ways", "torchvision", "timm", "sklearn.datasets"]
    )
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(row, steps, other))
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), before.get("PYTHONPATH")]))
    os.environ.setdefault(HUGE_PAGES, "1")
    try:
        process.start()  # the server begins with the first one, and imports from there
    finally:
        os.environ.clear()
        os.environ.update(before)
    other.close()
    try:
        if mine.poll(seconds):
            return Row(**mine.recv())
        row.error = f"took more than {seconds:.0f} s"
    except EOFError:
        process.join()
        row.error = f"died, exit status {process.exitcode}"
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
    return row


def read(path: Path) -> list[Row]:
    """Rows of earlier runs."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


# What was found -------------------------------------------------------------------------------------------------------


def by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each network, plain training first."""
    order = {name: index for index, name in enumerate(WAYS)}
    return {
        name: found
        for name in WORKLOADS
        if (found := sorted((row for row in rows if row.network == name), key=lambda row: order[row.method]))
    }


def plain(rows: Sequence[Row]) -> Row | None:
    """Plain training among the rows of one network."""
    return next((row for row in rows if row.method == "plain" and row.error is None), None)


def within(rows: Sequence[Row], slowest: float) -> list[Row]:
    """Rows of one network whose step, rounded as in the table, is no more than so many times plain training's, smallest
    peak first.
    """
    base = plain(rows)
    if base is None or not base.seconds:
        return []
    fast = [row for row in rows if row.peak is not None and row.seconds and _times(row, base) <= slowest]
    return sorted(fast, key=lambda row: row.peak or 0)


def findings(rows: Sequence[Row]) -> list[str]:
    """What holds, and what does not, one sentence each; `rows` of one network."""
    base, usable = plain(rows), within(rows, SLOWEST)
    if base is None or base.peak is None or not usable:
        return []
    least, title = usable[0], WORKLOADS[rows[0].network].title
    second = next((row for row in usable if WAYS[row.method].ours != WAYS[least.method].ours), None)
    text = f"{title}: the lowest peak within {SLOWEST} times plain's step is {_peak(least, base)}, by {_named(least)}"
    lines = [text + ("." if second is None else f"; {_named(second)} reaches {_peak(second, base)}.")]
    smallest = within(rows, math.inf)[0]
    if smallest.method != least.method:
        ratio = _times(smallest, base)
        lines.append(f"At any step time it is {_peak(smallest, base)}, by {_named(smallest)}, at {ratio:.2f} times.")
    fast = [row for row in within(rows, AS_FAST) if WAYS[row.method].ours]
    others = [row for row in within(rows, AS_FAST) if not WAYS[row.method].ours and row.method != "plain"]
    near = f"within {AS_FAST - 1:.0%} of plain's step"
    if fast:
        lines.append(f"W{near[1:]} ours has {_peak(fast[0], base)}, by {_named(fast[0])}.")
    else:
        lines.append(f"No setting of ours is {near}.")
    if others and (not fast or (others[0].peak or 0) < (fast[0].peak or 0)):
        lines.append(f"There {_named(others[0])} is better: {_peak(others[0], base)}.")
    return lines


def _times(row: Row, base: Row) -> float:
    assert row.seconds
    assert base.seconds
    return round(row.seconds / base.seconds, 2)


def _peak(row: Row, base: Row) -> str:
    assert row.peak is not None
    assert base.peak
    return f"{size(row.peak)} ({row.peak / base.peak:.0%} of plain's)"


def _named(row: Row) -> str:
    return f"*{WAYS[row.method].title}*"


HEADER = ["method", "kept", "peak", "of plain's", "step, s", "of plain's", "cosine"]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a method, for the rows of one network."""
    base = plain(rows)
    lines = [HEADER]
    for row in rows:
        line = [WAYS[row.method].title]
        if row.error is not None or row.peak is None or row.seconds is None or row.cosine is None:
            lines.append([*line, row.error or "", *[""] * (len(HEADER) - 2)])
            continue
        of_peak = of_step = ""
        if base is not None and base.peak and base.seconds:
            of_peak, of_step = f"{row.peak / base.peak:.0%}", f"{_times(row, base):.2f}"
        lines.append(
            [*line, size(row.kept), size(row.peak), of_peak, f"{row.seconds:.2f}", of_step, f"{row.cosine:.4f}"]
        )
    return lines


INTRODUCTION = """\
# Memory against time

**{advice}**

Seven networks, every parameter of them trained, in training mode, by SGD: what autograd *keeps* between the forward and
the backward pass, the *peak* of the process above idle over all steps, the time of a *step*, and the *cosine* of the
gradient to plain training's. Each method has a process of its own; in all of them freed memory goes back to the system,
and large blocks come in huge pages ([allocators.md](allocators.md)).

    python -m examples.benchmarks.pareto --threads {threads} --write docs/pareto.md

measures what is missing in `examples/benchmarks/results/pareto.json`, and writes this page and the figure, of what is
there; `--networks`, `--methods` and `--steps` take a part.

![Peak of the process against step time](img/pareto.png)

Shaded: steps up to {slowest} times plain's; what takes longer than {longest:g} times is drawn at the edge.

- *Micro-batches* are what `accumulate_grad_batches` does with smaller batches: exact, but that a batch norm sees fewer
  samples at once, which is all that the cosine shows. A row with them keeps what one micro-batch keeps.
- *Checkpointing* runs every block again in the backward pass.
{compiled}- `rank="compact"` is *ours* here: where norms and activations are most of what is kept, it projects nothing.
- *bf16* is autocast to bfloat16; how fast it is depends on the processor.
- Times are those of {threads} threads, and of memory that goes back to the system and is cleared when it is taken
  again, which costs what takes and frees much memory the most: [benchmarks.md](benchmarks.md) has steps of ours with
  the C library's own settings. On a shared machine they differ from run to run by ten to thirty percent, so that a row
  near a limit may be on either side of it; peaks differ by one.
- Peaks hold the gradients of all weights, which nothing here shrinks: 113 MB of Swin-T, a quarter of its plain one.
"""

COMPILED = """\
- `torch.compile` is told to keep half of the activations by its own account
  (`torch._functorch.config.activation_memory_budget`); its peak is that of the steps after it has compiled.
"""

ADVICE = """\
Where the processor has bfloat16, `precision="bf16-mixed"` comes first, and `LanceCallback()` with it: 19 to 43% of
plain training's peak at .5 to 1.1 times its step. Without batch norms cut the batch into micro-batches before that
(`accumulate_grad_batches`): exact, at .7 to 1.5 times the step. With batch norms in training mode, which see fewer
samples in a micro-batch, use `LanceCallback()` first. All three multiply."""


def document(rows: Sequence[Row], threads: int) -> str:
    """The page."""
    compiled = COMPILED if any(row.method == "compile" for row in rows) else ""
    values = {"advice": ADVICE, "threads": threads, "slowest": SLOWEST, "longest": LONGEST, "compiled": compiled}
    lines = [INTRODUCTION.format(**values)]
    for name, found in by_network(rows).items():
        header, *body = table(found)
        workload = WORKLOADS[name].scaled(found[0].batch, found[0].size)
        lines += [f"## {workload.label}", "", " ".join(findings(found)), ""]
        lines += [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
        lines += [f"| {' | '.join(line)} |" for line in body]
        lines.append("")
    return "\n".join(lines)


# Families of points, each a line in the figure: name, methods, colour, marker. Of micro-batches the name tells those
# that were measured.
FAMILIES = (
    ("plain", ("plain", "half", "quarter", "eighth"), "#5f6b7a", "o"),
    ("checkpointing", ("checkpointing",), "#b07a00", "s"),
    ("torch.compile", ("compile",), "#7a4fb5", "D"),
    ("bf16", ("bf16", "bf16-half", "bf16-quarter", "bf16-eighth"), "#2a8f5a", "^"),
    ("ours", ("default", "ours-half", "ours-quarter", "ours-eighth"), "#c8102e", "o"),
    ("ours and bf16", ("ours-bf16", "ours-bf16-half", "ours-bf16-quarter", "ours-bf16-eighth"), "#e8740c", "^"),
    ("ours, 2 bits", ("two-bits",), "#c8102e", "v"),
    ("ours and checkpointing", ("ours-checkpointing",), "#c8102e", "s"),
)
PARTS = {"half": "1/2", "quarter": "1/4", "eighth": "1/8"}
LONGEST = 3.0  # times plain's step; what is beyond is drawn at the edge


def legend(title: str, methods: Sequence[str], measured: set[str]) -> str:
    """Name of a family of points, with the micro-batches among its methods that were measured."""
    names = [method.rpartition("-")[2] for method in methods if method in measured]
    parts = [PARTS[name] for name in names if name in PARTS]
    return f"{title}, and micro-batches of {', '.join(parts)}" if parts else title


def draw(rows: Sequence[Row], path: Path) -> None:
    """Peak against step time, a panel a network; on a white ground, so that it is read on light and dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    networks = {name: found for name, found in by_network(rows).items() if plain(found) is not None}
    measured = {row.method for found in networks.values() for row in found if row.peak is not None}
    columns = min(4, len(networks))
    height = -(-(len(networks) + 1) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(3.1 * columns, 2.9 * height), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (name, found) in zip(axes.flat, networks.items(), strict=False):
        base = plain(found)
        assert base is not None
        assert base.peak
        assert base.seconds
        at = {row.method: row for row in found if row.peak is not None and row.seconds is not None}
        axis.axvspan(0, SLOWEST, color="#f2f4f7", zorder=0)
        for title, methods, colour, marker in FAMILIES:
            chosen = [at[method] for method in methods if method in at]
            if not chosen:
                continue
            steps = [min((row.seconds or 0) / base.seconds, LONGEST) for row in chosen]
            peaks = [(row.peak or 0) / 1e6 for row in chosen]
            style = "-" if len(methods) > 1 else ""
            (line,) = axis.plot(steps, peaks, style, color=colour, marker=marker, markersize=5.5, linewidth=1.2)
            handles[legend(title, methods, measured)] = line
        workload = WORKLOADS[name].scaled(found[0].batch, found[0].size)
        axis.set_title(workload.label, fontsize=9)
        axis.set_yscale("log")
        axis.set_xlim(0.5, LONGEST + 0.1)
        peaks = [row.peak / 1e6 for row in at.values() if row.peak]
        low, high = min(peaks) / 1.25, max(peaks) * 1.25
        axis.set_ylim(low, high)
        ticks = [tick for tick in _ticks() if low <= tick <= high]
        axis.set_yticks(ticks)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
    for axis in axes[:, 0]:
        axis.set_ylabel("peak above idle, MB", fontsize=8)
    for axis in list(axes.flat)[max(len(networks) - columns, 0) : len(networks)]:
        axis.set_xlabel("step, times plain's", fontsize=8)
    spare = list(axes.flat)[len(networks) :]
    for axis in spare:
        axis.axis("off")
    title = f"lower left is better; shaded: up to {SLOWEST} times plain's step"
    spare[0].legend(
        handles.values(), handles.keys(), loc="center", fontsize=7.5, frameon=False, title=title, title_fontsize=7.5
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


def _ticks() -> list[float]:
    return [factor * 10.0**power for power in range(5) for factor in (1, 2, 3, 5, 7)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Peak memory against step time, method by method.")
    result.add_argument("--networks", nargs="+", default=list(WORKLOADS), help=f"from {', '.join(WORKLOADS)}")
    result.add_argument("--methods", nargs="+", default=list(WAYS), help=f"from {', '.join(WAYS)}")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--steps", type=int, default=5, help="timed steps, at most")
    result.add_argument("--allocator", choices=list(ALLOCATORS), default="returned")
    result.add_argument("--timeout", type=float, default=600.0, help="seconds for one method")
    result.add_argument("--again", action="store_true", help="measure also what has been measured")
    result.add_argument("--quick", action="store_true", help="small batches, two steps")
    result.add_argument("--json", type=Path, default=RESULTS / "pareto.json")
    result.add_argument("--write", type=Path, help="write a page of all rows, and img/pareto.png beside it")
    return result


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Entry point."""
    options = parser().parse_args(arguments)
    networks, methods = find(options.networks, WORKLOADS, "networks"), find(options.methods, WAYS, "methods")
    sizes: dict[str, tuple[int, int]] = {name: (w.batch, w.size) for name, w in WORKLOADS.items()}
    if options.quick:
        sizes, options.steps = QUICK, 2
    rows = read(options.json)
    wanted: Callable[[Row], bool] = lambda row: (  # noqa: E731
        (row.batch, row.size) == sizes[row.network]
        and (row.threads, row.allocator) == (options.threads, options.allocator)
    )
    for name in networks:
        for method in methods:
            row = Row(name, method, *sizes[name], options.threads, options.allocator)
            if not options.again and any(other.key == row.key and other.error is None for other in rows):
                continue
            start = time.perf_counter()
            row = in_own_process(row, options.steps, options.timeout)
            print(
                f"{name}  {method}  {time.perf_counter() - start:.0f} s  {row.error or ''}", file=sys.stderr, flush=True
            )
            rows = [*(other for other in rows if other.key != row.key), row]
            write(options.json, rows)
        found = by_network([row for row in rows if wanted(row) and row.network == name]).get(name)
        if found:
            show(WORKLOADS[name].scaled(*sizes[name]).label, table(found), " ".join(findings(found)))
    rows = [row for row in rows if wanted(row)]
    if options.write and by_network(rows):
        options.write.write_text(document(rows, options.threads), encoding="utf-8")
        draw(rows, options.write.parent / "img" / "pareto.png")
    return rows


if __name__ == "__main__":
    main()
