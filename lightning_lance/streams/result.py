"""What a stream has shown: the accuracy matrix and its summaries."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lance.tensors.files import write_whole
from lightning_lance.tensors.units import format_bytes
from lightning_lance.trainer.metrics import ContinualMetrics


@dataclass(frozen=True)
class StreamResult:
    """Accuracies of a stream, as far as it has run.

    Attributes:
        metrics: the counts behind them.
        summary: ACC, BWT, FWT and what else :func:`~lightning_lance.trainer.metrics.continual_metrics` defines, where
            it is defined.
        kept: for each experience, the bytes that autograd keeps for one batch, plainly and with LANCE, if measured.
        root: folder of the stream.
    """

    metrics: ContinualMetrics
    summary: dict[str, float]
    kept: list[list[float]]
    root: Path

    @property
    def matrix(self) -> Tensor:
        """Row i: accuracies after training on experience i, shape ``(N, N)``, NaN where nothing was evaluated."""
        return self.metrics.matrix

    @property
    def baseline(self) -> Tensor:
        """Accuracies before any training, shape ``(N,)``."""
        return self.metrics.baseline

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON; ``null`` where nothing was evaluated."""
        return {
            "summary": self.summary,
            "matrix": [_or_none(row) for row in self.matrix],
            "baseline": _or_none(self.baseline),
            "kept_bytes": self.kept,
        }

    def __str__(self) -> str:
        count = len(self.matrix)
        rows = [["trained up to", *(str(column) for column in range(count))]]
        if not self.baseline.isnan().all():
            rows.append(["nothing", *_percent(self.baseline)])
        rows += [[str(row), *_percent(self.matrix[row])] for row in range(count) if not self.matrix[row].isnan().all()]
        width = max(len(row[0]) for row in rows)
        lines = ["accuracy (%) on each experience"]
        lines += ["  ".join([row[0].rjust(width), *(cell.rjust(5) for cell in row[1:])]).rstrip() for row in rows]
        lines.append("  ".join(f"{name} {value:.3f}" for name, value in self.summary.items()))
        if self.kept and len(self.kept[-1]) == 2:
            before, after = self.kept[-1]
            lines.append(
                f"autograd keeps {format_bytes(after)} instead of {format_bytes(before)} for a batch of the last "
                "experience, measured"
            )
        return "\n".join(lines)

    def plot(self, folder: str | Path | None = None) -> list[Path]:
        """Draw the accuracy matrix and the accuracies over the stream; needs matplotlib (extra ``plot``).

        Args:
            folder: for ``matrix.png`` and ``accuracy.png``; ``plots`` in the folder of the stream by default.

        Returns:
            The files.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        found = Path(folder) if folder is not None else self.root / "plots"
        found.mkdir(parents=True, exist_ok=True)
        count = len(self.matrix)
        figures = []
        for name, size in (("matrix", (1.8 + 0.5 * count, 1.4 + 0.45 * count)), ("accuracy", (7.0, 4.0))):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            figures.append((found / f"{name}.png", figure))
        self.metrics.plot(ax=figures[0][1].subplots())
        axis = figures[1][1].subplots()
        matrix = 100 * self.matrix
        for column in range(count):
            axis.plot(range(column, count), matrix[column:, column].tolist(), marker=".", label=f"experience {column}")
        seen = [matrix[row, : row + 1].mean().item() for row in range(count)]
        axis.plot(range(count), seen, color="black", linewidth=2, label="mean of those learned")
        drawn = [value for value in matrix[torch.ones_like(matrix, dtype=torch.bool).tril()].tolist() if value == value]
        lowest = 10 * max(0, math.floor(min(drawn, default=0) / 10 - 0.2))  # else lines near 100 % are on one another
        axis.set(xlabel="trained up to experience", ylabel="accuracy (%)", xticks=range(count), ylim=(lowest, 101))
        figures[1][1].legend(loc="outside right center", fontsize="small")
        for path, figure in figures:
            drawing = io.BytesIO()
            figure.savefig(drawing, dpi=120, format=path.suffix[1:])
            write_whole(path, drawing.getvalue())
        return [path for path, _ in figures]


def _or_none(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _percent(values: Tensor) -> list[str]:
    return ["" if value != value else f"{100 * value:.1f}" for value in values.tolist()]
