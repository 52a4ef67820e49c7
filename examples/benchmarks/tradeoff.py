"""Accuracy against kept bytes, and how the subspaces age: what the default ranks are chosen from.

    python -m examples.benchmarks.tradeoff                     # EfficientNet-Lite0, last 4 pointwise convolutions
    python -m examples.benchmarks.tradeoff --task resnet18     # all convolutions, from scratch
    python -m examples.benchmarks.tradeoff --task deit_tiny    # all linear layers, from scratch

One row a setting, mean over seeds. The weight gradients of every layer that can be projected are compared with
back-propagation's on one batch, at the start and at the end of training.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data.mnist import CLASSES, load_digits, stratified_split, to_network_input
from examples.models.efficientnet_lite0 import efficientnet_lite0
from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes, plan

BATCH = 64

CLIP = 2.0

Step = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes the context of a training step."""


def _cores(bits: int | None, **rank: Any) -> LanceConfig:
    return LanceConfig(rank=rank or None, bits=bits)


SETTINGS: dict[str, LanceConfig | None] = {
    "plain back-propagation": None,
    "default": LanceConfig(),
    "compact": LanceConfig(rank="compact"),
    "published, energy .7": LanceConfig(rank=0.7, batch="learned", bits=None),
    "published, energy .9": LanceConfig(rank=0.9, batch="learned", bits=None),
    "batch 8 projected": LanceConfig(rank={"batch": 8}, batch="projected", bits=None),
    "batch 8": _cores(None, batch=8),
    "batch 4": _cores(None, batch=4),
    "channel .7": _cores(None, channel=0.7),
    "batch 8, channel .9": _cores(None, batch=8, channel=0.9),
    "batch 8, channel .97": _cores(None, batch=8, channel=0.97),
    "batch 8, spatial .9": _cores(None, batch=8, spatial=0.9),
    "batch 8, spatial .7": _cores(None, batch=8, spatial=0.7),
    "batch 4, spatial .9": _cores(None, batch=4, spatial=0.9),
    "spatial .9": _cores(None, spatial=0.9),
    "2 bits": _cores(2),
    "8 bits": _cores(8),
    "spatial .9, 4 bits": _cores(4, spatial=0.9),
    "batch 32, spatial .9, 4 bits": _cores(4, batch=32, spatial=0.9),
    "batch 16, spatial .9, 4 bits": _cores(4, batch=16, spatial=0.9),
    "batch 16, spatial .9, 8 bits": _cores(8, batch=16, spatial=0.9),
    "batch 8, spatial .9, 4 bits": _cores(4, batch=8, spatial=0.9),
    "batch 8, spatial .9, 8 bits": _cores(8, batch=8, spatial=0.9),
    "published, energy .7, refresh": LanceConfig(rank=0.7, batch="learned", bits=None, refresh="epoch"),
    "published, energy .9, refresh": LanceConfig(rank=0.9, batch="learned", bits=None, refresh="epoch"),
}


@dataclass
class Task:
    """A network, what of it is projected, and its data.

    Attributes:
        build: makes the network for a seed, with the trained parameters requiring grad.
        layers: name patterns of the layers that are projected where a setting says so.
        train: inputs and labels.
        test: inputs and labels.
        epochs: default length of a run.
        optimizer: makes the optimiser.
        train_mode: whether norms and dropout train.
    """

    build: Callable[[int], nn.Module]
    layers: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    peak_rate: float
    train_mode: bool


class Tail(nn.Module):
    """What follows the frozen front of EfficientNet-Lite0: its output is computed once and for all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        whole = efficientnet_lite0(pretrained=True, num_classes=CLASSES)
        self.blocks, self.head, self.pool = whole.blocks[14:], whole.head, whole.pool
        self.classifier = whole.classifier
        self.requires_grad_(False)
        for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)][-4:]:
            layer.requires_grad_(True)
        self.classifier.requires_grad_(True)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(features))).flatten(1))


@torch.no_grad()
def lite0() -> Task:
    front = efficientnet_lite0(pretrained=True, num_classes=CLASSES).eval()

    def features(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = split
        found = [front.blocks[:14](front.stem(to_network_input(part, 112))) for part in images.split(BATCH)]
        return torch.cat(found), labels

    train, test = map(features, _digits())
    layers = ["blocks.14.project.0", "blocks.15.expand.0", "blocks.15.project.0", "head.0"]
    return Task(Tail, layers, train, test, 6, lambda p: torch.optim.SGD(p, lr=0.05), 0.05, train_mode=False)


def _digits(size: int | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = load_digits()
    test, train = stratified_split(labels, [0.2], 0)
    inputs = images if size is None else to_network_input(images, size)
    return (inputs[train], labels[train]), (inputs[test], labels[test])


def resnet18() -> Task:
    import torchvision

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return torchvision.models.resnet18(num_classes=CLASSES)

    train, test = _digits(64)
    layers = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    return Task(
        build, layers, train, test, 3, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 0.05, train_mode=True
    )


def deit_tiny() -> Task:
    import timm

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model("deit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=CLASSES)

    train, test = _digits(64)
    return Task(build, ["blocks"], train, test, 4, lambda p: torch.optim.AdamW(p, lr=1e-3), 1e-3, train_mode=True)


TASKS: dict[str, Callable[[], Task]] = {"lite0": lite0, "resnet18": resnet18, "deit_tiny": deit_tiny}


@dataclass
class Run:
    """What one run measured.

    Attributes:
        setting: key of `SETTINGS`.
        seed: of weights, sample order and compression.
        accuracy: on the test images.
        kept: bytes of all that autograd keeps for one batch.
        cosine_start: gradient cosine over all these layers before training.
        cosine_end: the same after it.
        worst_start: that of the worst layer before training.
        worst_end: that of the worst layer after it.
    """

    setting: str
    seed: int
    accuracy: float
    kept: int
    cosine_start: float
    cosine_end: float
    worst_start: float
    worst_end: float


def _gradients(model: nn.Module, names: Sequence[str], loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss().backward()
    found = []
    for name in names:
        grad = model.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        found.append(grad.flatten().clone())
    model.zero_grad(set_to_none=True)
    return found


def cosines(
    names: Sequence[str], model: nn.Module, twin: nn.Module, step: Step, loss: Callable[[nn.Module], Tensor]
) -> tuple[float, float]:
    """Gradient cosine to back-propagation over the named layers, and of the worst one.

    Args:
        names: of the layers.
        model: the network that trains.
        twin: a copy of it as it was built, which gets its weights and trains plainly.
        step: makes the context of a training step.
        loss: of a network.
    """
    from lightning_lance.compression.isolation import isolated

    twin.load_state_dict(model.state_dict())

    def inside() -> Tensor:
        with step():
            return loss(model)

    with isolated(model):
        ours = _gradients(model, names, inside)
    with isolated(twin):
        plain = _gradients(twin, names, lambda: loss(twin))
    each = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(ours, plain, strict=True)]
    return F.cosine_similarity(torch.cat(ours), torch.cat(plain), dim=0).item(), min(each)


def run(task: Task, setting: str, seed: int, epochs: int) -> Run:
    """Train once."""
    config = SETTINGS[setting]
    model = task.build(seed).train(task.train_mode)
    inputs, labels = task.train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = task.optimizer(trained)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.peak_rate, total_steps=steps, cycle_momentum=False)

    def loss(index: Tensor, of: nn.Module = model) -> Tensor:
        return F.cross_entropy(of(inputs[index]), labels[index])

    order = torch.Generator().manual_seed(seed)
    probe = torch.randperm(len(labels), generator=order)[: 9 * BATCH].split(BATCH)
    names = [entry.name for entry in plan(model, LanceConfig(rank="compact", layers=task.layers)).entries]
    twin = copy.deepcopy(model)
    session = LanceSession(model, replace(config or LanceConfig(), seed=seed, layers=task.layers))
    session.start(observe=False)
    session.calibrate([lambda index=index: loss(index) for index in probe[1:]])  # type: ignore[misc]
    step: Step = contextlib.nullcontext if config is None else session.step
    start = cosines(names, model, twin, step, lambda of: loss(probe[0], of))
    for epoch in range(epochs):
        if epoch:
            session.begin_epoch()
        for index in torch.randperm(len(labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            with step():
                found = loss(index)
            found.backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
    end = cosines(names, model, twin, step, lambda of: loss(probe[0], of))
    if session.report is None or session.report.compressed is None:
        kept = measure_saved_bytes(lambda: loss(probe[0]), model).total
    else:
        kept = session.report.compressed.total
    session.stop()
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(*(t.split(250) for t in task.test), strict=True)]
    accuracy = float(sum(right)) / len(task.test[1])
    return Run(setting, seed, accuracy, kept, start[0], end[0], start[1], end[1])


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Header and one row a setting."""
    header = ["setting", "kept", "accuracy", "± std", "cosine start", "worst", "cosine end", "worst"]
    table = [header]
    for setting in dict.fromkeys(run.setting for run in runs):
        group = [run for run in runs if run.setting == setting]

        def mean(name: str, group: list[Run] = group) -> float:
            return statistics.mean(getattr(run, name) for run in group)

        deviation = statistics.stdev(run.accuracy for run in group) if len(group) > 1 else 0.0
        cosine = [f"{mean(name):.3f}" for name in ("cosine_start", "worst_start", "cosine_end", "worst_end")]
        table.append([setting, f"{mean('kept') / 1e6:.2f} MB", f"{mean('accuracy'):.4f}", f"{deviation:.4f}", *cosine])
    return table


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Accuracy against kept bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, setting in enumerate(dict.fromkeys(run.setting for run in runs)):
        group = [run for run in runs if run.setting == setting]
        kept = statistics.mean(run.kept for run in group)
        accuracy = [run.accuracy for run in group]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        axes.errorbar(
            kept, statistics.mean(accuracy), spread, fmt="os^Dv"[index % 5], capsize=3, label=setting, markersize=7
        )
    axes.set(xscale="log", xlabel="bytes that autograd keeps for one batch", ylabel="test accuracy")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="lite0")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: by task")
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), help="';'-separated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    task = TASKS[options.task]()
    epochs = options.epochs or task.epochs
    runs: list[Run] = []
    for setting in options.settings:
        runs += [run(task, setting, seed, epochs) for seed in options.seeds]
        print("  ".join(f"{cell:>12}" if i else f"{cell:32}" for i, cell in enumerate(rows(runs)[-1])), flush=True)
        if options.json is not None:
            payload: dict[str, Any] = {"task": options.task, "epochs": epochs, "runs": [asdict(run) for run in runs]}
            options.json.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    print()
    for row in rows(runs):
        print("  ".join(f"{cell:>12}" if i else f"{cell:32}" for i, cell in enumerate(row)))
    if options.plot is not None:
        plot(runs, options.plot, f"{options.task}, {epochs} epochs, {len(options.seeds)} seeds")


if __name__ == "__main__":
    main()
