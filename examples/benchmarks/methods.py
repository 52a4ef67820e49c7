"""Continual-learning methods by name, each as an Avalanche strategy with the same network and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training import JointTraining
from avalanche.training.plugins import (
    AGEMPlugin,
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from examples.baselines.code_cl import CodeCLPlugin
from examples.baselines.gpm import GPMPlugin, SGPPlugin
from examples.baselines.trgp import TRGPPlugin
from lightning_lance.avalanche import LanceStrategy


class OptimizerSpec(NamedTuple):
    """An optimiser and the learning rate that goes with it, relative to the recipe's where it is SGD."""

    make: Callable[..., torch.optim.Optimizer]
    lr: float
    relative: bool = False
    options: Mapping[str, Any] = {}


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(torch.optim.SGD, 1.0, True),
    "momentum": OptimizerSpec(torch.optim.SGD, 0.1, True, {"momentum": 0.9}),
    "adam": OptimizerSpec(torch.optim.Adam, 1e-3),
    "adamw": OptimizerSpec(torch.optim.AdamW, 1e-3, False, {"weight_decay": 1e-2}),
    "rmsprop": OptimizerSpec(torch.optim.RMSprop, 3e-4),
    "adagrad": OptimizerSpec(torch.optim.Adagrad, 5e-3),
}


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimiser of a model's parameters.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        model: the model.
        lr: learning rate of plain SGD; the adaptive optimisers have their own.
    """
    make, rate, relative, options = OPTIMIZERS[name]
    return make(model.parameters(), lr=rate * lr if relative else rate, **options)


@dataclass
class Settings:
    """What the methods share.

    Attributes:
        epochs: over each experience; joint training sees all data this often.
        batch_size: samples of a training step.
        eval_batch_size: samples of an evaluation step.
        threshold: energy protected after an experience, in GPM, scaled GPM and TRGP; LANCE has its own default.
        threshold_growth: added to it after each experience.
        samples: samples that define the directions of an experience, in these and in CODE-CL.
        memory_per_experience: samples that replay, A-GEM and GEM keep of each experience.
        experiences: length of the stream.
        seed: of what the methods draw themselves.
        device: where to train.
        workers: processes that load data; 0 loads it in the training process.
        method: options of single methods: name -> arguments of its plugin or strategy.
    """

    epochs: int
    batch_size: int
    eval_batch_size: int = 100
    threshold: float = 0.97
    threshold_growth: float = 0.003
    samples: int = 256
    memory_per_experience: int = 20
    experiences: int = 10
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self, name: str, **defaults: Any) -> dict[str, Any]:
        """Arguments of a method: defaults, and over them what `method` says."""
        return {**defaults, **self.method.get(name, {})}


def _gpm(name: str, settings: Settings) -> SupervisedPlugin:
    options = settings.options(
        name,
        threshold=settings.threshold,
        threshold_growth=settings.threshold_growth,
        samples=settings.samples,
        seed=settings.seed,
    )
    return {"gpm": GPMPlugin, "sgp": SGPPlugin, "trgp": TRGPPlugin}[name](**options)


def _si(settings: Settings) -> SupervisedPlugin:
    # Heads of other experiences have no gradient, on which Avalanche's plugin fails; they do not move either.
    return SynapticIntelligencePlugin(**settings.options("si", si_lambda=1.0, excluded_parameters=["classifier"]))


def _agem(settings: Settings) -> SupervisedPlugin:
    count = settings.memory_per_experience
    return AGEMPlugin(**settings.options("agem", patterns_per_experience=count, sample_size=settings.batch_size))


PLUGINS: dict[str, Callable[[Settings], SupervisedPlugin | None]] = {
    "naive": lambda _: None,
    "ewc": lambda s: EWCPlugin(**s.options("ewc", ewc_lambda=10.0)),
    "si": _si,
    "lwf": lambda s: LwFPlugin(**s.options("lwf", alpha=1.0, temperature=2.0)),
    "replay": lambda s: ReplayPlugin(**s.options("replay", mem_size=s.memory_per_experience * s.experiences)),
    "agem": _agem,
    "gem": lambda s: GEMPlugin(
        **s.options("gem", patterns_per_experience=s.memory_per_experience, memory_strength=0.5)
    ),
    "gpm": lambda s: _gpm("gpm", s),
    "sgp": lambda s: _gpm("sgp", s),
    "trgp": lambda s: _gpm("trgp", s),
    "code-cl": lambda s: CodeCLPlugin(**s.options("code-cl", samples=s.samples, seed=s.seed)),
}
LANCE: dict[str, dict[str, Any]] = {
    "lance": {},
    "lance-8-bits": {"bits": 8},
}
METHODS = ("naive", "joint", "ewc", "si", "lwf", "replay", "agem", "gem", "gpm", "sgp", "trgp", "code-cl", *LANCE)
LABELS = {
    "naive": "Naive",
    "joint": "Joint",
    "ewc": "EWC",
    "si": "SI",
    "lwf": "LwF",
    "replay": "Replay",
    "agem": "A-GEM",
    "gem": "GEM",
    "gpm": "GPM",
    "sgp": "Scaled GPM",
    "trgp": "TRGP",
    "code-cl": "CODE-CL",
    "lance": "LANCE",
    "lance-8-bits": "LANCE, 8 bits",
}


def make_strategy(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    before: Sequence[SupervisedPlugin] = (),
    after: Sequence[SupervisedPlugin] = (),
    evaluator: Any = None,
) -> tuple[Any, Any]:
    """A strategy and what holds its state.

    Args:
        name: one of :data:`METHODS`.
        model: the network.
        optimizer: of its parameters.
        settings: what the methods share.
        before: plugins that run before the method's own; in LANCE after it, whose work is done before the first step.
        after: plugins that run after it.
        evaluator: Avalanche's evaluation plugin; none by default.

    Returns:
        The strategy, and its plugin, or `None` where it keeps nothing.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known. Known: {', '.join(METHODS)}.")
    shared: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": settings.batch_size,
        "train_epochs": settings.epochs,
        "eval_mb_size": settings.eval_batch_size,
        "device": settings.device,
        "evaluator": evaluator,
    }
    if name in LANCE:
        defaults = {
            "threshold_growth": settings.threshold_growth,
            "calibration_batches": max(1, settings.samples // settings.batch_size),
            "seed": settings.seed,
            "verbose": False,
            **LANCE[name],
        }
        options = {**defaults, **settings.method.get("lance", {}), **settings.method.get(name, {})}
        strategy = LanceStrategy(**shared, plugins=[*before, *after], **options)
        return strategy, strategy.lance
    if name == "joint":
        return JointTraining(**shared, plugins=[*before, *after]), None
    plugin = PLUGINS[name](settings)
    own = [] if plugin is None else [plugin]
    return SupervisedTemplate(**shared, plugins=[*before, *own, *after]), plugin
