"""Batch-norm layers whose affine parameters are frozen: run them in eval mode and give their flags back."""

from __future__ import annotations

from torch import nn


def frozen_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> batch-norm layer that has running statistics, and affine parameters none of which requires grad."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and module.weight is not None
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


class FrozenNorms:
    """Keeps the frozen batch-norm layers of a model in eval mode while the rest trains.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changed: dict[nn.Module, None] = {}
        self._norms: list[nn.Module] = []

    def find(self) -> None:
        """Look for frozen layers anew; one that has been unfrozen trains again."""
        self._norms = list(frozen_norms(self.model).values())
        for norm in [norm for norm in self._changed if norm not in self._norms]:
            norm.training = True
            del self._changed[norm]

    def apply(self) -> None:
        """Set eval mode; Trainers set training mode for the whole model now and then."""
        for norm in self._norms:
            if norm.training:
                self._changed[norm] = None
                norm.training = False

    def release(self) -> None:
        """Give back the flags that were changed."""
        for norm in self._changed:
            norm.training = True
        self._changed.clear()
        self._norms = []
