"""`profile --fit`: settings measured on the user's model and batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from lightning_lance import ConfigError, LanceCallback
from lightning_lance.cli import main
from lightning_lance.cli.fitting import STEPS, Measured, Setting, _Cut, _table, measure, settings
from tests.cli.small import QUIET, SmallData, SmallModule
from tests.cli.tool import refused

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCut:
    def test_parts_are_the_batch(self) -> None:
        whole = [{"x": torch.arange(10).view(5, 2), "y": [torch.arange(5.0), "name"], "z": torch.tensor(3)}] * 2
        cut = _Cut(whole, 2)
        parts = list(cut)
        assert len(parts) == len(cut) == 4
        for one, two, batch in ((parts[0], parts[1], whole[0]), (parts[2], parts[3], whole[1])):
            assert torch.equal(torch.cat([one["x"], two["x"]]), batch["x"])  # type: ignore[arg-type]
            assert torch.equal(torch.cat([one["y"][0], two["y"][0]]), batch["y"][0])  # type: ignore[index]
            assert one["y"][1] == "name"
            assert int(one["z"]) == 3
            assert abs(len(one["x"]) - len(two["x"])) <= 1

    @pytest.mark.parametrize("batch", [[torch.zeros(4), torch.zeros(6)], [torch.zeros(3)], ["text"]])
    def test_what_cannot_be_cut_is_refused(self, batch: Any) -> None:
        with pytest.raises(ConfigError, match="cannot be cut in 4 parts"):
            list(_Cut([batch], 4))


class TestSettings:
    def test_projecting_is_for_fine_tuning(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        everything = settings(net)
        assert {found.parts for found in everything} == {1, 2, 4}
        assert {found.rank for found in everything} == {None}
        net[0].requires_grad_(False)
        tuned = settings(net)
        assert set(tuned) - set(everything) == {Setting(parts, 4, "compact") for parts in (1, 2, 4)}
        assert settings(net, automatic=False) == [found for found in tuned if found.parts == 1]
        assert tuned[0].plain


def measured(setting: Setting) -> Measured:
    pl.seed_everything(7, workers=True)
    bits = 4 if setting.plain else setting.bits
    lance = LanceCallback(rank=setting.rank, bits=bits, calibration_batches=1, verbose=False)
    options: dict[str, Any] = {**QUIET, "fast_dev_run": STEPS * setting.parts}
    module = SmallModule()
    trainer = pl.Trainer(**options, callbacks=[lance])
    found = measure(trainer, module, SmallData(), setting)
    assert trainer.global_step == STEPS  # of the optimiser
    return found


class TestMeasure:
    def test_micro_batches_keep_their_part(self) -> None:
        whole, half = measured(Setting(1, 4)), measured(Setting(2, 4))
        for one in (whole, half):
            assert one.failed is None
            assert one.seconds > 0
            assert one.kept * 4 < one.kept_plain  # type: ignore[operator]
        assert half.kept_plain == pytest.approx(whole.kept_plain / 2, rel=0.02)  # type: ignore[operator]
        assert whole.kept * 0.4 < half.kept < whole.kept * 0.65  # type: ignore[operator]

    def test_weights_are_those_of_whole_batches(self) -> None:
        weights = []
        for parts in (1, 2):
            pl.seed_everything(7, workers=True)
            module = SmallModule()
            trainer = pl.Trainer(**{**QUIET, "fast_dev_run": STEPS * parts}, callbacks=[LanceCallback(verbose=False)])
            measure(trainer, module, SmallData(), Setting(parts, 32))
            weights.append(module.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name])

    def test_plain_training_is_without_the_callback(self) -> None:
        found = measured(Setting(1, 32))
        assert found.kept is None
        assert found.seconds > 0


def test_table_says_which_fit() -> None:
    rows = [
        Measured(Setting(1, 4), 2_000_000, 16_000_000, 30_000_000, 0.5),
        Measured(Setting(1, 32), None, None, 90_000_000, 0.4),
        Measured(Setting(4, 4), failed="batches cannot be cut"),
    ]
    lines = _table(rows, {1: 16_000_000}, 50_000_000).splitlines()
    assert lines[0].startswith("fits 50 MB")
    assert [line.split()[0] for line in lines[2:]] == ["yes", "no", "no"]
    assert "2 MB" in lines[2]
    assert "16 MB" in lines[3]
    assert max(map(len, lines)) <= 80


@pytest.fixture
def config(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    path = cwd / "config.yaml"
    model, data = {"class_path": "tests.cli.small.SmallModule"}, {"class_path": "tests.cli.small.SmallData"}
    path.write_text(yaml.safe_dump({"trainer": QUIET, "model": model, "data": data}))
    return path


@pytest.mark.parametrize("option", ["verbose=true", "preset=published"])  # what is tried contradicts the latter
def test_command(config: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    main(["profile", "--config", str(config), f"--lance.{option}", "--fit=1GB", "--seconds=0"])
    printed = capsys.readouterr()
    assert "1 of 9: plain, whole batches" in printed.err
    assert "fits 1 GB" in printed.out
    assert "8 more were not measured within 0 s" in printed.out
    [row] = [line for line in printed.out.splitlines() if line.startswith("yes")]
    assert float(row.split()[-2]) > 0


def test_not_a_number_of_bytes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "profile", "--config", str(config), "--fit=3XB")
    assert "fit='3XB' is not a number of bytes" in line
