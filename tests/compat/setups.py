"""The training setups of the compatibility table, on ResNet-18: how to make the module, the loader and the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from tests.compat.networks import CLASSES, Case, UNet
from tests.compat.rows import Task

Batches = Callable[..., DataLoader[Any]]
"""Makes a loader of a few batches; takes the options of :class:`~torch.utils.data.DataLoader`."""


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None, num_classes=CLASSES)


CASE = Case(resnet, (3, 32, 32))


class Stream(IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return (self.dataset[index] for index in range(len(self.dataset)))


class ManualTask(Task):
    """Manual optimisation with a scheduler, clipping and accumulation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 1.0, "norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[union-attr, call-arg]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Gan(Task):
    """Two networks, two optimisers, toggled in turn."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.generator = UNet()
        self.paint = nn.Conv2d(CLASSES, 3, 1)

    def generate(self, x: Tensor) -> Tensor:
        generator = self.generator
        first = generator.down1(x)
        merged = generator.merge(torch.cat([generator.up(generator.down2(first)), first], 1))
        return self.paint(generator.out(merged))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        first, second = self.optimizers()  # type: ignore[misc, union-attr]
        with first.toggle_model():
            loss = -F.cross_entropy(self.net(self.generate(x)), y)
            self.manual_backward(loss)
            first.step()
            first.zero_grad()
        self.toggle_optimizer(second)
        loss = F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(self.generate(x).detach()), y)
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        painters = [*self.generator.parameters(), *self.paint.parameters()]
        return torch.optim.SGD(painters, lr=1e-4), torch.optim.SGD(self.net.parameters(), lr=1e-4)


class Checkpointed(nn.Module):
    """Recomputes two of its stages in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = resnet()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        x = checkpoint(body.layer1, x, use_reentrant=self.reentrant)
        x = checkpoint(body.layer2, x, use_reentrant=self.reentrant)
        return body.fc(body.avgpool(body.layer4(body.layer3(x))).flatten(1))


class ChannelsLast(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].contiguous(memory_format=torch.channels_last), batch[1]], batch_idx)


class WithBackbone(Task):
    """What BackboneFinetuning asks for: a backbone, and a head that trains first."""

    def __init__(self) -> None:
        net = resnet()
        head = net.fc
        net.fc = nn.Identity()
        super().__init__(nn.Identity())
        self.backbone, self.head = net, nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        del head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


class Schedule(Task):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)]


class SelfDistilled(Task):
    """The network is called twice in one step, once without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self(batch[0]).softmax(1)
        return F.cross_entropy(self(batch[0]), target)


def channels_last() -> Task:
    return ChannelsLast(resnet().to(memory_format=torch.channels_last))


def ema(**options: Any) -> Callback:
    return callbacks.EMAWeightAveraging(decay=0.9, update_every_n_steps=1, **options)


@dataclass(frozen=True)
class Setup:
    """One training setup.

    Attributes:
        make: makes the LightningModule, or what stands for it in ``trainer.fit``.
        loader: makes the training loader, from a function that makes a plain one.
        val: makes the validation loader, in the same way.
        callbacks: makes the callbacks that stand before ours.
        later: makes those after ours.
        options: of the Trainer.
        note: the stated limit, if there is one.
        slow: whether it takes more than a few seconds.
        timed: whether its steps are timed: those of a setup that only changes how many there are, are not.
        ignore: key of the snapshot that the setup itself changes.
        layers: names of layers that must be projected where anything is.
    """

    make: Callable[[], Any] = lambda: Task(resnet())
    loader: Callable[[Batches], Any] = lambda batches: batches()
    val: Callable[[Batches], Any] = lambda batches: None
    callbacks: Callable[[], list[Callback]] = list
    later: Callable[[], list[Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    slow: bool = False
    timed: bool = True
    ignore: str = ""
    layers: tuple[str, ...] = ()


SEGMENTS = "a checkpointed segment keeps its inputs whole"
COMPILED = "a compiled graph says what it saves, and nothing of that is computed from the rest of it"


def validated(batches: Batches) -> Any:
    return batches(steps=1)


def compiled_network() -> Task:
    module = Task(resnet())
    module.net.compile(backend="aot_eager")
    return module


def compiled_stage() -> Task:
    module = Task(resnet())
    module.net.layer3 = torch.compile(module.net.layer3, backend="aot_eager")
    return module


class CompileLate(Callback):
    """Compiles the network after our callback has begun."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.compile(backend="aot_eager")


SETUPS: dict[str, Setup] = {
    "precision 32-true": Setup(),
    "precision bf16-mixed": Setup(
        options={"precision": "bf16-mixed"}, note="22 MB of both are the copies of the weights that autocast makes"
    ),
    "precision bf16-true": Setup(
        options={"precision": "bf16-true"}, note="plain training keeps 16 bits of a number too"
    ),
    "precision 64-true": Setup(options={"precision": "64-true"}),
    "accumulate_grad_batches": Setup(options={"accumulate_grad_batches": 2}),
    "GradientAccumulationScheduler": Setup(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]),
    "gradient clipping by norm": Setup(options={"gradient_clip_val": 0.5}),
    "gradient clipping by value": Setup(options={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "AdamW and OneCycleLR": Setup(make=lambda: Schedule(resnet())),
    "manual optimisation": Setup(make=lambda: ManualTask(resnet())),
    "two optimisers (GAN)": Setup(
        make=lambda: Gan(resnet()),
        layers=("generator.down2.0", "paint", "net.layer4.1.conv2"),
    ),
    "a pass without gradients in the step": Setup(make=lambda: SelfDistilled(resnet())),
    "SWA": Setup(
        callbacks=lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], options={"max_epochs": 3}, timed=False
    ),
    "EMA": Setup(callbacks=lambda: [ema()], val=validated),
    "EMA with buffers": Setup(callbacks=lambda: [ema(use_buffers=True)], val=validated),
    "early stopping": Setup(
        callbacks=lambda: [EarlyStopping("loss", min_delta=100.0, patience=1)], options={"max_epochs": 9}, timed=False
    ),
    "BackboneFinetuning": Setup(
        make=WithBackbone,
        callbacks=lambda: [BackboneFinetuning(1, backbone_initial_lr=1e-3)],
        layers=("head.0", "backbone.conv1", "backbone.layer4.1.conv2"),
        timed=False,
    ),
    "channels_last": Setup(make=channels_last),
    "activation checkpointing": Setup(make=lambda: Task(Checkpointed(False)), note=SEGMENTS),
    "activation checkpointing, reentrant": Setup(make=lambda: Task(Checkpointed(True)), note=SEGMENTS),
    "torch.compile of the network": Setup(make=compiled_network, slow=True, note=COMPILED),
    "torch.compile of one stage": Setup(make=compiled_stage),
    "torch.compile at the start of training": Setup(
        callbacks=lambda: [CompileLate()], slow=True, ignore="attributes", note=COMPILED
    ),
    "trainer.fit(torch.compile(module))": Setup(
        make=lambda: torch.compile(Task(resnet()), backend="aot_eager"), slow=True, note=COMPILED
    ),
    "IterableDataset": Setup(loader=lambda batches: DataLoader(Stream(batches().dataset), 8), timed=False),
    "persistent workers": Setup(loader=lambda batches: batches(num_workers=1, persistent_workers=True), timed=False),
    "DataLoader generator": Setup(
        loader=lambda batches: batches(shuffle=True, generator=torch.Generator()), timed=False
    ),
    "limit_train_batches": Setup(options={"limit_train_batches": 2}, timed=False),
    "limit_train_batches, IterableDataset": Setup(
        loader=lambda batches: DataLoader(Stream(batches().dataset), 8),
        options={"limit_train_batches": 2},
        timed=False,
    ),
    "overfit_batches": Setup(options={"overfit_batches": 1}, timed=False),
    "max_time": Setup(options={"max_time": timedelta(minutes=5)}, timed=False),
    "max_steps": Setup(options={"max_steps": 4, "max_epochs": -1}, timed=False),
    "validation inside the epoch": Setup(val=validated, options={"val_check_interval": 1}),
    "detect_anomaly": Setup(options={"detect_anomaly": True}),
    "deterministic": Setup(options={"deterministic": True}),
    "inference_mode=False": Setup(val=validated, options={"inference_mode": False}, timed=False),
}

if not hasattr(callbacks, "EMAWeightAveraging"):  # Lightning up to 2.5
    SETUPS = {name: setup for name, setup in SETUPS.items() if not name.startswith("EMA")}
