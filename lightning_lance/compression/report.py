"""What a run did, as plain data and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_lance.compression.drawing import draw
from lightning_lance.compression.saved_bytes import SavedBytes
from lightning_lance.compression.surgery import LeftAlone
from lightning_lance.tensors.units import format_bytes

LITTLE = 250_000
"""Bytes that plain training keeps of a step, below which nothing is rounded unasked: the process peaks higher by what
that itself takes, and each step takes longer."""


@dataclass(frozen=True)
class LayerReport:
    """One layer whose input is projected.

    Attributes:
        name: qualified name.
        type: class of the stock layer.
        input_shape: input of the measured batch.
        core_shape: what is kept of it, ``(batch, channel, spatial...)``.
        energy: fraction of the calibration energy that each truncated mode holds.
        plain_bytes: bytes of the input; 0 where it is that of an earlier layer, which shares its core.
        formula_bytes: bytes of core, factors and groups of samples.
        measured_bytes: bytes that autograd keeps for the layer; ``None`` where nothing was measured.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    core_shape: tuple[int, ...]
    energy: dict[str, float]
    plain_bytes: int
    formula_bytes: int
    measured_bytes: int | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes kept of the input: measured, or by the formula."""
        return self.formula_bytes if self.measured_bytes is None else self.measured_bytes

    @property
    def joint_energy(self) -> float:
        """Product of the fractions that the truncated modes hold; 1 where none is truncated."""
        return math.prod(self.energy.values())


@dataclass(frozen=True)
class Report:
    """Ranks, energies and bytes of a run.

    Attributes:
        layers: the layers whose inputs are projected.
        left: layers with trainable parameters that are not, where others are, and why.
        plain: what autograd keeps for one batch without this package.
        compressed: what it keeps with it, holders largest first.
        captured_energy: energy of the measured batch in the learned subspaces, over all layers.
        notes: advice, one line each.
    """

    layers: list[LayerReport]
    left: list[LeftAlone] = field(default_factory=list)
    plain: SavedBytes | None = None
    compressed: SavedBytes | None = None
    captured_energy: float | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_little(cls, plain: SavedBytes) -> Report:
        """Of steps that keep less than :data:`LITTLE`, and run plainly."""
        note = f"less than {format_bytes(LITTLE)} a step trains plainly from here on, which is faster; bits=4 rounds it"
        return cls([], [], plain, plain, notes=[f"little to gain: {note}"])

    @property
    def ratio(self) -> float | None:
        """Measured bytes before over after."""
        if self.plain is None or self.compressed is None:
            return None
        return self.plain.total / max(self.compressed.total, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON (dtypes as strings)."""
        found = asdict(self)
        for key in ("plain", "compressed"):
            for holder in (found[key] or {}).get("holders", []):
                holder["dtype"] = str(holder["dtype"]).removeprefix("torch.")
        return found

    def metrics(self) -> dict[str, float]:
        """Scalars for a logger."""
        found: dict[str, float] = {
            "lance/formula_bytes": sum(layer.formula_bytes for layer in self.layers),
            "lance/plain_input_bytes": sum(layer.plain_bytes for layer in self.layers),
        }
        if self.plain is not None and self.compressed is not None:
            found["lance/saved_bytes_plain"] = self.plain.total
            found["lance/saved_bytes"] = self.compressed.total
        if self.captured_energy is not None:
            found["lance/captured_energy"] = self.captured_energy
        for layer in self.layers:
            for mode, rank in zip(_mode_names(len(layer.core_shape)), layer.core_shape, strict=True):
                found[f"lance/rank/{layer.name}/{mode}"] = rank
        return found

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, one row a layer."""
        return ["layer", "input", "core", "energy", "plain", "kept", "ratio"], [_row(layer) for layer in self.layers]

    def totals(self) -> list[str]:
        """One line for the inputs of projected layers, where there are any, and one for all that autograd keeps."""
        before, after = sum(layer.plain_bytes for layer in self.layers), sum(layer.kept_bytes for layer in self.layers)
        count = f"{len(self.layers)} projected {'layer' if len(self.layers) == 1 else 'layers'}"
        lines = [f"inputs of {count}: {_change(before, after)}"] if self.layers else []
        if self.plain is not None and self.compressed is not None:
            lines.append(f"all that autograd keeps, measured: {_change(self.plain.total, self.compressed.total)}")
        if self.captured_energy is not None:
            lines.append(f"energy of this batch in the kept subspaces: {self.captured_energy:.3f}")
        return lines

    def by_operator(self, count: int = 6) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table of what autograd keeps, one row an operator, that which still holds most first.

        Args:
            count: rows; the rest is summed in one more.
        """
        if self.plain is None or self.compressed is None:
            return [], []
        before, after = self.plain.by_op(), self.compressed.by_op()
        order = sorted({**after, **before}, key=lambda name: (-after.get(name, 0), -before.get(name, 0)))
        shown = [name for name in order[:count] if before.get(name, 0) or after.get(name, 0)]
        rows = [_operator_row(name, before.get(name, 0), after.get(name, 0)) for name in shown]
        rest = order[count:]
        if rest:
            sums = [sum(kept.get(name, 0) for name in rest) for kept in (before, after)]
            rows.append(_operator_row(f"{len(rest)} more", *sums))
        return ["kept for", "plain", "kept", "ratio"], rows

    def still_held(self, count: int = 5) -> list[str]:
        """What still holds memory, by operator, largest first, one line each."""
        if self.compressed is None:
            return []
        ordered = list(self.compressed.by_op().items())[:count]
        return [f"{format_bytes(size)} for {name}" for name, size in ordered]

    def render(self, layers: bool = True) -> str:
        """The report as text, drawn by rich where it is installed: what is kept by operator, advice last.

        Args:
            layers: begin with the projected layers, one row each, and say which are not and why; otherwise a line tells
                how many there are.
        """
        lines = []
        totals = self.totals()
        if layers and self.layers:
            lines += [_table("LANCE: inputs that are projected", *self.rows()), totals.pop(0)]
        elif self.layers:
            totals[0] += "; print(callback.report) lists them"
        header, rows = self.by_operator()
        if rows:
            lines.append(_table("LANCE: activations kept for backward", header, rows))
        lines += totals
        if layers and self.left:
            lines += ["not projected:", *(f"  {item}" for item in self.left[:6])]
            if len(self.left) > 6:
                lines.append(f"  and {len(self.left) - 6} more, see report.left")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.render()

    def plot(self, path: str | None = None) -> Any:
        """What plain training would keep and what is still held, by operator, with the inputs of projected layers and
        their energies beside it; needs matplotlib (extra ``plot``).

        Args:
            path: image file to write; nothing is written by default.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra.
        """
        figure = draw(self)
        if path is not None:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        return figure


def _mode_names(count: int) -> list[str]:
    return ["batch", "channel", *(f"spatial_{axis}" for axis in range(count - 2))]


def _times(before: float, after: float) -> str:
    ratio = before / max(after, 1)
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _change(before: int, after: int) -> str:
    if after == before:
        return f"{format_bytes(before)}, as plain training keeps"
    return f"{format_bytes(before)} -> {format_bytes(after)} ({_times(before, after)} less)"


def _operator_row(name: str, before: int, after: int) -> list[str]:
    ratio = _times(before, after) if 0 < after <= before else "-"  # codes may be another's who saves them first
    return [name, format_bytes(before), format_bytes(after), ratio]


def _row(layer: LayerReport) -> list[str]:
    energy = " ".join(f"{held:.2f}" for held in layer.energy.values()) or "whole"
    return [
        layer.name,
        "x".join(map(str, layer.input_shape)),
        "x".join(map(str, layer.core_shape)),
        energy,
        format_bytes(layer.plain_bytes),
        format_bytes(layer.kept_bytes),
        _times(layer.plain_bytes, layer.kept_bytes) if layer.kept_bytes else "shared",
    ]


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of text columns; the last three are right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    right = len(header) - 3

    def line(row: list[str]) -> str:
        cells = [c.rjust(w) if i >= right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    try:
        return _rich_table(title, header, rows)
    except ImportError:
        return f"{title}\n{plain_table(header, rows)}"


def _rich_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    import rich.box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for index, name in enumerate(header):
        table.add_column(
            name, justify="right" if index >= len(header) - 3 else "left", overflow="fold", no_wrap=index > 3
        )
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
