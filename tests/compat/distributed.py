"""Runs on two processes, in functions that a fresh process can import; each writes what its ranks found to files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

from lightning_lance import LanceConfig, LanceSession, is_swapped
from tests.compat.networks import CLASSES
from tests.compat.rows import Task, lance
from tests.swapped import COMPACT_MODES
from tests.trainers import make_trainer, seeded

WORLD = 2
BATCH = 8
STEPS = 4
WIDTH = 8


def network() -> nn.Module:
    """Small, and without batch statistics: two processes then train what one trains on both their batches."""
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * WIDTH, CLASSES),
    )  # fmt: skip


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 16, 16, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (count,), generator=generator))


class Save(Callback):
    """Weights, subspaces and kept bytes of this rank."""

    def __init__(self, folder: str, callback: Any) -> None:
        self.folder, self.callback = folder, callback
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        report, state = self.callback.report, self.callback.session.state_dict()
        found = {
            "weights": pl_module.state_dict(),
            "subspaces": state["subspaces"],
            "order": state["order"],
            "bytes": [report.plain.total, report.compressed.total],
            "swapped": is_swapped(pl_module),
            "layers": [layer.name for layer in report.layers],
            "batches": self.batches,
        }
        torch.save(found, Path(self.folder) / f"{trainer.global_rank}.pt")


def fit(folder: str, strategy: str, devices: int = WORLD, preset: str | None = None, **options: Any) -> Task:
    """Two epochs; the data is split over the processes by Lightning."""
    torch.set_num_threads(1)
    module = seeded(lambda: Task(network(), lr=0.05))
    options = {"rank": COMPACT_MODES} | options if preset is None else options | {"preset": preset}
    callback = lance(**options)
    loader = DataLoader(images(WORLD * BATCH * STEPS), batch_size=BATCH, shuffle=False)
    trainer = make_trainer([callback, Save(folder, callback)], strategy=strategy, devices=devices)
    trainer.fit(module, loader)
    assert not is_swapped(module)
    return module


def sharded(rank: int, folder: str, port: int) -> None:
    """FSDP2 on two processes, every case of :data:`SHARDED`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {case: train_sharded(rank, mesh, *case) for case in SHARDED}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    leave()


def leave() -> None:
    """End this process, whose results are written.

    Without finalising the interpreter: a thread of a process group that asks for the lock by then aborts the process
    ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"rank": 10_000, "bits": None},
    "compact": {"rank": COMPACT_MODES},
    "default": {},
}
"""Of the session: projections on all of every mode, on some, and none."""

SHARDED = [(options, before) for options in OPTIONS for before in (False, True)]
"""Options, and whether the session starts before the layers are sharded."""


def train_sharded(rank: int, mesh: Any, options: str, before: bool) -> dict[str, Any]:
    """Each process trains on its half of the batch; the shards are gathered for the comparison."""
    from torch.distributed.fsdp import fully_shard

    model = seeded(network)
    session = LanceSession(model, LanceConfig(**OPTIONS[options]))
    if before:
        session.start(observe=False)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    classes = [type(module).__name__ for module in model.modules()]
    if not before:
        session.start(observe=False)
    x, y = (tensor[rank::WORLD] for tensor in images(WORLD * BATCH).tensors)
    session.calibrate([lambda: model(x)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with session.step():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    swapped = is_swapped(model)
    session.stop()
    model(x)
    return {
        "weights": {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()},
        "swapped": swapped,
        "classes": classes,
        "restored": [type(module).__name__ for module in model.modules()],
    }


def plain() -> dict[str, Tensor]:
    """The same steps without compression on one process."""
    model = seeded(network)
    x, y = images(WORLD * BATCH).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    fit(*sys.argv[1:3], preset=sys.argv[3] if len(sys.argv) > 3 else None)
    leave()
