"""Fine-tune an ImageNet network on handwritten digits, plainly and with LANCE, and compare.

    python -m examples.finetune_digits
    python -m examples.finetune_digits --epochs 6 --seeds 0,1,2 --variant plain,lance,published --json runs.json

EfficientNet-Lite0 with its ImageNet weights learns 4,000 MNIST images at 112 pixels: its pointwise convolutions, all or
the last ones, and a new classifier are trained, the rest and all batch norms are frozen. Each run has a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from examples.data.mnist import CLASSES, DigitsDataModule
from examples.models.efficientnet_lite0 import efficientnet_lite0


def plain() -> list[Callback]:
    """Back-propagation as it is."""
    return []


def lance() -> list[Callback]:
    """LANCE with its defaults."""
    from lightning_lance import LanceCallback

    return [LanceCallback(verbose=False)]


def compact() -> list[Callback]:
    """LANCE with inputs that are projected as well as rounded."""
    from lightning_lance import LanceCallback

    return [LanceCallback(rank="compact", verbose=False)]


def published() -> list[Callback]:
    """The method of the paper."""
    from lightning_lance import LanceCallback

    return [LanceCallback(preset="published", verbose=False)]


# By default the C library of Linux gives large blocks back to the system whenever they are freed, and gets them again
# page by page: a third of the time of a step here. Other systems ignore these.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "plain": plain,
    "lance": lance,
    "compact": compact,
    "published": published,
}


class DigitsClassifier(L.LightningModule):
    """EfficientNet-Lite0 whose pointwise convolutions, from the output, and classifier are trained.

    Args:
        last: number of pointwise convolutions to train, counted from the output.
        learning_rate: of SGD without momentum, annealed to zero by a cosine over the run.
    """

    def __init__(self, last: int = 4, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = efficientnet_lite0(pretrained=True, num_classes=CLASSES, drop_rate=0.0)
        self.model.requires_grad_(False)
        for layer in self.trained_layers().values():
            layer.requires_grad_(True)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.train()  # Lightning trains in the modes that it finds: batch norms must be in eval mode from the start

    def trained_layers(self) -> dict[str, nn.Module]:
        """The last pointwise convolutions and the classifier, by name."""
        pointwise = self.model.pointwise()
        wanted = [*pointwise[max(len(pointwise) - self.hparams["last"], 0) :], self.model.classifier]
        return {name: module for name, module in self.named_modules() if any(module is layer for layer in wanted)}

    def train(self, mode: bool = True) -> DigitsClassifier:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # frozen: neither its statistics nor its affine parameters are trained
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    validation_step = test_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.hparams["learning_rate"])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Run:
    """What one run measured.

    Attributes:
        variant: key of `VARIANTS`.
        seed: of the classifier's first weights and the order of the samples.
        settings: the command-line options that shape the run.
        accuracy: on the test images.
        kept_bytes: bytes of all that autograd keeps for the backward pass of one batch, measured.
        inputs: for each trained layer, bytes of its input.
        kept_inputs: for each trained layer, bytes kept of its input: measured with LANCE, all of it without.
        cores: for each layer whose input is projected, shape of what is kept of it.
        peak_bytes: peak memory while training, above that of the process with model and data loaded.
        step_seconds: median time of a training step.
        fit_seconds: time of the whole fit.
        device: where it ran.
        torch: version of torch.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    accuracy: float
    kept_bytes: int
    inputs: dict[str, int]
    kept_inputs: dict[str, int]
    cores: dict[str, list[int]]
    peak_bytes: int
    step_seconds: float
    fit_seconds: float
    device: str
    torch: str


class Meter(Callback):
    """Measures memory and time of a fit, and what plain training keeps. Goes last."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.fit_seconds = 0.0
        self.peak_bytes = 0
        self.kept_bytes = 0
        self.inputs: dict[str, int] = {}
        self._idle = 0
        self._fit_start = self._step_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._idle = reset_peak(pl_module.device)
        self._fit_start = self._step_start = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self._step_start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from lightning_lance import measure_saved_bytes

        self.fit_seconds = time.perf_counter() - self._fit_start
        self.peak_bytes = peak(pl_module.device) - self._idle
        data: DigitsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        batch = [tensor.to(pl_module.device) for tensor in next(iter(data.loader("train")))]
        images, labels = data.on_after_batch_transfer((batch[0], batch[1]), 0)
        assert isinstance(pl_module, DigitsClassifier)
        self.inputs = input_bytes(pl_module, images)
        pl_module.train()
        saved = measure_saved_bytes(lambda: F.cross_entropy(pl_module(images), labels), module=pl_module)
        self.kept_bytes = saved.total


def input_bytes(module: DigitsClassifier, images: Tensor) -> dict[str, int]:
    """Bytes of the input of each trained layer for one batch."""
    found: dict[str, int] = {}
    hooks = []
    for name, layer in module.trained_layers().items():

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = inputs[0].numel() * inputs[0].element_size()

        hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return found


def reset_peak(device: torch.device) -> int:
    """Begin to measure peak memory: bytes in use now, of the process or of the accelerator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak so far is the baseline
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is in use now
    return peak(device)


def peak(device: torch.device) -> int:
    """Peak memory since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(options: argparse.Namespace) -> Run:
    """One run, in this process."""
    quiet = (".*does not have many workers", "Total length of `list` across ranks is zero", ".*LeafSpec")
    for message in (*quiet, "Found .* in eval mode"):  # frozen batch norms are meant to be
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seed = options.seeds[0]
    L.seed_everything(seed, verbose=False)
    module = DigitsClassifier(options.last, options.learning_rate)
    data = DigitsDataModule(options.image_size, options.batch_size)
    meter = Meter()
    callbacks = VARIANTS[options.worker]()
    with tempfile.TemporaryDirectory() as root:
        trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=1,
            max_epochs=options.epochs,
            limit_train_batches=options.batches,
            limit_test_batches=options.batches,
            gradient_clip_val=2.0,
            callbacks=[*callbacks, meter],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(module, data)
        metrics = trainer.test(module, data, verbose=False)
    kept, kept_bytes = dict(meter.inputs), meter.kept_bytes
    cores: dict[str, list[int]] = {}
    for callback in callbacks:
        report = getattr(callback, "report", None)
        if report is not None:
            by_module = report.compressed.by_module()
            kept, kept_bytes = {name: by_module.get(name, 0) for name in kept}, report.compressed.total
            cores = {layer.name: list(layer.core_shape) for layer in report.layers}
    settings = ("epochs", "last", "image_size", "batch_size", "learning_rate", "batches")
    return Run(
        variant=options.worker,
        seed=seed,
        settings={name: getattr(options, name) for name in settings},
        accuracy=metrics[0]["accuracy"],
        kept_bytes=kept_bytes,
        inputs=meter.inputs,
        kept_inputs=kept,
        cores=cores,
        peak_bytes=meter.peak_bytes,
        step_seconds=statistics.median(meter.step_seconds),
        fit_seconds=meter.fit_seconds,
        device=str(trainer.strategy.root_device),
        torch=torch.__version__,
    )


def in_own_process(variant: str, seed: int, options: argparse.Namespace) -> Run:
    """One run in a process of its own, whose progress bars appear here."""
    with tempfile.TemporaryDirectory() as root:
        result = Path(root, "run.json")
        command = [sys.executable, "-m", "examples.finetune_digits", "--worker", variant, "--seeds", str(seed)]
        for name in ("epochs", "last", "image_size", "batch_size", "learning_rate", "batches", "accelerator"):
            value = getattr(options, name)
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        root_of_examples = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root_of_examples), os.environ.get("PYTHONPATH")]))
        environment = {**ALLOCATOR, **os.environ, "PYTHONPATH": path}
        subprocess.run([*command, "--json", str(result)], check=True, env=environment)
        [run] = json.loads(result.read_text(encoding="utf-8"))
    return Run(**run)


def run_all(options: argparse.Namespace) -> list[Run]:
    """Every variant with every seed, one after the other."""
    runs = []
    for variant in options.variant:
        for seed in options.seeds:
            print(f"\n{variant}, seed {seed}: {options.epochs} epochs", flush=True)
            runs.append(in_own_process(variant, seed, options))
    return runs


def mean_std(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the sample standard deviation where there are several values."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def size(count: float) -> str:
    """Bytes as text, in decimal units."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"


def times(before: float, after: float) -> str:
    """How many times less, as text."""
    return f"{before / max(after, 1):.3g}x"


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each variant, in the order of first appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return found


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Header and rows; memory and time are medians over the seeds, peak memory that above the idle process."""
    groups = by_variant(runs)

    def median(group: list[Run], name: str) -> float:
        return statistics.median(getattr(run, name) for run in group)

    def with_ratio(group: list[Run], name: str) -> str:
        text = size(median(group, name))
        if "plain" not in groups or group is groups["plain"]:
            return text
        return f"{text} ({times(median(groups['plain'], name), median(group, name))})"

    header = ["variant", "accuracy", "autograd keeps", "peak memory", "s/step"]
    rows = [
        [
            variant,
            mean_std([run.accuracy for run in group]),
            with_ratio(group, "kept_bytes"),
            size(median(group, "peak_bytes")),
            f"{median(group, 'step_seconds'):.3f}",
        ]
        for variant, group in groups.items()
    ]
    return [header, *rows]


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    header, *body = rows
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        print(title)
        for row in (header, ["-" * width for width in widths], *body):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        drawn.add_column(column, justify="right" if index else "left")
    for row in body:
        drawn.add_row(*row)
    Console().print(drawn)


def write(path: Path, runs: Sequence[Run]) -> None:
    """Write the runs as a JSON list."""
    path.write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def variants(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in VARIANTS:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(VARIANTS)}")
        return names

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    result = argparse.ArgumentParser(
        description="Fine-tune EfficientNet-Lite0 on 4,000 MNIST images with and without LANCE.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--variant", type=variants, default="plain,lance", help=f"from {', '.join(VARIANTS)}")
    result.add_argument("--seeds", type=integers, default="0", help="one run of each variant for each")
    result.add_argument("--epochs", type=int, default=2)
    result.add_argument("--last", type=int, default=32, help="pointwise convolutions to train; 32 are all")
    result.add_argument("--image-size", type=int, default=112)
    result.add_argument("--batch-size", type=int, default=64)
    result.add_argument("--learning-rate", type=float, default=0.05)
    result.add_argument("--batches", type=int, help="at most so many training and test batches, to try things out")
    result.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    result.add_argument("--json", type=Path, help="also write all that was measured")
    result.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parser().parse_args(arguments)
    if options.worker is not None:
        write(options.json, [work(options)])
        return
    runs = run_all(options)
    show(f"{options.epochs} epochs, {options.last} pointwise convolutions and the classifier trained", table(runs))
    if options.json is not None:
        write(options.json, runs)


if __name__ == "__main__":
    main()
