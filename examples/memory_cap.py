"""Train under a hard limit of memory: plain training dies of it, the same training with LANCE finishes.

    python -m examples.memory_cap

All pointwise convolutions and the classifier of the ImageNet-pretrained EfficientNet-Lite0 are trained on digits. The
limit is one of the operating system (RLIMIT_AS) on each training process: its address space may grow by so much once
the network is built and its libraries are loaded, and an allocation beyond that fails. No number is built in: both
runs are first measured without a limit, and the limit is put between their two peaks. Where plain training survives
it, or LANCE does not, the limit is moved by bisection. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from examples.benchmarks.table import show, size
from examples.data.mnist import DigitsDataModule
from examples.finetune_digits import DigitsClassifier
from lightning_lance import LanceCallback, freed_memory

VARIANTS = {"plain": "plain", "lance": "with LanceCallback()"}
MEASURED_STEPS = 2
TRIES = 8

# What failing to allocate looks like: torch's allocator, C++, and oneDNN, which cannot make a kernel without scratch.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "could not create", "could not execute")


@dataclass
class Run:
    """One training process.

    Attributes:
        variant: key of `VARIANTS`.
        limit: bytes that the address space was allowed to grow by; `None` without a limit.
        grown: bytes that it grew by at its largest.
        losses: of the steps that were finished.
        error: how it ended, `None` where it finished.
    """

    variant: str
    limit: int | None = None
    grown: int | None = None
    losses: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is None


class Losses(Callback):
    """Notes the loss of every step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.run.losses.append(float(outputs["loss"]))


def address_space(name: str) -> int:
    """`VmSize`, bytes of address space in use, or `VmPeak`, the most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {name}; Linux is needed")


def work(options: argparse.Namespace) -> Run:
    """One run, in this process."""
    import resource

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    L.seed_everything(0, verbose=False)
    run = Run(options.worker, options.limit)
    module = DigitsClassifier(last=options.last, learning_rate=options.learning_rate)
    data = DigitsDataModule(options.image_size, options.batch_size)
    data.setup()  # reading the images takes more than they do
    callbacks: list[Callback] = [Losses(run)]
    if run.variant == "lance":
        callbacks.append(LanceCallback(verbose=False))
    with tempfile.TemporaryDirectory() as root:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=options.steps,
            limit_val_batches=0,
            gradient_clip_val=2.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=root,
        )
        with torch.no_grad():  # loads what the first pass loads, such as the threads and their stacks
            module(torch.zeros(1, 3, options.image_size, options.image_size))
        idle = address_space("VmSize")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if run.limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (idle + run.limit, hard))
        try:
            trainer.fit(module, data)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            run.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no memory'}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        run.grown = address_space("VmPeak") - idle
    return run


def in_own_process(variant: str, limit: int | None, steps: int, options: argparse.Namespace) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "examples.memory_cap", "--worker", variant, "--steps", str(steps)]
    for name in ("batch_size", "image_size", "last", "learning_rate", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if limit is not None:
        command += ["--limit", str(limit)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}  # each would reserve 64 MB of addresses
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as root:
        result = Path(root, "run.json")
        done = subprocess.run([*command, "--json", str(result)], env=environment, capture_output=True, text=True)
        if result.exists():
            return Run(**json.loads(result.read_text(encoding="utf-8")))
    reason = done.stderr.strip().splitlines()[-1:] or [""]
    if limit is None or (done.returncode >= 0 and not any(text in done.stderr for text in OUT_OF_MEMORY)):
        raise RuntimeError(f"{variant} failed for another reason than memory: {done.stderr[-2000:]}")
    return Run(variant, limit, error=f"killed, exit status {done.returncode}: {reason[0]}"[:200])


def search(options: argparse.Namespace) -> list[Run]:
    """Both runs without a limit, then both under one that tells them apart."""
    runs = []
    for variant in VARIANTS:
        print(f"{VARIANTS[variant]}: {MEASURED_STEPS} steps without a limit", file=sys.stderr, flush=True)
        runs.append(in_own_process(variant, None, MEASURED_STEPS, options))
    plain, ours = (run.grown or 0 for run in runs)
    low, high = min(plain, ours), max(plain, ours)
    for _ in range(TRIES):
        limit = (low + high) // 2
        print(f"both under a limit of {size(limit)}: {options.steps} steps", file=sys.stderr, flush=True)
        limited = [in_own_process(variant, limit, options.steps, options) for variant in VARIANTS]
        if limited[0].finished:
            high = limit
        elif not limited[1].finished:
            low = limit
        else:
            return [*runs, *limited]
    raise RuntimeError(f"no limit between {size(ours)} and {size(plain)} tells the two apart: {limited}")


def table(runs: Sequence[Run]) -> list[list[str]]:
    """One line a run."""
    lines = [["training", "limit", "grew by", "steps", "loss", "ended"]]
    for run in runs:
        # Single losses are noisy: the mean of the first four and that of the last four steps.
        losses = f"{fmean(run.losses[:4]):.3f} to {fmean(run.losses[-4:]):.3f}" if len(run.losses) >= 8 else ""
        limit = "none" if run.limit is None else size(run.limit)
        ended = "finished" if run.finished else "died of memory"
        lines.append([VARIANTS[run.variant], limit, size(run.grown), str(len(run.losses)), losses, ended])
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description="Train under a memory limit that plain training does not survive.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--steps", type=int, default=20, help="training steps under the limit")
    result.add_argument("--batch-size", type=int, default=64)
    result.add_argument("--image-size", type=int, default=112)
    result.add_argument("--last", type=int, default=32, help="pointwise convolutions to train, from the output")
    result.add_argument("--learning-rate", type=float, default=0.02)
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--quick", action="store_true", help="small images, few steps")
    result.add_argument("--json", type=Path, help="also write all that was measured")
    result.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    result.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Entry point."""
    options = parser().parse_args(arguments)
    if not sys.platform.startswith("linux"):
        raise SystemExit("This example needs Linux: it limits the address space of processes and reads /proc.")
    if options.worker is not None:
        with freed_memory("returned"):  # both variants; in a heap with holes the limit would hit what is not in use
            run = work(options)
        options.json.write_text(json.dumps(asdict(run)), encoding="utf-8")
        return [run]
    if options.quick:
        options.steps, options.image_size, options.batch_size = 8, 64, 64
    runs = search(options)
    show(f"EfficientNet-Lite0, {options.last} pointwise convolutions, batch {options.batch_size}", table(runs))
    for run in runs:
        if run.error is not None:
            print(f"{VARIANTS[run.variant]}: {run.error}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    return runs


if __name__ == "__main__":
    main()
