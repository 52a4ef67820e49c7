"""How long the command line tool takes to answer, next to a bare LightningCLI with the same model and data classes.

    python -m examples.benchmarks.startup              # medians of 5 runs of each, in turn
    python -m examples.benchmarks.startup --runs 9

Each run is a fresh process. Processor time is what other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from examples.benchmarks.table import show

FINE_TUNING = "examples.finetune_digits:DigitsClassifier,examples.data.mnist:DigitsDataModule"
STREAM = "lightning_lance.streams:ContinualClassifier,lightning_lance.streams:AvalancheDataModule"

CASES = [
    ("--help", FINE_TUNING, ["--help"], ["--help"]),
    ("fit --help", FINE_TUNING, ["fit", "--help"], ["fit", "--help"]),
    ("stream --help", STREAM, ["stream", "--help"], ["fit", "--help"]),
]
"""What it is called, classes of the bare tool, arguments of ours, arguments of the bare one."""

BARE = """
from importlib import import_module
from lightning.pytorch.cli import LightningCLI
model, data = (getattr(import_module(name), cls) for name, cls in (pair.split(":") for pair in {classes!r}.split(",")))
LightningCLI(model, data)
"""


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Elapsed and processor time of a command that must succeed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    elapsed, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command (default: 5)")
    runs = parser.parse_args(arguments).runs
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    rows = [["command", "bare", "ours", "more", "CPU bare", "ours", "more"]]
    for name, classes, ours, bare in CASES:
        tools = (
            [sys.executable, "-c", BARE.format(classes=classes), *bare],
            [sys.executable, "-m", "lightning_lance", *ours],
        )
        for command in tools:  # compiles and caches
            seconds(command)
        found = [[seconds(command) for command in tools] for _ in range(runs)]
        row = [name]
        for kind in (0, 1):
            before, after = (statistics.median(pair[tool][kind] for pair in found) for tool in (0, 1))
            row += [f"{before:.2f} s", f"{after:.2f} s", f"{after - before:+.2f} s"]
        rows.append(row)
    show("start-up, medians of elapsed and of processor time", rows, "bare: LightningCLI; ours: lightning-lance")


if __name__ == "__main__":
    main()
