"""Small streams and their runs, in functions that a fresh process can import."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
    ni_benchmark,
    task_incremental_benchmark,
    tensors_benchmark,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_lance import ContinualCallback, LanceCallback
from lightning_lance.streams.datamodule import AvalancheDataModule
from lightning_lance.streams.module import ContinualClassifier
from lightning_lance.streams.runner import StreamRunner

WIDTH, CLASSES, EXPERIENCES = 12, 6, 3


def points(per_class: int, seed: int, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    """Noisy points around a centre for each class."""
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    values = centres[labels] + noise * torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))
    return values, labels


class Points(Dataset[tuple[Tensor, int]]):
    """Points as a plain dataset with targets, optionally with noise drawn anew each time."""

    def __init__(self, per_class: int, seed: int, augment: bool = False) -> None:
        self.values, labels = points(per_class, seed)
        self.targets = labels.tolist()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        value = self.values[index]
        return value + torch.randn(WIDTH) * 0.2 if self.augment else value, self.targets[index]


def new_classes(augment: bool = False) -> Any:
    """Two classes per experience, one task label for all."""
    return nc_benchmark(Points(16, 1, augment), Points(6, 2), n_experiences=EXPERIENCES, task_labels=False, seed=0)


def tasks(augment: bool = False) -> Any:
    """Two classes per experience, each experience a task."""
    return nc_benchmark(
        Points(16, 1, augment),
        Points(6, 2),
        n_experiences=EXPERIENCES,
        task_labels=True,
        seed=0,
        class_ids_from_zero_in_each_exp=True,
    )


def new_instances() -> Any:
    """All classes in each experience, and one test set."""
    return ni_benchmark(Points(16, 1), Points(6, 2), n_experiences=EXPERIENCES, seed=0)


def class_incremental() -> Any:
    train, test = (as_classification_dataset(Points(count, seed)) for count, seed in ((16, 1), (6, 2)))
    return class_incremental_benchmark({"train": train, "test": test}, num_experiences=EXPERIENCES)


def task_incremental() -> Any:
    return task_incremental_benchmark(class_incremental(), reset_task_labels=True)


def custom() -> Any:
    """Datasets of the user's own, without task labels."""

    def parts(count: int, seed: int) -> list[Any]:
        values, labels = points(count, seed)
        keep = [labels % EXPERIENCES == index for index in range(EXPERIENCES)]
        found = [TensorDataset(values[mask], labels[mask]) for mask in keep]
        return [as_classification_dataset(_with_targets(data)) for data in found]

    return benchmark_from_datasets(train=parts(16, 1), test=parts(6, 2))


def _with_targets(data: TensorDataset) -> Any:
    data.targets = data.tensors[1].tolist()  # type: ignore[attr-defined]
    return data


def tensors() -> Any:
    """From tensors, labelled by task."""
    train, test = points(16, 1), points(6, 2)
    keep = [train[1] % EXPERIENCES == index for index in range(EXPERIENCES)]
    keep_test = [test[1] % EXPERIENCES == index for index in range(EXPERIENCES)]
    return tensors_benchmark(
        train_tensors=[(train[0][mask], train[1][mask]) for mask in keep],
        test_tensors=[(test[0][mask], test[1][mask]) for mask in keep_test],
        task_labels=list(range(EXPERIENCES)),
    )


def shuffled() -> Any:
    """The same classes with the inputs in another order in each experience."""
    orders = [torch.randperm(WIDTH, generator=torch.Generator().manual_seed(index)) for index in range(EXPERIENCES)]
    train, test = points(12, 1), points(6, 2)
    return tensors_benchmark(
        train_tensors=[(train[0][:, order], train[1]) for order in orders],
        test_tensors=[(test[0][:, order], test[1]) for order in orders],
        task_labels=list(range(EXPERIENCES)),
    )


BENCHMARKS: dict[str, Callable[[], Any]] = {
    "nc": new_classes,
    "nc with tasks": tasks,
    "ni": new_instances,
    "class-incremental": class_incremental,
    "task-incremental": task_incremental,
    "custom": custom,
    "tensors": tensors,
}
LARGER: dict[str, Callable[[], Any]] = {"shuffled": shuffled}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )


class Growing(nn.Module):
    """A network whose single head grows with the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = network()[:-1]
        self.head = IncrementalClassifier(16, masking=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs))


class OwnModule(pl.LightningModule):
    """A user's own module: task labels in `forward`, an adaptive optimiser and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = network()[:-1]
        self.heads = nn.ModuleList(nn.Linear(16, CLASSES) for _ in range(EXPERIENCES))
        self.seen: list[int] = []

    def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
        features = self.trunk(inputs)
        outputs = torch.stack([head(features) for head in self.heads], 1)
        return outputs[torch.arange(len(outputs)), task_labels]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, classes, task_labels = batch
        self.seen += task_labels.unique().tolist()
        loss = F.cross_entropy(self(inputs, task_labels), classes)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        return [optimizer], [schedule]


def single_head() -> pl.LightningModule:
    return ContinualClassifier(network())


def growing_head() -> pl.LightningModule:
    return ContinualClassifier(Growing())


def task_heads() -> pl.LightningModule:
    return ContinualClassifier(
        network(),
        task_heads="5",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )


MODELS: dict[str, Callable[[], pl.LightningModule]] = {
    "single": single_head,
    "growing": growing_head,
    "task": task_heads,
    "own": OwnModule,
}


class KillAt(Callback):
    """Ends the process as a power cut would, once: at a batch of an experience."""

    def __init__(self, experience: int, step: int, flag: Path) -> None:
        self.experience, self.step, self.flag = experience, step, flag

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.datamodule.experience == self.experience and trainer.global_step == self.step:
            self.kill()

    def kill(self) -> None:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def runner(
    root: Path,
    model: str = "task",
    benchmark: str = "nc with tasks",
    lance: dict[str, Any] | None = None,
    kills: list[tuple[int, int]] | None = None,
    augment: bool = False,
    num_workers: int = 0,
    continual: bool = False,
    **options: Any,
) -> StreamRunner:
    """A stream of three experiences of 32 samples, two epochs each in batches of 8."""
    torch.set_num_threads(1)
    pl.seed_everything(3, verbose=False)
    make = (BENCHMARKS | LARGER)[benchmark]
    made = make(augment=True) if augment else make()  # type: ignore[call-arg]
    data = AvalancheDataModule(made, batch_size=8, num_workers=num_workers)
    flags = root.parent / f"{root.name} flags"
    flags.mkdir(exist_ok=True, parents=True)
    trainer = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
    trainer |= options.pop("trainer", {})
    trainer["callbacks"] = [KillAt(*kill, flags / f"{kill[0]}-{kill[1]}") for kill in kills or ()]
    kind = ContinualCallback if continual else LanceCallback
    callback = None if lance is None else kind(calibration_batches=2, verbose=False, **lance)
    return StreamRunner(MODELS[model](), data, root, trainer, callback, checkpoint_every=2, progress=False, **options)


def run(root: Path, **options: Any) -> None:
    """Run a stream in a process of its own, killed where it is to be killed."""
    # Workers of loaders are forked, as in a process that a user starts; a fork server would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    runner(root, **options).run()


EVENTS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}
"""Operations on files that Python reports before they happen, and which of their arguments is the file."""


def at_each_write(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call a function before each operation below a folder that may change something there, from now on.

    Args:
        folder: what is below it counts.
        act: given the number of the operation, from 0, and what it is.
    """
    seen, top = [0], os.path.abspath(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(args[EVENTS[event]], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(args[EVENTS[event]]))
        if path != top and not path.startswith(top + os.sep):
            return
        if event == "open" and args[1] in ("r", "rb") and not os.path.isdir(path):  # a folder is opened to be synced
            return
        seen[0] += 1
        act(seen[0] - 1, f"{event} {os.path.relpath(path, top)}")

    sys.addaudithook(hook)


def run_until(root: Path, at: int, **options: Any) -> None:
    """Run a stream in a process of its own, ended as by a power cut before an operation on its files."""

    def act(number: int, what: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_write(root, act)
    run(root, **options)


def run_listed(root: Path, target: Path, **options: Any) -> None:
    """Run a stream in a process of its own, and write down the operations on its files."""
    done: list[str] = []
    at_each_write(root, lambda number, what: done.append(what))
    run(root, **options)
    target.write_text("\n".join(done))


def final(root: Path) -> dict[str, Any]:
    """Everything that a finished stream has left: weights, counts and results."""
    last = torch.load(root / f"experience_{EXPERIENCES - 1:03d}.ckpt", weights_only=True)
    return {
        "weights": last["state_dict"],
        "correct": last["stream"]["correct"],
        "total": last["stream"]["total"],
        "lance": last["stream"]["lance"],
        "results": json.loads((root / "results.json").read_text()),
    }


class Count(Callback):
    """Samples of each epoch."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: Any) -> Count:
        return self

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seen.append(0)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen[-1] += len(batch[0])


def two_processes(root: Path) -> None:
    """A continual stream on two processes; each writes what it has."""
    trainer = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    done = runner(root, "task", lance={"threshold": 0.8}, continual=True, trainer=trainer)
    seen: list[int] = []
    done.options["callbacks"] = [Count(seen)]
    done.run()
    assert isinstance(done.lance, ContinualCallback)
    found = {
        "stream": done.lance.stream.state_dict(),
        "weights": done.model.state_dict(),
        "correct": done.metrics.correct,
        "total": done.metrics.total,
        "seen": seen,
    }
    torch.save(found, root.parent / f"rank {os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
