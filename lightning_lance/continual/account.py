"""What each experience has taken of each layer: a table at its end, and a drawing over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_lance.compression.drawing import axis
from lightning_lance.compression.report import plain_table
from lightning_lance.tensors.units import format_bytes


class LayerAccount(NamedTuple):
    """One layer at the end of an experience.

    Attributes:
        layer: its name.
        width: directions in all.
        protected: directions that do not move any more.
        own: columns that the experience has for itself.
        bytes: size of what is stored of the layer: for all experiences, and the columns of this one.
        frozen: the layer was too full to train in the experience.
    """

    layer: str
    width: int
    protected: int
    own: int
    bytes: int
    frozen: bool

    @property
    def free(self) -> int:
        """Directions left to learn in."""
        return self.width - self.protected


Account = list[LayerAccount]
"""All layers at the end of one experience."""


def account_table(account: Account, experience: int, values: int = 0) -> str:
    """A table of text, a row for each layer.

    Args:
        account: of the experience.
        experience: its index, from 0.
        values: bytes of norms and biases that it has for itself.
    """
    header = ["layer", "trained", "protected", "free", "own columns", "state"]
    rows = []
    for row in account:
        taken = f"{row.protected} of {row.width} ({row.protected / max(row.width, 1):.0%})"
        trained = "frozen" if row.frozen else "yes"
        rows.append([row.layer, trained, taken, str(row.free), str(row.own), format_bytes(row.bytes)])
    width, protected = sum(row.width for row in account), sum(row.protected for row in account)
    own, size = sum(row.own for row in account), sum(row.bytes for row in account) + values
    if values:
        rows.append(["norms, biases", "yes", "", "", "its own", format_bytes(values)])
    taken = f"{protected} of {width} ({protected / max(width, 1):.0%})"
    rows.append(["all", "", taken, str(width - protected), str(own), format_bytes(size)])
    return f"LANCE, after experience {experience}\n{plain_table(header, rows)}"


def plot_capacity(history: Sequence[Account], ax: Any = None) -> tuple[Any, Any]:
    """Protected share of each layer over the experiences; a cross where it was frozen.

    Args:
        history: accounts of the experiences that have ended, as in ``ContinualSession.history``.
        ax: a matplotlib axis to draw into; a new figure by default.

    Returns:
        ``(figure, axis)``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, ax = axis(ax, (6.0, 3.5), "plot_capacity")
    for layer in dict.fromkeys(row.layer for account in history for row in account):
        known = [(index, row) for index, account in enumerate(history) for row in account if row.layer == layer]
        shares = [100.0 * row.protected / row.width for _, row in known]
        [line] = ax.plot([index for index, _ in known], shares, marker="o", markersize=3, label=layer)
        frozen = [index for index, (_, row) in enumerate(known) if row.frozen]
        ax.plot(
            [known[i][0] for i in frozen], [shares[i] for i in frozen], "x", color=line.get_color(), label="_frozen"
        )
    ax.set_xlabel("experience")
    ax.set_ylabel("protected (%)")
    ax.set_ylim(0.0, 100.0)
    if history:
        ax.legend(fontsize="small")
    return figure, ax
