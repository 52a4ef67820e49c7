"""Norms, biases and positions of one's own: what no basis protects, each experience may train and keep for itself.

What a layer learned is protected as a subspace of its inputs, and columns of one's own are directions of it. A norm or
a bias has no such directions: its affine parameters and running statistics either stay as the first experience left
them, or differ from experience to experience. They are a few numbers a channel, so that an experience which is known
when it is evaluated has its own. It starts with those of the one before, and all earlier ones are evaluated with
theirs. So it is with other parameters that are no layer's weight, such as positions, as far as they are small.

Related: batch norms for each domain (Bilen & Vedaldi, arXiv 1701.07275; Chang et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lance.tensors.checked import FLOATS, Stored

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)

Values = dict[str, Tensor]
"""Name of a parameter or buffer in the model -> its value."""


class OwnValues:
    """Values of norms and biases that single experiences have for themselves."""

    def __init__(self) -> None:
        self._found: dict[str, Values] = {}

    def __contains__(self, own: object) -> bool:
        return own in self._found

    def of(self, own: str | None) -> Values:
        """Those of an experience; empty for what all share."""
        return {} if own is None else self._found.get(own, {})

    def first(self) -> Values:
        """What a new experience starts with: those of the last one."""
        return next(reversed(self._found.values()), {})

    def store(self, own: str, model: nn.Module, shared: Mapping[str, Tensor]) -> None:
        """Keep what of a model differs from what all share."""
        held = {name: tensor_of(model, name).detach() for name in shared}
        self._found[own] = {n: found.clone() for n, found in held.items() if not torch.equal(found, shared[n])}

    def misfit(self, model: nn.Module) -> str | None:
        """What a model lacks of what is stored, in words."""
        return next((found for values in self._found.values() if (found := misfit(model, values))), None)

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(value.nbytes for values in self._found.values() for value in values.values())

    @property
    def last_bytes(self) -> int:
        """Size of those of the last experience that has some."""
        return sum(value.nbytes for value in self.first().values())

    def state_dict(self) -> dict[str, Values]:
        """Plain containers and CPU tensors."""
        return {own: {name: value.cpu() for name, value in values.items()} for own, values in self._found.items()}

    @classmethod
    def read(cls, stored: Stored) -> OwnValues:
        """What :meth:`state_dict` returned.

        Raises:
            StateError: a value is not what it should be.
        """
        made = cls()
        made._found = {own: read_values(values) for own, values in stored.named()}
        return made


def read_values(stored: Stored) -> Values:
    """Checked values by name."""
    found = {}
    for name, item in stored.named():
        shape = item.value.shape if isinstance(item.value, Tensor) else ()
        found[name] = item.tensor(shape, (*FLOATS.values(), torch.int64))
        if name.endswith("running_var") and bool((found[name] < 0).any()):
            item.refuse("variances of at least 0")
    return found


def names_of(modules: Iterable[tuple[str, nn.Module]], protected: Mapping[str, Any], budget: float) -> list[str]:
    """Names of all parameters and running statistics of norms, and of parameters that no basis protects.

    Args:
        modules: those to look at, with their names.
        protected: names of layers whose weights are protected; their other parameters are not.
        budget: numbers that the parameters of other modules may have, smaller ones first.
    """
    found, others = [], []
    for name, module in modules:
        prefix = f"{name}." if name else ""
        parameters = module.named_parameters(recurse=False)
        if name in protected:
            found += [prefix + key for key, parameter in parameters if key != "weight"]
        elif isinstance(module, NORMS):
            held = {**module._parameters, **module._buffers}
            found += [prefix + key for key, tensor in held.items() if tensor is not None]
        else:
            others += [(parameter.numel(), prefix + key) for key, parameter in parameters]
    for count, name in sorted(others):
        budget -= count
        if budget < 0:
            break
        found.append(name)
    return found


def misfit(model: nn.Module, values: Mapping[str, Tensor]) -> str | None:
    """What a model lacks of tensors with these names and shapes, in words; ``None``: nothing."""
    for name, value in values.items():
        try:
            shape = tuple(tensor_of(model, name).shape)
        except AttributeError:
            return f"{name}: the stored stream has values of it for single experiences, the model has none"
        stored = tuple(value.shape)
        if shape != stored:
            return f"{name}: the stored values of single experiences have shape {stored}, the model's {shape}"
    return None


def weight_of(layer: str) -> str:
    """Name of the weight of a layer."""
    return f"{layer}.weight" if layer else "weight"


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name in the model.

    Raises:
        AttributeError: there is none.
    """
    owner, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(owner), key)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{name} is no tensor")
    return found


@torch.no_grad()
def exchange(model: nn.Module, values: Mapping[str, Tensor]) -> Values:
    """Write values into a model, and return those that were there."""
    before = {}
    for name, value in values.items():
        held = tensor_of(model, name)
        before[name] = held.detach().clone()
        held.data.copy_(value)
    return before
