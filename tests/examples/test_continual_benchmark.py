"""The continual benchmark: probes that change nothing, honest byte counts, every method, the table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("avalanche")
pytest.importorskip("mlxtend")
pytest.importorskip("quadprog")

from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

from examples.benchmarks import continual, continual_speed
from examples.benchmarks.continual import boundary_epochs, cell, main, options, seed_everything, table, third_means
from examples.benchmarks.methods import METHODS, OPTIMIZERS, Settings, make_optimizer, make_strategy
from examples.benchmarks.probes import MemoryProbe, StepEnd, StepStart, tensor_bytes
from examples.benchmarks.recipes import MODELS, Recipe
from examples.streams.digits import split_mnist
from lightning_lance import measure_saved_bytes


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    recipe = Recipe(lambda seed: split_mnist(seed, 100, 50), "mlp", epochs=1, lr=0.05, batch_size=5)
    monkeypatch.setitem(continual.RECIPES, "tiny", recipe)
    return "tiny"


def test_every_method_fills_its_row(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = Path("runs.json")
    runs = main(["--streams", tiny, "--seeds", "0", "--output", str(output), "--memory", "3", "--plots", "plots"])
    assert [run["method"] for run in runs] == list(METHODS)
    assert json.loads(output.read_text()) == runs
    assert len(list(Path("plots").iterdir())) == len(METHODS)
    by_method = {run["method"]: run for run in runs}
    for method, run in by_method.items():
        matrix = run["matrix"]
        known = [[value is not None for value in row] for row in matrix]
        assert known == [[method != "joint" or row == 4] * 5 for row in range(5)], method
        assert run["kept_bytes"] > 0
        assert run["step_seconds"] > 0
        assert (run["state_bytes"] == 0) == (method == "naive")
        for name in ("ACC", "BWT", "FWT", "learning_accuracy"):
            assert (run[name] is None) == (method == "joint" and name != "ACC"), (method, name)
    # All methods see the same network and data in the first experience.
    firsts = {
        method: by_method[method]["matrix"][0]
        for method in ("naive", "ewc", "si", "lwf", "gem", "gpm", "sgp", "trgp", "code-cl")
    }
    assert all(row == firsts["naive"] for row in firsts.values())
    assert by_method["lance"]["kept_bytes"] < by_method["gpm"]["kept_bytes"] == by_method["naive"]["kept_bytes"]
    pixels = 28 * 28 * 4
    assert by_method["joint"]["state_bytes"] == pytest.approx(100 * pixels, rel=0.01)
    assert by_method["replay"]["state_bytes"] == pytest.approx(3 * 5 * pixels, rel=0.05)
    printed = capsys.readouterr().out
    assert all(f"| {continual.LABELS[method]} " in printed for method in METHODS)


def test_an_interrupted_benchmark_goes_on_and_writes_its_page(tiny: str) -> None:
    arguments = ["--streams", tiny, "--seeds", "0", "--output", "some.json", "--document", "page.md", "--resume"]
    first = main([*arguments, "--methods", "naive", "replay"])
    whole = main([*arguments, "--methods", "naive", "ewc", "replay", "--seeds", "0", "1"])
    assert whole[:2] == first
    assert [(run["method"], run["seed"]) for run in whole[2:]] == [("ewc", 0), ("naive", 1), ("ewc", 1), ("replay", 1)]
    assert (
        main([*arguments, "--methods", "ewc", "--seeds", "0", "1"])
        == whole
        == json.loads(Path("some.json").read_text())
    )
    assert main([*arguments, "--methods", "naive", "--epochs", "2"])[-1]["epochs"] == 2, "another run than the first"
    page = Path("page.md").read_text()
    assert f"## {tiny}, sgd" in page
    assert page.index("| Naive") < page.index("| EWC") < page.index("| Replay")
    assert "step ms" not in page


def test_runs_repeat_and_seeds_differ(tiny: str) -> None:
    arguments = ["--streams", tiny, "--methods", "gpm", "--optimizers", "adamw", "--seeds", "0", "0", "1"]
    first, again, other = (run["matrix"] for run in main(arguments))
    assert first == again != other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_learn(name: str, tiny: str) -> None:
    if name == "adagrad" and torch.__version__ < "2.7":
        pytest.skip("Adagrad of torch 2.6 has no state for the heads that Avalanche adds later")
    [run] = main(["--streams", tiny, "--methods", "naive", "--optimizers", name, "--seeds", "0", "--epochs", "4"])
    assert run["learning_accuracy"] > 0.75


def train(method: str, probe: bool) -> tuple[nn.Module, MemoryProbe]:
    seed_everything(0)
    scenario = split_mnist(0, 100, 50)
    model = MODELS["mlp"]()
    watcher = MemoryProbe(1)
    strategy, _ = make_strategy(
        method,
        model,
        make_optimizer("momentum", model, 0.05),
        Settings(epochs=1, batch_size=5, memory_per_experience=3, experiences=5),
        before=[watcher] if probe else [],
    )
    for experience in scenario.train_stream[:2]:
        strategy.train(experience)
    return model, watcher


@pytest.mark.parametrize("method", ["naive", "ewc", "lwf", "agem", "lance"])
def test_measuring_changes_nothing(method: str) -> None:
    with_probe, watcher = train(method, True)
    without, _ = train(method, False)
    assert watcher.kept > 0
    for a, b in zip(with_probe.parameters(), without.parameters(), strict=True):
        assert a.equal(b)


def test_kept_bytes_are_those_of_one_training_step() -> None:
    model, watcher = train("naive", True)
    images, tasks = torch.rand(5, 1, 28, 28), torch.zeros(5, dtype=torch.long)
    loss = measure_saved_bytes(
        lambda: nn.functional.cross_entropy(model(images, tasks), torch.zeros(5, dtype=torch.long)), model
    )
    assert watcher.kept == loss.total > 5 * 784 * 4


def test_tensor_bytes_counts_each_storage_once_and_leaves_the_model_out() -> None:
    model = nn.Linear(4, 4)
    base = torch.zeros(10)
    holder: dict[str, Any] = {"views": [base[:2], base[5:]], "same": base, "model": model, "none": None, "text": "x"}
    holder["self"] = holder
    assert tensor_bytes(holder, model) == 40
    assert tensor_bytes(holder) == 40 + (16 + 4) * 4
    data = _make_taskaware_classification_dataset(
        TensorDataset(torch.zeros(50, 3), torch.zeros(50, dtype=torch.long)), task_labels=0, targets=[0] * 50
    )
    part = data.subset(list(range(7)))
    one = sum(value.numel() * value.element_size() for value in part[0] if isinstance(value, torch.Tensor))
    assert tensor_bytes([part, part]) == 7 * one >= 7 * 12
    assert tensor_bytes(None) == 0


def test_boundary_is_what_is_outside_of_the_steps() -> None:
    start = StepStart()
    end = StepEnd(start)
    start.times, end.times = [1.0, 3.0], [2.0, 5.0]
    assert end.seconds(0.5, 7.0) == ([1.0, 2.0], 4.0, 2.5)
    assert (start.times, end.times) == ([], [])


def test_boundary_in_epochs_of_naive_training_with_the_same_seed() -> None:
    run = {"stream": "s", "optimizer": "o", "seed": 1, "method": "gpm", "boundary_seconds": 3.0, "epoch_seconds": 9.0}
    naive = {**run, "method": "naive", "epoch_seconds": 2.0}
    assert boundary_epochs(run, [run, {**naive, "seed": 0, "epoch_seconds": 5.0}, naive]) == 1.5
    assert boundary_epochs(run, [run]) is None


def test_cells_and_table() -> None:
    assert cell([0.5, 0.6, 0.7], 100, 1) == f"60.0 ± {statistics.stdev([50, 60, 70]):.1f}"
    assert cell([0.5], 100, 1) == "50.0"
    assert cell([None, None], 100, 1) == "–"
    assert cell([1000.0, 3000.0], None, 0) == "2 KB"
    values = dict.fromkeys((key for _, key, *_ in continual.COLUMNS), 0.25)
    lines = table([{"method": "gpm", **values}, {"method": "naive", **values, "BWT": None}]).splitlines()
    assert [line.count("|") for line in lines] == [len(continual.COLUMNS) + 2] * 4
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["GPM", "Naive"]
    assert lines[3].split("|")[3].strip() == "–"
    assert len({len(line) for line in lines}) == 1


def test_thirds_of_a_stream() -> None:
    matrix = torch.diag(torch.arange(10) / 10)
    assert third_means(matrix) == pytest.approx((0.1, 0.8))
    matrix[4, 4] = torch.nan
    assert all(value != value for value in third_means(matrix))


def test_options_of_single_methods() -> None:
    found = options(["ewc.ewc_lambda=5", "lance.reserved=full", "lance.rank={'batch': 8}"])
    assert found == {"ewc": {"ewc_lambda": 5}, "lance": {"reserved": "full", "rank": {"batch": 8}}}
    settings = Settings(epochs=1, batch_size=1, method=found)
    assert settings.options("ewc", ewc_lambda=1.0, mode="separate") == {"ewc_lambda": 5, "mode": "separate"}
    for wrong in ("ewc_lambda=5", "nothing.x=1", "ewc.ewc_lambda"):
        with pytest.raises(SystemExit, match=r"METHOD\.NAME=VALUE"):
            options([wrong])
    with pytest.raises(ValueError, match="method 'icarl' is not known"):
        make_strategy("icarl", nn.Linear(1, 1), None, settings)  # type: ignore[arg-type]


def test_paired_steps_are_timed_in_all_experiences_but_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(lambda seed: split_mnist(seed, 100, 50), "mlp", epochs=1, lr=0.05, batch_size=5)
    monkeypatch.setitem(continual_speed.RECIPES, "tiny", recipe)
    arguments = ["--cases", "tiny", "--experiences", "3", "--pairs", "3", "--threads", "1", "--json", "speed.json"]
    (row,) = continual_speed.main(arguments)
    assert len(row.by_experience) == 2
    assert row.naive_seconds > 0.0
    assert row.quartiles[0] <= row.ratio <= row.quartiles[1]
    assert 0.0 < row.kept_ratio < 1.0
    written = json.loads(Path("speed.json").read_text())
    assert written["rows"][0]["by_experience"] == row.by_experience
    assert "tiny" in capsys.readouterr().out
