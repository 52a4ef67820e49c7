"""Ways to train a case, side by side: each makes a network ready in place and finds what it needs before training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.baselines.asi import install_asi
from examples.baselines.hosvd import install_hosvd
from examples.benchmarks.cases import NETWORKS, Case
from lightning_lance import LanceConfig, LanceSession, Report, measure_saved_bytes

Pass: TypeAlias = Callable[[], Tensor]
"""One forward pass with the loss."""


class Method:
    """Plain training, and what the other methods change of it.

    Attributes:
        calibrates: whether `calibrate` does anything.
    """

    calibrates = False

    def install(self, model: nn.Module, case: Case) -> None:
        """Make the network ready, in place; parameters stay the same objects in the same order."""

    def calibrate(self, passes: Sequence[Pass]) -> None:
        """Find what the method needs before training, from a few forward passes."""

    def context(self) -> AbstractContextManager[Any]:
        """What a forward pass with gradients runs in."""
        return nullcontext()

    def loss(self, case: Case, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch, as training computes it."""
        with self.context():
            return case.loss(model, batch)

    def kept_bytes(self, run: Pass, model: nn.Module) -> int:
        """Bytes that autograd keeps for a training step, measured."""
        return measure_saved_bytes(run, model).total

    def formula_bytes(self, run: Pass, model: nn.Module, case: Case) -> int | None:
        """Bytes kept of the inputs of the trained layers, by formula; `None` where there is none."""
        sizes: list[int] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sizes.append(inputs[0].numel() * inputs[0].element_size())

        hooks = [layer.register_forward_pre_hook(note) for layer in case.layers(model)]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        return sum(sizes)


class Checkpointing(Method):
    """Activation checkpointing of every block: keeps the blocks' inputs, runs their forward pass again in backward."""

    def install(self, model: nn.Module, case: Case) -> None:
        network = NETWORKS[case.network]
        for block in network.block_modules(model):
            self._wrap(block)
        if network.stem:
            # One segment, at the place of its first module.
            first, *rest = network.stem
            segment = nn.Sequential(*[model.get_submodule(name) for name in network.stem])
            setattr(model, first, segment)
            for name in rest:
                setattr(model, name, nn.Identity())
            self._wrap(segment)

    @staticmethod
    def _wrap(module: nn.Module) -> None:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]

    def formula_bytes(self, run: Pass, model: nn.Module, case: Case) -> int | None:
        return None


class PerStep(Method):
    """A baseline that decomposes each input at every step."""

    def __init__(self, install: Callable[[Sequence[nn.Module]], None]) -> None:
        self._install = install

    def install(self, model: nn.Module, case: Case) -> None:
        self.layers = case.layers(model)  # before their class changes, by which linear layers are found
        self._install(self.layers)

    def formula_bytes(self, run: Pass, model: nn.Module, case: Case) -> int | None:
        run()
        return sum(layer.formula_bytes for layer in self.layers)  # type: ignore[misc]


class WarmStart(PerStep):
    """A baseline whose first pass settles the ranks."""

    calibrates = True

    def calibrate(self, passes: Sequence[Pass]) -> None:
        passes[0]()


class Lance(Method):
    """This package.

    Args:
        config: its options; the layers are those that train.
    """

    def __init__(self, config: LanceConfig) -> None:
        self.config = config
        self.calibrates = any(ranks.projects for ranks in config.rules().all_rules())

    def install(self, model: nn.Module, case: Case) -> None:
        self.session = LanceSession(model, self.config)
        self.session.start(observe=False)

    def calibrate(self, passes: Sequence[Pass]) -> None:
        self.session.calibrate(passes)

    def context(self) -> AbstractContextManager[Any]:
        return self.session.step()

    def report(self, run: Pass) -> Report:
        """What the first step has found; where none has run, one does."""
        if not self.session.reported:
            run()
        assert self.session.report is not None
        return self.session.report

    def kept_bytes(self, run: Pass, model: nn.Module) -> int:
        compressed = self.report(run).compressed
        assert compressed is not None
        return compressed.total

    def formula_bytes(self, run: Pass, model: nn.Module, case: Case) -> int | None:
        layers = self.report(run).layers
        return sum(layer.formula_bytes for layer in layers) if layers else None


METHODS: dict[str, Callable[[], Method]] = {
    "plain": Method,
    "checkpointing": Checkpointing,
    "hosvd": lambda: PerStep(install_hosvd),
    "asi": lambda: WarmStart(install_asi),
    "published": lambda: Lance(LanceConfig(preset="published")),
    "default": lambda: Lance(LanceConfig()),
    "two-bits": lambda: Lance(LanceConfig(bits=2)),
    "unrounded": lambda: Lance(LanceConfig(bits=None)),
    "compact": lambda: Lance(LanceConfig(rank="compact")),
}

TITLES = {
    "plain": "plain",
    "checkpointing": "activation checkpointing",
    "hosvd": "HOSVD each step, energy .8",
    "asi": "ASI, energy .8",
    "published": "LANCE as published, energy .7",
    "default": "ours",
    "two-bits": "ours, 2 bits",
    "unrounded": "ours, nothing rounded",
    "compact": "ours, compact ranks",
}


def find(names: Sequence[str]) -> list[str]:
    """Checked names of methods.

    Raises:
        ValueError: one is unknown.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return list(names)
