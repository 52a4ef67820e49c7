"""What the benchmarks run: networks, the layers that train, batches, and how batch norm behaves.

A case trains the convolutions or linear layers that it names, with their biases; everything else is frozen, the affine
parameters of norms and the classifier included. One of the kind `every` trains all parameters there are. Inputs are
crops of photographs, since on noise the energy of the spatial modes means nothing.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data.photographs import photograph_batch
from examples.models.efficientnet_lite0 import efficientnet_lite0

SEED = 0
SIZE = 224
WARMING_BATCHES = 4


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2()


def vit_b_16() -> nn.Module:
    from torchvision.models import vit_b_16

    model = vit_b_16()
    head = model.heads.head
    nn.init.trunc_normal_(head.weight, std=head.in_features**-0.5)  # zero at first: nothing before it has a gradient
    return model


def deit_tiny() -> nn.Module:
    from timm import create_model

    return create_model("deit_tiny_patch16_224", pretrained=False)


def vit_tiny() -> nn.Module:
    from timm import create_model

    return create_model("vit_tiny_patch16_224", pretrained=False)


def swin_t() -> nn.Module:
    from torchvision.models import swin_t

    return swin_t()


def mlp() -> nn.Module:
    """For images of 16 x 16 pixels."""
    layers = [nn.Linear(3 * 16 * 16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), nn.Sequential(*layers))


@dataclass(frozen=True)
class Network:
    """How to build a network and where its parts are.

    Attributes:
        build: makes it, with weights drawn from the global generator or pretrained ones.
        body: prefix of the names of the layers that may train; leaves the classifier out.
        blocks: names of the containers of its blocks.
        stem: names of the modules before the first block, which run one after the other.
        pretrained: its weights and batch-norm statistics are loaded.
    """

    build: Callable[[], nn.Module]
    body: str
    blocks: tuple[str, ...]
    stem: tuple[str, ...] = ()
    pretrained: bool = False

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks in forward order."""
        return [block for path in self.blocks for block in model.get_submodule(path).children()]


NETWORKS = {
    "resnet18": Network(
        resnet18, "", ("layer1", "layer2", "layer3", "layer4"), stem=("conv1", "bn1", "relu", "maxpool")
    ),
    "mobilenet_v2": Network(mobilenet_v2, "features", ("features",)),
    "efficientnet_lite0": Network(
        lambda: efficientnet_lite0(pretrained=True), "", ("blocks",), stem=("stem",), pretrained=True
    ),
    "deit_tiny": Network(deit_tiny, "blocks", ("blocks",)),
    "vit_b_16": Network(vit_b_16, "encoder", ("encoder.layers",)),
    "vit_tiny": Network(vit_tiny, "blocks", ("blocks",)),
    "swin_t": Network(swin_t, "features", ("features",)),
    "mlp": Network(mlp, "", ("1",)),
}

KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "conv": lambda module: isinstance(module, nn.Conv2d),
    "pointwise": lambda module: isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1),
    # By exact type: the output projection inside torch's attention is a subclass whose forward never runs.
    "linear": lambda module: type(module) is nn.Linear,
    "every": lambda module: isinstance(module, nn.Conv2d) or type(module) is nn.Linear,
}

_NAME = re.compile(r"(\w+)/(\w+)-(\d+|all)/b(\d+)(?:/(\d+)px)?(?:/(eval|train))?")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        network: key of `NETWORKS`.
        kind: key of `KINDS`: which layers train; all parameters with "every".
        last: how many of them, from the end; `None` for all.
        batch: samples per batch.
        norms: mode of batch-norm layers, "eval" or "train"; "" for networks without any.
        size: height and width of the images.
    """

    network: str
    kind: str
    last: int | None
    batch: int
    norms: str = ""
    size: int = SIZE

    @property
    def name(self) -> str:
        """Such as `resnet18/conv-4/b32/eval`; read by `parse`."""
        parts = [self.network, f"{self.kind}-{self.last or 'all'}", f"b{self.batch}"]
        parts += [f"{self.size}px"] if self.size != SIZE else []
        parts += [self.norms] if self.norms else []
        return "/".join(parts)

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of a name."""
        found = _NAME.fullmatch(name)
        if found is None or found[1] not in NETWORKS or found[2] not in KINDS:
            raise ValueError(
                f"{name!r} names no case. The form is network/kind-count/bBATCH[/SIZEpx][/eval|/train], such as "
                f"resnet18/conv-4/b32/eval; networks: {', '.join(NETWORKS)}; kinds: {', '.join(KINDS)}."
            )
        last = None if found[3] == "all" else int(found[3])
        return cls(found[1], found[2], last, int(found[4]), found[6] or "", int(found[5] or SIZE))

    def build(self) -> nn.Module:
        """The network in training mode, ready to train; equal weights at every call.

        Where no weights are loaded, the running statistics of batch-norm layers are those of a few batches, as they
        would be after some training; at their initial values, activations grow from block to block in eval mode.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = NETWORKS[self.network].build()
        model.requires_grad_(False).train()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norms and not NETWORKS[self.network].pretrained:
            self._estimate_statistics(model, norms)
        for norm in norms:
            norm.train(self.norms == "train")
        for layer in self.layers(model):
            layer.requires_grad_(True)
        if self.kind == "every":
            model.requires_grad_(True)
        return model

    def _estimate_statistics(self, model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> None:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            for index in range(WARMING_BATCHES):
                model(photograph_batch(16, self.size, 1_000_000 + index)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The convolutions and linear layers that train, in the order of their names."""
        body, wanted = "" if self.kind == "every" else NETWORKS[self.network].body, KINDS[self.kind]
        found = [module for name, module in model.named_modules() if name.startswith(body) and wanted(module)]
        return found if self.last is None else found[-self.last :]

    def batches(self, count: int, first: int = 0, contiguous: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Images and labels, equal at every call; images in the channels-last memory format unless told otherwise."""
        found = [photograph_batch(self.batch, self.size, first + index) for index in range(count)]
        return [(images.contiguous(), labels) for images, labels in found] if contiguous else found

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of one batch."""
        return F.cross_entropy(model(batch[0]), batch[1])


def _standard() -> list[Case]:
    sets: list[tuple[str, str, int | None, str, int]] = []
    for norms in ("eval", "train"):
        sets += [("resnet18", "conv", last, norms, SIZE) for last in (2, 4, None)]
        sets += [("mobilenet_v2", "pointwise", 4, norms, SIZE), ("mobilenet_v2", "conv", None, norms, SIZE)]
        sets += [("efficientnet_lite0", "pointwise", 4, norms, size) for size in (112, SIZE)]
    sets += [(network, "linear", last, "", SIZE) for network in ("deit_tiny", "vit_b_16") for last in (4, None)]
    return [
        Case(network, kind, last, batch, norms, size)
        for (network, kind, last, norms, size), batch in itertools.product(sets, (16, 32, 64))
    ]


CASES = {case.name: case for case in _standard()}

# The usual cases, one batch size each.
HEADLINE = [
    "resnet18/conv-2/b32/eval",
    "resnet18/conv-4/b64/eval",
    "resnet18/conv-all/b32/eval",
    "resnet18/conv-all/b32/train",
    "mobilenet_v2/pointwise-4/b64/eval",
    "mobilenet_v2/conv-all/b32/eval",
    "efficientnet_lite0/pointwise-4/b64/112px/eval",
    "efficientnet_lite0/pointwise-4/b32/eval",
    "deit_tiny/linear-4/b32",
    "deit_tiny/linear-all/b32",
    "vit_b_16/linear-4/b16",
]


def select(patterns: Sequence[str]) -> list[Case]:
    """Cases by name or shell-style pattern over `CASES`; "all" for every one of them.

    Raises:
        ValueError: a pattern matches no case and is no name of one.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        names = list(CASES) if pattern == "all" else fnmatch.filter(CASES, pattern)
        chosen.update((name, CASES[name]) for name in names) if names else chosen.update({pattern: Case.parse(pattern)})
    return list(chosen.values())
