"""The networks of the fine-tuning experiments by name, with a classifier for any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn

from examples.data.photographs import MEAN, STD
from examples.models import efficientnet_lite0 as lite0
from examples.models.mcunet import mcunet_from, mcunet_in1

Make = Callable[[int, bool, "str | None"], nn.Module]


class Network(NamedTuple):
    """How to make a network.

    Attributes:
        make: from the number of classes, whether with the weights of its package, and a description of it.
        classifier: name of its last layer.
        normalization: mean and deviation of each channel that its weights were trained with, for pixels in [0, 1].
    """

    make: Make
    classifier: str
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = (MEAN, STD)


def _torchvision(name: str, classifier: str) -> Make:
    def make(classes: int, pretrained: bool, config: str | None) -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None)
        _new_classifier(model, classifier, classes)
        return model

    return make


def _deit_tiny(classes: int, pretrained: bool, config: str | None) -> nn.Module:
    import timm

    # Takes images of other sizes than 224 too; at 224 it is the same.
    return timm.create_model(  # type: ignore[no-any-return]
        "deit_tiny_patch16_224", pretrained=pretrained, num_classes=classes, dynamic_img_size=True
    )


def _lite0(classes: int, pretrained: bool, config: str | None) -> nn.Module:
    return lite0.efficientnet_lite0(pretrained, classes, drop_rate=0.0)


def _mcunet(in1: bool) -> Make:
    def make(classes: int, pretrained: bool, config: str | None) -> nn.Module:
        if pretrained:
            raise ValueError(
                "pretrained=True is not allowed: no package has the weights of MCUNet. Give weights=FILE, the "
                "published state_dict, with pretrained=False."
            )
        if config is None and not in1:
            raise ValueError(
                "network='mcunet' needs config=FILE, the JSON description that is published with the weights (of "
                "MCUNet-in2 in the paper). Or take network='mcunet_in1', whose blocks are known."
            )
        return mcunet_in1(classes) if config is None else mcunet_from(config, classes)

    return make


NETWORKS: dict[str, Network] = {
    "mcunet": Network(_mcunet(False), ""),
    "mcunet_in1": Network(_mcunet(True), ""),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2", "classifier.1"), "classifier.1"),
    "resnet18": Network(_torchvision("resnet18", "fc"), "fc"),
    "resnet34": Network(_torchvision("resnet34", "fc"), "fc"),
    "deit_tiny": Network(_deit_tiny, "head"),
    "efficientnet_lite0": Network(_lite0, "classifier", (lite0.MEAN, lite0.STD)),
}
"""An empty classifier name: the last linear layer."""


def check_network(name: str) -> Network:
    """The entry of a name.

    Raises:
        ValueError: there is no network of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"network={name!r} is not a network. Allowed: {', '.join(NETWORKS)}.")
    return NETWORKS[name]


def make_network(
    name: str, classes: int, pretrained: bool = False, weights: str | None = None, config: str | None = None
) -> nn.Module:
    """A network with a new classifier.

    Args:
        name: key of :data:`NETWORKS`.
        classes: outputs of the classifier.
        pretrained: with the ImageNet weights that torchvision or timm downloads, or a package ships.
        weights: file with ImageNet weights to load instead: a `state_dict`, or a checkpoint with one under
            `"state_dict"` or `"model"`, under the network's own names or in its order. Its classifier is left out where
            it has other classes.
        config: description of a MCUNet.

    Raises:
        ValueError: there is no such network, or the weights are those of another one.
        ConnectionError: the weights cannot be downloaded.
    """
    entry = check_network(name)
    try:
        model = entry.make(classes, pretrained and weights is None, config)
    except (URLError, OSError) as error:
        raise ConnectionError(
            f"the weights of {name} cannot be downloaded ({error}). Give weights=FILE, a state_dict of it, or "
            "pretrained=False for random ones."
        ) from error
    if weights is not None:
        load_weights(model, weights, classifier_of(model, name))
    return model


def classifier_of(model: nn.Module, name: str) -> str:
    """Name of the classifier of a network made by :func:`make_network`."""
    known = NETWORKS[name].classifier
    return known or [found for found, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def load_weights(model: nn.Module, path: str | Path, classifier: str) -> None:
    """Load ImageNet weights from a file, all but a classifier of other classes.

    Raises:
        ValueError: the tensors are not those of the network; the message names the first that differs.
    """
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    own = model.state_dict()
    given: dict[str, Tensor] = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    if given.keys() != own.keys():
        if len(given) != len(own):
            raise ValueError(
                f"weights={str(path)!r} has {len(given)} tensors and {type(model).__name__} has {len(own)}. Give the "
                "weights of this network."
            )
        given = dict(zip(own, given.values(), strict=True))  # other names, in the same order
    for name, tensor in own.items():
        if given[name].shape == tensor.shape:
            continue
        if name.startswith(f"{classifier}."):
            given[name] = tensor
        else:
            raise ValueError(
                f"weights={str(path)!r}: {name} has shape {tuple(given[name].shape)} there and {tuple(tensor.shape)} "
                f"in {type(model).__name__}. Give the weights of this network."
            )
    model.load_state_dict(given)


def _new_classifier(model: nn.Module, name: str, classes: int) -> None:
    parent, _, own = name.rpartition(".")
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    setattr(model.get_submodule(parent), own, nn.Linear(old.in_features, classes))
