"""Which settings fit into a number of bytes: each one measured on the user's model and batch, in its own process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lance.compression.report import plain_table
from lightning_lance.errors import ConfigError
from lightning_lance.tensors.units import format_bytes
from lightning_lance.trainer.callback import LanceCallback

STEPS = 4
"""Optimiser steps of a measurement: one that defines subspaces, one that is counted, two that are timed."""

RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed memory back, so that the peak is that of what is in use."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        parts: micro-batches that a batch is cut into.
        bits: as of :class:`~lightning_lance.LanceConfig`; 32: training without LANCE.
        rank: likewise.
    """

    parts: int
    bits: int
    rank: str | None = None

    @property
    def plain(self) -> bool:
        """Whether this is training without LANCE."""
        return self.bits == 32


@dataclass(frozen=True)
class Measured:
    """What a setting needs.

    Attributes:
        setting: the setting.
        kept: bytes that autograd keeps of one (micro-)batch; ``None`` for plain training.
        kept_plain: what plain training would keep of it.
        peak: bytes of the process, or of the accelerator, at its highest, above what it holds with model and data.
        seconds: median time of a step of the whole batch.
        failed: why there is nothing to tell; ``None`` where it ran.
    """

    setting: Setting
    kept: int | None = None
    kept_plain: int | None = None
    peak: int = 0
    seconds: float = 0.0
    failed: str | None = None


def settings(model: torch.nn.Module, automatic: bool = True) -> list[Setting]:
    """What to measure: with everything trainable, projecting is not for this model; hand-made steps are not cut."""
    fine_tuned = any(not parameter.requires_grad for parameter in model.parameters())
    ways: list[tuple[int, str | None]] = [(32, None), (4, None), (2, None), *([(4, "compact")] if fine_tuned else [])]
    return [Setting(parts, bits, rank) for parts in ((1, 2, 4) if automatic else (1,)) for bits, rank in ways]


def fit(arguments: Sequence[str], model: pl.LightningModule, budget: int, seconds: float) -> list[Measured]:
    """Measure one setting after another, and print which fit, the fastest first.

    Args:
        arguments: those of the command line, from the subcommand on.
        model: the model.
        budget: bytes that the peak may have.
        seconds: after so long no further setting is begun.

    Returns:
        What was measured, the fastest first; what failed last.
    """
    asked = settings(model, model.automatic_optimization)
    end, found = time.monotonic() + seconds, list[Measured]()
    for index, setting in enumerate(asked):
        if time.monotonic() > end and found:
            break
        sys.stderr.write(f"{index + 1} of {len(asked)}: {_words(setting)}\n")
        sys.stderr.flush()
        found.append(_in_own_process(arguments, setting))
        if found[0].failed is not None:
            raise ConfigError(f"the model does not train: {found[0].failed}")
    plainly = {one.setting.parts: one.kept_plain for one in found if one.kept_plain is not None}
    found.sort(key=lambda one: (one.failed is not None, one.seconds))
    print(_table(found, plainly, budget))  # noqa: T201 - what the command is for
    if len(found) < len(asked):
        print(f"{len(asked) - len(found)} more were not measured within {seconds:.0f} s; --seconds gives more time.")  # noqa: T201
    return found


def _words(setting: Setting) -> str:
    how = "plain" if setting.plain else f"bits={setting.bits}"
    rank = "" if setting.rank is None else f', rank="{setting.rank}"'
    return f"{how}{rank}, {'whole batches' if setting.parts == 1 else f'batches in {setting.parts} parts'}"


def _table(found: list[Measured], plainly: dict[int, int], budget: int) -> str:
    rows = []
    for one in found:
        setting = one.setting
        kept = plainly.get(setting.parts) if setting.plain else one.kept
        row = ["-" if setting.plain else str(setting.bits), setting.rank or "-", f"1/{setting.parts}"]
        if one.failed is not None:
            rows.append(["no", *row, "-", "-", one.failed[:40]])
            continue
        fits = "yes" if one.peak <= budget else "no"
        rows.append(
            [fits, *row, "-" if kept is None else format_bytes(kept), format_bytes(one.peak), f"{one.seconds:.3f} s"]
        )
    return plain_table([f"fits {format_bytes(budget)}", "bits", "rank", "micro-batch", "kept", "peak", "step"], rows)


def _in_own_process(arguments: Sequence[str], setting: Setting) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "measured.json")
        given = json.dumps({"arguments": list(arguments), "setting": asdict(setting), "told": str(told)})
        command = [sys.executable, "-m", "lightning_lance.cli.fitting", given]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, **RETURNING, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if told.exists():
            return Measured(**{**json.loads(told.read_text(encoding="utf-8")), "setting": setting})
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Measured(setting, failed=f"ended with {done.returncode}: {last}")


class _Cut:
    """A loader whose batches are cut into parts."""

    def __init__(self, loader: Any, parts: int) -> None:
        self.loader, self.parts = loader, parts

    def __len__(self) -> int:
        return len(self.loader) * self.parts

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            sizes = {leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
            if len(sizes) != 1 or min(sizes) < self.parts:
                raise ConfigError(f"batches of tensors of sizes {sorted(sizes)} cannot be cut in {self.parts} parts")
            bounds = [part * min(sizes) // self.parts for part in range(self.parts + 1)]
            for part in range(self.parts):
                rows = slice(bounds[part], bounds[part + 1])
                # Copies: a view would keep the whole batch alive.
                yield tree_map(
                    lambda leaf, rows=rows: leaf[rows].clone() if isinstance(leaf, Tensor) and leaf.dim() else leaf,
                    batch,
                )


class Steps(Callback):
    """Times the steps of the optimiser.

    Args:
        batches: (micro-)batches of each.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.seconds: list[float] = []
        self._seen = 0
        self._begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if self._seen % self.batches == 0:
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._seen += 1
        if self._seen % self.batches == 0:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._begun)


def measure(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule | None, setting: Setting
) -> Measured:
    """Train a few steps in a setting, in this process.

    Args:
        trainer: of few batches, with a :class:`~lightning_lance.LanceCallback` in the bits and with the rank of it.
        model: the model.
        datamodule: its data; the model's own ``train_dataloader`` by default.
        setting: the setting.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    [lance] = [callback for callback in callbacks if isinstance(callback, LanceCallback)]
    if setting.plain:
        callbacks.remove(lance)
    if setting.parts > 1:
        source: Any = model if datamodule is None else datamodule
        whole = source.train_dataloader
        source.train_dataloader = lambda: _Cut(whole(), setting.parts)
        trainer.accumulate_grad_batches *= setting.parts
    steps = Steps(trainer.accumulate_grad_batches)
    callbacks.append(steps)
    cuda = trainer.strategy.root_device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    trainer.fit(model, datamodule=datamodule)
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    report = None if setting.plain else lance.report
    kept = None if report is None or report.compressed is None else report.compressed.total
    plain = None if report is None or report.plain is None else report.plain.total
    return Measured(setting, kept, plain, max(peak - idle, 0), statistics.median(steps.seconds[-2:]))


def _resident(name: str) -> int:
    """``VmRSS``, bytes of memory in use, or ``VmHWM``, the most so far since it was last asked for the former."""
    if not Path("/proc/self/status").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if name == "VmRSS":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest is the present one
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _child(text: str) -> None:
    """The process of one setting."""
    from lightning_lance.cli.app import LanceCLI, LanceTrainer

    given = json.loads(text)
    setting = Setting(**given["setting"])

    class MeasuringTrainer(LanceTrainer):
        @functools.wraps(LanceTrainer.profile)
        def profile(self, model: Any, datamodule: Any = None, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            found = measure(self, model, datamodule, setting)
            Path(given["told"]).write_text(json.dumps({**asdict(found), "setting": None}), encoding="utf-8")

    class MeasuringCLI(LanceCLI):
        trainer_type = MeasuringTrainer

        def profiled_batches(self) -> int:
            accumulated = self._get(self.config, "trainer")["accumulate_grad_batches"] or 1
            return int(STEPS * setting.parts * accumulated)

    sys.argv[1:] = []
    own = {"bits": 4 if setting.plain else setting.bits, "rank": setting.rank or "null", "calibration_batches": 1}
    flags = [
        f"--lance.{name}={value}"
        for name, value in {**own, "preset": "null", "memory_budget": "null", "verbose": "false"}.items()
    ]
    MeasuringCLI([*given["arguments"], *flags])


if __name__ == "__main__":
    _child(sys.argv[1])
