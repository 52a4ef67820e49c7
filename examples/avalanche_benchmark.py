"""Avalanche's own benchmarks, with LANCE or another method, each with a network and settings that fit it.

    python -m examples.avalanche_benchmark --benchmark SplitCIFAR100 --root data --strategy lance

Downloads the data into `--root` where it is not there yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision.datasets import cifar

from examples.benchmarks.continual import options, run, seed_everything, table
from examples.benchmarks.methods import METHODS, OPTIMIZERS, Settings, make_optimizer
from examples.models.gpm_alexnet import GPMAlexNet
from examples.models.multi_head import MultiHead
from examples.models.small import conv_trunk, mlp_trunk


@dataclass(frozen=True)
class Recipe:
    """A benchmark, a network for it and how to train that.

    Attributes:
        experiences: default length of the stream; 0: the benchmark has its own.
        classes: of an experience, or of the one classifier.
        network: fraction of the published widths -> the trunk and its features.
        epochs: over each experience.
        lr: learning rate of plain SGD.
        batch_size: samples of a training step.
        multi_head: whether each experience has a head of its own.
    """

    experiences: int
    classes: int
    network: Callable[[float], tuple[nn.Module, int]]
    epochs: int
    lr: float
    batch_size: int = 64
    multi_head: bool = True


def _mlp(width: float) -> tuple[nn.Module, int]:
    features = round(100 * width)
    return mlp_trunk(hidden=features), features


def _conv(width: float) -> tuple[nn.Module, int]:
    features = round(128 * width)
    return conv_trunk(width=round(16 * width), features=features), features


def _alexnet(width: float, size: int = 32) -> tuple[nn.Module, int]:
    trunk = GPMAlexNet(size=size, width=width)
    return trunk, trunk.features


RECIPES = {
    "SplitMNIST": Recipe(5, 2, _mlp, epochs=1, lr=0.05),
    "PermutedMNIST": Recipe(10, 10, _mlp, epochs=1, lr=0.05),
    "SplitFMNIST": Recipe(5, 2, _conv, epochs=2, lr=0.05),
    "SplitCIFAR10": Recipe(5, 2, _alexnet, epochs=20, lr=0.01),
    "SplitCIFAR100": Recipe(10, 10, _alexnet, epochs=50, lr=0.01),
    "SplitTinyImageNet": Recipe(10, 20, lambda width: _alexnet(width, 64), epochs=30, lr=0.01),
    # The 50 objects in new conditions: one classifier for all of its eight sessions, and one test set.
    "CORe50": Recipe(0, 50, _alexnet, epochs=2, lr=0.01, multi_head=False),
}


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let torchvision read CIFAR files by their names alone, also those that are not the published ones."""
    stock = cifar.check_integrity
    cifar.check_integrity = lambda path, md5=None: os.path.isfile(path)
    try:
        yield
    finally:
        cifar.check_integrity = stock


def make_benchmark(name: str, root: Path, seed: int, experiences: int | None = None, check: bool = True) -> Any:
    """One of Avalanche's benchmarks.

    Args:
        name: a key of :data:`RECIPES`.
        root: folder that holds its data, or gets it.
        seed: of the order of classes or of the permutations; run 0 to 9 of CORe50.
        experiences: length of the stream, where the benchmark lets one choose.
        check: compare the checksums of CIFAR's files.

    Raises:
        SystemExit: the data is not there and cannot be downloaded.
    """
    from avalanche.benchmarks import classic

    recipe = RECIPES[name]
    chosen: dict[str, Any] = {"dataset_root": root}
    if name == "CORe50":
        chosen |= {"scenario": "ni", "mini": True, "run": seed % 10}
    else:
        chosen |= {"n_experiences": experiences or recipe.experiences, "return_task_id": True, "seed": seed}
        if name != "PermutedMNIST":
            chosen["class_ids_from_zero_in_each_exp"] = True
    try:
        with contextlib.nullcontext() if check else unchecked():
            return getattr(classic, name)(**chosen)
    except (URLError, RuntimeError, OSError) as error:
        raise SystemExit(
            f"{name}: its data is not whole in {root} and could not be downloaded ({error}). Download it where there "
            "is a network, or give the folder that holds it with --root."
        ) from error


def make_model(recipe: Recipe, width: float = 1.0) -> nn.Module:
    """Trunk and heads, or trunk and one plain classifier, which LANCE and GPM protect like every other layer."""
    trunk, features = recipe.network(width)
    if recipe.multi_head:
        return MultiHead(trunk, features, recipe.classes)
    output = nn.Linear(features, recipe.classes, bias=False)
    return nn.Sequential(OrderedDict(trunk=trunk, output=output))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--benchmark", choices=RECIPES, required=True)
    found.add_argument("--root", type=Path, required=True, help="folder of the data; downloads go there")
    found.add_argument("--strategy", choices=METHODS, default="lance")
    found.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    found.add_argument("--experiences", type=int, help="length of the stream, where the benchmark lets one choose")
    found.add_argument("--epochs", type=int, help="over each experience, instead of the recipe's")
    found.add_argument("--lr", type=float, help="of plain SGD, instead of the recipe's")
    found.add_argument("--batch-size", type=int, help="instead of the recipe's")
    found.add_argument("--width", type=float, default=1.0, help="of the network, as a fraction of the recipe's")
    found.add_argument("--threshold", type=float, default=0.97, help="energy protected after an experience")
    found.add_argument("--threshold-growth", type=float, default=0.003, help="added to it after each experience")
    found.add_argument("--memory", type=int, default=200, help="samples kept per experience by replay, A-GEM and GEM")
    found.add_argument("--option", action="append", default=[], metavar="METHOD.NAME=VALUE", help="of a single method")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--threads", type=int, help="of torch; its own choice by default")
    found.add_argument("--workers", type=int, default=0, help="processes that load data")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--output", type=Path, help="where the numbers go as JSON")
    found.add_argument(
        "--no-integrity-check",
        action="store_true",
        help="read CIFAR files of the right names whatever their checksum, for data made by yourself in that format",
    )
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="No loggers specified")
    recipe = RECIPES[args.benchmark]
    scenario = make_benchmark(args.benchmark, args.root, args.seed, args.experiences, not args.no_integrity_check)
    seed_everything(args.seed)
    model = make_model(recipe, args.width)
    given = options(args.option)
    if not recipe.multi_head:
        for name in ("gpm", "sgp"):
            given.setdefault(name, {}).setdefault("heads", ())
    settings = Settings(
        epochs=args.epochs or recipe.epochs,
        batch_size=args.batch_size or recipe.batch_size,
        threshold=args.threshold,
        threshold_growth=args.threshold_growth,
        memory_per_experience=args.memory,
        experiences=len(scenario.train_stream),
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        method=given,
    )
    optimizer = make_optimizer(args.optimizer, model, args.lr or recipe.lr)
    numbers, _ = run(args.strategy, scenario, model, optimizer, settings)
    found = {"benchmark": args.benchmark, "method": args.strategy, "optimizer": args.optimizer, **numbers}
    print(f"{args.benchmark}, {args.optimizer}, {found['seconds']:.0f} s\n\n{table([found])}")
    if args.output is not None:
        args.output.write_text(json.dumps({**found, "seed": args.seed, "torch": torch.__version__}, indent=1))
    return found


if __name__ == "__main__":
    main()
