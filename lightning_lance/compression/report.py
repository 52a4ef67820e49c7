"""What a run did, as plain data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_lance.compression.saved_bytes import SavedBytes
from lightning_lance.compression.surgery import LeftAlone
from lightning_lance.tensors.units import format_bytes


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

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


@dataclass(frozen=True)
class Report:
    """Ranks, energies and bytes of a run.

    Attributes:
        layers: the compressed layers.
        left: layers with trainable parameters that were left alone, and why.
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
        return ["layer", "input", "kept core", "energy", "input", "kept", "ratio"], [
            _row(layer) for layer in self.layers
        ]

    def totals(self) -> list[str]:
        """One line for the compressed inputs and one for all that autograd keeps."""
        before, after = sum(layer.plain_bytes for layer in self.layers), sum(_kept(layer) for layer in self.layers)
        lines = [f"inputs of these {len(self.layers)} layers: {_change(before, after)}"]
        if self.plain is not None and self.compressed is not None:
            lines.append(f"all that autograd keeps, measured: {_change(self.plain.total, self.compressed.total)}")
        if self.captured_energy is not None:
            lines.append(f"energy of this batch in the kept subspaces: {self.captured_energy:.3f}")
        return lines

    def still_held(self, count: int = 5) -> list[str]:
        """What still holds memory, largest first, one line each."""
        if self.compressed is None:
            return []
        own = {layer.name for layer in self.layers}
        groups: dict[tuple[str, str], int] = {}
        for holder in self.compressed.holders:
            if holder.module not in own:
                key = (holder.module, holder.op)
                groups[key] = groups.get(key, 0) + holder.bytes
        ordered = sorted(groups.items(), key=lambda item: -item[1])[:count]
        return [f"{format_bytes(size)} by {op} in {module or 'the model itself'}" for (module, op), size in ordered]

    def render(self) -> str:
        """The table as text, drawn by rich where it is installed."""
        header, rows = self.rows()
        try:
            text = _rich_table(header, rows)
        except ImportError:
            text = plain_table(header, rows)
        lines = [text, *self.totals()]
        held = self.still_held(3)
        if held:
            lines += ["largest still held:", *(f"  {line}" for line in held)]
        if self.left:
            lines += ["left alone:", *(f"  {item}" for item in self.left[:6])]
            if len(self.left) > 6:
                lines.append(f"  and {len(self.left) - 6} more, see report.left")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.render()

    def plot(self, path: str | None = None) -> Any:
        """Bytes per layer before and after, and the captured energy; needs matplotlib (extra ``plot``).

        Args:
            path: image file to write; nothing is written by default.

        Returns:
            The matplotlib figure.
        """
        from matplotlib.figure import Figure

        names = [layer.name for layer in self.layers]
        height = 1.6 + 0.32 * len(names)
        figure = Figure(figsize=(10, max(3.0, height)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
        position = list(range(len(names)))
        left.barh([p - 0.2 for p in position], [layer.plain_bytes for layer in self.layers], 0.4, label="input")
        left.barh([p + 0.2 for p in position], [_kept(layer) for layer in self.layers], 0.4, label="kept")
        left.set(xscale="log", xlabel="bytes", yticks=position)
        left.set_yticklabels(names)
        left.invert_yaxis()
        left.legend()
        right.barh(position, [_joint_energy(layer) for layer in self.layers], 0.6, color="tab:green")
        right.set(xlim=(0, 1), xlabel="energy held by the truncated modes (product)")
        if self.ratio is not None and self.plain is not None and self.compressed is not None:
            figure.suptitle(
                f"autograd keeps {format_bytes(self.compressed.total)} instead of {format_bytes(self.plain.total)} "
                f"({self.ratio:.1f}x less, measured)"
            )
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def _mode_names(count: int) -> list[str]:
    return ["batch", "channel", *(f"spatial_{axis}" for axis in range(count - 2))]


def _kept(layer: LayerReport) -> int:
    return layer.formula_bytes if layer.measured_bytes is None else layer.measured_bytes


def _joint_energy(layer: LayerReport) -> float:
    product = 1.0
    for held in layer.energy.values():
        product *= held
    return product


def _times(before: float, after: float) -> str:
    ratio = before / max(after, 1)
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _change(before: int, after: int) -> str:
    return f"{format_bytes(before)} -> {format_bytes(after)} ({_times(before, after)} less)"


def _row(layer: LayerReport) -> list[str]:
    energy = " ".join(f"{held:.2f}" for held in layer.energy.values()) or "whole"
    return [
        layer.name,
        "x".join(map(str, layer.input_shape)),
        "x".join(map(str, layer.core_shape)),
        energy,
        format_bytes(layer.plain_bytes),
        format_bytes(_kept(layer)),
        _times(layer.plain_bytes, _kept(layer)) if layer.plain_bytes else "shared",
    ]


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of text columns; the last three are right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    right = len(header) - 3

    def line(row: list[str]) -> str:
        cells = [c.rjust(w) if i >= right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _rich_table(header: list[str], rows: list[list[str]]) -> str:
    import rich.box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="LANCE: activations kept for backward", title_justify="left", box=rich.box.SIMPLE)
    for index, title in enumerate(header):
        table.add_column(
            title, justify="right" if index >= len(header) - 3 else "left", overflow="fold", no_wrap=index > 3
        )
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
