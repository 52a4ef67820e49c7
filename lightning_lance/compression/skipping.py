"""Kinds of layers that train plainly and are not counted: depthwise convolutions, and the classifier."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

KINDS = {
    "depthwise": "a depthwise convolution, see skip",
    "classifier": "the classifier, see skip",
}
"""What may be skipped, and what is said of it."""


def skipped_layers(model: nn.Module, skip: Collection[str], heads: Collection[str] = ()) -> dict[str, str]:
    """Name -> reason of the layers of a model that are skipped.

    Args:
        model: the model.
        skip: keys of :data:`KINDS`.
        heads: names of modules that are classifiers; where there are none, the last layer of the model is the one.
    """
    found: dict[str, str] = {}
    if "depthwise" in skip:
        found |= {name: KINDS["depthwise"] for name, module in model.named_modules() if is_depthwise(module)}
    if "classifier" in skip:
        found |= dict.fromkeys(heads or counted_layers(model)[-1:], KINDS["classifier"])
    return found


def counted_layers(model: nn.Module) -> list[str]:
    """Names of convolutions that are not depthwise, and of linear layers, in the order of the model.

    Not those that never run: the output projection inside of :class:`torch.nn.MultiheadAttention`.
    """
    return [name for name, module in model.named_modules() if _counts(module)]


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution with a group for each channel."""
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def _counts(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and not is_depthwise(module)
    return isinstance(module, nn.Linear)
