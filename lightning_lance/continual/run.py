"""What one experience changes in a model, and how to undo it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.compression.session import LanceSession
from lightning_lance.compression.surgery import restore
from lightning_lance.continual.layers import Reserved
from lightning_lance.continual.own_values import Values, exchange
from lightning_lance.continual.reservation import fingerprint
from lightning_lance.continual.rules import Layer, Now
from lightning_lance.continual.steps import watch_steps
from lightning_lance.errors import StateError


class Run:
    """What one experience changes in a model, and how to undo it."""

    def __init__(self, model: nn.Module, known: set[str], heads: set[str]) -> None:
        self.model = model
        self.heads = heads
        self.compression: LanceSession | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.now = Now(0)
        self.flat = False
        self.layers: dict[str, nn.Module] = {}
        self.views: dict[str, Layer] = {}
        # Names of norms' and biases' tensors that train for this experience alone, and the values that all share.
        self.own: list[str] = []
        self.shared: Values = {}
        # While another experience is shown: the values of this one.
        self.hidden: Values = {}
        self._shown: list[tuple[nn.Module, Tensor | None]] = []
        self._frozen: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._in_training: list[nn.Module] = []
        self._replaced: list[tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter]] = []
        self.before = {name: _fingerprint(module) for name, module in model.named_modules() if name not in known}

    def changed(self) -> set[str]:
        """Names of modules whose own parameters or buffers have changed, among those that were not known before."""
        modules = dict(self.model.named_modules())
        return {n for n, before in self.before.items() if n in modules and _fingerprint(modules[n]) != before}

    def show(self, module: nn.Module, weight: Tensor) -> None:
        """Let a layer work with another weight."""
        held: Any = module
        if isinstance(module, Reserved):
            self._shown.append((module, None))
            held.reservation.shown = weight
        else:
            self._shown.append((module, held.weight.detach().clone()))
            held.weight.data.copy_(weight)

    def hide(self) -> None:
        """Let all layers work with their own weights again."""
        shown, self._shown = self._shown, []
        for module, weight in shown:
            held: Any = module
            if weight is None:
                held.reservation.shown = None
            else:
                held.weight.data.copy_(weight)
        hidden, self.hidden = self.hidden, {}
        exchange(self.model, hidden)

    def leave(self) -> None:
        """Put back what all experiences share. Does nothing the second time."""
        shared, self.shared = self.shared, {}
        exchange(self.model, shared)

    def watch_steps(self) -> None:
        """Let reservations see every step of any torch optimiser on their weights, right before and after it."""
        layers = [layer for layer in self.layers.values() if isinstance(layer, Reserved)]
        self._handles += watch_steps([layer for layer in layers if layer.reservation.update is None], self.optimizers)

    def freeze(self, parameter: Any) -> None:
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimiser steps on any gradient that is there
        self._frozen.append(parameter)

    def keep_statistics(self, norm: nn.Module) -> None:
        """Normalise with the running statistics, and leave them as they are, also after ``model.train()``."""
        self._in_training += [norm] if norm.training else []
        norm.training = False
        self._handles.append(norm.register_forward_pre_hook(_to_eval))

    def replace(
        self,
        weight: Any,
        update: nn.Parameter,
        optimizers: list[torch.optim.Optimizer],
        name: str,
        keep_state: bool = False,
    ) -> None:
        """Let the optimiser train ``update`` in the place of ``weight``, with state of its own or with that one."""
        found = False
        for optimizer in optimizers:
            if _substitute(optimizer, weight, update):
                state = optimizer.state.pop(weight, None)
                if keep_state and state is not None:
                    optimizer.state[update] = state
                _forget_sizes(optimizer, keep_state)
                self._replaced.append((optimizer, weight, update))
                found = True
        if not found:
            raise StateError(
                f"{name}: no optimiser given to begin_experience() holds its weight, and reserved trains a smaller "
                "parameter in its place. Give optimizers=[...], or reserved='full'."
            )
        self.freeze(weight)

    def restore(self) -> None:
        """Undo everything; the effective weights stay. Does nothing the second time."""
        for handle in self._handles:
            handle.remove()
        if self.compression is not None:
            self.compression.stop()
        restore(self.model)
        for optimizer, weight, update in self._replaced:
            _substitute(optimizer, update, weight)
            optimizer.state.pop(update, None)
            _forget_sizes(optimizer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for norm in self._in_training:
            norm.training = True
        self._handles, self._in_training, self._frozen, self._replaced = [], [], [], []
        self.compression = None


def _to_eval(norm: nn.Module, _: Any) -> None:
    norm.training = False


def _substitute(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> bool:
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][index] = new
                _give_state(optimizer, group, new)
                return True
    return False


def _forget_sizes(optimizer: torch.optim.Optimizer, keep_state: bool = False) -> None:
    """For an optimiser with one state for all parameters together, which counts their elements once."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None
        if not keep_state:
            optimizer.state.clear()


def _give_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> None:
    """Give a parameter the state that it would have got with the constructor, and not at its first step."""
    if isinstance(optimizer, torch.optim.Adagrad):  # of torch 2.6; later ones make theirs at the first step
        start = group["initial_accumulator_value"]
        fresh = torch.optim.Adagrad([parameter], initial_accumulator_value=start, fused=group.get("fused"))
        if parameter in fresh.state:
            optimizer.state[parameter] = fresh.state[parameter]


def _fingerprint(module: nn.Module) -> float:
    return fingerprint(*module.parameters(recurse=False), *module.buffers(recurse=False))
