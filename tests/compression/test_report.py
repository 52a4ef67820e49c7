"""The report: plain data, metrics, the table, the plot."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lance import LanceConfig, LanceSession, Report
from lightning_lance.compression.report import plain_table
from tests.trainers import small_net

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 32


@pytest.fixture
def report() -> Report:
    net = nn.ModuleDict({"body": small_net(), "spare": nn.Linear(4, 4)})
    net.rnn = nn.LSTM(2, 2)
    net.linear = nn.Linear(5, 5).requires_grad_(False)
    x = torch.randn(BATCH, 3, 8, 8)
    session = LanceSession(net, LanceConfig(rank={"batch": "compact", "channel": 0.8, "spatial": 2}))
    session.start()
    session.calibrate([lambda: net["body"](x)])
    with session.step():
        loss = net["body"](x).sum()
    loss.backward()
    session.stop()
    assert session.report is not None
    return session.report


def test_layers_say_what_was_kept(report: Report) -> None:
    rows = {layer.name: layer for layer in report.layers}
    assert list(rows) == ["body.0", "body.3", "body.9"]
    first = rows["body.0"]
    assert first.type == "Conv2d"
    assert first.input_shape == (BATCH, 3, 8, 8)
    assert first.core_shape[0] == BATCH // 6 + 1
    assert first.core_shape[2:] == (2, 2)
    assert set(first.energy) == {"channel", "spatial_0", "spatial_1"}
    assert first.energy["channel"] > 0.8
    assert first.plain_bytes == BATCH * 3 * 8 * 8 * 4
    assert first.core_shape[1] == 3
    # 72 elements, too few to be rounded, two factors of 8 x 2, the sample order.
    assert first.formula_bytes == 4 * (72 + 16 + 16 + BATCH)
    assert {item.name for item in report.left} == {"rnn", "spare"}


def test_totals_are_those_of_the_holders(report: Report) -> None:
    for found in (report.plain, report.compressed):
        assert found is not None
        assert found.total == sum(holder.bytes for holder in found.holders)
    assert report.ratio == report.plain.total / report.compressed.total  # type: ignore[union-attr]


def test_plain_data_is_json(report: Report) -> None:
    found = json.loads(json.dumps(report.as_dict()))
    assert found["plain"]["total"] == report.plain.total  # type: ignore[union-attr]
    assert found["layers"][0]["name"] == "body.0"
    assert found["compressed"]["holders"][0]["dtype"] in ("float32", "int32", "uint8", "bool")
    assert found["left"][0].keys() == {"name", "type", "reason"}


def test_metrics_are_flat_numbers(report: Report) -> None:
    found = report.metrics()
    assert all(isinstance(value, (int, float)) for value in found.values())
    assert all(key.startswith("lance/") for key in found)
    assert found["lance/rank/body.3/spatial_1"] == 2
    assert found["lance/saved_bytes"] == report.compressed.total  # type: ignore[union-attr]
    assert found["lance/formula_bytes"] == sum(layer.formula_bytes for layer in report.layers)


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_names_every_layer_and_what_is_left(
    report: Report, with_rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "160")
    else:
        for name in ("rich", "rich.box", "rich.console", "rich.table"):
            monkeypatch.setitem(__import__("sys").modules, name, None)
    text = str(report)
    for layer in report.layers:
        assert layer.name in text
        assert "x".join(map(str, layer.core_shape)) in text
    assert "rnn (LSTM): no variant for LSTM" in text
    assert "spare (Linear): calibration never saw an input of it" in text
    assert f"({report.ratio:.0f}x less)" in text
    assert text.count("LANCE: activations kept for backward") == 1
    assert all(len(set(header)) == len(header) for header, _ in (report.rows(), report.by_operator()))
    short = report.render(layers=False)  # what a fit prints: one table
    assert "LANCE: inputs" not in short
    assert f"inputs of {len(report.layers)} projected layers: " in short
    assert "rnn (LSTM)" not in short


def test_what_still_holds_memory_is_named_largest_first(report: Report) -> None:
    assert report.compressed is not None
    lines = report.still_held(50)
    assert [line.rsplit(" for ", 1)[1] for line in lines] == list(report.compressed.by_op())
    assert len(report.still_held(1)) == 1
    header, rows = report.by_operator(2)
    assert len(header) == 4
    assert [row[0] for row in rows[:2]] == list(report.compressed.by_op())[:2]
    assert rows[2][0].endswith(" more")


def test_a_report_without_measurement_renders(report: Report) -> None:
    bare = Report(report.layers)
    assert bare.ratio is None
    assert bare.still_held() == []
    assert "body.3" in bare.render()
    assert "lance/saved_bytes" not in bare.metrics()
    assert json.dumps(bare.as_dict())


def test_plain_table_aligns_columns() -> None:
    text = plain_table(["a", "b", "c", "d"], [["x", "1", "22", "333"], ["long", "4444", "5", "6"]])
    lines = text.splitlines()
    assert lines[0].startswith("a     ")
    assert len({len(line) for line in lines}) == 1


def test_plot_writes_an_image(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report.plot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    operators, layers, energies = figure.axes
    assert report.plain is not None
    assert report.compressed is not None
    drawn = dict(
        zip(
            [label.get_text() for label in operators.get_yticklabels()],
            [bar.get_width() for bar in operators.containers[1]],
            strict=True,
        )
    )
    assert {name: size for name, size in drawn.items() if size} == report.compressed.by_op()
    assert set(report.plain.by_op()) <= set(drawn)
    assert [label.get_text() for label in layers.get_yticklabels()] == [layer.name for layer in report.layers]
    assert [bar.get_width() for bar in layers.containers[0]] == [layer.plain_bytes for layer in report.layers]
    assert len(energies.patches) == 3


def test_no_label_of_a_plot_is_cut(report: Report) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    long = [replace(layer, name=f"model.encoder.{layer.name}.attention.projection") for layer in report.layers]
    for found in (replace(report, layers=long), replace(report, layers=[])):
        figure = found.plot()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        whole = figure.bbox
        for axes in figure.axes:
            left, right = axes.get_xlim()
            ticks = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
            for text in [*axes.get_yticklabels(), *ticks, *axes.texts, axes.title]:
                box = text.get_window_extent()
                if text.get_text():
                    assert box.x0 >= whole.x0 - 1, text.get_text()
                    assert box.x1 <= whole.x1 + 1, text.get_text()


def test_plot_without_matplotlib_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lance\[plot\]'"):
        report.plot()
