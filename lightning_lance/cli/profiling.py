"""What autograd keeps for one training batch, before and after."""

from __future__ import annotations

import copy
import io
import json as jsonlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_lance.compression.report import Report, plain_table
from lightning_lance.errors import ConfigError, StateError
from lightning_lance.tensors.files import write_whole
from lightning_lance.tensors.units import format_bytes
from lightning_lance.trainer.callback import LanceCallback


class _Measured(Exception):
    """Ends a fit that has measured what it was started for."""


class _StopWhenMeasured(Callback):
    def __init__(self, lance: LanceCallback) -> None:
        self.lance = lance

    def on_train_batch_end(self, *_: Any) -> None:
        if self.lance.session is not None and self.lance.session.reported:
            raise _Measured


def profile(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    top: int = 12,
    json: str | None = None,
    plot: str | None = None,
) -> Report:
    """Start a fit, let the callback measure its first steps, stop, and give the model its weights back.

    One step is taken, and where inputs are projected as many before as define the subspaces.

    Args:
        trainer: with a :class:`~lightning_lance.LanceCallback`.
        model: the model.
        datamodule: its data; the model's own ``train_dataloader`` by default.
        top: rows of each table.
        json: file to write the measurement to.
        plot: image file to draw it in; needs matplotlib.

    Returns:
        The callback's report.

    Raises:
        StateError: the Trainer has no LanceCallback, or the fit ended before anything was measured.
    """
    lance = next((found for found in trainer.callbacks if isinstance(found, LanceCallback)), None)  # type: ignore[attr-defined]
    if lance is None:
        raise StateError("profile() needs a Trainer with a LanceCallback: Trainer(callbacks=[LanceCallback()]).")
    for name, path in (("json", json), ("plot", plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{name}={path!r} is not allowed: there is no such folder. Make it first.")
    lance.verbose = False
    before = copy.deepcopy(model.state_dict())
    stop = _StopWhenMeasured(lance)
    trainer.callbacks.insert(trainer.callbacks.index(lance) + 1, stop)  # type: ignore[attr-defined]
    try:
        trainer.fit(model, datamodule=datamodule)
    except _Measured:
        pass
    finally:
        trainer.callbacks.remove(stop)  # type: ignore[attr-defined]
        model.load_state_dict(before)
    report = lance.report
    if report is None or report.plain is None or report.compressed is None:
        raise StateError("the fit ended before its first training batch: is there training data?")
    if trainer.is_global_zero:
        print(_text(report, top))  # noqa: T201 - what the command is for
        if json is not None:
            write_whole(json, jsonlib.dumps(as_dict(report), indent=2) + "\n")
        if plot is not None:
            try:
                drawing = io.BytesIO()
                report.plot().savefig(drawing, dpi=120, format=Path(plot).suffix[1:] or None)
                write_whole(plot, drawing.getvalue())
            except ImportError:
                raise ConfigError(
                    f"plot={plot!r} needs matplotlib; pip install 'lightning-lance[plot]' installs it."
                ) from None
            except ValueError as error:  # a suffix that matplotlib does not know
                raise ConfigError(f"plot={plot!r} is not allowed. {error}") from None
    return report


def as_dict(report: Report) -> dict[str, Any]:
    """The report as plain containers, with the sums by operation and by module."""
    found = report.as_dict()
    assert report.plain is not None
    assert report.compressed is not None
    for key, saved in (("plain", report.plain), ("compressed", report.compressed)):
        found[key]["by_op"] = saved.by_op()
        found[key]["by_module"] = dict(sorted(saved.by_module().items(), key=lambda item: -item[1]))
    return found


def _text(report: Report, top: int) -> str:
    assert report.plain is not None
    assert report.compressed is not None
    by_op = _compared("operation", report.plain.by_op(), report.compressed.by_op(), top)
    by_module = _compared("module", report.plain.by_module(), report.compressed.by_module(), top)
    return "\n\n".join([report.render(), by_op, by_module])


def _compared(what: str, before: dict[str, int], after: dict[str, int], top: int) -> str:
    names = sorted({*before, *after}, key=lambda name: -max(before.get(name, 0), after.get(name, 0)))
    shown, rest = names[:top], names[top:]
    rows = [_row(name or "the model itself", before.get(name, 0), after.get(name, 0)) for name in shown]
    if rest:
        sums = [sum(kept.get(name, 0) for name in rest) for kept in (before, after)]
        rows.append(_row(f"{len(rest)} more", *sums))
    rows.append(_row("all", sum(before.values()), sum(after.values())))
    return plain_table([f"kept by {what}", "plain", "LANCE", "ratio"], rows)


def _row(name: str, before: int, after: int) -> list[str]:
    ratio = before / after if before and after else 0.0
    text = "-" if not ratio else f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"
    return [name, format_bytes(before), format_bytes(after), text]
