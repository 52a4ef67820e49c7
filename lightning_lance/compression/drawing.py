"""A report as a picture; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_lance.tensors.units import format_bytes

if TYPE_CHECKING:
    from lightning_lance.compression.report import Report

_MOST = 12
"""Operators with a bar of their own; the rest is one more."""

_PLAIN, _KEPT, _ENERGY = "#9a9a9a", "#2f81c7", "#4c9f70"


def axis(ax: Any, size: tuple[float, float], what: str) -> tuple[Any, Any]:
    """A matplotlib axis and its figure.

    Args:
        ax: the axis to draw into; ``None``: that of a new figure.
        size: of a new figure in inches.
        what: method that draws, for the message.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs matplotlib, which is not installed: pip install 'lightning-lance[plot]'."
        ) from error
    return plt.subplots(figsize=size, layout="constrained") if ax is None else (ax.figure, ax)


def draw(report: Report) -> Any:
    """Bytes of plain training and what is held, by operator; with the inputs of projected layers beside it.

    Args:
        report: of a run.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib, which is not installed: pip install 'lightning-lance[plot]'."
        ) from error

    operators, before, after = _by_operator(report)
    layers = [layer.name for layer in report.layers]
    longest = max((len(name) for name in [*operators, *layers]), default=0)
    rows = max(len(operators), len(layers))
    width = 6 + 0.08 * longest
    figure = Figure(figsize=(width * (2 if layers else 1), max(2.6, 1.4 + 0.42 * rows)), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[3, 3, 1]) if layers else [figure.subplots()]
    _bars(panels[0], operators, before, after, "all that autograd keeps, by operator")
    if layers:
        inputs = [layer.plain_bytes for layer in report.layers]
        _bars(panels[1], layers, inputs, [layer.kept_bytes for layer in report.layers], "inputs of projected layers")
        panels[2].barh(range(len(layers)), [layer.joint_energy for layer in report.layers], 0.6, color=_ENERGY)
        panels[2].set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=[])
        panels[2].set_title("energy held", fontsize="medium")
        panels[2].set_ylim(panels[1].get_ylim())
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    if report.ratio is not None and report.plain is not None and report.compressed is not None:
        figure.suptitle(
            f"kept for backward: {format_bytes(report.compressed.total)} instead of "
            f"{format_bytes(report.plain.total)}, {report.ratio:.1f} times less"
        )
    return figure


def _by_operator(report: Report) -> tuple[list[str], list[int], list[int]]:
    """Names, plain bytes and bytes that are still held; operators of ours, which plain training would not run, too."""
    plain = {} if report.plain is None else report.plain.by_op()
    kept = {} if report.compressed is None else report.compressed.by_op()
    names = sorted({**plain, **kept}, key=lambda name: -max(plain.get(name, 0), kept.get(name, 0)))
    shown, rest = names[:_MOST], names[_MOST:]
    before, after = ([found.get(name, 0) for name in shown] for found in (plain, kept))
    if rest:
        shown = [*shown, f"{len(rest)} more"]
        before.append(sum(plain.get(name, 0) for name in rest))
        after.append(sum(kept.get(name, 0) for name in rest))
    return shown, before, after


def _bars(axes: Any, names: Sequence[str], before: Sequence[int], after: Sequence[int], title: str) -> None:
    places = range(len(names))
    axes.barh([place - 0.2 for place in places], before, 0.38, label="plain", color=_PLAIN)
    bars = axes.barh([place + 0.2 for place in places], after, 0.38, label="held", color=_KEPT)
    axes.bar_label(bars, [format_bytes(size) for size in after], padding=3, fontsize="small")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(int(value)))
    axes.locator_params(axis="x", nbins=4)
    axes.set_title(title, fontsize="medium")
