"""What a run has measured, as a JSON file: ``lightning-lance results FOLDER`` makes tables of them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from examples.finetune_digits import peak, reset_peak
from lightning_lance import LanceCallback, measure_saved_bytes

PACKAGES = ("lightning-lance", "torch", "torchvision", "lightning", "timm", "avalanche-lib", "numpy")
"""Packages whose versions a record names."""


class RunRecord(Callback):
    """Writes what a run measured to a file: options, versions, accuracy, bytes, floating-point operations, times.

    Bytes, operations and peak memory are those of the first epoch, near whose end a batch is run a few times more for
    them; the accuracy is that of the last one. The module needs a method ``loss(batch)``.

    Args:
        folder: of the files; the subfolder ``records`` of the Trainer's ``default_root_dir`` by default.
        method: name of the method in tables. By default ``"plain"`` without a
            :class:`~lightning_lance.LanceCallback`, otherwise the name of its preset, or ``"lance"``.
        name: of the file, without its suffix; by default made of the image set, the network, the number of trained
            layers, the method and the seed.

    Attributes:
        record: what was written.
    """

    def __init__(self, folder: str | None = None, method: str | None = None, name: str | None = None) -> None:
        self.folder = folder
        self.method = method
        self.name = name
        self.record: dict[str, Any] = {}
        self._seconds: list[float] = []
        self._measured: dict[str, Any] = {}
        self._idle = 0
        self._fit_start = self._step_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measured, self._seconds = {}, []
        self._idle = reset_peak(pl_module.device)
        self._fit_start = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._step_start)
        # Late, when subspaces are there, and before the last batch of the epoch, which may be smaller.
        if not self._measured and batch_idx >= max(trainer.num_training_batches - 2, 0):
            peak_bytes = max(peak(pl_module.device) - self._idle, 0)
            self._measured = {**self._measure(trainer, pl_module, batch), "peak_bytes": peak_bytes}

    def _measure(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, Any]:
        layers = inputs_of_layers(module, batch)
        lance = _lance(trainer)
        report = None if lance is None else lance.report
        found: dict[str, Any] = {"layers": {name: {"input_bytes": size} for name, size in layers.items()}}
        if report is not None:
            for layer in report.layers:
                own = found["layers"].setdefault(layer.name, {"input_bytes": layer.plain_bytes})
                own |= {"formula_bytes": layer.formula_bytes, "core": list(layer.core_shape)}
        with undisturbed(module):
            if report is not None and report.compressed is not None:
                found["kept_bytes"] = report.compressed.total
            else:
                found["kept_bytes"] = measure_saved_bytes(lambda: module.loss(batch), module=module).total  # type: ignore[operator]
            found["flops"] = count_flops(module, batch)
        # By formula: cores and factors of compressed layers, inputs of the others that are trained, not the classifier.
        counted = [layer for name, layer in found["layers"].items() if name != "classifier"]
        found["input_bytes"] = sum(layer["input_bytes"] for layer in counted)
        found["formula_bytes"] = sum(layer.get("formula_bytes", layer["input_bytes"]) for layer in counted)
        return found

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self._measured:
            return
        options, data = dict(pl_module.hparams), getattr(trainer, "datamodule", None)
        accuracy = trainer.callback_metrics.get("accuracy")
        experience = getattr(data, "experience", None)
        method = self.method or _method(_lance(trainer))
        seed = os.environ.get("PL_GLOBAL_SEED")
        self.record = {
            "kind": "finetune" if experience is None else "experience",
            "set": None if data is None else dict(data.hparams).get("name"),
            "network": options.get("network"),
            "last": options.get("last"),
            "method": method,
            "seed": None if seed is None else int(seed),
            "experience": experience,
            "accuracy": None if accuracy is None else float(accuracy),
            **self._measured,
            "step_seconds": statistics.median(self._seconds),
            "fit_seconds": time.perf_counter() - self._fit_start,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "batch_size": _batch_size(trainer),
            "device": _device(pl_module.device),
            "versions": versions(),
            "config": _config(trainer),
        }
        folder = Path(trainer.default_root_dir, "records") if self.folder is None else Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = self.name or (
            f"experience_{experience:03d}"
            if experience is not None
            else "_".join(
                str(part)
                for part in (
                    self.record["set"],
                    self.record["network"],
                    f"last{self.record['last']}",
                    method,
                    f"seed{self.record['seed']}",
                )
            )
        )
        path = folder / (re.sub(r"[^\w.-]+", "-", name) + ".json")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(part, path)


def count_flops(module: L.LightningModule, batch: Any) -> dict[str, int]:
    """Floating-point operations of one training step, as ``torch.utils.flop_counter`` counts them.

    Counted are matrix products, convolutions and attention, 2 for a multiply-add; projecting an input is part of the
    forward pass.

    Args:
        module: with a method ``loss(batch)``, as it trains.
        batch: a batch on its device.

    Returns:
        ``forward``; ``weight_gradient``, all of the backward pass but ``input_gradient``: what it takes to carry the
        gradient from the loss back to the outputs of the first trained layer.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    loss, forward = _counted(lambda: module.loss(batch))  # type: ignore[operator]
    _, backward = _counted(lambda: torch.autograd.grad(loss, trained, allow_unused=True))
    owners = [m for m in module.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    leaf = next(iter(trained)).new_zeros((), requires_grad=True)

    def attach(_: nn.Module, inputs: Any, output: Any) -> Any:
        """The gradient ends at the outputs of the trained layers that come first."""
        return output + leaf if isinstance(output, Tensor) and not output.requires_grad else output

    hooks = [owner.register_forward_hook(attach) for owner in owners]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        loss = module.loss(batch)  # type: ignore[operator]
        _, inputs = _counted(lambda: torch.autograd.grad(loss, [leaf], allow_unused=True))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return {"forward": forward, "weight_gradient": backward - inputs, "input_gradient": inputs}


def _counted(function: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, int(counter.get_total_flops())


@torch.no_grad()
def inputs_of_layers(module: L.LightningModule, batch: Any) -> dict[str, int]:
    """Bytes of the input of each convolution and linear layer whose weight is trained, for one batch."""
    found: dict[str, int] = {}
    hooks = []
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or not layer.weight.requires_grad:
            continue

        def note(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            found[name] = inputs[0].numel() * inputs[0].element_size()

        hooks.append(layer.register_forward_pre_hook(note))
    with undisturbed(module):
        module.loss(batch)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Context whose forward passes leave buffers and the random state as they were."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}


def _lance(trainer: L.Trainer) -> LanceCallback | None:
    return next((found for found in trainer.callbacks if isinstance(found, LanceCallback)), None)  # type: ignore[attr-defined]


def _method(lance: LanceCallback | None) -> str:
    if lance is None:
        return "plain"
    return str(lance.config.preset or "lance")


def _batch_size(trainer: L.Trainer) -> int | None:
    return getattr(trainer.train_dataloader, "batch_size", None)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _config(trainer: L.Trainer) -> dict[str, Any] | None:
    """The options of the command line, where it started the run."""
    saved = next((found for found in trainer.callbacks if isinstance(found, SaveConfigCallback)), None)  # type: ignore[attr-defined]
    return None if saved is None else json.loads(saved.parser.dump(saved.config, format="json", skip_none=False))
