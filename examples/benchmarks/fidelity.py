"""How far compressed weight gradients are from back-propagation's, layer by layer, on a pretrained network.

    python -m examples.benchmarks.fidelity

Every convolution of EfficientNet-Lite0 with its ImageNet weights is compressed, from the wide maps of the stem to the
head, on digits at 112 pixels. With the batch mode whole, the distance is the bias of the truncated modes; with a batch
rank it is mostly the variance of one step, which averages out over steps. Nothing is rounded.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data.mnist import CLASSES, load_digits, to_network_input
from examples.models.efficientnet_lite0 import efficientnet_lite0
from lightning_lance import LanceConfig, LanceSession

SETTINGS: dict[str, dict[str, Any]] = {
    "spatial .7": {"batch": "full", "spatial": 0.7},
    "spatial .9": {"batch": "full", "spatial": 0.9},
    "spatial .97": {"batch": "full", "spatial": 0.97},
    "spatial .99": {"batch": "full", "spatial": 0.99},
    "channel .9": {"batch": "full", "channel": 0.9, "spatial": "full"},
    "channel .97": {"batch": "full", "channel": 0.97, "spatial": "full"},
    "batch 4": {"batch": 4, "spatial": "full"},
    "batch 4, spatial .9 (compact)": {"batch": 4, "spatial": 0.9},
    "batch 4, spatial .97": {"batch": 4, "spatial": 0.97},
}

BATCH = 32

SIZE = 112


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The network with a classifier fitted by ridge regression, and batches that it was not fitted on."""
    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    model = efficientnet_lite0(pretrained=True, num_classes=CLASSES, drop_rate=0.0).eval()
    fit = order[:512]
    found: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        for part in fit.split(64):
            model(to_network_input(images[part], SIZE))
        hook.remove()
        features, targets = torch.cat(found), 10 * F.one_hot(labels[fit], CLASSES).float()
        ridge = features.T @ features + 10 * torch.eye(features.shape[1])
        model.classifier.weight.copy_(torch.linalg.solve(ridge, features.T @ targets).T)
        model.classifier.bias.zero_()
    parts = order[1000:].split(BATCH)[:5]
    return model, [(to_network_input(images[part], SIZE), labels[part]) for part in parts]


def gradients(
    model: nn.Module, names: Sequence[str], batch: tuple[Tensor, Tensor], step: AbstractContextManager[Any]
) -> list[Tensor]:
    """Weight gradients of the named layers, flat; the forward pass runs in a context."""
    model.zero_grad(set_to_none=True)
    with step:
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    found = []
    for name in names:
        grad = model.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        found.append(grad.flatten().clone())
    return found


def measure(
    model: nn.Module, names: list[str], batches: list[tuple[Tensor, Tensor]], plain: list[Tensor], rank: dict[str, Any]
) -> dict[str, Any]:
    """Gradient cosines and kept bytes under one rank rule."""
    session = LanceSession(model, LanceConfig(rank=rank, bits=None, layers=names))
    session.start(observe=False)
    session.calibrate([lambda batch=batch: model(batch[0]) for batch in batches[1:]])  # type: ignore[misc]
    ours = gradients(model, names, batches[0], session.step())
    report = session.report
    assert report is not None
    session.stop()
    each = {name: F.cosine_similarity(a, b, dim=0).item() for name, a, b in zip(names, ours, plain, strict=True)}
    return {
        "cosine": F.cosine_similarity(torch.cat(ours), torch.cat(plain), dim=0).item(),
        "median": statistics.median(each.values()),
        "worst": min(each, key=each.__getitem__),
        "worst_cosine": min(each.values()),
        "plain_bytes": sum(layer.plain_bytes for layer in report.layers),
        "kept_bytes": sum(layer.measured_bytes or 0 for layer in report.layers),
        "layers": each,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), help="';'-separated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, batches = network()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    plain = gradients(model, names, batches[0], nullcontext())
    found = {}
    print(f"{'setting':28}{'kept of inputs':>18}{'ratio':>8}{'cosine':>9}{'median':>9}{'worst':>9}  worst layer")
    for setting in options.settings:
        row = found[setting] = measure(model, names, batches, plain, SETTINGS[setting])
        kept, whole = row["kept_bytes"] / 1e6, row["plain_bytes"] / 1e6
        print(
            f"{setting:28}{f'{kept:.2f} of {whole:.0f} MB':>18}{whole / kept:>7.0f}x{row['cosine']:>9.3f}"
            f"{row['median']:>9.3f}{row['worst_cosine']:>9.3f}  {row['worst']}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
