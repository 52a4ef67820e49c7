"""The pictures of the documentation, each computed by the package: ``python docs/scripts/figures.py``.

Needs the extras ``plot`` and ``examples``. Every picture is written twice, NAME.png and NAME_dark.png, into docs/img.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.nn import functional as F

from lightning_lance import LanceSession
from lightning_lance.tensors.rounding import expand, round_to_bits

IMAGES = Path(__file__).resolve().parents[1] / "img"
PLAIN, OURS, LEVELS = "#9a9a9a", "#2f81c7", "#d9822b"
NETWORKS = ("resnet18", "efficientnet_b0", "swin_t")


def kept(size: int = 96, batch: int = 8) -> Figure:
    """What one training step keeps, operator by operator, plainly and with the defaults."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NETWORKS)), NETWORKS, strict=True):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name)
        session = LanceSession(model)
        session.start()
        images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
        with session.step():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        session.stop()
        report = session.report
        assert report is not None
        assert report.plain is not None
        assert report.compressed is not None
        before, after = report.plain.by_op(), report.compressed.by_op()
        names = [found for found in before if before[found] > 0.01 * report.plain.total][:6]
        place = np.arange(len(names))
        axes.barh(place - 0.2, [before[found] / 1e6 for found in names], 0.38, color=PLAIN, label="plain")
        axes.barh(
            place + 0.2, [after.get(found, 0) / 1e6 for found in names], 0.38, color=OURS, label="LanceCallback()"
        )
        axes.set_yticks(place, names)
        axes.invert_yaxis()
        axes.set(
            xlabel="MB kept for backward",
            title=f"{name}: {report.plain.total / 1e6:.0f} MB → {report.compressed.total / 1e6:.1f} MB",
        )
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


def store() -> Figure:
    """Where what autograd keeps goes between the forward and the backward pass."""
    figure = Figure(figsize=(10, 3.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 3.6))
    axes.axis("off")
    ink = mpl.rcParams["text.color"]

    def box(x: float, y: float, text: str, width: float = 1.35, edge: str = PLAIN) -> None:
        axes.add_patch(
            FancyBboxPatch((x, y), width, 0.62, boxstyle="round,pad=0.04", facecolor="none", edgecolor=edge, lw=1.6)
        )
        axes.text(x + width / 2, y + 0.31, text, ha="center", va="center", fontsize=9.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = ink) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, lw=1.3))

    columns = [
        ("batch_norm", "its input:\n4 bits a number"),
        ("relu", "positive or not:\n1 bit, exact"),
        ("conv2d", "nothing: computed\nagain from these two"),
        ("max_pool2d", "place in the window:\n1 byte, exact"),
    ]
    for index, (operator, what) in enumerate(columns):
        x = 1.35 + 2.05 * index
        box(x, 2.75, operator)
        box(x - 0.15, 1.48, what, 1.65, OURS)
        box(x, 0.2, f"{operator}\nbackward")
        arrow((x + 0.67, 2.7), (x + 0.67, 2.18), OURS)
        arrow((x + 0.67, 1.42), (x + 0.67, 0.9), OURS)
        arrow((x + 1.42, 3.06), (x + 1.98, 3.06))
        arrow((x + 1.98, 0.51), (x + 1.42, 0.51))
    axes.text(0.1, 3.06, "forward,\nstock operators", va="center", fontsize=9)
    axes.text(0.1, 1.79, "the store,\nin between", va="center", fontsize=9, color=OURS)
    axes.text(0.1, 0.51, "backward,\nstock operators", va="center", fontsize=9)
    axes.text(9.6, 3.06, "loss", va="center", fontsize=9.5)
    axes.text(9.6, 0.51, "loss", va="center", fontsize=9.5)
    return figure


def rounding() -> Figure:
    """One group of 128 neighbours, as it is and as it is kept."""
    values = F.silu(torch.randn(128, generator=torch.Generator().manual_seed(1)) * 1.5)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, bits in zip(figure.subplots(1, 2, sharey=True), (4, 2), strict=True):
        rounded = round_to_bits(values, bits, 128)
        assert rounded is not None
        back = expand(rounded, torch.float32)
        for level in back.unique().tolist():
            axes.axhline(level, color=LEVELS, lw=0.6, alpha=0.6)
        axes.plot(values, ".", color=PLAIN, ms=5, label="as it is")
        axes.plot(back, ".", color=OURS, ms=5, label="as it comes back")
        error = float((back - values).norm() / values.norm())
        axes.set(
            xlabel="128 neighbours in memory",
            title=f"{bits} bits: {rounded.nbytes} bytes instead of {values.nbytes}, error {error:.0%}",
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2)
    return figure


def energy() -> Figure:
    """Energy that the leading directions of a layer's input hold, mode by mode."""
    from examples.data.mnist import load_digits, to_network_input
    from examples.models.efficientnet_lite0 import efficientnet_lite0

    images, _ = load_digits()
    model = efficientnet_lite0(pretrained=True).eval()
    layers = model.pointwise()
    seen: dict[int, torch.Tensor] = {}
    chosen = [len(layers) // 3, 2 * len(layers) // 3]
    hooks = [
        layers[index].register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[0]}))
        for index in chosen
    ]
    with torch.no_grad():
        model(to_network_input(images[:: len(images) // 64][:64], 112))
    for hook in hooks:
        hook.remove()
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, index in zip(figure.subplots(1, 2, sharey=True), chosen, strict=True):
        input = seen[index]
        for mode, color, name in ((1, OURS, "channel"), (2, LEVELS, "row"), (3, "#4c9f70", "column")):
            unfolded = input.movedim(mode, 0).flatten(1).double()
            spectrum = torch.linalg.eigvalsh(unfolded @ unfolded.T).flip(0).clamp(min=0)
            share = (spectrum.cumsum(0) / spectrum.sum()).float()
            axes.plot(np.arange(1, len(share) + 1) / len(share), share, color=color, label=f"{name}, of {len(share)}")
        axes.axhline(0.9, color=PLAIN, lw=1, ls=":")
        axes.set(
            xlabel="share of the directions of a mode",
            title="input of a pointwise convolution, " + " × ".join(map(str, input.shape)),
            ylim=(0, 1.02),
            xlim=(0, 1),
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
    figure.axes[0].set_ylabel("energy held")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"kept": kept, "store": store, "rounding": rounding, "energy": energy}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only or FIGURES:
        for suffix, style in (("", "default"), ("_dark", "dark_background")):
            dark: dict[str, Any] = {"figure.facecolor": "#1e2129", "axes.facecolor": "#1e2129"} if suffix else {}
            with mpl.style.context(style), mpl.rc_context(dark):
                FIGURES[name]().savefig(options.output / f"{name}{suffix}.png", dpi=130)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    result.add_argument("--only", nargs="+", choices=list(FIGURES), help="these alone")
    result.add_argument("--output", type=Path, default=IMAGES, help="folder to write into")
    return result


if __name__ == "__main__":
    main()
