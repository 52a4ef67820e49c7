"""The compatibility table: what the tests in this folder found, and how long a step takes next to a plain one.

python -m tests.compat.table                                    # prints it, a quarter of an hour on two cores
python -m tests.compat.table --write docs/compatibility.md
python -m tests.compat.table --only resnet18 precision --no-time
LANCE_COMPATIBILITY=runs/rows make test-rest                    # or, with two processes, the tests first
python -m tests.compat.table --rows runs/rows --no-time --write docs/compatibility.md
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning_lance.tensors.units import format_bytes

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.05
COMMAND = "python -m tests.compat.table{} --write docs/compatibility.md"

Row = dict[str, Any]


def say(text: str, stream: TextIO = sys.stdout) -> None:
    """One line, at once."""
    stream.write(text + "\n")
    stream.flush()


def results(only: Sequence[str]) -> list[Row]:
    """Run the tests; the rows that they wrote, in the order of the tests.

    Raises:
        SystemExit: a test failed, so that there is no table.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LANCE_COMPATIBILITY": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/compat"]
        command += ["-k", " or ".join(only)] if only else []
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit("no table: a test failed")
        return read(Path(folder))


def read(folder: Path) -> list[Row]:
    """The rows that tests wrote, in the order in which they are listed, and others after them."""
    from tests.compat.networks import NETWORKS
    from tests.compat.setups import SETUPS

    order = {name: index for index, name in enumerate([*NETWORKS, *SETUPS])}
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir())]
    return sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def add_times(rows: Sequence[Row]) -> None:
    """Give each row its step time, where the setup is one with a step of its own."""
    import torch

    from tests.compat.networks import NETWORKS
    from tests.compat.pairs import setup_ratio, step_ratio
    from tests.compat.rows import Task
    from tests.compat.setups import SETUPS, Setup

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for row in rows:
        start = time.monotonic()
        if row["kind"] == "network":
            case = NETWORKS[row["name"]]
            row["step"] = step_ratio(Setup(make=lambda case=case: Task(case.build())), case)  # type: ignore[misc]
        elif row["name"] in SETUPS and SETUPS[row["name"]].timed:
            row["step"] = setup_ratio(SETUPS[row["name"]])
        else:
            continue
        say(f"{row['name']}: {row['step']:.2f}, {time.monotonic() - start:.0f} s", sys.stderr)


def verdict(row: Row) -> str:
    """What a reader wants to know: works, or works with a limit."""
    limits = [row["note"]] if row["note"] else []
    if row.get("step", 0) > LIMIT:
        limits.append(f"a step takes {row['step']:.2f} times as long")
    return "works" if not limits else "works; " + "; ".join(limits)


def cells(row: Row) -> list[str]:
    """One line of either table."""
    if "plain" not in row:
        return [row["name"], *[""] * (len(HEADER) - 2), verdict(row)]
    less = row["plain"] / max(row["compressed"], 1)
    two = _times(row["less_2"]) if "less_2" in row else ""
    step = f"{row['step']:.2f}" if "step" in row else ""
    sizes = [format_bytes(row["plain"]), format_bytes(row["compressed"])]
    cosines = [f"{row[key]:.4f}" if key in row else "" for key in COSINES]
    return [row["name"], *sizes, _times(less), two, *cosines, step, verdict(row)]


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


COSINES = {"cosine_auto": "cosine", "cosine_2": "2 bits: cosine", "cosine_bf16": "bf16"}
HEADER = ["", "plain keeps", "kept", "less", "2 bits: less", *COSINES.values(), "step", "what to know"]


def markdown(rows: Sequence[Row], first: str) -> str:
    """A table in Markdown."""
    lines = [[first, *HEADER[1:]], ["---"] * len(HEADER), *map(cells, rows)]
    empty = [column for column in range(1, len(HEADER)) if not any(line[column] for line in lines[2:])]
    lines = [[cell for column, cell in enumerate(line) if column not in empty] for line in lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def document(rows: Sequence[Row]) -> str:
    """The whole of docs/compatibility.md."""
    import lightning
    import torch

    from tests.compat.pairs import BATCH, SIZE
    from tests.compat.rows import BATCH as TESTED

    networks, setups, others = ([row for row in rows if row["kind"] == kind] for kind in ("network", "setup", "other"))
    setups.sort(key=lambda row: "step" not in row)
    slower = sum(row.get("step", 0) > LIMIT for row in rows)
    command = COMMAND.format("" if any("step" in row for row in rows) else " --no-time")
    timed = f" and {SIZE} px for the time" if any("step" in row for row in setups) else ""
    parts = [
        "# Compatibility",
        f"Made by `{command}` from the results of `tests/compat`: torch "
        f"{torch.__version__.partition('+')[0]}, lightning {lightning.__version__}, on the CPU, random weights, crops "
        "of photographs as colour images, "
        "`LanceCallback()` as it comes, everything trainable. In every row two epochs are trained, the loss stays "
        "finite, fewer bytes are kept than by plain training (but of networks that keep less than 250 KB), and the "
        "model comes back as it was.",
        f"*plain keeps* and *kept* are all that autograd holds for one batch of {TESTED}, measured with saved-tensor "
        "hooks. *cosine* is that of the gradient of all parameters to plain training's, in training mode and from the "
        "same random state, *2 bits* stands for `bits=2`, *bf16* for autocast to bfloat16 in its place. Weights are "
        "random, and batch norms see small batches: there bf16's own rounding can turn the gradient altogether.",
        "Two bits hold normal numbers to a cosine of .939 (Max, 1960), and no code of two bits, however long, to more "
        "than .968 (Shannon): what a gradient is above that comes of sums over positions, which even errors out. They "
        "are for the inputs of weights alone, and save least where other operators keep most.",
        ""
        if not any("step" in row for row in rows)
        else "*step* is the processor time of a training step next to that of a plain one: the median over pairs "
        f"that two Trainers take in turn in one process, on one thread, at a batch of {BATCH}. More than {LIMIT} is a "
        f"limit, and said so in {slower} rows. It comes from what each operator costs however small its input, "
        "which these images and networks show most, and from networks of depthwise and pointwise convolutions, which "
        "compute little on each element that is rounded. Rows without a time take the steps of the first row.",
        "## Networks",
        markdown(networks, "network"),
        "None of them keeps more than plain training at a batch of 2 either.",
        "## Training setups",
        f"ResNet-18, 32 px for the bytes{timed}.",
        markdown(setups, "setup"),
    ]
    if others:
        parts += ["## Beside the Trainer", *(f"- {row['name']}: {row['note'] or 'works'}" for row in others)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.replace("\n\n- ", "\n- ").replace("## Beside the Trainer\n- ", "## Beside the Trainer\n\n- ")


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table, with rich where it is installed."""
    from examples.benchmarks.table import show as show_table

    show_table(title, [[title, *HEADER[1:]], *map(cells, rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="table", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="words that the tests' names hold, as pytest -k")
    parser.add_argument("--no-time", action="store_true", help="tests only")
    parser.add_argument(
        "--rows", type=Path, help="folder of rows that the tests wrote before, in place of running them"
    )
    parser.add_argument("--write", type=Path, help="file for the table in Markdown")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    start = time.monotonic()
    rows = read(options.rows) if options.rows else results(options.only)
    if not options.no_time:
        add_times(rows)
    for kind in ("network", "setup"):
        show(kind, [row for row in rows if row["kind"] == kind])
    say(f"{len(rows)} rows in {time.monotonic() - start:.0f} s")
    if options.write:
        options.write.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
