"""What every row of the compatibility table must do, and where its result is written for the table."""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lance import LanceCallback, LanceConfig, LanceSession, Report
from lightning_lance.compression.isolation import isolated
from lightning_lance.compression.report import LITTLE
from tests.compat.networks import CLASSES, Case
from tests.trainers import Recorder, assert_restored, make_trainer, snapshot

RESULTS = os.environ.get("LANCE_COMPATIBILITY")
"""Folder that results are written to, one file each; set by :mod:`tests.compat.table`."""

BATCH = 8
STEPS = 3


class Task(pl.LightningModule):
    """Classify with one network."""

    def __init__(self, net: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def data(case: Case, steps: int = STEPS, batch: int = BATCH, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = case.input(batch * steps), torch.randint(0, CLASSES, (batch * steps,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, **options)


def lance(**options: Any) -> LanceCallback:
    return LanceCallback(**{"verbose": False, "calibration_batches": 2, **options})


def gradient(net: nn.Module, batch: Any, context: AbstractContextManager[Any]) -> Tensor:
    """Gradient of all parameters in training mode, from the same random state; buffers come back."""
    net.train().zero_grad()
    with isolated(net):
        torch.manual_seed(0)
        with context:
            loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def step_of(net: nn.Module, batch: Any, bits: Any) -> tuple[Tensor, Report]:
    """Gradient of one training step with the default options but for the bits, and its report."""
    session = LanceSession(net, LanceConfig(bits=bits))
    session.start()
    found = gradient(net, batch, session.step())
    session.stop()
    assert session.report is not None
    return found, session.report


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def cosines(net: nn.Module, batch: Any) -> dict[str, float]:
    """Cosine to plain training of the gradient with the default bits, with 2, and under autocast to bfloat16.

    With them ``less_2``, so many times less is kept with 2 bits than by plain training.
    """
    plain = gradient(net, batch, nullcontext())
    (auto, _), (two, report) = (step_of(net, batch, bits) for bits in ("auto", 2))
    assert report.ratio is not None
    found = {"cosine_auto": cosine(auto, plain), "less_2": report.ratio, "cosine_2": cosine(two, plain)}
    return {**found, "cosine_bf16": cosine(gradient(net, batch, torch.autocast("cpu", torch.bfloat16)), plain)}


def check_row(
    module: pl.LightningModule,
    loader: Any,
    callbacks: Any = (),
    later: Any = (),
    callback: LanceCallback | None = None,
    val: Any = None,
    ignore: str = "",
    **options: Any,
) -> Report:
    """Fit two epochs; the loss is finite, fewer bytes are kept than by plain training, the model comes back."""
    callback, recorder = callback or lance(), Recorder()
    own = getattr(module, "_orig_mod", module)  # inside of a compiled one
    before = snapshot(own)
    before.pop(ignore, None)
    trainer = make_trainer([*callbacks, callback, *later, recorder], **options)
    trainer.fit(module, loader, val)
    check_fit(own, before, callback, recorder)
    assert callback.report is not None
    return callback.report


def check_fit(module: Any, before: dict[str, Any], callback: LanceCallback, recorder: Recorder) -> None:
    del before["training"], before["buffers"]  # a precision or SWA makes buffers anew
    assert_restored(module, before)
    assert all(math.isfinite(loss) for loss in recorder.losses)
    assert all(recorder.swapped) if callback.config.rules().default.projects else not any(recorder.swapped)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    report = callback.report
    assert report is not None
    assert report.left == [] or report.layers
    assert report.plain is not None
    assert report.compressed is not None
    assert report.compressed.total < report.plain.total or report.plain.total < LITTLE
    for layer in report.layers:
        assert (layer.measured_bytes or 0) <= max(layer.plain_bytes, layer.formula_bytes) * 1.05 + 4096, layer


def write(kind: str, name: str, report: Report | None, note: str = "", **more: Any) -> None:
    """One line of the table."""
    if RESULTS is None:
        return
    row: dict[str, Any] = {"kind": kind, "name": name, "note": note, **more}
    if report is not None and report.plain is not None and report.compressed is not None:
        row |= {
            "plain": report.plain.total,
            "compressed": report.compressed.total,
            "held": report.still_held(2),
        }
    path = Path(RESULTS) / f"{kind}-{''.join(c if c.isalnum() else '_' for c in name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
