"""Small real LightningModules, loaders and Trainers for the tests of the callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lance import LanceCallback, is_swapped
from tests.swapped import COMPACT_MODES

CLASSES = 5
SIZE = 8


def small_net() -> nn.Sequential:
    """Convolutions, batch norm, ReLU, dropout and a linear layer on 3 x 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class Images(Dataset[tuple[Tensor, Tensor, int]]):
    """Random images that depend on their index alone, and the index itself."""

    def __init__(self, count: int, size: int = SIZE, augment: bool = False) -> None:
        self.count = count
        self.size = size
        self.augment = augment

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, self.size, self.size, generator=generator) + index % CLASSES
        if self.augment:
            image = image + torch.rand(())
        return image, torch.tensor(index % CLASSES), index


class ImageStream(IterableDataset[tuple[Tensor, Tensor, int]]):
    """The same images without a length."""

    def __init__(self, count: int) -> None:
        self.images = Images(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        return (self.images[index] for index in range(len(self.images)))


def loader(count: int = 40, batch_size: int = 8, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(Images(count), batch_size=batch_size, shuffle=shuffle, **options)


class Classifier(pl.LightningModule):
    """Automatic optimisation, a logged loss and an accuracy metric."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.net = small_net() if net is None else net
        self.lr = lr
        self.accuracy = MulticlassAccuracy(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy.update(logits, y)
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr, momentum=0.9)


class Recorder(Callback):
    """The sample indices of every training step, its loss, and which steps ran swapped."""

    def __init__(self) -> None:
        self.samples: list[list[int]] = []
        self.losses: list[float] = []
        self.swapped: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, (list, tuple)) and len(batch) > 2:
            self.samples.append(batch[2].tolist())
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))
        self.swapped.append(is_swapped(pl_module))


def lance(**options: Any) -> LanceCallback:
    """A callback that projects, after few steps, and prints nothing."""
    return LanceCallback(**{"verbose": False, "calibration_batches": 3, "rank": COMPACT_MODES, **options})


def make_trainer(callbacks: Sequence[Callback] = (), **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return pl.Trainer(**{**quiet, **options}, callbacks=list(callbacks))


def fit(
    module: pl.LightningModule,
    callbacks: Sequence[Callback] = (),
    data: Any = None,
    ckpt_path: str | None = None,
    val: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Fit with a fixed seed of the loader's order; returns the Trainer."""
    trainer = make_trainer(callbacks, **options)
    torch.manual_seed(7)
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that must come back after a fit, by name."""
    return {
        "types": {name: type(child) for name, child in module.named_modules()},
        "training": {name: child.training for name, child in module.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in module.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in module.named_buffers()},
        "keys": list(module.state_dict()),
        "hooks": {
            name: (len(child._forward_hooks), len(child._forward_pre_hooks)) for name, child in module.named_modules()
        },
        "attributes": {
            name: sorted(key for key in vars(child) if not key.startswith(("_trainer", "prepare_data", "_fabric")))
            for name, child in module.named_modules()
            if name
        },
    }


def assert_restored(module: nn.Module, before: dict[str, Any]) -> None:
    assert not is_swapped(module)
    after = snapshot(module)
    for key, value in before.items():
        assert after[key] == value, key
    assert not any("_lance" in vars(child) for child in module.modules())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class EpochLoader:
    """Batches in an order that the epoch alone decides; can be saved and resumed in the middle of an epoch."""

    def __init__(self, count: int = 40, batch_size: int = 8) -> None:
        self.images = Images(count)
        self.batch_size = batch_size
        self.epoch = 0
        self.position = 0
        self._resumed = False
        self.sampler = self  # whose set_epoch the Trainer calls

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self._resumed:
            self.position = 0
        self._resumed = False
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            yield torch.utils.data.default_collate([self.images[i] for i in order[start : start + self.batch_size]])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = self.position < len(self)


class Batches:
    """Given batches, in this order in every epoch; a bare list would be several loaders to Lightning."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Reseed(Callback):
    """Dropout that the number of the batch alone decides, so that a resumed run draws the same."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 + trainer.fit_loop.total_batch_idx)


class SaveAt(Callback):
    """Writes a checkpoint after one step of one fit."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
